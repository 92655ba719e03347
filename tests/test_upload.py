"""models/upload.py: every byte arrives, memory stays bounded, and nothing is left behind when a load breaks off.

Without a GPU, a stand-in for CuPy runs copies as late as it may: a pinned buffer filled again too early, or an array handed
out before its copy was waited for, holds wrong bytes.
"""

import ctypes
import dataclasses
import gc
import os
import random
import threading
import time
import types
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint
from cupyq.models import upload
from cupyq.models.upload import Wanted

ROOT = Path(__file__).parent.parent
ARCH, EXAMPLES = ROOT / "tests/models", ROOT / "examples/models"


class HostArray(np.ndarray):
    """A NumPy array that passes for a CuPy one where the upload looks at it."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)


class PinnedMemory(bytearray):
    __hash__ = object.__hash__


class FakeCupy:
    """Streams that run late: copies wait in a list until somebody waits for an event behind them."""

    def __init__(self):
        self.queued, self.done = [], 0
        self.lock = threading.Lock()
        self.pinned, self.arrays, self.most_bytes = [], [], 0
        outer = self

        class Event:
            def __init__(self, block=False, disable_timing=False):
                self.position = 0

            def record(self, stream=None):
                self.position = len(outer.queued)

            def synchronize(self):
                outer.run_until(self.position)

        class Stream:
            ptr = 0

            def __init__(self, non_blocking=False):
                pass

            def wait_event(self, event):
                outer.run_until(event.position)

            def synchronize(self):
                outer.run_until(len(outer.queued))

        runtime = types.SimpleNamespace(
            getDevice=lambda: 3,
            memcpyHostToDevice=1,
            memcpyAsync=lambda *copy: outer.queued.append((*copy[:3], current.device)),
        )
        current = threading.local()
        self.cuda = types.SimpleNamespace(
            Event=Event,
            Stream=Stream,
            Device=lambda number: types.SimpleNamespace(use=lambda: setattr(current, "device", number)),
            runtime=runtime,
            get_current_stream=Stream,
            alloc_pinned_memory=self.alloc_pinned_memory,
        )

    def alloc_pinned_memory(self, nbytes):
        memory = PinnedMemory(nbytes)
        self.pinned.append(weakref.ref(memory))
        return memory

    def run_until(self, position):
        with self.lock:
            for target, source, nbytes, device in self.queued[self.done : position]:
                assert device == 3, "the thread has not entered the caller's device"
                ctypes.memmove(target, source, nbytes)
            self.done = max(self.done, position)

    def empty(self, shape, dtype):
        array = np.zeros(shape, dtype).view(HostArray)
        self.arrays.append(weakref.ref(array))
        self.most_bytes = max(self.most_bytes, sum(live.nbytes for live in self.alive(self.arrays)))
        return array

    @staticmethod
    def alive(references):
        return [value for value in (reference() for reference in references) if value is not None]

    def assert_nothing_is_left(self, threads_before):
        gc.collect()
        assert self.done == len(self.queued), "copies were still running when their memory went away"
        assert not self.alive(self.pinned) and not self.alive(self.arrays)
        assert threading.active_count() == threads_before


@dataclasses.dataclass
class FakePart:
    checkpoint: Checkpoint
    tensors: dict

    @property
    def nbytes(self):
        return self.checkpoint.total_bytes(wanted.name for wanted in self.tensors.values())


@pytest.fixture
def fake_cupy(monkeypatch):
    cupy = FakeCupy()
    monkeypatch.setattr(upload, "require_cupy", lambda: cupy)
    monkeypatch.setattr(upload, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(upload, "AHEAD_BYTES", 16384)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    return cupy


def checkpoint_of(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def matrices(count, size=12_000):
    """`count` tensors of about `size` bytes, none a multiple of a pinned buffer's."""
    rng = np.random.default_rng(0)
    return {f"m{i}": rng.integers(0, 256, size + 41 * i, np.uint8) for i in range(count)}


def test_every_byte_arrives(fake_cupy):
    with Checkpoint(EXAMPLES / "shakespeare-exl2-2.5") as checkpoint:
        names = [n for n in checkpoint.names if n.startswith(("model.layers.0.", "model.embed"))]
        parts = [FakePart(checkpoint, {"x": Wanted(n, on_host=n.endswith("q_groups"))}) for n in names]
        count = 0
        for (part, arrays), n in zip(upload.read(checkpoint, parts, fake_cupy), names, strict=True):
            expected = checkpoint.array(n)
            assert part.tensors["x"].name == n and arrays["x"].dtype == expected.dtype
            assert np.array_equal(np.asarray(arrays["x"]), expected)
            assert isinstance(arrays["x"], HostArray) != n.endswith("q_groups")
            count += 1
    assert count == len(names) > 30 and len(fake_cupy.queued) > 100


def test_tensors_of_all_sizes_share_buffers(fake_cupy, tmp_path):
    """A part of many small tensors takes few buffers; empty ones arrive, too; each begins where any dtype may."""
    rng = np.random.default_rng(1)
    sizes = [0, 1, 255, 256, 257, 3840, 4095, 4096, 4097, 9000, 0, 7]
    tensors = {f"t{i}": rng.standard_normal(size) for i, size in enumerate(sizes)} | {"odd": rng.integers(0, 9, 3, np.int8)}
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        part = FakePart(checkpoint, {name: Wanted(name) for name in tensors})
        ((_, arrays),) = upload.read(checkpoint, [part], fake_cupy)
        for name, expected in tensors.items():
            assert np.array_equal(np.asarray(arrays[name]), expected), name
        addresses = [source % 256 for _, source, _, _ in fake_cupy.queued]
        assert len(set(addresses)) <= len(fake_cupy.pinned)  # one per buffer: aligned within it
        batches = list(upload._batches(part, arrays))
        assert len(batches) <= -(-(checkpoint.total_bytes(tensors) + 256 * len(tensors)) // 4096)


def test_values_are_converted(fake_cupy):
    with Checkpoint(ARCH / "qwen2") as checkpoint:
        expected = checkpoint.array("lm_head.weight").astype(ml_dtypes.bfloat16)
        for on_host in (False, True):
            wanted = Wanted("lm_head.weight", np.dtype(ml_dtypes.bfloat16), on_host)
            ((_, arrays),) = upload.read(checkpoint, [FakePart(checkpoint, {"w": wanted})], fake_cupy)
            assert np.array_equal(np.asarray(arrays["w"]).view(np.uint16), expected.view(np.uint16))


def test_conversion_in_pieces(fake_cupy, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_CONVERTED_AT_ONCE", 100)
    values = np.random.default_rng(2).standard_normal(5001).astype(np.float32)
    with checkpoint_of(tmp_path, {"w": values}) as checkpoint:
        ((_, arrays),) = upload.read(checkpoint, [FakePart(checkpoint, {"w": Wanted("w", np.dtype(np.float16))})], fake_cupy)
    assert np.array_equal(np.asarray(arrays["w"]), values.astype(np.float16))


def test_many_threads_in_any_order(fake_cupy, tmp_path, monkeypatch):
    """Readers that take turns at random, and a consumer that waits at random."""
    chance, real = random.Random(3), upload._fill
    readers = set()

    def fill(checkpoint, name, begin, target):
        readers.add(threading.current_thread().name)
        time.sleep(chance.choice((0, 0, 0.0005, 0.002)))
        real(checkpoint, name, begin, target)

    monkeypatch.setattr(upload, "_fill", fill)
    tensors = matrices(40)
    before = threading.active_count()
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        parts = [FakePart(checkpoint, {"a": Wanted(f"m{i}"), "b": Wanted(f"m{i + 1}")}) for i in range(0, 40, 2)]
        for i, (_, arrays) in enumerate(upload.read(checkpoint, parts, fake_cupy)):
            assert np.array_equal(np.asarray(arrays["a"]), tensors[f"m{2 * i}"])
            assert np.array_equal(np.asarray(arrays["b"]), tensors[f"m{2 * i + 1}"])
            time.sleep(chance.choice((0, 0.004)))
        del arrays
    assert len(readers) > 3
    fake_cupy.assert_nothing_is_left(before)


def test_memory_is_bounded(fake_cupy, tmp_path):
    """On the host by the pinned buffers, on the GPU by what is ahead, the part in use and the one last begun."""
    tensors = matrices(100)
    largest = max(tensor.nbytes for tensor in tensors.values())
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        parts = [FakePart(checkpoint, {"x": Wanted(name)}) for name in tensors]
        for _, arrays in upload.read(checkpoint, parts, fake_cupy):
            del arrays
    assert len(fake_cupy.pinned) <= 2 * 6
    assert fake_cupy.most_bytes <= upload.AHEAD_BYTES + 2 * largest
    assert fake_cupy.most_bytes >= upload.AHEAD_BYTES, "no overlap left"


def test_small_models_take_few_pinned_buffers(fake_cupy, tmp_path):
    with checkpoint_of(tmp_path, matrices(1, 5000)) as checkpoint:
        list(upload.read(checkpoint, [FakePart(checkpoint, {"x": Wanted("m0")})], fake_cupy))
    assert len(fake_cupy.pinned) <= 2


def test_a_value_out_of_range_is_refused(fake_cupy, tmp_path):
    tensors = {"w": np.full((100, 100), 1e6, np.float32), "v": np.ones(3, np.float32)}
    before = threading.active_count()
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        parts = [FakePart(checkpoint, {"x": Wanted(n, np.dtype(np.float16))}) for n in "vwvvvvvv"]
        with pytest.raises(FormatError, match="model.safetensors: tensor 'w': holds values beyond the range of float16"):
            list(upload.read(checkpoint, parts, fake_cupy))
    fake_cupy.assert_nothing_is_left(before)


def broken_load(cupy, checkpoint, names, breaks):
    """Upload until breaks(number of parts that arrived) raises -> (the error, parts that arrived)."""
    arrived = 0
    try:
        parts = (FakePart(checkpoint, {"x": Wanted(name)}) for name in names)
        for _, arrays in upload.read(checkpoint, parts, cupy):
            arrived += 1
            breaks(arrived)
            del arrays
    except BaseException as error:
        for raised in (error, error.__cause__, error.__context__):
            if raised is not None:
                raised.with_traceback(None)
        return error, arrived
    return None, arrived


def test_a_file_cut_short_during_a_load(fake_cupy, tmp_path):
    tensors = matrices(40)
    before = threading.active_count()
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        victim = checkpoint.info("m30")

        def cut(arrived):
            if arrived == 5:
                os.truncate(tmp_path / "model.safetensors", victim.end - 1)

        names = sorted(checkpoint.names, key=lambda name: checkpoint.info(name).start)
        error, arrived = broken_load(fake_cupy, checkpoint, names, cut)
        assert isinstance(error, FormatError) and 5 < arrived <= names.index("m30")
        message = rf"{tmp_path}/model.safetensors: tensor 'm30': ends 1 bytes early; the file is damaged or cut short"
        assert str(error).startswith(message), error
    fake_cupy.assert_nothing_is_left(before)


def test_a_medium_that_fails_during_a_load(fake_cupy, tmp_path, monkeypatch):
    before, reads, real = threading.active_count(), [], os.preadv

    def failing(*arguments):
        reads.append(None)
        if len(reads) > 30:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    with checkpoint_of(tmp_path, matrices(40)) as checkpoint:
        monkeypatch.setattr(os, "preadv", failing)
        error, arrived = broken_load(fake_cupy, checkpoint, checkpoint.names, lambda arrived: None)
        assert isinstance(error, FormatError) and arrived > 2
        assert "model.safetensors: tensor 'm" in str(error) and "cannot be read (Input/output error)" in str(error)
        assert len(reads) < 60, "the load went on after the error"
    fake_cupy.assert_nothing_is_left(before)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", ["consumer", "parts", "device memory"])
def test_a_load_that_is_broken_off(fake_cupy, tmp_path, monkeypatch, kind, place):
    before = threading.active_count()

    def stop(count):
        if count == 7:
            raise kind

    with checkpoint_of(tmp_path, matrices(40)) as checkpoint:
        names = checkpoint.names
        if place == "parts":
            names = (name for count, name in enumerate(names) if not stop(count))
        if place == "device memory":
            real = fake_cupy.empty
            monkeypatch.setattr(fake_cupy, "empty", lambda *a: (stop(len(fake_cupy.arrays)), real(*a))[1])
        error, arrived = broken_load(fake_cupy, checkpoint, names, stop if place == "consumer" else lambda arrived: None)
        assert type(error) is kind and arrived <= 7
    fake_cupy.assert_nothing_is_left(before)


def test_what_is_not_begun_is_not_read_after_an_error(fake_cupy, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "AHEAD_BYTES", 1 << 30)
    real, reads = upload._fill, []

    def slow_fill(*arguments):
        reads.append(None)
        time.sleep(0.003)
        real(*arguments)

    def stop(arrived):
        raise ValueError

    monkeypatch.setattr(upload, "_fill", slow_fill)
    with checkpoint_of(tmp_path, matrices(60)) as checkpoint:
        error, arrived = broken_load(fake_cupy, checkpoint, checkpoint.names, stop)
    assert isinstance(error, ValueError) and arrived == 1
    assert len(reads) < 120  # of 180 or more


def test_a_generator_that_is_closed_early(fake_cupy):
    before = threading.active_count()
    with Checkpoint(ARCH / "qwen2") as checkpoint:
        parts = [FakePart(checkpoint, {"x": Wanted(n)}) for n in checkpoint.names]
        arrived = upload.read(checkpoint, parts, fake_cupy)
        next(arrived)
        arrived.close()
    del arrived
    fake_cupy.assert_nothing_is_left(before)


def test_two_uploads_at_once(fake_cupy, tmp_path):
    tensors, found = matrices(60), {}
    before = threading.active_count()

    def load(label, names):
        with Checkpoint(tmp_path) as checkpoint:
            parts = [FakePart(checkpoint, {"x": Wanted(name)}) for name in names]
            found[label] = {
                part.tensors["x"].name: np.array(arrays["x"]) for part, arrays in upload.read(checkpoint, parts, fake_cupy)
            }

    save_file(tensors, tmp_path / "model.safetensors")
    orders = {"forward": sorted(tensors), "backward": sorted(tensors, reverse=True)}
    threads = [threading.Thread(target=load, args=item) for item in orders.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for label in orders:
        assert found[label].keys() == tensors.keys()
        assert all(np.array_equal(found[label][name], tensors[name]) for name in tensors), label
    fake_cupy.assert_nothing_is_left(before)


def test_on_numpy_tensors_stay_in_the_file():
    with Checkpoint(ARCH / "qwen2") as checkpoint:
        name = "model.embed_tokens.weight"
        ((_, arrays),) = upload.read(checkpoint, [FakePart(checkpoint, {"x": Wanted(name)})], np)
        assert np.shares_memory(arrays["x"], checkpoint.array(name)) and not arrays["x"].flags.writeable


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_byte_arrives_on_the_gpu(cupy, monkeypatch):
    monkeypatch.setattr(upload, "BUFFER_BYTES", 16 << 10)
    monkeypatch.setattr(upload, "AHEAD_BYTES", 256 << 10)
    with Checkpoint(EXAMPLES / "shakespeare") as checkpoint:
        names = [n for n in checkpoint.names if n.startswith(("model.", "lm_head"))]
        parts = [FakePart(checkpoint, {"x": Wanted(n)}) for n in names]
        count = 0
        for (_, arrays), name in zip(upload.read(checkpoint, parts, cupy), names, strict=True):
            # Work on the current stream right away, and memory given back at once: the next tensors land there.
            doubled = arrays["x"] + arrays["x"]
            assert np.array_equal(doubled.get(), 2 * checkpoint.array(name)), name
            count += 1
        assert count == len(names)
        wanted = Wanted("lm_head.weight", np.dtype(ml_dtypes.bfloat16))
        ((_, arrays),) = upload.read(checkpoint, [FakePart(checkpoint, {"w": wanted})], cupy)
        expected = checkpoint.array("lm_head.weight").astype(ml_dtypes.bfloat16)
        assert np.array_equal(arrays["w"].get().view(np.uint16), expected.view(np.uint16))


@pytest.mark.gpu
def test_every_byte_arrives_on_a_stream_of_the_callers(cupy, monkeypatch, tmp_path):
    monkeypatch.setattr(upload, "AHEAD_BYTES", 4 << 20)
    tensors = matrices(8, 3_000_000)
    with checkpoint_of(tmp_path, tensors) as checkpoint, cupy.cuda.Stream(non_blocking=True):
        kept = {}
        parts = [FakePart(checkpoint, {"x": Wanted(name)}) for name in tensors]
        for part, arrays in upload.read(checkpoint, parts, cupy):
            kept[part.tensors["x"].name] = arrays["x"].copy()
            del arrays  # the next tensors land where this one was, once it has been copied
        for name, copy in kept.items():
            assert np.array_equal(copy.get(), tensors[name]), name
