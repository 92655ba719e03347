"""Times on the GPU: CUDA graphs that are replayed, or calls that are queued one by one."""

import functools

import numpy as np

from cupyq import _device
from cupyq._arrays import require_cupy

COLD_FACTOR = 3
"""A timed loop reads this many times the L2 cache before it comes back to the same bytes."""
MAX_COPIES = 64
GRAPH_MICROSECONDS = 3000
"""About how long one replay of a graph should take, so that its start does not count."""
MAX_LAUNCHES = 256
"""Capturing takes the host longer than the GPU needs for the smallest products."""
SETTLE_MICROSECONDS = 10_000
"""Whatever is timed runs for so long before: clocks depend on what came before, and one case must not pay for another."""


def cold_copies(matrix_bytes, l2_bytes=None):
    """How many matrices of this size a loop must rotate over, so that each is read from memory: 2 to MAX_COPIES."""
    l2_bytes = _device.current().l2_bytes if l2_bytes is None else l2_bytes
    return int(min(MAX_COPIES, max(2, -(-COLD_FACTOR * l2_bytes // max(1, int(matrix_bytes))))))


def loops_for(expected_us, copies):
    """How often a graph should go round `copies` calls that take about expected_us microseconds each."""
    wanted = min(MAX_LAUNCHES, GRAPH_MICROSECONDS / max(expected_us, 0.1))
    return max(1, int(wanted // copies))


def graph_microseconds(run, repeats=15):
    """Median time of run() as a replayed CUDA graph, in microseconds. `run` must not synchronise nor allocate unpooled."""
    cupy = require_cupy()
    stream = _stream(cupy.cuda.runtime.getDevice())
    cupy.cuda.get_current_stream().synchronize()  # the inputs may still be on their way
    with stream:
        run()
        stream.synchronize()
        stream.begin_capture()
        kept = run()
        graph = stream.end_capture()
        times = settled_times(lambda: graph.launch(stream), lambda run, count: _event_times(cupy, run, count, stream), repeats)
    del kept
    return float(np.median(times))


def settled_times(run, times_of, repeats):
    """times_of(run, repeats) in microseconds, once run() has gone on for SETTLE_MICROSECONDS."""
    first = max(times_of(run, 2)[-1], 1.0)
    times_of(run, min(50, int(SETTLE_MICROSECONDS / first)))
    return times_of(run, repeats)


@functools.cache
def _stream(device_id):
    """One for all graphs: what is kept for a stream, such as cuBLAS's workspace, would add up."""
    return require_cupy().cuda.Stream(non_blocking=True)


def eager_microseconds(run, repeats=15):
    """Median time of run(), launched call by call. `run` should queue enough that the GPU never waits for the host."""
    cupy = require_cupy()
    run()
    return float(np.median(_event_times(cupy, run, repeats, cupy.cuda.get_current_stream())))


def _event_times(cupy, run, repeats, stream):
    times = []
    for _ in range(repeats):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        times.append(1000 * cupy.cuda.get_elapsed_time(start, end))
    return times


def wait(xp):
    """Until the GPU has done what was queued; NumPy has."""
    if xp is not np:
        xp.cuda.runtime.deviceSynchronize()
