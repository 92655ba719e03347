"""qkv_append: against plain loops, and bit for bit against head_norm, rope and kv_append one after the other."""

import math

import numpy as np
import pytest
from cache_checks import banded_cache, copied, full_cache, moved, same_cache, with_parts
from kernel_checks import FLOATS, banded, bfloat16, float16, float32, host, move, on_both, on_gpu, random, same_bits, unwritten

from cupyq.ops.kv_append import kv_append
from cupyq.ops.kv_codec import kv_encode_paged
from cupyq.ops.norm import head_norm
from cupyq.ops.qkv_append import qkv_append
from cupyq.ops.rope import rope, rope_tables


def parts_of(qkv, heads, kv_heads, head_dim):
    """q, k and v [batch, seq, heads, head_dim] as arrays of their own."""
    by_head = qkv.reshape(*qkv.shape[:2], heads + 2 * kv_heads, head_dim)
    return (
        np.ascontiguousarray(by_head[:, :, a:b]) for a, b in ((0, heads), (heads, heads + kv_heads), (heads + kv_heads, None))
    )


def problem(batch, seq, heads, kv_heads, head_dim, pairs, dtype, *, table=float32, seed=0):
    """(qkv, k_cache, v_cache, sin, cos), the caches full of something, one batch row more than needed, 9 + seq positions."""
    qkv = random(seed, (batch, seq, (heads + 2 * kv_heads) * head_dim), dtype)
    caches = (random(seed + i, (batch + 1, 9 + seq, kv_heads, head_dim), dtype) for i in (1, 2))
    angles = random(seed + 3, (9 + seq, pairs), float32, 3.0)
    return (qkv, *caches, np.sin(angles).astype(table), np.cos(angles).astype(table))


def unfused(
    library,
    qkv,
    k_cache,
    v_cache,
    sin,
    cos,
    positions,
    *,
    heads,
    style="neox",
    q_norm=None,
    k_norm=None,
    eps=1e-6,
    block_table=None,
):
    """(q, k_cache, v_cache) by the ops that qkv_append stands for, on that library."""
    q, k, v = (move(library, a) for a in parts_of(qkv, heads, *k_cache.shape[2:]))
    sin, cos, positions, block_table = (move(library, a) for a in (sin, cos, positions, block_table))
    k_cache, v_cache = (moved(library, cache) for cache in (k_cache, v_cache))
    if q_norm is not None:
        q = head_norm(q, move(library, q_norm), eps=eps)
    if k_norm is not None:
        k = head_norm(k, move(library, k_norm), eps=eps)
    if style is not None:
        q, k = (rope(x, sin, cos, positions, style=style) for x in (q, k))
    kv_append(k, v, k_cache, v_cache, positions, block_table=block_table)
    return host(q), *(with_parts(cache, host) for cache in (k_cache, v_cache))


# --- the reference ----------------------------------------------------------------------------------------------------


def loop(head, norm, sin_row, cos_row, style, eps):
    """One head in float64: normed, then turned."""
    y = head.astype(np.float64).tolist()
    if norm is not None:
        scale = 1 / math.sqrt(math.fsum(v * v for v in y) / len(y) + eps)
        y = [v * float(w) * scale for v, w in zip(y, norm, strict=True)]
    pairs = 0 if style is None else len(sin_row)
    for j in range(pairs):
        a, b = (j, j + pairs) if style == "neox" else (2 * j, 2 * j + 1)
        s, c = float(sin_row[j]), float(cos_row[j])
        y[a], y[b] = y[a] * c - y[b] * s, y[b] * c + y[a] * s
    return y


@on_both
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("style", ["neox", "gptj", None])
@pytest.mark.parametrize("norms", ["none", "shared", "per head"])
def test_against_loops(library, dtype, style, norms):
    heads, kv_heads, head_dim, pairs = 4, 2, 12, 4
    qkv, k_cache, v_cache, sin, cos = problem(2, 3, heads, kv_heads, head_dim, pairs, dtype)
    positions = np.array([7, 0], np.int32)
    shapes = {"none": None, "shared": ((12,), (12,)), "per head": ((heads, 12), (kv_heads, 12))}[norms]
    q_norm, k_norm = (None, None) if shapes is None else (random(i, shape, float32) for i, shape in enumerate(shapes))
    tables = (None, None) if style is None else (sin, cos)
    arrays = [move(library, a.copy()) for a in (qkv, k_cache, v_cache)]
    options = {"heads": heads, "style": style, "q_norm": move(library, q_norm), "k_norm": move(library, k_norm), "eps": 1e-3}
    q = host(qkv_append(*arrays, *(move(library, a) for a in (*tables, positions)), **options))
    assert q.shape == (2, 3, heads, head_dim) and q.dtype == dtype
    assert same_bits(host(arrays[0]), qkv), "the input changed"
    new = parts_of(qkv, heads, kv_heads, head_dim)
    tolerance = {float16: 2.0**-9, bfloat16: 2.0**-6, float32: 2.0**-19}[dtype]  # a norm and a rotation, each rounded
    for x, weight, is_v in zip(new, (q_norm, k_norm, None), (False, False, True), strict=True):
        for b, i, h in np.ndindex(x.shape[:3]):
            position = positions[b] + i
            norm = weight[h] if norms == "per head" and weight is not None else weight
            expected = loop(x[b, i, h], norm, sin[position], cos[position], None if is_v else style, 1e-3)
            cache = host(arrays[2 if is_v else 1])
            found = q[b, i, h] if x.shape[2] == heads else cache[b, position, h]
            size = max(1e-3, max(map(abs, expected)))
            np.testing.assert_allclose(found.astype(np.float64), expected, rtol=0, atol=0 if is_v else tolerance * size)
    for before, after in ((k_cache, host(arrays[1])), (v_cache, host(arrays[2]))):
        untouched = np.ones(before.shape[:2], bool)
        for b in range(2):
            untouched[b, positions[b] : positions[b] + 3] = False
        assert same_bits(after[untouched], before[untouched])


CASES = [
    # batch, seq, heads, kv_heads, head_dim, pairs
    (1, 1, 1, 1, 2, 1),
    (1, 1, 32, 8, 128, 64),
    (2, 3, 5, 1, 64, 32),
    (3, 1, 4, 2, 80, 20),
    (2, 2, 3, 3, 6, 1),
    (1, 5, 2, 1, 256, 128),
    (1, 2, 3, 1, 300, 100),
    (2, 1, 7, 7, 96, 0),
]


@on_both
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("style", ["neox", "gptj", None])
def test_bits_of_the_ops_one_after_the_other(library, dtype, style):
    for number, (batch, seq, heads, kv_heads, head_dim, pairs) in enumerate(CASES):
        table = (float32, float16)[number % 2]
        *arrays, sin, cos = problem(batch, seq, heads, kv_heads, head_dim, pairs, dtype, table=table, seed=number)
        tables = (None, None) if style is None else (sin, cos)
        positions = np.random.default_rng(number).integers(0, 10, batch).astype(np.int32)
        q_norm, k_norm = random(7, head_dim, float32), random(8, (kv_heads, head_dim), float32)
        for norms in ((None, None), (q_norm, k_norm), (q_norm.astype(dtype), None), (None, k_norm.astype(dtype))):
            options = {"heads": heads, "style": style, "q_norm": norms[0], "k_norm": norms[1], "eps": 1e-4}
            expected = unfused(library, *arrays, *tables, positions, **options)
            there = [move(library, None if a is None else a.copy()) for a in (*arrays, *tables, positions)]
            q = qkv_append(*there, **{name: move(library, value) for name, value in options.items()})
            assert same_bits(host(q), expected[0]), (number, norms)
            assert same_bits(host(there[1]), expected[1]) and same_bits(host(there[2]), expected[2]), (number, norms)


# (kinds, dtype, style, (batch, seq, heads, kv_heads, head_dim, pairs))
CODES = [
    (("q4", "q4"), float16, "neox", (2, 1, 4, 1, 64, 32)),
    (("q8", "q8"), float16, "neox", (1, 3, 7, 2, 128, 64)),
    (("q8", "q4"), float16, "gptj", (2, 2, 3, 3, 192, 20)),
    (("q8", "q4"), bfloat16, "neox", (3, 1, 32, 8, 128, 64)),
    (("fp8", "fp8"), float16, "neox", (1, 2, 3, 1, 80, 20)),
    (("e4m3", "e4m3"), float16, "neox", (2, 2, 5, 2, 128, 64)),
    (("e4m3", "fp8"), bfloat16, "neox", (2, 1, 3, 3, 6, 1)),
    (("q4", "e4m3"), float32, None, (1, 5, 2, 1, 256, 128)),
    (("dense", "q8"), float16, "neox", (2, 3, 4, 2, 64, 32)),
    (("e4m3", "dense"), bfloat16, None, (2, 3, 4, 2, 96, 48)),
    (("dense", "dense"), float16, "neox", (2, 3, 4, 2, 64, 32)),
]
PAGES, PAGE_SIZE = 12, 4


def paged_problem(kinds, dtype, sizes, seed=0):
    """(qkv, k_cache, v_cache, sin, cos), positions and a block table; values from 2^-10 to 2^10 of the usual."""
    batch, seq, heads, kv_heads, head_dim, pairs = sizes
    qkv, *_, sin, cos = problem(*sizes, dtype, seed=seed)
    factors = 2.0 ** np.random.default_rng(seed).integers(-10, 11, (*qkv.shape[:2], heads + 2 * kv_heads, 1))
    qkv = (qkv.reshape(*factors.shape[:3], head_dim).astype(np.float64) * factors).astype(np.float32).astype(dtype)
    caches = (full_cache(i, (PAGES, PAGE_SIZE, kv_heads, head_dim), kind, dtype) for i, kind in enumerate(kinds))
    rng = np.random.default_rng(seed + 9)
    positions = rng.integers(0, min(3 * PAGE_SIZE - seq, 9) + 1, batch).astype(np.int32)  # within the tables, too
    table = rng.permutation(PAGES)[: 3 * batch].reshape(batch, 3).astype(np.int32)
    return (qkv.reshape(batch, seq, -1), *caches, sin, cos), positions, table


@on_both
@pytest.mark.parametrize("kinds, dtype, style, sizes", CODES, ids=lambda v: "-".join(v) if v in [c[0] for c in CODES] else None)
def test_codes_and_pages(library, kinds, dtype, style, sizes):
    """The bits of the ops one after the other: kinds of codes, in pages and as rows."""
    arrays, positions, table = paged_problem(kinds, dtype, sizes)
    if style is None:
        arrays = (*arrays[:3], None, None)
    k_norm = random(8, sizes[4], dtype)
    for norm, block_table in ((None, table), (k_norm, table), (None, None)):
        options = {"heads": sizes[2], "style": style, "k_norm": norm, "block_table": block_table}
        if block_table is None:  # the pages are then rows
            if sizes[1] > PAGE_SIZE:
                continue
            positions = np.minimum(positions, PAGE_SIZE - sizes[1]).astype(np.int32)
        expected = unfused(library, *arrays, positions, **options)
        there = [None if a is None else moved(library, a) for a in (*arrays, positions)]
        q = qkv_append(*there, **{name: move(library, value) for name, value in options.items()})
        assert same_bits(host(q), expected[0])
        for i in (1, 2):
            assert same_cache(there[i], expected[i]) and not same_cache(there[i], arrays[i])


@on_both
def test_codes_are_those_of_kv_encode(library):
    """Of the turned keys and of the values in a float16 cache."""
    arrays, positions, table = paged_problem(("q8", "q4"), float16, (2, 3, 4, 2, 64, 32))
    there = [moved(library, a) for a in (*arrays, positions)]
    qkv_append(*there, heads=4, block_table=move(library, table))
    _, k, v = parts_of(arrays[0], 4, 2, 64)
    sin, cos, first = (move(library, a) for a in (*arrays[3:], positions))
    for i, new in ((1, host(rope(move(library, k), sin, cos, first))), (2, v)):
        staged, expected = np.zeros((PAGES, PAGE_SIZE, 2, 64), float16), copied(arrays[i])
        for b, t in np.ndindex(2, 3):
            position = positions[b] + t
            staged[table[b, position // PAGE_SIZE], position % PAGE_SIZE] = new[b, t]
        kv_encode_paged(
            staged, expected.codes, expected.scales, kind=expected.kind, lengths=positions, width=3, block_table=table
        )
        assert same_cache(there[i], expected)


def test_the_comparison_bites():
    """Bits change where the norm is left out, its rounding skipped, or a table shifted by a row."""
    *arrays, sin, cos = problem(1, 4, 4, 2, 16, 8, float16)
    norm, positions = random(7, 16, float32), np.array([2], np.int32)
    options = {"heads": 4, "q_norm": norm, "k_norm": norm}
    q = qkv_append(*(a.copy() for a in arrays), sin, cos, positions, **options)
    expected, *_ = unfused("numpy", *arrays, sin, cos, positions, **options)
    assert same_bits(q, expected)
    wrong = [
        unfused("numpy", *arrays, sin, cos, positions, heads=4)[0],
        unfused("numpy", *arrays, sin, cos, positions, **options | {"eps": 1e-2})[0],
        unfused("numpy", *arrays, sin, cos, positions, **options | {"style": "gptj"})[0],
        unfused("numpy", *arrays, np.roll(sin, 1, axis=0), np.roll(cos, 1, axis=0), positions, **options)[0],
        rope(head_norm(next(parts_of(arrays[0], 4, 2, 16)).astype(np.float32), norm), sin, cos, positions).astype(float16),
    ]
    assert not any(same_bits(q, y) for y in wrong)


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_misaligned_arrays_between_sentinels(cupy, dtype):
    """Everything at odd addresses: the same bits, and nothing outside of the outputs is written."""
    qkv, k_cache, v_cache, sin, cos = problem(2, 3, 4, 2, 64, 16, dtype)
    positions, norm = np.array([7, 2], np.int32), random(7, 64, float32)
    options = {"heads": 4, "q_norm": norm, "k_norm": norm}
    expected = unfused("cupy", qkv, k_cache, v_cache, sin, cos, positions, **options)
    for shift in (0, 1, 2):
        k_there, check_k = banded(cupy, k_cache, shift)
        v_there, check_v = banded(cupy, v_cache, shift)
        out, check_q = banded(cupy, unwritten((2, 3, 4, 64), dtype), shift)
        norms = {name: on_gpu(cupy, norm, shift) for name in ("q_norm", "k_norm")}
        rest = (on_gpu(cupy, a, shift) for a in (sin, cos, positions))
        for _ in range(2):  # bits repeat
            assert qkv_append(on_gpu(cupy, qkv, shift), k_there, v_there, *rest, heads=4, **norms, out=out) is out
            rest = (on_gpu(cupy, a, shift) for a in (sin, cos, positions))
            for check in (check_q, check_k, check_v):
                check()
            for found, wanted in zip((out, k_there, v_there), expected, strict=True):
                assert same_bits(found.get(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1, 2, 4])
def test_misaligned_codes_between_sentinels(cupy, shift):
    for kinds, dtype, style, sizes in (CODES[0], CODES[5], (("q8", "fp8"), bfloat16, "neox", (2, 1, 3, 2, 128, 32))):
        arrays, positions, table = paged_problem(kinds, dtype, sizes)
        expected = unfused("cupy", *arrays, positions, heads=sizes[2], style=style, block_table=table)
        caches, checks = zip(*(banded_cache(cupy, cache, shift) for cache in arrays[1:3]), strict=True)
        qkv, *rest = (on_gpu(cupy, a, shift) for a in (arrays[0], *arrays[3:], positions))
        q = qkv_append(qkv, *caches, *rest, heads=sizes[2], style=style, block_table=on_gpu(cupy, table, shift))
        for check in checks:
            check()
        assert same_bits(q.get(), expected[0])
        assert all(same_cache(found, wanted) for found, wanted in zip(caches, expected[1:], strict=True))


@pytest.mark.gpu
def test_tables_that_lead_outside(cupy):
    """Of pages that are not there and positions outside, k and v are dropped; q is turned all the same."""
    sizes = (4, 3, 2, 1, 64, 32)
    (qkv, *caches, sin, cos), _, _ = paged_problem(("q8", "e4m3"), float16, sizes)
    info = np.iinfo(np.int32)
    table = np.array([[0, PAGES], [-1, 1], [2, info.max], [info.min, 3]], np.int32)
    positions = np.array([3, 2, 6, 0], np.int32)
    there = [with_parts(cache, cupy.asarray) for cache in caches]
    where = [cupy.asarray(a) for a in (sin, cos, positions)]
    q = qkv_append(cupy.asarray(qkv), *there, *where, heads=2, block_table=cupy.asarray(table))
    expected = unfused("cupy", qkv, *caches, sin, cos, positions, heads=2, block_table=table)
    assert same_bits(q.get(), expected[0])
    for i, (found, cache) in enumerate(zip(there, caches, strict=True)):
        assert same_cache(found, expected[i + 1])
        changed = [page for page in range(PAGES) if not np.array_equal(found.codes[page].get(), cache.codes[page])]
        assert changed == [0, 1]  # token 3 of row 0, tokens 4 of row 1; nothing of rows 2 and 3


@pytest.mark.gpu
def test_tokens_outside(cupy):
    """Outside the caches k and v are dropped; outside the tables q and k become NaN. Nothing else is touched."""
    qkv, k_cache, v_cache, sin, cos = problem(4, 3, 2, 1, 8, 4, float16)
    info = np.iinfo(np.int32)
    positions = np.array([10, -2, info.max, info.min], np.int32)
    k_there, check_k = banded(cupy, k_cache)
    v_there, check_v = banded(cupy, v_cache)
    q = qkv_append(on_gpu(cupy, qkv), k_there, v_there, *(on_gpu(cupy, a) for a in (sin[:11], cos[:11], positions)), heads=2)
    check_k()
    check_v()
    tokens = positions[:, None].astype(np.int64) + np.arange(3)
    is_known = (tokens >= 0) & (tokens < 11)
    assert np.array_equal(np.isnan(q.get()).all(axis=(2, 3)), ~is_known) and not np.isnan(q.get()[is_known]).any()
    _, k, v = parts_of(qkv, 2, 1, 8)
    expected_v = v_cache.copy()
    for b, i in np.argwhere((tokens >= 0) & (tokens < 12)):
        expected_v[b, tokens[b, i]] = v[b, i]
    assert same_bits(v_there.get(), expected_v)
    k_after = k_there.get()
    assert np.isnan(k_after[0, 11]).all() and not np.isnan(k_after[0, :11]).any()
    assert same_bits(k_after[2:], k_cache[2:])


@pytest.mark.gpu
def test_many_tokens(cupy):
    qkv = random(1, (1, 70_001, 3 * 8), float16)
    caches = [cupy.asarray(np.zeros((1, 70_005, 1, 8), np.float16)) for _ in range(2)]
    sin, cos = rope_tables(8, 70_005)
    q = qkv_append(cupy.asarray(qkv), *caches, *(cupy.asarray(a) for a in (sin, cos, np.array([3], np.int32))), heads=1)
    expected = unfused("cupy", qkv, *(np.zeros((1, 70_005, 1, 8), np.float16),) * 2, sin, cos, np.array([3], np.int32), heads=1)
    for found, wanted in zip((q, *caches), expected, strict=True):
        assert same_bits(found.get(), wanted)


# --- both paths -------------------------------------------------------------------------------------------------------


def test_numpy_refuses_what_does_not_fit():
    qkv, k_cache, v_cache, sin, cos = problem(2, 3, 2, 1, 4, 2, float16)
    before = k_cache.copy(), v_cache.copy()
    with pytest.raises(ValueError, match=r"positions\[1\] is 10: 3 tokens .* a cache of capacity 12"):
        qkv_append(qkv, k_cache, v_cache, sin, cos, np.array([0, 10], np.int32), heads=2)
    with pytest.raises(ValueError, match="token 2 of row 1 at 11, outside the tables of 11 positions"):
        qkv_append(qkv, k_cache, v_cache, sin[:11], cos[:11], np.array([0, 9], np.int32), heads=2)
    assert same_bits(k_cache, before[0]) and same_bits(v_cache, before[1])  # nothing is written before the checks


def good():
    qkv, k_cache, v_cache, sin, cos = problem(2, 3, 4, 2, 8, 4, float16)
    return {"qkv": qkv, "k_cache": k_cache, "v_cache": v_cache, "sin": sin, "cos": cos, "positions": np.zeros(2, np.int32)}


def odd(shape, dtype=np.float16):
    return np.ones(shape, dtype)


REFUSED = {
    "qkv dtype": (TypeError, "qkv must have dtype", {"qkv": odd((2, 3, 64), np.float64)}),
    "qkv dimensions": (ValueError, "qkv must have 3 dimensions", {"qkv": odd((3, 64))}),
    "qkv columns": (ValueError, r"qkv must have \(4 \+ 2 \* 2\) \* 8 = 64 columns", {"qkv": odd((2, 3, 56))}),
    "k_cache dtype": (TypeError, "k_cache must have dtype float16", {"k_cache": odd((3, 12, 2, 8), np.float32)}),
    "k_cache dimensions": (ValueError, "k_cache must have 4 dimensions", {"k_cache": odd((12, 2, 8))}),
    "v_cache dtype": (TypeError, "v_cache must have dtype float16", {"v_cache": odd((3, 12, 2, 8), np.float32)}),
    "v_cache shape": (ValueError, "v_cache must have shape", {"v_cache": odd((3, 11, 2, 8))}),
    "small cache": (
        ValueError,
        "k_cache has room for a batch of 1",
        {"k_cache": odd((1, 12, 2, 8)), "v_cache": odd((1, 12, 2, 8))},
    ),
    "no heads": (ValueError, "heads must be 1 or more", {"heads": 0}),
    "heads not whole": (TypeError, "heads must be a whole number", {"heads": 4.0}),
    "positions dtype": (TypeError, "positions must have dtype int32", {"positions": np.zeros(2, np.int64)}),
    "positions per token": (ValueError, "positions must have shape", {"positions": np.zeros((2, 3), np.int32)}),
    "style": (ValueError, 'style must be "neox", "gptj" or None', {"style": "llama"}),
    "no style but tables": (ValueError, "style None turns nothing", {"style": None}),
    "no tables": (ValueError, 'style "neox" needs both sin and cos', {"sin": None}),
    "sin dtype": (TypeError, "sin must have dtype float32 or float16", {"sin": odd((12, 4), np.float64)}),
    "cos dtype": (TypeError, "cos must have dtype float32", {"cos": odd((12, 4))}),
    "cos shape": (ValueError, "cos must have shape", {"cos": odd((11, 4), np.float32)}),
    "wide tables": (
        ValueError,
        "sin has 5 columns, one per pair, but k_cache's head_dim 8 has fewer pairs",
        {"sin": odd((12, 5), np.float32), "cos": odd((12, 5), np.float32)},
    ),
    "q_norm dtype": (TypeError, "q_norm must have dtype", {"q_norm": odd(8, np.int32)}),
    "q_norm shape": (ValueError, r"q_norm must have shape \(8,\) or \(4, 8\)", {"q_norm": odd((2, 8))}),
    "k_norm shape": (ValueError, r"k_norm must have shape \(8,\) or \(2, 8\)", {"k_norm": odd((4, 8))}),
    "norms of two dtypes": (TypeError, "k_norm must have dtype float16", {"q_norm": odd(8), "k_norm": odd(8, np.float32)}),
    "out shape": (ValueError, "out must have shape", {"out": odd((2, 3, 4, 9))}),
    "out dtype": (TypeError, "out must have dtype float16", {"out": odd((2, 3, 4, 8), np.float32)}),
}


@on_both
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, library):
    error, message, changed = REFUSED[case]
    arguments = {name: move(library, value) for name, value in ({"heads": 4} | good() | changed).items()}
    with pytest.raises(error, match=message):
        qkv_append(**arguments)


def test_numpy_refuses_pages_that_are_not_there():
    arrays, positions, table = paged_problem(("q8", "q4"), float16, (2, 3, 4, 2, 64, 32))
    before = [copied(a) for a in arrays[1:3]]
    positions[:] = 0, 2
    for changed, message in (
        (
            {"block_table": np.where(table == table[1, 1], 12, table)},
            r"block_table\[1, 1\] must be 0 to 11, a page of the cache, got 12",
        ),
        ({"block_table": table[:, :1].copy()}, r"positions\[1\] is 2: 3 tokens .* a cache of capacity 4"),
        ({"block_table": table[:1]}, "block_table has 1 rows, k has a batch of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            qkv_append(*arrays, positions, heads=4, **changed)
    with pytest.raises(ValueError, match="v_cache must be codes of shape"):
        qkv_append(*arrays[:2], arrays[2][:3], *arrays[3:], positions, heads=4)
    with pytest.raises(ValueError, match="k_cache.codes overlaps v_cache.codes"):
        qkv_append(*arrays[:2], arrays[1], *arrays[3:], positions, heads=4)
    assert all(same_cache(*pair) for pair in zip(arrays[1:3], before, strict=True))


@on_both
def test_refuses_overlaps_and_takes_nothing(library):
    arguments = {name: move(library, value) for name, value in good().items()}
    with pytest.raises(ValueError, match="k_cache overlaps v_cache"):
        qkv_append(**arguments | {"v_cache": arguments["k_cache"]}, heads=4)
    with pytest.raises(ValueError, match="out overlaps qkv"):
        qkv_append(**arguments, heads=4, out=arguments["qkv"].reshape(-1)[: 2 * 3 * 32].reshape(2, 3, 4, 8))
    for batch, seq in ((0, 3), (2, 0)):
        empty = {"qkv": move(library, odd((batch, seq, 64))), "positions": move(library, np.zeros(batch, np.int32))}
        assert qkv_append(**arguments | empty, heads=4).shape == (batch, seq, 4, 8)


def test_refuses_a_read_only_cache():
    arguments = good()
    arguments["v_cache"].flags.writeable = False
    with pytest.raises(ValueError, match="v_cache is read-only"):
        qkv_append(**arguments, heads=4)
