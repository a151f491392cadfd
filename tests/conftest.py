import pytest
import torch

from fastmeta import _backend

AVAILABLE = [b for b in _backend.BACKENDS if b != "cpp" or _backend._C is not None]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20160613)


@pytest.fixture(params=_backend.BACKENDS)
def backend(request):
    """Runs the test on every backend of this installation; what is chosen is chosen for the whole test."""
    if request.param not in AVAILABLE:
        pytest.skip(f"the extension is not loaded ({_backend.missing})")
    with _backend.use_backend(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """As in the processes that the tests start: the last bits of a convolution, or a library's product, depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
