"""Builds ``fastmeta._C``, the CPU kernels, and ``fastmeta._C_cuda``, the CUDA kernels, on torch's stable ABI. All the rest is in pyproject.toml.

Both are optional: where one cannot be built the package installs without it, other backends run, and ``fastmeta info`` tells the reason that is
written down here. ``_C_cuda`` is built wherever nvcc is found, whether or not there is a GPU. Environment variables:

* ``FASTMETA_CUDA``: 0 leaves ``_C_cuda`` out, 1 makes it an error if it cannot be built.
* ``MAX_JOBS``: how many compilers run at a time; default: as many as there are cores.
* ``FASTMETA_CUDA_ARCHITECTURES``: what to compile for, as in ``80;90``; PTX of the last one serves newer ones. Default: all of ARCHITECTURES that nvcc knows.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
STABLE_ABI = (2, 10)  # the oldest torch that the built extensions run under
ARCHITECTURES = "75;80;86;89;90;100;120"
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin", "nvcc") for home in homes] + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return str(candidate)
    raise RuntimeError("nvcc was not found by CUDA_HOME, PATH or in /usr/local/cuda")


def architectures(nvcc: str) -> list[str]:
    asked = os.environ.get("FASTMETA_CUDA_ARCHITECTURES")
    wanted = [name for name in (asked or ARCHITECTURES).replace(",", ";").split(";") if name]
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    unknown = [name for name in wanted if f"compute_{name}" not in listed]
    if asked and unknown:
        raise RuntimeError(f"{nvcc} cannot compile for {', '.join(unknown)}, of FASTMETA_CUDA_ARCHITECTURES={asked}; it knows {', '.join(listed)}")
    return [name for name in wanted if name not in unknown]


class BuildExtensions(build_ext):
    """Finds torch, pybind11 and nvcc, and turns a failure into a note in the package."""

    def build_extensions(self):
        compile = self.compiler.compile
        pool = ThreadPoolExecutor(JOBS)
        self.compiler.compile = lambda sources, **how: sum(pool.map(lambda source: compile([source], **how), sources), [])
        with pool, ThreadPoolExecutor(len(self.extensions)) as side_by_side:
            built = list(side_by_side.map(self.attempt, self.extensions))
        self.extensions[:] = [e for e, there in zip(self.extensions, built) if there]  # only these has a later step, as an editable install, to copy

    def attempt(self, extension) -> bool:
        """Whether it could be built; if not, the reason is written down."""
        note = self.note(extension)
        note.unlink(missing_ok=True)
        try:
            self.build_extension(extension)
            return True
        except Exception as error:
            if extension.name == "fastmeta._C_cuda" and os.environ.get("FASTMETA_CUDA") == "1":
                raise
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{extension.name} was not built: {error}\n")
            self.warn(note.read_text())
            return False

    def build_extension(self, extension):
        import pybind11
        import torch

        if torch.__version__ < torch.torch_version.TorchVersion(".".join(map(str, STABLE_ABI))):
            raise RuntimeError(f"torch {torch.__version__} is older than {'.'.join(map(str, STABLE_ABI))}")
        torch_root = Path(torch.__file__).parent
        extension.include_dirs += [str(torch_root / "include"), pybind11.get_include()]
        extension.library_dirs.append(str(torch_root / "lib"))
        if extension.name == "fastmeta._C_cuda":
            self.build_cuda(extension)
        else:
            super().build_extension(extension)

    def build_cuda(self, extension):
        """With nvcc from the sources to the module: it brings its own headers, and the CUDA runtime, statically."""
        if os.environ.get("FASTMETA_CUDA") == "0":
            raise RuntimeError("FASTMETA_CUDA=0")
        nvcc = find_nvcc()
        wanted = architectures(nvcc)
        if not wanted:
            raise RuntimeError(f"{nvcc} compiles for none of {ARCHITECTURES}")
        codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in wanted] + [f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}"]
        includes = [f"-I{path}" for path in (*extension.include_dirs, *self.include_dirs)]
        macros = [f"-D{name}={value}" for name, value in (*extension.define_macros, ("FASTMETA_CUDA_ARCHITECTURES", f'"{", ".join(wanted)}"'))]
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{Path(source).name}.o") for source in extension.sources]
        for source, target in zip(extension.sources, objects):
            self.spawn([nvcc, "-c", source, "-o", target, *(codes if source.endswith(".cu") else ()), "--threads", str(JOBS), *NVCC_FLAGS,
                        "-Xcompiler", f"-fPIC,-fvisibility=hidden,-Wall,-ffile-prefix-map={ROOT}/=", *includes, *macros])
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([nvcc, "-shared", "-cudart", "static", "-Xlinker", "-s", "-o", str(target), *objects, *(f"-L{path}" for path in extension.library_dirs),
                    *(f"-l{name}" for name in extension.libraries)])

    def note(self, extension) -> Path:
        return Path(self.get_ext_fullpath(extension.name)).with_name(f"{extension.name.rpartition('.')[2]}.failure")

    def get_outputs(self):
        return super().get_outputs() + [str(note) for note in map(self.note, EXTENSIONS) if note.exists()]


def sources(folder: str, *endings: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for ending in endings for path in (ROOT / "csrc").glob(f"{folder}/*{ending}"))


NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]  # tests/machine.py compiles with the same
COMMON = dict(
    include_dirs=["csrc"],
    libraries=["torch_cpu", "c10"],
    language="c++",
    define_macros=[("TORCH_TARGET_VERSION", f"0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"),
                   ("FASTMETA_STABLE_ABI", f'"{STABLE_ABI[0]}.{STABLE_ABI[1]}"')],
)
EXTENSIONS = [
    Extension(
        "fastmeta._C",
        sources=sources("cpu", ".cpp"),
        depends=sources("common", ".h") + sources("cpu", ".h"),
        # -fno-trapping-math and -fno-math-errno change no value; they let loops with comparisons and roots become vector code.
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden", "-Wall",
                            "-Wno-psabi", "-Wno-unknown-pragmas", f"-ffile-prefix-map={ROOT}/="],
        **COMMON,
    ),
    Extension("fastmeta._C_cuda", sources=sources("cuda", ".cu", ".cpp"), depends=sources("common", ".h") + sources("cuda", ".h"), **COMMON),
]

if __name__ == "__main__":
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExtensions})
