"""What runs at the same time does not change what anybody computes: threads, streams, models, processes, errors."""

import contextlib
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import cupyq
from cupyq import _kernels, ops
from cupyq.formats.safetensors import Checkpoint
from cupyq.generate import SamplerSettings
from cupyq.models.queues import StreamQueue
from cupyq.serve import Generator, Job

MODELS = ROOT / "examples/models"
EXL2, GPTQ = MODELS / "shakespeare-exl2-4.0", MODELS / "shakespeare-gptq-g32"
PROMPT = [10, 200, 30, 400, 50]


def together(*works):
    """Call functions at the same time, a thread each -> what they returned."""
    barrier = threading.Barrier(len(works))

    def run(work):
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, work) for work in works]]


# --- ops --------------------------------------------------------------------------------------------------------------


def matrix_of(xp, folder=EXL2, key="model.layers.0.mlp.down_proj"):
    with Checkpoint(folder) as checkpoint:
        tensors = {n.rpartition(".")[2]: xp.asarray(checkpoint.array(n)) for n in checkpoint.names if n.startswith(f"{key}.")}
    return cupyq.QMatrix.from_tensors(tensors)


def calls(xp, q, seed, sizes):
    """Ops that share out work, keep partial sums in memory of their own, or draw -> their results, of one seed's inputs."""
    rng = np.random.default_rng(seed)

    def array(*shape, dtype=np.float16):
        return xp.asarray(rng.standard_normal(shape).astype(dtype))

    rows, tokens = sizes
    x, weight, logits = array(rows, q.k), array(q.k, 96), array(2, 4096, dtype=np.float32)
    queries, k, v = array(2, 1, 4, 64), array(2, tokens, 2, 64), array(2, tokens, 2, 64)
    lengths = xp.asarray(np.array([tokens, tokens // 2 + 1], np.int32))

    def run():
        return (
            ops.qmatmul(x, q),
            ops.qmatmul(x[:1], q),
            ops.matmul(x, weight),
            ops.rms_norm(x, x[0]),
            ops.attention(queries, k, v, kv_lengths=lengths),
            ops.sample(logits, temperature=0.9, top_k=40, top_p=0.9, seed=np.arange(2)),
        )

    return run


def on_host(arrays):
    return [(array if isinstance(array, np.ndarray) else array.get()).tobytes() for array in arrays]


def over_and_over(xp, q, seed, sizes, repeats):
    """The results of all repeats, from a stream of this thread's own."""
    stream = contextlib.nullcontext() if xp is np else xp.cuda.Stream(non_blocking=True)
    with stream:
        run = calls(xp, q, seed, sizes)
        results = [run() for _ in range(repeats)]  # queued one behind the other; the host waits for none
        if xp is not np:
            stream.synchronize()
        return [on_host(result) for result in results]


def check_ops_in_threads(xp, sizes, repeats):
    q = matrix_of(xp)
    alone = [on_host(calls(xp, q, seed, sizes)()) for seed in (1, 2)]
    assert alone[0] != alone[1]
    works = [functools.partial(over_and_over, xp, q, seed, sizes, repeats) for seed in (1, 2, 1)]
    *found, _ = together(*works, functools.partial(errors_over_and_over, xp, q, repeats))
    for results, expected in zip(found, (*alone, alone[0]), strict=True):
        assert results == [expected] * repeats


def errors_over_and_over(xp, q, repeats):
    """Calls that are refused, beside those of others."""
    for _ in range(repeats):
        with pytest.raises(ValueError, match="x must have"):
            ops.qmatmul(xp.zeros((2, q.k + 32), np.float16), q)
        with pytest.raises(TypeError):
            ops.rms_norm(xp.zeros((2, 8), np.int32), xp.zeros(8, np.float32))


def test_ops_in_threads_are_as_alone():
    check_ops_in_threads(np, (2, 24), 3)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 65, 300])
def test_ops_in_threads_on_streams_of_their_own_are_as_alone(cupy, rows):
    check_ops_in_threads(cupy, (rows, 700), 40)


# --- models -----------------------------------------------------------------------------------------------------------


def text(model, length, settings=None, graph=True):
    """Tokens that a new decoder draws."""
    decoder = model.decoder(max_len=len(PROMPT) + length, settings=settings or SamplerSettings.greedy(), seed=3, graph=graph)
    first = decoder.start([PROMPT])
    tokens = decoder.run(length - 1)
    return [int(first[0]), *np.asarray(tokens if model.backend == "numpy" else tokens.get())[0].tolist()]


def served(model, length):
    """Tokens of several jobs of a generator."""
    generator = Generator(model, cache_tokens=512, page_size=32, max_batch=1)
    settings = SamplerSettings.greedy()
    jobs = [generator.add(Job([*PROMPT, i], max_new_tokens=length, stop_tokens=[], settings=settings)) for i in range(3)]
    for _ in generator:
        pass
    return [job.tokens for job in jobs]


def check_models_in_threads(backend, length, repeats):
    exl2, gptq = (cupyq.load_model(folder, backend) for folder in (EXL2, GPTQ))
    drawn = SamplerSettings(temperature=1.0)
    works = [
        functools.partial(text, exl2, length),
        functools.partial(text, gptq, length),
        functools.partial(text, exl2, length, drawn),  # by the model of the first
        functools.partial(served, gptq, length),
    ]
    alone = [work() for work in works]
    assert len({str(found) for found in alone}) == len(works)
    for _ in range(repeats):
        assert together(*works) == alone


def test_models_in_threads_write_what_they_write_alone():
    check_models_in_threads("numpy", 4, 1)


@pytest.mark.gpu
def test_models_in_threads_on_a_gpu_write_what_they_write_alone(cupy):
    """Decoders capture graphs while others launch, allocate, and wait."""
    check_models_in_threads("cupy", 100, 5)


@pytest.mark.gpu
def test_models_load_at_the_same_time_and_beside_one_that_writes(cupy):
    model = cupyq.load_model(EXL2, "cupy")
    expected = text(model, 200)

    def load(folder):
        return cupyq.load_model(folder, "cupy").forward([PROMPT]).get().tobytes()

    alone = [load(folder) for folder in (EXL2, GPTQ)]
    for _ in range(3):
        works = (functools.partial(load, EXL2), functools.partial(load, GPTQ), functools.partial(text, model, 200))
        assert together(*works) == [*alone, expected]


@pytest.mark.gpu
def test_a_text_is_the_same_over_and_over(cupy):
    """With decoders and models that come and go, with a graph and without."""
    first = text(cupyq.load_model(EXL2, "cupy"), 120)
    for graph in (True, False) * 3:
        model = cupyq.load_model(EXL2, "cupy")
        assert [text(model, 120, graph=graph) for _ in range(5)] == [first] * 5


# --- processes --------------------------------------------------------------------------------------------------------


def written_by_processes(count, backend, *options, new=12):
    """Tokens of processes of `cupyq generate` that run at the same time."""
    command = [sys.executable, "-m", "cupyq", "generate", str(EXL2), "--prompt", "ROMEO:", "--json", "--backend", backend]
    command += ["--max-new-tokens", str(new), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    found = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found.append(json.loads(output.splitlines()[-1])["tokens"])
    assert all(len(tokens) == new for tokens in found)
    return found


@pytest.mark.parametrize("options", [("--greedy",), ("--seed", "7")])
def test_processes_write_the_same_text(options):
    first, second = written_by_processes(2, "numpy", *options, new=4)
    assert first == second


@pytest.mark.gpu
@pytest.mark.parametrize("options", [("--greedy",), ("--seed", "7")])
def test_processes_on_one_gpu_write_the_same_text(options):
    found = written_by_processes(3, "cupy", *options, new=100)
    assert found == [found[0]] * 3


# --- what is left of streams ------------------------------------------------------------------------------------------


def test_a_queue_that_goes_takes_what_was_kept_for_its_stream():
    """Of the stream, which is another one's as soon as it is destroyed, nothing may be there by then."""
    matmul = importlib.import_module("cupyq.ops.matmul")

    class Stream:
        ptr = 0xABC0

        def __init__(self, non_blocking):
            self.non_blocking = non_blocking

        def __del__(self):
            left.append((key in matmul._workspaces, key in _kernels._queues))

    key, left = (3, Stream.ptr), []
    cuda = SimpleNamespace(
        Device=lambda number: contextlib.nullcontext(),
        Stream=Stream,
        MemoryPool=lambda: SimpleNamespace(free_all_blocks=lambda: given_back.append(True)),
        Event=lambda disable_timing: None,
    )
    given_back = []
    queue = StreamQueue(SimpleNamespace(cuda=cuda), 3)
    queue.new_pool()
    matmul._workspaces[key] = _kernels._queues[key] = object()
    try:
        del queue
        gc.collect()
        assert left == [(False, False)] and given_back == [True, True]
    finally:
        matmul._workspaces.pop(key, None)
        _kernels._queues.pop(key, None)


@pytest.mark.gpu
def test_queues_that_come_and_go_leave_no_objects(cupy):
    def come_and_go(count):
        for _ in range(count):
            queue = StreamQueue(cupy, 0)
            for pool in (None, queue.new_pool()):
                with queue.entered(pool):
                    cupy.empty(1000)
        del queue
        gc.collect()
        return sys.getallocatedblocks()

    before = come_and_go(20)
    assert come_and_go(200) - before < 200  # a pool that ended with free blocks would leave four


@pytest.mark.gpu
def test_decoders_that_are_gone_keep_nothing(cupy):
    """The GPTQ model's head is not quantized: its product takes a workspace of cuBLAS's for the decoder's stream."""
    model = cupyq.load_model(GPTQ, "cupy")
    matmul = importlib.import_module("cupyq.ops.matmul")
    expected, found = text(model, 8), []
    decoders = [model.decoder(max_len=16, settings=SamplerSettings.greedy(), seed=3) for _ in range(4)]
    for decoder in decoders:
        decoder.start([PROMPT])
        found.append(decoder.run(7).get()[0].tolist())
    streams = {(decoder._queue.device_id, decoder._queue.stream.ptr) for decoder in decoders}
    assert len(streams) == 4 and streams <= set(matmul._workspaces) and streams <= set(_kernels._queues)
    del decoder, decoders
    gc.collect()
    assert not streams & set(matmul._workspaces) and not streams & set(_kernels._queues)
    assert found == [expected[1:]] * 4 and text(model, 8) == expected  # on a stream that may be where one of those was
