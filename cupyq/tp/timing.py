"""How long sums over the ranks take, as `cupyq doctor --tp` tells it."""

import numpy as np

from cupyq.models.queues import StreamQueue


def timed_sums(comm, sizes):
    """{bytes: (microseconds, whether the sum is right)} of float32 all-reduces on this rank."""
    queue = StreamQueue(comm.xp, comm.device)
    return {size: _timed_sum(comm, queue, size, 50 if size <= 1 << 20 else 5) for size in sizes}


def _timed_sum(comm, queue, size, repeats):
    """In a graph, as a decoding step has them: what the GPUs take, not the host."""
    begin, end = comm.xp.cuda.Event(), comm.xp.cuda.Event()
    with queue.entered():
        array = comm.xp.full(size // 4, comm.rank + 1, np.float32)
        out = comm.all_reduce(array)
        ok = out == comm.ranks * (comm.ranks + 1) // 2
        graph = comm.adopt(queue.captured(lambda: [comm.all_reduce(array, out) for _ in range(repeats)]))
        comm.launch(graph)
        begin.record()
        comm.launch(graph)
        end.record()
        comm.wait()
    return 1e3 * comm.xp.cuda.get_elapsed_time(begin, end) / repeats, bool(ok.all())
