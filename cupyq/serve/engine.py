"""A model's passes over pages: prompts in chunks, steps of a whole batch; on a GPU the latter as CUDA graphs."""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupyq import _fork
from cupyq._copies import copy_values
from cupyq.models.queues import HostQueue, StreamQueue
from cupyq.ops._common import is_checking
from cupyq.serve.rows import Rows

MOST_NEW = 16
"""Tokens of a row that one step may verify."""


def batch_class(rows: int) -> int:
    """The batch that a graph is captured for: a power of two, or one and a half times one.

    >>> [batch_class(rows) for rows in (1, 3, 5, 9, 13, 100)]
    [1, 3, 6, 12, 16, 128]
    """
    power = 1 << (rows - 1).bit_length()
    return power // 4 * 3 if power >= 4 and rows <= power // 4 * 3 else power


SMALL_PASS = 512
"""Prompt tokens that pass in less time than their kernels can be launched one by one: passes of as many are graphs, too."""
_SHORTEST = 16  # tokens; shorter prompts count as long


def pass_class(rows: int, width: int) -> tuple[int, int]:
    """(rows, tokens of each) that a graph is captured for, so that it takes so many parts of prompts, the longest of `width`.

    >>> pass_class(3, 100), pass_class(1, 5)
    ((4, 128), (1, 16))
    """
    return 1 << (rows - 1).bit_length(), max(_SHORTEST, 1 << (width - 1).bit_length())


class Part(NamedTuple):
    """Tokens of a text at places from `begin` on, and the pages of the text."""

    tokens: Sequence[int]
    begin: int
    pages: Sequence[int]
    adapters: Any


class Engine:
    """One model and its paged cache, of which it is told what lies where; rows 0 to `max_batch` - 1 are those of a batch.

    Steps run on a stream of their own, which `join` orders with the caller's. `alone`: every row passes by itself, so that
    its result is, bit for bit, that of a batch of one.
    """

    def __init__(
        self, model: Any, pages: int, page_size: int, max_batch: int, kind: str, *, graph: bool = True, alone: bool = False
    ):
        self.model, self.xp, self.page_size, self.alone = model, model.xp, page_size, alone
        # One page more, for what nobody will read: rows of a graph without a job, drafts beyond a job's pages.
        self.batch = batch_class(max_batch)
        self.cache = model.new_paged_cache(pages + 1, self.batch, page_size=page_size, kind=kind)
        self.capacity = self.cache.capacity
        self._nowhere = pages
        self._table = np.full((self.batch, self.cache.max_pages), pages, np.int32)
        self._table_changed = True
        self.queue: Any = HostQueue() if model.xp is np else StreamQueue(model.xp, model.embedding.device.id)
        # What CUPYQ_CHECK=1 reads back from the GPU cannot be part of a graph.
        self._uses_graphs = graph and self.queue.has_graphs and not is_checking() and not alone
        self._steps, self._passes = Graphs(self.queue, model), Graphs(self.queue, model)
        # Of `verify`: places of rows, where they end, and tokens; of `prefill` the same, and the pages of each.
        self._verified = self.xp.zeros(self.batch * (2 + MOST_NEW), np.int32)
        self._passed = self.xp.zeros(SMALL_PASS + SMALL_PASS // _SHORTEST * (2 + self.cache.max_pages), np.int32)

    # --- streams ---

    def join(self) -> None:
        """Order what was queued by steps and by the caller before what either is given later."""
        self.queue.join()

    def on_device(self) -> Any:
        """A context whose current device is the model's, in whichever thread."""
        if self.xp is np:
            return contextlib.nullcontext()
        _fork.refuse()
        return self.queue.cuda.Device(self.queue.device_id)

    def stepping(self) -> Any:
        """A context whose work is queued among the steps; its memory is of the usual pool."""
        return contextlib.nullcontext() if self.xp is np else _on(self.queue)

    # --- pages ---

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """The pages of a row of the batch; without any, it has no job."""
        self._table[row] = self._nowhere
        self._table[row, : len(pages)] = pages
        self._table_changed = True

    def _upload_table(self) -> None:
        if self._table_changed:
            copy_values(self.xp.asarray(self._table), self.cache.block_table)
            self._table_changed = False

    # --- passes ---

    def prefill(self, parts: Sequence[Part]) -> None:
        """Keys and values of these parts of texts, in one pass. On the caller's stream, between `join`s.

        All are as long as the longest: what shorter ones have behind their end goes where their text has nothing yet, and
        is replaced before anything reads it.
        """
        rows, width, furthest = len(parts), max(len(part.tokens) for part in parts), max(part.begin for part in parts)
        selection = self._select([part.adapters for part in parts])
        key = pass_class(rows, width)
        is_graph = self._uses_graphs and selection is None
        is_graph = is_graph and math.prod(key) <= SMALL_PASS and furthest + key[1] <= self.capacity
        if is_graph:
            rows, width = key
        host = np.zeros(rows * (2 + width + self.cache.max_pages), np.int32)
        begins, ends, ids, table = _views(host, rows, (), (), (width,), (self.cache.max_pages,))
        table[...] = self._nowhere
        for row, part in enumerate(parts):
            begins[row] = part.begin
            table[row, : len(part.pages)] = part.pages
            ids[row, : len(part.tokens)] = part.tokens
        ends[...] = begins + np.int32(width)
        if is_graph:
            arrays = self._passed[: len(host)]
            with self.stepping():
                copy_values(self.xp.asarray(host), arrays)
        else:
            arrays = self.xp.asarray(host)
        begins, ends, ids, table = _views(arrays, rows, (), (), (width,), (self.cache.max_pages,))

        def compute() -> None:  # a graph would keep what this returned
            self._hidden(ids, begins, ends, table, selection)

        if is_graph:
            self._passes.result(key, compute, at_once=False)
        else:
            compute()

    def decode(self, rows: Rows, adapters: Sequence[Any]) -> Any:
        """Logits [count, vocab] after the next token of the first rows, as many as there are `adapters`."""
        count = len(adapters)
        if self.alone:
            ones = [slice(row, row + 1) for row in range(count)]
            inputs = [(rows.ids[one, None], rows.positions[one], rows.lengths[one]) for one in ones]
            return self._each_alone(inputs, adapters)
        size = batch_class(count) if self._uses_graphs else count
        arrays = (rows.ids[:size, None], rows.positions[:size], rows.lengths[:size])
        return self._pass(arrays, adapters)[:count, 0]

    def verify(self, fed: np.ndarray, at: np.ndarray, adapters: Sequence[Any]) -> Any:
        """Logits [count, new, vocab] of tokens fed [count, new] at positions at, at + 1, ... of the first `count` rows."""
        count, new = fed.shape
        if self.alone:
            ends = at + np.int32(new)
            inputs = [tuple(self.xp.asarray(array[row : row + 1]) for array in (fed, at, ends)) for row in range(count)]
            return self._each_alone(inputs, adapters).reshape(count, new, -1)
        size = batch_class(count) if self._uses_graphs else count
        host = np.zeros((2 + new) * size, np.int32)
        places, ends, ids = _views(host, size, (), (), (new,))
        places[:count], ids[:count] = at, fed
        ends[...] = places + np.int32(new)
        with self.stepping():
            copy_values(self.xp.asarray(host), self._verified[: len(host)])
        places, ends, ids = _views(self._verified[: len(host)], size, (), (), (new,))
        return self._pass((ids, places, ends), adapters)[:count]

    def _each_alone(self, inputs: Sequence[tuple], adapters: Sequence[Any]) -> Any:
        """Logits [all tokens, vocab] of rows that pass one by one, launch by launch."""
        parts = []
        selections = [self._select([choice]) for choice in adapters]
        with self.queue.entered():
            self._upload_table()
            for row, (ids, positions, ends) in enumerate(inputs):
                table = self.cache.block_table[row : row + 1]
                parts.append(self._logits(ids, positions, ends, table, selections[row])[0])
            return self.xp.concatenate(parts)

    def _pass(self, arrays: tuple[Any, Any, Any], adapters: Sequence[Any]) -> Any:
        """Logits [size, new, vocab]: a graph's where there is one for this batch, and captured where there may be."""
        ids, positions, lengths = arrays
        size, new = ids.shape
        table = self.cache.block_table[:size]
        # Graphs hold the addresses of adapters' weights, which come and go with the batch: such steps are launched one by one.
        selection = self._select([*adapters, *[None] * (size - len(adapters))])
        with self.stepping():
            self._upload_table()
        if self._uses_graphs and selection is None:
            # A graph reads the arrays that it was captured with.
            key = (size, new, *(array.data.ptr for array in arrays))
            return self._steps.result(key, lambda: self._logits(ids, positions, lengths, table, None))
        with self.queue.entered():
            return self._logits(ids, positions, lengths, table, selection)

    def _logits(self, ids: Any, positions: Any, lengths: Any, table: Any, selection: Any) -> Any:
        hidden, step = self._hidden(ids, positions, lengths, table, selection)
        return self.model.logits(hidden, step)

    def _hidden(self, ids: Any, positions: Any, lengths: Any, table: Any, selection: Any) -> tuple[Any, Any]:
        rows = copy.copy(self.cache)
        rows.batch, rows.block_table = len(ids), table
        step = self.model.step(rows, ids.shape[1], positions, lengths, selection)
        return self.model.hidden(ids, step), step

    def _select(self, adapters: list[Any]) -> Any:
        if all(choice is None for choice in adapters):
            return None
        return self.model.select_adapters(adapters, len(adapters))


class Graphs:
    """Computations of fixed arrays, by key, captured as CUDA graphs with memory that nobody else is given.

    model: what computes. Where others hold parts of it, all have the same keys, captured together.
    """

    def __init__(self, queue: Any, model: Any):
        self._queue, self._model = queue, model
        self._pool = queue.new_pool() if queue.has_graphs else None
        self._kept: dict[tuple, tuple[Any, Any]] = {}
        self._seen: set[tuple] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def result(self, key: tuple, compute: Callable[[], Any], *, at_once: bool = True) -> Any:
        """What compute() gives, of which the next replay writes the same arrays anew.

        Captured when first asked for, or if not `at_once` when asked for again.
        """
        with self._queue.entered(self._pool):
            if key in self._kept:
                graph, result = self._kept[key]
                self._model.launch(graph)
                return result
            memory = self._pool.total_bytes()
            result = compute()
            has_grown = self._pool.total_bytes() != memory
        # A pool that ran short has given back what is free now, where graphs have arrays. Each rank has a pool of its own.
        if self._model.agreed(has_grown):
            self._kept.clear()
        if at_once or key in self._seen:
            kept: list[Any] = []
            with self._queue.entered(self._pool):
                graph = self._queue.captured(lambda: kept.append(compute()))
            self._kept[key] = self._model.adopt(graph), kept[0]
        self._seen.add(key)
        return result


def _views(memory: Any, rows: int, *shapes: tuple[int, ...]) -> list[Any]:
    """Arrays [rows, *shape] that lie one behind the other."""
    views, begin = [], 0
    for shape in shapes:
        end = begin + rows * math.prod(shape)
        views.append(memory[begin:end].reshape(rows, *shape))
        begin = end
    return views


@contextlib.contextmanager
def _on(queue: Any) -> Any:
    with queue.cuda.Device(queue.device_id), queue.stream:
        yield


class Landing:
    """Arrays on their way to the host, queued behind the steps so far: `receive` waits for them alone."""

    def __init__(self, engine: Engine, arrays: dict[Any, Any]):
        self._model, self._event = engine.model, None
        if engine.xp is np:
            self._arrays = {name: array.copy() for name, array in arrays.items()}
            return
        cuda = engine.queue.cuda
        self._arrays, self._memory = {}, []
        with engine.stepping():
            for name, array in arrays.items():
                memory = cuda.alloc_pinned_memory(array.nbytes)
                place = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
                array.get(stream=engine.queue.stream, out=place, blocking=False)
                self._arrays[name] = place
                self._memory.append(memory)
            self._event = cuda.Event(disable_timing=True)
            self._event.record(engine.queue.stream)

    def receive(self) -> dict[Any, np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        self._model.check()  # where a step ended because another rank failed, they mean nothing
        return self._arrays
