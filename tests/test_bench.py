"""Benchmarks without a GPU: options, formulas against hand arithmetic, matrices and models of random weights, the figure."""

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import cupyq.ext
from cupyq import QMatrix, _device, _kernels, load_model
from cupyq._arrays import bfloat16, float16
from cupyq.bench import arguments, attention, first_token, limits, model, peers, qmatmul, random_model, sweep, timing
from cupyq.bench.limits import Limits
from cupyq.bench.random_matrices import (
    HEADS,
    MIXTURES,
    Kind,
    Words,
    head_kind,
    parse_kind,
    random_tensors,
    words_needed,
)
from cupyq.bench.shapes import CONFIGS, shape_config
from cupyq.errors import BackendError
from cupyq.formats.exl2 import exl2_layout
from cupyq.formats.safetensors import Checkpoint, SafetensorsFile

sys.path.insert(0, str(ROOT / "benchmarks"))
import plot_attention  # noqa: E402
import plot_qmatmul  # noqa: E402

LIMITS = Limits("Fake GPU", gigabytes_per_s=3000, teraflops=800)
KINDS = (*qmatmul.KINDS, "4-g32", "gptq2-g64", "gptq3-g32-act", "gptq8-g128")


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("k", [160, 1024])
def test_random_matrices_are_valid_and_of_the_size_of_x(name, k):
    kind = parse_kind(name)
    n = 64
    tensors = random_tensors(kind, k, n, Words(np, words_needed(k, n)), seed=5)
    q = QMatrix.from_tensors(tensors)
    bits, rows = kind.groups(k)
    assert (q.k, q.n, q.kind) == (k, n, "gptq" if kind.is_gptq else "exl2")
    assert q.bits == tuple(sorted(set(bits.tolist()), reverse=True)) and q.group_count == len(bits)
    assert rows.sum() == k and (rows % 32 == 0).all() and (np.diff(bits) <= 0).all()
    assert 0.5 < np.std(q.dense) * k**0.5 < 3 and np.isfinite(q.dense).all()
    order = tensors.get("g_idx" if kind.is_gptq else "q_invperm")
    assert (order is not None and bool((np.diff(order) < 0).any())) == kind.has_act_order


def test_every_part_of_a_mixture_has_weights_of_one_size():
    k, n = 1024, 64
    tensors = random_tensors(parse_kind("4.65"), k, n, Words(np, words_needed(k, n)))
    layout = exl2_layout(tensors["q_groups"], tensors["q_weight"].shape[0], n)
    stored = QMatrix.from_tensors(tensors | {"q_invperm": np.arange(k, dtype=np.int32)}).dense
    sizes = [stored[s.first_row : s.first_row + s.rows].std() for s in layout.segments]
    assert len(sizes) == 3 and max(sizes) < 1.2 * min(sizes)


def test_random_matrices_repeat_and_seeds_differ():
    words = Words(np, words_needed(256, 64))
    first, again, other = (random_tensors(parse_kind("4"), 256, 64, words, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["q_invperm"], other["q_invperm"])
    with pytest.raises(ValueError, match="multiples of 32"):
        random_tensors(parse_kind("4"), 250, 64, words)
    with pytest.raises(ValueError, match="asked for"):
        words.take(1 << 20)


def test_groups_are_cut_as_the_converter_cuts_them():
    # 4096 rows: ceil(204.8 / 32) = 7 groups of 8 bits, ceil(1638.4 / 128) = 13 of 5, and what is left, 2208, in groups of 128.
    bits, rows = parse_kind("4.65").groups(4096)
    assert [int((bits == width).sum()) for width in (8, 5, 4)] == [7, 13, 18]
    assert [int(rows[bits == width].sum()) for width in (8, 5, 4)] == [224, 1664, 2208] and rows[-1] == 2208 - 17 * 128
    bits, rows = parse_kind("2.5").groups(4096)
    assert bits.tolist() == [3] * 32 + [2] * 32 and set(rows.tolist()) == {64}
    bits, rows = head_kind(6).groups(4096)  # ceil(614.4 / 128) = 5 groups at 8
    assert bits.tolist() == [8] * 5 + [6] * 27
    # A part that would take more than there is takes what is there.
    bits, rows = Kind("", False, ((8, 0.5, 128), (4, 0.5, 128)), True).groups(160)
    assert list(zip(bits.tolist(), rows.tolist(), strict=True)) == [(8, 128), (4, 32)]


def test_mixtures_have_the_bits_they_are_named_for():
    for name in MIXTURES:
        for k in (4096, 14336, 28672):
            layout_bits = parse_kind(name).weight_bytes(k, 4096) * 8 / (k * 4096)
            assert abs(layout_bits - float(name)) < 0.08, (name, k, layout_bits)
    for bits, parts in HEADS.items():
        assert sum(share for _, share, _ in parts) == pytest.approx(1) and min(width for width, _, _ in parts) == bits


def test_weight_bytes_by_hand():
    # EXL2: codes, 4 bits of scale for each group and column, 2 bytes of maximum for each group.
    assert parse_kind("4").weight_bytes(256, 64) == 256 * 64 // 2 + 2 * (32 + 2)
    assert parse_kind("3-g32").weight_bytes(256, 64) == 256 * 64 * 3 // 8 + 8 * (32 + 2)
    assert parse_kind("2.5").weight_bytes(256, 64) == (128 * 3 + 128 * 2) * 64 // 8 + 4 * (32 + 2)
    # GPTQ: codes, a float16 scale and a zero for each group and column.
    assert parse_kind("gptq-g128").weight_bytes(256, 64) == 256 * 64 // 2 + 2 * 64 * 2 + 2 * 64 // 2
    assert parse_kind("gptq8-g32-act").weight_bytes(256, 64) == 256 * 64 + 8 * 64 * 2 + 8 * 64
    assert parse_kind("4").product_bytes(3, 256, 64) == parse_kind("4").weight_bytes(256, 64) + 3 * 2 * (256 + 64)
    assert qmatmul.product_flops(3, 256, 64) == 3 * 256 * 64 * 2


@pytest.mark.parametrize("name", ["4", "3-g32", "4.65", "gptq-g32", "gptq-act", "gptq8-g128"])
def test_weight_bytes_are_those_of_the_tensors(name):
    kind, k, n = parse_kind(name), 512, 96
    tensors = random_tensors(kind, k, n, Words(np, words_needed(k, n)))
    counted = [array.nbytes for short, array in tensors.items() if short not in ("q_invperm", "q_groups", "g_idx")]
    assert kind.weight_bytes(k, n) == sum(counted)


@pytest.mark.parametrize("text", ["", "7", "4-g33", "4-g0", "4-act", "gptq5", "gptq-g128-", "2.6", "x4", "gptq6-g32", "44"])
def test_kinds_that_are_none(text):
    with pytest.raises(ValueError, match=f"--bits: {re.escape(repr(text))}"):
        parse_kind(text)
    with pytest.raises(ValueError, match="--head-bits: 7"):
        head_kind(7)


# --- limits and timing ------------------------------------------------------------------------------------------------


def test_the_limit_is_the_larger_of_bytes_and_flops():
    assert LIMITS.microseconds(3_000_000, 0) == pytest.approx(1)
    assert LIMITS.microseconds(0, 800_000_000) == pytest.approx(1)
    assert LIMITS.microseconds(3_000_000, 8e9) == pytest.approx(10)
    # One row of 8192 x 28672 at 4 bits, group 128: 120,996,992 bytes (see the formula) are 40.3 us at 3000 GB/s.
    kind = parse_kind("4")
    moved = 8192 * 28672 // 2 + 64 * (28672 // 2 + 2) + 2 * (8192 + 28672)
    assert kind.product_bytes(1, 8192, 28672) == moved
    assert LIMITS.microseconds(moved, qmatmul.product_flops(1, 8192, 28672)) == pytest.approx(moved / 3e6, rel=1e-6)


def test_cold_copies_exceed_the_cache_and_loops_stay_short():
    assert timing.cold_copies(10 << 20, l2_bytes=50 << 20) == 15
    assert timing.cold_copies(1 << 30, l2_bytes=50 << 20) == 2
    assert timing.cold_copies(1 << 10, l2_bytes=50 << 20) == timing.MAX_COPIES
    assert timing.loops_for(5, 36) * 36 <= timing.MAX_LAUNCHES
    assert timing.loops_for(5, 36) * 36 * 5 > timing.GRAPH_MICROSECONDS / 3
    assert timing.loops_for(100_000, 2) == 1 and timing.loops_for(0, 3) >= 1


# --- options ----------------------------------------------------------------------------------------------------------


def test_default_options_are_the_whole_table():
    options = qmatmul.Options.parse()
    assert len(options.shapes) == 7 and (4096, 128256) in options.shapes
    assert [kind.name for kind in options.kinds] == "2 3 4 5 6 8 2.5 4.65 gptq-g32 gptq-g128 gptq-act".split()
    assert options.rows == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
    assert options.dtype == float16 and options.peers == ("cublas", "int4", "exllamav2")
    quick = qmatmul.Options.parse(is_quick=True)
    assert len(quick.shapes) * len(quick.kinds) * len(quick.rows) <= 50


def test_options_that_are_given():
    options = qmatmul.Options.parse("64x96,4096x32", "4,gptq-act", "16,1", "bfloat16", "cublas", None, True)
    assert options.shapes == ((64, 96), (4096, 32)) and [kind.name for kind in options.kinds] == ["4", "gptq-act"]
    assert options.rows == (1, 16) and options.dtype == bfloat16 and options.peers == ("cublas",)
    assert qmatmul.Options.parse(peers="none").peers == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shapes": "4096"}, "--shapes: '4096'"),
        ({"shapes": "64x"}, "--shapes: '64x'"),
        ({"shapes": "0x64"}, "--shapes: '0x64'"),
        ({"shapes": "64x100"}, "--shapes: '64x100'"),
        ({"rows": "1,0"}, "--rows: '0'"),
        ({"rows": "1,a"}, "--rows: 'a'"),
        ({"rows": "-1"}, "--rows: '-1'"),
        ({"bits": "4,9"}, "--bits: '9'"),
        ({"peers": "cublas,marlin"}, "--peers: 'marlin'"),
    ],
)
def test_options_that_cannot_be_read(given, message):
    with pytest.raises(ValueError, match=message):
        qmatmul.Options.parse(**given)


@pytest.mark.parametrize("text", ["a", "1,", "0,5", "-3"])
def test_lengths_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected numbers"):
        arguments.lengths(text)
    assert arguments.lengths("128,4096") == (128, 4096) and arguments.lengths("0") == ()


# --- the table --------------------------------------------------------------------------------------------------------


def test_sampled_rows_hold_the_first_and_the_last():
    assert qmatmul.sampled_rows(1) == [0] and qmatmul.sampled_rows(3) == [0, 1, 2]
    for count in (8, 9, 17, 4096):
        rows = qmatmul.sampled_rows(count)
        assert rows[0] == 0 and rows[-1] == count - 1 and len(rows) == qmatmul.SAMPLED_ROWS


class OnHost(np.ndarray):
    """A NumPy array with the one method of CuPy's that verification uses."""

    def get(self):
        return self.view(np.ndarray)


def test_errors_are_seen_in_every_sampled_row():
    rng = np.random.default_rng(0)
    exact = object.__new__(qmatmul.Exact)
    y = rng.standard_normal((40, 24)).astype(np.float32)
    exact.rows = dict(enumerate(y))
    right = y.astype(np.float16).view(OnHost)
    assert 1e-5 < exact.error(right) < qmatmul.ALLOWED_ERROR[float16]
    for row in qmatmul.sampled_rows(40):
        wrong = right.copy()
        wrong[row] = np.roll(wrong[row], 1)
        assert exact.error(wrong) > 100 * qmatmul.ALLOWED_ERROR[float16]
    wrong = right.copy()
    wrong[0, 3] = np.nan
    assert exact.error(wrong) == float("inf")


def table(lines=None, out=None):
    options = dataclasses.replace(qmatmul.Options.parse("64x96", "4", "1,64"), peers=())
    return qmatmul.QmatmulTable(options, LIMITS, None, None, out or open("/dev/null", "w"), lines)


class Product:
    """Stands for matrices on a GPU: a product that takes so long and errs so much."""

    k, n = 4096, 14336
    matrices = (None,)

    def verified(self, x):
        return None

    def microseconds(self, x, expected_us):
        return 20.0


def test_rows_hold_what_was_promised(tmp_path, capsys):
    with open(tmp_path / "rows.jsonl", "w") as lines:
        rows = table(lines, sys.stdout)
        exact = SimpleNamespace(error=lambda y: 3e-4)
        x = np.zeros((4, 4096), np.float16)
        rows._measure(parse_kind("4"), Product(), exact, {"cublas_us": 50.0, "int4_us": None}, x, None, None)
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row == rows.rows[0] and rows.is_right
    moved = 4096 * 14336 // 2 + 32 * (14336 // 2 + 2) + 2 * 4 * (4096 + 14336)
    expected = {
        "family": "qmatmul", "device": "Fake GPU", "k": 4096, "n": 14336, "bits": "4", "layout": "exl2:4g128:act-order",
        "rows": 4, "dtype": "float16", "us": 20.0, "cublas_us": 50.0, "int4_us": None, "exllamav2_us": None, "error": 3e-4,
        "exllamav2_error": None,
    }  # fmt: skip
    numbers = {
        "gigabytes_per_s": moved / 20 / 1e3,
        "teraflops": 2 * 4 * 4096 * 14336 / 20 / 1e6,
        "limit_us": moved / 3000 / 1e3,
        "share": moved / 3000 / 1e3 / 20,
    }
    assert {key: row[key] for key in expected} == expected and row.keys() == expected.keys() | numbers.keys()
    assert {key: row[key] for key in numbers} == pytest.approx(numbers)
    head, columns, line = capsys.readouterr().out.splitlines()
    assert head.startswith("Fake GPU: streaming read 3000 GB/s") and len(columns) == len(line)
    assert "4096x14336" in line and "2.50x" in line and " - " in line and "WRONG" not in line


def test_a_wrong_result_is_shown_and_told(capsys):
    rows = table(out=sys.stdout)
    exact = SimpleNamespace(error=lambda y: 7e-4)
    rows._measure(parse_kind("4"), Product(), exact, {}, np.zeros((1, 4096), np.float16), None, None)
    assert not rows.is_right and capsys.readouterr().out.splitlines()[-1].endswith("WRONG")
    exact = SimpleNamespace(error=lambda y: float("inf"))
    rows._measure(parse_kind("4"), Product(), exact, {}, np.zeros((1, 4096), np.float16), None, None)
    assert rows.rows[-1]["error"] is None and "nan  WRONG" in capsys.readouterr().out
    json.dumps(rows.rows, allow_nan=False)


def test_many_rows_are_told_in_teraflops():
    row = dict.fromkeys(f"{peer}_us" for peer in qmatmul.PEERS) | {
        "k": 8192, "n": 28672, "bits": "4", "rows": 4096, "us": 2600.0, "limit_us": 2405.0, "share": 0.925, "error": 3e-4,
        "gigabytes_per_s": 150.0, "teraflops": 740.0,
    }  # fmt: skip
    assert "740 TFLOP/s" in qmatmul.row_text(row) and "92.5%" in qmatmul.row_text(row)


@pytest.fixture
def numpy_for_cupy(monkeypatch):
    """The benchmarks on NumPy's path, with times that are made up: everything runs but the clock."""

    def on_host(function):
        return lambda *args, **options: np.ascontiguousarray(function(*args, **options)).view(OnHost)

    pool = SimpleNamespace(free_all_blocks=lambda: None)
    module = SimpleNamespace(
        empty=on_host(np.zeros), zeros=on_host(np.zeros), asarray=on_host(np.asarray), get_default_memory_pool=lambda: pool
    )
    device = _device.DeviceInfo(0, "Fake GPU", "sm_90a", 132, 1, 1 << 20, 1 << 40)
    monkeypatch.setattr(_device, "current", lambda: device)
    monkeypatch.setattr(_kernels, "compile_all", lambda *args: 0)
    monkeypatch.setattr(qmatmul, "measure_limits", lambda: LIMITS)
    monkeypatch.setattr(attention, "measure_limits", lambda: LIMITS)
    monkeypatch.setattr(timing, "MAX_COPIES", 2)
    monkeypatch.setattr(timing, "MAX_LAUNCHES", 4)
    monkeypatch.setattr(qmatmul, "matmul", on_host(qmatmul.matmul))
    calls = []
    for place in (attention, qmatmul, peers):
        monkeypatch.setattr(place, "require_cupy", lambda: module)
        monkeypatch.setattr(place, "graph_microseconds", lambda run, repeats: calls.append(repeats) or run() or 100.0)
    return calls


def test_the_whole_table_with_numpy_in_cupys_place(numpy_for_cupy, tmp_path, capsys):
    kinds = "2,3,4,5,6,8,2.5,4.65,gptq-g32,gptq8-g128,gptq-act"
    options = qmatmul.Options.parse("256x96,160x64", kinds, "1,17", peers="cublas")
    with open(tmp_path / "rows", "w") as lines:
        rows, is_right = qmatmul.run(options, sys.stdout, lines)
    assert capsys.readouterr().err == "" and is_right and len(rows) == 2 * 11 * 2
    # Two graphs of cuBLAS for each shape and number of rows, and one for each row of the table.
    assert len(numpy_for_cupy) == 2 * 2 * 2 + len(rows)
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == rows
    assert all(1e-5 < row["error"] < 6e-4 and row["us"] == row["cublas_us"] == 25.0 for row in rows)
    assert all(row["int4_us"] is None and row["exllamav2_us"] is None for row in rows)


def test_results_that_are_not_written_are_wrong(numpy_for_cupy, monkeypatch):
    right = qmatmul.qmatmul

    def lazy(x, q, *, out, workspace):
        right(x[: max(1, len(x) - 1)], q, out=out[: max(1, len(x) - 1)], workspace=workspace)
        return out

    monkeypatch.setattr(qmatmul, "qmatmul", lazy)
    rows, is_right = qmatmul.run(qmatmul.Options.parse("256x96", "4", "1,2", peers="none"), open("/dev/null", "w"))
    assert not is_right and rows[0]["error"] < 6e-4 and rows[1]["error"] is None


def test_one_kind_that_fails_leaves_the_others(numpy_for_cupy, monkeypatch, capsys):
    right = qmatmul.qmatmul

    def failing(x, q, **options):
        if q.bits == (3,):
            raise RuntimeError("launch failed")
        return right(x, q, **options)

    monkeypatch.setattr(qmatmul, "qmatmul", failing)
    monkeypatch.setattr(qmatmul, "compile_ahead", lambda options: None)
    rows, is_right = qmatmul.run(qmatmul.Options.parse("256x96", "2,3,4", "1", peers="none"))
    assert not is_right and [row["bits"] for row in rows] == ["2", "4"]
    assert "256x96, 3: RuntimeError: launch failed" in capsys.readouterr().err


def test_a_pinned_way_is_taken_and_let_go():
    ops, wgmma = sweep._ops, sweep._wgmma
    before = ops.pick_kernel, ops.pick_config, wgmma.wgmma_config
    with pytest.raises(RuntimeError), sweep.pinned("mma", "this one"):
        assert ops.pick_kernel(4096, "sm_90a", 4096, 4096) == "mma" and ops.pick_config(None) == "this one"
        assert wgmma.wgmma_config is before[2]
        raise RuntimeError
    with sweep.pinned("wgmma", "that one"):
        assert ops.pick_kernel(1, "sm_80", 4096, 4096) == "wgmma" and wgmma.wgmma_config(None, 1) == "that one"
    with sweep.pinned("dequantise"):
        assert ops.pick_kernel(1, "sm_80", 4096, 4096) == "dequantise" and ops.pick_config is before[1]
    assert (ops.pick_kernel, ops.pick_config, wgmma.wgmma_config) == before


def test_the_sweep_tells_what_the_choice_in_use_loses(capsys):
    times = {"dequantise": 30.0, ("mma", 1): 12.0, ("mma", 2): 10.0, "in use": 12.5}
    state = {"case": "in use"}
    config = dataclasses.make_dataclass("Config", ["slices"], frozen=True)

    class Products(Product):
        def microseconds(self, x, expected_us, repeats):
            way = sweep._ops.pick_kernel(1, "sm_90a", 4096, 4096)
            picked = sweep._ops.pick_config(None) if way == "mma" and state["case"] != "in use" else None
            return times[state["case"] if state["case"] == "in use" else way if picked is None else (way, picked.slices)]

    class Exact:
        def error(self, y):
            state["case"] = "pinned"
            return 1e-2 if sweep._ops.pick_kernel(1, "sm_90a", 4096, 4096) == "wgmma" else 1e-4

    cases = [("dequantise", None), ("mma", config(1)), ("mma", config(2)), ("wgmma", config(3))]
    row = sweep._measure(Products(), cases, np.zeros((1, 64), np.float16), Exact(), 5.0)
    assert row["in_use_us"] == 12.5 and row["regret"] == pytest.approx(0.25) and row["cases"] == 4
    assert row["ways_us"] == {"mma": 10.0, "wgmma": None, "dequantise": 30.0}
    assert row["best"][0] == {"us": 10.0, "way": "mma", "config": {"slices": 2}}
    assert row["wrong"] == [{"way": "wgmma", "config": {"slices": 3}}] and "WRONG" in capsys.readouterr().err
    line = sweep.row_text(row | {"k": 64, "n": 96, "bits": "4", "rows": 1})
    assert "25.0%" in line and line.endswith("mma slices=2") and " - " in line


def test_exllamav2_is_looked_for_where_it_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "torch_or_none", lambda: None)
    assert peers.load_exllamav2(None) is None
    monkeypatch.setattr(peers, "torch_or_none", lambda: "torch")
    with pytest.raises(ValueError, match=r"--exllamav2 .*: no exllamav2_ext\*\.so there"):
        peers.load_exllamav2(tmp_path)
    (tmp_path / "exllamav2_ext.so").write_bytes(b"not a library")
    with pytest.raises(ValueError, match="exllamav2_ext.so cannot be loaded"):
        peers.load_exllamav2(tmp_path)


class Tensor(OnHost):
    """A NumPy array with the methods of PyTorch's tensors that the peer uses."""

    def clone(self):
        return self.copy()

    def cuda(self):
        return self.copy()

    def short(self):
        return self.astype(np.int16)


def tensor(array):
    return np.ascontiguousarray(array).view(Tensor)


TORCH = SimpleNamespace(
    half=np.float16,
    short=np.int16,
    empty=lambda shape, dtype=None, device=None: None if device == "meta" else tensor(np.zeros(shape, dtype)),
    from_numpy=tensor,
    from_dlpack=lambda array: array.view(Tensor),
    argsort=lambda array: tensor(np.argsort(array)),
    cuda=SimpleNamespace(synchronize=lambda: None),
)


@pytest.mark.parametrize("name", ["4", "4.65", "gptq-g32", "gptq-act"])
def test_exllamav2_is_called_as_its_functions_take_it(numpy_for_cupy, monkeypatch, name):
    """`cupyq.ext` has exllamav2's functions, argument order and in-place effects: it stands for the compiled extension."""
    kind, k, n = parse_kind(name), 1024, 64
    tensors = random_tensors(kind, k, n, Words(np, words_needed(k, n)))
    before = {short: array.copy() for short, array in tensors.items()}
    q = QMatrix.from_tensors(tensors)
    names = ("make_q_matrix", "gemm_half_q_half", "free_q_matrix")
    extension = SimpleNamespace(**{name: getattr(cupyq.ext, name) for name in names})
    extension.make_group_map = lambda groups, rows: tensor(cupyq.ext.make_group_map(groups, rows))
    peer = peers.Exllamav2(extension, TORCH, kind, k, n, {short: array.view(OnHost) for short, array in tensors.items()})
    x = qmatmul.random_rows(3, k, float16, np).view(OnHost)
    assert qmatmul.Exact(q, x, [3]).error(peer.product(x)) < 1e-3
    assert len(peer.handles) == 2 and all(np.array_equal(before[short], tensors[short]) for short in before)
    calls = []
    monkeypatch.setattr(peers, "_torch_event_times", lambda torch, run, repeats: (calls.append(run()), [64.0])[1])
    monkeypatch.setattr(peers.Exllamav2, "tuned", set())
    monkeypatch.setattr(peers, "_EXLLAMAV2_TUNING_CALLS", 5)
    assert peer.microseconds(x, 1.0) == 64.0 / (timing.loops_for(8, 2) * 2)
    assert peer.tuned == (set() if kind.is_gptq else {(3, k, n)})
    peer.close()
    assert peer.handles == []


# --- attention --------------------------------------------------------------------------------------------------------


def problem(lengths=(96, 32, 1), queries=1, window=None, heads=4, kv_heads=2, head_dim=64):
    return attention.Problem(tuple(lengths), queries, heads, kv_heads, head_dim, window)


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(("lengths", "queries"), [((96, 32, 1), 1), ((33, 40), 5), ((24,), 24)])
def test_pairs_and_bytes_are_those_that_are_counted(lengths, queries, window):
    counted, seen = 0, [set() for _ in lengths]
    for row, length in enumerate(lengths):
        for position in range(length - queries, length):
            keys = [j for j in range(length) if j <= position and (window is None or j > position - window)]
            counted += len(keys)
            seen[row].update(keys)
    case = problem(lengths, queries, window)
    assert case.pairs() == counted and case.flops() == 4 * counted * 4 * 64
    tokens, result = sum(map(len, seen)), 2 * 2 * len(lengths) * queries * 4 * 64
    assert case.moved_bytes() == tokens * 2 * 2 * 64 * 2 + result


@pytest.mark.parametrize("kind", attention.CACHE_KINDS)
def test_bytes_of_a_value_are_those_of_the_arrays(numpy_for_cupy, kind):
    case = problem([64], head_dim=128)
    ((k, v),) = attention.Caches(case, float16, kind, copies=1).pairs
    assert case.moved_bytes(kind) == k.nbytes + v.nbytes + 2 * 2 * 4 * 128


def test_decoding_a_batch_is_bound_by_bytes_and_a_prompt_by_flops():
    # 16 x 4096 keys and values of 8 heads of 128 in two bytes: 268,435,456 bytes, and 16 x 2 x 32 x 128 x 2 of queries.
    case = problem([4096] * 16, heads=32, kv_heads=8, head_dim=128)
    assert case.moved_bytes() == 268_435_456 + 262_144 and case.name == "decode 16 x 4096, d 128".removesuffix(", d 128")
    assert LIMITS.microseconds(case.moved_bytes(), case.flops()) == pytest.approx(268_697_600 / 3e6)
    case = problem([4096], 4096, heads=32, kv_heads=8, head_dim=128)
    assert case.flops() == 4 * (4096 * 4097 // 2) * 32 * 128 and case.name == "prompt 4096"
    assert LIMITS.microseconds(case.moved_bytes(), case.flops()) == pytest.approx(case.flops() / 8e8)
    # Of 4.5 bits a value instead of 16.
    assert (problem([1 << 20]).moved_bytes("q4") - 1024) / (problem([1 << 20]).moved_bytes() - 1024) == 4.5 / 16


def test_names_tell_problems_apart():
    table = attention.Options.parse().table()
    names = [case.name for case, _ in table]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 24
    assert problem((5, 9), window=3).name == "decode 2 x 5..9, d 64, w 3" and problem([9], 4).name == "4 new 1 x 9, d 64"


def test_the_default_table_of_attention():
    table = {case.name: (case, variants) for case, variants in attention.Options.parse().table()}
    goals = ["decode 1 x 4096", "decode 16 x 4096", "decode 1 x 32768", "prompt 2048", "prompt 4096", "prompt 16384"]
    assert list(table)[:6] == goals and all(
        (c.heads, c.kv_heads, c.head_dim) == (32, 8, 128) for c, _ in list(table.values())[:6]
    )
    assert {case.head_dim for case, _ in table.values()} == {64, 128, 256}
    assert {case.window for case, _ in table.values()} == {None, 4096} and {1, 4, 16} < {
        case.queries for case, _ in table.values()
    }
    assert [kind for kind, is_paged in table["decode 1 x 32768"][1] if not is_paged] == "fp16 fp8 e4m3 q4 q6 q8".split()
    case, variants = table["decode 64 x 1..16384"]
    assert case.batch == 64 and sorted(case.lengths) != list(case.lengths) and ("fp16", True) in variants
    assert all(
        case.capacity % attention.PAGE_SIZE == 0 for case, variants in table.values() if any(paged for _, paged in variants)
    )
    quick = attention.Options.parse(is_quick=True).table()
    assert [case.name for case, _ in quick] == goals and {kind for _, variants in quick for kind, _ in variants} == {
        "fp16",
        "q4",
    }


def test_options_of_attention_that_are_given():
    options = attention.Options.parse(8, 2, 64, "bfloat16", "q4,e4m3", "cudnn")
    assert options == attention.Options(8, 2, 64, bfloat16, ("q4", "e4m3"), ("cudnn",), False)
    table = options.table()
    assert {kind for _, variants in table for kind, _ in variants} == {"q4", "e4m3"} and all(variants for _, variants in table)
    assert table[0][0] == attention.Problem((4096,), 1, 8, 2, 64)
    assert attention.Options.parse(peers="none").peers == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heads": 6, "kv_heads": 4}, "--heads: 6, expected a multiple of --kv-heads 4"),
        ({"head_dim": 100}, "--head-dim: 100, expected a multiple of 8"),
        ({"head_dim": 264}, "--head-dim: 264"),
        ({"head_dim": 96}, "--cache: q4 needs a head size that is a multiple of 64"),
        ({"caches": "fp16,q5"}, "--cache: 'q5' is not one of fp16, fp8"),
        ({"peers": "flash,triton"}, "--peers: 'triton' is not one of flash, cudnn, none"),
    ],
)
def test_options_of_attention_that_cannot_be_read(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention.Options.parse(**given)


@pytest.mark.parametrize("window", [None, 9])
def test_what_is_expected_of_attention_is_its_definition(window):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 16), (33, 2, 16), (33, 2, 16)))
    found = attention.expected(q, k, v, window)
    for head in range(4):
        first = 0 if window is None else 33 - window
        scores = [sum(float(a) * float(b) for a, b in zip(q[head], k[j, head // 2], strict=True)) / 4 for j in range(first, 33)]
        weights = np.exp(scores) / np.exp(scores).sum()
        exact = sum(weight * v[j, head // 2].astype(float) for weight, j in zip(weights, range(first, 33), strict=True))
        assert found[head] == pytest.approx(exact, rel=1e-4, abs=1e-5)
    assert np.abs(attention.expected(q, k[1:], v[1:]) - attention.expected(q, k, v)).max() > 1e-3


def test_sampled_queries_hold_the_first_and_the_last():
    assert attention.sampled_queries(problem([5])) == {0: [0]}
    assert attention.sampled_queries(problem([5] * 3)) == {0: [0], 1: [0], 2: [0]}
    for case in (problem([4096], 4096), problem([16] * 64), problem([99] * 16, 4)):
        rows = attention.sampled_queries(case)
        assert rows[0][0] == 0 and rows[case.batch - 1][-1] == case.queries - 1
        assert sum(map(len, rows.values())) == attention.SAMPLES


def test_random_values_of_other_places_differ(numpy_for_cupy, monkeypatch):
    monkeypatch.setattr(attention, "_pattern", lambda dtype: np.arange(1, 8).astype(dtype).view(np.uint16))
    assert attention.random_values((2, 5), float16, 0).ravel().tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    assert attention.random_values((5,), bfloat16, 3).tolist() == [4, 5, 6, 7, 1]


SMALL = [
    (problem([256]), [(kind, False) for kind in attention.CACHE_KINDS] + [("fp16", True)]),
    (problem([256, 1, 77]), [("fp16", False), ("fp16", True), ("q4", True), ("q6", True)]),
    (problem([64], 64), [("fp16", False), ("e4m3", True)]),
    (problem([128], 128, window=50), [("fp16", True)]),
    (problem([128, 64], 5, window=9), [("fp16", False), ("fp8", True)]),
]


@pytest.fixture
def small_table(monkeypatch):
    monkeypatch.setattr(attention, "PAGE_SIZE", 16)
    monkeypatch.setattr(attention.Options, "table", lambda self: SMALL)
    return sum(len(variants) for _, variants in SMALL)


def test_the_whole_table_of_attention_with_numpy_in_cupys_place(numpy_for_cupy, small_table, tmp_path, capsys):
    with open(tmp_path / "rows", "w") as lines:
        rows, is_right = attention.run(attention.Options(peers=()), sys.stdout, lines)
    captured = capsys.readouterr()
    assert captured.err == "" and is_right and len(rows) == small_table
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == rows
    head, columns, *text = captured.out.splitlines()
    assert head.startswith("Fake GPU") and len(text) == len(rows)
    assert {len(line) for line, row in zip(text, rows, strict=True) if len(row["problem"]) <= 24} == {len(columns)}
    assert all(0 < row["error"] < 1e-3 and row["of_fp16"] == 1 for row in rows)
    assert all(row["flash_us"] is None and row["cudnn_error"] is None for row in rows)
    # A graph for each row, and one more for the problem without a row of its own for arrays that lie in a row.
    assert len(numpy_for_cupy) == len(rows) + 1
    row = rows[7]
    expected = {
        "family": "attention", "device": "Fake GPU", "problem": "decode 3 x 1..256, d 64", "batch": 3, "queries": 1,
        "keys": 256, "mean_keys": (256 + 1 + 77) / 3, "heads": 4, "kv_heads": 2, "head_dim": 64, "window": None,
        "cache": "fp16", "page_size": None, "dtype": "float16", "us": 25.0, "of_fp16": 1.0, "flash_us": None,
        "flash_error": None, "cudnn_us": None, "cudnn_error": None,
    }  # fmt: skip
    moved = (256 + 1 + 77) * 2 * 2 * 64 * 2 + 2 * 2 * 3 * 4 * 64
    numbers = {
        "gigabytes_per_s": moved / 25 / 1e3,
        "teraflops": 4 * (256 + 1 + 77) * 4 * 64 / 25 / 1e6,
        "limit_us": moved / 3e6,
        "share": moved / 3e6 / 25,
    }
    assert {key: row[key] for key in expected} == expected and row.keys() == expected.keys() | numbers.keys() | {"error"}
    assert {key: row[key] for key in numbers} == pytest.approx(numbers)
    assert rows[8]["page_size"] == 16 and rows[9]["cache"] == "q4"


def test_attention_that_is_wrong_is_seen_and_told(numpy_for_cupy, small_table, monkeypatch, capsys):
    right = attention.attention

    def short(q, k, v, *, kv_lengths, **options):
        if kv_lengths is not None and options["block_table"] is not None:
            kv_lengths = np.maximum(kv_lengths - 1, 0)  # the newest key is left out
        return right(q, k, v, kv_lengths=kv_lengths, **options)

    monkeypatch.setattr(attention, "attention", short)
    rows, is_right = attention.run(attention.Options(peers=()), sys.stdout)
    assert not is_right and all((row["page_size"] is not None) == (row["error"] > 1e-2) for row in rows)
    assert capsys.readouterr().out.count("WRONG") == sum(row["page_size"] is not None for row in rows)


def test_attention_that_is_not_written_is_wrong(numpy_for_cupy, small_table, monkeypatch):
    def lazy(q, k, v, *, out, **options):
        return out

    monkeypatch.setattr(attention, "attention", lazy)
    rows, is_right = attention.run(attention.Options(peers=()), open("/dev/null", "w"))
    assert not is_right and all(row["error"] is None for row in rows)
    # One row of many that no sample meets.
    case = problem([512], 512)
    exact = object.__new__(attention.Exact)
    exact.rows = {(0, 0): np.ones((4, 64), np.float32)}
    out = np.ones((1, 512, 4, 64), np.float16)
    assert exact.error(out) == 0
    out[0, 3, 2, 1] = np.nan
    assert exact.error(out) == float("inf") and 3 not in attention.sampled_queries(case)[0]


def test_a_cache_that_fails_leaves_the_others(numpy_for_cupy, small_table, monkeypatch, capsys):
    right = attention.attention

    def failing(q, k, v, **options):
        if isinstance(k, attention.CacheCodes) and k.kind == "q4":
            raise RuntimeError("launch failed")
        return right(q, k, v, **options)

    monkeypatch.setattr(attention, "attention", failing)
    rows, is_right = attention.run(attention.Options(peers=()), open("/dev/null", "w"))
    assert not is_right and len(rows) == small_table - 2 and "q4" not in {row["cache"] for row in rows}
    assert "decode 1 x 256, d 64, q4: RuntimeError: launch failed" in capsys.readouterr().err


class AttentionTensor(OnHost):
    """A NumPy array with the methods of PyTorch's tensors that its attention is called with."""

    def transpose(self, first, second):
        return self.swapaxes(first, second)

    def flatten(self, first, last):
        return self.reshape(-1, *self.shape[2:])

    def contiguous(self):
        return np.ascontiguousarray(self).view(AttentionTensor)

    def cpu(self):
        return self

    def numpy(self):
        return self.view(np.ndarray)


def fake_torch(calls):
    """PyTorch's attention: which mask is aligned where, and in which order the private function takes its arguments."""

    def attend(q, k, v, first_key, window):
        out = np.empty(q.shape, q.dtype)
        for i in range(q.shape[0]):
            seen = slice(0, first_key + i + 1)
            out[i] = attention.expected(*(np.asarray(a) for a in (q[i], k[seen], v[seen])), window)
        return out.view(AttentionTensor)

    def sdpa(q, k, v, is_causal, enable_gqa):
        calls.append("sdpa")
        rows = zip(*(np.asarray(a).swapaxes(1, 2) for a in (q, k, v)), strict=True)
        first = 0 if is_causal else k.shape[2] - 1
        return np.stack([attend(*row, first, None) for row in rows]).swapaxes(1, 2).view(AttentionTensor)

    def flash(q, k, v, starts_q, starts_k, most_q, most_k, dropout, is_causal, is_debug, **options):
        calls.append("flash")
        left, right, used = (options.pop(name, None) for name in ("window_size_left", "window_size_right", "seqused_k"))
        if options or dropout or not is_causal or is_debug or (left is not None and right != 0):
            raise TypeError("not what was meant")
        window = None if left is None else left + 1
        if starts_q is None:
            if used is not None or (most_q, most_k) != (q.shape[1], k.shape[1]):
                raise TypeError("lengths without starts")
            return np.stack([attend(*row, most_k - most_q, window) for row in zip(q, k, v, strict=True)]).view(
                AttentionTensor
            ), None
        parts = []
        for row, length in enumerate(used.tolist()):
            queries = q[starts_q[row] : starts_q[row + 1]]
            keys = slice(starts_k[row], starts_k[row] + length)
            parts.append(attend(queries, k[keys], v[keys], length - len(queries), window))
        return np.concatenate(parts).view(AttentionTensor), None

    return SimpleNamespace(
        float16=np.float16, bfloat16=bfloat16, int16=np.int16, int32=np.int32,
        arange=lambda count, dtype, device: np.arange(count, dtype=dtype),
        tensor=lambda values, dtype, device: np.array(values, dtype),
        from_dlpack=lambda array: array.view(AttentionTensor),
        nn=SimpleNamespace(functional=SimpleNamespace(scaled_dot_product_attention=sdpa)),
        ops=SimpleNamespace(aten=SimpleNamespace(_flash_attention_forward=flash)),
    )  # fmt: skip


@pytest.fixture
def torch_backends(monkeypatch):
    """Which backends have been asked for."""
    asked = []

    @contextlib.contextmanager
    def sdpa_kernel(backend):
        asked.append(backend)
        yield

    names = SimpleNamespace(FLASH_ATTENTION="flash", CUDNN_ATTENTION="cudnn")
    monkeypatch.setitem(sys.modules, "torch.nn.attention", SimpleNamespace(sdpa_kernel=sdpa_kernel, SDPBackend=names))
    return asked


@pytest.mark.parametrize("dtype", [float16, bfloat16])
@pytest.mark.parametrize(
    ("case", "called"),
    [
        (problem([48, 48]), "sdpa"),
        (problem([24], 24), "sdpa"),
        (problem([40], 24), "flash"),
        (problem([48, 48], window=7), "flash"),
        (problem([24], 24, window=7), "flash"),
        (problem([48, 5, 31]), "flash"),
        (problem([48, 15, 31], 4), "flash"),
    ],
)
def test_pytorch_attends_to_the_same(numpy_for_cupy, torch_backends, monkeypatch, case, called, dtype):
    calls = []
    q, caches = attention.random_queries(case, dtype), attention.Caches(case, dtype)
    peer = peers.TorchAttention(fake_torch(calls), "flash", q, caches.pairs, case.lengths, case.window)
    output = peer.output()
    assert output.shape == q.shape and output.dtype == dtype
    assert attention.Exact(case, q, caches).error(output) < (1e-3 if dtype == float16 else 6e-3)
    assert calls == [called] and torch_backends == ["flash"]
    monkeypatch.setattr(peers, "torch_graph_microseconds", lambda torch, run, repeats: run() or 64.0)
    assert peer.microseconds(1.0) == 64.0 / (len(calls) - 1) and len(calls) - 1 == timing.loops_for(1, 2) * 2


def test_cudnn_is_asked_for_what_it_has(numpy_for_cupy, torch_backends, small_table, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(peers, "torch_or_none", lambda: fake_torch(calls))
    monkeypatch.setattr(peers, "torch_graph_microseconds", lambda torch, run, repeats: run() or 25.0)
    monkeypatch.setattr(peers, "empty_torch_cache", lambda: None)
    rows, is_right = attention.run(attention.Options(), sys.stdout)
    assert is_right and set(torch_backends) == {"flash", "cudnn"} and set(calls) == {"sdpa", "flash"}
    assert all(row["flash_us"] > 0 and row["flash_error"] < 1e-3 for row in rows)
    assert [row["cudnn_us"] is not None for row in rows] == [True] * 7 + [False] * 4 + [True] * 2 + [False] * 3
    captured = capsys.readouterr()
    assert captured.err == "" and " 0.25x      - " in captured.out and " 0.25x  0.25x " in captured.out


def test_peers_that_refuse_are_told(numpy_for_cupy, torch_backends, small_table, monkeypatch, capsys):
    torch = fake_torch([])

    def refusing(*arguments, **options):
        raise RuntimeError("No available kernel. Aborting execution.")

    torch.nn.functional.scaled_dot_product_attention = refusing
    monkeypatch.setattr(peers, "torch_or_none", lambda: torch)
    monkeypatch.setattr(peers, "torch_graph_microseconds", lambda torch, run, repeats: run() or 25.0)
    monkeypatch.setattr(peers, "empty_torch_cache", lambda: None)
    rows, is_right = attention.run(attention.Options(peers=("flash",)), open("/dev/null", "w"))
    assert is_right and {row["problem"] for row in rows if row["flash_us"] is None} == {
        "decode 1 x 256, d 64",
        "prompt 64, d 64",
    }
    assert "torch flash, prompt 64, d 64: No available kernel" in capsys.readouterr().err


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_random_model_is_the_one_that_is_written(tmp_path):
    config = shape_config("tiny")
    made = random_model.random_model(config, "4.65", 6, "numpy")
    nbytes = random_model.write_model(config, "4.65", 6, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) >= nbytes
    loaded = load_model(tmp_path, backend="numpy")
    ids = np.array([[3, 1, 4, 1, 5]])
    assert np.array_equal(made.forward(ids), loaded.forward(ids)) and np.std(made.forward(ids)) > 0.1
    kinds = {layer.name.rpartition(".")[2]: layer.kind for layer in loaded.linear_layers()}
    assert set(kinds.values()) == {"exl2"} and len(kinds) == 8


def test_shards_hold_each_tensor_once(tmp_path, monkeypatch):
    monkeypatch.setattr(random_model, "_SHARD_BYTES", 8192)
    config = shape_config("tiny")
    random_model.write_model(config, "4", 6, tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.files) > 3
        made = random_model.random_checkpoint(config, "4", 6)
        assert sorted(checkpoint.names) == sorted(made.names)
        for name in made.names:
            assert np.array_equal(checkpoint.array(name), made.array(name))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "tiny"])
def test_shapes_are_those_published(name):
    """Parameters in billions, as the models' names and cards tell them."""
    published = {"llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "mistral-7b": 7.25, "qwen2.5-7b": 7.62}[name]
    config = CONFIGS[name]
    hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    biases = hidden + 2 * kv if name.startswith("qwen") else 0
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden + biases
    assert (2 * config["vocab_size"] * hidden + layers * layer + hidden) / 1e9 == pytest.approx(published, abs=0.005)
    assert shape_config(name, 3)["num_hidden_layers"] == 3
    assert shape_config(name)["num_hidden_layers"] == (2 if name == "llama-3.1-70b" else layers)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_every_architecture_of_the_shapes_can_be_made(architecture):
    config = shape_config("tiny", 1) | {"architectures": [architecture], "sliding_window": None}
    made = random_model.random_model(config, "4", 6, "numpy")
    assert np.isfinite(made.forward(np.array([[1, 2]]))).all()
    assert architecture in {row for config in CONFIGS.values() for row in config["architectures"]}


def test_a_random_checkpoint_has_what_the_loader_asks_for():
    made = random_model.random_checkpoint(shape_config("tiny"), "4", 6)
    for file in ("loader", "upload"):
        source = (ROOT / f"cupyq/models/{file}.py").read_text()
        for name in set(re.findall(r"\bcheckpoint\.(\w+)", source)):
            assert hasattr(made, name), f"{file}.py: checkpoint.{name}"
            assert hasattr(Checkpoint, name) or name in ("folder", "names"), name
        for name in set(re.findall(r"checkpoint\.file\([^)]*\)\.(\w+)", source)):
            assert hasattr(made.file(""), name) and (hasattr(SafetensorsFile, name) or name == "path")
    name = "model.layers.1.mlp.up_proj.q_weight"
    piece = np.empty(24, np.uint8)
    made.read_piece(name, 40, piece)
    assert piece.tobytes() == made.array(name).tobytes()[40:64] and made.info(name).nbytes == made.array(name).nbytes
    with pytest.raises(ValueError):
        made.array(name)[0] = 0


def test_what_a_step_reads_and_a_prompt_computes():
    made = random_model.random_model(shape_config("tiny"), "4", 6, "numpy")
    bits = sum(layer.storage_bits for layer in made.linear_layers())
    # 2 layers, keys and values, 2 heads of 16, 2 bytes.
    assert model.step_bytes(made, 0) == bits // 8 and model.step_bytes(made, 10) - bits // 8 == 10 * 2 * 2 * 2 * 16 * 2
    decoder = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    pairs = 1 + 2 + 3
    assert model.prefill_flops(made, 3) == 2 * (3 * decoder + 64 * 96) + 2 * pairs * (2 * 2 * 4 * 16)


def model_arguments(**given):
    defaults = {
        "shape": "tiny", "layers": None, "bits": "4", "head_bits": 6, "backend": "numpy", "context": (5,), "steps": 3,
        "sampled": False, "prefill": (7,), "kernels": False, "load": False, "folder": None,
    }  # fmt: skip
    return SimpleNamespace(**(defaults | given))


def test_the_model_bench_on_numpy(tmp_path, capsys):
    with open(tmp_path / "rows.jsonl", "w") as lines:
        rows = model.run(model_arguments(context=(5, 9), load=True, folder=str(tmp_path)), sys.stdout, lines)
    assert list(map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())) == rows
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]
    common = {"family": "model", "shape": "tiny", "layers": 2, "bits": "4", "head_bits": 6}
    assert all(common.items() <= row.items() for row in rows)
    assert [(row["what"], row["tokens"]) for row in rows[:3]] == [("decode", 5), ("decode", 9), ("prefill", 7)]
    assert all(row["tokens_per_s"] > 0 and row["share"] is None for row in rows[:3])
    assert [(row["what"], row["kernel_cache"]) for row in rows[3:]] == [
        (what, cache) for cache in ("empty", "full") for what in ("load", "token after loading", "first token of a new process")
    ]
    assert all(row["seconds"] > 0 and row["kernels"] == 0 for row in rows[3:])
    text = capsys.readouterr().out.splitlines()
    assert len(text) == 2 + len(rows) and "tiny: 2 layers" in text[1]


def test_decoding_can_be_sampled_and_shortened():
    (row,) = model.run(model_arguments(sampled=True, layers=1, prefill=()), open("/dev/null", "w"))
    assert row["layers"] == 1 and row["what"] == "decode"


def test_rates_are_compared_with_the_limit():
    row = model._rate_row("decode", 128, 600.0, 800.0)
    assert row["share"] == 0.75 and "75.0%" in model.row_text(row)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shape": "gpt-5"}, "--shape: 'gpt-5' is not one of llama-3.1-8b"),
        ({"bits": "gptq-g128"}, "--bits: 'gptq-g128', but models are made as EXL2"),
        ({"bits": "9"}, "--bits: '9'"),
        ({"head_bits": 7}, "--head-bits: 7"),
        ({"context": (502,)}, "--context: 502 tokens and 11 steps pass the context of 512"),
        ({"prefill": (513,)}, "--prefill: 513 tokens"),
        ({"load": True, "folder": "/nowhere/at/all"}, "--folder /nowhere/at/all: no such folder"),
    ],
)
def test_model_arguments_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        model.run(model_arguments(**given), open("/dev/null", "w"))


def test_a_process_that_fails_is_one_line(tmp_path):
    with pytest.raises(BackendError, match="no first token in a new process: .*config.json"):
        first_token.first_token_seconds(tmp_path, backend="numpy")


# --- the figure -------------------------------------------------------------------------------------------------------


def measured(k, n, kind, rows, us):
    return {
        "family": "qmatmul", "device": "Fake GPU", "k": k, "n": n, "bits": kind, "rows": rows, "limit_us": 10.0, "us": us,
        "cublas_us": 40.0, "int4_us": None if rows > 16 else 20.0, "exllamav2_us": 25.0,
    }  # fmt: skip


@pytest.fixture
def lines(tmp_path):
    rows = [measured(k, 4096, kind, rows, 12.5) for k in (4096, 14336) for kind in ("4", "gptq-act") for rows in (1, 16, 256)]
    rows.append(measured(4096, 4096, "4", 1, 20.0) | {"device": "Fake & GPU"})  # measured again
    rows.append({"family": "model", "what": "decode"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_panels_hold_shares_of_the_limit(lines):
    panels = plot_qmatmul.panels_of(plot_qmatmul.read_rows([lines]), "4", None)
    assert [title for title, _ in panels] == ["4096 × 4096", "14336 × 4096"]
    series = panels[0][1]
    assert series["us"] == [(1, 0.5), (16, 0.8), (256, 0.8)] and series["cublas_us"][0] == (1, 0.25)
    assert series["int4_us"] == [(1, 0.5), (16, 0.5)]
    panels = plot_qmatmul.panels_of(plot_qmatmul.read_rows([lines]), "4", "14336x4096")
    assert [title for title, _ in panels] == ["EXL2, 4 bits", "GPTQ act"]


def test_the_figure_is_well_formed(lines, tmp_path, capsys):
    target = tmp_path / "new/figure.svg"
    plot_qmatmul.main([str(lines), "--out", str(target)])
    root = ElementTree.parse(target).getroot()
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert names.count("polyline") == 2 * 4 and capsys.readouterr().out.strip() == str(target)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"cupyq", "exllamav2", "PyTorch int4", "4096 × 4096", "100 %", "256"} <= set(texts)
    assert any("Fake & GPU" in text for text in texts)
    # Left to right and bottom to top, within the picture.
    width, height = float(root.get("width")), float(root.get("height"))
    for line in (element for element in root.iter() if element.tag.endswith("polyline")):
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert points == sorted(points) and all(0 < x < width and 0 < y < height for x, y in points)


def test_figures_of_nothing_are_refused(lines, tmp_path):
    found = plot_qmatmul.read_rows([lines])
    with pytest.raises(SystemExit, match="nothing to draw; .* --bits 4, gptq-act"):
        plot_qmatmul.panels_of(found, "5", None)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"family": "model"}\n')
    with pytest.raises(SystemExit, match="no rows of"):
        plot_qmatmul.read_rows([empty])
    empty.write_text("us 12\n")
    with pytest.raises(SystemExit, match="empty.jsonl:1: not a JSON object"):
        plot_qmatmul.read_rows([empty])


def attended(name, us, cache="fp16", page_size=None, queries=1, limit=10.0, plain=20.0):
    return {
        "family": "attention", "device": "Fake & GPU", "problem": name, "queries": queries, "heads": 32, "kv_heads": 8,
        "dtype": "float16", "cache": cache, "page_size": page_size, "limit_us": limit, "us": us, "of_fp16": us / plain,
        "flash_us": 40.0, "cudnn_us": None if queries == 1 else 25.0,
    }  # fmt: skip


@pytest.fixture
def attention_lines(tmp_path):
    rows = [attended("decode 1 x 4096", 30.0), attended("prompt 4096", 12.5, queries=4096)]
    rows += [attended("decode 1 x 4096", 20.0), attended("decode 1 x 4096", 20.4, page_size=256)]  # measured again; in pages
    rows += [attended("decode 1 x 4096", 8.0, "q4", limit=2.8), attended("decode 1 x 4096", 8.1, "q4", 256, limit=2.8)]
    rows += [attended("prompt 4096", 13.0, "q4", queries=4096), {"family": "model", "what": "decode"}]
    path = tmp_path / "attention.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bars_hold_shares_and_times(attention_lines):
    found = plot_attention.read_rows([attention_lines])
    colors = [color for _, color in plot_attention.PEERS.values()]
    assert plot_attention.shares(found) == [
        ("decode 1 x 4096", [(0.5, colors[0], None), (0.25, colors[1], None)]),
        ("prompt 4096", [(0.8, colors[0], None), (0.25, colors[1], None), (0.4, colors[2], None)]),
    ]
    ((name, bars),) = plot_attention.times_of_codes(found)
    assert name == "decode 1 x 4096" and [bar[0] for bar in bars] == pytest.approx([1.02, 0.4])
    assert [bar[2] for bar in bars] == pytest.approx([1.0, 0.28])


def test_the_figure_of_attention_is_well_formed(attention_lines, tmp_path, capsys):
    target = tmp_path / "new/figure.svg"
    plot_attention.main([str(attention_lines), "--out", str(target)])
    root = ElementTree.parse(target).getroot()
    bars = [element for element in root.iter() if element.get("class") == "bar"]
    assert len(bars) == 5 + 2 and capsys.readouterr().out.strip() == str(target)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"cupyq", "PyTorch, cuDNN", "decode 1 x 4096", "prompt 4096", "100 %", "q4", "fp16 in pages"} <= set(texts)
    assert any("Fake & GPU: 32 query heads" in text for text in texts)
    width, height = float(root.get("width")), float(root.get("height"))
    for element in root.iter():
        if element.get("x") is not None:
            assert 0 <= float(element.get("x")) < width and 0 <= float(element.get("y")) < height
    only = tmp_path / "plain.jsonl"
    only.write_text(attention_lines.read_text().splitlines()[0] + "\n")
    plot_attention.main([str(only), "--out", str(target)])
    assert len([e for e in ElementTree.parse(target).getroot().iter() if e.get("class") == "bar"]) == 2


def test_figures_of_no_attention_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"family": "qmatmul"}\n')
    with pytest.raises(SystemExit, match="no rows of `cupyq bench attention`"):
        plot_attention.read_rows([path])
    path.write_text("us 12\n")
    with pytest.raises(SystemExit, match="rows.jsonl:1: not a JSON object"):
        plot_attention.read_rows([path])
    path.unlink()
    with pytest.raises(SystemExit, match="rows.jsonl: No such file or directory; give files that `cupyq bench attention"):
        plot_attention.read_rows([path])


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py")))
def test_scripts_import_what_there_is(script):
    """Their imports alone: running one needs a GPU."""
    source = (ROOT / "benchmarks" / script).read_text()
    imports = "\n".join(
        re.findall(r"^(?:from cupyq[\w.]* )?import \w.*$|^from cupyq[\w.]* import \([^)]*\)$", source, re.MULTILINE)
    )
    assert "cupyq" in imports
    done = subprocess.run(
        [sys.executable, "-c", imports.replace("import cupy\n", "")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_limits_of_a_gpu(cupy):
    assert 50 < limits.read_gigabytes_per_s(256 << 20) < 50_000
    assert 1 < limits.cublas_tflops(2048) < 10_000


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_table_on_a_gpu(cupy, monkeypatch, dtype, tmp_path):
    monkeypatch.setattr(qmatmul, "measure_limits", lambda: LIMITS)
    monkeypatch.setattr(timing, "MAX_COPIES", 3)
    options = qmatmul.Options.parse("256x96,512x64", "4,2.5,gptq-act", "1,17,80", dtype, peers="cublas")
    with open(tmp_path / "rows", "w") as lines:
        rows, is_right = qmatmul.run(options, open("/dev/null", "w"), lines)
    assert is_right and len(rows) == 2 * 3 * 3
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == rows
    for row in rows:
        assert row["us"] > 0 and row["cublas_us"] > 0 and 0 < row["error"] < 5e-3 and row["dtype"] == dtype


@pytest.mark.gpu
def test_a_product_that_is_wrong_is_found_on_a_gpu(cupy, monkeypatch, capsys):
    monkeypatch.setattr(qmatmul, "measure_limits", lambda: LIMITS)
    monkeypatch.setattr(timing, "MAX_COPIES", 2)
    right = qmatmul.qmatmul

    def wrong(x, q, *, out, workspace):
        out = right(x, q, out=out, workspace=workspace)
        out[-1] *= np.float16(1.01)
        return out

    monkeypatch.setattr(qmatmul, "qmatmul", wrong)
    rows, is_right = qmatmul.run(qmatmul.Options.parse("256x96", "4", "1,17", peers="none"))
    assert not is_right and [row["error"] > 6e-4 for row in rows] == [True, True]
    assert capsys.readouterr().out.count("WRONG") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [float16, bfloat16])
def test_the_table_of_attention_on_a_gpu(cupy, monkeypatch, small_table, dtype, tmp_path):
    monkeypatch.setattr(attention, "measure_limits", lambda: LIMITS)
    monkeypatch.setattr(timing, "MAX_COPIES", 3)
    with open(tmp_path / "rows", "w") as lines:
        rows, is_right = attention.run(attention.Options(dtype=dtype), open("/dev/null", "w"), lines)
    assert is_right and len(rows) == small_table
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == rows
    for row in rows:
        assert row["us"] > 0 and 0 < row["error"] < attention.ALLOWED_ERROR[dtype] and row["dtype"] == str(dtype)
        if peers.torch_or_none() is not None and row["flash_us"] is not None:
            assert row["flash_us"] > 0 and row["flash_error"] < attention.ALLOWED_ERROR[dtype], row["problem"]


@pytest.mark.gpu
def test_attention_that_is_wrong_is_found_on_a_gpu(cupy, monkeypatch, small_table, capsys):
    monkeypatch.setattr(attention, "measure_limits", lambda: LIMITS)
    monkeypatch.setattr(timing, "MAX_COPIES", 2)
    right = attention.attention

    def wrong(q, k, v, *, out, **options):
        out = right(q, k, v, out=out, **options)
        out[-1, -1] *= np.float16(1.05)
        return out

    monkeypatch.setattr(attention, "attention", wrong)
    monkeypatch.setattr(attention.Options, "table", lambda self: SMALL[1:3])
    rows, is_right = attention.run(attention.Options(peers=()))
    assert not is_right and all(row["error"] > attention.ALLOWED_ERROR[float16] for row in rows)
    assert capsys.readouterr().out.count("WRONG") == len(rows) == 6


@pytest.mark.gpu
def test_the_sweep_on_a_gpu(cupy, monkeypatch):
    monkeypatch.setattr(sweep, "measure_limits", lambda: LIMITS)
    monkeypatch.setattr(timing, "MAX_COPIES", 2)
    every = sweep.candidate_configs
    monkeypatch.setattr(sweep, "candidate_configs", lambda problem: every(problem)[:3])
    rows, is_right = sweep.run(qmatmul.Options.parse("1024x256", "4", "1,80"), open("/dev/null", "w"))
    assert is_right and [row["rows"] for row in rows] == [1, 80]
    few = rows[0]
    assert few["cases"] >= 3 and few["ways_us"]["mma"] > 0 and few["ways_us"]["dequantise"] > 0
    assert few["best"][0]["us"] == min(us for us in few["ways_us"].values() if us)
    json.dumps(rows)


@pytest.mark.gpu
def test_the_model_bench_on_a_gpu(cupy, monkeypatch):
    monkeypatch.setattr(model, "measure_limits", lambda: LIMITS)
    rows = model.run(model_arguments(backend="cupy"), open("/dev/null", "w"))
    assert [row["what"] for row in rows] == ["decode", "prefill"]
    assert all(row["tokens_per_s"] > 0 and 0 < row["share"] < 1 for row in rows)
