"""`cupyq bench quantize`: what it counts, that wrong results show, and that one step that fails leaves the others."""

import io
import json
import math

import numpy as np
import pytest

from cupyq.bench import quantize
from cupyq.bench.limits import Limits
from cupyq.bench.quantize import Options, QuantizeTable, Rates
from cupyq.cli import main
from cupyq.quantize.layouts import MENU, Layout
from cupyq.quantize.linear import quantize_linear

RATES = Rates(Limits("Fake GPU", 1000.0, 500.0), 50.0, 25.0)
SMALL = {"shapes": "96x64", "layouts": "4g32", "backend": "numpy"}


def on_host(**changes):
    return Options.parse(**(SMALL | changes))


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_a_model_has_its_own_matrices():
    options = Options.parse(backend="numpy")
    assert options.shapes == ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)) and options.tokens == 204800
    assert [layout.name for layout in options.layouts] == list(quantize.LAYOUTS)
    assert set(options.layouts) <= set(MENU)  # what a measurement goes through
    tiny = Options.parse("tiny", backend="numpy", tokens=7)
    assert tiny.shapes == ((64, 64), (64, 32), (64, 96), (96, 64)) and tiny.tokens == 7
    quick = Options.parse(backend="numpy", is_quick=True)
    assert quick.shapes == ((4096, 4096),) and len(quick.layouts) == 1 and quick.shape is None


def test_matrices_in_place_of_a_model():
    options = Options.parse(shapes="96x64,64x32", layouts="2g32,8x.5g64+6x.5g64", backend="numpy")
    assert options.shape is None and options.shapes == ((96, 64), (64, 32))
    assert options.layouts == (Layout.parse("2g32"), Layout.parse("8x.5g64+6x.5g64"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "tiny", "--shapes", "64x64"), "--shape and --shapes exclude each other"),
        (("--shape", "gpt-5"), "--shape: 'gpt-5' is not one of"),
        (("--shapes", "64x33"), "--shapes: '64x33', expected K x N"),
        (("--layouts", "4g32,9g32"), "--layouts: bits: 9"),
        (("--layouts", "4"), "--layouts: layout '4'"),
        (("--tokens", "0"), "--tokens: expected 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_on_one_line(capsys, arguments, message):
    assert main(["bench", "quantize", "--backend", "numpy", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_the_command_line_says_what_there_is(capsys):
    assert main(["bench", "--help"]) == 0
    assert "the steps of making quantized weights" in capsys.readouterr().out
    assert main(["bench", "quantize", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--shape", "--shapes", "--layouts", "--tokens", "--quick", "--backend", "--json", "--out"):
        assert option in text


# --- what is counted --------------------------------------------------------------------------------------------------


def test_the_limit_is_the_slowest_of_bytes_and_arithmetic():
    assert RATES.microseconds(moved_bytes=1e9) == pytest.approx(1000)
    assert RATES.microseconds(fp16=5e9, fp32=1e9, fp64=1e9) == pytest.approx(10 + 20 + 40)
    assert RATES.microseconds(moved_bytes=1e9, fp32=1e9) == pytest.approx(1000)
    assert "fp32 50, fp64 25 TFLOP/s" in str(RATES)


def test_operations_of_a_group():
    updates = sum(1 for row in range(100) for earlier in range(row))
    assert quantize.group_flops(100, 7) == 4 * updates * 7  # a product and a sum, each at half the speed of a fused one
    windows = {2: 8, 3: 6, 4: 4, 5: 3, 6: 3, 8: 3}
    for bits, window in windows.items():
        assert quantize.search_flops(64, 5, bits) == 2 * 8 * 24 * window * 64 * 5


def test_operations_of_a_matrix():
    groups, n = [(4, 64), (3, 64), (3, 32)], 5
    within = sum(quantize.search_flops(rows, n, bits) + quantize.group_flops(rows, n) for bits, rows in groups)
    products = 2 * n * (64 * 64 + 128 * 32)
    assert quantize.matrix_flops(groups, n) == within + products
    swept = 3 * sum(2 * 160 * rows * n + quantize.group_flops(rows, n) for _, rows in groups)
    assert quantize.matrix_flops(groups, n, sweeps=3) == within + products + swept


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_step_on_numpy(capsys):
    rows, is_right = quantize.run(on_host(), io.StringIO())
    assert capsys.readouterr().err == "" and is_right
    steps = [(row["step"], row["matrix"], row["variant"]) for row in rows]
    assert len(steps) == len(set(steps)) and {row["step"] for row in rows} == {
        "search_scales", "search_scales_gptq", "quantize_group", "Hessian", "Hessian and cross", "factors", "correction",
        "matrix",
    }  # fmt: skip
    assert ("matrix", "96x64", "4g32, 4 sweeps") in steps and ("quantize_group", "128x64", "4 bits") in steps
    assert all(row["us"] > 0 and row["limit_us"] is None and row["share"] is None for row in rows)
    assert all(row["error"] == 0 for row in rows if row["step"].startswith(("search", "quantize")))


def test_json_and_a_file_of_rows(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    arguments = ["--backend", "numpy", "--shapes", "64x32", "--layouts", "2g64", "--json", "--out", str(path)]
    assert main(["bench", "quantize", *arguments]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["rows"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows and "share" in captured.err


def test_limits_and_shares():
    table = QuantizeTable(on_host(), RATES, io.StringIO(), None)
    table.row("factors", (96,), "", 100.0, 0.0, moved_bytes=5e6, fp64=1e9)
    (row,) = table.rows
    assert row["limit_us"] == pytest.approx(40) and row["share"] == pytest.approx(0.4) and row["device"] == "Fake GPU"
    assert "40.0%" in table.out.getvalue() and "WRONG" not in table.out.getvalue()
    table.row("factors", (96,), "", 100.0, math.nan)
    assert not table.is_right and table.rows[1]["error"] is None and "WRONG" in table.out.getvalue()


def test_a_layer_is_the_sum_of_its_steps():
    table = QuantizeTable(
        Options.parse("tiny", layouts="2g32,4g32", tokens=3 * 2048, backend="numpy"), RATES, io.StringIO(), None
    )
    for k in (64, 96):
        for step, us in (("Hessian", 1), ("Hessian and cross", 10)):
            table.row(step, (k,), "2048 tokens", us * k, 0.0)
        table.row("factors", (k,), "", 1000.0, 0.0)
    sizes = {(64, 64): 2, (64, 32): 2, (64, 96): 2, (96, 64): 1}  # how many of a layer's matrices have them
    for k, n in sizes:
        for name, us in (("2g32", 1), ("4g32", 3), ("4g32, 4 sweeps", 7)):
            table.row("matrix", (k, n), name, 1e4 * us * n, 0.0)
        table.row("correction", (k, n), "", 5.0, 0.0)
    table.measure_layer("tiny")
    measuring, quantizing = table.rows[-2:]
    inputs, widths = 3 * 64 + 96, sum(count * n for (_, n), count in sizes.items())
    assert measuring["us"] == pytest.approx(3 * inputs + 4000 + len(MENU) * 2e4 * widths)
    assert quantizing["us"] == pytest.approx(3 * 10 * inputs + 4000 + (2 + 7 - 3) * 1e4 * widths + 7 * 5)
    assert (measuring["step"], quantizing["step"]) == ("layer, measuring", "layer, quantizing")


# --- wrong results show -----------------------------------------------------------------------------------------------


def wrong_steps(monkeypatch, name, change):
    right = getattr(quantize, name)
    monkeypatch.setattr(quantize, name, lambda *args, **options: change(right(*args, **options)))
    out = io.StringIO()
    rows, is_right = quantize.run(on_host(), out)
    wrong = [line.split("  ")[0] for line in out.getvalue().splitlines() if line.endswith("WRONG")]
    assert is_right == (not wrong)
    return set(wrong)


def test_one_wrong_code_shows(monkeypatch):
    def change(found):
        found[0][-1] ^= 1
        return found

    assert wrong_steps(monkeypatch, "search_scales", change) == {"search_scales"}


def test_one_wrong_loss_shows(monkeypatch):
    def change(found):
        found[2][3] = np.nextafter(found[2][3], np.float32(np.inf))
        return found

    assert wrong_steps(monkeypatch, "quantize_group", change) == {"quantize_group"}


def test_a_matrix_that_claims_less_than_its_error_shows(monkeypatch):
    def change(result):
        result.values[5] *= np.float32(0.9)
        return result

    assert wrong_steps(monkeypatch, "quantize_linear", change) == {"matrix"}


@pytest.mark.parametrize(("part", "step"), [("sum", "Hessian"), ("cross", "Hessian and cross")])
def test_a_hessian_without_some_tokens_shows(monkeypatch, part, step):
    class Forgetful(quantize.Hessian):
        def add(self, x, original=None, **options):
            super().add(x, original, **options)
            if getattr(self, part) is not None and (part == "cross") == (original is not None):
                setattr(self, part, getattr(self, part) * 0.99)

    monkeypatch.setattr(quantize, "Hessian", Forgetful)
    out = io.StringIO()
    assert not quantize.run(on_host(), out)[1]
    assert {line.split("  ")[0] for line in out.getvalue().splitlines() if line.endswith("WRONG")} == {step}


def test_factors_that_are_not_of_the_matrix_show():
    table = QuantizeTable(on_host(), None, io.StringIO(), None)
    prepared = table.measure_hessian(96)
    assert table.is_right and table._factor_error(prepared) < 1e-6
    prepared.factor[3, 50] += np.float32(0.05)
    assert table._factor_error(prepared) > quantize._MOST_ERROR


def test_one_step_that_fails_leaves_the_others(monkeypatch, capsys):
    def failing(weight, prepared, layout, **options):
        if weight.shape == (96, 32):
            raise RuntimeError("launch failed\nand more")
        return quantize_linear(weight, prepared, layout, **options)

    monkeypatch.setattr(quantize, "quantize_linear", failing)
    rows, is_right = quantize.run(on_host(shapes="96x32,96x64"), io.StringIO())
    assert not is_right and capsys.readouterr().err == "measure_matrix 96 32: RuntimeError: launch failed\n"
    assert [row["matrix"] for row in rows if row["step"] == "matrix"] == ["96x64", "96x64"]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_step_on_a_gpu(cupy, monkeypatch, capsys):
    monkeypatch.setattr(quantize, "measure_rates", lambda: RATES)
    rows, is_right = quantize.run(Options.parse(shapes="256x96,96x256", layouts="2g32,4g64", backend="cupy"), io.StringIO())
    assert capsys.readouterr().err == "" and is_right
    assert (
        all(row["us"] > 0 and row["share"] > 0 for row in rows if row["step"] != "layer")
        and len(rows) == 2 * 2 * 7 + 2 * 3 + 2 * 4
    )


@pytest.mark.gpu
def test_the_rates_of_a_gpu(cupy):
    assert 0.1 < quantize.product_teraflops(np.float64, 2048) < 1000
    assert 1 < quantize.product_teraflops(np.float32, 2048) < 1000
