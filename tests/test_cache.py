"""layers/cache.py: what each kind keeps, pages and who owns them, and attention through all of them."""

import copy
import random

import numpy as np
import pytest
from kernel_checks import host, on_both
from layer_checks import close, make_attention, numbers
from test_models import loaded

from cupyq.errors import UnsupportedError
from cupyq.formats import kv_cache
from cupyq.layers import CACHE_KINDS, HeadNorm, KVCache, PagedKVCache, Step
from cupyq.models import model as model_module
from cupyq.models.warmup import trace_kernels
from cupyq.ops.rope import rope_tables

KINDS = list(CACHE_KINDS)
CODES = KINDS[1:]
SIZES = {"layers": 2, "kv_heads": 2, "head_dim": 64, "dtype": np.float16}
TABLES = rope_tables(64, 128, theta=100.0)


def contiguous(kind="fp16", batch=2, capacity=20, xp=np, **sizes):
    return KVCache(xp, batch=batch, capacity=capacity, kind=kind, **SIZES | sizes)


def paged(kind="fp16", pages=12, page_size=4, batch=2, max_pages=5, xp=np, **sizes):
    return PagedKVCache(xp, pages=pages, page_size=page_size, batch=batch, max_pages=max_pages, kind=kind, **SIZES | sizes)


def arrays_of(cache):
    """Every array of a cache."""
    parts = (*cache.k, *cache.v)
    arrays = [array for part in parts for array in (part.codes, part.scales)] if cache.holds_codes else parts
    return [array for array in arrays if array is not None]


def spoil(cache):
    """What has not been written must not be read: NaN, in every number and scale."""
    for array in arrays_of(cache):
        array[...] = 0x7F if array.dtype == np.uint8 else np.nan


# --- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "of_keys", "of_values"),  # bytes of one head of 64
    [("fp16", 128, 128), ("fp8", 64, 64), ("e4m3", 66, 66), ("q4", 36, 36), ("q6", 68, 36), ("q8", 68, 68)],
)
def test_bytes(kind, of_keys, of_values):
    for cache, slots in ((contiguous(kind, capacity=24), 48), (paged(kind), 48)):
        assert sum(part.nbytes for part in cache.k) == 2 * 2 * of_keys * slots
        assert sum(part.nbytes for part in cache.v) == 2 * 2 * of_values * slots
        assert cache.nbytes == 2 * 2 * (of_keys + of_values) * slots
        assert cache.bytes_per_token == 2 * 2 * (of_keys + of_values)
        assert cache.kind == kind and cache.holds_codes == (kind != "fp16")
        assert all(not array.view(np.uint8).any() for array in arrays_of(cache))


def test_keys_are_finer_than_values_in_q6():
    cache = contiguous("q6")
    assert [part.kind for part in cache.k] == ["q8"] * 2 and [part.kind for part in cache.v] == ["q4"] * 2
    assert cache.k[0].shape == cache.v[0].shape == (2, 24, 2, 64)  # 20 and what aligns rows of scales
    assert cache.capacity == 20


@pytest.mark.parametrize("make", [contiguous, paged])
def test_kinds_that_are_refused(make):
    for kind in ("fp32", None, ["q4"], "Q4"):
        with pytest.raises(ValueError, match="kind must be one of fp16, fp8, e4m3, q4, q6, q8, got"):
            make(kind)
    for kind in ("q4", "q6", "q8"):
        with pytest.raises(UnsupportedError, match="multiple of 64, got 96"):
            make(kind, head_dim=96)
    for kind in ("fp16", "fp8", "e4m3"):
        assert make(kind, head_dim=96).head_dim == 96


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_shares_its_memory(kind):
    cache = contiguous(kind, batch=3)
    part = cache.row(1)
    assert part.batch == 1 and part.length == 0 and part.kind == kind and part.block_table is None
    spoil(part)
    for array in arrays_of(cache):
        assert array[1].view(np.uint8).any() and not array[[0, 2]].view(np.uint8).any()


def test_an_error_takes_back_what_was_appended():
    cache, pages = contiguous(), paged()
    cache.advance(3)
    pages.make_room(7)
    pages.row(1).advance(3)
    for kept in (cache, pages):
        with pytest.raises(MemoryError), kept.kept_on_error():
            kept.advance(4)
            raise MemoryError
        with kept.kept_on_error():
            kept.advance(1)
    assert cache.length == 4 and pages.lengths == (1, 4)


# --- pages ------------------------------------------------------------------------------------------------------------


def test_pages_come_as_they_are_needed_and_go_back():
    cache = paged()
    table = cache.block_table
    assert cache.capacity == 20 and cache.free_pages == 12 and (table == -1).all() and table.dtype == np.int32
    cache.reserve(1, 9)
    assert cache.pages_of(1) == [0, 1, 2] and cache.pages_of(0) == [] and cache.lengths == (0, 0)
    assert table.tolist() == [[-1] * 5, [0, 1, 2, -1, -1]]
    cache.reserve(1, 12)
    cache.reserve(1, 3)  # never takes any back
    assert cache.pages_of(1) == [0, 1, 2]
    cache.make_room(1)
    assert cache.pages_of(0) == [3] and cache.free_pages == 8
    cache.advance(1)
    assert cache.lengths == (1, 1) and cache.length == 1
    cache.release(1)
    assert cache.lengths == (1, 0) and cache.free_pages == 11 and cache.block_table is table
    assert table.tolist() == [[3, -1, -1, -1, -1], [-1] * 5]
    cache.truncate(0, 0)
    assert cache.lengths == (0, 0) and cache.pages_of(0) == [3]


def test_positions_are_those_of_each_row():
    cache = paged()
    cache.make_room(9)
    cache.row(1).advance(5)
    assert cache.positions.tolist() == [0, 5] and cache.kv_lengths(2).tolist() == [2, 7] and cache.length == 5
    assert cache.positions.dtype == cache.kv_lengths(1).dtype == np.int32
    before = cache.positions
    cache.advance(2)
    assert before.tolist() == [0, 5] and cache.lengths == (2, 7)  # an array that is in use does not change
    row = cache.row(1)
    assert row.batch == 1 and row.lengths == (7,) and row.positions.tolist() == [7]
    assert np.shares_memory(row.block_table, cache.block_table) and row.block_table.shape == (1, 5)
    cache.reset()
    assert cache.lengths == (0, 0) and row.lengths == (0,) and cache.free_pages == 6


def test_a_row_takes_pages_for_all_to_see():
    cache = paged()
    row = cache.row(1)
    row.make_room(5)
    row.advance(5)
    assert cache.lengths == (0, 5) and cache.pages_of(1) == row.pages_of(0) == [0, 1]
    assert cache.block_table[1, :3].tolist() == row.block_table[0, :3].tolist() == [0, 1, -1]
    row.release(0)
    assert cache.pages_of(1) == [] and cache.free_pages == 12


def test_running_out_of_pages():
    cache = paged(pages=4)
    cache.reserve(0, 12)
    with pytest.raises(ValueError, match=r"out of pages: row 1 needs 2 more for 5 tokens, 1 of 4 are free; release\(row\)"):
        cache.reserve(1, 5)
    assert cache.pages_of(1) == [] and cache.free_pages == 1
    cache.reserve(1, 4)
    with pytest.raises(ValueError, match="out of pages: row 1 needs 1 more for 5 tokens, 0 of 4"):
        cache.row(1).make_room(5)
    cache.release(0)
    cache.reserve(1, 5)
    assert cache.pages_of(1) == [3, 0]


def test_rows_and_tokens_that_there_are_not():
    cache = paged(capacity=18)
    assert cache.capacity == 18
    reserve, truncate = (lambda row: cache.reserve(row, 1)), (lambda row: cache.truncate(row, 0))
    for call in (cache.release, cache.pages_of, cache.row, reserve, truncate):
        with pytest.raises(ValueError, match="(row|index) must be from 0 to 1, a row of the cache, got 2"):
            call(2)
        with pytest.raises(TypeError, match="must be a whole number, got float"):
            call(1.0)
    with pytest.raises(ValueError, match="tokens must be from 0 to 18, the cache's capacity, got 19"):
        cache.reserve(0, 19)
    cache.make_room(18)
    cache.row(1).advance(17)
    for call in (cache.make_room, cache.advance):
        with pytest.raises(ValueError, match="2 tokens after 17 in row 1 pass its capacity of 18"):
            call(2)
    with pytest.raises(ValueError, match="length must be from 0 to 17, what row 1 holds, got 18"):
        cache.truncate(1, 18)
    with pytest.raises(ValueError, match="tokens must be from 0 to 17, what row 1 holds, got 18"):
        cache.share(1, 0, 18)
    with pytest.raises(ValueError, match=r"to_row must be a row without pages, got 0: release\(0\) it first"):
        cache.share(1, 0, 4)
    with pytest.raises(ValueError, match="to_row must be a row without pages, got 1"):
        cache.share(1, 1, 0)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"pages": 0}, ValueError, "pages must be 1 or more, got 0"),
        ({"batch": -1}, ValueError, "batch must be 1 or more"),
        ({"max_pages": 1.0}, TypeError, "max_pages must be a whole number, got float"),
        ({"page_size": 12}, ValueError, "page_size must be a power of two, got 12"),
        ({"page_size": 0}, ValueError, "page_size must be 1 or more"),
        ({"capacity": 0}, ValueError, "capacity must be 1 or more"),
    ],
)
def test_sizes_that_are_refused(sizes, error, message):
    with pytest.raises(error, match=message):
        paged(**sizes)


def write(cache, row, token, value):
    """A token's keys and values, where the table says."""
    page, slot = cache.block_table[row, token // cache.page_size], token % cache.page_size
    for array in arrays_of(cache):
        array[page, slot] = value


def read(cache, row):
    """The first value of each token of a row; every array must hold the same."""
    tokens = np.arange(cache.lengths[row])
    pages = cache.block_table[row, tokens // cache.page_size]
    assert (pages >= 0).all()
    found = {tuple(array[pages, tokens % cache.page_size][:, -1, -1].tolist()) for array in arrays_of(cache)}
    assert len(found) == 1
    return list(found.pop())


def test_shared_pages_are_copied_before_they_are_written():
    cache = paged(batch=3)
    cache.reserve(0, 10)
    for token in range(10):
        write(cache, 0, token, token)
    cache.row(0).advance(10)
    cache.share(0, 1, 6)
    cache.share(0, 2, 4)
    assert cache.pages_of(1) == cache.pages_of(0)[:2] and cache.pages_of(2) == cache.pages_of(0)[:1]
    assert cache.lengths == (10, 6, 4) and cache.free_pages == 9
    cache.make_room(1)  # row 1 would write into a page of row 0's: a copy; rows 0 and 2 write elsewhere
    assert cache.pages_of(1)[0] == cache.pages_of(0)[0] and cache.pages_of(1)[1] not in cache.pages_of(0)
    assert cache.pages_of(2)[0] == cache.pages_of(0)[0] and len(cache.pages_of(2)) == 2 and cache.free_pages == 7
    write(cache, 1, 6, 100)
    write(cache, 2, 4, 200)
    cache.row(1).advance(1)
    cache.row(2).advance(1)
    assert read(cache, 0) == list(range(10))
    assert read(cache, 1) == [*range(6), 100] and read(cache, 2) == [*range(4), 200]
    cache.truncate(0, 2)
    cache.make_room(1)  # now row 0 would write where the others read
    write(cache, 0, 2, 300)
    cache.row(0).advance(1)
    assert read(cache, 0) == [0, 1, 300] and read(cache, 1)[:4] == read(cache, 2)[:4] == [0, 1, 2, 3]
    for row in range(3):
        cache.release(row)
    assert cache.free_pages == 12


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_each_row_reads_its_own(seed):
    """Random calls, against lists of numbers, and the books of pages after each of them."""
    choose = random.Random(seed)
    cache = paged(batch=4, layers=1, kv_heads=1, head_dim=8)
    texts, counter, refused = [[] for _ in range(4)], 0, 0
    for _ in range(400):
        row, other, what = choose.randrange(4), choose.randrange(4), choose.randrange(12)
        if what < 6:
            count = min(choose.randint(1, 6), 20 - len(texts[row]))
            try:
                cache.row(row).make_room(count)
            except ValueError as error:
                assert "out of pages" in str(error)
                refused += 1
                continue
            for _ in range(count):
                counter = counter % 2000 + 1  # float16 holds it
                write(cache, row, len(texts[row]), counter)
                texts[row].append(counter)
            cache.row(row).advance(count)
        elif what < 8:
            cache.release(row)
            texts[row] = []
        elif what == 8:
            length = choose.randint(0, len(texts[row]))
            cache.truncate(row, length)
            del texts[row][length:]
        elif what == 9:
            cache.defragment()
            used = [page for row in range(4) for page in cache.pages_of(row)]
            assert list(dict.fromkeys(used)) == list(range(12 - cache.free_pages))
        elif row != other:
            cache.release(other)
            count = choose.randint(0, len(texts[row]))
            cache.share(row, other, count)
            texts[other] = texts[row][:count]
        assert cache.lengths == tuple(map(len, texts))
        assert [read(cache, row) for row in range(4)] == texts
        used = [page for row in range(4) for page in cache.pages_of(row)]
        assert cache.free_pages == 12 - len(set(used))
        assert [used.count(page) for page in range(12)] == cache._books.users
        assert sorted({*used, *cache._books.free}) == list(range(12))
    assert refused > 0


@on_both
@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_copied_and_moved_in_every_array(request, library, kind):
    xp = np if library == "numpy" else request.getfixturevalue("cupy")
    cache = paged(kind, pages=5, xp=xp)
    cache.make_room(5)
    arrays = [array.view(np.uint8) for array in arrays_of(cache)]
    for index, bits in enumerate(arrays):
        for page in range(5):
            bits[page] = 10 * index + page
    table, lengths = host(cache.block_table).copy(), cache.lengths

    def check(pages):
        for index, bits in enumerate(arrays):
            expected = 10 * index + np.array(pages)[:, None, None, None]
            assert np.array_equal(host(bits), np.broadcast_to(expected, bits.shape))

    cache.copy_page(3, 1)
    check([0, 3, 2, 3, 4])
    cache.rotate([[0, 2, 3], [1, 4]])
    check([2, 4, 3, 0, 3])
    assert np.array_equal(host(cache.block_table), table) and cache.lengths == lengths and cache.free_pages == 1


# --- attention through them -------------------------------------------------------------------------------------------


def half_layer(xp=np, **options):
    """Attention of two layers' worth of caches, with float16 weights."""
    norms = {f"{name}_norm": HeadNorm(xp.asarray(1 + numbers(64, seed=s, scale=0.3))) for s, name in ((7, "q"), (8, "k"))}
    layer = make_attention(96, 4, 2, head_dim=64, scale=0.125, **norms | options)
    for part in layer.linears():
        part.weight = xp.asarray(part.weight.astype(np.float16))
    return layer


def passed(layer, x, cache, pieces, xp=np):
    """The layer's results for the tokens of x [batch, seq, hidden], piece by piece."""
    tables, found, begin = [xp.asarray(table) for table in TABLES], [], 0
    for piece in pieces:
        cache.make_room(piece)
        step = Step(*tables, cache.positions, cache, cache.kv_lengths(piece))
        found.append(host(layer(xp.asarray(np.ascontiguousarray(x[:, begin : begin + piece])), step)))
        cache.advance(piece)
        begin += piece
    return np.concatenate(found, 1)


def held(cache, layer=1):
    """Keys and values of a cache as [batch, tokens, kv_heads, head_dim] of float16, codes decoded by their definition."""
    both = []
    for part in (cache.k[layer], cache.v[layer]):
        if cache.holds_codes:
            codes, scales = host(part.codes), None if part.scales is None else host(part.scales)
            part = kv_cache.decode(codes, scales, part.kind).reshape(part.shape)
        both.append(host(part))
    if cache.block_table is not None:
        table = np.maximum(host(cache.block_table), 0)
        both = [part[table].reshape(len(table), -1, *part.shape[2:]) for part in both]
    return both


def expected_of(layer, x, kind):
    """The layer's results in float64, over keys and values that went through codes, with q as the layer projects it."""
    batch, seq, _ = x.shape
    q, *both = layer.project(x, Step(*TABLES, np.zeros(batch, np.int32)))
    for index, codes in enumerate(CACHE_KINDS[kind]):
        if codes is not None:
            both[index] = kv_cache.decode(*kv_cache.encode(both[index], codes), codes).reshape(both[index].shape)
    k, v = (np.repeat(part.astype(np.float64), 2, axis=2) for part in both)
    scores = np.einsum("bihd,bjhd->bhij", q.astype(np.float64), k) * layer.scale
    scores[:, :, np.triu(np.ones((seq, seq), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
    return mixed.reshape(batch, seq, -1) @ layer.o.weight.astype(np.float64).T, both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [contiguous, paged])
def test_attention_through_every_cache(make, kind):
    """The codes are those of the format's definition, and what is attended to is what they decode to."""
    layer, x = half_layer(), numbers(2, 11, 96, scale=2.0).astype(np.float16)
    expected, both = expected_of(layer, x, kind)
    for pieces in ([11], [4, 1, 1, 5], [1] * 11):
        cache = make(kind)
        spoil(cache)
        found = passed(layer, x, cache, pieces)
        assert found.dtype == np.float16 and close(found.astype(np.float64), expected, 1e-3)
        for part, wanted in zip(held(cache), both, strict=True):
            assert np.array_equal(part[:, :11], wanted)
        untouched = make(kind)
        spoil(untouched)
        for array, same in zip(arrays_of(cache), arrays_of(untouched), strict=True):
            assert (array.view(np.uint8) == same.view(np.uint8)).mean() >= 0.4  # the other layer, and what comes later
    for other in KINDS:
        if other != kind:
            assert not close(found.astype(np.float64), expected_of(layer, x, other)[0], 1e-3), other


def test_float32_goes_into_codes_by_way_of_float16():
    layer, x = make_attention(96, 4, 2, head_dim=64, scale=0.125), numbers(2, 6, 96)
    exact = passed(layer, x, contiguous(dtype=np.float32), [6])
    for kind, error in {"q8": 0.01, "e4m3": 0.06, "q4": 0.15}.items():
        cache = contiguous(kind, dtype=np.float32)
        found = passed(layer, x, cache, [4, 2])
        assert found.dtype == np.float32 and cache.is_narrower
        assert 1e-4 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < error


def test_sinks_reach_attention():
    layer, x = half_layer(), numbers(2, 5, 96).astype(np.float16)
    without = passed(layer, x, contiguous(), [5])
    layer.sinks = np.full(4, -np.inf, np.float32)
    assert np.array_equal(passed(layer, x, contiguous(), [5]), without)
    layer.sinks = np.full(4, 50.0, np.float32)  # takes all the weight
    assert np.abs(passed(layer, x, contiguous(), [5])).max() < 1e-3


def scattered(cache):
    """The cache, whose pages will be given out in no order."""
    random.Random(3).shuffle(cache._books.free)
    return cache


LARGE = {"page_size": 16, "max_pages": 5, "pages": 12}  # and prompts of more tokens than one tile of the kernels has rows


@on_both
@pytest.mark.parametrize("kind", KINDS)
def test_where_pages_lie_does_not_matter(request, library, kind):
    """In order, scattered, and moved in between: the same bits. And what a contiguous cache gives."""
    xp = np if library == "numpy" else request.getfixturevalue("cupy")
    layer, x = half_layer(xp), numbers(2, 72, 96, scale=2.0).astype(np.float16)
    pieces = [30, 1, 1, 40]
    expected = passed(layer, x, paged(kind, xp=xp, **LARGE), pieces, xp)
    assert np.array_equal(passed(layer, x, scattered(paged(kind, xp=xp, **LARGE)), pieces, xp), expected)
    cache = scattered(paged(kind, xp=xp, **LARGE))
    table = cache.block_table
    first = passed(layer, x[:, :31], cache, pieces[:2], xp)
    before = host(table).copy()
    cache.defragment()
    assert cache.pages_of(0) == [0, 1] and cache.pages_of(1) == [2, 3] and not np.array_equal(host(table), before)
    rest = passed(layer, x[:, 31:], cache, pieces[2:], xp)
    assert np.array_equal(np.concatenate([first, rest], 1), expected)
    found = passed(layer, x, contiguous(kind, capacity=80, xp=xp), pieces, xp)
    if library == "numpy":
        assert np.array_equal(found, expected)
    else:  # small pages may take another kernel
        assert close(found.astype(np.float64), expected.astype(np.float64), 2e-3)


@on_both
@pytest.mark.parametrize("kind", ["fp16", "e4m3", "q6"])
def test_a_shared_beginning_is_as_good_as_an_own_one(request, library, kind):
    """Two texts that part after 24 tokens, in the middle of a page: the second row passes only what is its own."""
    xp = np if library == "numpy" else request.getfixturevalue("cupy")
    layer, x = half_layer(xp), numbers(2, 48, 96, scale=2.0).astype(np.float16)
    x[1, :24] = x[0, :24]
    cache = scattered(paged(kind, xp=xp, **LARGE))
    expected = passed(layer, x, contiguous(kind, capacity=80, xp=xp), [24, 24], xp).astype(np.float64)
    first = passed(layer, x[:1, :24], cache.row(0), [24], xp)
    cache.share(0, 1, 24)
    assert cache.free_pages == 10
    both = passed(layer, x[:, 24:], cache, [24], xp)
    # One row by itself may take other tiles than two: a rounding apart, and so a code here and there.
    tolerance = 1e-3 if library == "numpy" else 1e-2
    assert close(first[0].astype(np.float64), expected[0, :24], tolerance)
    assert close(both.astype(np.float64), expected[:, 24:], tolerance)
    assert cache.pages_of(0)[0] == cache.pages_of(1)[0] and cache.pages_of(0)[1] != cache.pages_of(1)[1]
    assert cache.free_pages == 12 - 5


@on_both
def test_rows_of_different_lengths_in_one_step(request, library):
    xp = np if library == "numpy" else request.getfixturevalue("cupy")
    layer, x = half_layer(xp), numbers(2, 15, 96, scale=2.0).astype(np.float16)
    cache = scattered(paged("q8", xp=xp))
    alone = [passed(layer, x[row : row + 1], contiguous("q8", batch=1, xp=xp), [9, 1, 1, 1, 3], xp)[0] for row in (0, 1)]
    passed(layer, x[:1, :9], cache.row(0), [9], xp)
    passed(layer, x[1:, :9], cache.row(1), [9], xp)
    cache.row(1).truncate(0, 2)
    passed(layer, x[1:, 2:5], cache.row(1), [3], xp)
    assert cache.lengths == (9, 5)
    both = passed(layer, np.stack([x[0, 9:12], x[1, 5:8]]), cache, [1, 1, 1], xp)
    tolerance = 1e-3 if library == "numpy" else 1e-2
    assert close(both[0].astype(np.float64), alone[0][9:12].astype(np.float64), tolerance)
    assert close(both[1].astype(np.float64), alone[1][5:8].astype(np.float64), tolerance)
    assert not close(both[1].astype(np.float64), alone[1][6:9].astype(np.float64), 0.1)


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_through_pages():
    """Prompts of different lengths, row by row; then all rows at once. What rows say is what each says alone."""
    model = loaded("qwen2")
    prompts = [[3, 140, 25, 6, 80], [9, 8], [100, 2, 3, 4, 5, 6, 7]]
    cache = scattered(model.new_paged_cache(20, 3, page_size=4))
    assert cache.capacity == model.config.max_seq_len == 256 and cache.max_pages == 64
    logits = [model.forward(prompt, cache.row(row), last_only=True) for row, prompt in enumerate(prompts)]
    assert cache.lengths == (5, 2, 7)
    tokens = [prompt + [int(found[0, 0].argmax())] for prompt, found in zip(prompts, logits, strict=True)]
    for _ in range(6):
        found = model.forward([[row[-1]] for row in tokens], cache)
        for row, text in enumerate(tokens):
            expected = model.forward(text)[:, -1:]
            assert close(found[row : row + 1].astype(np.float64), expected.astype(np.float64), 1e-5)
            text.append(int(found[row, 0].argmax()))
    assert cache.lengths == (11, 8, 13) and cache.free_pages == 20 - 3 - 2 - 4


def test_a_prefix_is_passed_once():
    model, prefix = loaded("qwen2"), list(range(30, 41))
    cache = scattered(model.new_paged_cache(12, 3, page_size=4))
    model.forward(prefix, cache.row(0))
    before = [array.copy() for array in arrays_of(cache)]
    for row in (1, 2):
        cache.share(0, row, 11)
    assert cache.free_pages == 9
    found = model.forward([[1, 2], [3, 4], [5, 6]], cache)
    assert cache.free_pages == 9 - 2 - 3  # two copies of the page where texts part, and one page more for each
    for row, tail in enumerate(([1, 2], [3, 4], [5, 6])):
        assert close(found[row].astype(np.float64), model.forward(prefix + tail)[0, -2:].astype(np.float64), 1e-5)
    for array, old in zip(arrays_of(cache), before, strict=True):
        assert np.array_equal(array[cache.pages_of(0)[:2]], old[cache.pages_of(0)[:2]])


def test_what_does_not_fit_changes_nothing(monkeypatch):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 4)
    model = loaded("qwen2")
    cache = model.new_paged_cache(4, 1, page_size=4)
    model.forward([1, 2, 3], cache)
    with pytest.raises(ValueError, match="the cache is out of pages: row 0 needs 4 more for 17 tokens, 3 of 4 are free"):
        model.forward(range_of(14), cache)
    assert cache.lengths == (3,) and cache.free_pages == 3
    model.forward(range_of(13), cache)
    with pytest.raises(ValueError, match="out of pages"):
        model.forward([1], cache)
    whole = model.new_paged_cache(2, 1, page_size=256)
    assert whole.max_pages == 1
    two = model.new_paged_cache(2, 1, max_pages=2, page_size=256)
    model.forward(range_of(256), two)
    with pytest.raises(ValueError, match="1 tokens after 256 in row 0 pass its capacity of 256"):
        model.forward([1], two)  # there are pages, but the model's context ends
    with pytest.raises(ValueError, match="cache has 3 rows and ids 1"):
        model.forward([1], model.new_paged_cache(4, 3))
    with pytest.raises(ValueError, match="cache is another model's"):
        model.forward([1], paged(batch=1))
    with pytest.raises(TypeError, match="pages must be a whole number, got str"):
        model.new_paged_cache("4")


def test_kernels_are_compiled_with_the_first_cache_of_a_kind(monkeypatch):
    model, asked = copy.copy(loaded("qwen2")), []
    model.xp, model._compiled_caches = "some GPU's", {"fp16"}

    def compile_kernels(for_model, cache):
        assert for_model is model
        for_model.prepare_cache(cache)  # as finding the kernels will
        asked.append(cache)
        if len(asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "compile_kernels", compile_kernels)
    for kind in ("fp16", "q4", "q4"):
        model.prepare_cache(kind)
    with pytest.raises(KeyboardInterrupt):
        model.prepare_cache("q8")
    model.prepare_cache("q8")
    model.prepare_cache("q8")
    assert asked == ["q4", "q8", "q8"]
    assert trace_kernels(loaded("qwen2"), cache="q6") == []  # NumPy launches nothing


@pytest.mark.parametrize("kind", CODES)
def test_greedy_text_through_every_cache(kind):
    """The first tokens are those of the exact cache: the codes cost little."""
    model = loaded("shakespeare-exl2-4.0")
    exact = model.forward(PROMPT + [11, 12], model.new_cache())[0, -1]
    cache = model.new_cache(capacity=20, kind=kind)
    model.forward(PROMPT, cache)
    found = model.forward([11, 12], cache)[0, -1]
    assert found.argmax() == exact.argmax()
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < {"q8": 1e-2, "e4m3": 4e-2}.get(kind, 0.1)


PROMPT = [3, 140, 25, 6, 80]


def range_of(count):
    return np.arange(count)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [contiguous, paged])
def test_attention_through_every_cache_on_the_gpu(cupy, make, kind):
    layer, x = half_layer(), numbers(2, 18, 96, scale=2.0).astype(np.float16)
    cache = make(kind, xp=cupy)
    assert all(isinstance(array, cupy.ndarray) for array in arrays_of(cache))
    found = passed(half_layer(cupy), x, cache, [7, 1, 1, 9], cupy)
    expected, both = expected_of(layer, x, kind)
    # A key that the GPU rounds to the float16 next to NumPy's may fall into the next code.
    step = {"fp16": 3e-3, "fp8": 2e-2, "e4m3": 1e-2, "q4": 3e-2, "q6": 2e-2, "q8": 1e-2}[kind]
    assert close(found.astype(np.float64), expected, step)
    for part, wanted in zip(held(cache), both, strict=True):
        assert close(part[:, :18].astype(np.float64), wanted.astype(np.float64), step)
    assert host(cache.kv_lengths(0)).tolist() == [18, 18]


@pytest.mark.gpu
def test_pages_are_copied_on_the_gpu(cupy):
    for kind in ("fp16", "e4m3", "q4"):
        cache = paged(kind, xp=cupy)
        cache.row(0).make_room(6)
        for index, array in enumerate(arrays_of(cache)):
            array[...] = index + 1
        cache.row(0).advance(6)
        cache.share(0, 1, 6)
        table = cache.block_table.data.ptr
        cache.make_room(1)
        assert cache.block_table.data.ptr == table
        assert host(cache.block_table)[:, :3].tolist() == [[0, 2, -1], [0, 1, -1]]
        for index, array in enumerate(arrays_of(cache)):
            assert (host(array[1]) == index + 1).all() and (host(array[2]) == index + 1).all()
