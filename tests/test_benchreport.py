"""The benchmark report: every number in it comes from the JSON, losses included."""

import json

import pytest
from fastmeta.benchreport import report


def entry(peer, seconds, shape=(1, 75, 5, 64, 5), backward=False, mark=6, peak=None):
    return {"group": f"op {shape} {backward}", "stats": {"median": seconds},
            "extra_info": {"operation": "op", "axes": "BQSDC", "shape": shape, "backward": backward, "peer": peer, "mark": mark,
                           "peak_bytes": peak}}


@pytest.fixture
def write(tmp_path):
    def write(name, *entries, **settings):
        machine = {"cpu": {"brand_raw": "a CPU"}, "fastmeta": {"threads": 2, "torch": "2.14", "backend": "cpp", **settings}}
        path = tmp_path / name
        path.write_text(json.dumps({"machine_info": machine, "benchmarks": list(entries)}))
        return path
    return write


def row(text, shape="(1, 75, 5, 64, 5)"):
    return next(line for line in text.splitlines() if shape in line)


def test_ratios_best_peer_floor_mark_and_memory(write):
    path = write("a.json", entry("fastmeta", 0.002, peak=1_500_000), entry("eager", 0.02, peak=9_000_000),
                 entry("SDPA", 0.014, peak=4_000_000), entry("floor", 0.001, peak=100))
    text = report(path)
    assert row(text) == "| (1, 75, 5, 64, 5) | 2 | 10x | **7.00x** | 2.00x | 6x: reached | 1.5 (SDPA 4.0) |"
    assert "op, forward" in text and "a CPU, 2 threads, torch 2.14, fastmeta backend cpp" in text


def test_a_loss_and_a_missed_mark_are_shown(write):
    text = report([write("a.json", entry("fastmeta", 0.002), entry("eager", 0.001))])
    assert "**0.50x** | 6x: missed" in row(text)


def test_the_floor_is_no_peer(write):
    text = report(write("a.json", entry("fastmeta", 0.002), entry("eager", 0.014), entry("floor", 0.001)))
    assert "**7.00x**" in row(text) and "6x: reached" in row(text)


def test_ratios_of_several_runs_are_those_within_each(write):
    runs = [write(f"{i}.json", entry("fastmeta", t), entry("eager", t * ratio)) for i, (t, ratio) in enumerate([(1, 2), (10, 3), (100, 7)])]
    assert "| 1e+04 | **3.00x** |" in row(report(runs))


def test_shapes_and_passes_without_a_peer_or_a_mark(write):
    path = write("a.json", entry("fastmeta", 1, mark=None), entry("easyfsl", 2, mark=None), entry("fastmeta", 1, (2, 75, 5, 64, 5), mark=None),
                 entry("fastmeta", 1, backward=True), entry("eager", 3, backward=True), quick=True)
    text = report(path)
    assert row(text, "(2, 75") == "| (2, 75, 5, 64, 5) | 1e+03 |  |"
    assert "op, forward + backward" in text and "--quick" in text


def test_nothing_to_report(write):
    with pytest.raises(ValueError, match="no fastmeta benchmarks in .*a.json"):
        report(write("a.json", entry("eager", 1)))


def test_plot(write, tmp_path):
    pytest.importorskip("matplotlib")
    report(write("a.json", entry("fastmeta", 0.002), entry("eager", 0.001), entry("SDPA", 0.02)), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
