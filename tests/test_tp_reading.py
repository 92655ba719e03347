"""Parts of layers from a checkpoint: as those split in memory, and only their bytes are read."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from kernel_checks import same_bits
from random_layers import random_exl2, random_gptq
from safetensors.numpy import save_file

from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint
from cupyq.tp.reading import StoredTensor, linear_tensors, read_columns, read_rows
from cupyq.tp.split import stored_features, take_columns, take_rows

EXL2, GPTQ, PLAIN = (
    ROOT / "examples/models" / name for name in ("shakespeare-exl2-4.0", "shakespeare-gptq-g32", "shakespeare")
)
TABLES = ("q_groups", "q_scale_max", "q_invperm", "g_idx")


class CountedCheckpoint(Checkpoint):
    """Counts the bytes that are read, each once, and hands out no memory map."""

    def __init__(self, folder):
        super().__init__(folder)
        self.spans = {}

    def read_piece(self, name, begin, buffer):
        self.spans.setdefault(name, []).append((begin, begin + buffer.nbytes))
        super().read_piece(name, begin, buffer)

    def array(self, name):
        raise AssertionError(f"{name} was mapped whole")

    def count(self, name):
        """Bytes read of a tensor; none is read twice."""
        spans = sorted(self.spans.get(name, []))
        assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))
        return sum(end - begin for begin, end in spans)


def whole(folder, key):
    """Tensors of a layer in memory, by short name."""
    with Checkpoint(folder) as checkpoint:
        return {name[len(key) + 1 :]: checkpoint.array(name) for name in checkpoint.names if name.rpartition(".")[0] == key}


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for short, value in expected.items():
        assert isinstance(found[short], np.ndarray) and found[short].flags.c_contiguous
        assert same_bits(found[short], np.ascontiguousarray(value)), short


def total(tensors, shorts):
    return sum(tensors[short].nbytes for short in shorts if short in tensors)


@pytest.mark.parametrize("folder, unit", [(EXL2, 32), (GPTQ, 32), (PLAIN, 1)])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_read_their_columns_and_together_each_byte_once(folder, unit, ranks):
    key = "model.layers.1.mlp.up_proj"
    tensors = whole(folder, key)
    large = [short for short in tensors if short not in TABLES]
    borders = [768 // unit * rank // ranks * unit for rank in range(ranks + 1)]
    read = 0
    for begin, end in zip(borders, borders[1:], strict=False):
        with CountedCheckpoint(folder) as checkpoint:
            check_same(read_columns(checkpoint, key, range(begin, end)), take_columns(tensors, range(begin, end)))
            for short in large:
                found = checkpoint.count(f"{key}.{short}")
                assert found == tensors[short].nbytes * (end - begin) // 768
                read += found
            for short in tensors.keys() - large:
                assert checkpoint.count(f"{key}.{short}") == tensors[short].nbytes
    assert read == total(tensors, large)


@pytest.mark.parametrize("folder", [EXL2, GPTQ, PLAIN])
def test_rows_read_are_as_split_in_memory(folder):
    key = "model.layers.0.mlp.down_proj"
    tensors = whole(folder, key)
    for begin, end in ((0, 256), (256, 520), (520, 768)):
        with CountedCheckpoint(folder) as checkpoint:
            check_same(read_rows(checkpoint, key, range(begin, end)), take_rows(tensors, range(begin, end)))
        with CountedCheckpoint(folder) as checkpoint:
            chosen = stored_features(linear_tensors(checkpoint, key), range(begin, end))
            check_same(read_rows(checkpoint, key, chosen), take_rows(tensors, chosen))
            gate = key.replace("down", "gate")
            check_same(read_columns(checkpoint, gate, chosen), take_columns(whole(folder, gate), chosen))


def test_rows_in_stored_order_and_blocks_without_rows_cost_only_their_bytes():
    key = "model.layers.0.mlp.down_proj"
    tensors = whole(EXL2, key)
    with CountedCheckpoint(EXL2) as checkpoint:
        chosen = stored_features(linear_tensors(checkpoint, key), range(256, 512))
        part = read_rows(checkpoint, key, chosen)
        assert checkpoint.count(f"{key}.q_weight") == part["q_weight"].nbytes < tensors["q_weight"].nbytes / 2
        assert checkpoint.count(f"{key}.q_scale") == part["q_scale"].nbytes < tensors["q_scale"].nbytes
    with CountedCheckpoint(GPTQ) as checkpoint:
        part = read_rows(checkpoint, key, range(40, 56))  # of one block of 32
        assert checkpoint.count(f"{key}.qweight") == 256 * 32 * 4 // 8
        assert checkpoint.count(f"{key}.qzeros") == part["qzeros"].nbytes
    with CountedCheckpoint(PLAIN) as checkpoint:
        read_rows(checkpoint, key, range(40, 56))
        assert checkpoint.count(f"{key}.weight") == 16 * 256 * checkpoint.info(f"{key}.weight").dtype.itemsize


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of layers that are read in pieces and by threads; with biases, of all kinds."""
    rng = np.random.default_rng(1)
    layers = {
        "model.exl2": random_exl2(rng, (6, 4), n=8192, group_blocks=8, last_blocks=8, has_bias=True),
        "model.gptq": random_gptq(rng, 4, k=1024, n=4096, groups=8, act_order=True, has_bias=True),
        "model.plain": {
            "weight": rng.integers(0, 1 << 15, (2048, 5120)).astype(np.uint16).view(ml_dtypes.bfloat16),
            "bias": rng.standard_normal(2048).astype(np.float16),
        },
    }
    folder = tmp_path_factory.mktemp("large")
    save_file(
        {f"{key}.{short}": np.array(value) for key, tensors in layers.items() for short, value in tensors.items()},
        folder / "a.safetensors",
    )
    return folder, layers


@pytest.mark.parametrize("key, half", [("model.exl2", 4096), ("model.gptq", 2048), ("model.plain", 1024)])
def test_a_tensor_is_never_whole_in_memory(large, key, half):
    folder, layers = large
    tensors = layers[key]
    for columns in (range(half), range(half, 2 * half)):
        expected = take_columns(tensors, columns)
        with CountedCheckpoint(folder) as checkpoint:
            tracemalloc.start()
            part = read_columns(checkpoint, key, columns)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            check_same(part, expected)
            assert peak < 1.1 * sum(value.nbytes for value in expected.values()) + (1 << 18)
            assert sum(map(checkpoint.count, checkpoint.names)) == sum(value.nbytes for value in expected.values())


def test_large_rows_are_read_by_threads(large):
    folder, layers = large
    k = 5120
    with CountedCheckpoint(folder) as checkpoint:
        for rows in (range(k // 2), range(k // 2, k)):
            check_same(read_rows(checkpoint, "model.plain", rows), take_rows(layers["model.plain"], rows))
        assert checkpoint.count("model.plain.weight") == layers["model.plain"]["weight"].nbytes
        for key in ("model.exl2", "model.gptq"):
            check_same(read_rows(checkpoint, key, range(104, 304)), take_rows(layers[key], range(104, 304)))


def test_slices_of_a_stored_tensor(large):
    folder, layers = large
    weight = layers["model.plain"]["weight"]
    with Checkpoint(folder) as checkpoint:
        stored = StoredTensor(checkpoint, "model.plain.weight")
        assert (stored.shape, stored.dtype) == (weight.shape, weight.dtype)
        for key in (
            (slice(3, 5),),
            (slice(2040, 9999), slice(-7, None)),
            (slice(4, 4),),
            (slice(0, 9), slice(5, 5)),
            (slice(None),),
        ):
            assert same_bits(stored[key], np.ascontiguousarray(weight[key]))
        with CountedCheckpoint(folder) as counted:
            StoredTensor(counted, stored.name)[7:40, :]
            assert len(counted.spans[stored.name]) == 1  # whole rows: one run
        assert same_bits(StoredTensor(checkpoint, "model.plain.bias")[5:9], layers["model.plain"]["bias"][5:9])
        with pytest.raises(ValueError, match="slices of step 1"):
            stored[::2]
        with pytest.raises(TypeError, match="takes up to 2 slices"):
            stored[3]
        with pytest.raises(TypeError, match="takes up to 2 slices"):
            StoredTensor(checkpoint, "model.plain.bias")[1:2, 3:4]


def test_errors_name_the_folder_and_the_tensor(tmp_path, large):
    layers = large[1]
    broken = {f"a.{short}": value for short, value in layers["model.gptq"].items() if short != "scales"}
    save_file({key: np.array(value) for key, value in broken.items()}, tmp_path / "a.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(FormatError, match=f"{tmp_path}: a.scales: missing"):
            read_columns(checkpoint, "a", range(0, 64))
        with pytest.raises(FormatError, match=f"{tmp_path}: no tensor 'b.weight'"):
            read_rows(checkpoint, "b", range(0, 64))
    with Checkpoint(large[0]) as checkpoint, pytest.raises(ValueError, match="0 to 4999, expected numbers from 0 to 1023"):
        read_rows(checkpoint, "model.gptq", range(0, 5000))
