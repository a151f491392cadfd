"""``pytest bench/``: every race of the ``bench_*.py`` files, one pytest-benchmark entry a peer.

The peers of a race are timed in turns when its first entry is asked for; each entry then hands its share of the times to
pytest-benchmark, so that the tables and the JSON are the usual ones. ``--quick`` only shows that everything works.
"""

import os
from dataclasses import replace

import pytest
import race as racing
import torch
from fastmeta import _backend

QUICK_SIZE = 100_000_000  # the largest race of --quick
MEMORY_SIZE = 50_000_000  # the smallest one whose memory is measured: below, the interpreter's noise is larger than what a call needs


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="bench: small shapes, few rounds, no compiling: a smoke test, no measurement")


def _settings() -> dict:
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
            "backend": _backend.select(None, "cpu", "bench", "cosine_attention")}


def pytest_report_header(config):
    return "bench: " + ", ".join(f"{key} {value}" for key, value in _settings().items())


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastmeta"] = {**_settings(), "quick": config.getoption("--quick"), "info": _backend.info()}


class Replay:
    """A timer that plays back measured rounds: pytest-benchmark reads it before and after each of them."""

    def __init__(self):
        self.readings = iter(())

    def load(self, rounds):
        self.readings = (reading for seconds in rounds for reading in (0.0, seconds))

    def __call__(self) -> float:
        return next(self.readings)


replay = Replay()


def pytest_generate_tests(metafunc):
    """A test that takes ``race`` and ``peer`` is run for each peer of each race of its file's ``RACES``."""
    if {"race", "peer"} <= set(metafunc.fixturenames):
        races = metafunc.module.RACES
        if metafunc.config.getoption("--quick"):
            races = [replace(race, peers=tuple(p for p in race.peers if p != "compile")) for race in races if race.size <= QUICK_SIZE]
        pairs = [(race, peer) for race in races for peer in race.peers]
        metafunc.parametrize("race, peer", pairs, ids=[f"{race.name}-{peer}" for race, peer in pairs])


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "race" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(group=item.callspec.params["race"].name, timer=replay))


@pytest.fixture(scope="session")
def results():
    """``{race: {peer: Result}}`` of the races that have been run."""
    return {}


@pytest.fixture(scope="session")
def memory():
    memory = racing.Memory()
    yield memory
    memory.close()


@pytest.fixture
def enter(benchmark, results, memory, request):
    """``enter(race, peer)``: run the race unless it was, and report the peer's part in it."""
    quick = request.config.getoption("--quick")

    def enter(race, peer):
        if race not in results:
            results[race] = racing.run(race, *((0.1, 3) if quick else (3.0, 5)))
        result = results[race][peer]
        if result.absent:
            pytest.skip(result.absent)
        assert not result.failure, f"{peer}: {result.failure}"
        benchmark.extra_info.update(
            operation=race.operation + ("" if race.device == "cpu" else f" on {race.device}"), axes=race.axes, shape=race.shape, backward=race.backward, peer=peer, mark=race.mark,
            error=result.error, peak_bytes=memory.peak(race, peer) if race.size >= MEMORY_SIZE and race.device == "cpu" else None,
            absent={name: other.absent for name, other in results[race].items() if other.absent})
        replay.load(result.rounds)
        benchmark.pedantic(lambda: None, rounds=len(result.rounds), iterations=result.iterations)

    return enter
