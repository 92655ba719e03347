"""Quantized caches of keys and values: encoding new tokens, decoding them again.

`formats/kv_cache.py` defines the bytes. A cache is contiguous, [batch, seq, kv_heads, head_dim], or paged,
[pages, page_size, kv_heads, head_dim] with a block table that names the pages of each sequence.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyq import _device
from cupyq._arrays import byte_bounds, check, float16, int32, namespace, output
from cupyq._foreign import accepts_dlpack
from cupyq._kernels import instance, launch
from cupyq.errors import UnsupportedError
from cupyq.formats import kv_cache
from cupyq.formats.kv_cache import CHUNK, GROUP, KINDS
from cupyq.ops._common import refuse_overlap, shown, whole_number

_UINT8 = np.dtype(np.uint8)
_CHUNKED = ("q4", "q8")  # kinds whose values are encoded by chunks of 64
_MOST_GRID_Y = 65535


@dataclass(frozen=True, eq=False)
class CacheCodes:
    """The keys or the values of a cache as codes: what attention and the appending ops take in place of an array.

    kind "fp8", "e4m3", "q4" or "q8"; codes uint8, contiguous, of the cache's own shape [batch, capacity, kv_heads, head_dim] or
    [pages, page_size, kv_heads, head_dim], for q4 half of that head_dim; scales float16, contiguous: for q4 and q8 of that
    shape with head_dim / 32 in the last place, for e4m3 with 1, for fp8 None. `cupyq.formats.kv_cache` defines the bytes. The
    arrays are not copied. Raises TypeError / ValueError for a wrong kind, dtype, shape or stride, UnsupportedError for a
    head_dim that q4 and q8 cannot hold: their chunks of 64 values must not straddle heads.

    >>> cache = CacheCodes.zeros(np, (1, 4, 2, 64), "q4")
    >>> cache.codes.shape, cache.scales.shape, cache.shape, cache.nbytes
    ((1, 4, 2, 32), (1, 4, 2, 2), (1, 4, 2, 64), 288)
    """

    kind: str
    codes: Any
    scales: Any = None

    def __post_init__(self):
        _check_kind(self.kind)
        namespace(codes=self.codes, scales=self.scales)
        check(self.codes, "codes", dtype=_UINT8, ndim=4)
        _check_chunks_of_heads(self.kind, self.head_dim)
        _check_scales(self.scales, self.kind, self.shape)

    @classmethod
    def zeros(cls, xp, shape, kind):
        """A new cache of zeros for a tensor of that shape."""
        _check_kind(kind)
        _check_chunks_of_heads(kind, shape[-1])
        scale_shape = kv_cache.scale_shape(shape, kind)
        scales = None if scale_shape is None else xp.zeros(scale_shape, float16)
        return cls(kind, xp.zeros(kv_cache.code_shape(shape, kind), _UINT8), scales)

    def __getitem__(self, index):
        """Rows (or pages) of the cache, by an index of its first dimension: a view of the same memory."""
        if isinstance(index, (int, np.integer)):
            index = slice(index, index + 1 or None)
        if not isinstance(index, slice):
            raise TypeError(f"an index of CacheCodes must be a whole number or a slice of rows, got {type(index).__name__}")
        return CacheCodes(self.kind, self.codes[index], None if self.scales is None else self.scales[index])

    @property
    def head_dim(self):
        return self.codes.shape[3] * (2 if self.kind == "q4" else 1)

    @property
    def shape(self):
        """Of the values: [batch, capacity, kv_heads, head_dim] or [pages, page_size, kv_heads, head_dim]."""
        return (*self.codes.shape[:3], self.head_dim)

    @property
    def xp(self):
        """The library of the arrays, `numpy` or `cupy`."""
        return namespace(codes=self.codes)

    @property
    def nbytes(self):
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def dense(self):
        """Everything decoded: a new array of float16 of this shape."""
        x = self.xp.empty(self.shape, float16)
        kv_decode(self.codes, self.scales, x, kind=self.kind, start=0, width=x.shape[1])
        return x


def cache_arrays(**caches):
    """{name: array} of all arrays in caches, each an array, CacheCodes or None: for `namespace` and checks of overlaps.

    >>> list(cache_arrays(k=np.zeros(1), v=CacheCodes.zeros(np, (1, 4, 2, 64), "q4")))
    ['k', 'v.codes', 'v.scales']
    """
    arrays = {}
    for name, cache in caches.items():
        if isinstance(cache, CacheCodes):
            arrays[f"{name}.codes"], arrays[f"{name}.scales"] = cache.codes, cache.scales
        else:
            arrays[name] = cache
    return arrays


@accepts_dlpack(writes=("codes", "scales"))
def kv_encode(x, codes, scales, *, kind, start, width, rows=None):
    """codes, scales = encode(x) for tokens start to start + width of the first `rows` rows (default: all)

    x float16 [batch, seq, kv_heads, head_dim]; kind "fp8", "e4m3", "q4" or "q8"; codes uint8 [batch, seq, kv_heads, head_dim],
    for q4 half of that head_dim; scales float16 [batch, seq, kv_heads, head_dim / 32], for e4m3 [batch, seq, kv_heads, 1], None
    for fp8. Both are written in place, bit for bit as `cupyq.formats.kv_cache` defines, and None is returned.

    q4 and q8 need head_dim to be a multiple of 32. Where kv_heads * head_dim is a multiple of 64 (fp8, e4m3: always), nothing
    but the tokens asked for is read or written. Otherwise the chunks of 64 values straddle tokens: as in exllamav2, the range
    is rounded outward to whole chunks of the flat tensor, a neighbouring token's half of a chunk is encoded again from x,
    and batch * seq must be even, so that the tensor holds whole chunks. Raises TypeError / ValueError for wrong dtypes,
    shapes, strides, ranges or overlapping arguments.

    >>> x = np.ones((1, 2, 1, 64), np.float16)
    >>> codes, scales = np.zeros((1, 2, 1, 32), np.uint8), np.zeros((1, 2, 1, 2), np.float16)
    >>> kv_encode(x, codes, scales, kind="q4", start=1, width=1)
    >>> codes[0, :, 0, 0].tolist(), scales[0, :, 0, 0].tolist()
    ([0, 255], [0.0, 4.0])
    """
    xp = namespace(x=x, codes=codes, scales=scales)
    start, width, rows = _check_contiguous(x, codes, scales, kind, start, width, rows, writes=("codes", "scales"))
    _refuse_overlaps({"codes": codes, "scales": scales}, {"x": x})
    if rows == 0 or width == 0 or x.size == 0:
        return
    if xp is np:
        kv_encode_reference(x, codes, scales, kind, start, width, rows)
    else:
        _launch_contiguous("kv_encode", (x, codes, scales), x.shape, kind, start, width, rows)


def kv_encode_reference(x, codes, scales, kind, start, width, rows):
    for span in _contiguous_spans(x.shape, kind, start, width, rows):
        _encode_span(x, codes, scales, kind, span)


@accepts_dlpack(writes=("x",))
def kv_decode(codes, scales, x, *, kind, start, width, rows=None):
    """x = decode(codes, scales) for tokens start to start + width of the first `rows` rows (default: all)

    Arguments, rules and errors as `kv_encode` has them; here x is written in place. Where kv_heads * head_dim is not a multiple
    of 64, a neighbouring token's half of a chunk is decoded too.

    >>> x = np.zeros((1, 2, 1, 2), np.float16)
    >>> kv_decode(np.array([[[[0x3C, 0x3D]], [[0x3E, 0xBC]]]], np.uint8), None, x, kind="fp8", start=1, width=1)
    >>> x.ravel().tolist()
    [0.0, 0.0, 1.5, -1.0]
    """
    xp = namespace(codes=codes, scales=scales, x=x)
    start, width, rows = _check_contiguous(x, codes, scales, kind, start, width, rows, writes=("x",))
    _refuse_overlaps({"x": x}, {"codes": codes, "scales": scales})
    if rows == 0 or width == 0 or x.size == 0:
        return
    if xp is np:
        kv_decode_reference(codes, scales, x, kind, start, width, rows)
    else:
        _launch_contiguous("kv_decode", (codes, scales, x), x.shape, kind, start, width, rows)


def kv_decode_reference(codes, scales, x, kind, start, width, rows):
    for span in _contiguous_spans(x.shape, kind, start, width, rows):
        _decode_span(codes, scales, x, kind, span)


@accepts_dlpack(writes=("codes", "scales"))
def kv_encode_paged(x, codes, scales, *, kind, lengths, width, block_table):
    """codes, scales = encode(x) for tokens lengths[b] to lengths[b] + width of every sequence b of a paged cache

    x float16 [pages, page_size, kv_heads, head_dim], any page_size; codes, scales and kind as in `kv_encode`, which
    also says what is written where chunks straddle tokens. lengths int32 [batch]: tokens of each sequence before the new
    ones. block_table int32 [batch, max_pages]: token t of sequence b is slot t % page_size of page
    block_table[b, t // page_size], in x as in codes and scales. Sequences may share pages. A negative length, a token
    beyond max_pages or a page that is not in the cache raises ValueError on NumPy, before anything is written; on the GPU,
    where reading them back would stall it, such a sequence or page is left out. Raises TypeError / ValueError for wrong
    dtypes, shapes, strides or overlapping arguments.

    >>> x = np.full((3, 4, 1, 2), 1.5, np.float16)
    >>> codes, table = np.zeros((3, 4, 1, 2), np.uint8), np.array([[2, 0]], np.int32)
    >>> kv_encode_paged(x, codes, None, kind="fp8", lengths=np.array([3], np.int32), width=2, block_table=table)
    >>> codes[:, :, 0, 0].tolist()
    [[62, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 62]]
    """
    xp = namespace(x=x, codes=codes, scales=scales, lengths=lengths, block_table=block_table)
    _check_paged(x, codes, scales, kind, lengths, block_table, writes=("codes", "scales"))
    width = whole_number(width, "width", 0, np.iinfo(np.int32).max)
    _refuse_overlaps({"codes": codes, "scales": scales}, {"x": x, "lengths": lengths, "block_table": block_table})
    if width == 0 or x.size == 0 or block_table.size == 0:
        return
    if xp is np:
        _check_pages(x.shape, lengths, lengths.astype(np.int64) + width, block_table)
        kv_encode_paged_reference(x, codes, scales, kind, lengths, width, block_table)
    else:
        _launch_paged("kv_encode", (x, codes, scales), x.shape, kind, lengths, width, block_table)


def kv_encode_paged_reference(x, codes, scales, kind, lengths, width, block_table):
    for span in _paged_spans(x.shape, kind, [(n, n + width) for n in lengths.tolist()], block_table):
        _encode_span(x, codes, scales, kind, span)


@accepts_dlpack(writes=("x",))
def kv_decode_paged(codes, scales, x, *, kind, lengths, block_table):
    """x = decode(codes, scales) for tokens 0 to lengths[b] of every sequence b of a paged cache

    Arguments, rules and errors as `kv_encode_paged` has them; here x is written in place, and lengths int32 [batch] says
    where each sequence ends. Pages that sequences share in block_table are decoded for each, to the same bits.

    >>> codes, x = np.full((3, 4, 1, 2), 62, np.uint8), np.zeros((3, 4, 1, 2), np.float16)
    >>> ends, table = np.array([2, 0], np.int32), np.array([[1], [0]], np.int32)
    >>> kv_decode_paged(codes, None, x, kind="fp8", lengths=ends, block_table=table)
    >>> x[:, :, 0, 0].tolist()
    [[0.0, 0.0, 0.0, 0.0], [1.5, 1.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    xp = namespace(codes=codes, scales=scales, x=x, lengths=lengths, block_table=block_table)
    _check_paged(x, codes, scales, kind, lengths, block_table, writes=("x",))
    _refuse_overlaps({"x": x}, {"codes": codes, "scales": scales, "lengths": lengths, "block_table": block_table})
    if x.size == 0 or block_table.size == 0:
        return
    if xp is np:
        _check_pages(x.shape, np.zeros_like(lengths), lengths, block_table)
        kv_decode_paged_reference(codes, scales, x, kind, lengths, block_table)
    else:
        _launch_paged("kv_decode", (codes, scales, x), x.shape, kind, lengths, None, block_table)


def kv_decode_paged_reference(codes, scales, x, kind, lengths, block_table):
    for span in _paged_spans(x.shape, kind, [(0, n) for n in lengths.tolist()], block_table):
        _decode_span(codes, scales, x, kind, span)


@accepts_dlpack(writes=("codes", "scales"))
def encode_blocks(x, kind, *, codes=None, scales=None):
    """codes, scales = encode(x) of a flat array of n values, in 4 or 8 bits

    x: float16 of any shape, read flat, n a multiple of 64; kind "q4" or "q8"; codes uint8 [n / 2] for q4, [n] for q8;
    scales float16 [n / 32]. They are defined by `cupyq.formats.kv_cache`, bit for bit. Raises TypeError / ValueError for
    wrong dtypes, shapes, strides or overlapping arguments.

    >>> codes, scales = encode_blocks(np.ones(64, np.float16), "q4")
    >>> codes[:3].tolist(), scales.tolist()
    ([255, 136, 136], [4.0, 0.0])
    """
    xp = namespace(x=x)
    _check_block_kind(kind)
    check(x, "x", dtype=float16)
    if x.size % CHUNK:
        raise ValueError(f"x must hold a multiple of {CHUNK} values, got {x.size}: pad it")
    codes = output(xp, codes, kv_cache.code_shape((x.size,), kind), _UINT8, "codes")
    scales = output(xp, scales, kv_cache.scale_shape((x.size,), kind), float16, "scales")
    _refuse_overlaps({"codes": codes, "scales": scales}, {"x": x})
    if x.size == 0:
        return codes, scales
    if xp is np:
        codes[...], scales[...] = encode_blocks_reference(x, kind)
    else:
        _launch_blocks("kv_encode", (x, codes, scales), x.size, kind)
    return codes, scales


def encode_blocks_reference(x, kind):
    return kv_cache.encode(x, kind)


@accepts_dlpack
def decode_blocks(codes, scales, kind, *, out=None):
    """x = decode(codes, scales): the n values that `encode_blocks` has encoded, but for its roundings

    codes: uint8 of any shape, read flat, n / 2 bytes for kind "q4" and n for "q8", n a multiple of 64; scales: float16 of
    any shape with n / 32 values; x float16 [n]. Raises TypeError / ValueError for wrong dtypes, sizes, strides or an out
    that overlaps codes or scales.

    >>> x = decode_blocks(*encode_blocks(np.ones(64, np.float16), "q8"), "q8")
    >>> x[:3].tolist()
    [0.9921875, 0.9921875, 0.9921875]
    """
    xp = namespace(codes=codes, scales=scales)
    _check_block_kind(kind)
    check(codes, "codes", dtype=_UINT8)
    check(scales, "scales", dtype=float16)
    size = codes.size * (2 if kind == "q4" else 1)
    if size % CHUNK:
        raise ValueError(f"codes must hold a multiple of {CHUNK * codes.size // size} bytes of {kind}, got {codes.size}")
    if scales.size * GROUP != size:
        raise ValueError(f"scales must hold {size // GROUP} values, one for {GROUP} codes, got {scales.size}")
    out = output(xp, out, (size,), float16)
    _refuse_overlaps({"out": out}, {"codes": codes, "scales": scales})
    if size == 0:
        return out
    if xp is np:
        out[...] = decode_blocks_reference(codes, scales, kind)
    else:
        _launch_blocks("kv_decode", (codes, scales, out), size, kind)
    return out


def decode_blocks_reference(codes, scales, kind):
    return kv_cache.decode(codes, scales, kind)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_kind(kind):
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f'kind must be "fp8", "e4m3", "q4" or "q8", got {shown(kind)}')


def _check_block_kind(kind):
    if not isinstance(kind, str) or kind not in ("q4", "q8"):
        raise ValueError(f'kind must be "q4" or "q8", got {shown(kind)}')


def _check_chunks_of_heads(kind, head_dim):
    if kind in _CHUNKED and head_dim % CHUNK:
        raise UnsupportedError(
            f"codes of {kind} need a head_dim that is a multiple of {CHUNK}, got {head_dim}: take kind e4m3 or fp8"
        )


def _check_scales(scales, kind, shape, writes=False):
    if kind == "fp8":
        if scales is not None:
            raise ValueError("scales must be None for fp8, which has none")
    elif scales is None:
        raise ValueError(f"scales must be given for {kind}, got None")
    else:
        check(scales, "scales", dtype=float16, shape=kv_cache.scale_shape(shape, kind), writes=writes)


def _check_cache(x, codes, scales, kind, writes):
    _check_kind(kind)
    check(x, "x", dtype=float16, ndim=4, writes="x" in writes)
    head_dim = x.shape[3]
    if kind in _CHUNKED:
        if head_dim % GROUP:
            raise ValueError(
                f"x must have a head_dim (last dimension) that is a multiple of {GROUP} for {kind}, got {head_dim}"
            )
        if x.size % CHUNK:
            raise ValueError(
                f"x must hold whole chunks of {CHUNK} values, got shape {x.shape}: make the product of its first two "
                "dimensions even"
            )
    check(codes, "codes", dtype=_UINT8, shape=kv_cache.code_shape(x.shape, kind), writes="codes" in writes)
    _check_scales(scales, kind, x.shape, writes="scales" in writes)


def _check_contiguous(x, codes, scales, kind, start, width, rows, writes):
    _check_cache(x, codes, scales, kind, writes)
    batch, seq = x.shape[:2]
    rows = batch if rows is None else whole_number(rows, "rows", 0, batch)
    start = whole_number(start, "start", 0, seq)
    return start, whole_number(width, "width", 0, seq - start), rows


def _check_paged(x, codes, scales, kind, lengths, block_table, writes):
    _check_cache(x, codes, scales, kind, writes)
    check(block_table, "block_table", dtype=int32, ndim=2)
    check(lengths, "lengths", dtype=int32, shape=block_table.shape[:1])


def _check_pages(shape, firsts, lasts, block_table):
    """Raise ValueError unless tokens firsts[b] to lasts[b] of every sequence lie in pages of the cache."""
    pages, page_size = shape[:2]
    max_pages = block_table.shape[1]
    for b, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True)):
        if first < 0 or last < 0:
            raise ValueError(f"lengths[{b}] must be 0 or more, got {min(first, last)}")
        if last > max_pages * page_size:
            raise ValueError(
                f"block_table has {max_pages} pages of {page_size} tokens, sequence {b} needs {last} tokens: widen it"
            )
        for logical in range(first // page_size, -(-last // page_size)):
            page = block_table[b, logical]
            if not 0 <= page < pages:
                raise ValueError(f"block_table[{b}, {logical}] must be 0 to {pages - 1}, a page of the cache, got {page}")


def _refuse_overlaps(written, read):
    """Raise ValueError where a written array shares memory with any other: written, read {name: array or None}."""
    arrays = {name: array for name, array in (written | read).items() if array is not None}
    for name in written.keys() & arrays.keys():
        refuse_overlap(arrays[name], name, **{other: array for other, array in arrays.items() if other != name})


# --- references -------------------------------------------------------------------------------------------------------


def _span(first, last, values, kind):
    """The flat values that tokens [first, last) of `values` values each need: for q4 and q8 whole chunks."""
    unit = CHUNK if kind in _CHUNKED else 1
    return first * values // unit * unit, -(-last * values // unit) * unit


def _contiguous_spans(shape, kind, start, width, rows):
    for row in range(rows):
        first = row * shape[1] + start
        yield _span(first, first + width, shape[2] * shape[3], kind)


def _paged_spans(shape, kind, ranges, block_table):
    page_size = shape[1]
    for b, (first, last) in enumerate(ranges):
        for logical in range(first // page_size, -(-last // page_size)):
            before = (int(block_table[b, logical]) - logical) * page_size
            low, high = max(first, logical * page_size), min(last, (logical + 1) * page_size)
            yield _span(before + low, before + high, shape[2] * shape[3], kind)


def _parts(codes, scales, kind, begin, end):
    bytes_ = slice(begin // 2, end // 2) if kind == "q4" else slice(begin, end)
    group = codes.shape[-1] if kind == "e4m3" else GROUP
    return codes.reshape(-1)[bytes_], None if scales is None else scales.reshape(-1)[begin // group : end // group]


def _encode_span(x, codes, scales, kind, span):
    to_codes, to_scales = _parts(codes, scales, kind, *span)
    values = x.reshape(-1)[slice(*span)]
    if kind == "e4m3":
        values = values.reshape(-1, x.shape[-1])
    to_codes[...], encoded_scales = kv_cache.encode(values, kind)
    if to_scales is not None:
        to_scales[...] = encoded_scales


def _decode_span(codes, scales, x, kind, span):
    x.reshape(-1)[slice(*span)] = kv_cache.decode(*_parts(codes, scales, kind, *span), kind)


# --- launching --------------------------------------------------------------------------------------------------------


def _launch_contiguous(name, arrays, shape, kind, start, width, rows):
    batch, seq, kv_heads, head_dim = shape
    values = kv_heads * head_dim
    grid = _grid(name, kind, width * values, rows)
    numbers = (rows, 1, start, width, batch, seq, batch, values, head_dim)
    _launch_codec(name, arrays, kind, grid, (None, None), numbers)


def _launch_paged(name, arrays, shape, kind, lengths, width, block_table):
    pages, page_size, kv_heads, head_dim = shape
    batch, max_pages = block_table.shape
    values = kv_heads * head_dim
    if width is None:  # decoding: whole sequences, whose lengths only the device knows
        pieces, tokens = max_pages, page_size
    else:
        pieces, tokens = min((width - 2 + page_size) // page_size + 1, max_pages), min(width, page_size)
    grid = _grid(name, kind, tokens * values, batch * pieces)
    if width is None:
        # Most pages of the table may be unused: enough blocks to fill the GPU, which stride over them.
        enough = 16 * _device.current().sm_count
        grid = (grid[0], max(1, min(grid[1], enough // grid[0])))
    numbers = (batch, pieces, 0, width or 0, pages, page_size, max_pages, values, head_dim)
    _launch_codec(name, arrays, kind, grid, (lengths, block_table), numbers)


def _launch_blocks(name, arrays, size, kind):
    numbers = (1, 1, 0, size // CHUNK, 1, size // CHUNK, 1, CHUNK, CHUNK)
    _launch_codec(name, arrays, kind, _grid(name, kind, size, 1), (None, None), numbers)


def _grid(name, kind, values, pieces):
    """Blocks along a piece of `values` values, and over pieces; the kernels stride over what a grid does not hold."""
    block_values = 256 * 8 * (4 if (name, kind) == ("kv_decode", "q4") else 2)
    return max(1, -(-values // block_values)), min(pieces, _MOST_GRID_Y)


def _launch_codec(name, arrays, kind, grid, tables, numbers):
    kernel = instance(name, kind, _is_aligned(*arrays) and (kind != "e4m3" or numbers[-1] % 4 == 0))
    launch(kernel, grid, (256,), (*arrays, *tables, *map(np.int32, numbers)))


def _is_aligned(*arrays):
    """Whether a lane can take its 8 values, 16 bytes at most, in one access."""
    return all(a is None or byte_bounds(a)[0] % 16 == 0 for a in arrays)


INSTANCES = [
    instance(name, kind, aligned) for name in ("kv_encode", "kv_decode") for kind in KINDS for aligned in (True, False)
]
"""What `cupyq compile` builds ahead: every kind there is."""
