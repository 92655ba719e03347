"""Tensor parallelism of the extension: several ranks against one and against plain float64, and the order of all work."""

import inspect
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import gpu_count
from kernel_checks import float16, host, random
from random_layers import random_exl2

import cupyq.ext as ext_c
from cupyq import QMatrix
from cupyq.ext import _tp_context
from cupyq.ops import reconstruct

KV, ID, VC, RS, Q = range(5)

# Devices are ranks modulo the GPUs there are: on one GPU all ranks share it, on several they are spread.
GROUPS = [("numpy", 1), ("numpy", 2), ("numpy", 3), *(pytest.param("cupy", n, marks=pytest.mark.gpu) for n in (1, 2, 3))]
on_groups = pytest.mark.parametrize(("library", "ranks"), GROUPS)

HEADS, KV_HEADS, HEAD_DIM, INNER = 6, 3, 32, 192
SHARES = {  # key-value heads, intermediate columns, hidden columns of 160 and of 192, by ranks
    1: ([3], [192], {160: [160], 192: [192]}),
    2: ([2, 1], [64, 128], {160: [96, 64], 192: [128, 64]}),
    3: ([1, 1, 1], [64, 96, 32], {160: [32, 64, 64], 192: [64, 64, 64]}),
}


def ranges(devices, sizes):
    ends = np.cumsum(sizes).tolist()
    return [(device, end - size, end) for device, size, end in zip(devices, sizes, ends, strict=True)]


class Group:
    """A context with its devices, streams and host buffers, and what puts tests' data where they say."""

    def __init__(self, library, ranks, hidden=160, pinned=20_000):
        self.library, self.ranks, self.hidden = library, ranks, hidden
        self.devices = list(range(ranks))
        streams = []
        self.streams = {}
        if library == "cupy":
            import cupy
            import cupyx

            self.devices = [rank % gpu_count() for rank in range(ranks)]
            for device in sorted(set(self.devices)):
                with cupy.cuda.Device(device):
                    self.streams[device] = cupy.cuda.Stream(non_blocking=True)
            streams = [self.streams[d].ptr if d in self.streams else 0 for d in range(gpu_count())]
            self.pinned = [cupyx.zeros_pinned(pinned, float16) for _ in range(2)]
        else:
            self.pinned = [np.zeros(pinned, float16) for _ in range(2)]
        kv, inner, columns = SHARES[ranks]
        self.splits = {
            KV: ranges(self.devices, kv),
            ID: ranges(self.devices, inner),
            VC: ranges(self.devices, inner),
            RS: ranges(self.devices, columns[hidden]),
            Q: ranges(self.devices, [n * HEADS // KV_HEADS for n in kv]),
        }
        self.context = ext_c.make_tp_context(*self.splits.values(), self.pinned, streams)

    def put(self, array, rank):
        if self.library == "numpy":
            return array.copy()
        import cupy

        with cupy.cuda.Device(self.devices[rank]):
            return cupy.asarray(array)

    def everywhere(self, array):
        return [self.put(array, rank) for rank in range(self.ranks)]

    def shares(self, array, code, dim=1):
        """Column slices by a split."""
        return [self.put(np.ascontiguousarray(array[:, b * dim : e * dim]), i) for i, (_, b, e) in enumerate(self.splits[code])]

    def scratch(self, rows, widths):
        return [self.put(np.full((rows, width), np.nan, float16), rank) for rank, width in enumerate(widths)]

    def handles(self, tensors, widths):
        """make_q_matrix_split handles of the column slices of these widths."""
        found, begin = [], 0
        for rank, width in enumerate(widths):
            part = slice(begin, begin + width)
            groups = slice(begin // 8, (begin + width) // 8)
            pieces = tensors | {"q_weight": tensors["q_weight"][:, part], "q_scale": tensors["q_scale"][:, groups]}
            if "bias" in tensors:
                pieces["bias"] = tensors["bias"][part]
            pieces["q_scale_max"] = (tensors["q_scale_max"].astype(np.float32) / 256).astype(float16)
            pieces = {name: self.put(np.ascontiguousarray(piece), rank) for name, piece in pieces.items()}
            names = ("q_weight", "q_perm", "q_invperm", "q_scale", "q_scale_max", "q_groups")
            given = [pieces.get(name) for name in names]
            found.append(ext_c.make_q_matrix_split(*given, None, None, None, None, pieces.get("bias"), None, 0))
            begin += width
        return found

    def finish(self):
        for stream in self.streams.values():
            stream.synchronize()

    def result(self, *shape):
        """What pinned_temp[0] begins with."""
        self.finish()
        return self.pinned[0][: int(np.prod(shape))].reshape(shape).copy()


def matrix(seed, k, n, bias=False):
    """EXL2 tensors whose q_scale_max is exact after a division by 256, and the weights in float64."""
    blocks = {160: (2, 1), 192: (2, 2)}[k]
    tensors = random_exl2(np.random.default_rng(seed), (4,), n=n, group_blocks=blocks[0], last_blocks=blocks[1], has_bias=bias)
    tensors["q_scale_max"] = np.array([0.0625, 0.125, 0.0938], float16)
    tensors["q_scale_max"] = (np.round(tensors["q_scale_max"].astype(np.float64) * 1024) / 1024).astype(float16)
    return tensors, reconstruct(QMatrix.from_tensors(tensors)).astype(np.float64)


# --- exchange ---------------------------------------------------------------------------------------------------------


@on_groups
def test_broadcast(library, ranks):
    group = Group(library, ranks)
    values = random(1, (5, 7), float16)
    group.pinned[0][:] = 3
    for source in (values, group.put(values, ranks - 1), group.pinned[1][:35].reshape(5, 7)):
        if source is not values and isinstance(source, np.ndarray):
            source[...] = values
        targets = [group.put(np.full((6, 7), -1, float16), rank) for rank in range(ranks)]
        ext_c.tp_broadcast(group.context, 1, source, RS, targets, 1, -1)
        for target in map(host, targets):
            np.testing.assert_array_equal(target, np.vstack([values, np.full((1, 7), -1)]))
        group.finish()
        np.testing.assert_array_equal(group.pinned[1][:35].reshape(5, 7), values)
        group.pinned[1][:] = 0
    assert np.all(group.pinned[0] == 3)
    wide = random(2, (4, 3), np.dtype(np.float32))
    targets = group.everywhere(np.zeros((4, 3), np.float32))
    ext_c.tp_broadcast(group.context, 0, wide, KV, targets, 1)
    for target in map(host, targets):
        np.testing.assert_array_equal(target, wide)


@on_groups
@pytest.mark.parametrize("target_code", [-2, -1, RS])
def test_gather(library, ranks, target_code):
    group, dim = Group(library, ranks), 3
    whole = random(3, (4, INNER * dim), float16)
    targets = group.everywhere(np.zeros((5, INNER * dim), float16))
    ext_c.tp_gather(group.context, 0, group.shares(whole, ID, dim), ID, targets, target_code, dim, -1)
    np.testing.assert_array_equal(group.result(*whole.shape), whole)
    for target in map(host, targets):
        np.testing.assert_array_equal(target[:4], whole if target_code == RS else 0)
        assert not target[4].any()


def test_one_device_alone():
    """t_device: nothing else is looked at or written."""
    group = Group("numpy", 3)
    targets = [None, np.zeros(4, float16), None]
    ext_c.tp_broadcast(group.context, 0, np.ones(4, float16), KV, targets, 1, 1)
    assert targets[1].all()
    whole = random(4, (2, INNER), float16)
    (_, begin, end), parts = group.splits[ID][1], group.shares(whole, ID)
    group.pinned[0][:] = 7
    ext_c.tp_gather(group.context, 0, [None, parts[1], None], ID, [], -1, 1, 1)
    expected = np.full((2, INNER), 7, float16)
    expected[:, begin:end] = whole[:, begin:end]
    np.testing.assert_array_equal(group.result(2, INNER), expected)


@on_groups
def test_all_reduce(library, ranks):
    """Added from the left, rounded at each step; what the other residuals held is of no account."""
    group = Group(library, ranks)
    tensors = [random(10 + rank, (3, 50), float16, 4.0) for rank in range(ranks)]
    residual = random(5, (3, 50), float16)
    expected = residual.copy()
    for tensor in tensors:
        expected = (expected.astype(np.float32) + tensor.astype(np.float32)).astype(float16)
    residuals = [group.put(residual if rank == 0 else np.full_like(residual, np.nan), rank) for rank in range(ranks)]
    ext_c.tp_all_reduce(group.context, 1, [group.put(tensor, rank) for rank, tensor in enumerate(tensors)], residuals)
    for result in map(host, residuals):
        np.testing.assert_array_equal(result, expected)
    group.finish()
    np.testing.assert_array_equal(group.pinned[1][:150].reshape(3, 50), expected)
    backwards = residual.astype(np.float32) + sum(tensor.astype(np.float32) for tensor in tensors)
    assert ranks == 1 or not np.array_equal(backwards.astype(float16), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_nothing_overtakes_anything(cupy, ranks):
    """Rounds over the same buffers and no wait of the host, with work before them that takes far longer than they do."""
    group = Group("cupy", ranks, pinned=1 << 20)
    big = cupy.ones((2048, 2048), np.float32) / 2048
    results = []
    for number in range(12):
        product = big
        for _ in range(4):
            product = product @ big
        source = (product[:256, :1024] * np.float32(number * 2048)).astype(np.float16)
        targets = group.everywhere(np.full((256, 1024), -1, float16))
        ext_c.tp_broadcast(group.context, 0, source, KV, targets, 1)
        residuals = group.everywhere(np.zeros((256, 1024), float16))
        ext_c.tp_all_reduce(group.context, 0, targets, residuals)
        again = group.everywhere(np.zeros((256, 1024), float16))
        ext_c.tp_broadcast(group.context, 0, residuals[-1], KV, again, 1)
        source.fill(-5)
        results.append((number, again))
    for number, targets in results:
        for target in targets:
            np.testing.assert_allclose(target.get(), number * ranks, rtol=1e-2)


@pytest.mark.gpu
def test_torch_tensors_and_streams(cupy):
    """As exllamav2's Python calls: page-locked tensors, a stream's address, a view of the buffer as the source."""
    torch = pytest.importorskip("torch")
    stream = torch.cuda.Stream(0)
    pinned = [torch.zeros(4096, dtype=torch.float16, pin_memory=True) for _ in range(2)]
    split = [(0, 0, 2)]
    context = ext_c.make_tp_context(split, split, split, split, split, pinned, [stream.cuda_stream])
    source = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    view = pinned[0][:12].view(3, 4)
    view.copy_(source)
    target = torch.zeros((3, 4), dtype=torch.float16, device="cuda:0")
    ext_c.tp_broadcast(context, 0, view, KV, [target], 1, -1)
    assert torch.equal(target.cpu(), source)
    ext_c.tp_all_reduce(context, 1, [target.clone()], [target])
    ext_c.tp_gather(context, 0, [target], Q, [], -1, 2, -1)
    stream.synchronize()
    assert torch.equal(target.cpu(), 2 * source) and torch.equal(view, 2 * source)
    ext_c.free_tp_context(context)


def test_join_orders_everything_behind_everything(monkeypatch):
    """With clocks: after a join every stream has seen what every other had queued before it."""

    class Stream:
        def __init__(self, number):
            self.number, self.seen = number, {number: 0}

        def work(self):
            self.seen[self.number] += 1

        def wait_event(self, event):
            for number, count in event.seen.items():
                self.seen[number] = max(self.seen.get(number, 0), count)

    class Event:
        def __init__(self, disable_timing):
            assert disable_timing

        def record(self, stream):
            self.seen = dict(stream.seen)

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Event=Event, Device=Device)))
    for count in (1, 2, 5):
        streams = [(number // 2, Stream(number)) for number in range(count)]
        for rounds in range(1, 4):
            for _, stream in streams:
                for _ in range(stream.number + 1):
                    stream.work()
            _tp_context._join(streams)
            everything = {number: rounds * (number + 1) for number in range(count)}
            assert all(stream.seen == everything for _, stream in streams)


# --- products and norms -----------------------------------------------------------------------------------------------


@on_groups
def test_products_and_norms(library, ranks):
    group = Group(library, ranks)
    tensors, weights = matrix(20, 160, INNER, bias=True)
    widths = [end - begin for _, begin, end in group.splits[ID]]
    x, norm = random(21, (3, 160), float16), random(22, (160,), float16)
    inputs, normed, outputs = group.everywhere(x), group.scratch(3, [160] * ranks), group.scratch(3, widths)
    ext_c.rms_norm_tp(inputs, group.everywhere(norm), normed, 1e-5, group.context)
    ext_c.gemm_half_q_half_tp(normed, group.handles(tensors, widths), outputs, False, group.context, -1)
    exact = x.astype(np.float64)
    exact = exact * norm.astype(np.float64) / np.sqrt(np.mean(exact**2, axis=1, keepdims=True) + 1e-5)
    for result in map(host, normed):
        np.testing.assert_allclose(result.astype(np.float64), exact, rtol=2**-10, atol=1e-6)
    exact = host(normed[0]).astype(np.float64) @ weights + tensors["bias"]
    found = np.hstack([host(output) for output in outputs]).astype(np.float64)
    assert np.linalg.norm(found - exact) < 1e-3 * np.linalg.norm(exact)


# --- blocks -----------------------------------------------------------------------------------------------------------


def normed(x, weight, eps):
    x = x.astype(np.float64)
    if weight is None:
        return x
    return x * weight.astype(np.float64) / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def nearly(result, exact):
    """fp16 roundings at every stage of a block, and nothing else."""
    result = result.astype(np.float64)
    error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
    assert error < 2e-3, f"error {error:.3g}"


class MLP:
    def __init__(self, seed=30):
        self.gate, self.gate_weights = matrix(seed, 160, INNER, bias=True)
        self.up, self.up_weights = matrix(seed + 1, 160, INNER)
        self.down, self.down_weights = matrix(seed + 2, INNER, 160, bias=True)
        self.norm = (1 + 0.2 * random(seed + 3, (160,), np.dtype(np.float32))).astype(float16)

    def exact(self, x, *, gelu=False, gated=True, norm=True, residual=1.0):
        h = normed(x, self.norm if norm else None, 1e-5)
        up = h @ self.up_weights
        g = h @ self.gate_weights + self.gate["bias"] if gated else up
        act = g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) if gelu else g / (1 + np.exp(-g))
        inner = act * up if gated else act
        return residual * x.astype(np.float64) + inner @ self.down_weights + self.down["bias"]

    def run(self, group, x, *, gelu=False, gated=True, norm=True, room=1):
        """In scratch of a few rows more than needed."""
        rows, ranks = x.shape[0] + room, group.ranks
        widths, columns = ([end - begin for _, begin, end in group.splits[code]] for code in (ID, RS))
        ext_c.tp_mlp_forward_(
            group.context,
            x,
            group.scratch(rows, [160] * ranks),
            group.scratch(rows, [160] * ranks),
            group.scratch(rows, [INNER] * ranks),
            group.scratch(rows, widths),
            group.scratch(rows, widths),
            group.scratch(rows, columns),
            group.everywhere(self.norm) if norm else [],
            1e-5,
            group.handles(self.gate, widths) if gated else [],
            group.handles(self.up, widths),
            group.handles(self.down, columns),
            gelu,
        )
        return group.result(*x.shape)


@on_groups
@pytest.mark.parametrize(
    "options", [{}, {"gelu": True}, {"gated": False}, {"gated": False, "gelu": True}, {"norm": False}], ids=str
)
def test_mlp(library, ranks, options):
    block, x = MLP(), random(40, (5, 160), float16)
    nearly(block.run(Group(library, ranks), x, **options), block.exact(x, **options))


def test_mlp_comparison_bites():
    block, x = MLP(), random(40, (5, 160), float16)
    result = block.run(Group("numpy", 2), x)
    for wrong in ({"gelu": True}, {"gated": False}, {"norm": False}, {"residual": 0.0}):
        with pytest.raises(AssertionError, match="error"):
            nearly(result, block.exact(x, **wrong))


class Attention:
    """heads * head_dim is 192: the hidden size or not."""

    def __init__(self, hidden, seed=50):
        self.hidden = hidden
        self.q, self.q_weights = matrix(seed, hidden, HEADS * HEAD_DIM, bias=True)
        self.k, self.k_weights = matrix(seed + 1, hidden, KV_HEADS * HEAD_DIM)
        self.v, self.v_weights = matrix(seed + 2, hidden, KV_HEADS * HEAD_DIM, bias=True)
        self.o, self.o_weights = matrix(seed + 3, HEADS * HEAD_DIM, hidden)
        self.norm = (1 + 0.2 * random(seed + 4, (hidden,), np.dtype(np.float32))).astype(float16)

    @staticmethod
    def tables(style, rotary=HEAD_DIM, length=70):
        """sin and cos [1, 1, positions, rotary], a value for each column."""
        angles = np.arange(length)[:, None] * 50.0 ** (-np.arange(0, rotary, 2) / rotary)
        angles = np.repeat(angles, 2, axis=1) if style == 1 else np.hstack([angles, angles])
        return np.sin(angles).astype(float16)[None, None], np.cos(angles).astype(float16)[None, None]

    @staticmethod
    def turned(x, positions, style, sin, cos):
        """x [batch, seq, heads, head_dim]; pair by pair."""
        y, rotary = x.copy(), sin.shape[-1]
        for pair in range(rotary // 2):
            i, j = (2 * pair, 2 * pair + 1) if style == 1 else (pair, pair + rotary // 2)
            s, c = (table[0, 0, positions, i].astype(np.float64)[..., None] for table in (sin, cos))
            y[..., i], y[..., j] = x[..., i] * c - x[..., j] * s, x[..., j] * c + x[..., i] * s
        return y

    def exact(self, x, past, k_cache, v_cache, style, tables, *, scale, shift=0, residual=1.0):
        """(hidden state, keys, values) with the caches [batch, capacity, kv_heads, head_dim] holding the past."""
        batch, seq, _ = x.shape
        h = normed(x, self.norm, 1e-5)
        q = (h @ self.q_weights + self.q["bias"]).reshape(batch, seq, HEADS, HEAD_DIM)
        k = (h @ self.k_weights).reshape(batch, seq, KV_HEADS, HEAD_DIM)
        v = (h @ self.v_weights + self.v["bias"]).reshape(batch, seq, KV_HEADS, HEAD_DIM)
        if style:
            positions = np.asarray(past)[:, None] + np.arange(seq) + shift
            q, k = (self.turned(a, positions, style, *tables) for a in (q, k))
        keys, values = k_cache.astype(np.float64), v_cache.astype(np.float64)
        mixed = np.zeros((batch, seq, HEADS, HEAD_DIM))
        for b in range(batch):
            keys[b, past[b] : past[b] + seq], values[b, past[b] : past[b] + seq] = k[b], v[b]
            for i, head in np.ndindex(seq, HEADS):
                end, kv = past[b] + i + 1, head * KV_HEADS // HEADS
                scores = np.exp(keys[b, :end, kv] @ q[b, i, head] * scale)
                mixed[b, i, head] = scores @ values[b, :end, kv] / scores.sum()
        return residual * x.astype(np.float64) + mixed.reshape(batch, seq, -1) @ self.o_weights, keys, values

    def run(self, group, x, past, k_cache, v_cache, style, tables, *, scale, block_table=None, columns=None):
        """(hidden state, k caches, v caches) of tp_attn_forward_, or of the paged function where there is a block table."""
        batch, seq, hidden = x.shape
        rows, ranks = batch * seq, group.ranks
        q_widths, kv_widths = ([(end - begin) * HEAD_DIM for _, begin, end in group.splits[code]] for code in (Q, KV))
        columns = columns or [end - begin for _, begin, end in group.splits[RS]]
        caches = [
            [self.part(group, cache, rank) for rank in range(ranks)] if cache is not None else []
            for cache in (k_cache, v_cache)
        ]
        by_device = [[None] * (max(group.devices) + 1) for _ in range(2)]
        for listed, table in zip(by_device, tables, strict=True):
            for rank, device in enumerate(group.devices):
                listed[device] = group.put(table, rank)
        past_lens = group.everywhere(np.array(past, np.int32))
        arguments = [
            group.context,
            x.reshape(rows, hidden),
            group.scratch(rows + 1, [hidden] * ranks),
            group.scratch(rows + 1, [hidden] * ranks),
            group.scratch(rows + 1, [HEADS * HEAD_DIM] * ranks),
            group.scratch(rows + 1, q_widths),
            group.scratch(rows + 1, kv_widths),
            group.scratch(rows + 1, kv_widths),
            group.scratch(rows + 1, list(map(max, q_widths, columns))),
            *caches,
            group.everywhere(self.norm),
            1e-5,
            group.handles(self.q, q_widths),
            group.handles(self.k, kv_widths),
            group.handles(self.v, kv_widths),
            group.handles(self.o, columns),
            HEAD_DIM,
            style,
            batch,
            seq,
            *by_device,
            past_lens,
        ]
        if block_table is None:
            ext_c.tp_attn_forward_(*arguments, scale)
        else:
            ext_c.tp_attn_forward_paged_(*arguments, group.everywhere(block_table), scale)
        return group.result(batch, seq, hidden), *([host(part) for part in cache] for cache in caches)

    @staticmethod
    def part(group, cache, rank):
        _, begin, end = group.splits[KV][rank]
        return group.put(np.ascontiguousarray(cache[:, :, begin:end]), rank)


SCALE = HEAD_DIM**-0.5 / 8


@on_groups
@pytest.mark.parametrize(
    ("hidden", "style", "rotary", "seq"), [(160, 2, 32, 3), (160, 1, 16, 1), (192, 0, 32, 5), (192, 2, 16, 1)]
)
def test_attention(library, ranks, hidden, style, rotary, seq):
    """Pages, in any order, give what a contiguous cache does; unused slots stay."""
    block, group = Attention(hidden), Group(library, ranks, hidden)
    batch, past, capacity, page_size = 3, [0, 13, 30], 48, 8
    x = random(60, (batch, seq, hidden), float16)
    tables = block.tables(style, rotary)
    k_cache, v_cache = random(61, (2, batch, capacity, KV_HEADS, HEAD_DIM), float16)
    exact, keys, values = block.exact(x, past, k_cache, v_cache, style, tables, scale=SCALE)
    result, *caches = block.run(group, x, past, k_cache, v_cache, style, tables, scale=SCALE)
    nearly(result, exact)
    for found, expected, before in zip(caches, (keys, values), (k_cache, v_cache), strict=True):
        found = np.concatenate(found, axis=2)
        is_new = np.zeros(found.shape[:2], bool)
        for b, begin in enumerate(past):
            is_new[b, begin : begin + seq] = True
        np.testing.assert_array_equal(found[~is_new], before[~is_new])
        nearly(found[is_new], expected[is_new])

    table = np.random.default_rng(62).permutation(batch * capacity // page_size + 2).astype(np.int32)
    table = table[: batch * capacity // page_size].reshape(batch, -1)
    pools = []
    for cache in (k_cache, v_cache):
        pool = np.full((table.size + 2, page_size, KV_HEADS, HEAD_DIM), 9, float16)
        pool[table] = cache.reshape(batch, -1, page_size, KV_HEADS, HEAD_DIM)
        pools.append(pool)
    paged, *pages = block.run(group, x, past, *pools, style, tables, scale=SCALE, block_table=table)
    if library == "numpy":
        np.testing.assert_array_equal(paged, result)
    nearly(paged, exact)  # the GPU spreads keys over blocks by their number, and each row is a call of its own
    for found, contiguous in zip(pages, caches, strict=True):
        found, contiguous = np.concatenate(found, axis=2), np.concatenate(contiguous, axis=2)
        np.testing.assert_array_equal(found[table].reshape(contiguous.shape), contiguous)
        assert np.all(np.delete(found, table.ravel(), axis=0) == 9)


@on_groups
def test_attention_without_a_cache(library, ranks):
    block = Attention(160)
    x, tables = random(63, (2, 6, 160), float16), block.tables(2)
    nothing = np.zeros((2, 6, KV_HEADS, HEAD_DIM), float16)
    exact, *_ = block.exact(x, [0, 0], nothing, nothing, 2, tables, scale=SCALE)
    result, *_ = block.run(Group(library, ranks), x, [0, 0], None, None, 2, tables, scale=SCALE)
    nearly(result, exact)


def test_attention_comparison_bites():
    block, group, tables = Attention(160), Group("numpy", 2), Attention.tables(2)
    x, past = random(60, (2, 3, 160), float16), [5, 0]
    caches = random(61, (2, 2, 16, KV_HEADS, HEAD_DIM), float16)
    result, *_ = block.run(group, x, past, *caches, 2, tables, scale=SCALE)
    nearly(result, block.exact(x, past, *caches, 2, tables, scale=SCALE)[0])
    for change in ({"scale": 2 * SCALE}, {"residual": 0.0}, {"style": 1}, {"past": [6, 0]}, {"shift": 1, "past": [5, 1]}):
        arguments = {"past": past, "style": 2, "scale": SCALE} | change
        with pytest.raises(AssertionError, match="error"):
            nearly(result, block.exact(x, k_cache=caches[0], v_cache=caches[1], tables=tables, **arguments)[0])


@on_groups
def test_layers_in_a_row_pass_the_hidden_state_in_the_buffer(library, ranks):
    """As exllamav2's models do: the beginning of pinned_temp[0] goes in as hidden_states, and the host never waits."""
    attention, mlp, group = Attention(160), MLP(), Group(library, ranks)
    x, tables, past = random(70, (1, 4, 160), float16), Attention.tables(2), [2]
    caches = random(71, (2, 1, 16, KV_HEADS, HEAD_DIM), float16)
    expected = x
    for _ in range(2):
        expected, *_ = attention.run(Group(library, ranks), expected, past, *caches, 2, tables, scale=SCALE)
        expected = mlp.run(Group(library, ranks), expected[0])[None]
    group.result, wait = lambda *shape: group.pinned[0][: int(np.prod(shape))].reshape(shape), group.finish
    hidden = x
    for _ in range(2):
        hidden, *_ = attention.run(group, hidden, past, *caches, 2, tables, scale=SCALE)
        hidden = mlp.run(group, hidden[0])[None]
    wait()
    np.testing.assert_array_equal(hidden, expected)


def test_no_rows():
    group, mlp = Group("numpy", 2), MLP()
    group.pinned[0][:] = 1
    mlp.run(group, np.zeros((0, 160), float16))
    block = Attention(160)
    caches = np.zeros((2, 2, 4, KV_HEADS, HEAD_DIM), float16)
    block.run(group, np.zeros((2, 0, 160), float16), [0, 0], *caches, 2, block.tables(2), scale=SCALE)
    assert np.all(group.pinned[0] == 1) and not caches.any()


# --- hostile calls ----------------------------------------------------------------------------------------------------


def test_stale_and_foreign_handles():
    group = Group("numpy", 2)
    foreign = group.handles(matrix(1, 160, 64)[0], [64])[0]
    calls = [
        lambda handle: ext_c.tp_broadcast(handle, 0, np.ones(4, float16), KV, [], 1),
        lambda handle: ext_c.tp_gather(handle, 0, [], KV, [], -1, 1),
        lambda handle: ext_c.tp_cross_device_barrier(handle, KV, -1, -1, -1),
        lambda handle: ext_c.tp_all_reduce(handle, 0, [], []),
        lambda handle: ext_c.rms_norm_tp([], [], [], 1e-5, handle),
        lambda handle: ext_c.gemm_half_q_half_tp([], [], [], False, handle),
        lambda handle: ext_c.free_tp_context(handle),
    ]
    ext_c.tp_cross_device_barrier(group.context, KV)
    ext_c.free_tp_context(group.context)
    for call in calls:
        with pytest.raises(
            ValueError, match=f"tp_context must be a handle from make_tp_context, but {group.context} was freed"
        ):
            call(group.context)
        with pytest.raises(ValueError, match="came from make_q_matrix"):
            call(foreign)
        for other in (0, -1, True, None, 1.0, "a"):
            with pytest.raises(ValueError, match="tp_context must be a handle from make_tp_context"):
                call(other)


ONE = [(0, 0, 2)]
PINNED = np.zeros(8, float16)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"kv_split": None}, TypeError, r"kv_split must be a list of \(device, begin, end\), got NoneType"),
        ({"id_split": [(0, 1)]}, TypeError, r"id_split\[0\] must be \(device, begin, end\), got \(0, 1\)"),
        ({"vc_split": [(0, 1, 2)]}, ValueError, r"vc_split\[0\] must be a range from 0 with something in it, got 1 to 2"),
        ({"rs_split": [(0, 0, 2), (1, 3, 4)]}, ValueError, r"rs_split\[1\] must be a range from 2"),
        ({"q_split": [(0, 0, 0)]}, ValueError, r"q_split\[0\] must be a range from 0"),
        ({"q_split": [(-1, 0, 2)]}, ValueError, r"q_split\[0\] must be 0 or more, got -1"),
        ({"q_split": [(0, 0, 2.5)]}, TypeError, r"q_split\[0\] must be an integer, got float"),
        ({"pinned_temp": []}, TypeError, "pinned_temp must be a list"),
        ({"pinned_temp": PINNED}, TypeError, "pinned_temp must be a list of float16 arrays in host memory, got ndarray"),
        ({"pinned_temp": [None]}, TypeError, r"pinned_temp\[0\] must be an array in host memory, got NoneType"),
        ({"pinned_temp": [np.zeros(8, np.float32)]}, TypeError, r"pinned_temp\[0\] must have dtype float16"),
        ({"pinned_temp": [np.zeros((8, 8), float16)[:, ::2]]}, ValueError, r"pinned_temp\[0\] .* C-contiguous"),
        ({"pinned_temp": [PINNED, PINNED[4:]]}, ValueError, "overlap"),
        ({"streams": None}, TypeError, "streams must be a list of stream addresses"),
        ({"streams": ["a"]}, TypeError, r"streams\[0\] must be an integer, got str"),
        ({"streams": [-5]}, ValueError, r"streams\[0\] must be 0 or more"),
    ],
)
def test_bad_contexts(change, kind, message):
    arguments = dict(kv_split=ONE, id_split=ONE, vc_split=ONE, rs_split=ONE, q_split=ONE, pinned_temp=[PINNED], streams=[0])
    assert ext_c.make_tp_context(**arguments)
    with pytest.raises(kind, match=message):
        ext_c.make_tp_context(**arguments | change)


def halves(*shape):
    return np.zeros(shape, float16)


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "message"),
    [
        ("tp_broadcast", (0, None, KV, [halves(4)] * 2, 1), TypeError, "source must be an array"),
        ("tp_broadcast", (0, halves(4).astype(int), KV, [halves(4)] * 2, 1), TypeError, "source must have dtype"),
        ("tp_broadcast", (2, halves(4), KV, [halves(4)] * 2, 1), ValueError, "buffer must be one of the 2 buffers"),
        ("tp_broadcast", (-1, halves(4), KV, [halves(4)] * 2, 1), ValueError, "buffer must be one of the 2 buffers"),
        ("tp_broadcast", (0, halves(4), 5, [halves(4)] * 2, 1), ValueError, r"broadcast_type must be 0 \(KV\)"),
        ("tp_broadcast", (0, halves(4), None, [halves(4)] * 2, 1), TypeError, "broadcast_type must be an integer"),
        ("tp_broadcast", (0, halves(4), KV, [halves(4)], 1), ValueError, "targets must be a list of 2 arrays"),
        ("tp_broadcast", (0, halves(4), KV, [halves(4), halves(3)], 1), ValueError, r"targets\[1\] must have room for the 4"),
        ("tp_broadcast", (0, halves(4), KV, [halves(4), None], 1), TypeError, r"targets\[1\] must be a NumPy array"),
        ("tp_broadcast", (0, halves(4), KV, [halves(4), halves(4).astype(int)], 1), TypeError, r"targets\[1\] must have dtype"),
        (
            "tp_broadcast",
            (0, halves(30_000), KV, [halves(30_000)] * 2, 1),
            ValueError,
            "source takes 60000 bytes of pinned_temp",
        ),
        ("tp_gather", (0, [halves(2, 2)], KV, [], -1, 1), ValueError, "inputs must be a list of 2 arrays"),
        ("tp_gather", (0, [halves(2, 2), halves(3, 1)], KV, [], -1, 1), ValueError, r"inputs\[1\] must have shape \(2, 1\)"),
        ("tp_gather", (0, [halves(2, 2), halves(2, 2)], KV, [], -1, 1), ValueError, r"inputs\[1\] must have shape \(2, 1\)"),
        ("tp_gather", (0, [halves(2, 2), halves(2, 1)], KV, [], -1, 0), ValueError, "dim must be 1 or more"),
        ("tp_gather", (0, [halves(2, 2), halves(2, 1)], KV, [], KV, 1), ValueError, "targets must be a list of 2 arrays"),
        (
            "tp_gather",
            (0, [halves(2, 2), halves(2, 1)], KV, [halves(5)] * 2, KV, 1),
            ValueError,
            r"targets\[0\] must have room",
        ),
        (
            "tp_gather",
            (0, [halves(2, 2), halves(2, 1)], KV, [halves(6)] * 2, 7, 1),
            ValueError,
            "broadcast_type_target must be",
        ),
        ("tp_gather", (0, [halves(9000, 2), halves(9000, 1)], KV, [], -1, 1), ValueError, "the gathered matrix takes 54000"),
        ("tp_all_reduce", (0, [], []), ValueError, "tensors must be a list of arrays"),
        ("tp_all_reduce", (0, [halves(3)], []), ValueError, "residuals must be a list of arrays"),
        ("tp_all_reduce", (0, [halves(3)], [halves(4)]), ValueError, r"residuals\[0\] must have shape \(3\)"),
        (
            "tp_all_reduce",
            (0, [halves(3)], [halves(3).astype(np.float32)]),
            TypeError,
            r"residuals\[0\] must have dtype float16",
        ),
        ("tp_all_reduce", (0, [None], [None]), TypeError, r"tensors\[0\] must be a NumPy array"),
        ("tp_all_reduce", (0, [PINNED], [PINNED]), ValueError, "overlap"),
    ],
)
def test_bad_exchange(name, arguments, kind, message):
    group = Group("numpy", 2)
    with pytest.raises(kind, match=message):
        getattr(ext_c, name)(group.context, *arguments)
    assert not any(buffer.any() for buffer in group.pinned)


def test_bad_products_and_norms():
    group = Group("numpy", 2)
    handles = group.handles(matrix(1, 160, 64)[0], [32, 32])
    x, y = [halves(2, 160), halves(2, 160)], [halves(2, 32), halves(2, 32)]
    weights, normed = [halves(160), halves(160)], [halves(2, 160), halves(2, 160)]

    def gemm(a=x, b=handles, c=y):
        ext_c.gemm_half_q_half_tp(a, b, c, False, group.context)

    def norm(a=x, w=weights, c=normed):
        ext_c.rms_norm_tp(a, w, c, 1e-5, group.context)

    for call, kind, message in (
        (lambda: gemm(a=x[:1]), ValueError, "a_list, b_list, c_list must be lists of one length"),
        (lambda: gemm(b=3), ValueError, "must be lists of one length"),
        (lambda: gemm(b=[handles[0], 17]), ValueError, r"b_list\[1\] must be a handle from make_q_matrix"),
        (lambda: gemm(b=[handles[0], group.context]), ValueError, "came from make_tp_context"),
        (lambda: gemm(a=[x[0], halves(2, 128)]), ValueError, r"a_list\[1\] must have shape \(any, 160\)"),
        (lambda: gemm(c=[y[0], halves(3, 32)]), ValueError, r"c_list\[1\] must have shape \(2, 32\)"),
        (lambda: gemm(c=[y[0], halves(2, 32).astype(np.float32)]), TypeError, r"c_list\[1\] must have dtype float16"),
        (lambda: gemm(a=[x[0], None]), TypeError, r"a_list\[1\] must be a NumPy array"),
        (lambda: norm(w=[halves(160), halves(161)]), ValueError, r"w_list\[1\] must have shape \(160\)"),
        (lambda: norm(w=[halves(160)]), ValueError, "x_list, w_list, y_list must be lists of one length"),
        (lambda: norm(c=[halves(2, 160), halves(1, 160)]), ValueError, r"y_list\[1\] must have shape \(2, 160\)"),
        (lambda: norm(a=[halves(160), halves(160)]), ValueError, r"x_list\[0\] must have 2 dimensions"),
    ):
        with pytest.raises(kind, match=message):
            call()
    assert not any(array.any() for array in y)


def refused(monkeypatch, run, name, change, kind, message):
    """A good call of a block with some arguments replaced: refused, and nothing is written."""
    original, calls = getattr(ext_c, name), []

    def changed(*arguments):
        bound = dict(zip(inspect.signature(original).parameters, arguments, strict=True))
        for key, value in change.items():
            bound[key] = value(bound[key]) if callable(value) else value
        caches = [cache.copy() for key in ("k_cache", "v_cache") for cache in bound.get(key) or () if cache is not None]
        with pytest.raises(kind, match=message):
            original(**bound)
        after = [cache for key in ("k_cache", "v_cache") for cache in bound.get(key) or () if cache is not None]
        for a, b in zip(caches, after, strict=True):
            np.testing.assert_array_equal(a, b)
        calls.append(name)

    monkeypatch.setattr(ext_c, name, changed)
    run()
    assert calls == [name]


def first(change):
    """Replace the first item of a list."""
    return lambda items: [change(items[0]) if callable(change) else change, *items[1:]]


BAD_BLOCKS = [
    ({"hidden_states": None}, TypeError, "hidden_states must be an array"),
    ({"hidden_states": halves(6, 159)}, ValueError, r"hidden_states must have shape \(6, 160\)"),
    ({"hidden_states": np.zeros((6, 160), np.float32)}, TypeError, "hidden_states must have dtype float16"),
    ({"temp_bc0": []}, ValueError, "temp_bc0 must be a list of 2"),
    ({"temp_bc0": first(halves(2, 160))}, ValueError, r"temp_bc0\[0\] must have room for 6 rows of 160 values"),
    ({"temp_bc1": first(None)}, TypeError, r"temp_bc1\[0\] must be a NumPy array"),
    ({"temp_bc1": lambda items: [items[0], items[0]]}, ValueError, r"temp_bc1\[0\] and temp_bc1\[1\] overlap"),
    ({"pre_layernorm": first(halves(159))}, ValueError, r"pre_layernorm\[0\] must have shape \(160\)"),
    ({"norm_epsilon": None}, TypeError, "norm_epsilon must be a number"),
]
BAD_MLPS = [
    ({"gate": None}, ValueError, "gate must be a list of 2"),
    ({"gate": lambda items: [items[0], 5]}, ValueError, r"gate\[1\] must be a handle"),
    ({"up": lambda items: items[::-1]}, ValueError, r"up\[0\] must be a matrix of shape \(160, 64\), got \(160, 128\)"),
    ({"down": lambda items: items[::-1]}, ValueError, r"down\[0\] must be a matrix of shape \(192, 96\)"),
    ({"temp_gate": first(lambda a: a.astype(np.float32))}, TypeError, r"temp_gate\[0\] must have dtype float16"),
]
BAD_ATTENTIONS = [
    ({"head_dim": 36}, ValueError, "head_dim must be a multiple of 8 up to 256, got 36"),
    ({"head_dim": 16}, ValueError, r"q_proj\[0\] must be a matrix of shape \(160, 64\), got \(160, 128\)"),
    ({"rope_style": 3}, ValueError, "rope_style must be 0"),
    ({"batch_size": -1}, ValueError, "batch_size must be 0 or more"),
    ({"batch_size": 3}, ValueError, r"temp_bc0\[0\] must have room for 9 rows of 160 values"),
    ({"scaling": 0.0}, ValueError, "scaling must be a positive finite number"),
    ({"k_cache": []}, ValueError, "k_cache must be a list of 2"),
    ({"k_cache": first(halves(2, 16, 1, 32))}, ValueError, r"k_cache\[0\] must have shape"),
    ({"v_cache": first(halves(2, 15, 2, 32))}, ValueError, r"v_cache\[0\] must have shape \(2, 16, 2, 32\)"),
    (
        {"k_cache": lambda items: items, "v_cache": first(lambda a: a.astype(np.float32))},
        TypeError,
        r"v_cache\[0\] must have dtype",
    ),
    ({"sin": []}, ValueError, "sin must be a list with a table at 0"),
    ({"cos": first(None)}, ValueError, "cos must be a list with a table at 0"),
    (
        {"sin": first(halves(1, 1, 7, 32)), "cos": first(halves(1, 1, 7, 32))},
        ValueError,
        "3 tokens from there pass the 7 positions",
    ),
    ({"sin": first(halves(1, 1, 70, 34)), "cos": first(halves(1, 1, 70, 34))}, ValueError, "sin must have shape"),
    ({"past_len_tp": first(np.array([5, -1], np.int32))}, ValueError, r"past_len_tp\[0\] must not be negative, got -1"),
    (
        {"past_len_tp": first(np.array([5, 14], np.int32))},
        ValueError,
        r"past_len_tp\[0\] is up to 14: 3 .* do not fit a cache of 16",
    ),
    ({"past_len_tp": first(np.array([2**31 - 1, 0], np.int32))}, ValueError, "do not fit a cache"),
    ({"past_len_tp": first(np.array([5, 0]))}, TypeError, r"past_len_tp\[0\] must have dtype int32"),
    ({"past_len_tp": None}, ValueError, "past_len_tp must be a list of 2"),
    (
        {"o_proj": lambda items: [items[0], items[0]]},
        ValueError,
        "o_proj must have as many columns in all as q_proj has rows, 160",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD_BLOCKS + BAD_MLPS)
def test_bad_mlps(monkeypatch, change, kind, message):
    group, mlp, x = Group("numpy", 2), MLP(), random(1, (6, 160), float16)
    refused(monkeypatch, lambda: mlp.run(group, x, room=0), "tp_mlp_forward_", change, kind, message)
    assert not group.pinned[0].any()


@pytest.mark.parametrize(("change", "kind", "message"), BAD_BLOCKS + BAD_ATTENTIONS)
def test_bad_attentions(monkeypatch, change, kind, message):
    group, block, x = Group("numpy", 2), Attention(160), random(1, (2, 3, 160), float16)
    caches = random(2, (2, 2, 16, KV_HEADS, HEAD_DIM), float16)

    def run():
        block.run(group, x, [5, 0], *caches, 2, block.tables(2), scale=SCALE)

    refused(monkeypatch, run, "tp_attn_forward_", change, kind, message)
    assert not group.pinned[0].any()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"block_index": None}, ValueError, "block_index must be a list of 2"),
        ({"block_index": first(np.zeros((2, 4)))}, TypeError, r"block_index\[0\] must have dtype int32"),
        ({"block_index": first(np.zeros((3, 4), np.int32))}, ValueError, r"block_index\[0\] must have shape \(2, any\)"),
        ({"block_index": first(np.full((2, 4), 8, np.int32))}, ValueError, r"block_index\[0\] sends row 0 to pages 8 to 8"),
        ({"block_index": first(np.full((2, 4), -1, np.int32))}, ValueError, r"block_index\[0\] sends row 0 to pages -1 to -1"),
        (
            {"block_index": first(np.zeros((2, 1), np.int32))},
            ValueError,
            r"past_lens\[0\] is up to 5: 3 more do not fit a cache of 4",
        ),
    ],
)
def test_bad_pages(monkeypatch, change, kind, message):
    group, block, x = Group("numpy", 2), Attention(160), random(1, (2, 3, 160), float16)
    caches = random(2, (2, 8, 4, KV_HEADS, HEAD_DIM), float16)
    table = np.arange(8, dtype=np.int32).reshape(2, 4)

    def run():
        block.run(group, x, [5, 0], *caches, 2, block.tables(2), scale=SCALE, block_table=table)

    refused(monkeypatch, run, "tp_attn_forward_paged_", change, kind, message)
    assert not group.pinned[0].any()


def test_splits_must_fit_together():
    def context(**change):
        splits = dict(kv_split=[(0, 0, 2)], id_split=[(0, 0, 64)], vc_split=[], rs_split=[(0, 0, 64)], q_split=[(0, 0, 4)])
        return ext_c.make_tp_context(**splits | change, pinned_temp=[PINNED], streams=[])

    def attend(handle):
        lists = [[]] * 15
        ext_c.tp_attn_forward_(handle, halves(1, 64), *lists[:9], [], 1e-5, *lists[:4], 32, 2, 1, 1, [], [], [], 1.0)

    with pytest.raises(ValueError, match="broadcast_type 2 asks for vc_split, which make_tp_context was given empty"):
        ext_c.tp_broadcast(context(), 0, halves(4), VC, [], 1)
    with pytest.raises(ValueError, match="q_split and kv_split must name the same devices"):
        attend(context(q_split=[(1, 0, 4)]))
    with pytest.raises(ValueError, match="q_split must have the same multiple of kv_split's heads everywhere"):
        attend(context(q_split=[(0, 0, 5)]))
    with pytest.raises(ValueError, match="id_split and rs_split must name the same devices"):
        lists = [[]] * 7
        ext_c.tp_mlp_forward_(context(rs_split=[(1, 0, 64)]), halves(1, 64), *lists, 1e-5, [], [], [], False)


@pytest.mark.gpu
def test_bad_places(cupy):
    """NumPy arrays in a context of GPUs, GPU arrays in one of none, devices without a stream."""
    group, plain = Group("cupy", 2), Group("numpy", 2)
    gpu = cupy.zeros(4, np.float16)
    with pytest.raises(TypeError, match=r"targets\[0\] must be an array on GPU 0, got ndarray: move it there"):
        ext_c.tp_broadcast(group.context, 0, halves(4), KV, [halves(4), halves(4)], 1)
    with pytest.raises(TypeError, match=r"targets\[0\] must be a NumPy array, as make_tp_context got no streams"):
        ext_c.tp_broadcast(plain.context, 0, halves(4), KV, [gpu, gpu], 1)
    with pytest.raises(TypeError, match="source is on a GPU, and make_tp_context got no streams"):
        ext_c.tp_broadcast(plain.context, 0, gpu, KV, [halves(4), halves(4)], 1)
    with pytest.raises(TypeError, match=r"tensors\[0\] must be an array on a GPU, got ndarray"):
        ext_c.tp_all_reduce(group.context, 0, [halves(4)], [halves(4)])
    with pytest.raises(TypeError, match=r"pinned_temp\[0\] must be an array in host memory"):
        ext_c.make_tp_context(ONE, ONE, ONE, ONE, ONE, [gpu], [0])
    handles = plain.handles(matrix(1, 160, 64)[0], [64])
    with pytest.raises(TypeError, match=r"b_list\[0\] is a matrix on the host, and make_tp_context got"):
        ext_c.gemm_half_q_half_tp([gpu], handles, [gpu], False, group.context)
    count = gpu_count()
    stream = cupy.cuda.Stream(non_blocking=True)
    with pytest.raises(ValueError, match=f"for GPU {count}, and there are {count}"):
        ext_c.make_tp_context(ONE, ONE, ONE, ONE, ONE, [PINNED], [*[0] * count, stream.ptr])
    with pytest.raises(ValueError, match=r"kv_split\[0\] names GPU 1, for which streams has no stream"):
        ext_c.make_tp_context([(1, 0, 2)], ONE, ONE, ONE, ONE, [PINNED], [stream.ptr])
