import zlib

import emulation
import pytest
import torch

from fastmeta import _backend

# What a test that takes ``backend`` runs on. The kernels of the GPU run on the PTX machine, on CPU tensors, and on a GPU where there is one.
ON_CPU = ("cpp", "reference")
ON_MACHINE = {"cuda": "cpp", "triton": "triton"}
ON_GPU = {"cuda-gpu": "cpp", "triton-gpu": "triton", "reference-gpu": "reference"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20160613)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        runs = list(ON_CPU)
        if getattr(metafunc.module, "HAS_GPU_KERNELS", False):
            runs += [*ON_MACHINE, *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU)]
        metafunc.parametrize("backend", runs, indirect=True)


@pytest.fixture
def backend(request):
    """Runs the test on one implementation, on whose device the tensors of the test are made; what is chosen is chosen for the whole test."""
    name = request.param
    if name in ON_MACHINE:
        missing = emulation.cuda_is_missing() if name == "cuda" else emulation.triton_is_missing()
        if missing:
            pytest.skip(missing)
        seed = zlib.crc32(request.node.nodeid.encode())  # every test has an order of blocks and warps of its own
        with emulation.emulated(ON_MACHINE[name], (emulation.CudaEmulator if name == "cuda" else emulation.TritonEmulator)(seed)):
            yield name
    elif name in ON_GPU:
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
        with torch.device("cuda"), _backend.use_backend(ON_GPU[name]):
            yield name
    else:
        if name == "cpp" and _backend._C is None:
            pytest.skip(f"the extension is not loaded ({_backend.missing})")
        with _backend.use_backend(name):
            yield name


def pytest_collection_modifyitems(config, items):
    """Broadcasting is host code, the same before every kernel: on the machine, where kernels are slow, two forms of it are enough."""
    def wanted(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("backend") not in ON_MACHINE or params.get("broadcast", "batch") in ("batch", "support shared")
    left_out = [item for item in items if not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = filter(wanted, items)


@pytest.fixture
def one_thread():
    """As in the processes that the tests start: the last bits of a convolution, or a library's product, depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
