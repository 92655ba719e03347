"""EXL2 against recorded outputs of exllamav2, the format's worked numbers, and a plain loop with its own roundings."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from conftest import golden
from format_checks import OnDevice, changed, half, stream_value
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import same_bits

from cupyq.errors import FormatError
from cupyq.formats.exl2 import (
    Exl2Segment,
    dequantize_exl2,
    exl2_layout,
    exl2_scales,
    exl2_size_bits,
    group_map,
    pack_exl2,
    unpack_exl2,
    validate_exl2,
)
from cupyq.formats.safetensors import Checkpoint

CASES = golden("exl2_matrix")
MODELS = Path(__file__).parent.parent / "examples" / "models"


def dequantize_by_loop(tensors, prescale=1.0, *, zero_shift=0, code_shift=1, power=2, scatter=True):
    """The format's formula, value by value. The keyword arguments make wrong variants of it."""
    words, scale_words = tensors["q_weight"].view(np.uint32), tensors["q_scale"].view(np.uint32)
    groups = tensors["q_groups"].view(np.uint16).reshape(-1, 2).tolist() + [[0, words.shape[0]]]
    inverse = tensors["q_invperm"].tolist()
    perm = sorted(range(len(inverse)), key=inverse.__getitem__)
    weights = np.empty((len(perm), words.shape[1]), np.float16)
    row = 0
    for g, (bits, first) in enumerate(groups[:-1]):
        group_max = half(float(tensors["q_scale_max"][g]) * (prescale / 256))
        for i in range((groups[g + 1][1] - first) * 32 // bits):
            for n in range(words.shape[1]):
                scale_code = int(scale_words[g, n // 8]) >> 4 * (n % 8) & 15
                scale = half((scale_code + code_shift) ** power * group_max)
                q = stream_value(words[first:, n], i, bits)
                weights[perm[row] if scatter else inverse[row], n] = half((q - 2 ** (bits - 1) + zero_shift) * scale)
            row += 1
    return weights


@pytest.mark.parametrize("case", CASES)
def test_golden_weight_and_group_map(case):
    tensors, outputs, arguments = CASES[case]
    layout, _ = validate_exl2(tensors)
    assert same_bits(group_map(layout), outputs["group_map"])
    assert same_bits(dequantize_exl2(tensors, **arguments), outputs["weight"])


@pytest.mark.parametrize("case", ["b3", "mix_all"])
def test_golden_rejects_wrong_formulas(case):
    tensors, outputs, arguments = CASES[case]
    few = {**tensors, "q_weight": tensors["q_weight"][:, :8], "q_scale": tensors["q_scale"][:, :1]}
    expected = outputs["weight"][:, :8]
    assert same_bits(dequantize_by_loop(few, **arguments), np.ascontiguousarray(expected))
    for wrong in ({"zero_shift": 1}, {"code_shift": 0}, {"power": 1}, {"scatter": False}):
        assert not np.array_equal(dequantize_by_loop(few, **arguments, **wrong), expected), wrong
    assert not np.array_equal(dequantize_by_loop(few, prescale=2 * arguments["prescale"]), expected)


def test_golden_checks_prescale_and_its_order():
    assert any(arguments["prescale"] != 1 for _, _, arguments in CASES.values())
    tensors, outputs, _ = CASES["b3"]
    assert not np.array_equal(dequantize_exl2(tensors), outputs["weight"])


def test_worked_numbers():
    """q_scale_max 0x35ec with scale code 9 and the 4-bit codes 0, 3, 7, 8, 15."""
    codes = np.array([0, 3, 7, 8, 15] + [8] * 27)[:, None] * np.ones(8, int)
    scale_max = np.array([0x35EC], np.uint16).view(np.float16)
    tensors = pack_exl2(codes, np.full((1, 8), 9), scale_max, [4], [32])
    assert tensors["q_scale"].view(np.uint32).tolist() == [[0x99999999]]
    assert exl2_scales(tensors["q_scale"], scale_max)[0].view(np.uint16).tolist() == [0x30A0] * 8
    weights = dequantize_exl2(tensors)
    assert weights[:5, 3].view(np.uint16).tolist() == [0xBCA0, 0xB9C8, 0xB0A0, 0x0000, 0x3C0C]


def test_group_map_example():
    layout = exl2_layout(np.array([8, 0, 4, 8], np.int16), 16, 8)
    assert (layout.k, layout.n, layout.group_count) == (96, 8, 2)
    pairs = [(0, left) for left in range(32, 0, -1)] + [(1, left) for left in range(64, 0, -1)]
    assert group_map(layout).reshape(-1, 2).tolist() == [list(pair) for pair in pairs]
    assert group_map(layout).dtype == np.int16


def test_layout_fields_and_segments():
    layout = exl2_layout(np.array([8, 0, 4, 8, 4, 24, 4, 40, 3, 44], np.int16), 53, 16)
    assert layout.bits.tolist() == [8, 4, 4, 4, 3]
    assert layout.rows.tolist() == [32, 128, 128, 32, 96]
    assert layout.first_row.tolist() == [0, 32, 160, 288, 320]
    assert layout.first_word.tolist() == [0, 8, 24, 40, 44]
    assert layout.segments == (Exl2Segment(8, 0, 32, 0), Exl2Segment(4, 32, 288, 8), Exl2Segment(3, 320, 96, 44))
    assert [segment.words for segment in layout.segments] == [8, 36, 9]
    assert layout.k == 416
    with pytest.raises(ValueError, match="read-only"):
        layout.bits[0] = 2
    with pytest.raises(FrozenInstanceError):
        layout.k = 1


@st.composite
def layers(draw):
    """(codes, scale codes, scale_max, widths, rows, perm, prescale) of a small layer."""
    widths = sorted(draw(st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=1, max_size=5)), reverse=True)
    rows = [32 * draw(st.integers(1, 4)) for _ in widths]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = 8 * draw(st.integers(1, 3))
    codes = np.concatenate([rng.integers(0, 2**b, (r, n)) for b, r in zip(widths, rows, strict=True)])
    scale_max = (rng.random(len(widths)) * draw(st.sampled_from([1.0, 2.0**-7, 2.0**-14, 2.0**-23]))).astype(np.float16)
    perm = rng.permutation(sum(rows)) if draw(st.booleans()) else None
    return (
        codes,
        rng.integers(0, 16, (len(widths), n)),
        scale_max,
        widths,
        rows,
        perm,
        draw(st.sampled_from([1, 0.3, 4])),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layers())
def test_round_trip_and_loop(layer):
    codes, scale_codes, scale_max, widths, rows, perm, prescale = layer
    tensors = pack_exl2(codes, scale_codes, scale_max, widths, rows, perm)
    layout, found = validate_exl2(tensors)
    assert layout.bits.tolist() == widths and layout.rows.tolist() == rows
    assert (layout.k, layout.n) == codes.shape
    np.testing.assert_array_equal(unpack_exl2(tensors["q_weight"], layout), codes)
    identity = np.arange(layout.k)
    np.testing.assert_array_equal(identity if found is None else found, identity if perm is None else perm)
    assert same_bits(dequantize_exl2(tensors, prescale), dequantize_by_loop(tensors, prescale))


def test_subnormal_scale_is_rounded_before_the_square():
    """2^-18 * 3 / 256 falls between subnormals: rounding it late gives another scale."""
    scale_max = np.array([3 * 2.0**-18], np.float16)
    scale = exl2_scales(np.array([[0x0000000F]], np.int32), scale_max)[0, 0]
    assert scale == half(256 * half(3 * 2.0**-26)) == 256 * 2.0**-24
    assert scale != half(256 * 3 * 2.0**-26)


def test_scales_by_loop():
    rng = np.random.default_rng(5)
    q_scale = rng.integers(-(2**31), 2**31, (300, 3)).astype(np.int32)
    scale_max = rng.integers(0, 0x7C00, 300).astype(np.uint16).view(np.float16)  # every finite exponent
    scales = exl2_scales(q_scale, scale_max, 1 / 3)
    assert scales.dtype == np.float16
    for g in range(300):
        for n in range(24):
            code = int(q_scale.view(np.uint32)[g, n // 8]) >> 4 * (n % 8) & 15
            assert scales[g, n] == half((code + 1) ** 2 * half(float(scale_max[g]) * (1 / 3 / 256)))


def small_layer():
    rng = np.random.default_rng(3)
    codes = np.concatenate([rng.integers(0, 2**b, (64, 16)) for b in (6, 4)])
    scale_max = np.array([0.5, 0.25], np.float16)
    return pack_exl2(codes, rng.integers(0, 16, (2, 16)), scale_max, [6, 4], [64, 64], rng.permutation(128))


def test_arguments_are_not_changed():
    tensors = small_layer()
    before = {short: tensor.copy() for short, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.setflags(write=False)
    first = dequantize_exl2(tensors, 0.5)
    assert same_bits(first, dequantize_exl2(tensors, 0.5))
    assert all(np.array_equal(before[short], tensors[short]) for short in before)


def test_large_tensors_are_checked_by_shape_and_dtype_alone():
    tensors = {**small_layer(), "bias": np.zeros(16, np.float16)}
    layout, perm = validate_exl2(tensors)
    far = {s: OnDevice(t) if s in ("q_weight", "q_scale", "q_scale_max", "bias") else t for s, t in tensors.items()}
    other, other_perm = validate_exl2(far)
    assert (other.k, other.n, other.segments) == (layout.k, layout.n, layout.segments)
    np.testing.assert_array_equal(perm, other_perm)
    with pytest.raises(TypeError, match="q_groups: OnDevice, expected a NumPy array"):
        validate_exl2({**far, "q_groups": OnDevice(tensors["q_groups"])})


def test_permutation_forms():
    tensors = small_layer()
    inverse = tensors.pop("q_invperm")
    perm = np.argsort(inverse).astype(np.int32)
    for extra in ({"q_invperm": inverse}, {"q_perm": perm}, {"q_perm": perm, "q_invperm": inverse}):
        for dtype in (np.int32, np.uint32, np.int16, np.uint16):
            given = {short: values.astype(dtype) for short, values in extra.items()}
            found = validate_exl2({**tensors, **given})[1]
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, perm)
    assert validate_exl2(tensors)[1] is None
    assert validate_exl2({**tensors, "q_perm": None, "q_invperm": None})[1] is None
    assert validate_exl2({**tensors, "q_perm": np.arange(128, dtype=np.int32)})[1] is None
    with pytest.raises(FormatError, match="q_perm: not the inverse of q_invperm, first at row"):
        validate_exl2({**tensors, "q_perm": inverse, "q_invperm": inverse})


def test_sixteen_bit_permutations_are_unsigned_up_to_65536_rows():
    rows = 65536
    perm = np.random.default_rng(4).permutation(rows)
    codes = np.random.default_rng(4).integers(0, 256, (rows, 8), dtype=np.uint8)
    tensors = pack_exl2(codes, np.zeros((2048, 8), int), np.ones(2048, np.float16), [8] * 2048, [32] * 2048, perm)
    short = {**tensors, "q_invperm": tensors["q_invperm"].astype(np.uint16).view(np.int16)}
    assert (short["q_invperm"] < 0).any()
    layout, found = validate_exl2(short)
    np.testing.assert_array_equal(found, perm)
    np.testing.assert_array_equal(unpack_exl2(tensors["q_weight"], layout), codes)

    with pytest.raises(FormatError, match="the groups hold 65568 rows, expected at most 65536"):
        exl2_layout(np.array([8, 0], np.int16), 8 * 2049, 8)


def test_one_group_of_all_rows_counts_down_in_sixteen_bits():
    pairs = group_map(exl2_layout(np.array([2, 0], np.int16), 4096, 8)).view(np.uint16).reshape(-1, 2)
    assert pairs[0].tolist() == [0, 0] and pairs[1].tolist() == [0, 65535] and pairs[-1].tolist() == [0, 1]


LAYOUT_ERRORS = [
    ([7, 0], 7, "group 0 has bit width 7, expected 2, 3, 4, 5, 6 or 8"),
    ([4, 0, 1, 4], 8, "group 1 has bit width 1"),
    ([4, 0, 6, 4], 10, "group 1 has bit width 6, expected widths that never increase"),
    ([4, 4], 8, "group 0 starts at row 4 of q_weight, expected 0"),
    ([4, 0, 4, 0], 8, "group 0 has a q_weight row count of 0"),
    ([4, 0, 4, 8, 4, 4], 12, "group 1 has a q_weight row count of -4"),
    ([4, 0, 4, 8], 8, "group 1 has a q_weight row count of 0"),
    ([4, 0, 4, 12], 8, "group 1 has a q_weight row count of -4"),
    ([4, 0], 6, "group 0 has a q_weight row count of 6, expected a multiple of its bit width"),
    ([6, 0, 4, 4], 8, "group 0 has a q_weight row count of 4, expected a multiple of its bit width"),
    ([], 8, r"int16 \[0\], expected int16 \[2 \* groups\], groups above 0"),
    ([4, 0, 4], 8, r"int16 \[3\], expected int16 \[2 \* groups\]"),
]


@pytest.mark.parametrize(("table", "rows", "message"), LAYOUT_ERRORS)
def test_layout_errors(table, rows, message):
    with pytest.raises(FormatError, match=rf"^layer\.q_groups: {message}") as caught:
        exl2_layout(np.array(table, np.int16), rows, 8, "layer")
    assert "\n" not in str(caught.value)


TENSOR_ERRORS = [
    ("q_weight", lambda t: {**t, "q_weight": None}, "missing"),
    ("q_groups", lambda t: {k: v for k, v in t.items() if k != "q_groups"}, "missing"),
    ("q_scale", lambda t: {k: v for k, v in t.items() if k != "q_scale"}, "missing"),
    ("q_scale_max", lambda t: {k: v for k, v in t.items() if k != "q_scale_max"}, "missing"),
    ("q_weight", changed("q_weight", lambda a: a.astype(np.int64)), "dtype int64, expected int32 or uint32"),
    ("q_weight", changed("q_weight", lambda a: a[:, :12]), "12 columns, expected a multiple of 8"),
    ("q_weight", changed("q_weight", lambda a: a[:, :0]), r"shape \[20, 0\], expected \[any, any\]"),
    ("q_weight", changed("q_weight", lambda a: a[:0]), r"shape \[0, 16\]"),
    ("q_weight", changed("q_weight", lambda a: a[0]), r"shape \[16\]"),
    ("q_groups", changed("q_weight", lambda a: a[:-1]), "row count of 7"),
    ("q_groups", changed("q_groups", lambda a: a.astype(np.int32)), "dtype int32, expected int16 or uint16"),
    ("q_groups", changed("q_groups", lambda a: a[:3]), r"\[3\]"),
    ("q_groups", changed("q_groups", lambda a: a[:0]), r"shape \[0\]"),
    ("q_groups", changed("q_groups", lambda a: a.reshape(2, 2)), r"shape \[2, 2\]"),
    ("q_scale", changed("q_scale", lambda a: a[:1]), r"shape \[1, 2\], expected \[2, 2\]"),
    ("q_scale", changed("q_scale", lambda a: a[:, :1]), r"shape \[2, 1\], expected \[2, 2\]"),
    ("q_scale", changed("q_scale", lambda a: a.astype(np.float32)), "dtype float32"),
    ("q_scale_max", changed("q_scale_max", lambda a: a[:1]), r"shape \[1\], expected \[2\]"),
    ("q_scale_max", changed("q_scale_max", lambda a: a.astype(np.float32)), "dtype float32, expected float16"),
    ("q_invperm", changed("q_invperm", lambda a: a[:-1]), r"shape \[127\], expected \[128\]"),
    ("q_invperm", changed("q_invperm", lambda a: a.astype(np.float32)), "dtype float32"),
    ("q_invperm", changed("q_invperm", lambda a: np.where(a == 5, 6, a)), "not a permutation, 5 does not occur"),
    ("q_invperm", changed("q_invperm", lambda a: np.where(a == 5, 128, a)), r"is 128, expected 0 to 127"),
    ("q_invperm", changed("q_invperm", lambda a: np.where(a == 5, -1, a)), r"is -1, expected 0 to 127"),
    ("q_perm", lambda t: {**t, "q_perm": np.zeros(128, np.int32)}, "not a permutation, 1 does not occur"),
    ("bias", lambda t: {**t, "bias": np.zeros(15, np.float16)}, r"shape \[15\], expected \[16\]"),
    ("bias", lambda t: {**t, "bias": np.zeros(16, np.float64)}, "dtype float64, expected float16"),
]


@pytest.mark.parametrize(("short", "change", "message"), TENSOR_ERRORS)
def test_tensor_errors(short, change, message):
    with pytest.raises(FormatError, match=rf"^model\.q_proj\.{short}: .*{message}") as caught:
        dequantize_exl2(change(small_layer()), name="model.q_proj")
    assert "\n" not in str(caught.value)
    with pytest.raises(FormatError, match=f"^{short}: "):
        validate_exl2(change(small_layer()))


PACK_ERRORS = [
    ({"codes": np.full((32, 8), 16)}, ValueError, "codes: values 16 to 16 do not fit 4 bits"),
    ({"codes": np.zeros((64, 8), int)}, ValueError, r"codes: shape \(64, 8\), expected \[32, N\]"),
    ({"codes": np.zeros((32, 9), int)}, ValueError, "9"),
    ({"scale_codes": np.full((1, 8), 16)}, ValueError, "codes: values 16 to 16 do not fit 4 bits"),
    ({"scale_codes": np.zeros((2, 8), int)}, FormatError, "q_scale: shape"),
    ({"scale_max": np.ones(1, np.float32)}, TypeError, "scale_max: dtype float32, expected float16"),
    ({"scale_max": np.ones(2, np.float16)}, FormatError, "q_scale_max: shape"),
    ({"group_bits": [7]}, FormatError, "bit width 7"),
    ({"group_bits": [4, 4]}, ValueError, "group_bits, group_rows"),
    ({"group_rows": [31], "codes": np.zeros((31, 8), int)}, ValueError, "group_rows: .* expected multiples of 32"),
    ({"perm": np.zeros(32, int)}, FormatError, "perm: not a permutation"),
    ({"perm": np.arange(31)}, FormatError, "perm: shape"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), PACK_ERRORS)
def test_pack_errors(wrong, kind, message):
    arguments = {
        "codes": np.zeros((32, 8), int),
        "scale_codes": np.zeros((1, 8), int),
        "scale_max": np.ones(1, np.float16),
        "group_bits": [4],
        "group_rows": [32],
    }
    pack_exl2(**arguments)
    with pytest.raises(kind, match=message) as caught:
        pack_exl2(**{**arguments, **wrong})
    assert "\n" not in str(caught.value)


def test_size_in_bits():
    layout = validate_exl2(small_layer())[0]
    assert exl2_size_bits(layout) == 64 * 16 * 6 + 64 * 16 * 4 + 16 * 2 + 32 * 2 + 4 * 2 * 16 + 32 * 128
    assert exl2_size_bits(layout, has_bias=True) - exl2_size_bits(layout) == 16 * 16


@pytest.mark.parametrize("model", ["shakespeare-exl2-4.0", "shakespeare-exl2-2.5"])
def test_example_checkpoints_are_near_the_model_they_came_from(model):
    """Every layer against the fp16 weights: the largest error is 0.46 (2 bits), a lost permutation gives 1.39."""
    with Checkpoint(MODELS / model) as checkpoint, Checkpoint(MODELS / "shakespeare") as original:
        keys = [name.removesuffix(".q_weight") for name in checkpoint.names if name.endswith(".q_weight")]
        assert len(keys) == 29
        for key in keys:
            shorts = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
            tensors = {short: checkpoint.array(f"{key}.{short}") for short in shorts}
            expected = original.array(f"{key}.weight").T.astype(np.float64)
            error = np.linalg.norm(dequantize_exl2(tensors, name=key) - expected)
            unpermuted = np.linalg.norm(dequantize_exl2({**tensors, "q_invperm": None}) - expected)
            assert error / np.linalg.norm(expected) < 0.5 < 1 < unpermuted / np.linalg.norm(expected), key
