"""What the quantizer writes: files that appear whole, read by another library; and what it refuses before any work."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint, SafetensorsFile
from cupyq.models.config import ModelConfig
from cupyq.quantize import writer
from cupyq.quantize.writer import OutputTensor

RANDOM = np.random.default_rng(5)


def arrays():
    return {
        "model.layers.10.up_proj.q_weight": RANDOM.integers(-(2**31), 2**31, (3, 8), dtype=np.int32),
        "model.layers.9.norm.weight": RANDOM.standard_normal(7).astype(np.float16),
        "model.layers.9.up_proj.q_groups": np.array([4, 0, 3], np.int16),
        "model.embed_tokens.weight": RANDOM.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
        "model.norm.weight": RANDOM.standard_normal(2).astype(np.float32),
        "empty": np.empty((0, 4), np.int32),
    }


def given(tensors):
    return [OutputTensor(name, array.dtype, array.shape, lambda array=array: array) for name, array in tensors.items()]


# --- files ------------------------------------------------------------------------------------------------------------


def test_safetensors_are_read_by_their_own_library_and_by_ours(tmp_path):
    path, tensors = tmp_path / "a.safetensors", arrays()
    writer.write_safetensors(path, given(tensors), {"format": "pt"})
    theirs = safetensors.numpy.load_file(path)
    assert theirs.keys() == tensors.keys()
    with SafetensorsFile(path) as ours:
        assert ours.metadata == {"format": "pt"}
        for name, array in tensors.items():
            for found in (theirs[name], ours.array(name)):
                assert found.dtype == array.dtype and found.shape == array.shape
                assert found.tobytes() == array.tobytes()
            assert ours.info(name).start % array.dtype.itemsize == 0  # so that a memory map can be used as it is
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_order_of_the_tensors_does_not_matter(tmp_path):
    tensors = arrays()
    writer.save_tensors(tmp_path / "a", tensors)
    writer.save_tensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float64])
def test_dtypes_that_readers_of_exl2_refuse_are_not_written(tmp_path, dtype):
    with pytest.raises(FormatError, match=f"'odd': dtype {np.dtype(dtype)}, expected one of int16"):
        writer.save_tensors(tmp_path / "a", {"odd": np.zeros(3, dtype)})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_as_announced_stops_the_file(tmp_path):
    wrong = OutputTensor("w", np.dtype(np.float16), (4,), lambda: np.zeros(5, np.float16))
    with pytest.raises(FormatError, match=r"'w'.*\[5\], expected float16 \[4\]"):
        writer.write_safetensors(tmp_path / "a", [wrong])
    assert not (tmp_path / "a").exists()


def test_a_file_that_is_interrupted_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def parts():
        yield b"aft"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_atomically(path, parts())
    assert path.read_text() == "before"
    writer.write_atomically(path, [b"af", np.frombuffer(b"ter", np.uint8)])
    assert path.read_text() == "after"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append("sync"))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append("rename") or real(a, b))
    writer.write_json(tmp_path / "new" / "a.json", {"x": 0.1})
    assert seen[:2] == ["sync", "rename"]
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 0.1}


def test_names_are_sorted_by_their_numbers():
    names = ["layers.10.a", "layers.9.b", "layers.9.a", "head", "layers.2"]
    assert sorted(names, key=writer.natural_key) == ["head", "layers.2", "layers.9.a", "layers.9.b", "layers.10.a"]


def test_shards():
    tensors = given({f"t{i}": np.zeros(size, np.int16) for i, size in enumerate((10, 20, 30, 200, 5))})
    shards = writer.shards_of(tensors, limit=100)
    assert [[t.name for t in shard] for shard in shards] == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]
    assert sum(len(shard) for shard in writer.shards_of(tensors, limit=10**9)) == 5 and len(writer.shards_of(tensors)) == 1


# --- a model's folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    writer.save_tensors(folder / "model.safetensors", {"model.norm.weight": np.ones(4, np.float16)})
    writer.save_tensors(folder / "golden.safetensors", {"logits": np.ones(4, np.float32)})
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}')
    for name in ("tokenizer.json", "LICENSE", "generation_config.json"):
        (folder / name).write_text(name)
    for name in ("model.safetensors.index.json", "pytorch_model.bin", ".cache", "old.gguf", "quantize_config.json"):
        (folder / name).write_text("must not be copied")
    (folder / "sub").mkdir()
    return folder


def test_an_exl2_folder(source, tmp_path):
    config = writer.exl2_config("1.2", 3.5, 6, {"rows": 4, "length": 8, "dataset": "text"})
    tensors = arrays()
    counts = []
    writer.write_model(tmp_path / "out", source, given(tensors), config, on_bytes=counts.append)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"output.safetensors", "config.json", "tokenizer.json", "LICENSE", "generation_config.json"}
    written = json.loads((tmp_path / "out/config.json").read_text())
    quantization = written["quantization_config"]
    assert written["hidden_size"] == 64 and quantization["quant_method"] == "exl2"
    assert (quantization["bits"], quantization["head_bits"], quantization["calibration"]["rows"]) == (3.5, 6, 4)
    assert counts == [sum(array.nbytes for array in tensors.values())]
    assert (tmp_path / "out/LICENSE").read_text() == "LICENSE"


def test_a_gptq_folder_in_shards(source, tmp_path):
    tensors = {f"model.layers.{i}.w.qweight": np.full((4, 8), i, np.int32) for i in range(12)}
    config = writer.gptq_config("1.2", 4, 128, True, False)
    writer.write_model(tmp_path / "out", source, given(tensors), config, shard_bytes=5 * 128)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 12 * 128
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert set(checkpoint.names) == set(tensors)
        for name, array in tensors.items():
            assert np.array_equal(checkpoint.array(name), array)
            assert index["weight_map"][name] == checkpoint.file(name).path.name
    beside = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert beside == json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (beside["bits"], beside["group_size"], beside["sym"], beside["desc_act"]) == (4, 128, True, False)
    assert beside["checkpoint_format"] == "gptq" and beside["lm_head"] is False


def test_test_data_in_the_folder_is_no_weight(source):
    with Checkpoint(source) as checkpoint:
        assert writer.model_files(checkpoint, ["model.norm.weight"]) == ["model.norm.weight"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_paths(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    assert writer.check_paths(source, tmp_path / "a/b/out") == (source, tmp_path / "a/b/out")
    (tmp_path / "link").symlink_to(source)
    for out, what in (
        (source, "is the folder of the model"),
        (source / "out", "lies inside IN"),
        (tmp_path / "link/sub/out", "lies inside IN"),
        (tmp_path, "holds IN"),
    ):
        with pytest.raises(ValueError, match=what):
            writer.check_paths(source, out)
    with pytest.raises(FormatError, match="no such folder"):
        writer.check_paths(tmp_path / "none", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="a file, expected a model folder"):
        writer.check_paths(tmp_path / "file", tmp_path / "out")
    with pytest.raises(ValueError, match="cannot be made"):
        writer.check_paths(source, tmp_path / "file/out")


def test_room_on_the_disk(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return type("Usage", (), {"free": 10**9})

    monkeypatch.setattr(writer.shutil, "disk_usage", usage)
    writer.check_room(tmp_path / "not/yet", 9 * 10**8)
    assert asked == [tmp_path]
    with pytest.raises(ValueError, match=r"1\.00 GB free on its disk, expected 2\.07 GB"):
        writer.check_room(tmp_path, 2 * 10**9)
    writer.check_room(tmp_path, 2 * 10**9, present=15 * 10**8)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(("value", "shown"), [(np.nan, "NaN"), (-np.inf, "infinity")])
def test_weights_that_are_not_finite_are_named(tmp_path, dtype, value, shown):
    good, bad = np.full((6, 5), 60000, dtype), np.zeros((4, 3, 2), dtype)
    bad[2, 1, 1] = value
    writer.save_tensors(tmp_path / "a.safetensors", {"good": good, "bad": bad})
    with Checkpoint(tmp_path) as checkpoint:
        writer.scan_weights(checkpoint, ["good"])
        with pytest.raises(FormatError, match=re.escape(f"'bad': {shown} at [2, 1, 1]")):
            writer.scan_weights(checkpoint, ["good", "bad"])


def test_the_digest_is_of_names_dtypes_shapes_and_bytes(tmp_path):
    def digest(tensors):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        writer.save_tensors(folder / "a.safetensors", tensors)
        with Checkpoint(folder) as checkpoint:
            counts = []
            found = writer.scan_weights(checkpoint, sorted(tensors), counts.append)
            assert sum(counts) == sum(array.nbytes for array in tensors.values())
            return found

    base = {"a": np.arange(6, dtype=np.int16), "b": np.zeros((2, 2), np.float32)}
    assert digest(base) == digest(dict(reversed(base.items())))
    others = [
        base | {"a": np.array([0, 1, 2, 3, 5, 4], np.int16)},
        base | {"a": base["a"].reshape(2, 3)},
        base | {"b": np.zeros((2, 2), np.int32)},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"]},
    ]
    assert len({digest(base), *map(digest, others)}) == 6


def test_a_quantized_source(tmp_path):
    config = ModelConfig.from_file(os.path.join(os.path.dirname(__file__), "models/qwen2"))
    writer.save_tensors(tmp_path / "a.safetensors", {"model.layers.0.x.q_weight": np.zeros((2, 8), np.int32)})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(FormatError, match="x.q_weight' is quantized already"):
        writer.refuse_quantized(config, checkpoint)
