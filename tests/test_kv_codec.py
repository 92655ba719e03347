"""Encoding and decoding caches: recorded outputs of exllamav2, tokens one by one, and kernels against the reference.

Everything is compared bit by bit, and so is what must stay as it was: caches start as random bytes.
"""

import itertools

import numpy as np
import pytest
from conftest import golden
from kernel_checks import banded, host, move, on_both, on_gpu, same_bits

from cupyq.errors import UnsupportedError
from cupyq.formats import kv_cache
from cupyq.formats.kv_cache import KINDS, code_shape, scale_shape
from cupyq.ops import kv_codec
from cupyq.ops.kv_codec import (
    CacheCodes,
    cache_arrays,
    decode_blocks,
    encode_blocks,
    kv_decode,
    kv_decode_paged,
    kv_encode,
    kv_encode_paged,
)

on_every_kind = pytest.mark.parametrize("kind", KINDS)


def random_x(seed, shape, scale=1.0):
    """float16 values; some chunks of large tensors are zero, subnormal, infinite or no numbers."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * scale).astype(np.float16)
    flat = x.reshape(-1)
    if flat.size >= 4096:
        chunks = flat[: flat.size // 64 * 64].reshape(-1, 64)
        chunks[5], chunks[11] = 0, chunks[11] * np.float16(2.0**-18)
        chunks[17, 3], chunks[23, 62], chunks[29, 1] = np.inf, np.nan, -np.inf
        chunks[31], chunks[37] = 65504, chunks[37] * np.float16(4096)
    return x


def random_cache(seed, shape, kind):
    """Codes and scales as random bytes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, code_shape(shape, kind), dtype=np.uint8)
    if kind == "fp8":
        return codes, None
    return codes, rng.integers(0, 1 << 16, scale_shape(shape, kind), dtype=np.uint16).view(np.float16)


def legal_cache(seed, shape, kind):
    """What encoding gave, as random scales decode mostly to Inf and NaN."""
    codes, scales = kv_cache.encode(random_x(seed, shape), kind)
    return codes.reshape(code_shape(shape, kind)), None if scales is None else scales.reshape(scale_shape(shape, kind))


def copy_of(*arrays):
    return tuple(None if a is None else a.copy() for a in arrays)


def moved(library, *arrays):
    return tuple(None if a is None else move(library, a) for a in arrays)


def all_same(there, expected):
    return all((a is None and b is None) or same_bits(host(a), b) for a, b in zip(there, expected, strict=True))


# --- an oracle that goes chunk by chunk -------------------------------------------------------------------------------


def unit_of(shape, kind):
    """Values that are encoded together."""
    return {"fp8": 1, "e4m3": shape[3]}.get(kind, 64)


def touched_units(shape, kind, tokens):
    """Numbers of the flat units (chunks of 64 values, for fp8 single values) that hold a value of one of the flat tokens."""
    values, unit = shape[2] * shape[3], unit_of(shape, kind)
    return sorted({e // unit for token in tokens for e in range(token * values, (token + 1) * values)})


def encoded(x, codes, scales, kind, tokens):
    """Copies of the cache with the units of those tokens encoded from x, each apart."""
    codes, scales = copy_of(codes, scales)
    unit = unit_of(x.shape, kind)
    flat = x.reshape(-1)
    for number in touched_units(x.shape, kind, tokens):
        new_codes, new_scales = kv_cache.encode(flat[number * unit : (number + 1) * unit], kind)
        codes.reshape(-1)[number * new_codes.size :][: new_codes.size] = new_codes
        if scales is not None:
            scales.reshape(-1)[number * new_scales.size :][: new_scales.size] = new_scales
    return codes, scales


def decoded(codes, scales, x, kind, tokens):
    x = x.copy()
    unit = unit_of(x.shape, kind)
    size = codes.size * unit // x.size  # bytes of a unit
    for number in touched_units(x.shape, kind, tokens):
        count = 0 if scales is None else scales.size * unit // x.size
        part = None if scales is None else scales.reshape(-1)[number * count : (number + 1) * count]
        codes_part = codes.reshape(-1)[number * size : (number + 1) * size]
        x.reshape(-1)[number * unit : (number + 1) * unit] = kv_cache.decode(codes_part, part, kind)
    return x


def row_tokens(shape, start, width, rows):
    return [row * shape[1] + t for row in range(rows) for t in range(start, start + width)]


def page_tokens(shape, ranges, table):
    """Flat tokens of the pages; what lies beyond the table or names no page is left out."""
    tokens = []
    for b, (first, last) in enumerate(ranges):
        for t in range(first, last) if first >= 0 else ():
            if t // shape[1] < table.shape[1] and 0 <= table[b, t // shape[1]] < shape[0]:
                tokens.append(int(table[b, t // shape[1]]) * shape[1] + t % shape[1])
    return tokens


# --- both paths -------------------------------------------------------------------------------------------------------

# (shape, start, width, rows). Of the last ones chunks straddle tokens (without chunks: a lane's values do).
CONTIGUOUS = [
    ((1, 1, 1, 64), 0, 1, None),
    ((2, 5, 2, 64), 1, 3, None),
    ((3, 4, 1, 128), 0, 4, 2),
    ((2, 3, 4, 32), 2, 1, None),
    ((2, 6, 1, 32), 1, 2, None),
    ((2, 5, 3, 32), 4, 1, None),
    ((4, 3, 1, 96), 1, 1, 3),
    ((2, 3, 5, 96), 0, 3, 1),
]
NO_CHUNKS = [((2, 5, 1, 3), 1, 3, None), ((3, 7, 1, 1), 2, 5, None), ((2, 3, 3, 5), 1, 1, None), ((1, 40, 1, 9), 3, 30, None)]


def contiguous_cases(kind):
    return CONTIGUOUS + (NO_CHUNKS if kind in ("fp8", "e4m3") else [])


@on_both
@on_every_kind
def test_tokens_of_rows(library, kind):
    for shape, start, width, rows in contiguous_cases(kind):
        tokens = row_tokens(shape, start, width, shape[0] if rows is None else rows)
        x, cache = random_x(1, shape), random_cache(2, shape, kind)
        there = moved(library, *copy_of(*cache))
        assert kv_encode(move(library, x), *there, kind=kind, start=start, width=width, rows=rows) is None
        assert all_same(there, encoded(x, *cache, kind, tokens)), shape

        cache, staging = legal_cache(3, shape, kind), random_x(4, shape)
        x_there = move(library, staging.copy())
        assert kv_decode(*moved(library, *cache), x_there, kind=kind, start=start, width=width, rows=rows) is None
        assert same_bits(host(x_there), decoded(*cache, staging, kind, tokens)), shape


# (shape, lengths, width, block table)
PAGED = [
    ((3, 4, 1, 64), [0], 1, [[2]]),
    ((5, 4, 2, 64), [3, 6], 3, [[4, 1, 0], [0, 2, 3]]),
    ((6, 16, 1, 128), [0, 17, 31], 12, [[5, 1, 0], [2, 3, 0], [2, 4, 1]]),
    ((4, 3, 1, 64), [2, 0], 7, [[3, 0, 1], [2, 1, 0]]),
    ((4, 5, 3, 32), [1, 4], 2, [[3, 0], [2, 1]]),
    ((4, 256, 1, 32), [255, 0], 2, [[3, 0], [2, 1]]),
]


@on_both
@on_every_kind
def test_tokens_of_pages(library, kind):
    for shape, lengths, width, table in PAGED:
        lengths, table = np.array(lengths, np.int32), np.array(table, np.int32)
        lengths_there, table_there = moved(library, lengths, table)
        x, cache = random_x(1, shape), random_cache(2, shape, kind)
        there = moved(library, *copy_of(*cache))
        options = {"kind": kind, "lengths": lengths_there, "block_table": table_there}
        assert kv_encode_paged(move(library, x), *there, width=width, **options) is None
        tokens = page_tokens(shape, [(n, n + width) for n in lengths.tolist()], table)
        assert all_same(there, encoded(x, *cache, kind, tokens)), shape

        cache, staging = legal_cache(3, shape, kind), random_x(4, shape)
        x_there = move(library, staging.copy())
        assert kv_decode_paged(*moved(library, *cache), x_there, **options) is None
        tokens = page_tokens(shape, [(0, n) for n in lengths.tolist()], table)
        assert same_bits(host(x_there), decoded(*cache, staging, kind, tokens)), shape


def test_the_oracle_rejects_other_ranges():
    shape = (2, 6, 1, 32)
    x, cache = random_x(1, shape), random_cache(2, shape, "q4")
    there = copy_of(*cache)
    kv_encode(x, *there, kind="q4", start=1, width=2)
    assert all_same(there, encoded(x, *cache, "q4", row_tokens(shape, 1, 2, 2)))
    assert all_same(there, encoded(x, *cache, "q4", row_tokens(shape, 0, 4, 2)))  # rounded outward
    for start, width, rows in ((1, 2, 1), (1, 1, 2), (0, 5, 2), (2, 2, 2)):
        assert not all_same(there, encoded(x, *cache, "q4", row_tokens(shape, start, width, rows)))


@on_both
def test_recorded_fp8(library):
    inputs, outputs, arguments = golden("cache")["fp8"]
    x, q = inputs["x"], move(library, np.zeros_like(outputs["q"]))
    where = {"kind": "fp8", "start": arguments["offset"], "width": arguments["width"], "rows": arguments["batch_size"]}
    kv_encode(move(library, x), q, None, **where)
    assert same_bits(host(q), outputs["q"])
    y = move(library, np.zeros_like(outputs["y"]))
    kv_decode(q, None, y, **where)
    assert same_bits(host(y), outputs["y"])


@on_both
@pytest.mark.parametrize("case", ["q_kv_4", "q_kv_6", "q_kv_8"])
def test_recorded_rows(library, case):
    inputs, outputs, arguments = golden("cache")[case]
    for side in "kv":
        kind = "q8" if arguments["wbits"] == 8 or (arguments["wbits"] == 6 and side == "k") else "q4"
        where = {"kind": kind, "start": arguments["offset"], "width": arguments["width"], "rows": arguments["batch_size"]}
        codes, scales = moved(library, *(np.zeros_like(outputs[side + part]) for part in "qs"))
        kv_encode(move(library, inputs[side]), codes, scales, **where)
        assert all_same((codes, scales), (outputs[side + "q"], outputs[side + "s"]))
        y = move(library, np.zeros_like(outputs[side]))
        kv_decode(codes, scales, y, **where)
        assert same_bits(host(y), outputs[side])


@on_both
@pytest.mark.parametrize("case", ["paged_4", "paged_8"])
def test_recorded_pages(library, case):
    inputs, outputs, arguments = golden("cache")[case]
    kind, page_size, slots = f"q{arguments['wbits']}", arguments["page_size"], inputs["slots"]
    shape = (5, page_size, *inputs["k_rows"].shape[1:])
    for side in "kv":
        x = np.zeros(shape, np.float16)
        x.reshape(-1, *shape[2:])[slots] = inputs[f"{side}_rows"]
        codes, scales = moved(
            library, np.zeros(code_shape(shape, kind), np.uint8), np.zeros(scale_shape(shape, kind), np.float16)
        )
        lengths, table = moved(library, inputs["cache_seqlens"], inputs["block_table"])
        width = arguments["new_tokens"]
        kv_encode_paged(move(library, x), codes, scales, kind=kind, lengths=lengths, width=width, block_table=table)
        expected = [np.zeros(host(a).shape, host(a).dtype) for a in (codes, scales)]
        for array, part in zip(expected, "qs", strict=True):
            array.reshape(-1, *array.shape[2:])[slots] = outputs[side + part]
        assert all_same((codes, scales), expected)
        y, ends = move(library, np.zeros(shape, np.float16)), move(library, inputs["cache_seqlens"] + np.int32(width))
        kv_decode_paged(codes, scales, y, kind=kind, lengths=ends, block_table=table)
        assert same_bits(host(y).reshape(-1, *shape[2:])[slots], outputs[side])


@on_both
def test_recorded_blocks(library):
    inputs, outputs, _ = golden("element")["q4"]
    codes, scales = encode_blocks(move(library, inputs["x"]), "q4")
    assert all_same((codes, scales), (outputs["q"], outputs["scales"]))
    assert same_bits(host(decode_blocks(codes, scales, "q4")), outputs["y"].ravel())


@on_both
@pytest.mark.parametrize("kind", ["q4", "q8"])
@pytest.mark.parametrize("chunks", [0, 1, 2, 3, 63, 64, 65, 129, 260])
def test_blocks(library, kind, chunks):
    x = random_x(chunks, (chunks, 64))
    expected = kv_cache.encode(x, kind)
    codes, scales = encode_blocks(move(library, x), kind)
    assert all_same((codes, scales), expected)
    assert same_bits(host(decode_blocks(codes, scales, kind)), kv_cache.decode(*expected, kind))
    given = moved(library, np.zeros_like(expected[0]), np.zeros_like(expected[1]))
    back = encode_blocks(move(library, x), kind, codes=given[0], scales=given[1])
    assert back[0] is given[0] and back[1] is given[1] and all_same(back, expected)
    out = move(library, np.zeros(x.size, np.float16))
    assert decode_blocks(*given, kind, out=out) is out and same_bits(host(out), kv_cache.decode(*expected, kind))


@on_both
def test_nothing_to_do(library):
    x, (codes, scales) = (
        move(library, np.ones((2, 4, 1, 64), np.float16)),
        moved(library, *random_cache(1, (2, 4, 1, 64), "q4")),
    )
    before = copy_of(host(codes), host(scales))
    table, none = move(library, np.zeros((2, 1), np.int32)), move(library, np.zeros(2, np.int32))
    kv_encode(x, codes, scales, kind="q4", start=4, width=0)
    kv_encode(x, codes, scales, kind="q4", start=0, width=4, rows=0)
    kv_encode_paged(x, codes, scales, kind="q4", lengths=none, width=0, block_table=table)
    kv_encode_paged(x, codes, scales, kind="q4", lengths=none[:0], width=1, block_table=table[:0])
    assert all_same((codes, scales), before)
    kv_decode(codes, scales, x, kind="q4", start=0, width=0)
    kv_decode(codes, scales, x, kind="q4", start=0, width=1, rows=0)
    kv_decode_paged(codes, scales, x, kind="q4", lengths=none, block_table=table)
    assert np.all(host(x) == 1)
    empty = (move(library, np.ones(s, t)) for s, t in (((0, 4, 1, 64), np.float16), ((0, 4, 1, 64), np.uint8)))
    kv_encode(*empty, move(library, np.ones((0, 4, 1, 2), np.float16)), kind="q8", start=0, width=4)


# --- the arithmetic of the kernel -------------------------------------------------------------------------------------


def test_quotients_by_the_rounded_reciprocal():
    """Rounded to float16 they are the rounded quotients, for every pair of significands: exponents change nothing.

    (Quotients that are subnormal in float16 do: but from 2^-14 down, u * L + L is L.)
    """
    significands = np.arange(1024, 2048)
    reciprocals = np.float32(1) / significands.astype(np.float32)
    products = (significands.astype(np.float32)[:, None] * reciprocals).astype(np.float16)
    # The quotient as an integer of 11 bits and a remainder: shifted so that it lies from 1024 to 2047.
    t, a = significands[:, None], significands[None, :]
    shift = np.where(t >= a, 10, 11)
    quotient, rest = np.divmod(t << shift, a)
    exact = quotient + ((2 * rest > a) | ((2 * rest == a) & (quotient % 2 == 1)))
    np.testing.assert_array_equal(products.astype(np.float64) * 2.0**shift, exact)


def test_small_quotients_place_at_the_middle():
    for levels in (8, 128):
        u = np.array([2.0**-14], np.float16)
        assert np.float16(np.float64(u[0]) * levels + levels) == levels


# --- caches as codes --------------------------------------------------------------------------------------------------


@on_both
@on_every_kind
def test_cache_codes(library, kind):
    shape = (3, 4, 2, 64)
    codes, scales = legal_cache(1, shape, kind)
    there = CacheCodes(kind, *moved(library, codes, scales))
    assert there.shape == shape and there.head_dim == 64 and there.nbytes == codes.nbytes + getattr(scales, "nbytes", 0)
    assert there.xp.__name__ == library and there.xp is CacheCodes.zeros(there.xp, shape, kind).xp
    expected = kv_cache.decode(codes, scales, kind).reshape(shape)
    assert same_bits(host(there.dense), expected)
    for index, rows in ((1, slice(1, 2)), (-1, slice(2, 3)), (slice(1, 3), slice(1, 3)), (slice(None), slice(None))):
        part = there[index]
        assert part.kind == kind and part.shape == (len(expected[rows]), *shape[1:])
        assert same_bits(host(part.dense), expected[rows])
    there[1].codes[...] = 0  # a view
    assert not host(there.codes)[1].any() and same_bits(host(there.codes)[::2], codes[::2])
    arrays = cache_arrays(k=there, v=there.codes, w=None)
    assert list(arrays) == ["k.codes", "k.scales", "v", "w"]
    assert arrays["k.codes"] is there.codes and arrays["k.scales"] is there.scales and arrays["v"] is there.codes
    zeros = CacheCodes.zeros(there.xp, shape, kind)
    assert zeros.shape == shape and not host(zeros.codes).any()
    assert zeros.codes.shape == codes.shape and (zeros.scales is None or zeros.scales.shape == scales.shape)
    assert not host(zeros.dense).any() and zeros != CacheCodes(kind, zeros.codes, zeros.scales) and zeros == zeros


@on_both
def test_cache_codes_refuse(library):
    codes, scales = (move(library, np.zeros(s, t)) for s, t in (((2, 4, 1, 64), np.uint8), ((2, 4, 1, 2), np.float16)))
    refused(lambda: CacheCodes("fp16", codes), ValueError, 'kind must be "fp8", "e4m3", "q4" or "q8", got \'fp16\'')
    refused(lambda: CacheCodes("fp8", [1]), TypeError, "codes must be a NumPy or CuPy array")
    refused(lambda: CacheCodes("fp8", scales), TypeError, "codes must have dtype uint8")
    refused(lambda: CacheCodes("fp8", codes[0]), ValueError, "codes must have 4 dimensions")
    refused(lambda: CacheCodes("fp8", codes[:, ::2]), ValueError, "codes must be C-contiguous")
    refused(lambda: CacheCodes("fp8", codes, scales), ValueError, "scales must be None for fp8")
    refused(lambda: CacheCodes("q8", codes), ValueError, "scales must be given for q8, got None")
    refused(lambda: CacheCodes("e4m3", codes, scales), ValueError, r"scales must have shape \(2, 4, 1, 1\), got \(2, 4, 1, 2\)")
    refused(lambda: CacheCodes("q4", codes, scales), ValueError, r"scales must have shape \(2, 4, 1, 4\), got \(2, 4, 1, 2\)")
    refused(lambda: CacheCodes("q8", codes, scales.view(np.int16)), TypeError, "scales must have dtype float16")
    odd = move(library, np.zeros((2, 4, 1, 96), np.uint8))
    refused(lambda: CacheCodes("q8", odd, scales), UnsupportedError, "a multiple of 64, got 96: take kind e4m3 or fp8")
    refused(lambda: CacheCodes.zeros(np, (1, 1, 1, 32), "q4"), UnsupportedError, "a multiple of 64, got 32")
    good = CacheCodes("q8", codes, scales)
    refused(lambda: good[:, 1], TypeError, "an index of CacheCodes must be a whole number or a slice of rows, got tuple")
    with pytest.raises(AttributeError):
        good.kind = "fp8"


@on_both
def test_numbers_of_every_integer_kind_are_taken(library):
    """Also of those that cannot hold the sum of two of them."""
    x, (codes, _) = random_x(1, (2, 300, 1, 64)), random_cache(2, (2, 300, 1, 64), "fp8")
    found = []
    for kind in (int, np.int64, np.uint8):
        there = move(library, codes.copy())
        kv_encode(move(library, x), there, None, kind="fp8", start=kind(200), width=kind(100), rows=kind(2))
        found.append(host(there))
    assert not same_bits(found[0], codes) and same_bits(found[1], found[0]) and same_bits(found[2], found[0])
    paged = [move(library, codes.copy()) for _ in range(2)]
    for there, kind in zip(paged, (int, np.uint8), strict=True):
        where = {"lengths": move(library, np.array([40], np.int32)), "block_table": move(library, np.array([[0, 1]], np.int32))}
        kv_encode_paged(move(library, x), there, None, kind="fp8", width=kind(255), **where)
    assert not same_bits(host(paged[0]), codes) and same_bits(host(paged[1]), host(paged[0]))


# --- errors -----------------------------------------------------------------------------------------------------------


def refused(call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


REFUSED_SHAPE = (2, 4, 1, 64)


def caller(library, op, **good):
    """call(**changed) of op with good arguments but for the changed ones, arrays on that library."""
    codes, scales = random_cache(1, REFUSED_SHAPE, "q4")
    good = {"x": np.ones(REFUSED_SHAPE, np.float16), "codes": codes, "scales": scales, "kind": "q4"} | good

    def call(**changed):
        given = good | changed
        return op(**{name: move(library, a) if isinstance(a, np.ndarray) else a for name, a in given.items()})

    return call


@on_both
@pytest.mark.parametrize("op", [kv_encode, kv_decode])
def test_refusals(library, op):
    call = caller(library, op, start=0, width=4)
    x, scales = np.ones(REFUSED_SHAPE, np.float16), np.ones((2, 4, 1, 2), np.float16)
    wide = np.ones(REFUSED_SHAPE, np.uint8)
    refused(lambda: call(kind="q6"), ValueError, 'kind must be "fp8", "e4m3", "q4" or "q8", got \'q6\'')
    refused(lambda: call(x=x.astype(np.float32)), TypeError, "x must have dtype float16")
    refused(lambda: call(x=x[0]), ValueError, "x must have 4 dimensions")
    refused(lambda: call(x=[1.0]), TypeError, "x must be a NumPy or CuPy array")
    refused(lambda: call(codes=wide.view(np.int8)), TypeError, "codes must have dtype uint8")
    refused(lambda: call(kind="q8"), ValueError, r"codes must have shape \(2, 4, 1, 64\)")
    refused(lambda: call(scales=None), ValueError, "scales must be given for q4")
    refused(lambda: call(scales=scales[:1]), ValueError, "scales must have shape")
    refused(lambda: call(scales=scales.astype(np.float32)), TypeError, "scales must have dtype float16")
    refused(lambda: call(kind="fp8", codes=wide), ValueError, "scales must be None for fp8")
    odd_dim, odd_chunks = np.ones((2, 4, 1, 48), np.float16), np.ones((1, 3, 1, 32), np.float16)
    refused(lambda: call(x=odd_dim), ValueError, "x must have a head_dim .* multiple of 32 for q4, got 48")
    refused(lambda: call(x=odd_chunks), ValueError, "x must hold whole chunks of 64 values, got shape .* even")
    refused(lambda: call(rows=3), ValueError, "rows must be from 0 to 2, got 3")
    refused(lambda: call(start=-1), ValueError, "start must be from 0 to 4, got -1")
    refused(lambda: call(start=2, width=3), ValueError, "width must be from 0 to 2, got 3")
    refused(lambda: call(width=1.0), TypeError, "width must be a whole number, got float")
    memory = move(library, np.zeros(1024, np.uint8))
    overlapping = {"x": memory.view(np.float16).reshape(REFUSED_SHAPE), "codes": memory[:256].reshape(2, 4, 1, 32)}
    refused(lambda: call(**overlapping), ValueError, "(x|codes) overlaps (x|codes)")
    strided = move(library, np.ones((2, 8, 1, 64), np.float16))[:, ::2]
    refused(lambda: call(x=strided), ValueError, "x must be C-contiguous")


@on_both
@pytest.mark.parametrize("op", [kv_encode_paged, kv_decode_paged])
def test_paged_refusals(library, op):
    width = {"width": 1} if op is kv_encode_paged else {}
    call = caller(library, op, lengths=np.zeros(2, np.int32), block_table=np.zeros((2, 1), np.int32), **width)
    call()
    refused(lambda: call(kind="q5"), ValueError, "kind must be")
    refused(lambda: call(lengths=np.zeros(2, np.int64)), TypeError, "lengths must have dtype int32")
    refused(lambda: call(lengths=np.zeros(3, np.int32)), ValueError, "lengths must have shape")
    refused(lambda: call(block_table=np.zeros(2, np.int32)), ValueError, "block_table must have 2 dimensions")
    refused(lambda: call(block_table=np.zeros((2, 1), np.int64)), TypeError, "block_table must have dtype int32")
    if width:
        refused(lambda: call(width=-1), ValueError, "width must be from 0 to")
    memory = move(library, np.zeros(2048, np.uint8))
    overlapping = {
        "x": memory[:1024].view(np.float16).reshape(REFUSED_SHAPE),
        "codes": memory[1024:1280].reshape(2, 4, 1, 32),
        "lengths": memory[1016:1024].view(np.int32) if op is kv_decode_paged else memory[1272:1280].view(np.int32),
    }
    refused(lambda: call(**overlapping), ValueError, "overlaps lengths")


@on_both
def test_block_refusals(library):
    x, codes, scales = moved(library, np.ones(64, np.float16), np.zeros(32, np.uint8), np.zeros(2, np.float16))
    refused(lambda: encode_blocks(x, "fp8"), ValueError, 'kind must be "q4" or "q8", got \'fp8\'')
    refused(lambda: encode_blocks(x[:32], "q4"), ValueError, "x must hold a multiple of 64 values, got 32")
    refused(lambda: encode_blocks(codes, "q4"), TypeError, "x must have dtype float16")
    refused(lambda: encode_blocks(x, "q8", codes=codes), ValueError, "codes must have shape")
    refused(lambda: encode_blocks(x, "q4", scales=x), ValueError, "scales must have shape")
    refused(lambda: encode_blocks(x, "q4", scales=x[:2]), ValueError, "scales overlaps x")
    refused(lambda: decode_blocks(codes[:16], scales, "q4"), ValueError, "codes must hold a multiple of 32 bytes of q4, got 16")
    refused(lambda: decode_blocks(codes, scales, "q8"), ValueError, "codes must hold a multiple of 64 bytes of q8, got 32")
    refused(lambda: decode_blocks(codes, x, "q4"), ValueError, "scales must hold 2 values, one for 32 codes, got 64")
    refused(lambda: decode_blocks(codes, scales, "q4", out=x[:32]), ValueError, "out must have shape")
    refused(lambda: decode_blocks(x, scales, "q4"), TypeError, "codes must have dtype uint8")


def test_numpy_refuses_tables_that_lead_outside():
    shape = (3, 4, 1, 64)
    x, cache = random_x(1, shape), random_cache(2, shape, "q4")
    there, staging = copy_of(*cache), x.copy()
    for lengths, table, message in [
        ([0, -1], [[0], [1]], r"lengths\[1\] must be 0 or more, got -1"),
        ([0, 4], [[0], [1]], r"block_table has 1 pages of 4 tokens, sequence 1 needs 5 tokens: widen it"),
        ([1, 1], [[0], [3]], r"block_table\[1, 0\] must be 0 to 2, a page of the cache, got 3"),
        ([1, 5], [[0, 0], [1, -1]], r"block_table\[1, 1\] must be 0 to 2, a page of the cache, got -1"),
    ]:
        lengths, table = np.array(lengths, np.int32), np.array(table, np.int32)
        where = {"kind": "q4", "block_table": table}
        refused(lambda n=lengths, w=where: kv_encode_paged(x, *there, lengths=n, width=1, **w), ValueError, message)
        ends = np.where(lengths > 0, lengths + 1, lengths).astype(np.int32)
        refused(lambda n=ends, w=where: kv_decode_paged(*cache, staging, lengths=n, **w), ValueError, message)
    assert all_same(there, cache) and same_bits(staging, x)  # nothing is written before the checks
    # Entries that no token needs may be anything.
    unused = np.array([[0, 99], [1, -5]], np.int32)
    kv_encode_paged(x, *there, kind="q4", lengths=np.array([0, 3], np.int32), width=1, block_table=unused)


def test_refuses_read_only_outputs():
    x, (codes, scales) = np.ones((1, 1, 1, 64), np.float16), random_cache(1, (1, 1, 1, 64), "q4")
    for array in (x, codes, scales):
        array.flags.writeable = False
    where = {"kind": "q4", "start": 0, "width": 1}
    refused(lambda: kv_encode(x, codes, scales.copy(), **where), ValueError, "codes is read-only")
    refused(lambda: kv_encode(x, codes.copy(), scales, **where), ValueError, "scales is read-only")
    refused(lambda: kv_decode(codes, scales, x, **where), ValueError, "x is read-only")


# --- the kernels against the reference --------------------------------------------------------------------------------


def banded_all(cupy, arrays, shift):
    pairs = [(None, lambda: None) if a is None else banded(cupy, a, shift) for a in arrays]

    def check():
        for _, check_one in pairs:
            check_one()

    return tuple(array for array, _ in pairs), check


@pytest.mark.gpu
@on_every_kind
@pytest.mark.parametrize("shift", [0, 1, 4, 8])
def test_kernel_at_the_seams(cupy, kind, shift):
    """Sizes around what a lane, a warp, a block and a round of blocks take; aligned or not; nothing beside is written."""
    shapes = [(1, tokens, 1, 64) for tokens in (1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300)]
    shapes += [(3, 70, 8, 128), (2, 7, 3, 32), (2, 41, 5, 96)]
    for shape in shapes:
        start, width = (0, shape[1]) if shape[0] == 1 else (1, shape[1] - 2)
        where = {"kind": kind, "start": start, "width": width}
        x, cache = random_x(1, shape), random_cache(2, shape, kind)
        there, check = banded_all(cupy, cache, shift)
        kv_encode(on_gpu(cupy, x, shift), *there, **where)
        check()
        kv_encode(x, *cache, **where)
        assert all_same(there, cache), shape

        for cache in (legal_cache(3, shape, kind), random_cache(4, shape, kind)):
            staging = random_x(5, shape)
            x_there, check = banded(cupy, staging, shift)
            kv_decode(*(None if a is None else on_gpu(cupy, a, shift) for a in cache), x_there, **where)
            check()
            kv_decode(*cache, staging, **where)
            assert same_bits(x_there.get(), staging), shape


@pytest.mark.gpu
@on_every_kind
@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
def test_kernel_on_pages(cupy, kind, page_size):
    """A pool of pages in random order, sequences of every kind of length, aligned or not."""
    rng = np.random.default_rng(page_size)
    for (kv_heads, head_dim), shift in [((2, 64), 0), ((1, 128), 1), ((3, 32), 0)]:
        pages, max_pages = 24, 5
        shape = (pages, page_size, kv_heads, head_dim)
        table = rng.permutation(pages)[: 4 * max_pages].reshape(4, max_pages).astype(np.int32)
        table = np.concatenate((table, table[:1]))  # a sequence that shares its pages
        for width in (1, page_size, page_size + 1, 2 * page_size + 3):
            room = max_pages * page_size - width
            lengths = np.minimum([0, room, room // 2, page_size - 1, 0], room).astype(np.int32)
            x, cache = random_x(1, shape), random_cache(2, shape, kind)
            there, check = banded_all(cupy, cache, shift)
            tables = {"lengths": cupy.asarray(lengths), "block_table": cupy.asarray(table)}
            kv_encode_paged(on_gpu(cupy, x, shift), *there, kind=kind, width=width, **tables)
            check()
            kv_encode_paged(x, *cache, kind=kind, width=width, lengths=lengths, block_table=table)
            assert all_same(there, cache)
        for lengths in ([0, 1, page_size, page_size + 1, 0], [5 * page_size, 3 * page_size - 1, 0, 2, 4 * page_size]):
            lengths = np.minimum(lengths, max_pages * page_size).astype(np.int32)
            cache, staging = legal_cache(3, shape, kind), random_x(4, shape)
            x_there, check = banded(cupy, staging, shift)
            there = (None if a is None else on_gpu(cupy, a, shift) for a in cache)
            tables = {"lengths": cupy.asarray(lengths), "block_table": cupy.asarray(table)}
            kv_decode_paged(*there, x_there, kind=kind, **tables)
            check()
            kv_decode_paged(*cache, staging, kind=kind, lengths=lengths, block_table=table)
            assert same_bits(x_there.get(), staging)


@pytest.mark.gpu
@on_every_kind
def test_tables_that_lead_outside(cupy, kind):
    """Such pages and sequences are left out; the others are there, and nothing else is touched."""
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    for shape in ((4, 4, 1, 64), (4, 4, 1, 32)):
        table = np.array([[0, 4], [-1, 1], [2, high], [low, 3], [1, 0], [3, 2]], np.int32)
        lengths = np.array([3, 3, 2, 6, -2, high], np.int32)
        x, cache = random_x(1, shape), random_cache(2, shape, kind)
        there, check = banded_all(cupy, cache, 0)
        tables = {"lengths": cupy.asarray(lengths), "block_table": cupy.asarray(table)}
        kv_encode_paged(cupy.asarray(x), *there, kind=kind, width=3, **tables)
        check()
        tokens = page_tokens(shape, [(n, n + 3) for n in lengths.tolist()], table)
        assert tokens and all_same(there, encoded(x, *cache, kind, tokens))

        cache = legal_cache(3, shape, kind)
        x_there, check = banded(cupy, x)
        kv_decode_paged(*moved("cupy", *cache), x_there, kind=kind, **tables)
        check()
        tokens = page_tokens(shape, [(0, min(max(n, 0), 8)) for n in lengths.tolist()], table)
        assert same_bits(x_there.get(), decoded(*cache, x, kind, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["q4", "q8"])
def test_kernel_on_many_values(cupy, kind):
    """4 million values of many magnitudes: quotients and roundings that a small tensor does not meet."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((1 << 16, 64)) * 2.0 ** rng.uniform(-24, 10, (1 << 16, 1))).astype(np.float16)
    expected = kv_cache.encode(x, kind)
    there = encode_blocks(cupy.asarray(x), kind)
    assert all_same(there, expected)
    assert same_bits(decode_blocks(*there, kind).get(), kv_cache.decode(*expected, kind))


@pytest.mark.gpu
def test_e4m3_kernel_on_every_float16(cupy):
    """Every value as a code under the scale 1, and as the largest of a head with smaller ones, so that it makes the scale."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    small = every[np.abs(every) <= 448]  # without NaN
    alone = np.full((-(-small.size // 63), 64), 448, np.float16)
    alone[:, 1:] = np.resize(small, (len(alone), 63))
    with np.errstate(all="ignore"):
        beside = np.stack(
            [(every.astype(np.float32) * f).astype(np.float16) for f in (1, -0.9, 0.3, 1 / 7, 0.01, 1e-3, 0, -1)], 1
        )
    for x in (alone, beside):
        x = x.reshape(1, 1, *x.shape)
        expected = kv_cache.encode(x, "e4m3")
        there = cupy.zeros(x.shape, np.uint8), cupy.zeros((*x.shape[:3], 1), np.float16)
        kv_encode(cupy.asarray(x), *there, kind="e4m3", start=0, width=1)
        assert np.array_equal(there[0].get().ravel(), expected[0]) and same_bits(there[1].get().ravel(), expected[1])
        back = cupy.zeros(x.shape, np.float16)
        kv_decode(*there, back, kind="e4m3", start=0, width=1)
        assert same_bits(back.get().ravel(), kv_cache.decode(*expected, "e4m3"))
    # Every code under many scales, also those that encoding never gives.
    codes = np.tile(np.arange(256, dtype=np.uint8), 256).reshape(1, 1, 256, 256)
    scales = np.arange(1 << 16, dtype=np.uint16)[:: 1 << 8].view(np.float16).reshape(1, 1, 256, 1)
    back = cupy.zeros(codes.shape, np.float16)
    kv_decode(cupy.asarray(codes), cupy.asarray(scales), back, kind="e4m3", start=0, width=1)
    assert same_bits(back.get().ravel(), kv_cache.decode(codes, scales, "e4m3"))


@pytest.mark.gpu
def test_kernel_on_more_rows_than_a_grid_is_high(cupy):
    shape = (70_001, 1, 1, 9)
    x = random_x(1, shape)
    codes = cupy.zeros(shape, np.uint8)
    kv_encode(cupy.asarray(x), codes, None, kind="fp8", start=0, width=1)
    assert np.array_equal(codes.get(), x.view(np.uint16) >> 8)
    back = cupy.zeros(shape, np.float16)
    kv_decode(codes, None, back, kind="fp8", start=0, width=1, rows=70_000)
    expected = x.view(np.uint16) & 0xFF00
    expected[70_000] = 0
    assert np.array_equal(back.get().view(np.uint16), expected)
    # A table with far more pages than any sequence has.
    pages = 30
    table = np.tile(np.arange(pages, dtype=np.int32), (3, 1000))
    lengths = np.array([0, 130, 61], np.int32)
    cache, staging = legal_cache(2, (pages, 7, 1, 64), "q4"), np.zeros((pages, 7, 1, 64), np.float16)
    x_there = cupy.asarray(staging)
    tables = {"lengths": cupy.asarray(lengths), "block_table": cupy.asarray(table)}
    kv_decode_paged(*moved("cupy", *cache), x_there, kind="q4", **tables)
    kv_decode_paged(*cache, staging, kind="q4", lengths=lengths, block_table=table)
    assert same_bits(x_there.get(), staging)


@pytest.mark.gpu
@on_every_kind
def test_offsets_beyond_32_bits(cupy, kind):
    """More than 2^31 values: the last page of a pool of 4.3 GB."""
    shape = (2**31 // (256 * 1024) + 2, 256, 8, 128)
    last = shape[0] - 1
    x, codes = cupy.empty(shape, np.float16), cupy.empty(code_shape(shape, kind), np.uint8)
    scales = None if kind == "fp8" else cupy.empty(scale_shape(shape, kind), np.float16)
    values = random_x(1, (1, 256, 8, 128))
    x[last] = cupy.asarray(values[0])
    table = cupy.asarray(np.array([[last]], np.int32))
    start, end = (cupy.asarray(np.array([n], np.int32)) for n in (0, 256))
    kv_encode_paged(x, codes, scales, kind=kind, lengths=start, width=256, block_table=table)
    expected = kv_cache.encode(values, kind)
    assert np.array_equal(codes[last].get().ravel(), expected[0])
    if scales is not None:
        assert same_bits(scales[last].get().ravel(), expected[1])
    x[last] = 0
    kv_decode_paged(codes, scales, x, kind=kind, lengths=end, block_table=table)
    decoded_page = kv_cache.decode(*expected, kind)
    assert same_bits(x[last].get().ravel(), decoded_page)
    # The same memory as one row of tokens.
    one = (1, shape[0] * 256, 8, 128)
    x[last] = 0
    rows = codes.reshape(code_shape(one, kind)), None if scales is None else scales.reshape(scale_shape(one, kind))
    kv_decode(*rows, x.reshape(one), kind=kind, start=last * 256, width=256)
    assert same_bits(x[last].get().ravel(), decoded_page)


@pytest.mark.gpu
def test_into_a_graph_and_the_same_bits_again(cupy):
    """Nothing inside waits for the host or allocates: the ops replay from a CUDA graph."""
    shape = (6, 16, 2, 64)
    x, cache = random_x(1, shape), random_cache(2, shape, "q8")
    x_there, codes, scales = moved("cupy", x, *cache)
    table, lengths = cupy.asarray(np.array([[5, 1], [0, 2]], np.int32)), cupy.asarray(np.array([3, 15], np.int32))
    where = {"kind": "q8", "lengths": lengths, "block_table": table}

    def step():
        kv_encode_paged(x_there, codes, scales, width=2, **where)
        kv_decode_paged(codes, scales, x_there, **where)

    step()  # compiles
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        stream.begin_capture()
        step()
        graph = stream.end_capture()
    for there, values in zip((x_there, codes, scales), (x, *cache), strict=True):
        there.set(values)
    cupy.cuda.runtime.deviceSynchronize()
    graph.launch(stream)
    stream.synchronize()
    where = {"kind": "q8", "lengths": lengths.get(), "block_table": table.get()}
    kv_encode_paged(x, *cache, width=2, **where)
    kv_decode_paged(*cache, x, **where)
    assert all_same((x_there, codes, scales), (x, *cache))


def test_grids():
    """Pure arithmetic of the launch: at least a block, and no more along y than CUDA allows."""
    for name, kind, block in (("kv_encode", "q4", 4096), ("kv_decode", "q4", 8192), ("kv_decode", "q8", 4096)):
        assert kv_codec._grid(name, kind, 1, 1) == (1, 1)
        assert kv_codec._grid(name, kind, block, 2) == (1, 2) and kv_codec._grid(name, kind, block + 1, 2) == (2, 2)
        assert kv_codec._grid(name, kind, 64, 100_000) == (1, 65535)
    kinds = {str(i) for i in kv_codec.INSTANCES}
    assert kinds == {f"{n}<{k}, {a}>" for n, k, a in itertools.product(("kv_encode", "kv_decode"), KINDS, ("true", "false"))}
