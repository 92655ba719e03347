"""Doors to other libraries that no op needs: memory for CuPy out of PyTorch's pool, and ops inside functions of `jax.jit`."""

import atexit
import functools
import importlib

import numpy as np

from cupyq._arrays import first_line, require_cupy
from cupyq._foreign import gpu_of, stream_at, view_of
from cupyq.errors import BackendError

__all__ = ["jax_callback", "torch_allocator"]


@functools.cache
def torch_allocator():
    """An allocator for CuPy that takes memory from PyTorch's caching allocator and gives it back there.

    For the process: `cupy.cuda.set_allocator(torch_allocator())`; for one thread within a block:
    `with cupy.cuda.using_allocator(torch_allocator()):`. Back to CuPy's own pool:
    `cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)`.

    Then there is one pool in place of two that keep free memory from each other, `torch.cuda.memory_allocated` counts
    CuPy's arrays, and what an op allocates while `torch.cuda.graph` captures belongs to that graph's memory. Memory is
    taken on CuPy's current device for its current stream (an op on tensors: PyTorch's), and like all of PyTorch's it is
    reused in the order of that stream: work on another stream must have been ordered before an array is dropped. Arrays
    outlive the allocator's use, and the process may end with arrays alive. Models keep the memory of their own CUDA graphs
    in pools of theirs.
    PyTorch's torch.cuda.OutOfMemoryError becomes cupy.cuda.memory.OutOfMemoryError. Raises BackendError where PyTorch is
    absent or finds no GPU.
    Source: cupy.cuda.PythonFunctionAllocator (cupy/cupy#3126, cupy/cupy#7556) and torch.cuda.caching_allocator_alloc
    (pytorch/pytorch#33860), which are there for this.
    """
    torch = _module("torch", "PyTorch")
    cupy = require_cupy()
    if not torch.cuda.is_available():
        raise BackendError(
            f"PyTorch {torch.__version__} finds no GPU to allocate from: `python -c 'import torch; torch.cuda.init()'` says why"
        )
    torch.cuda.init()  # the allocator does not begin it
    return cupy.cuda.PythonFunctionAllocator(*_torch_functions(torch, cupy)).malloc


def _torch_functions(torch, cupy):
    """What takes memory, (bytes, device number) -> address, and what gives it back."""
    take, give_back = torch.cuda.caching_allocator_alloc, torch.cuda.caching_allocator_delete
    current_stream = cupy.cuda.get_current_stream
    exited = []
    # What is alive when the interpreter ends is freed in any order, by then perhaps after what would take it back.
    atexit.register(exited.append, True)

    def allocate(size, device_id):
        try:
            return take(size, device_id, current_stream(device_id).ptr)
        except torch.cuda.OutOfMemoryError as error:
            raise cupy.cuda.memory.OutOfMemoryError(size, torch.cuda.memory_allocated(device_id)) from error

    def free(address, device_id):
        if not exited:
            give_back(address)

    return allocate, free


def jax_callback(function, result, **options):
    """A function of JAX arrays that calls `function(*arrays, out=out)` when XLA's work has come to it, inside `jax.jit` too.

    function: an op, or what calls ops, that writes its result into `out`; what it returns is not looked at. result: what the
    result is like, anything with shape and dtype (a jax.ShapeDtypeStruct, an array); a tuple of several makes `out` a tuple.
    The function made takes JAX arrays, by name too, and returns new ones. Other arguments are bound beforehand, as in
    `lambda x, out: ops.qmatmul(x, q, out=out)`.

    On a GPU the arrays are CuPy views of XLA's buffers, valid during the call, and the current stream is XLA's: nothing is
    copied, and the host waits for nothing. On the CPU they are NumPy views, and the reference runs. Inputs are not to be
    written: for an op that works in place, `input_output_aliases={index of the input: index of the result}` lets JAX put
    the input's values into `out` first. This and other options, such as vmap_method, are those of
    jax.experimental.buffer_callback. No gradients pass through. An error inside comes as jax.errors.JaxRuntimeError.
    Raises BackendError where JAX is absent or older than buffer_callback (0.6).
    Source: https://docs.jax.dev/en/latest/jax.experimental.buffer_callback.html
    """
    door = _module("jax.experimental.buffer_callback", "JAX with jax.experimental.buffer_callback")
    tree_util = importlib.import_module("jax.tree_util")

    def call(context, out, *arrays, **named):
        device_id = gpu_of(tree_util.tree_leaves(out)[0], "out")
        if device_id is None:
            out, arrays, named = tree_util.tree_map(_host_view, (out, arrays, named))
            function(*arrays, out=out, **named)
            return
        with require_cupy().cuda.Device(device_id), stream_at(context.stream, device_id):
            out, arrays, named = tree_util.tree_map(view_of, (out, arrays, named))
            function(*arrays, out=out, **named)

    return door.buffer_callback(call, result, **options)


def _host_view(buffer):
    view = np.asarray(buffer)
    if not buffer.writeable:  # JAX marks none of them
        view.flags.writeable = False
    return view


def _module(name, title):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"{title} cannot be imported ({first_line(error)}): install it") from None
