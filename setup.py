"""Builds ``fastmeta._C``, the CPU kernels, on torch's stable ABI. All the rest is in pyproject.toml.

The extension is optional: where it cannot be built the package installs without it, runs on the reference backend, and ``fastmeta info``
tells the reason that is written down here.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
STABLE_ABI = (2, 10)  # the oldest torch that the built extension runs under
FAILURE = "build_failure.txt"


class BuildExtension(build_ext):
    """Finds torch and pybind11, and turns a failure into a note in the package."""

    def run(self):
        note = Path(self.get_ext_fullpath("fastmeta._C")).with_name(FAILURE)
        note.unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"the extension was not built: {error}\n")
            self.warn(f"fastmeta installs without its compiled kernels: {error}")
            self.extensions = []  # nothing that a later step, as an editable install, should copy

    def build_extension(self, extension):
        import pybind11
        import torch

        if torch.__version__ < torch.torch_version.TorchVersion(".".join(map(str, STABLE_ABI))):
            raise RuntimeError(f"torch {torch.__version__} is older than {'.'.join(map(str, STABLE_ABI))}")
        torch_root = Path(torch.__file__).parent
        extension.include_dirs += [str(torch_root / "include"), pybind11.get_include()]
        extension.library_dirs.append(str(torch_root / "lib"))
        super().build_extension(extension)

    def get_outputs(self):
        outputs = super().get_outputs()
        note = Path(self.get_ext_fullpath("fastmeta._C")).with_name(FAILURE)
        return outputs + [str(note)] if note.exists() else outputs


major, minor = STABLE_ABI
extension = Extension(
    "fastmeta._C",
    sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")),
    depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*.h")),
    include_dirs=["csrc"],
    libraries=["torch_cpu", "c10"],
    language="c++",
    # -fno-trapping-math and -fno-math-errno change no value; they let loops with comparisons and roots become vector code.
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden", "-Wall",
                        "-Wno-psabi", "-Wno-unknown-pragmas", f"-ffile-prefix-map={ROOT}/="],
    define_macros=[("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000"),
                   ("FASTMETA_STABLE_ABI", f'"{major}.{minor}"')],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
