"""`cupyq quantize` with wrong input: one line that names it and says the mend, and nothing left on the disk."""

import errno
import json
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_quantize_job import digest, write_source

from cupyq.cli import main
from cupyq.formats.safetensors import Checkpoint
from cupyq.quantize import writer
from cupyq.quantize.layouts import MENU
from cupyq.quantize.walk import LayerWalk

EXL2, GPTQ = (ROOT / f"examples/models/shakespeare-{name}" for name in ("exl2-4.0", "gptq-g32"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("command") / "in", num_hidden_layers=1)


@pytest.fixture
def source(model, tmp_path):
    """A model folder that a test may damage, with a text beside it."""
    shutil.copy(model.parent / "text.txt", tmp_path)
    return shutil.copytree(model, tmp_path / "in")


def command(source, *more, out="out", bits="4", calibration="text.txt"):
    """The arguments; options that are given again replace those of before."""
    folder = source.parent
    given = ["quantize", source, folder / out, "--bits", bits, "--calibration", folder / calibration, "--rows", 6]
    return [str(each) for each in [*given, "--length", 32, "--backend", "numpy", "--windows", 0, *more]]


@pytest.fixture
def refused(capsys):
    """Run a command that must fail -> its one line. All files are as they were."""

    def run(source, *more, **changes):
        before = sorted(source.parent.rglob("*"))
        assert main(command(source, *more, **changes)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("cupyq: error: ")
        assert sorted(source.parent.rglob("*")) == before
        return lines[0].removeprefix("cupyq: error: ")

    return run


def rewrite(source, change):
    """Change the tensors of the model, {name: array}."""
    with Checkpoint(source) as checkpoint:
        (file,) = (file for file in checkpoint.files if file.path.name == "model.safetensors")
        tensors = {name: file.array(name).copy() for name in file.names}
    change(tensors)
    writer.save_tensors(source / "model.safetensors", tensors)


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_bits_out_of_reach(source, refused):
    """The message tells the range, and its ends are the smallest and the largest layouts of the menu."""
    with LayerWalk(source, "numpy") as walk:
        shapes = [shape for name, shape in walk.shapes().items() if name != "lm_head"]
    weights = sum(k * n for k, n in shapes)
    sizes = [[layout.storage_bits(k, n) for layout in MENU] for k, n in shapes]
    low, high = (sum(map(end, sizes)) / weights for end in (min, max))
    for bits in ("1.5", "20"):
        message = refused(source, bits=bits)
        assert message.startswith("bits must be from ") and message.endswith(f"got {bits}")
        found = [float(word) for word in message.split() if word.count(".") == 1 and word[0].isdigit()][:2]
        assert found[0] == pytest.approx(low, abs=1e-3) and found[1] == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "0"), "bits must be a number above 0, got 0"),
        (("--bits", "nan"), "bits must be a number above 0, got nan"),
        (("--bits", "four"), "argument --bits: invalid float value: 'four' (see cupyq quantize --help)"),
        (("--bits", "3.5", "--format", "gptq"), "bits must be 2, 3, 4 or 8 for GPTQ, got 3.5"),
        (("--format", "gptq", "--group-size", "48"), "group_size must be a multiple of 32, or -1 for one group, got 48"),
        (("--format", "awq"), "argument --format: invalid choice: 'awq'"),
        (("--head-bits", "7"), "argument --head-bits: invalid choice: 7 (choose from 2, 3, 4, 5, 6, 8)"),
        (("--rows", "0"), "argument --rows: expected 1 or more, got 0"),
        (("--measured-layouts", "1"), "argument --measured-layouts: expected 2 or more, got 1"),
        (("--length", "100"), "length must be at most 64, the model's context, got 100"),
    ],
)
def test_numbers_that_will_not_do(source, refused, options, message):
    assert refused(source, *options).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--asym",), "--asym has no meaning for --format exl2: leave it out, or take --format gptq"),
        (("--group-size", "128"), "--group-size has no meaning for --format exl2"),
        (("--format", "gptq", "--head-bits", "6"), "--head-bits has no meaning for --format gptq: leave it out, or take"),
        (("--format", "gptq", "--sensitivity-tokens", "0"), "--sensitivity-tokens has no meaning for --format gptq"),
    ],
)
def test_options_of_the_other_format(source, refused, options, message):
    assert refused(source, *options).startswith(message)


def test_what_is_not_given_is_the_default(source, monkeypatch):
    """And what is given arrives, all of it."""
    asked = []

    def quantize_model(*folders, **options):
        asked.append(options)
        raise ValueError

    monkeypatch.setattr("cupyq.quantize.command.quantize_model", quantize_model)
    start = ["quantize", str(source), "out", "--bits", "4", "--calibration", "t.txt"]
    main(start)
    given = {"bits": 4.0, "calibration": "t.txt", "format": "exl2", "backend": "auto", "is_symmetric": True}
    assert {name: value for name, value in asked[0].items() if name != "say"} == given
    numbers = {"rows": 7, "length": 8, "seed": 0, "head_bits": 8, "measured_layouts": 3, "sensitivity_tokens": 0, "windows": 0}
    texts = {"measurement": "m.json", "evaluate": "e.txt", "backend": "numpy", "dtype": "float16"}
    options = [str(x) for name, value in (numbers | texts).items() for x in (f"--{name.replace('_', '-')}", value)]
    main([*start, *options, "--resume"])
    assert given | numbers | texts | {"resume": True} == {name: value for name, value in asked[1].items() if name != "say"}
    main([*start, "--format", "gptq", "--group-size", "-1", "--asym", "--act-order"])
    found = {name: asked[2][name] for name in ("format", "group_size", "is_symmetric", "act_order")}
    assert found == {"format": "gptq", "group_size": -1, "is_symmetric": False, "act_order": True}


def test_what_must_be_given(capsys):
    assert main(["quantize"]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("IN", "OUT", "--bits", "--calibration"))


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_that_is_too_short(source, refused):
    expected = "text.txt: 1500 tokens, but 60 rows of 64 need 3840: take a longer text, fewer rows or shorter ones"
    assert refused(source, "--rows", "60", "--length", "64").endswith(expected)
    (source.parent / "empty.txt").write_text("")
    assert "empty.txt: 0 tokens, but 6 rows of 32 need 192" in refused(source, calibration="empty.txt")
    short = refused(source, "--evaluate", source.parent / "empty.txt", "--windows", "2")
    assert "empty.txt: 0 tokens, but 2 rows of 32 need 64" in short


def test_texts_that_are_none(source, refused):
    assert "none.txt: cannot be opened (No such file or directory)" in refused(source, calibration="none.txt")
    assert "rows.parquet: a text must be a .txt or a .jsonl file, not .parquet" in refused(source, calibration="rows.parquet")
    (source.parent / "rows.jsonl").write_text('{"content": "w1"}\n')
    assert "rows.jsonl: line 1 is an object with the keys 'content'" in refused(source, calibration="rows.jsonl")
    (source / "tokenizer.json").unlink()
    assert "tokenizer.json: missing; copy it from the original model" in refused(source)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "NaN"), (-np.inf, "infinity")])
def test_weights_that_are_not_finite(source, capsys, value, shown):
    rewrite(source, lambda tensors: tensors["model.layers.0.self_attn.v_proj.weight"].__setitem__((3, 2), value))
    assert main(command(source)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"model.safetensors: tensor 'model.layers.0.self_attn.v_proj.weight': {shown} at [3, 2]" in line
    assert "download the model again" in line
    assert {path.name for path in source.parent.iterdir()} == {"in", "text.txt"}


@pytest.mark.parametrize("kept", [0.0, 0.0005, 0.3, 0.999])
def test_downloads_that_were_cut_short(source, refused, kept):
    """To nothing, in the header, among the tensors, before the last bytes."""
    path = source / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    message = refused(source)
    assert message.startswith(f"{path}: ") and message.endswith("damaged or cut short; download or convert it again")


def test_a_shard_that_was_not_downloaded(source, refused):
    rewrite(source, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    assert "tensor 'model.layers.0.mlp.up_proj.weight' is missing" in refused(source)
    (source / "model.safetensors").unlink()
    assert "is missing, expected shape" in refused(source)


def test_a_shard_that_its_index_names(source, refused):
    """Only where its tensors are nowhere else: indexes are left behind by conversions."""
    with Checkpoint(source) as checkpoint:
        names = [name for name in checkpoint.names if name != "logits"]
        tensors = {name: checkpoint.array(name).copy() for name in names}
    (source / "model.safetensors").unlink()
    shards = {"model-00001-of-00003.safetensors": names[:4], "model-00002-of-00003.safetensors": names[4:6]}
    shards["model-00003-of-00003.safetensors"] = names[6:]
    for file, held in shards.items():
        writer.save_tensors(source / file, {name: tensors[name] for name in held})
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in shards.items() for name in held}}))
    (source / "model-00002-of-00003.safetensors").unlink()
    missing = f"{source}/model-00002-of-00003.safetensors: missing though {index.name} names it; download the model again"
    assert refused(source) == missing
    (source / "model-00003-of-00003.safetensors").unlink()
    assert "00002-of-00003.safetensors: missing, like 1 more, though" in refused(source)
    writer.save_tensors(source / "model.safetensors", {name: tensors[name] for name in names[4:]})
    assert "bits must be from" in refused(source, bits="1.5")  # the index is of no interest
    index.write_text("{")
    assert "bits must be from" in refused(source, bits="1.5")


def test_a_measurement_that_is_none(source, refused):
    path = source.parent / "measurement.json"
    assert "measurement.json: cannot be opened (No such file or directory)" in refused(source, "--measurement", path)
    path.write_text("nothing")
    assert "measurement.json: not JSON (" in refused(source, "--measurement", path)
    path.write_text("{}")
    assert "measurement.json: not a measurement of this version of cupyq" in refused(source, "--measurement", path)


def test_without_tokenizers(source, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert refused(source).endswith("pip install tokenizers")


def test_folders_that_are_no_models(source, refused):
    assert refused(source.parent / "none").endswith(
        "no such folder, expected a model folder with config.json and *.safetensors"
    )
    (source / "config.json").unlink()
    assert "config.json: cannot be opened (No such file or directory)" in refused(source)


@pytest.mark.parametrize("folder", [EXL2, GPTQ])
def test_models_that_are_quantized_already(tmp_path, capsys, folder):
    arguments = ["quantize", folder, tmp_path / "out", "--bits", "3", "--calibration", tmp_path / "text.txt"]
    assert main(list(map(str, arguments))) == 2
    assert "quantize the original, unquantized model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- folders ----------------------------------------------------------------------------------------------------------


def test_where_out_may_not_be(source, refused):
    assert f"lies inside IN {source}" in refused(source, out="in/out")
    assert "is the folder of the model to be quantized: choose another" in refused(source, out="in")
    assert f"holds IN {source}: choose another folder" in refused(source, out=".")
    (source.parent / "link").symlink_to(source)
    assert f"lies inside IN {source}" in refused(source, out="link/out")
    assert "text.txt is not a folder that may be written to" in refused(source, out="text.txt/out")


@pytest.mark.parametrize("option", [(), ("--resume",)])
def test_out_exists(source, refused, option):
    (source.parent / "out").mkdir()
    (source.parent / "out/diary.txt").write_text("mine")
    assert refused(source, *option).endswith("exists: choose another folder, or delete it")
    assert refused(source, *option, out="text.txt").endswith("exists: choose another folder, or delete it")


def test_folders_of_others_are_not_worked_in(source, capsys):
    """They would be deleted when all is done: one that is called like the working folder, and the model itself."""
    theirs = source.parent / "out.partial"
    theirs.mkdir()
    (theirs / "diary.txt").write_text("mine")
    assert main(command(source)) == 2
    assert "out.partial is there" in capsys.readouterr().err
    assert main(command(source, "--resume")) == 2
    assert f"{theirs} holds no work of a quantization (no job.json): move it away" in capsys.readouterr().err
    assert [path.name for path in theirs.iterdir()] == ["diary.txt"]
    shutil.rmtree(theirs)
    theirs.write_text("a file")
    assert main(command(source, "--resume")) == 2
    assert "holds no work of a quantization" in capsys.readouterr().err and theirs.read_text() == "a file"
    theirs.unlink()
    source.rename(theirs)
    assert main(command(theirs, "--resume")) == 2
    assert f"IN {theirs} lies in {theirs}, the working folder for this OUT" in capsys.readouterr().err
    assert {path.name for path in theirs.iterdir()} >= {"config.json", "model.safetensors"}


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_no_room_is_known_before_the_work(source, refused, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    message = refused(source)
    assert "0.00 GB free on its disk, expected 0.07 GB" in message and "make room or choose another disk" in message


def test_a_disk_that_fills_up_in_mid_work(source, capsys, monkeypatch):
    """One line says what to do, what was done is kept, and going on gives the bytes of an undisturbed run."""
    options = ("--format", "gptq", "--group-size", "32")
    assert main(command(source, *options, out="calm")) == 0
    real, synced = os.fsync, []

    def fsync(descriptor):
        synced.append(descriptor)
        if len(synced) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        capsys.readouterr()
        assert main(command(source, *options)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"cupyq: error: {source.parent}/out.partial/")
    assert "No space left on device; what was done before is kept: mend this, then go on with --resume" in error
    assert not [path for path in (source.parent / "out.partial").rglob("*") if path.name.startswith(writer.TEMPORARY)]
    assert (source.parent / "out.partial/job.json").exists() and not (source.parent / "out").exists()
    assert main(command(source, *options, "--resume")) == 0
    assert digest(source.parent / "out") == digest(source.parent / "calm")


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_the_object_for_scripts(source, capsys):
    given = ("--format", "gptq", "--group-size", "32", "--json")
    assert main(command(source, *given)) == 0
    assert json.loads(capsys.readouterr().out)["comparison"] is None
    assert main(command(source, *given, "--windows", "1", out="compared")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["comparison"].keys() == {"text", "perplexity", "source_perplexity", "kl", "top1", "tokens"}
    assert result["comparison"]["tokens"] == 31 and 0 < result["comparison"]["kl"] < 1
    layers = {layer["name"]: layer for layer in result["layers"]}
    assert len(layers) == 7 and layers["model.layers.0.mlp.down_proj"]["shape"] == [96, 64]
    # Codes, a scale and a zero in each group of 32 rows, and g_idx.
    bits = {name: 4 + 20 / 32 + 32 / layer["shape"][1] for name, layer in layers.items()}
    assert {name: layer["bits"] for name, layer in layers.items()} == bits
