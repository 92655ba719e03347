"""Calls that come again: which are kept, what is launched again, and what never is. A driver without a GPU notes launches."""

import dataclasses
import gc
import importlib.util
import inspect
import threading

import numpy as np
import pytest
from op_calls import CALLS, Maker, valid_call
from placed_calls import Placed, built, flat, realized
from test_kernels import driver, fake_array  # noqa: F401

from cupyq import _kernels, _recording, _replay, ops
from cupyq._arrays import output
from cupyq._foreign import accepts_dlpack

HOME = 0x7F0000001000
done = []


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """What an op takes in one argument, and what may be made for each call."""

    array: object
    count: object = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix(Weights):
    """One that stands for what it holds."""

    is_frozen = True


class Loose(Matrix):
    """May change, as it does not say that it is frozen itself."""


@accepts_dlpack(replays=True)
def scale(x, factor=1.0, *, weights=None, out=None, mode="plain"):
    """Launches x and out, or what `mode` says; notes that it was called."""
    done.append((factor, mode))
    factor = np.float32(factor)
    if out is None:
        import cupy

        out = output(cupy, out, x.shape, x.dtype)
    if mode == "own memory":
        x = fake_array(4, 4, address=HOME + (8 << 20))
    if mode == "host" or mode == "numpy":
        _recording.spoil()
    arrays = (x, out) if weights is None else (x, weights.array, out)
    _kernels.launch(_kernels.instance("scale"), (2,), (32,), (*arrays, factor))
    if mode == "twice":
        _kernels.launch(_kernels.instance("again"), (1,), (64,), (out, None, np.int32(7)))
    return None if mode == "nothing" else (out, x) if mode == "tuple" else out


@pytest.fixture(autouse=True)
def calls(request):
    if "gpu" not in request.keywords:
        request.getfixturevalue("driver")
    _replay.forget()
    done.clear()


def kept():
    return len(_replay._known)


def pair(shape=(4, 4), at=HOME, dtype=np.float32):
    return fake_array(*shape, address=at, dtype=dtype), fake_array(*shape, address=at + (1 << 20), dtype=dtype)


@pytest.mark.parametrize("mode", ["plain", "twice", "nothing"])
def test_from_the_third_time_on_only_launches_are_made(driver, mode):  # noqa: F811
    x, out = pair()
    results = [scale(x, 2.0, out=out, mode=mode) for _ in range(5)]
    assert len(done) == 2 and all(result is (None if mode == "nothing" else out) for result in results)
    each = 2 if mode == "twice" else 1
    assert len(driver.launched) == 5 * each
    for i in range(each):
        assert len(set(driver.launched[i::each])) == 1  # function, grid, block, stream, bytes of the arguments


def test_arrays_of_the_same_memory_are_the_same(driver):  # noqa: F811
    """As temporaries are, whose memory comes out of a pool again. The result is the array of this call."""
    for _ in range(4):
        x, out = pair()
        assert scale(x, out=out) is out
    assert len(done) == 2 and len(driver.launched) == 4


class Allocations:
    """Where cupy.empty puts arrays, in turn."""

    def __init__(self):
        self.next, self.used = HOME + (16 << 20) - HOME % 512, []

    def empty(self, shape, dtype):
        self.used.append(self.next)
        self.next += 512
        return fake_array(*shape, dtype=dtype, address=self.used[-1])


@pytest.fixture
def allocations(monkeypatch):
    result = Allocations()
    monkeypatch.setattr(pytest.importorskip("cupy"), "empty", result.empty)
    return result


def addresses_of(launched):
    return [int.from_bytes(launched[5][place : place + 8], "little") for place in (0, 8)]


@pytest.mark.parametrize("mode", ["plain", "tuple", "nothing"])
def test_what_is_returned_is_made_anew(driver, allocations, mode):  # noqa: F811
    x, _ = pair()
    results = [scale(x, 2.0, mode=mode) for _ in range(5)]
    assert len(done) == 2 and len(driver.launched) == len(set(allocations.used)) == 5
    assert [addresses_of(launched) for launched in driver.launched] == [[HOME, place] for place in allocations.used]
    if mode == "nothing":
        assert results == [None] * 5
        return
    if mode == "tuple":
        assert all(result[1] is x for result in results)
        results = [result[0] for result in results]
    assert [result.data.ptr for result in results] == allocations.used
    assert all((result.shape, result.dtype) == (x.shape, x.dtype) for result in results)


def test_new_memory_that_begins_elsewhere_takes_the_long_way(allocations):
    x, _ = pair()
    for _ in range(3):
        scale(x)
    assert len(done) == 2
    allocations.next += 16
    assert scale(x).data.ptr == allocations.used[-1]
    assert len(done) == 3 and len(allocations.used) == 5


def test_structures_may_hold_addresses(allocations):
    """Of what is made anew, which then cannot be made elsewhere."""
    cupy = pytest.importorskip("cupy")

    @accepts_dlpack(replays=True)
    def structured(x, mode, *, out=None):
        done.append(mode)
        out = output(cupy, out, x.shape, x.dtype)
        table = np.array([(7, out.data.ptr + 4 if mode == "address" else 7)], "u8, u8").view((np.void, 16))[0]
        if mode == "hidden" and _recording.recording.record is not None:
            _recording.recording.record.hidden.append(out.data.ptr)
        _kernels.launch(_kernels.instance("structured"), (1,), (32,), (x, out, table))
        return out

    x, out = pair()
    for mode in ("plain", "address", "hidden"):
        done.clear()
        for _ in range(4):
            structured(x, mode)
        assert len(done) == (2 if mode == "plain" else 4)
    for _ in range(4):
        structured(x, "address", out=out)
    assert len(done) == 6


def test_whatever_differs_is_another_call():
    x, out = pair()
    for _ in range(2):
        scale(x, 1.0, out=out)
    others = [
        lambda: scale(x, 2.0, out=out),
        lambda: scale(x, 1, out=out),
        lambda: scale(x, True, out=out),
        lambda: scale(x, np.float32(1), out=out),
        lambda: scale(x, 0.0, out=out),
        lambda: scale(x, -0.0, out=out),
        lambda: scale(x, np.float32(0), out=out),
        lambda: scale(x, np.float32(-0.0), out=out),
        lambda: scale(x, factor=1.0, out=out),
        lambda: scale(x, out=out),
        lambda: scale(x, 1.0, out=out, mode="nothing"),
        lambda: scale(*pair(at=HOME + 512)[:1], 1.0, out=out),
        lambda: scale(x, 1.0, out=x),
        lambda: scale(fake_array(2, 8), 1.0, out=out),
        lambda: scale(fake_array(4, 4, dtype=np.int32), 1.0, out=out),
        lambda: scale(fake_array(4, 4, dtype=np.float16), 1.0, out=out),
    ]
    for number, other in enumerate(others, 3):
        other()
        assert len(done) == number
    scale(x, 1.0, out=out)
    assert len(done) == 2 + len(others)


def test_strides_count():
    x, out = pair()
    for _ in range(3):
        scale(x, out=out)
    with pytest.raises(ValueError, match="not C-contiguous"):
        scale(x.T, out=out)


@pytest.mark.parametrize("mode", ["own memory", "host"])
def test_what_depends_on_more_is_never_kept(driver, mode):  # noqa: F811
    x, out = pair()
    for _ in range(2):
        scale(x, out=out, mode=mode)
    assert len(_replay._not_kept) == 1
    for _ in range(2):
        scale(x, out=out, mode=mode)
    assert len(done) == len(driver.launched) == 4 and not kept()


def test_frozen_objects_stand_for_what_they_hold():
    x, out = pair()
    weights, others = (Matrix(fake_array(4, address=HOME + place)) for place in (2 << 20, 3 << 20))
    for _ in range(4):
        scale(x, out=out, weights=weights)
    assert len(done) == 2
    scale(x, out=out, weights=others)
    assert len(done) == 3
    assert kept() == 1
    del weights
    gc.collect()
    assert not kept()  # another object may have its number


def test_objects_made_for_a_call_are_described_by_what_they_hold():
    x, out = pair()
    array = fake_array(4, address=HOME + (2 << 20))
    for _ in range(4):
        scale(x, out=out, weights=Weights(array))
    assert len(done) == 2 and not _replay._seen
    for weights in (Weights(array, 4), Weights(array, 3.0), Weights(fake_array(4, address=HOME + (3 << 20)))):
        done.clear()
        scale(x, out=out, weights=weights)
        assert len(done) == 1


def test_objects_that_may_change_are_never_kept():
    x, out = pair()
    array = fake_array(4, address=HOME + (2 << 20))
    for weights in (Loose(array), Weights(array, [3]), Weights(array, np.ones(3)), Weights(array, Matrix(array))):
        done.clear()
        for _ in range(4):
            scale(x, out=out, weights=weights)
        assert len(done) == 4


def test_memory_that_no_argument_owns_is_seen_within_objects():
    x, out = pair()
    weights = Matrix((fake_array(4, address=HOME + (2 << 20)), None))
    object.__setattr__(weights, "array", fake_array(4, address=HOME + (9 << 20)))
    for _ in range(3):
        scale(x, out=out, weights=weights)
    assert len(done) == 2  # its own, whichever it is


def test_the_result_is_the_array_of_this_call_that_was_written():
    """Even where another one stood for the same memory when the call was kept."""
    x, _ = pair()
    for _ in range(3):
        assert scale(x, out=x) is x
    assert len(done) == 2
    out, other = pair()[0], pair()[0]
    assert scale(other, out=out) is out
    assert len(done) == 2


def test_bytes_in_another_order_are_another_call():
    x, out = pair(dtype=np.dtype("<f4"))
    swapped = fake_array(4, 4, dtype=np.dtype(">f4"))
    for _ in range(3):
        scale(x, out=out)
    scale(swapped, out=out)
    assert len(done) == 3


def test_what_was_chosen_for_another_gpu_is_not_kept(driver):  # noqa: F811
    x, out = (fake_array(4, 4, device=1, address=HOME + place) for place in (0, 1 << 20))
    for _ in range(2):
        scale(x, out=out)
    driver.device = 1
    scale(x, out=out)
    assert len(done) == 3


def test_much_memory_is_not_held_at_once(allocations):
    x = fake_array(1 << 12, 1 << 12)
    for _ in range(4):
        scale(x)
    assert len(done) == 2  # 64 MiB
    x = fake_array(1 << 12, (1 << 12) + 1)
    for _ in range(4):
        scale(x)
    assert len(done) == 6


def test_calls_that_come_once_do_not_drive_out_others(monkeypatch):
    monkeypatch.setattr(_replay, "_MOST", 8)
    x, out = pair()
    for _ in range(2):
        scale(x, "1", out=out)
    done.clear()
    for factor in range(100):
        scale(x, factor, out=out)
        scale(x, "1", out=out)
        assert len(_replay._seen) <= 8
    assert len(done) == 100


def test_an_error_is_not_kept(driver):  # noqa: F811
    x, out = pair()
    for _ in range(3):
        with pytest.raises(ValueError, match="float"):
            scale(x, "two", out=out)
    assert len(done) == 3 and not driver.launched and _recording.recording.record is None


def test_a_refusal_of_the_driver_is_told_again(driver):  # noqa: F811
    x, out = pair()
    for _ in range(3):
        scale(x, out=out)
    driver.statuses.append(1)
    with pytest.raises(Exception, match="scale cannot be launched"):
        scale(x, out=out)


def test_another_gpu_and_tracing_take_the_long_way(driver):  # noqa: F811
    x, out = pair()
    for _ in range(3):
        scale(x, out=out)
    driver.device = 1
    scale(x, out=out)
    assert len(done) == 3
    driver.device = 0
    with _kernels.tracing() as wanted:
        scale(x, out=out)
    assert len(done) == 4 and len(wanted) == 1


def test_a_call_within_a_call_is_written_down(driver):  # noqa: F811
    @accepts_dlpack(replays=True)
    def outer(x, *, out):
        done.append("outer")
        scale(x, out=out)
        scale(out, out=x)
        return out

    x, out = pair()
    for _ in range(3):  # the inner one is kept by now
        scale(x, out=out)
        scale(out, out=x)
    done.clear()
    driver.launched.clear()
    for _ in range(4):
        assert outer(x, out=out) is out
    assert done.count("outer") == 2 and len(driver.launched) == 8
    assert driver.launched[0::2] == [driver.launched[0]] * 4 and driver.launched[1::2] == [driver.launched[1]] * 4


def test_arrays_of_numpy_are_never_kept():
    x = np.ones((2, 3), np.float32)
    for _ in range(4):
        ops.add(x, x)
    assert not _replay._known


def test_so_many_calls_are_kept(monkeypatch):
    monkeypatch.setattr(_replay, "_MOST", 8)
    x, out = pair()
    for factor in range(40):
        for _ in range(3):
            scale(x, factor, out=out)
        assert kept() <= 8
    assert len(done) == 80


def test_kernels_that_are_forgotten_are_loaded_again(driver):  # noqa: F811
    x, out = pair()
    for _ in range(3):
        scale(x, out=out)
    _kernels.forget_loaded()
    scale(x, out=out)
    assert len(driver.launched) == 4 and len(done) == 2


def test_threads_record_for_themselves(driver):  # noqa: F811
    x, out = pair()
    barrier, problems = threading.Barrier(4), []

    def work(number):
        barrier.wait()
        for i in range(200):
            if scale(x, float(i % 7), out=out) is not out:
                problems.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and len(driver.launched) == 800 and len(done) < 100
    packed = {launched[5] for launched in driver.launched}
    assert len(packed) == 7


# --- on a GPU ---------------------------------------------------------------------------------------------------------

COME_AGAIN = {
    "add", "add_weighted", "advance", "attention", "clamp", "combine_rows", "embedding", "gelu", "gelu_mul", "hadamard",
    "head_norm", "kv_append", "layer_norm", "lora", "penalize", "qkv_append", "qmatmul", "qmatmul_gated", "qmatmul_grouped",
    "relu", "relu_mul", "rms_norm", "rope", "route", "sample", "silu", "silu_mul", "softcap",
}  # fmt: skip
"""Ops of which calls are kept, some with a workspace or a table of settings alone."""

LIBRARIES = ["cupy", *(["torch"] if importlib.util.find_spec("torch") else [])]
OF_TORCH = ("float16", "float32", "int32", "int64", "uint8", "bool")


class Repeated:
    """A call on a GPU, in the same memory again and again."""

    def __init__(self, name, seed, library):
        rng = np.random.default_rng(seed)
        maker = Maker(lambda items: items[rng.integers(len(items))], seed, (np.float16,))
        self.op = getattr(ops, name)
        self.call = realized("cupy", {key: Placed(value) for key, value in valid_call(name, maker).items()})
        self.before = self.call.snapshot()
        self.others = {key: root.copy() for key, root in self.before.items()}
        for key, array in self.call.arrays.items():
            if array.dtype.kind == "f" and array.size:
                values = np.ndarray(array.shape, array.dtype, self.others[key], self.call.starts[key], array.strides)
                values *= values.dtype.type(-0.5)
        self.arguments = built(self.call.arguments)
        if library == "torch":
            from_dlpack = pytest.importorskip("torch").from_dlpack
            is_tensor = {key for key in self.arguments if key in self.call.arrays and self.arguments[key].size}
            self.arguments |= {
                key: from_dlpack(self.arguments[key]) for key in is_tensor if self.arguments[key].dtype.name in OF_TORCH
            }

    def run(self, values, **more):
        """(what it returns, the bytes of that, the bytes of all memory) for arguments of such values."""
        for key, root in self.call.roots.items():
            root.set(values[key])
        result = self.op(**self.arguments, **more)
        items = [] if result is None else flat(result)
        return result, [on_host(item).tobytes() for item in items], [root.tobytes() for root in self.call.snapshot().values()]


def on_host(array):
    return array.get() if hasattr(array, "get") else array.cpu().numpy()


@pytest.mark.gpu
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", sorted(COME_AGAIN))
def test_what_is_launched_again_computes_what_the_op_does(name, library, cupy):
    """With other values in the same memory, in a result of the caller's and in one of its own, held while others come."""
    kept_ones = 0
    for seed in range(12):
        repeated = Repeated(name, seed, library)
        has_out = "out" in inspect.signature(repeated.op).parameters and "out" not in repeated.arguments
        first = repeated.run(repeated.before)[0]
        for more in [{}, {"out": first}] if has_out else [{}]:
            _replay.forget()
            held = [repeated.run(repeated.before, **more) for _ in range(3)]
            assert [one[1:] for one in held[1:]] == [held[0][1:]] * 2
            kept_ones += kept()
            found = repeated.run(repeated.others, **more)
            _replay.forget()
            expected = repeated.run(repeated.others, **more)
            assert found[1:] == expected[1:] and type(found[0]) is type(expected[0])
            if has_out and not more:
                assert [on_host(one[0]).tobytes() for one in held] == [one[1][0] for one in held]  # nothing wrote into them
            assert not more or found[0] is first
    assert kept_ones


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(CALLS.keys() - COME_AGAIN - {"count_match"}))
def test_ops_that_do_more_than_launch_are_not_kept(name, cupy):
    repeated = Repeated(name, 0, "cupy")
    for _ in range(3):
        repeated.run(repeated.before)
    assert not kept()


@pytest.mark.gpu
def test_calls_with_a_table_of_settings_come_again(cupy):
    logits, history = cupy.ones((2, 64), np.float32), cupy.zeros((2, 4), np.int32)
    penalties, settings = ops.PenaltyTable(2, cupy, presence=[0.5, 0.25]), ops.SamplerTable(2, cupy, min_p=[0.5, 0.25], tfs=0.5)
    out, ids = cupy.empty_like(logits), cupy.empty(2, np.int32)
    for _ in range(3):
        ops.penalize(logits, history, table=penalties, out=out)
        ops.sample(out, table=settings, seed=0, out=ids)
    assert kept() == 2


@pytest.mark.gpu
def test_calls_on_streams_of_torch_come_again(cupy):
    torch = pytest.importorskip("torch")
    x, out = torch.ones(4, 256, device="cuda"), torch.empty(4, 256, device="cuda")
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for i in range(8):
        with torch.cuda.stream(streams[i % 2]):
            x.fill_(i)
            assert ops.add(x, x, out=out) is out
            assert out.sum().item() == 2 * i * 1024
    assert kept() == 1


@pytest.mark.gpu
def test_calls_come_again_in_a_graph(cupy):
    x, out = cupy.ones((4, 256), np.float32), cupy.zeros((4, 256), np.float32)
    for _ in range(3):
        ops.add(x, x, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        ops.add(x, out, out=out)
        ops.add(x, x, out=out)
        graph = stream.end_capture()
        x.fill(5)
        graph.launch()
        stream.synchronize()
    assert (out == 10).all()
