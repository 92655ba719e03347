"""tools/soak.py: short runs, leaks that are planted to be found, the arithmetic of growth, and the drawing."""

import json
import mmap
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import soak

MIB = 2**20


@pytest.mark.parametrize(("mode", "count"), [("steps", 16), ("loads", 6), ("serve", 6)])
def test_a_short_run(mode, count, tmp_path, capsys):
    file = tmp_path / "memory.jsonl"
    code = soak.main([mode, "--count", str(count), "--backend", "numpy", "--limit", "64", "--every", "1", "--out", str(file)])
    assert code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{mode}: {count} on NumPy, shakespeare-exl2-4.0, ") and "did not grow" in printed
    ((about, samples),) = soak.read_runs([file])
    assert (about["soak"], about["count"], about["backend"], about["gpu"]) == (mode, count, "numpy", None)
    assert len(samples) >= 5 and samples[-1]["done"] >= count and all(s["host"] > 10 * MIB for s in samples)
    done = [sample["done"] for sample in samples]
    assert done == sorted(set(done))


def fresh(size):
    """Memory that was in no use before: what malloc gives may have been, and then nothing grows."""
    values = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # which keeps the pages
    values.fill(1)
    return values


def test_a_leak_of_half_a_mebibyte_a_step_is_found(monkeypatch, capsys):
    kept = []

    def leaking(model_path, backend, count, every):
        for done in range(1, count + 1):
            kept.append(fresh(MIB // 2))
            yield done

    monkeypatch.setitem(soak.MODES, "steps", leaking)
    assert soak.main(["steps", "--count", "16", "--backend", "numpy"]) == 1
    assert "host, resident: GREW; after the warm-up +" in capsys.readouterr().out
    monkeypatch.setitem(soak.MODES, "steps", lambda path, backend, count, every: iter(range(1, count + 1)))
    assert soak.main(["steps", "--count", "16", "--backend", "numpy"]) == 0


def samples_of(values, kind="host"):
    return [{"done": 10 * (i + 1), "seconds": 0.1 * i, "host": 0, kind: int(value)} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "has_grown"),
    [
        (np.full(50, 300 * MIB), False),
        (300 * MIB + np.arange(50) * MIB / 5, True),  # 9 MiB, evenly
        (300 * MIB + np.arange(50) * MIB / 25, False),  # 1.8 MiB
        (300 * MIB + np.where(np.arange(50) < 4, 0, 100 * MIB), False),  # within the warm-up
        (300 * MIB + np.where(np.arange(50) < 40, 0, 6 * MIB), True),  # late
        (300 * MIB + np.where(np.arange(50) == 49, 6 * MIB, 0), True),  # at the very end
        (300 * MIB + np.where(np.arange(50) % 2, 3 * MIB, 0), False),  # up and down
        (300 * MIB - np.arange(50) * MIB, False),  # shrinks
    ],
)
def test_what_counts_as_growth(values, has_grown):
    for kind in ("host", "device"):
        assert soak.verdict(samples_of(values, kind), 4.0)[kind][2] == has_grown


def test_growth_is_the_slope_times_what_is_left():
    slope, difference = soak.growth(samples_of(1000 + 7 * np.arange(100)), "host")
    assert slope == pytest.approx(7 * 89) and difference == 7 * 89  # samples 11 to 100


def test_a_run_ends_when_its_time_is_up():
    about, samples = soak.soak("loads", backend="numpy", count=10**6, every=2, minutes=0.01)
    assert about["count"] == samples[-1]["done"] < 1000 and samples[-1]["seconds"] > 0.6


def test_too_few_samples_are_not_taken_for_good_ones():
    with pytest.raises(ValueError, match="too few to see growth"):
        soak.verdict(samples_of([1] * 4), 4.0)


def test_memory_of_this_process_is_seen():
    before = soak.host_bytes()
    held = fresh(32 * MIB)
    assert 30 * MIB < soak.host_bytes() - before < 40 * MIB
    del held


@pytest.mark.gpu
def test_memory_of_a_gpu_is_seen(cupy):
    cupy.get_default_memory_pool().free_all_blocks()  # where 64 MiB might be found
    before = soak.memory(True)
    held = cupy.ones(64 * MIB, np.uint8)
    during = soak.memory(True)
    assert during["pool"] - before["pool"] == 64 * MIB and during["device"] > during["pool"]
    del held


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "count"), [("steps", 600), ("loads", 24), ("serve", 200)])
def test_memory_of_a_gpu_does_not_grow(cupy, mode, count):
    """Short ones of the runs of docs/reliability.md. Others may use the GPU at the same time: what this process has counts."""
    about, samples = soak.soak(mode, backend="cupy", count=count, every=count // 20)
    found = soak.verdict(samples, 16.0)
    assert about["gpu"] and not found["pool"][2] and not found["host"][2], found


def test_the_drawing_has_a_curve_for_each_kind_of_memory(tmp_path):
    file, drawing = tmp_path / "runs.jsonl", tmp_path / "memory.svg"
    rng = np.random.default_rng(0)
    for mode in ("steps", "loads"):
        about = {"soak": mode, "count": 1000, "model": "some-model", "gpu": "Some GPU"}
        values = {kind: 100 * MIB + rng.integers(0, MIB, 50) for kind in soak.KINDS}
        samples = [
            {"done": 20 * (i + 1), "seconds": i, **{kind: int(value[i]) for kind, value in values.items()}} for i in range(50)
        ]
        soak.keep(file, about, samples)
    assert len(file.read_text().splitlines()) == 2 * 51 and json.loads(file.read_text().splitlines()[0])["soak"] == "steps"
    assert soak.main(["figure", str(file), "--out", str(drawing)]) == 0
    root = ElementTree.parse(drawing).getroot()
    words = " ".join(text.text for text in root.iter("{http://www.w3.org/2000/svg}text"))
    for word in ("decoding steps", "models loaded and dropped", "Some GPU", "1,000", *soak.KINDS.values()):
        assert word in words
    lines = [line for line in root.iter("{http://www.w3.org/2000/svg}polyline") if line.get("stroke-linejoin")]
    assert len(lines) == 2 * len(soak.KINDS) and all(len(line.get("points").split()) == 50 for line in lines)
