"""What tests of tensor parallelism share: threads as ranks, and a stand-in for NCCL and CuPy on host memory."""

import ctypes
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import gpu_count
from kernel_checks import bfloat16, float16, float32

from cupyq.tp.local import LocalComm

int32 = np.dtype(np.int32)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_threads(functions):
    """What each function returned or raised, each in a thread of its own."""
    results = [None] * len(functions)

    def run(index):
        try:
            results[index] = functions[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


@pytest.fixture
def several_gpus():
    """How many GPUs there are, from 2 on: for gpu tests of ranks on GPUs of their own."""
    count = gpu_count()
    if count < 2:
        pytest.skip(f"{count} GPU here, and ranks need one each")
    return count


class DeviceArray(np.ndarray):
    """Host memory that says it lies on a GPU."""

    device = 0

    def __array_finalize__(self, base):
        self.device = getattr(base, "device", 0)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data, device_id=self.device)


class StandInForNccl:
    """What NcclComm asks of CuPy and of NCCL, on host memory: ranks meet in a LocalComm below.

    The constants are those of nccl.h, so that a mix-up of dtypes shows.
    """

    available = True
    NCCL_INT32, NCCL_FLOAT16, NCCL_FLOAT32, NCCL_BFLOAT16, NCCL_SUM = 2, 6, 7, 9, 0
    DTYPES = {2: int32, 6: float16, 7: float32, 9: bfloat16}

    class NcclError(RuntimeError):
        pass

    def __init__(self):
        self.current = threading.local()
        self.groups = threading.local()
        self.lock, self.joining = threading.Lock(), {}
        self.calls, self.recorded = [], []
        self.async_error = None
        outer = self

        class Communicator:
            def __init__(self, ranks, group_id, rank):
                with outer.lock:
                    group = outer.joining.setdefault(group_id, LocalComm.group(ranks, stall_s=2))
                self.local, self.device, self.state = group[rank], outer.current_device(), "alive"
                self.local._barrier()  # NCCL's constructor returns once all ranks have come

            @staticmethod
            def initAll(devices):
                found = [Communicator.__new__(Communicator) for _ in devices]
                for comm, local, device in zip(found, LocalComm.group(len(devices), stall_s=2), devices, strict=True):
                    comm.local, comm.device, comm.state = local, device, "alive"
                return found

            def _array(self, pointer, count, kind):
                dtype = outer.DTYPES[kind]
                content = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer) if count else bytearray()
                return np.frombuffer(content, dtype)

            def _enter(self, name, stream):
                assert self.state == "alive" and stream == 1000 + self.device, (self.state, stream)
                outer.calls.append((self.local.rank, name))
                open_groups = getattr(outer.groups, "open", None)
                if open_groups:
                    if self.local._later is None:
                        self.local._later = []
                    open_groups[-1].add(self.local)

            def allReduce(self, send, receive, count, kind, op, stream):
                self._enter("allReduce", stream)
                assert op == outer.NCCL_SUM
                source, target = self._array(send, count, kind), self._array(receive, count, kind)
                if source.dtype == int32:
                    self.local._meet(("barrier", None, ()), None, None)
                else:
                    self.local._all_reduce(source, target)

            def allGather(self, send, receive, count, kind, stream):
                self._enter("allGather", stream)
                flat = self._array(receive, count * self.local.ranks, kind)
                self.local._all_gather(self._array(send, count, kind), flat, [count * (r + 1) for r in range(self.local.ranks)])

            def broadcast(self, send, receive, count, kind, root, stream):
                self._enter("broadcast", stream)
                target = self._array(receive, count, kind)
                if self.local.rank == root:
                    target[...] = self._array(send, count, kind)
                self.local._broadcast(target, root)

            def check_async_error(self):
                if outer.async_error:
                    raise outer.NcclError(outer.async_error)

            def abort(self):
                self.state = "aborted"

            def destroy(self):
                self.state = "destroyed"

        self.NcclCommunicator = Communicator

    def current_device(self):
        return getattr(self.current, "device", 0)

    def get_unique_id(self):
        return b"id"

    def groupStart(self):
        self.groups.open = [*getattr(self.groups, "open", []), set()]

    def groupEnd(self):
        *outer, members = self.groups.open
        self.groups.open = outer
        if outer:  # groups within groups are one
            outer[-1].update(members)
            return
        comms = sorted(members, key=lambda comm: comm.rank)
        if comms:
            with comms[0]._together(comms):
                pass
        for comm in comms:
            comm._later = None

    def cupy(self):
        outer = self

        class Device:
            def __init__(self, device):
                self.device = device

                self.pci_bus_id = f"0000:{device:02}:00.0"

            def use(self):
                outer.current.device = self.device

            def __enter__(self):
                self.before = outer.current_device()
                self.use()

            def __exit__(self, *_):
                outer.current.device = self.before

        def empty(shape, dtype):
            array = np.empty(shape, dtype).view(DeviceArray)
            array.device = outer.current_device()
            return array

        def zeros(shape, dtype):
            array = empty(shape, dtype)
            array[...] = 0
            return array

        def asarray(values):
            array = empty(values.shape, values.dtype)
            array[...] = values
            return array

        class Stream:
            def __init__(self):
                self.ptr = 1000 + outer.current_device()

            def __enter__(self):
                pass

            def __exit__(self, *_):
                pass

        event = SimpleNamespace(record=lambda stream: outer.recorded.append(stream.ptr), done=True)
        cuda = SimpleNamespace(
            Device=Device,
            Event=lambda disable_timing: event,
            get_current_stream=Stream,
            runtime=SimpleNamespace(runtimeGetVersion=lambda: 13000),
        )
        functions = {"empty": empty, "zeros": zeros, "asarray": asarray}
        return SimpleNamespace(__name__="cupy", ndarray=DeviceArray, cuda=cuda, event=event, **functions)
