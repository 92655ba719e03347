"""Keys and values of the tokens seen so far: in one piece for each row or in pages, as numbers or as codes."""

import contextlib
import copy

import numpy as np

from cupyq.ops._common import whole_number
from cupyq.ops.cache_pages import cache_rotate, cycles_of
from cupyq.ops.kv_codec import CacheCodes

CACHE_KINDS = {
    "fp16": (None, None),
    "fp8": ("fp8", "fp8"),
    "e4m3": ("e4m3", "e4m3"),
    "q4": ("q4", "q4"),
    "q6": ("q8", "q4"),
    "q8": ("q8", "q8"),
}
"""What a cache may be made of: the codes of its keys and of its values; None: numbers of the model's own dtype."""


class _Cache:
    """What both caches share: the arrays, k[layer] and v[layer], [slots of two dimensions, kv_heads, head_dim]."""

    block_table = None

    def __init__(self, xp, places, *, layers, kv_heads, head_dim, dtype, kind, workspaces):
        self.kind = check_cache_kind(kind)
        self.xp, self.dtype = xp, np.dtype(dtype)
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.workspaces = workspaces or {}
        shape = (*places, kv_heads, head_dim)
        self.k, self.v = ([self._zeros(shape, codes) for _ in range(layers)] for codes in CACHE_KINDS[kind])

    def _zeros(self, shape, codes):
        return self.xp.zeros(shape, self.dtype) if codes is None else CacheCodes.zeros(self.xp, shape, codes)

    @property
    def holds_codes(self):
        return self.kind != "fp16"

    @property
    def is_narrower(self):
        """Whether it takes float16 from a float32 model: codes are made of 16 bits."""
        return self.holds_codes and self.dtype == np.float32

    @property
    def nbytes(self):
        """Bytes of all keys and values."""
        return sum(array.nbytes for array in (*self.k, *self.v))

    @property
    def bytes_per_token(self):
        """Bytes that the keys and values of one token take, in all layers."""
        return self.nbytes // (self.k[0].shape[0] * self.k[0].shape[1])

    @contextlib.contextmanager
    def kept_on_error(self):
        """A context whose error takes back what was appended in it."""
        before = self._lengths()
        try:
            yield
        except BaseException:
            self._set_lengths(before)
            raise


class KVCache(_Cache):
    """k[layer] and v[layer], each [batch, capacity, kv_heads, head_dim]; the first `length` positions are filled.

    kind: "fp16", arrays of `dtype`, the model's own; or one of codes, each k[layer] and v[layer] a `CacheCodes` then, whose
    capacity is rounded up to a multiple of 8: "fp8" (float16 cut to 8 bits), "e4m3" (8 bits and a scale for each head of a
    token), "q8", "q4" (8 and 4 bits after a Hadamard transform, scales for 32 values; head_dim a multiple of 64), "q6" (keys
    as q8, values as q4).
    All rows of a batch have the same length. What a step needs on the device (where its tokens go, how many keys there
    are) is a row of a table made once, so that a step copies nothing from the host and waits for nothing.
    workspaces: those of a `Step` by their names, kept here as both belong to one stream of work.
    """

    def __init__(self, xp, *, batch, capacity, layers, kv_heads, head_dim, dtype, kind="fp16", workspaces=None):
        self.batch, self.capacity = _counts_from_1(batch=batch, capacity=capacity)
        sizes = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
        places = (self.batch, self.capacity if kind == "fp16" else -(-self.capacity // 8) * 8)  # rows of scales at 16 bytes
        super().__init__(xp, places, dtype=dtype, kind=kind, workspaces=workspaces, **sizes)
        self.length = 0
        # Row i: the number i, once per row of the batch.
        counts = np.arange(self.capacity + 1, dtype=np.int32)[:, None]
        self._counts = xp.asarray(np.ascontiguousarray(np.broadcast_to(counts, (self.capacity + 1, self.batch))))

    def row(self, index):
        """A cache of batch row `index` alone: its memory is shared, its length at first 0 and its own."""
        part = copy.copy(self)
        part.batch, part.length = 1, 0
        part.k, part.v = ([array[index : index + 1] for array in arrays] for arrays in (self.k, self.v))
        part._counts = self._counts[:, :1].copy()
        return part

    @property
    def positions(self):
        """int32 [batch] on the device: `length`, where the next token of each row goes."""
        return self._counts[self.length]

    def kv_lengths(self, new):
        """int32 [batch] on the device: keys of each row once `new` tokens have been appended."""
        return self._counts[self.length + new]

    def check_room(self, new):
        """ValueError unless `new` more tokens fit."""
        if self.length + new > self.capacity:
            raise ValueError(
                f"prompt longer than the cache: {new} tokens after {self.length} pass its capacity of {self.capacity}; "
                f"make one with new_cache(capacity={self.length + new})"
            )

    make_room = check_room  # its memory is there from the start

    def advance(self, new):
        self.check_room(new)
        self.length += new

    def reset(self):
        """Forget all tokens; the memory stays."""
        self.length = 0

    def truncate(self, length):
        """Forget the tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be from 0 to {self.length}, what the cache holds, got {length}")
        self.length = length

    def _lengths(self):
        return self.length

    def _set_lengths(self, before):
        self.length = before


class PagedKVCache(_Cache):
    """k[layer] and v[layer], each [pages, page_size, kv_heads, head_dim]; each row has pages of its own or shares them.

    Token t of row b is slot t % page_size of page block_table[b, t // page_size]: int32 [batch, max_pages] on the device,
    at one address for good, -1 where a row has no page. Which page belongs to whom is decided on the host, between steps:
    `reserve` gives a row pages, `release` takes them back, `share` lets one row begin with the tokens of another, in the
    same pages. A page that several rows use is copied before one of them writes to it. Rows have lengths of their own.
    page_size: a power of two. capacity: the most tokens of a row (default: max_pages * page_size). kind, dtype and
    workspaces are those of `KVCache`.
    """

    def __init__(
        self,
        xp,
        *,
        pages,
        batch,
        max_pages,
        layers,
        kv_heads,
        head_dim,
        dtype,
        page_size=256,
        capacity=None,
        kind="fp16",
        workspaces=None,
    ):
        self.pages, self.page_size, self.batch, self.max_pages = _counts_from_1(
            pages=pages, page_size=page_size, batch=batch, max_pages=max_pages
        )
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {page_size}")
        self.capacity = self.max_pages * self.page_size
        if capacity is not None:
            self.capacity = min(self.capacity, *_counts_from_1(capacity=capacity))
        sizes = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
        super().__init__(xp, (self.pages, self.page_size), dtype=dtype, kind=kind, workspaces=workspaces, **sizes)
        self._books = _PageBooks(self.pages, self.batch, self.max_pages)
        self._whole_table = self.block_table = xp.array(self._books.table)
        self._rows = range(self.batch)

    def row(self, index):
        """Row `index` alone, as a cache of batch 1: the same pages and the same length, which grows there as here."""
        self._check_row(index, "index")
        part = copy.copy(self)
        part.batch, part._rows = 1, (self._rows[index],)
        part.block_table = self.block_table[index : index + 1]
        return part

    # --- lengths ---

    @property
    def lengths(self):
        """Tokens of each row."""
        return tuple(self._lengths())

    @property
    def length(self):
        """Tokens of the longest row."""
        return max(self._lengths())

    @property
    def positions(self):
        """int32 [batch] on the device: where the next token of each row goes. A new array, copied from the host."""
        return self.xp.asarray(np.array(self._lengths(), np.int32))

    def kv_lengths(self, new):
        """int32 [batch] on the device: keys of each row once `new` tokens have been appended; copied from the host."""
        return self.xp.asarray(np.array(self._lengths(), np.int32) + np.int32(new))

    def advance(self, new):
        self._check_capacity(new)
        self._set_lengths([length + new for length in self._lengths()])

    def reset(self):
        """Forget the tokens of all rows; their pages stay theirs."""
        self._set_lengths([0] * self.batch)

    def truncate(self, row, length):
        """Forget the tokens of a row from position `length` on; its pages stay its."""
        self._check_row(row)
        held = self._lengths()[row]
        if not 0 <= length <= held:
            raise ValueError(f"length must be from 0 to {held}, what row {row} holds, got {length}")
        self._books.lengths[self._rows[row]] = length

    def _lengths(self):
        return [self._books.lengths[row] for row in self._rows]

    def _set_lengths(self, lengths):
        for row, length in zip(self._rows, lengths, strict=True):
            self._books.lengths[row] = length

    def _check_capacity(self, new):
        for row, length in enumerate(self._lengths()):
            if length + new > self.capacity:
                raise ValueError(
                    f"prompt longer than the cache: {new} tokens after {length} in row {self._rows[row]} pass its capacity of "
                    f"{self.capacity}: make a paged cache of more max_pages, or shorten the prompt"
                )

    # --- pages ---

    @property
    def free_pages(self):
        """How many pages no row has."""
        return len(self._books.free)

    def pages_of(self, row):
        """The pages of a row, in the order of its tokens."""
        self._check_row(row)
        return self._books.pages_of(self._rows[row])

    def make_room(self, new):
        """Reserve pages for `new` more tokens of every row. ValueError where they do not fit: rows keep what they got."""
        self._check_capacity(new)
        try:
            for row, length in enumerate(self._lengths()):
                self._take(row, length + new)
        finally:
            self._copy_table()

    def reserve(self, row, tokens):
        """Give a row the pages of its first `tokens` tokens; those it will write to become its own.

        Steps up to there then need nothing of the host. ValueError, and nothing has changed, where too few are free.
        """
        self._check_row(row)
        if not 0 <= whole_number(tokens, "tokens") <= self.capacity:
            raise ValueError(f"tokens must be from 0 to {self.capacity}, the cache's capacity, got {tokens}")
        self._take(row, tokens)
        self._copy_table()

    def release(self, row):
        """Forget a row and give its pages back; those that other rows share stay theirs."""
        self._check_row(row)
        self._books.release(self._rows[row])
        self._copy_table()

    def share(self, from_row, to_row, tokens):
        """Let `to_row`, which has no pages yet, begin with the first `tokens` tokens of `from_row`: no memory is copied.

        The last page may be shared in part: whoever appends to it first gets a copy of it then.
        """
        self._check_row(from_row, "from_row")
        self._check_row(to_row, "to_row")
        held = self._lengths()[from_row]
        if not 0 <= whole_number(tokens, "tokens") <= held:
            raise ValueError(f"tokens must be from 0 to {held}, what row {from_row} holds, got {tokens}")
        if from_row == to_row or self.pages_of(to_row):
            raise ValueError(f"to_row must be a row without pages, got {to_row}: release({to_row}) it first")
        self._books.share(self._rows[from_row], self._rows[to_row], -(-tokens // self.page_size))
        self._books.lengths[self._rows[to_row]] = tokens
        self._copy_table()

    def defragment(self):
        """Move the pages so that those of a row follow each other, and free ones come last. Results stay the same bits."""
        self.rotate(cycles_of(self._books.defragment()))
        self._copy_table()

    def copy_page(self, source, to):
        """Let page `to` hold what page `source` holds; no table and no length changes."""
        for array in self._arrays():
            bits = array.view(np.uint8)  # of any dtype
            bits[to] = bits[source]

    def rotate(self, cycles):
        """Move what pages hold, as `cache_rotate` does for each [page, ...] of `cycles`; no table and no length changes."""
        for cycle in cycles:
            order = self.xp.asarray(np.array(cycle, np.int32))
            for array in self._arrays():
                cache_rotate(array, order)

    def _take(self, row, tokens):
        for source, to in self._books.take(self._rows[row], self._lengths()[row], tokens, self.page_size):
            self.copy_page(source, to)

    def _copy_table(self):
        """The device learns what the host decided."""
        if self._books.has_changed:
            self._whole_table[...] = self.xp.asarray(self._books.table)
            self._books.has_changed = False

    def _arrays(self):
        """Every array that has pages along its first axis."""
        for part in (*self.k, *self.v):
            if self.holds_codes:
                yield part.codes
                if part.scales is not None:
                    yield part.scales
            else:
                yield part

    def _check_row(self, row, name="row"):
        if not 0 <= whole_number(row, name) < self.batch:
            raise ValueError(f"{name} must be from 0 to {self.batch - 1}, a row of the cache, got {row}")


class _PageBooks:
    """Which page belongs to which rows, on the host."""

    def __init__(self, pages, batch, max_pages):
        self.table = np.full((batch, max_pages), -1, np.int32)
        self.users = [0] * pages
        self.free = list(range(pages))[::-1]  # the last one goes first: pages are given out from 0 on
        self.lengths = [0] * batch
        self.has_changed = False

    def pages_of(self, row):
        """They lie at the start of the row's table."""
        return [int(page) for page in self.table[row] if page >= 0]

    def take(self, row, length, tokens, page_size):
        """Pages for `tokens` tokens, of which the first `length` are there -> [(page, its copy)] to be made."""
        owned, needed = self.pages_of(row), -(-tokens // page_size)
        begin = length // page_size
        shared = [i for i in range(begin, min(len(owned), needed)) if self.users[owned[i]] > 1]
        missing = range(len(owned), needed)
        wanted = len(shared) + len(missing)
        if wanted > len(self.free):
            raise ValueError(
                f"the cache is out of pages: row {row} needs {wanted} more for {tokens} tokens, {len(self.free)} of "
                f"{len(self.users)} are free; release(row) of a text that is done, or make one with more pages"
            )
        copies = []
        for i in (*shared, *missing):
            page = self.free.pop()
            self.users[page] = 1
            if i < len(owned):
                self.users[owned[i]] -= 1
                if i * page_size < length:
                    copies.append((owned[i], page))
            self.table[row, i] = page
        self.has_changed |= wanted > 0
        return copies

    def share(self, from_row, to_row, count):
        for page in self.table[from_row, :count]:
            self.users[page] += 1
        self.table[to_row, :count] = self.table[from_row, :count]
        self.has_changed = True

    def release(self, row):
        for page in reversed(self.pages_of(row)):
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)
        self.table[row] = -1
        self.lengths[row] = 0
        self.has_changed = True

    def defragment(self):
        """Number the pages anew, row by row -> for each place the page that is to lie there."""
        used = list(dict.fromkeys(int(page) for page in self.table.ravel() if page >= 0))
        sources = used + sorted(set(range(len(self.users))) - set(used))
        places = np.empty(len(sources) + 1, np.int32)
        places[sources], places[-1] = np.arange(len(sources)), -1  # -1 stays -1
        self.table[...] = places[self.table]
        self.users = [self.users[page] for page in sources]
        self.free = list(range(len(used), len(sources)))[::-1]
        self.has_changed = True
        return sources


def _counts_from_1(**counts):
    return [whole_number(value, name, 1) for name, value in counts.items()]


def check_cache_kind(kind):
    """`kind`, if there are such caches; ValueError otherwise."""
    if kind not in tuple(CACHE_KINDS):
        raise ValueError(f"kind must be one of {', '.join(CACHE_KINDS)}, got {kind!r}")
    return kind
