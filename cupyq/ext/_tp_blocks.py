"""exllamav2's tensor-parallel attention and MLP blocks. Their exchange between devices and its order: _tp_context.py."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyq import ops
from cupyq._arrays import check, float16, float32, int32, is_cupy
from cupyq._copies import to_host
from cupyq.ext._arrays import entry, integer, number, refuse_any_overlap
from cupyq.ext._handles import handles
from cupyq.ext._rotation import Rotation
from cupyq.ext._tp_context import ID, KV, RS, Q, broadcast, context_of, gather

_ROPE_STYLES = (None, "gptj", "neox")


@dataclass
class _Rank:
    """One entry of the splits at work: its device, its share of the scratch arrays, and its weights."""

    device: int
    x: Any  # temp_bc0 [rows, hidden]: the input, also the residual
    normed: Any  # temp_bc1 [rows, hidden]
    whole: Any  # temp_bc2 [rows, width]: what all ranks have gathered
    norm: Any  # weight [hidden] or None
    out: Any  # [rows, columns of the last projection]
    last: Any  # QMatrix of the last projection

    def norm_input(self, eps):
        return self.x if self.norm is None else ops.rms_norm(self.x, self.norm, eps=eps, out=self.normed)

    def finish(self, column):
        """out = residual + whole W, summed in fp32 and rounded once. `column`: where out begins in the hidden state."""
        xp = self.last.xp
        residual = xp.ascontiguousarray(self.x[:, column : column + self.last.n])
        ops.add(residual, ops.qmatmul(self.whole, self.last, dtype=float32), out=self.out)


class _Checker:
    """The arguments of a block, one list after the other, as the arrays and matrices of its ranks."""

    def __init__(self, context, split, rows):
        self.context, self.split, self.rows = context, split, rows
        self.scratch = {}  # label -> array: none may share memory with another

    def items(self, values, name):
        if not isinstance(values, (list, tuple)) or len(values) != len(self.split):
            count = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
            raise ValueError(f"{name} must be a list of {len(self.split)}, one for each entry of the split, got {count}")
        return values

    def temps(self, arrays, name, widths):
        """The beginnings of the scratch arrays as float16 [rows, width]."""
        found = []
        for index, ((device, _, _), array, width) in enumerate(zip(self.split, self.items(arrays, name), widths, strict=True)):
            label, needed = f"{name}[{index}]", self.rows * width
            self.context.check_place(array, device, label)
            if array.size < needed:
                raise ValueError(f"{label} must have room for {self.rows} rows of {width} values, got shape {array.shape}")
            found.append(array.reshape(-1)[:needed].reshape(self.rows, width))
            self.scratch[label] = found[-1]
        return found

    def arrays(self, arrays, name, *, dtype=float16, shape):
        for index, ((device, _, _), array) in enumerate(zip(self.split, self.items(arrays, name), strict=True)):
            self.context.check_place(array, device, f"{name}[{index}]", dtype=dtype)
            check(array, f"{name}[{index}]", shape=shape)
        return arrays

    def matrices(self, numbers, name, *, k, widths=None):
        """The matrices behind the handles, [k, width of each]."""
        found = []
        for index, ((device, _, _), handle) in enumerate(zip(self.split, self.items(numbers, name), strict=True)):
            label = f"{name}[{index}]"
            matrix = handles.get(handle, "q_matrix", label).matrix
            self.context.check_matrix(matrix, device, label)
            n = matrix.n if widths is None else widths[index]
            k = matrix.k if k is None else k
            if matrix.shape != (k, n):
                raise ValueError(f"{label} must be a matrix of shape ({k}, {n}), got {matrix.shape}")
            found.append(matrix)
        return found

    def norms(self, weights, hidden):
        """pre_layernorm: one weight per entry, or an empty list for none."""
        if isinstance(weights, (list, tuple)) and not weights:
            return [None] * len(self.split)
        return self.arrays(weights, "pre_layernorm", shape=(hidden,))

    def hidden(self, array, width):
        """hidden_states, which pinned_temp[0] must have room for."""
        check(array, "hidden_states", dtype=float16, shape=(self.rows, width))
        if is_cupy(array) and not self.context.streams:
            raise TypeError("hidden_states is on a GPU, and make_tp_context got no streams: pass an array in host memory")
        self.context.host(0, float16, (self.rows, width), "hidden_states")

    def refuse_overlaps(self):
        """No scratch array may share memory with another."""
        refuse_any_overlap(**self.scratch)


@entry(
    arrays=("hidden_states",),
    writes=("temp_bc0", "temp_bc1", "temp_bc2", "temp_gate", "temp_up", "temp_down"),
    flags=("act_gelu",),
)
def tp_mlp_forward_(
    tp_context,
    hidden_states,
    temp_bc0,
    temp_bc1,
    temp_bc2,
    temp_gate,
    temp_up,
    temp_down,
    pre_layernorm,
    norm_epsilon,
    gate,
    up,
    down,
    act_gelu,
):
    """x + (act(h Wg) * (h Wu)) Wd with h = RMSNorm(x), for x = hidden_states float16 [rows, hidden], into pinned_temp[0]

    Lists have one item per device of the intermediate and residual splits, which must name the same devices: handles of
    gate, up (columns by the intermediate split) and down (columns by the residual split), norm weights (or an empty list:
    no norm), and float16 scratch with room for at least rows * width values: hidden for temp_bc0, temp_bc1, intermediate
    size for temp_bc2, the device's share for temp_gate, temp_up, temp_down. act: tanh-GELU where act_gelu, else SiLU. An
    empty list `gate` makes it act(h Wu). pinned_temp[1] is used on the way. The host must wait for the streams before it
    reads pinned_temp[0]; passing its beginning on as hidden_states needs no wait.
    """
    context, eps = context_of(tp_context), number(norm_epsilon, "norm_epsilon")
    split, residual_split = context.split(ID, "id_split"), context.split(RS, "rs_split")
    if [part[0] for part in split] != [part[0] for part in residual_split]:
        raise ValueError("id_split and rs_split must name the same devices in the same order")
    check(hidden_states, "hidden_states", ndim=2)
    rows, hidden, inner = hidden_states.shape[0], residual_split[-1][2], split[-1][2]
    shares, columns = ([end - begin for _, begin, end in entries] for entries in (split, residual_split))
    arguments = _Checker(context, split, rows)
    arguments.hidden(hidden_states, hidden)
    whole = context.host(1, float16, (rows, inner), "the intermediate state")
    ranks = zip(
        (device for device, _, _ in split),
        arguments.temps(temp_bc0, "temp_bc0", [hidden] * len(split)),
        arguments.temps(temp_bc1, "temp_bc1", [hidden] * len(split)),
        arguments.temps(temp_bc2, "temp_bc2", [inner] * len(split)),
        arguments.norms(pre_layernorm, hidden),
        arguments.temps(temp_down, "temp_down", columns),
        arguments.matrices(down, "down", k=inner, widths=columns),
        strict=True,
    )
    ranks = [_Rank(*values) for values in ranks]
    gates = arguments.temps(temp_gate, "temp_gate", shares)
    ups = arguments.temps(temp_up, "temp_up", shares)
    is_gated = not (isinstance(gate, (list, tuple)) and not gate)
    gate_matrices = arguments.matrices(gate, "gate", k=hidden, widths=shares) if is_gated else [None] * len(split)
    up_matrices = arguments.matrices(up, "up", k=hidden, widths=shares)
    arguments.refuse_overlaps()
    if rows == 0:
        return
    with context.ordered(hidden_states):
        broadcast(context, 0, hidden_states, [rank.x for rank in ranks])
        for rank, g, u, gate_matrix, up_matrix in zip(ranks, gates, ups, gate_matrices, up_matrices, strict=True):
            with context.on(rank.device):
                x = rank.norm_input(eps)
                ops.qmatmul(x, up_matrix, out=u)
                if is_gated:
                    ops.qmatmul(x, gate_matrix, out=g)
                    (ops.gelu_mul if act_gelu else ops.silu_mul)(g, u, out=g)
                else:
                    (ops.gelu if act_gelu else ops.silu)(u, out=g)
        parts = [(g, begin) for g, (_, begin, _) in zip(gates, split, strict=True)]
        gather(context, whole, parts, [rank.whole for rank in ranks])
        _finish(context, ranks, (rows, hidden))


def _finish(context, ranks, shape):
    """The last projection and the residual, rank by rank, and the result into pinned_temp[0]."""
    column, parts = 0, []
    for rank in ranks:
        with context.on(rank.device):
            rank.finish(column)
        parts.append((rank.out, column))
        column += rank.last.n
    gather(context, context.host(0, float16, shape, "hidden_states"), parts, [])


_ATTENTION_WRITES = (
    "temp_bc0", "temp_bc1", "temp_bc2", "temp_q", "temp_k", "temp_v", "temp_o", "k_cache", "v_cache",
)  # fmt: skip


@entry(arrays=("hidden_states",), writes=_ATTENTION_WRITES)
def tp_attn_forward_paged_(
    tp_context,
    hidden_states,
    temp_bc0,
    temp_bc1,
    temp_bc2,
    temp_q,
    temp_k,
    temp_v,
    temp_o,
    k_cache,
    v_cache,
    pre_layernorm,
    norm_epsilon,
    q_proj,
    k_proj,
    v_proj,
    o_proj,
    head_dim,
    rope_style,
    batch_size,
    q_len,
    sin,
    cos,
    past_lens,
    block_index,
    scaling,
):
    """tp_attn_forward_ with a cache in pages

    k_cache, v_cache float16 [pages, page_size, kv heads of the device, head_dim]. block_index: int32 [batch, n], one per
    device: token t of row b lies in page block_index[b, t // page_size].
    """
    context = context_of(tp_context)
    shape = _attention_shape(context, head_dim, rope_style, batch_size, q_len)
    scratch = temp_bc0, temp_bc1, temp_bc2, temp_q, temp_k, temp_v, temp_o
    arguments = _Checker(context, context.split(Q, "q_split"), shape.batch * shape.seq)
    ranks = _attention_ranks(arguments, shape, scratch, pre_layernorm, (q_proj, k_proj, v_proj, o_proj))
    arguments.arrays(block_index, "block_index", dtype=int32, shape=(shape.batch, None))
    cache = _Cache(arguments, shape, k_cache, v_cache, past_lens, "past_lens", block_index)
    _attention_block(arguments, shape, hidden_states, ranks, cache, norm_epsilon, sin, cos, scaling)


@entry(arrays=("hidden_states",), writes=_ATTENTION_WRITES)
def tp_attn_forward_(
    tp_context,
    hidden_states,
    temp_bc0,
    temp_bc1,
    temp_bc2,
    temp_q,
    temp_k,
    temp_v,
    temp_o,
    k_cache,
    v_cache,
    pre_layernorm,
    norm_epsilon,
    q_proj,
    k_proj,
    v_proj,
    o_proj,
    head_dim,
    rope_style,
    batch_size,
    q_len,
    sin,
    cos,
    past_len_tp,
    scaling,
):
    """x + attention(RMSNorm(x)) for x = hidden_states float16 [batch * q_len, hidden], into pinned_temp[0]

    Lists have one item per device of the query split; the key-value split must name the same devices. q_proj, k_proj,
    v_proj, o_proj: handles; q_proj's columns are the device's query heads * head_dim, k_proj's and v_proj's its key-value
    heads * head_dim, o_proj's any share of the hidden columns, in order. pre_layernorm: norm weights, or an empty list: no
    norm. k_cache, v_cache float16 [at least batch, capacity, kv heads, head_dim]: the new keys and values of row b are
    written from past_len_tp[i][b] (int32 [batch] on every device) on, and attention is causal over all up to there; empty
    lists: over the new ones alone. scaling multiplies the scores. rope_style 0 none, 1 GPT-J, 2 NeoX; sin and cos: float16
    [..., positions, R], listed by device number, of which the R <= head_dim columns say how much of a head turns.
    Scratch: float16, with room for rows times hidden (temp_bc0, temp_bc1), all query heads * head_dim (temp_bc2), the
    device's columns (temp_q, temp_k, temp_v), the larger of its q_proj and o_proj columns (temp_o). pinned_temp[1] is used
    on the way. The host waits once, for past_len_tp, to check every position before anything is written; it must wait by
    itself before it reads pinned_temp[0]. Passing its beginning on as hidden_states needs no wait.
    """
    context = context_of(tp_context)
    shape = _attention_shape(context, head_dim, rope_style, batch_size, q_len)
    scratch = temp_bc0, temp_bc1, temp_bc2, temp_q, temp_k, temp_v, temp_o
    arguments = _Checker(context, context.split(Q, "q_split"), shape.batch * shape.seq)
    ranks = _attention_ranks(arguments, shape, scratch, pre_layernorm, (q_proj, k_proj, v_proj, o_proj))
    cache = _Cache(arguments, shape, k_cache, v_cache, past_len_tp, "past_len_tp")
    _attention_block(arguments, shape, hidden_states, ranks, cache, norm_epsilon, sin, cos, scaling)


@dataclass(frozen=True)
class _AttentionShape:
    batch: int
    seq: int
    head_dim: int
    style: str | None
    heads: list  # of every rank
    kv_heads: list
    begins: list  # first head of every rank
    all_heads: int


def _attention_shape(context, head_dim, rope_style, batch_size, q_len):
    head_dim = integer(head_dim, "head_dim", low=1)
    if head_dim % 8 or head_dim > 256:
        raise ValueError(f"head_dim must be a multiple of 8 up to 256, got {head_dim}")
    if integer(rope_style, "rope_style") not in (0, 1, 2):
        raise ValueError(f"rope_style must be 0 (none), 1 (GPT-J) or 2 (NeoX), got {rope_style}")
    batch, seq = integer(batch_size, "batch_size", low=0), integer(q_len, "q_len", low=0)
    split, kv_split = context.split(Q, "q_split"), context.split(KV, "kv_split")
    if [part[0] for part in split] != [part[0] for part in kv_split]:
        raise ValueError("q_split and kv_split must name the same devices in the same order")
    heads, kv_heads = ([end - begin for _, begin, end in entries] for entries in (split, kv_split))
    if any(h != n * (heads[0] // kv_heads[0]) for h, n in zip(heads, kv_heads, strict=True)):
        raise ValueError(f"q_split must have the same multiple of kv_split's heads everywhere, got {heads} and {kv_heads}")
    begins = [begin for _, begin, _ in split]
    return _AttentionShape(batch, seq, head_dim, _ROPE_STYLES[rope_style], heads, kv_heads, begins, split[-1][2])


@dataclass
class _AttentionRank(_Rank):
    """q, k, v and mixed, the attention's result, are [batch, seq, heads, head_dim]; mixed lies where `out` will."""

    projections: tuple  # QMatrix of q, k, v
    q: Any
    k: Any
    v: Any
    mixed: Any


def _attention_ranks(arguments, shape, scratch, pre_layernorm, projections):
    temp_bc0, temp_bc1, temp_bc2, temp_q, temp_k, temp_v, temp_o = scratch
    q_proj, k_proj, v_proj, o_proj = projections
    rows, d, count = shape.batch * shape.seq, shape.head_dim, len(shape.heads)
    q_widths, kv_widths = ([n * d for n in heads] for heads in (shape.heads, shape.kv_heads))
    q_matrices = arguments.matrices(q_proj, "q_proj", k=None, widths=q_widths)
    hidden, inner = q_matrices[0].k, shape.all_heads * d
    k_matrices = arguments.matrices(k_proj, "k_proj", k=hidden, widths=kv_widths)
    v_matrices = arguments.matrices(v_proj, "v_proj", k=hidden, widths=kv_widths)
    o_matrices = arguments.matrices(o_proj, "o_proj", k=inner)
    columns = [matrix.n for matrix in o_matrices]
    if sum(columns) != hidden:
        raise ValueError(f"o_proj must have as many columns in all as q_proj has rows, {hidden}, got {columns}")
    values = zip(
        arguments.temps(temp_bc0, "temp_bc0", [hidden] * count),
        arguments.temps(temp_bc1, "temp_bc1", [hidden] * count),
        arguments.temps(temp_bc2, "temp_bc2", [inner] * count),
        arguments.norms(pre_layernorm, hidden),
        arguments.temps(temp_q, "temp_q", q_widths),
        arguments.temps(temp_k, "temp_k", kv_widths),
        arguments.temps(temp_v, "temp_v", kv_widths),
        arguments.temps(temp_o, "temp_o", list(map(max, q_widths, columns))),
        strict=True,
    )
    arguments.refuse_overlaps()
    ranks = []
    for index, (x, normed, whole, norm, q, k, v, o) in enumerate(values):
        q, k, v = (a.reshape(shape.batch, shape.seq, -1, d) if rows else a for a in (q, k, v))
        mixed, out = (o.reshape(-1)[: rows * width].reshape(rows, width) for width in (q_widths[index], columns[index]))
        device, _, _ = arguments.split[index]
        three = q_matrices[index], k_matrices[index], v_matrices[index]
        ranks.append(_AttentionRank(device, x, normed, whole, norm, out, o_matrices[index], three, q, k, v, mixed))
    return ranks


class _Cache:
    """The caches of all ranks, and where in them the new tokens go."""

    def __init__(self, arguments, shape, k_cache, v_cache, past_lens, past_name, block_index=None):
        self.past_lens = arguments.arrays(past_lens, past_name, dtype=int32, shape=(shape.batch,))
        self.past_name, self.seq, self.tables = past_name, shape.seq, block_index
        self.k, self.v = k_cache, v_cache
        if block_index is None and all(isinstance(cache, (list, tuple)) and not cache for cache in (k_cache, v_cache)):
            self.k = self.v = None
            return
        arguments.arrays(k_cache, "k_cache", shape=(None, None, None, shape.head_dim))
        arguments.arrays(v_cache, "v_cache", shape=(None, None, None, shape.head_dim))
        for index, (k, v) in enumerate(zip(k_cache, v_cache, strict=True)):
            check(k, f"k_cache[{index}]", shape=(None, None, shape.kv_heads[index], None))
            check(v, f"v_cache[{index}]", shape=k.shape)
            if k.size == 0 or (block_index is None and k.shape[0] < shape.batch):
                raise ValueError(f"k_cache[{index}] must have room for a batch of {shape.batch}, got shape {k.shape}")
        both = {"k_cache": k_cache, "v_cache": v_cache}
        refuse_any_overlap(**{f"{name}[{index}]": a for name, cache in both.items() for index, a in enumerate(cache)})

    def at(self, index):
        """A rank's past lengths and block table (None where there is none) on the host, after a look at every position."""
        past = to_host(self.past_lens[index])
        table = None if self.tables is None else to_host(self.tables[index])
        if past.min() < 0:
            raise ValueError(f"{self.past_name}[{index}] must not be negative, got {past.min()}")
        if self.k is None:
            return past, None
        pages, page_size = self.k[index].shape[:2]
        capacity = page_size if table is None else table.shape[1] * page_size
        if int(past.max()) + self.seq > capacity:
            raise ValueError(
                f"{self.past_name}[{index}] is up to {past.max()}: {self.seq} more do not fit a cache of {capacity}"
            )
        for row, length in enumerate([] if table is None else (past + self.seq).tolist()):
            used = table[row, : -(-length // page_size)]
            if used.min() < 0 or used.max() >= pages:
                raise ValueError(
                    f"block_index[{index}] sends row {row} to pages {used.min()} to {used.max()}, the cache has {pages} pages"
                )
        return past, table

    def attend(self, index, rank, past, table, scale):
        """rank.mixed = attention, after the new keys and values have joined the cache."""
        shape = rank.q.shape
        mixed, lengths, xp = rank.mixed.reshape(shape), past + np.int32(shape[1]), rank.last.xp
        if self.k is None:
            ops.attention(rank.q, rank.k, rank.v, scale=scale, out=mixed)
            return
        k_cache, v_cache = self.k[index], self.v[index]
        if table is None:
            ops.kv_append(rank.k, rank.v, k_cache, v_cache, self.past_lens[index])
            kv_lengths = xp.asarray(lengths)
            ops.attention(rank.q, k_cache, v_cache, scale=scale, kv_lengths=kv_lengths, out=mixed)
            return
        for row, length in enumerate(lengths.tolist()):
            pages = np.ascontiguousarray(table[row, : -(-length // k_cache.shape[1])])
            _append_to_pages(rank.k[row], k_cache, pages, length)
            _append_to_pages(rank.v[row], v_cache, pages, length)
            order = xp.asarray(pages)
            keys, values = (cache[order].reshape(1, -1, *cache.shape[2:]) for cache in (k_cache, v_cache))
            this, kv_lengths = slice(row, row + 1), xp.asarray(lengths[row : row + 1])
            ops.attention(rank.q[this], keys, values, scale=scale, kv_lengths=kv_lengths, out=mixed[this])


def _append_to_pages(new, cache, pages, length):
    """The tokens of new [seq, kv_heads, head_dim] become the last ones of `length`, page after page."""
    page_size, position = cache.shape[1], length - new.shape[0]
    while new.shape[0]:
        page, slot = divmod(position, page_size)
        count = min(page_size - slot, new.shape[0])
        cache[int(pages[page]), slot : slot + count] = new[:count]
        new, position = new[count:], position + count


def _rotation(arguments, shape, rank, tables, past_lens, past, past_name):
    """What turns a rank's q and k, or None."""
    if shape.style is None:
        return None
    found = []
    for name, listed in tables.items():
        if not isinstance(listed, (list, tuple)) or len(listed) <= rank.device or listed[rank.device] is None:
            raise ValueError(f"{name} must be a list with a table at {rank.device}, the number of the device")
        arguments.context.check_place(listed[rank.device], rank.device, f"{name}[{rank.device}]")
        found.append(listed[rank.device])
    table = found[0]
    if table.ndim and table.size and int(past.max()) + shape.seq > table.size // table.shape[-1]:
        raise ValueError(
            f"{past_name} is up to {past.max()}: {shape.seq} tokens from there pass the {table.size // table.shape[-1]} "
            f"positions of sin[{rank.device}]"
        )
    return Rotation(*found, 0, past_lens, batch=shape.batch, seq=shape.seq, head_dim=shape.head_dim, style=shape.style)


def _attention_block(arguments, shape, hidden_states, ranks, cache, norm_epsilon, sin, cos, scaling):
    context, eps, scale = arguments.context, number(norm_epsilon, "norm_epsilon"), number(scaling, "scaling")
    if not 0 < scale < np.inf:
        raise ValueError(f"scaling must be a positive finite number, got {scale}")
    rows, hidden = shape.batch * shape.seq, ranks[0].x.shape[1]
    arguments.hidden(hidden_states, hidden)
    whole = context.host(1, float16, (rows, shape.all_heads * shape.head_dim), "the attention's output")
    if rows == 0:
        return
    with context.ordered(hidden_states):
        found, tables = [], {"sin": sin, "cos": cos}
        for index, rank in enumerate(ranks):
            with context.on(rank.device):
                past, table = cache.at(index)
                past_lens, past_name = cache.past_lens[index], f"{cache.past_name}[{index}]"
                found.append((past, table, _rotation(arguments, shape, rank, tables, past_lens, past, past_name)))
        broadcast(context, 0, hidden_states, [rank.x for rank in ranks])
        for index, (rank, (past, table, rotation)) in enumerate(zip(ranks, found, strict=True)):
            with context.on(rank.device):
                x = rank.norm_input(eps)
                for target, matrix in zip((rank.q, rank.k, rank.v), rank.projections, strict=True):
                    ops.qmatmul(x, matrix, out=target.reshape(rows, -1))
                if rotation is not None:
                    rotation(rank.q)
                    rotation(rank.k)
                cache.attend(index, rank, past, table, scale)
        parts = [(rank.mixed, begin * shape.head_dim) for rank, begin in zip(ranks, shape.begins, strict=True)]
        gather(context, whole, parts, [rank.whole for rank in ranks])
        _finish(context, ranks, (rows, hidden))
