"""Tensor parallelism of exllamav2, but for its two blocks (_tp_blocks.py): the context, exchange between its devices, and
products and norms on each of them. How the work is ordered is said in _tp_context.py.
"""

import numpy as np

from cupyq import _device, ops
from cupyq._arrays import FLOATS, byte_bounds, check, float16, is_cupy, require_cupy
from cupyq._foreign import stream_at
from cupyq.ext._arrays import entry, integer, number, refuse_any_overlap
from cupyq.ext._handles import handles
from cupyq.ext._tp_blocks import tp_attn_forward_, tp_attn_forward_paged_, tp_mlp_forward_
from cupyq.ext._tp_context import SPLITS, TPContext, broadcast, context_of, device_of, gather
from cupyq.ops._common import refuse_overlap

__all__ = [
    "free_tp_context",
    "gemm_half_q_half_tp",
    "make_tp_context",
    "rms_norm_tp",
    "tp_all_reduce",
    "tp_attn_forward_",
    "tp_attn_forward_paged_",
    "tp_broadcast",
    "tp_cross_device_barrier",
    "tp_gather",
    "tp_mlp_forward_",
]

# --- making and freeing -----------------------------------------------------------------------------------------------


@entry(writes=("pinned_temp",))
def make_tp_context(kv_split, id_split, vc_split, rs_split, q_split, pinned_temp, streams):
    """A handle for a group of devices that share a model

    Each split is a list of (device, begin, end): who holds which key-value heads, intermediate columns, vocabulary
    columns, hidden columns and query heads, in order and without gaps; devices may occur more than once. pinned_temp: the
    float16 host buffers that all exchange goes through (page-locked, where GPUs are to be fast), two for the blocks;
    they are kept. streams: by device number, the address of the stream to work on, 0 for a device without a share; an
    address must be one of a stream that outlives the context. Without any, the context is for NumPy arrays.
    """
    streams = _check_streams(streams)
    given = zip(SPLITS, (kv_split, id_split, vc_split, rs_split, q_split), strict=True)
    splits = tuple(_check_split(split, name, streams) for name, split in given)
    if not isinstance(pinned_temp, (list, tuple)) or not pinned_temp:
        raise TypeError(f"pinned_temp must be a list of float16 arrays in host memory, got {type(pinned_temp).__name__}")
    for index, array in enumerate(pinned_temp):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"pinned_temp[{index}] must be an array in host memory, got {type(array).__name__}")
        check(array, f"pinned_temp[{index}]", dtype=float16, writes=True)
    refuse_any_overlap(**{f"pinned_temp[{index}]": array for index, array in enumerate(pinned_temp)})
    pinned = [array.reshape(-1).view(np.uint8) for array in pinned_temp]
    return handles.add("tp_context", TPContext(splits, pinned, streams))


def _check_streams(streams):
    """{device: CuPy stream} of the devices that have one."""
    if not isinstance(streams, (list, tuple)):
        raise TypeError(f"streams must be a list of stream addresses by device number, got {type(streams).__name__}")
    addresses = [integer(stream, f"streams[{device}]", low=0) for device, stream in enumerate(streams)]
    if not any(addresses):
        return {}
    cuda, count = require_cupy().cuda, _device.count()
    found = {}
    for device, address in enumerate(addresses):
        if address and device >= count:
            raise ValueError(f"streams[{device}] is for GPU {device}, and there are {count}: pass 0 there")
        if address:
            with cuda.Device(device):
                found[device] = stream_at(address, device)
    return found


def _check_split(split, name, streams):
    if not isinstance(split, (list, tuple)):
        raise TypeError(f"{name} must be a list of (device, begin, end), got {type(split).__name__}")
    entries, at = [], 0
    for index, part in enumerate(split):
        if not isinstance(part, (list, tuple)) or len(part) != 3:
            raise TypeError(f"{name}[{index}] must be (device, begin, end), got {part!r:.60}")
        device, begin, end = (integer(value, f"{name}[{index}]", low=0) for value in part)
        if begin != at or end <= begin:
            raise ValueError(f"{name}[{index}] must be a range from {at} with something in it, got {begin} to {end}")
        if streams and device not in streams:
            raise ValueError(f"{name}[{index}] names GPU {device}, for which streams has no stream")
        entries.append((device, begin, end))
        at = end
    return tuple(entries)


@entry
def free_tp_context(tp_context):
    """Wait for what the context has queued, then forget the handle."""
    context_of(tp_context).wait()
    handles.free(tp_context, "tp_context", "tp_context")


# --- exchange ---------------------------------------------------------------------------------------------------------


@entry(arrays=("source",), writes=("targets",))
def tp_broadcast(tp_context, buffer, source, broadcast_type, targets, dim, t_device=-1):
    """targets[i] = source on every device of a split, by way of pinned_temp[buffer], where it stays

    source: on a GPU or in host memory, best of all the beginning of pinned_temp[buffer] itself, which saves a copy and a
    wait of the host. targets: one array per entry of the split, of source's dtype and no less elements. `dim` is not
    used. t_device: the only device to serve, -1 for all.
    """
    context = context_of(tp_context)
    split = context.split(broadcast_type, "broadcast_type")
    check(source, "source", dtype=FLOATS)
    if is_cupy(source) and not context.streams:
        raise TypeError("source is on a GPU, and make_tp_context got no streams: pass an array in host memory")
    chosen = _chosen(context, split, targets, "targets", t_device, source.dtype)
    for index, (_, target) in chosen.items():
        if target.size < source.size:
            raise ValueError(f"targets[{index}] must have room for the {source.size} values of source, got {target.size}")
    context.host(buffer, source.dtype, (source.size,), "source")
    with context.ordered(source):
        broadcast(context, buffer, source, [target for _, target in chosen.values()])


@entry(writes=("targets",))
def tp_gather(tp_context, buffer, inputs, broadcast_type, targets, broadcast_type_target, dim, t_device=-1):
    """pinned_temp[buffer][:, begin * dim : end * dim] = inputs[i] for every entry of a split; then targets[i] = all of it

    inputs [rows, (end - begin) * dim], one per entry; the buffer then begins with the matrix [rows, last end * dim].
    broadcast_type_target: the split whose devices receive it in `targets`, arrays of that dtype with no less elements;
    -1 or -2 for none. The host must wait for the streams before it reads the buffer. t_device: the only device that
    takes part, -1 for all.
    """
    context = context_of(tp_context)
    split = context.split(broadcast_type, "broadcast_type")
    dim = integer(dim, "dim", low=1)
    chosen = _chosen(context, split, inputs, "inputs", t_device, FLOATS)
    if not chosen:
        return
    first = next(iter(chosen))
    rows, dtype = inputs[first].shape[:1], inputs[first].dtype
    for index, (_, array) in chosen.items():
        _, begin, end = split[index]
        check(array, f"inputs[{index}]", dtype=dtype, shape=(*rows, (end - begin) * dim))
    host = context.host(buffer, dtype, (*rows, split[-1][2] * dim), "the gathered matrix")
    receivers = {}
    if integer(broadcast_type_target, "broadcast_type_target") not in (-1, -2):
        to = context.split(broadcast_type_target, "broadcast_type_target")
        receivers = _chosen(context, to, targets, "targets", t_device, dtype)
    for index, (_, target) in receivers.items():
        if target.size < host.size:
            raise ValueError(f"targets[{index}] must have room for the {host.size} values gathered, got {target.size}")
    parts = [(array, split[index][1] * dim) for index, (_, array) in chosen.items()]
    with context.ordered():
        gather(context, host, parts, [target for _, target in receivers.values()])


def _chosen(context, split, arrays, name, t_device, dtype):
    """{index: (device, array)} of the entries that take part, after the checks all arrays share."""
    t_device = integer(t_device, "t_device")
    if not isinstance(arrays, (list, tuple)) or len(arrays) != len(split):
        count = len(arrays) if isinstance(arrays, (list, tuple)) else type(arrays).__name__
        raise ValueError(f"{name} must be a list of {len(split)} arrays, one for each entry of the split, got {count}")
    chosen = {}
    for index, (device, _, _) in enumerate(split):
        if t_device in (-1, device):
            context.check_place(arrays[index], device, f"{name}[{index}]", dtype=dtype)
            chosen[index] = device, arrays[index]
    return chosen


@entry
def tp_cross_device_barrier(tp_context, broadcast_type, t_device=-1, stage=-1, next_stage=-1):
    """What is queued later on any stream of the context waits for what is queued so far on all; the host does not wait

    The other arguments have no effect.
    """
    context_of(tp_context).barrier()


@entry(writes=("residuals",))
def tp_all_reduce(tp_context, buffer, tensors, residuals):
    """residuals[i] = residuals[0] + tensors[0] + tensors[1] + ..., for all i, by way of pinned_temp[buffer], where it stays

    Added from the left, with one rounding to the dtype at each step. All arrays have one shape and dtype; tensors[i] and
    residuals[i] are on one device, several may share one. The other residuals are only written: they were to be equal.
    """
    context = context_of(tp_context)
    for name, arrays in (("tensors", tensors), ("residuals", residuals)):
        if not isinstance(arrays, (list, tuple)) or not arrays or len(arrays) != len(tensors):
            raise ValueError(f"{name} must be a list of arrays, as many residuals as tensors and at least one")
        for index, array in enumerate(arrays):
            device = device_of(tensors[index])
            context.check_stream(device, f"tensors[{index}]")
            context.check_place(array, device, f"{name}[{index}]", dtype=FLOATS)
            check(array, f"{name}[{index}]", dtype=tensors[0].dtype, shape=tensors[0].shape)
    refuse_any_overlap(
        **{f"{name}[{i}]": a for name, arrays in (("tensors", tensors), ("residuals", residuals)) for i, a in enumerate(arrays)}
    )
    host = context.host(buffer, tensors[0].dtype, (1, tensors[0].size), "a tensor")
    with context.ordered():
        for index, (tensor, residual) in enumerate(zip(tensors, residuals, strict=True)):
            if index:
                context.send(host, residual)
            with context.on(device_of(tensor)):
                ops.add(residual, tensor, out=residual)
            context.receive(residual.reshape(1, -1), host, 0)
            context.barrier()
        for residual in residuals[:-1]:
            context.send(host, residual)


# --- products and norms per device ------------------------------------------------------------------------------------


@entry(writes=("c_list",), unused=("force_cuda",))
def gemm_half_q_half_tp(a_list, b_list, c_list, force_cuda, tp_context, t_device=-1):
    """c_list[i] = a_list[i] W_i (+ bias), W_i the matrix behind b_list[i], each on its device's stream

    a_list [rows, k] and c_list [rows, n]: float16. force_cuda is not used. t_device: the only GPU to work, -1 for all.
    """
    context, t_device = context_of(tp_context), integer(t_device, "t_device")
    _check_lists(a_list=a_list, b_list=b_list, c_list=c_list)
    work = []
    for index, (a, c) in enumerate(zip(a_list, c_list, strict=True)):
        matrix = handles.get(b_list[index], "q_matrix", f"b_list[{index}]").matrix
        device = None if matrix.xp is np else matrix.tiles.words.device.id
        if device is not None and t_device not in (-1, device):
            continue
        context.check_stream(device, f"b_list[{index}]")
        context.check_matrix(matrix, device, f"b_list[{index}]")
        context.check_place(a, device, f"a_list[{index}]")
        context.check_place(c, device, f"c_list[{index}]")
        check(a, f"a_list[{index}]", shape=(None, matrix.k))
        check(c, f"c_list[{index}]", shape=(a.shape[0], matrix.n))
        refuse_any_overlap(**{f"a_list[{index}]": a, f"c_list[{index}]": c})
        work.append((device, a, matrix, c))
    with context.ordered():
        for device, a, matrix, c in work:
            with context.on(device):
                ops.qmatmul(a, matrix, out=c)


@entry(writes=("y_list",))
def rms_norm_tp(x_list, w_list, y_list, epsilon, tp_context):
    """y_list[i] = x_list[i] * w_list[i] / sqrt(mean of squares + epsilon), each on its device's stream

    x_list and y_list [rows, dim], w_list [dim]: float16. y_list[i] may be x_list[i].
    """
    context, eps = context_of(tp_context), number(epsilon, "epsilon")
    _check_lists(x_list=x_list, w_list=w_list, y_list=y_list)
    for index, (x, w, y) in enumerate(zip(x_list, w_list, y_list, strict=True)):
        context.check_stream(device_of(x), f"x_list[{index}]")
        for name, array in (("x_list", x), ("w_list", w), ("y_list", y)):
            context.check_place(array, device_of(x), f"{name}[{index}]")
        check(x, f"x_list[{index}]", dtype=float16, ndim=2)
        check(w, f"w_list[{index}]", dtype=float16, shape=x.shape[1:])
        check(y, f"y_list[{index}]", dtype=float16, shape=x.shape)
    lists = {"x_list": x_list, "w_list": w_list, "y_list": y_list}
    arrays = {f"{name}[{index}]": array for name, items in lists.items() for index, array in enumerate(items)}
    for index, (x, y) in enumerate(zip(x_list, y_list, strict=True)):
        own = {f"y_list[{index}]"} | ({f"x_list[{index}]"} if byte_bounds(x) == byte_bounds(y) else set())
        refuse_overlap(y, f"y_list[{index}]", **{name: array for name, array in arrays.items() if name not in own})
    with context.ordered():
        for x, w, y in zip(x_list, w_list, y_list, strict=True):
            with context.on(device_of(x)):
                ops.rms_norm(x, w, eps=eps, out=y)


def _check_lists(**lists):
    counts = {name: len(items) if isinstance(items, (list, tuple)) else -1 for name, items in lists.items()}
    if len(set(counts.values())) > 1 or -1 in counts.values():
        raise ValueError(f"{', '.join(lists)} must be lists of one length, got {list(counts.values())} (-1: no list)")
