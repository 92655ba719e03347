"""rope and rope_tables: references against plain loops and recorded outputs, kernel against float64."""

import cmath
import math

import numpy as np
import pytest
from conftest import golden
from kernel_checks import (
    FLOATS,
    banded,
    float16,
    float32,
    host,
    move,
    near,
    on_both,
    on_gpu,
    random,
    same_bits,
    unwritten,
)

from cupyq.errors import FormatError, UnsupportedError
from cupyq.ops.rope import mrope_positions, rope, rope_tables

STYLES = ("neox", "gptj")


def columns_of(pair, pairs, style):
    return (pair, pair + pairs) if style == "neox" else (2 * pair, 2 * pair + 1)


def rotated(x, sin, cos, positions, style, dtype=np.float64):
    """Pair after pair, in that dtype's arithmetic; positions [batch, seq]."""
    x, pairs = x.astype(dtype), sin.shape[1]
    y = x.copy()
    s, c = (table[positions].astype(dtype)[:, :, None] for table in (sin, cos))
    for pair in range(pairs):
        p, q = columns_of(pair, pairs, style)
        y[..., p] = x[..., p] * c[..., pair] - x[..., q] * s[..., pair]
        y[..., q] = x[..., q] * c[..., pair] + x[..., p] * s[..., pair]
    return y


# --- the rotation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rotary_dim", [10, 6])
def test_reference_turns_complex_numbers(style, rotary_dim):
    """A pair is the complex number p + i q; position t multiplies it by exp(i t frequency)."""
    x, pairs = random(1, (2, 3, 4, 10), float32), rotary_dim // 2
    sin, cos = rope_tables(rotary_dim, 20, theta=50.0)
    y = rope(x, sin, cos, np.array([0, 11], np.int32), style=style)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y[..., rotary_dim:], x[..., rotary_dim:])
    for b, t, h, pair in np.ndindex(2, 3, 4, pairs):
        p, q = columns_of(pair, pairs, style)
        turn = cmath.exp(1j * ((0, 11)[b] + t) * 50.0 ** (-2 * pair / rotary_dim))
        expected = complex(x[b, t, h, p], x[b, t, h, q]) * turn
        assert abs(complex(y[b, t, h, p], y[b, t, h, q]) - expected) < 3e-7 * abs(expected)


@pytest.mark.parametrize("style", STYLES)
def test_positions_for_each_token(style):
    x = random(1, (2, 3, 2, 8), float16)
    sin, cos = rope_tables(8, 20)
    starts = np.array([4, 9], np.int32)
    each = (starts[:, None] + np.arange(3)).astype(np.int32)
    assert same_bits(rope(x, sin, cos, each, style=style), rope(x, sin, cos, starts, style=style))
    shuffled = np.array([[3, 3, 0], [19, 1, 7]], np.int32)
    y = rope(x, sin, cos, shuffled, style=style)
    for b, t in np.ndindex(2, 3):
        alone = rope(x[b : b + 1, t : t + 1].copy(), sin, cos, shuffled[b : b + 1, t].copy(), style=style)
        assert same_bits(y[b, t], alone[0, 0])


GOLDEN = {case: data for case, data in golden("rope").items() if case != "mrope"}


@on_both
@pytest.mark.parametrize("case", GOLDEN)
def test_recorded_outputs(case, library):
    inputs, outputs, arguments = GOLDEN[case]
    heads, is_neox = arguments["num_heads"], arguments["neox_style"]
    x, expected = (a.reshape(2, -1, heads, a.shape[-1]) for a in (inputs["x"], outputs["y"]))
    # The recorded tables hold each value twice: as two halves for NeoX, side by side for GPT-J.
    once = np.s_[:, : inputs["sin"].shape[1] // 2] if is_neox else np.s_[:, ::2]
    sin, cos = (np.ascontiguousarray(inputs[name][once]) for name in ("sin", "cos"))
    offsets = inputs.get("offsets", np.zeros(2, np.int32))
    past = arguments["past_len"]
    starts = np.maximum(offsets, 0) if past == -1 else past + offsets
    positions = np.maximum(starts[:, None] + np.arange(x.shape[1]), 0).astype(np.int32)
    style = "neox" if is_neox else "gptj"
    y = host(rope(*(move(library, a) for a in (x, sin, cos, positions)), style=style))
    # Recorded: the product with sin rounded to fp16, then the sum. Ours: the sum alone.
    exact = rotated(x, sin, cos, positions, style)
    sine_product = np.abs(exact - rotated(x, 0 * sin, cos, positions, style))
    allowed = 2.0**-11 * (2 * np.abs(exact) + sine_product) + 2.0**-24
    assert np.all(np.abs(y - expected.astype(np.float64)) <= allowed)
    near(y, exact, exact.astype(np.float32).astype(np.float16))
    if starts.min() >= 0:
        again = rope(*(move(library, a) for a in (x, sin, cos, starts.astype(np.int32))), style=style)
        assert same_bits(host(again), y)


@pytest.mark.parametrize("style", STYLES)
def test_bound_rejects_wrong_formulas(style):
    x, (sin, cos) = random(1, (2, 40, 2, 16), float16), rope_tables(16, 64)
    positions = np.array([[3], [9]]) + np.arange(40)
    exact = rotated(x, sin, cos, positions, style)
    rounded = rotated(x, sin, cos, positions, style, np.float32).astype(np.float16)
    near(rounded, exact, rounded)
    other = STYLES[1 - STYLES.index(style)]
    for wrong in (
        rotated(x, sin, cos, positions + 1, style),
        rotated(x, -sin, cos, positions, style),
        rotated(x, cos, sin, positions, style),
        rotated(x, sin, cos, positions, other),
        rotated(x, np.roll(sin, 1, axis=1), np.roll(cos, 1, axis=1), positions, style),
        rotated(x, sin, cos, positions[::-1], style),
        rotated(x, sin, cos, positions, style, np.float16),  # rounds the products too
    ):
        with pytest.raises(AssertionError):
            near(wrong.astype(np.float16), exact, rounded)
            pytest.fail("not rejected")


@pytest.mark.gpu
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype, table_dtype", [(d, t) for d in FLOATS for t in (float32, float16)], ids=lambda d: d.name)
def test_kernel(cupy, style, dtype, table_dtype):
    for batch, seq, heads, head_dim, pairs in [
        (1, 1, 1, 2, 1),
        (1, 1, 1, 7, 2),
        (2, 3, 5, 12, 6),
        (3, 1, 2, 64, 16),
        (2, 5, 3, 64, 32),
        (1, 4, 9, 80, 20),
        (2, 2, 33, 128, 64),
        (1, 2, 4, 256, 128),
        (1, 2, 3, 16, 0),
    ]:
        x = random(head_dim, (batch, seq, heads, head_dim), dtype)
        angles = random(2, (31, pairs), float32, 3.0)
        sin, cos = np.sin(angles).astype(table_dtype), np.cos(angles).astype(table_dtype)
        starts = np.random.default_rng(3).integers(0, 32 - seq, batch).astype(np.int32)
        each = np.random.default_rng(4).integers(0, 31, (batch, seq)).astype(np.int32)
        for positions, tokens in ((starts, starts[:, None] + np.arange(seq)), (each, each)):
            exact = rotated(x, sin, cos, tokens, style)
            rounded = rotated(x, sin, cos, tokens, style, np.float32).astype(dtype)
            for shift in (0, 1) if pairs == 32 else (0,):
                x_, sin_, cos_, positions_ = (on_gpu(cupy, a, shift) for a in (x, sin, cos, positions))
                out, check = banded(cupy, unwritten(x.shape, dtype), shift)
                assert rope(x_, sin_, cos_, positions_, style=style, out=out) is out
                check()
                near(out.get(), exact, rounded)
                assert same_bits(out.get()[..., 2 * pairs :], x[..., 2 * pairs :]), "a copied column changed"
                assert same_bits(x_.get(), x), "x changed"
                inside, check = banded(cupy, x, shift)
                assert rope(inside, sin_, cos_, positions_, style=style, out=inside) is inside
                check()
                assert same_bits(inside.get(), out.get()), "in place differs"


@pytest.mark.gpu
def test_many_tokens(cupy):
    x, positions = random(1, (1, 70_001, 1, 8), float16), np.array([2], np.int32)
    sin, cos = rope_tables(8, 70_003)
    out, check = banded(cupy, unwritten(x.shape, float16))
    rope(*(on_gpu(cupy, a) for a in (x, sin, cos, positions)), out=out)
    check()
    tokens = 2 + np.arange(70_001)[None]
    near(out.get(), rotated(x, sin, cos, tokens, "neox"), rotated(x, sin, cos, tokens, "neox", np.float32).astype("e"))


@pytest.mark.gpu
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("is_in_place", [False, True])
def test_tokens_outside_become_nan(cupy, style, is_in_place):
    x, (sin, cos) = random(1, (4, 3, 2, 24), float16), rope_tables(16, 5)
    info = np.iinfo(np.int32)
    for positions in (
        np.array([3, -1, info.max, info.min], np.int32),
        np.array([[4, 5, 0], [-1, 0, 4], [info.max, info.min, 2], [1, 2, 3]], np.int32),
    ):
        tokens = positions if positions.ndim == 2 else positions[:, None].astype(np.int64) + np.arange(3)
        is_inside = (tokens >= 0) & (tokens < 5)
        target, check = banded(cupy, x if is_in_place else np.zeros_like(x))
        x_ = target if is_in_place else on_gpu(cupy, x)
        rope(x_, *(on_gpu(cupy, a) for a in (sin, cos, positions)), style=style, out=target)
        check()
        y = target.get()
        assert np.all(np.isnan(y[~is_inside])) and not np.any(np.isnan(y[is_inside]))
        known = rope(x, sin, cos, np.where(is_inside, tokens, 0).astype(np.int32), style=style)
        np.testing.assert_allclose(y[is_inside].astype(np.float32), known[is_inside].astype(np.float32), rtol=2e-3, atol=1e-3)


def test_numpy_names_the_token_outside():
    x, (sin, cos) = np.ones((2, 3, 1, 4), np.float16), rope_tables(4, 5)
    with pytest.raises(ValueError, match="token 2 of row 1 at 5, outside the tables of 5 positions"):
        rope(x, sin, cos, np.array([2, 3], np.int32), out=x)
    with pytest.raises(ValueError, match="token 0 of row 0 at -1"):
        rope(x, sin, cos, np.array([[-1, 0, 0]] * 2, np.int32))
    assert np.all(x == 1)  # nothing is written before the check


@on_both
def test_refusals(library):
    sin, cos = rope_tables(8, 5)
    good = {"x": np.ones((2, 3, 4, 8), np.float16), "sin": sin, "cos": cos, "positions": np.zeros(2, np.int32)}

    def call(style="neox", out=None, **changed):
        return rope(*(move(library, a) for a in (good | changed).values()), style=style, out=out)

    with pytest.raises(TypeError, match="x must have dtype"):
        call(x=good["x"].astype(np.float64))
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        call(x=good["x"][0])
    with pytest.raises(TypeError, match="sin must have dtype float32 or float16"):
        call(sin=sin.astype(np.float64))
    with pytest.raises(TypeError, match="cos must have dtype float32"):
        call(cos=cos.astype(np.float16))
    with pytest.raises(ValueError, match="cos must have shape"):
        call(cos=cos[:4])
    with pytest.raises(ValueError, match="sin has 8 columns, one per pair, but x's head_dim 8 has fewer pairs"):
        call(sin=np.ones((5, 8), np.float32), cos=np.ones((5, 8), np.float32))
    with pytest.raises(TypeError, match="positions must have dtype int32"):
        call(positions=np.zeros(2, np.int64))
    for shape in ((3,), (2, 4), (), (2, 3, 1)):
        with pytest.raises(ValueError, match="positions must have shape"):
            call(positions=np.zeros(shape, np.int32))
    with pytest.raises(ValueError, match='style must be "neox" or "gptj"'):
        call(style="llama")
    with pytest.raises(ValueError, match="out must have shape"):
        call(out=move(library, np.ones((2, 3, 4, 9), np.float16)))
    table = move(library, np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="out overlaps sin"):
        rope(
            *(move(library, a) for a in (np.ones((1, 1, 2, 8), "f"),)),
            table,
            move(library, np.ones((4, 4), "f")),
            move(library, np.zeros(1, np.int32)),
            out=table.reshape(1, 1, 2, 8),
        )
    assert call(x=np.ones((2, 0, 4, 8), np.float16)).shape == (2, 0, 4, 8)


# --- tables -----------------------------------------------------------------------------------------------------------


def angles_of(tables, position=1):
    """The angles below one turn that a row of the tables stands for, and its attention factor."""
    sin, cos = (table[position].astype(np.float64) for table in tables)
    return np.arctan2(sin, cos), np.hypot(sin, cos)


def test_default_tables_against_math():
    sin, cos = rope_tables(6, 1000, theta=500.0)
    assert sin.shape == cos.shape == (1000, 3) and sin.dtype == cos.dtype == np.float32
    for position, pair in np.ndindex(1000, 3):
        angle = position * 500.0 ** (-2 * pair / 6)
        assert sin[position, pair] == np.float32(math.sin(angle)) or abs(sin[position, pair] - math.sin(angle)) < 1e-7
        assert abs(cos[position, pair] - math.cos(angle)) < 1e-7
    assert rope_tables(4, 0)[0].shape == (0, 2)
    assert same_bits(rope_tables(8, 7, scaling={"rope_type": "default", "rope_theta": 10000.0})[0], rope_tables(8, 7)[0])


def test_long_tables_against_math():
    """Also at positions that are far and at the seams of the blocks they are made in."""
    sin, cos = rope_tables(8, 131_000, theta=500.0)
    near_seams = [128 * block + i for block in (1, 2, 511, 1023) for i in (-1, 0, 1)]
    for position in [*near_seams, 130_999, *np.random.default_rng(0).integers(0, 131_000, 500).tolist()]:
        for pair in range(4):
            angle = position * 500.0 ** (-2 * pair / 8)
            assert abs(sin[position, pair] - math.sin(angle)) <= 2.0**-25 + 1e-10
            assert abs(cos[position, pair] - math.cos(angle)) <= 2.0**-25 + 1e-10


@pytest.mark.gpu
def test_tables_on_the_gpu(cupy):
    for there, here in zip(rope_tables(8, 9, xp=cupy), rope_tables(8, 9), strict=True):
        assert isinstance(there, cupy.ndarray) and same_bits(there.get(), here)


def test_linear():
    sin, _ = rope_tables(8, 9, scaling={"type": "linear", "factor": 2.0})
    np.testing.assert_array_equal(sin[::2], rope_tables(8, 5)[0])


def test_llama3():
    """Llama 3.1's settings: wavelengths below 2048 kept, above 8192 divided by 8, a ramp between."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    angles, length = angles_of(rope_tables(128, 2, theta=500000.0, scaling=scaling))
    np.testing.assert_allclose(length, 1, rtol=1e-6)
    kinds = set()
    for pair in range(64):
        frequency = 500000.0 ** (-2 * pair / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected, kind = frequency, "kept"
        elif wavelength > 8192:
            expected, kind = frequency / 8, "divided"
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected, kind = (1 - smooth) * frequency / 8 + smooth * frequency, "between"
        kinds.add(kind)
        assert math.isclose(angles[pair], expected, rel_tol=1e-6)
    assert len(kinds) == 3


def test_dynamic():
    """Beyond the usual length theta grows with the length of the tables: all of them turn alike."""
    scaling = {"rope_type": "dynamic", "factor": 3.0, "max_position_embeddings": 16}
    for length, theta in ((16, 100.0), (17, 100 * (3 * 17 / 16 - 2) ** (8 / 6)), (40, 100 * (3 * 40 / 16 - 2) ** (8 / 6))):
        angles, size = angles_of(rope_tables(8, length, theta=100.0, scaling=scaling))
        np.testing.assert_allclose(angles, [theta ** (-pair / 4) for pair in range(4)], rtol=1e-6)
        np.testing.assert_allclose(size, 1, rtol=1e-6)
    assert same_bits(rope_tables(2, 40, scaling=scaling)[0], rope_tables(2, 40)[0])


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def test_yarn():
    """32 turns and 1 turn within 4096 positions are made at pairs 20.9 and 45.02 of 64: the ramp runs from 20 to 46."""
    angles, length = angles_of(rope_tables(128, 2, scaling=YARN))
    np.testing.assert_allclose(length, 0.1 * math.log(4) + 1, rtol=1e-6)
    for pair in range(64):
        frequency = 10000.0 ** (-pair / 64)
        share = min(max((pair - 20) / 26, 0), 1)  # of the divided frequency
        assert math.isclose(angles[pair], share * frequency / 4 + (1 - share) * frequency, rel_tol=1e-6)
    # The original length counts, not that of the tables.
    long = rope_tables(128, 5000, scaling=YARN)
    assert same_bits(long[0][:2], rope_tables(128, 2, scaling=YARN)[0])
    angles, _ = angles_of(rope_tables(128, 2, scaling=YARN | {"truncate": False}))
    low, high = (64 * math.log(4096 / (turns * 2 * math.pi)) / math.log(10000) for turns in (32, 1))
    assert math.floor(low) == 20 and math.ceil(high) == 46
    assert math.isclose(angles[30], 10000 ** (-30 / 64) * (1 - 0.75 * (30 - low) / (high - low)), rel_tol=1e-6)


@pytest.mark.parametrize(
    "change, factor",
    [
        ({"attention_factor": 1.25}, 1.25),
        ({"attention_factor": None}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({"mscale": 0.707}, 0.1 * math.log(4) + 1),
    ],
)
def test_yarn_attention_factor(change, factor):
    np.testing.assert_allclose(angles_of(rope_tables(128, 2, scaling=YARN | change))[1], factor, rtol=1e-6)


LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 8.0],
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope(kind):
    scaling = LONG | {"rope_type": kind}
    for length, factors in ((16, (1.0, 1.5)), (17, (2.0, 8.0))):
        angles, size = angles_of(rope_tables(4, length, theta=100.0, scaling=scaling))
        np.testing.assert_allclose(angles, [1 / factors[0], 0.1 / factors[1]], rtol=1e-6)
        np.testing.assert_allclose(size, math.sqrt(1 + math.log(4) / math.log(16)), rtol=1e-6)
    for change, expected in (
        ({"factor": 16.0}, math.sqrt(2)),
        ({"attention_factor": 1.5, "max_position_embeddings": None}, 1.5),
        ({"max_position_embeddings": 16}, 1.0),
    ):
        np.testing.assert_allclose(angles_of(rope_tables(4, 9, scaling=scaling | change))[1], expected, rtol=1e-6)


def test_table_refusals():
    with pytest.raises(UnsupportedError, match="'fixed' is not supported: known are default, linear, dynamic, llama3, yarn"):
        rope_tables(8, 4, scaling={"type": "fixed", "factor": 2.0})
    with pytest.raises(FormatError, match="'max_position_embeddings' must be a positive number for rope_type 'dynamic'"):
        rope_tables(8, 4, scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(FormatError, match="'factor' must be a positive number for rope_type 'linear', got None"):
        rope_tables(8, 4, scaling={"rope_type": "linear"})
    with pytest.raises(FormatError, match="'original_max_position_embeddings' must be a positive number"):
        rope_tables(8, 4, scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(FormatError, match="'factor' must be a positive number for rope_type 'linear', got '2'"):
        rope_tables(8, 4, scaling={"rope_type": "linear", "factor": "2"})
    for wrong, found in ((None, "None"), ([1.0], "1 values"), ([1, 0, 1, 1], "4 values"), (["a"] * 4, "4 values")):
        with pytest.raises(FormatError, match=f"'short_factor' must be a list of 4 positive numbers, got {found}"):
            rope_tables(8, 4, scaling=LONG | {"short_factor": wrong})
    with pytest.raises(
        FormatError, match="'max_position_embeddings' must be a positive number for rope_type 'longrope', got None"
    ):
        rope_tables(4, 4, scaling=LONG | {"max_position_embeddings": None})
    with pytest.raises(ValueError, match="theta is 10000 but scaling says rope_theta 500000.0"):
        rope_tables(8, 4, scaling={"rope_type": "default", "rope_theta": 500000.0})
    for rotary_dim in (0, 7, -2):
        with pytest.raises(ValueError, match="rotary_dim must be positive and even"):
            rope_tables(rotary_dim, 4)
    with pytest.raises(ValueError, match="length must not be negative"):
        rope_tables(8, -1)


# --- positions of text and images -------------------------------------------------------------------------------------


def mrope_by_loops(ids, merge, spans, grids, length):
    """exllamav2's walk, token by token."""
    rows, base, free = [], 0, 0
    for i in range(length):
        j = next((j for j, (begin, end) in enumerate(spans) if i < len(ids) and begin <= ids[i] < end), None)
        if j is None:
            rows.append((free, free, free))
            base = free = free + 1
            continue
        k, (time, height, width) = ids[i] - spans[j][0], grids[j]
        height, width = height // merge, width // merge
        rows.append((base + k // width // height % time, base + k // width % height, base + k % width))
        free = max(free, *(value + 1 for value in rows[-1]))
    return np.array(rows, np.int64).reshape(-1, 3).T, free


def test_mrope_golden():
    inputs, outputs, arguments = golden("rope")["mrope"]
    length = outputs["pos"].shape[1]
    call = (inputs["ids"], arguments["merge_size"], arguments["spans"], arguments["grids"])
    positions, free = mrope_positions(*call, length)
    np.testing.assert_array_equal(positions, outputs["pos"])
    assert (positions.dtype, free) == (np.int64, arguments["next"])


@pytest.mark.parametrize("seed", range(8))
def test_mrope_positions_are_those_of_a_walk(seed):
    """Images at either end, next to each other, of several frames, overlapping, cut off, and ids in any order."""
    rng = np.random.default_rng(seed)
    merge = int(rng.integers(1, 3))
    grids = [tuple(int(v) for v in rng.integers(1, 4, 3) * (1, merge, merge) + (0, 1, 0)) for _ in range(3)]
    spans = [(100, 112), (112, 120), (118, 130)]
    ids = rng.permutation(np.concatenate([rng.integers(0, 50, 6), np.arange(100, 130)])) if seed % 2 else np.arange(95, 140)
    for length in (0, 1, ids.size - 3, ids.size, ids.size + 5):
        positions, free = mrope_positions(ids, merge, spans, grids, length)
        expected, expected_free = mrope_by_loops(ids.tolist(), merge, spans, grids, length)
        np.testing.assert_array_equal(positions, expected)
        assert free == expected_free
    text, free = mrope_positions(ids, merge, [], [], 5)
    np.testing.assert_array_equal(text, [range(5)] * 3)
    assert free == 5


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"ids": [1, 2]}, TypeError, "ids must be a NumPy array, as positions are made on the host, got list"),
        ({"ids": np.zeros(3, np.int32)}, TypeError, "ids must have dtype int64"),
        ({"ids": np.zeros((1, 3), np.int64)}, ValueError, "ids must have 1 dimensions"),
        ({"merge_size": 0}, ValueError, "merge_size must be an integer from 1, got 0"),
        ({"merge_size": 2.0}, ValueError, "merge_size must be an integer from 1, got 2.0"),
        ({"length": -1}, ValueError, "length must be an integer from 0, got -1"),
        ({"grids": []}, ValueError, r"grids must hold one \(time, height, width\) for each of 1 spans, got 0"),
        ({"grids": [(1, 4, 1)]}, ValueError, r"grids\[0\] must be at least \(1, 2, 2\), got \(1, 4, 1\)"),
        ({"grids": [(0, 4, 4)]}, ValueError, r"grids\[0\] must be at least \(1, 2, 2\)"),
        ({"grids": [(1, 4)]}, ValueError, "spans must hold pairs"),
        ({"grids": [(1, 4.5, 4)]}, ValueError, "spans must hold pairs"),
        ({"spans": [(1, 2, 3)]}, ValueError, "spans must hold pairs"),
        ({"spans": [(1, 2**70)]}, ValueError, "spans must hold pairs"),
        ({"spans": None}, ValueError, "spans must hold pairs"),
    ],
)
def test_mrope_refusals(change, kind, message):
    arguments = {"ids": np.zeros(3, np.int64), "merge_size": 2, "spans": [(1, 5)], "grids": [(1, 4, 4)], "length": 3}
    with pytest.raises(kind, match=message):
        mrope_positions(**arguments | change)
