"""The report of a quantization: its numbers by hand, its picture by an XML parser."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import ROOT

from cupyq import load_model
from cupyq.generate import encode, load_tokenizer, perplexity
from cupyq.quantize import report
from cupyq.quantize.report import Comparison, LinearReport

MODELS = ROOT / "examples/models"
SETTINGS = {"bits": 3.0, "menu": ["2g64", "4g128"], "measurement_sha256": None}


def linear(name, k=64, n=96, bits=3.0, error=0.5, output=50.0, layout="3g128", nats=None):
    return LinearReport(name, k, n, layout, int(bits * k * n), error, output, 1000, nats)


def layers(count=3):
    found = []
    for index in range(count):
        name, nats = f"model.layers.{index}.self_attn.q_proj", 0.002 * index
        found.append(linear(name, bits=2 + index % 6, error=0.01 * 10**index, nats=nats))
        found.append(linear(f"model.layers.{index}.mlp.down_proj", k=96, n=64, bits=4.5, nats=0.0005))
    return [*found, linear("lm_head", n=256, bits=6.5)]


def test_errors_and_bits():
    assert linear("a", error=0.5, output=50.0).relative_error == pytest.approx(0.1)
    assert linear("a", error=0.0, output=0.0).relative_error == 0  # an expert that nothing reached
    assert linear("a", bits=3.25).bits_per_weight == 3.25
    small, large = linear("a", k=32, n=32, bits=2), linear("b", k=32, n=96, bits=6)
    assert report.bits_per_weight([small, large, linear("lm_head", bits=8)]) == pytest.approx((2 + 3 * 6) / 4)


def test_the_table_has_every_layer():
    lines = report.table(layers())
    assert len(lines) == 2 + 7
    row = next(line for line in lines if "layers.1.self_attn.q_proj" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["64 x 96", "3.000", "3g128", "4.472", "0.002000", "1000"]
    head = next(line for line in lines if "lm_head" in line)
    assert [cell.strip() for cell in head.strip("|").split("|")][4:] == ["10.000", "", "1000"]  # nobody knows its worth


def test_measures_and_units_are_named():
    """In the table, the picture, the summary and the text."""
    assert "| bits per weight | layout | relative output error, % | worth, nats per token |" in report.table(layers())[0]
    picture = report.figure(layers(), "t")
    assert "Relative output error, %" in picture and "thousandths of a nat per token" in picture
    lines = report.summary(layers(), None)
    assert "relative output error (root mean square)" in lines[2]
    # 0, 2 and 4 thousandths of q_proj, 0.5 of each down_proj
    assert lines[3].startswith("worth       0.007500   nats of KL per token") and lines[3].endswith("layers.2.self_attn.q_proj")
    assert report.MEANING in report.markdown(layers(), SETTINGS, "t", None)


def test_without_worths_there_is_no_word_of_them():
    plain = [linear("model.layers.0.mlp.up_proj")]
    assert len(report.summary(plain, None)) == 2 and "nat per token" not in report.figure(plain, "t")


def test_the_picture():
    root = ElementTree.fromstring(report.figure(layers(), "a <model> & more"))
    space = "{http://www.w3.org/2000/svg}"
    cells = [rect for rect in root.iter(f"{space}rect") if rect.get("class") == "cell"]
    assert len(cells) == 2 * 7 + 6  # bits and errors; what these are worth, but of the head
    texts = ["".join(text.itertext()) for text in root.iter(f"{space}text")]
    assert {"a <model> & more", "self_attn.q_proj", "mlp.down_proj", "lm_head", "0", "1", "2", "head"} <= set(texts)
    assert {"2.00", "3.00", "4.50", "6.50"} <= set(texts)
    width, height = float(root.get("width")), float(root.get("height"))
    for rect in root.iter(f"{space}rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width")) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height")) <= height
    # Cells of one layer stand above one another, cells of one projection beside one another.
    places = {"".join(cell.itertext()).split(":")[0]: (cell.get("x"), cell.get("y")) for cell in cells[:7]}
    assert places["model.layers.1.self_attn.q_proj"][0] == places["model.layers.1.mlp.down_proj"][0]
    assert places["model.layers.0.mlp.down_proj"][1] == places["model.layers.2.mlp.down_proj"][1]
    assert len({x for x, _ in places.values()}) == 4 and len({y for _, y in places.values()}) == 3


def test_more_bits_are_darker():
    def light(share):
        color = report._color(share)
        return sum(int(color[i : i + 2], 16) for i in (1, 3, 5))

    shades = [light(share) for share in np.linspace(0, 1, 20)]
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == 20
    assert report._color(-3) == report._color(0) and report._color(9) == report._color(1)


@pytest.mark.parametrize("count", [1, 30, 80])
def test_pictures_of_models_of_all_sizes(count):
    ElementTree.fromstring(report.figure(layers(count)[:-1], "t"))


@pytest.mark.parametrize("comparison", [None, Comparison("val.txt", 30.1, 29.1, 0.0222, 0.897, 1000)])
def test_files_of_the_report(tmp_path, comparison):
    report.write_report(tmp_path, layers(), SETTINGS, "model: EXL2", comparison)
    assert {path.name for path in tmp_path.iterdir()} == {report.FIGURE, report.TEXT, report.DATA}
    assert report.read_report(tmp_path) == (SETTINGS, layers(), comparison)
    text = (tmp_path / report.TEXT).read_text()
    assert text.startswith("# model: EXL2\n") and f"]({report.FIGURE})" in text and "2g64, 4g128" in text
    assert "measurement_sha256" not in text  # settings that do not count are left out
    assert ("KL          0.022200" in text) == (comparison is not None)


def test_a_folder_without_a_report(tmp_path):
    assert report.read_report(tmp_path) is None
    (tmp_path / report.DATA).write_text('{"settings": {}}')
    assert report.read_report(tmp_path) is None
    (tmp_path / report.DATA).write_text("{")
    assert report.read_report(tmp_path) is None


def test_the_worst_layer_is_named():
    lines = report.summary(layers(), None)
    # sqrt(1 / 50) of layer 2; the head is not a layer of the decoder
    assert lines[2].startswith("error       14.14 %") and lines[2].endswith("model.layers.2.self_attn.q_proj")
    assert lines[0].split()[1] == f"{(2 + 3 + 4 + 3 * 4.5) / 6:.4f}" and lines[1].split()[1] == "6.5000"


def test_comparison_with_the_source():
    """Against perplexity() of each model, and with the source itself."""
    source, quantized = MODELS / "shakespeare", MODELS / "shakespeare-exl2-4.0"
    ids = encode(load_tokenizer(source), (source / "val.txt").read_text(encoding="utf-8"), special=False)[:192]
    windows = np.array(ids, np.int32).reshape(4, 48)
    seen = []
    found = report.compare(source, quantized, windows, "val.txt", backend="numpy", on_windows=seen.append)
    plain, model = (load_model(path, "numpy") for path in (source, quantized))
    expected = perplexity(model, ids, window=48, reference=plain)
    assert (found.perplexity, found.kl, found.top1) == (expected.perplexity, expected.kl, expected.top1)
    assert found.source_perplexity == perplexity(plain, ids, window=48).perplexity != found.perplexity
    assert found.tokens == 4 * 47 and found.text == "val.txt" and sum(seen) == 4
    same = report.compare(source, source, windows[:1], "val.txt", backend="numpy")
    assert same.kl == 0 and same.top1 == 1 and same.perplexity == same.source_perplexity
