"""Parts of layers: bit for bit the weights of their columns and rows, and parts by rows add up to the whole product."""

import functools
import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from kernel_checks import float16, host, move, on_both, random, same_bits
from product_checks import check_product, compiled_first, pin, product, unrounded_exl2, unrounded_gptq, ways
from random_layers import MIXTURES, random_exl2, random_gptq, to_gpu

from cupyq import QMatrix
from cupyq.errors import FormatError
from cupyq.formats import exl2, gptq, tiles
from cupyq.formats.safetensors import Checkpoint
from cupyq.ops.qmatmul import qmatmul
from cupyq.ops.reconstruct import reconstruct
from cupyq.tp.split import stored_features, take_columns, take_rows

EXL2_PROJECTIONS = [f"model.layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")]


@functools.cache
def layer_of(model, key):
    """Tensors of a layer of an example."""
    shorts = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "qweight", "qzeros", "scales", "g_idx", "weight")
    with Checkpoint(ROOT / "examples/models" / model) as checkpoint:
        return {short: checkpoint.array(f"{key}.{short}") for short in shorts if f"{key}.{short}" in checkpoint}


@functools.cache
def layers():
    """{name: tensors} of both formats and of plain weights: widths, groups and orders of all kinds."""
    rng = np.random.default_rng(1)
    found = {
        "mixture": random_exl2(rng, (8, 6, 5, 4, 3, 2), n=40, has_bias=True),
        "in order": random_exl2(rng, (4, 3), n=32, has_perm=False, group_blocks=4, last_blocks=3),
        "groups of 32": random_exl2(rng, (5, 2), n=24, group_blocks=1, has_bias=True),
        "gptq": random_gptq(rng, 4, k=256, n=32, groups=2, has_bias=True),
        "gptq without g_idx": random_gptq(rng, 4, k=320, n=32, groups=5) | {"g_idx": None},
        "gptq in groups of 32": random_gptq(rng, 8, k=160, n=24, groups=5),
        "gptq act-order": random_gptq(rng, 4, k=192, n=40, groups=6, act_order=True, has_bias=True),
        "gptq of 3 bits": random_gptq(rng, 3, k=96, n=64, groups=3, act_order=True),
        "gptq of 2 bits, v2": random_gptq(rng, 2, k=96, n=32, groups=1, version="v2"),
        "plain": {"weight": random(2, (24, 96), float16), "bias": random(3, 24, float16)},
        "plain bfloat16": {"weight": random(2, (24, 96), np.dtype(ml_dtypes.bfloat16))},
    }
    for key in EXL2_PROJECTIONS:
        found[f"exl2 {key}"] = layer_of("shakespeare-exl2-4.0", key)
    for key in EXL2_PROJECTIONS[1:4:2]:
        found[f"gptq {key}"] = layer_of("shakespeare-gptq-g32", key)
    return found


LAYERS = (
    "mixture",
    "in order",
    "groups of 32",
    "gptq",
    "gptq without g_idx",
    "gptq in groups of 32",
    "gptq act-order",
    "gptq of 3 bits",
    "gptq of 2 bits, v2",
    "plain",
    "plain bfloat16",
    *(f"exl2 {key}" for key in EXL2_PROJECTIONS),
    *(f"gptq {key}" for key in EXL2_PROJECTIONS[1:4:2]),
)
every_layer = pytest.mark.parametrize("name", LAYERS)


def zeros_of(name):
    return {"zeros": "v2"} if "v2" in name else {}


def weights(tensors, **options):
    """[k, n] as the format defines them."""
    if "weight" in tensors:
        return tensors["weight"].T
    return (exl2.dequantize_exl2 if "q_weight" in tensors else gptq.dequantize_gptq)(tensors, **options)


def spans(size, ranks, unit):
    """(begin, end) of up to `ranks` parts of about one size, whose borders are multiples of `unit`."""
    units = -(-size // unit)
    borders = [min(size, units * rank // ranks * unit) for rank in range(ranks + 1)]
    return [(begin, end) for begin, end in itertools.pairwise(borders) if begin < end]


def column_unit(tensors):
    """Columns that fill words of scales or zeros."""
    if "qweight" in tensors:
        bits = 32 * tensors["qzeros"].shape[1] // tensors["qweight"].shape[1]
        return 32 // math.gcd(32, bits)
    return 8 if "q_weight" in tensors else 1


def codes_of(tensors):
    return next(tensors[key] for key in ("q_weight", "qweight", "weight") if key in tensors)


@every_layer
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_columns_are_those_of_the_layer(name, ranks):
    tensors, options = layers()[name], zeros_of(name)
    whole = weights(tensors, **options)
    n = whole.shape[1]
    for begin, end in spans(n, ranks, column_unit(tensors)):
        part = take_columns(tensors, range(begin, end))
        assert same_bits(np.ascontiguousarray(weights(part, **options)), np.ascontiguousarray(whole[:, begin:end]))
        if tensors.get("bias") is not None:
            assert same_bits(part["bias"], tensors["bias"][begin:end])
        assert all(value.flags.c_contiguous for value in part.values() if value is not None)
        assert codes_of(part).nbytes * n == codes_of(tensors).nbytes * (end - begin)


@every_layer
def test_columns_of_any_choice_are_those_of_the_layer(name):
    tensors, options = layers()[name], zeros_of(name)
    whole = weights(tensors, **options)
    unit = column_unit(tensors)
    chosen = np.random.default_rng(4).permutation(whole.shape[1])[: max(unit, whole.shape[1] // 2 // unit * unit)]
    part = take_columns(tensors, chosen)
    assert same_bits(np.ascontiguousarray(weights(part, **options)), whole[:, chosen])
    if tensors.get("bias") is not None:
        assert same_bits(part["bias"], tensors["bias"][chosen])


def check_rows(tensors, parts, **options):
    """Each of [(rows, part)] has the weights of its rows, and together they make the product, in exact arithmetic."""
    whole = weights(tensors, **options)
    x = np.random.default_rng(5).integers(-8, 9, (3, len(whole))).astype(np.float64)
    total = np.zeros((3, whole.shape[1]))
    for rows, part in parts:
        found = weights(part, **options)
        assert same_bits(np.ascontiguousarray(found), np.ascontiguousarray(whole[rows]))
        # Small integers times fp16 or bf16 weights: every sum in float64 is exact, so that its order does not matter.
        total += x[:, rows] @ found.astype(np.float64) + (part["bias"].astype(np.float64) if "bias" in part else 0)
    assert sorted(itertools.chain(*(rows.tolist() for rows, _ in parts))) == list(range(len(whole)))
    bias = tensors.get("bias")
    assert np.array_equal(total, x @ whole.astype(np.float64) + (0 if bias is None else bias.astype(np.float64)))


@every_layer
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_parts_by_rows_add_up_to_the_whole_product(name, ranks):
    tensors, options = layers()[name], zeros_of(name)
    k = len(weights(tensors, **options))
    for unit in (32, 8):
        parts = [(np.arange(*span), take_rows(tensors, range(*span))) for span in spans(k, ranks, unit)]
        check_rows(tensors, parts, **options)
        assert ["bias" in part for _, part in parts] == [tensors.get("bias") is not None] + [False] * (len(parts) - 1)


@every_layer
def test_parts_in_stored_order_add_up_and_have_no_padding(name):
    tensors, options = layers()[name], zeros_of(name)
    k = len(weights(tensors, **options))
    chosen = [stored_features(tensors, range(*span)) for span in spans(k, 3, 32)]
    assert [len(rows) for rows in chosen] == [end - begin for begin, end in spans(k, 3, 32)]
    parts = [(rows, take_rows(tensors, rows)) for rows in chosen]
    check_rows(tensors, parts, **options)
    assert all("row_input" not in part for _, part in parts)
    assert sum(codes_of(part).nbytes for _, part in parts) == codes_of(tensors).nbytes


@pytest.mark.parametrize("name", ["mixture", "gptq act-order", "plain", EXL2_PROJECTIONS[3]])
def test_rows_of_any_choice_are_those_of_the_layer(name):
    tensors = layers().get(name) or layers()[f"exl2 {name}"]
    k = len(weights(tensors))
    order = np.random.default_rng(6).permutation(k)
    check_rows(tensors, [(order[:48], take_rows(tensors, order[:48])), (order[48:], take_rows(tensors, order[48:]))])


def test_a_part_can_be_split_again():
    for name in ("mixture", "gptq act-order"):
        tensors = layers()[name]
        whole = weights(tensors)
        half = take_rows(tensors, range(8, 96))
        assert "row_input" in half
        quarter = take_columns(take_rows(half, range(8, 64)), range(8, 24))
        assert same_bits(np.ascontiguousarray(weights(quarter)), np.ascontiguousarray(whole[16:72, 8:24]))
        rows = stored_features(half, range(32))
        assert same_bits(weights(take_rows(half, rows)), whole[8 + rows])


def test_an_mlp_split_in_stored_order_is_the_whole_mlp():
    """A gate by the columns that down's stored order asks for; signs between the two, so that all sums are exact."""
    gate, down = (layer_of("shakespeare-exl2-4.0", f"model.layers.0.mlp.{name}_proj") for name in ("gate", "down"))
    x = np.random.default_rng(7).integers(-4, 5, (2, 256)).astype(np.float64)
    middle = np.sign(x @ weights(gate).astype(np.float64))
    total = 0
    for begin, end in ((0, 256), (256, 544), (544, 768)):
        features = stored_features(down, range(begin, end))
        part = np.sign(x @ weights(take_columns(gate, features)).astype(np.float64))
        assert np.array_equal(part, middle[:, features])
        total += part @ weights(take_rows(down, features)).astype(np.float64)
    assert np.array_equal(total, middle @ weights(down).astype(np.float64))


# --- how parts are stored ----------------------------------------------------------------------------------------------


def test_a_group_is_filled_up_to_whole_blocks():
    """Two groups of 64 rows, in an order that gives the part 40 rows of the first and 8 of the second."""
    codes = np.arange(128)[:, None] % 7 + np.arange(8)
    perm = np.concatenate([np.arange(80, 120), np.arange(24), np.arange(120, 128), np.arange(24, 80)])
    layer = exl2.pack_exl2(codes, np.full((2, 8), 3), np.ones(2, np.float16), [4, 4], [64, 64], perm)
    part = take_rows(layer, range(80, 128))
    layout, order = exl2.validate_exl2(part)
    assert (layout.k, layout.stored_rows, layout.rows.tolist()) == (48, 96, [64, 32])
    assert order.tolist() == [*range(40), *[-1] * 24, *range(40, 48), *[-1] * 24]
    stored = exl2.unpack_exl2(part["q_weight"], layout)
    assert np.array_equal(stored[:40], codes[:40]) and np.array_equal(stored[64:72], codes[64:72])
    assert (stored[40:64] == 8).all() and (stored[72:] == 8).all()  # a weight of 0
    assert "q_invperm" not in part and exl2.exl2_size_bits(layout) == 96 * 8 * 4 + (48 + 32) * 2 + 32 * 48
    table = exl2.group_map(layout).reshape(96, 2)
    assert table[:, 0].tolist() == [0] * 64 + [1] * 32 and table[[0, 64], 1].tolist() == [64, 32]


def test_words_of_whole_blocks_are_copied_and_groups_left_out():
    layer = layers()["in order"]  # groups of 128 rows in order, two of 4 bits, two of 3, one of 96
    part = take_rows(layer, range(256, 448))
    assert same_bits(part["q_weight"], layer["q_weight"][32 : 32 + 18])
    assert part["q_groups"].tolist() == [3, 0, 3, 12]
    assert same_bits(part["q_scale"], layer["q_scale"][2:4]) and same_bits(part["q_scale_max"], layer["q_scale_max"][2:4])
    assert np.array_equal(part["q_invperm"], np.arange(192))
    layer = layers()["gptq in groups of 32"]
    part = take_rows(layer, range(64, 160))
    assert np.shares_memory(part["qweight"], layer["qweight"]) and len(part["qzeros"]) == len(part["scales"]) == 3
    assert part["g_idx"].tolist() == np.repeat([0, 1, 2], 32).tolist()


def test_rows_of_gptq_need_not_begin_with_a_word():
    tensors = layers()["gptq"]
    assert same_bits(weights(take_rows(tensors, range(40, 104))), weights(tensors)[40:104])


def test_padding_of_gptq_comes_last():
    part = take_rows(layers()["gptq act-order"], range(8, 48))
    layout = gptq.validate_gptq(part)
    assert layout.k == 40 and part["qweight"].shape == (8, 40)
    assert part["row_input"].tolist() == [*range(40), *[-1] * 24]
    assert layout.group_rows.sum() == 40 and len(layout.row_group) == 40


@pytest.mark.parametrize("name", ["mixture", "groups of 32", "gptq act-order", "gptq of 3 bits"])
def test_tiles_hold_every_input_once(name):
    part = take_rows(layers()[name], range(8, 64))
    if "q_weight" in part:
        layout = tiles.exl2_tiles(*exl2.validate_exl2(part))
    else:
        layout = tiles.gptq_tiles(gptq.validate_gptq(part))
    assert layout.k == 56 and sorted(layout.row[layout.row >= 0]) == list(range(56))
    assert len(layout.row) == 32 * layout.blocks and (np.diff(layout.block_group) <= 1).all()


def test_mistaken_parts_would_be_seen():
    """Inputs of two rows exchanged, a row of padding that is none, a code, a scale: each changes the weights."""
    tensors = layers()["mixture"]
    expected = weights(tensors)[8:96]
    part = take_rows(tensors, range(8, 96))
    swapped = part["row_input"].copy()
    first, second = np.flatnonzero(swapped >= 0)[[0, -1]]
    swapped[[first, second]] = swapped[[second, first]]
    moved = part["row_input"].copy()
    pad = np.flatnonzero(moved < 0)[0]
    moved[[first, pad]] = moved[[pad, first]]
    wrong = [{"row_input": swapped}, {"row_input": moved}, {"q_scale": part["q_scale"] ^ 1}, {"q_weight": part["q_weight"] ^ 1}]
    assert same_bits(weights(part), expected)
    for change in wrong:
        assert not same_bits(weights(part | change), expected)


# --- matrices -----------------------------------------------------------------------------------------------------------

CASES = [
    ("mixture", 8, 96),
    ("groups of 32", 0, 136),
    ("gptq act-order", 8, 96),
    ("gptq of 3 bits", 0, 40),
    ("in order", 0, 200),
]


@on_both
@pytest.mark.parametrize("name, begin, end", CASES)
def test_a_matrix_of_a_part_has_its_weights(library, name, begin, end):
    tensors = layers()[name]
    part = take_rows(tensors, range(begin, end))
    q = QMatrix.from_tensors({key: move(library, value) for key, value in part.items()}, name="part")
    assert (q.k, q.n) == (end - begin, codes_of(tensors).shape[1])
    assert same_bits(host(reconstruct(q)), weights(tensors)[begin:end])


def definition(name, begin, end):
    """(weights, the same before their rounding, bias) of a part, taken from the whole layer."""
    tensors = layers()[name]
    unrounded = (unrounded_exl2 if "q_weight" in tensors else unrounded_gptq)(tensors)
    whole, bias = weights(tensors), tensors.get("bias")
    bias = np.zeros(whole.shape[1]) if bias is None or begin > 0 else bias.astype(np.float64)
    return whole[begin:end], unrounded[begin:end], bias


@pytest.mark.parametrize("name, begin, end", CASES)
def test_a_product_with_a_part_is_that_of_its_rows(name, begin, end):
    q = QMatrix.from_tensors(take_rows(layers()[name], range(begin, end)))
    x = random(1, (3, end - begin), float16)
    check_product(qmatmul(x, q), x, definition(name, begin, end))


@pytest.mark.gpu
def test_kernels_multiply_by_parts(cupy, monkeypatch):
    """Rows of padding take no input, in whatever way the product is computed."""
    made = []
    for case in CASES:
        part = take_rows(layers()[case[0]], range(*case[1:]))
        made.append((QMatrix.from_tensors(to_gpu(cupy, part)), definition(*case)))
    for is_run, way in ((is_run, way) for is_run in compiled_first() for way in ways()):
        pin(monkeypatch, way)
        for (q, expected), rows in itertools.product(made, (1, 40)):
            x = random(rows, (rows, q.k), float16)
            y = product(cupy, x, q, shift=rows % 3)
            if is_run:
                check_product(y, x, expected)


@pytest.mark.parametrize("widths", MIXTURES)
def test_every_mixture_of_widths_splits(widths):
    tensors = random_exl2(np.random.default_rng(9), widths, n=16)
    k = len(weights(tensors))
    borders = [0, k // 3 // 8 * 8 + 8, k - 8, k]
    check_rows(tensors, [(np.arange(*span), take_rows(tensors, range(*span))) for span in itertools.pairwise(borders)])


# --- what does not fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda t: take_columns(t, range(12)), ValueError, "a part of 12 columns, expected a multiple of 8, as 4-bit"),
        (lambda t: take_columns(t, range(8, 8)), ValueError, r"columns: .* \[0\], expected at least one whole number"),
        (lambda t: take_columns(t, range(-8, 8)), ValueError, "columns: -8 to 7, expected numbers from 0 to 39"),
        (lambda t: take_columns(t, range(48)), ValueError, "columns: 0 to 47"),
        (lambda t: take_rows(t, range(801)), ValueError, "rows: 0 to 800, expected numbers from 0 to 799"),
        (lambda t: take_rows(t, [0, 800]), ValueError, "rows: 0 to 800, expected numbers from 0 to 799"),
        (lambda t: take_rows(t, [1, 1]), ValueError, "rows: some occur twice"),
        (lambda t: take_rows(t, []), ValueError, "expected at least one whole number"),
        (lambda t: take_columns(t, [0.5]), ValueError, "columns: float64"),
        (lambda t: take_rows({}, range(1), name="a.b"), FormatError, "a.b: neither EXL2 .* found no tensors"),
        (lambda t: take_rows(t, range(8, 20), name="a"), ValueError, "a: a part of 12 rows, expected a multiple of 8"),
        (lambda t: take_rows(t | {"q_scale": None}, range(1), name="a"), FormatError, "a.q_scale: missing"),
        (lambda t: take_columns({"qweight": t["q_weight"]}, range(8)), FormatError, "qzeros: missing"),
        (lambda t: take_rows({"weight": np.zeros(4, np.float16)}, range(1)), FormatError, r"weight: shape \[4\]"),
        (
            lambda t: take_columns({"weight": np.zeros((4, 4), np.float16), "bias": np.zeros(3, np.float16)}, range(1)),
            FormatError,
            r"bias: shape \[3\], expected \[4\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, kind, message):
    rng = np.random.default_rng(1)
    tensors = random_exl2(rng, (8, 6, 5, 4, 3, 2), n=40)
    with pytest.raises(kind, match=message) as error:
        call(tensors)
    assert "\n" not in str(error.value)


def test_columns_of_3_bits_fill_words():
    tensors = layers()["gptq of 3 bits"]
    whole = weights(tensors)
    with pytest.raises(ValueError, match="a part of 16 columns, expected a multiple of 32, as 3-bit"):
        take_columns(tensors, range(16))
    assert same_bits(weights(take_columns(tensors, range(20, 52))), np.ascontiguousarray(whole[:, 20:52]))  # words cut in two


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("mixture", lambda a: a[:-1], r"row_input: shape \[\d+\], expected \[\d+\]"),
        ("mixture", lambda a: a.astype(np.int64), "row_input: dtype int64, expected int32"),
        ("mixture", lambda a: np.where(a == 5, 6, a), "row_input: expected each input from 0 on once"),
        ("mixture", lambda a: np.where(a == 5, 88, a), "row_input: expected each input from 0 on once"),
        ("mixture", lambda a: np.where(a == a.max(), -1, a), "row_input: 87 inputs, expected a multiple of 8 above 0"),
        ("mixture", lambda a: np.full_like(a, -1), "row_input: 0 inputs, expected a multiple of 8 above 0"),
        ("gptq act-order", lambda a: a[:-1], r"row_input: shape"),
        ("gptq act-order", lambda a: a[::-1].copy(), "row_input: not 0, 1, ... and then -1"),
        ("gptq act-order", lambda a: np.where(a > 85, -1, a), "row_input: 86 inputs, expected a multiple of 8 above 0"),
        ("gptq act-order", lambda a: np.full_like(a, -1), "row_input: 0 inputs, expected a multiple of 8 above 0"),
    ],
)
def test_a_wrong_row_input_is_refused(name, change, message):
    part = take_rows(layers()[name], range(8, 96))
    with pytest.raises(FormatError, match=message):
        QMatrix.from_tensors(part | {"row_input": change(part["row_input"])})


def test_row_input_takes_the_place_of_a_permutation():
    part = take_rows(layers()["mixture"], range(8, 96))
    with pytest.raises(FormatError, match="row_input: given beside q_perm"):
        QMatrix.from_tensors(part | {"q_perm": part["row_input"]})
