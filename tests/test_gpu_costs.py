"""The GPU kernels keep to their budgets, as ``bench/gpu_costs.py`` counts them; and that it counts right."""

import functools
import itertools
import json
import sys
from pathlib import Path

import emulation
import pytest
import torch
from test_gpu_coordinate_generator import Case, inputs

from fastmeta import functional, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu_costs  # noqa: E402
import gpu_costs_mann  # noqa: E402
from gpu_costs import ARCHITECTURES, BACKENDS, DIRECTIONS, OPERATIONS, SHAPES, Resources  # noqa: E402

FEW = [(1, 75, 25, 64, 5), (32, 75, 25, 1600, 5)]
CALLS = [*itertools.product(BACKENDS, OPERATIONS, SHAPES, ["float32"]), *itertools.product(["cuda"], OPERATIONS, SHAPES, ["bfloat16"]),
         *itertools.product(["triton"], OPERATIONS, FEW, ["bfloat16"])]
of_calls = pytest.mark.parametrize("compiler, operation, shape, dtype", CALLS, indirect=["compiler"],
                                   ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else value)
with_cuda = pytest.mark.parametrize("compiler", ["cuda"], indirect=True)
of_triton = pytest.mark.parametrize("compiler", ["triton"], indirect=True)
of_directions = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture
def compiler(request):
    """The name of one that is there."""
    if missing := BACKENDS[request.param].missing():
        pytest.skip(missing)
    return request.param


@functools.cache
def counted(compiler, operation, shape, dtype):
    return gpu_costs.costs(BACKENDS[compiler], operation, shape, getattr(torch, dtype))


# ---- budgets -----------------------------------------------------------------------------------------------------------------------------

# Budgets that are missed: what of the name of a test says which, and why. The expected failure is strict, one that is reached must be taken from here;
# but for the registers of Triton's kernels, which are another version's of Triton to choose.
MISSED = {
    ("test_dram_bytes[backward-cuda", "16x300x100x512x20-bfloat16"):
        "300 queries are three strips; the sums between them are float32, twice the size of the gradient that they become: 1.48x and 1.52x",
    **{("test_occupancy_of_sm_90[cuda-cosine_attention", f"-{shape}x64x5-"):
        "19%: all of an episode, supports, queries, values and gradients, is in shared memory, so that one launch touches each byte once"
        for shape in ("1x75x5", "1x75x25", "32x75x25")},
    **{(f"test_sectors[{call}-",): "1.11x: each layout of a tile reads labels, gradients and log-sums, short rows, for itself"
       for call in ("forward-triton-matching_log_probs-32x75x25x64x5", "backward-triton-matching_log_probs-32x75x25x64x5",
                    "backward-triton-cosine_attention-1x75x5x64x5", "backward-triton-cosine_attention-32x75x25x64x5")},
    ("test_spills[triton", "16x300x100x512x20-float32-90"): "some bytes: 20 columns are a chunk of 64",
    ("test_bytes_of_a_step[backward-triton",):
        "1.34x: of a read before the write, memory and gradient are read again tile by tile; one tile of all would spill registers",
    ("test_occupancy_of_sm_90[triton",): "12%: more than 128 registers at 256 threads",
}


@pytest.fixture(autouse=True)
def missed(request):
    for parts, reason in MISSED.items():
        if all(part in request.node.name for part in parts):
            resources = any(part.startswith(("test_spills[triton", "test_occupancy_of_sm_90[triton")) for part in parts)
            request.applymarker(pytest.mark.xfail(strict=not resources, raises=AssertionError, reason=reason))


@of_calls
@of_directions
def test_launches(compiler, operation, shape, dtype, direction):
    assert len(counted(compiler, operation, shape, dtype)[direction].launches) <= {"forward": 1, "backward": 2}[direction]


@of_calls
@of_directions
def test_dram_bytes(compiler, operation, shape, dtype, direction):
    cost = counted(compiler, operation, shape, dtype)[direction]
    ratio = cost.dram / cost.fewest
    assert 1 <= ratio <= 1.25


@of_calls
@of_directions
def test_sectors(compiler, operation, shape, dtype, direction):
    ratio = counted(compiler, operation, shape, dtype)[direction].sectors_over_fewest
    assert ratio <= 1.1


def launched(compiler, operation, shape, dtype, architecture) -> dict[str, Resources]:
    plans = gpu_costs.plan(BACKENDS[compiler], operation, gpu_costs.example(operation, shape, getattr(torch, dtype)))
    return {launch.kernel: launch.resources(architecture) for launch in itertools.chain(*plans)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@of_calls
def test_spills(compiler, operation, shape, dtype, architecture):
    assert not {kernel: r.spills for kernel, r in launched(compiler, operation, shape, dtype, architecture).items() if r.spills}


@of_calls
def test_occupancy_of_sm_90(compiler, operation, shape, dtype):
    assert not {kernel: r for kernel, r in launched(compiler, operation, shape, dtype, 90).items() if r.occupancy < 0.25}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@with_cuda
def test_no_kernel_of_csrc_spills(compiler, architecture):
    kernels = gpu_costs.Cuda.kernels(architecture)
    assert kernels.keys() == set().union(*(emulation.cuda_ptx(path).kernels for path in emulation.CUDA_SOURCES))
    assert not {name: spills for name, (_, spills) in kernels.items() if spills}


# ---- MANN --------------------------------------------------------------------------------------------------------------------------------

PAPER = (50, 1, 405, 200, 128, 40, 4)  # T, B, I, H, N, M, R
STEP = (16, 128, 40, 4)  # B, N, M, R
of_steps = pytest.mark.parametrize("compiler", BACKENDS, indirect=True)


@functools.cache
def counted_mann(compiler, operation, shape):
    return gpu_costs_mann.costs(BACKENDS[compiler], operation, shape)


@with_cuda
@pytest.mark.parametrize("steps", [1, 8, 50, 400])
def test_launches_of_an_episode(compiler, steps):
    """Whatever T is: forward two of the operation's, and one of PyTorch's, which puts the weights side by side; backward five."""
    tensors = gpu_costs_mann.episode_example((steps, *PAPER[1:]), 1)
    run, launches = gpu_costs.Cuda(), []
    for _ in gpu_costs_mann.call(run, "mann_episode", tensors):
        launches.append(len(run.planned) + run.computations)
        run.planned, run.computations = [], 0
    assert launches == [2, 5]


@with_cuda
def test_launches_of_the_function(compiler):
    t = gpu_costs_mann.episode_example((3, 1, 5, 6, 7, 2, 2), 1)
    weight_ih, weight_hh = t["weight"].split([5 + 4, 6], 1)
    state = reference.MANNState(*(t[name] for name in reference.MANNState._fields))
    with emulation.emulated("cpp", emulation.CudaEmulator()), gpu_costs.Launches() as counted:
        functional.mann_episode(t["inputs"], state, weight_ih, weight_hh, t["bias"], t["head_weight"], t["head_bias"])
    assert counted.names == ["cat", "fastmeta::mann_episode"]


@with_cuda
@pytest.mark.parametrize("direction, requested", [("forward", 1.25), ("backward", 3.5)])
def test_bytes_of_an_episode(compiler, direction, requested):
    """Of the kernel of all steps. Its backward asks the caches twice for each checkpoint of the preset that reads before it writes, at each step."""
    cost = counted_mann(compiler, "mann_episode", PAPER)[direction]
    assert 1 <= cost.dram / cost.fewest <= 1.05
    assert 1 <= cost.requested / cost.fewest <= requested
    steps, _, _, hidden, _, width, heads = PAPER
    weights = 4 * hidden * (heads * width + hidden) + heads * (2 * width + 1) * hidden
    # Each step reads each weight once; down the columns a warp has 128, and where there are fewer the last one stands in.
    assert 1 <= cost.weights / (4 * steps * weights) <= {"forward": 1, "backward": 1.15}[direction]
    assert cost.transactions <= 1.02 * cost.ideal_transactions


@of_steps
@of_directions
def test_bytes_of_a_step(compiler, direction):
    cost = counted_mann(compiler, "lrua_step", STEP)[direction]
    assert len(cost.launches) == 1 and not cost.products
    assert 1 <= cost.dram / cost.fewest <= 1.25


@of_steps
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spills_of_a_step(compiler, architecture):
    for shape in (STEP, (16, 1024, 64, 4)):
        launches = itertools.chain(*gpu_costs_mann.plan(BACKENDS[compiler], "lrua_step", gpu_costs_mann.step_example(shape, 1)))
        assert not {launch.kernel: r for launch in launches if (r := launch.resources(architecture)).spills}


@with_cuda
def test_an_episode_of_the_papers_size_fits(compiler):
    """Shared memory of a block: what sm_86, 89 and 120 have is enough, 99 KB; sm_80 has 163, sm_90 227."""
    for launches in gpu_costs_mann.plan(BACKENDS[compiler], "mann_episode", gpu_costs_mann.episode_example(PAPER, 1)):
        assert "large" not in launches[0].kernel
        assert launches[0].resources(90).shared <= 99 * 1024


@with_cuda
def test_command_of_mann(compiler, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_costs_mann, "EPISODES", [(3, 2, 5, 6, 7, 2, 2)])
    monkeypatch.setattr(gpu_costs_mann, "STEPS", [(2, 7, 2, 2)])
    monkeypatch.setattr(gpu_costs_mann, "BACKENDS", {"cuda": gpu_costs.Cuda})
    assert gpu_costs_mann.main(["--json", str(tmp_path / "costs.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("**No GPU has run this") for line in lines) and "## An estimate of time, in milliseconds" in lines
    assert sum("(3, 2, 5, 6, 7, 2, 2)" in line for line in lines) == 4
    found = json.loads((tmp_path / "costs.json").read_text())
    assert [(c["operation"], c["direction"]) for c in found] == list(itertools.product(("mann_episode", "lrua_step"), DIRECTIONS))


# ---- Meta Networks -----------------------------------------------------------------------------------------------------------------------


@of_triton
@pytest.mark.parametrize("name, steps", [("coordinate_mlp", ()), ("coordinate_lstm", (5,))])
def test_generators(compiler, name, steps):
    """Of the published width: one launch forward, two backward, that do not spill; scratch, in bytes, which does not grow with M."""
    class Counting(gpu_costs.Triton):
        scratch = 0

        def allocated(self, address, size):
            self.scratch += size

    planned, scratch = [], []
    for coordinates in (5 * 152_448, 10 * 152_448):
        tensors, _ = inputs(Case(name, (*steps, coordinates, 20)))
        with emulation.emulated("triton", Counting()) as run:
            result = getattr(functional, name)(*tensors.values())
            gradients = torch.autograd.grad(result.sum(), tuple(tensors.values()))
        planned.append([launch.kernel for launch in run.planned])
        scratch.append(run.scratch - sum(t.numel() * t.element_size() for t in (result, *gradients)))
    assert len(planned[0]) == 3 and planned[0] == planned[1]
    assert scratch[0] == scratch[1] <= {"coordinate_mlp": 9e6, "coordinate_lstm": 40e6}[name]
    assert not {launch.kernel: r for launch in run.planned for architecture in ARCHITECTURES if (r := launch.resources(architecture)).spills}


# ---- that it counts right ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resources, warps", [
    # a block of 4 warps has 4 * 32 * 128 registers: 4 blocks; and 38,800 + 1,024 bytes, rounded up to 39,936: 4 in 167,936, 5 in 233,472
    (Resources(80, 128, 38_800, 128, 0), 16), (Resources(90, 128, 38_800, 128, 0), 16),
    (Resources(80, 128, 40_960, 96, 0), 16), (Resources(90, 128, 40_960, 96, 0), 20),  # memory: 41,984 bytes; registers would do for 20
    (Resources(90, 256, 0, 33, 0), 48),  # 1,056 registers a warp, rounded up to 1,280: 12 warps in 16,384, a quarter of the processor
    (Resources(90, 1024, 0, 32, 0), 64), (Resources(90, 768, 0, 32, 0), 48),  # whole blocks only
    (Resources(80, 32, 0, 16, 0), 32),  # 32 blocks
    (Resources(80, 1024, 0, 72, 0), 0), (Resources(80, 128, 200_000, 32, 0), 0)])  # no room
def test_occupancy(resources, warps):
    assert resources.occupancy == warps / 64


@with_cuda
def test_ptxas(compiler):
    """Of two kernels that hold 64 numbers in registers, the one that may have 32 registers spills."""
    body = "{ float a[64];\n#pragma unroll\nfor (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x]; __syncthreads();\n" \
           "#pragma unroll\nfor (int i = 0; i < 64; ++i) x[threadIdx.x * 64 + i] = a[63 - i]; }\n"
    text = emulation.compile_cuda(f'extern "C" __global__ void __launch_bounds__(1024, 2) tight(float* x) {body}'
                                  f'extern "C" __global__ void __launch_bounds__(256, 1) roomy(float* x) {body}')
    found = gpu_costs.ptxas(text, gpu_costs.Cuda.assembler(80))
    assert found.keys() == {"tight", "roomy"}
    assert found["tight"][0] <= 32 and found["tight"][1] > 0
    assert found["roomy"][0] > 64 and found["roomy"][1] == 0


def test_fewest_bytes():
    query, support, labels, grad = 2 * 4 * 4, 3 * 4 * 4, 3 * 8, 2 * 5 * 4
    results = torch.empty(1, 2, 5), torch.empty(1, 2, 5)
    calls = gpu_costs.call(lambda name, *arguments: arguments[2:4] if "backward" in name else results, "matching_log_probs",
                           gpu_costs.example("matching_log_probs", (1, 2, 3, 4, 5), torch.float32))
    fewest = [gpu_costs.fewest_bytes(direction, *of_call) for direction, of_call in zip(DIRECTIONS, calls)]
    assert fewest == [query + support + labels + 2 * grad, grad + query + support + labels + grad + query + support]


@pytest.mark.parametrize("compiler", BACKENDS, indirect=True)
def test_a_few_episodes_stand_for_all(compiler):
    """Rows of whole sectors: one episode, times three, is three."""
    one, three = (gpu_costs.costs(BACKENDS[compiler], "cosine_attention", (3, 8, 8, 32, 8), torch.float32, work) for work in (0, 10**9))
    for direction in DIRECTIONS:
        assert [launch[:2] for launch in one[direction].launches] == [launch[:2] for launch in three[direction].launches]
        assert one[direction][1:] == three[direction][1:]


def test_launches_of_two_operations():
    x = torch.empty(3, 1, device="meta").expand(3, 4)
    with gpu_costs.Launches() as counted:
        y = x.exp().T.detach()
        y[0].add_(torch.empty(3, device="meta"))
    assert counted.names == ["exp", "add_"]
    assert counted.bytes == 4 * (3 + 12) + 4 * (3 + 3 + 3)  # the row that is added to is read and written


def test_launches_of_eager():
    pytest.importorskip("easyfsl")  # which the races of bench_cosine_attention.py import
    normalize = ["linalg_vector_norm", "clamp_min", "div"]
    forward, backward = gpu_costs.eager_launches("matching_log_probs", (1, 75, 5, 64, 5), torch.float32).values()
    assert forward.names == [*normalize, *normalize, "bmm", "_softmax", "bmm", "log"]
    query, support, scores, result = 75 * 64, 5 * 64, 75 * 5, 75 * 5
    # A row is read for its norm, and to be divided; a norm is written, clamped, and read with the row.
    normalized = 3 * (query + support) + 4 * (75 + 5)
    assert forward.bytes == 4 * (normalized + (query + support + scores) + 2 * scores + (scores + 5 * 5 + result) + 2 * result)
    assert backward.names.count("bmm") == 3 and backward.names.count("_softmax_backward_data") == 1


@with_cuda
def test_command(compiler, monkeypatch, capsys, tmp_path):
    pytest.importorskip("easyfsl")
    monkeypatch.setattr(gpu_costs, "SHAPES", [(1, 3, 4, 8, 2)])
    assert gpu_costs.main(["--backend", "cuda", "--json", str(tmp_path / "costs.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("**No GPU has run this") for line in lines)
    assert sum("(1, 3, 4, 8, 2)" in line for line in lines) == 4
    found, = json.loads((tmp_path / "costs.json").read_text())
    assert [(c["operation"], c["direction"]) for c in found["calls"]] == list(itertools.product(OPERATIONS, DIRECTIONS))
    assert {k["kernel"] for k in found["kernels"]} == {name for c in found["calls"] for name in c["launches"]}
