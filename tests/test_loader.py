"""models/loader.py: what is known before weights are read, what runs beside the upload, and how a load ends that fails.

What a loaded model computes is for test_models.py; how tensors travel, for test_upload.py.
"""

import dataclasses
import gc
import os
import shutil
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cupyq import _kernels
from cupyq.errors import BackendError, FormatError
from cupyq.formats.exl2 import pack_exl2
from cupyq.formats.safetensors import Checkpoint, SafetensorsFile
from cupyq.models import load_model, loader, parts, upload
from cupyq.models.config import ModelConfig
from cupyq.models.warmup import trace_kernels

ROOT = Path(__file__).parent.parent
ARCH, EXAMPLES = ROOT / "tests/models", ROOT / "examples/models"
EXL2 = EXAMPLES / "shakespeare-exl2-2.5"


# --- layers of one kind -----------------------------------------------------------------------------------------------


def chosen(folder, monkeypatch):
    """Numbers of the layers that stand for all others when kernels are looked for."""
    monkeypatch.setattr(loader, "_rope_tables", lambda config, xp: (None, None))
    with Checkpoint(folder) as checkpoint:
        config = ModelConfig.from_file(folder)
        blueprint = loader.Blueprint(loader.Plan(config, checkpoint, types.SimpleNamespace(), np.dtype(np.float16)))
        assert len(blueprint.layers) > 1
        return [blueprint.layers.index(layer) for layer in loader._one_of_each_kind(blueprint.layers)]


@pytest.mark.parametrize("folder", [EXAMPLES / "shakespeare", EXAMPLES / "shakespeare-gptq-g32", ARCH / "mixtral"])
def test_equal_layers_are_of_one_kind(monkeypatch, folder):
    assert chosen(folder, monkeypatch) == [0]


def test_layers_with_other_windows_are_of_other_kinds(monkeypatch):
    windows = ModelConfig.from_file(ARCH / "gemma2").windows
    assert len(set(windows)) == 2
    assert chosen(ARCH / "gemma2", monkeypatch) == [windows.index(window) for window in dict.fromkeys(windows)]


def with_widths(folder, changes):
    """A copy of the EXL2 model with matrices {key: widths of its two groups}, of random values."""
    folder.mkdir()
    shutil.copy(EXL2 / "config.json", folder)
    file = SafetensorsFile(EXL2 / "output.safetensors")
    tensors = {name: np.array(file.array(name)) for name in file.names}
    rng = np.random.default_rng(0)
    for key, widths in changes.items():
        k, n = len(tensors[f"{key}.q_invperm"]), tensors[f"{key}.q_weight"].shape[1]
        rows = [k // 2, k - k // 2]
        codes = np.concatenate([rng.integers(0, 1 << bits, (count, n)) for bits, count in zip(widths, rows, strict=True)])
        packed = pack_exl2(codes, rng.integers(0, 16, (2, n)), np.full(2, 0.01, np.float16), widths, rows, rng.permutation(k))
        tensors |= {f"{key}.{short}": value for short, value in packed.items()}
    save_file(tensors, folder / "output.safetensors")
    return folder


def test_layers_of_the_same_widths_are_of_one_kind(monkeypatch, tmp_path):
    """Which widths a matrix has counts, and its place; not how many rows are of which."""
    assert ModelConfig.from_file(EXL2).num_hidden_layers == 4
    names = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    widths = {f"model.layers.{i}.{name}": (5, 4) for i in range(4) for name in names}
    assert chosen(with_widths(tmp_path / "same", widths), monkeypatch) == [0]
    widths["model.layers.1.self_attn.k_proj"] = (6, 4)
    assert chosen(with_widths(tmp_path / "one", widths), monkeypatch) == [0, 1]
    widths["model.layers.2.self_attn.v_proj"] = (6, 4)  # the same widths elsewhere
    assert chosen(with_widths(tmp_path / "two", widths), monkeypatch) == [0, 1, 2]
    widths["model.layers.3.self_attn.v_proj"] = (6, 4)
    widths["model.layers.0.mlp.up_proj"] = widths["model.layers.1.mlp.up_proj"] = (3, 2)
    widths["model.layers.2.mlp.up_proj"] = (3, 2)  # so that the last layer's MLP alone is new
    assert chosen(with_widths(tmp_path / "three", widths), monkeypatch) == [0, 1, 2, 3]
    widths["model.layers.3.mlp.up_proj"] = (3, 2)  # and now each half of it has been seen
    assert chosen(with_widths(tmp_path / "four", widths), monkeypatch) == [0, 1, 2]


# --- what runs beside the upload --------------------------------------------------------------------------------------


def test_meanwhile_runs_beside_and_is_waited_for():
    began, may_end, done = threading.Event(), threading.Event(), []

    def task(value):
        began.set()
        may_end.wait(10)
        done.append(value)

    before = threading.active_count()
    with loader._meanwhile(task, 7):
        assert began.wait(10) and not done
        may_end.set()
    assert done == [7] and threading.active_count() == before


def test_an_error_beside_the_upload_is_raised_after_it():
    def task():
        raise BackendError("does not compile")

    reached = []
    with pytest.raises(BackendError, match="does not compile"), loader._meanwhile(task):
        time.sleep(0.02)
        reached.append(True)
    assert reached


@pytest.mark.parametrize("kind", [FormatError, KeyboardInterrupt])
def test_an_error_of_the_upload_comes_first(kind):
    ended = []

    def task():
        time.sleep(0.05)
        ended.append(True)
        raise BackendError("does not compile")

    before = threading.active_count()
    with pytest.raises(kind), loader._meanwhile(task):
        raise kind("damaged")
    assert ended and threading.active_count() == before


# --- loads that fail, on NumPy ----------------------------------------------------------------------------------------


def test_parts_keep_nothing_after_an_error(monkeypatch):
    """A traceback may live long, in a notebook for one: it must not hold half a model."""
    plans = []
    monkeypatch.setattr(parts.Plan, "refuse_leftovers", lambda plan: plans.append(plan))
    real = parts.QMatrix.from_tensors

    def failing(tensors, **options):
        if options["name"].startswith("model.layers.1."):
            raise KeyboardInterrupt
        return real(tensors, **options)

    monkeypatch.setattr(parts.QMatrix, "from_tensors", failing)
    with pytest.raises(KeyboardInterrupt):
        load_model(EXL2, "numpy")
    assert len(plans[0].parts) > 20 and all(part.value is None for part in plans[0].parts)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

MODELS = [ARCH / name for name in ("llama3-rope", "qwen2", "qwen3", "mixtral", "gemma2")]
MODELS += [EXAMPLES / name for name in ("shakespeare", "shakespeare-exl2-2.5", "shakespeare-exl2-4.0", "shakespeare-gptq-g32")]


@pytest.mark.gpu
@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_kernels_are_foreseen(cupy, monkeypatch, folder):
    """One layer of each kind, made of zeros, asks for all the kernels that the model does, and for those of loading it."""
    foreseen = []
    monkeypatch.setattr(loader, "compile_traced", lambda wanted: foreseen.extend(wanted))
    model = load_model(folder, "cupy")
    assert set(trace_kernels(model)) <= set(foreseen)
    with Checkpoint(folder) as checkpoint, _kernels.tracing() as to_load:
        blueprint = loader.Blueprint(loader.Plan(model.config, checkpoint, cupy, model.dtype))
        blueprint.load()
    assert set(to_load) <= set(foreseen)
    assert bool(to_load) == ("exl2" in folder.name or "gptq" in folder.name)


def used_bytes(cupy):
    gc.collect()
    return cupy.get_default_memory_pool().used_bytes()


def load_and_catch(folder):
    """The error of a load, without its frames."""
    try:
        load_model(folder, "cupy")
    except BaseException as error:
        return error.with_traceback(None)
    return None


@pytest.mark.gpu
@pytest.mark.parametrize("folder", [EXL2, EXAMPLES / "shakespeare"], ids=lambda folder: folder.name)
def test_finding_the_kernels_leaves_nothing_on_the_gpu(cupy, folder):
    load_model(folder, "cupy")  # what is cached for good
    config = dataclasses.replace(ModelConfig.from_file(folder), max_seq_len=16)
    with Checkpoint(folder) as checkpoint:
        before = used_bytes(cupy)
        blueprint = loader.Blueprint(loader.Plan(config, checkpoint, cupy, np.dtype(np.float16)))
        tables = used_bytes(cupy) - before
        assert blueprint.kernels()
        assert used_bytes(cupy) - before == tables


@pytest.mark.gpu
def test_a_file_cut_short_during_a_load(cupy, monkeypatch, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EXL2, folder, ignore=shutil.ignore_patterns("golden*"))
    load_model(folder, "cupy")
    before, threads = used_bytes(cupy), threading.active_count()
    file, real = folder / "output.safetensors", upload._fill
    names = SafetensorsFile(file).names
    infos = {name: SafetensorsFile(file).info(name) for name in names}
    victim = infos["model.layers.2.mlp.down_proj.q_weight"]

    def cut_then_fill(checkpoint, name, begin, target):
        if name == victim.name:
            os.truncate(file, victim.end - 4)
        real(checkpoint, name, begin, target)

    monkeypatch.setattr(upload, "_fill", cut_then_fill)
    error = load_and_catch(folder)
    # Several threads read: whichever first comes to a tensor that the cut took something of.
    cut_off = [name for name in names if infos[name].end > victim.end - 4]
    assert isinstance(error, FormatError) and str(file) in str(error), error
    assert any(name in str(error) for name in cut_off), error
    assert "bytes early; the file is damaged or cut short" in str(error)
    assert used_bytes(cupy) == before and threading.active_count() == threads


@pytest.mark.gpu
def test_an_interrupted_load(cupy, monkeypatch):
    load_model(EXL2, "cupy")
    before, threads = used_bytes(cupy), threading.active_count()
    real = upload.read

    def interrupted(*arguments):
        for count, item in enumerate(real(*arguments)):
            if count == 20:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(upload, "read", interrupted)
    assert isinstance(load_and_catch(EXL2), KeyboardInterrupt)
    assert used_bytes(cupy) == before and threading.active_count() == threads
    monkeypatch.setattr(upload, "read", real)
    assert load_model(EXL2, "cupy").forward([1, 2, 3]).shape[:2] == (1, 3)


@pytest.mark.gpu
def test_two_loads_at_once(cupy):
    """From two threads, on a stream of their own each, while a third model runs."""
    ids = np.arange(64).reshape(2, 32)
    folders = [EXL2, EXAMPLES / "shakespeare-gptq-g32"]
    running = load_model(EXAMPLES / "shakespeare", "cupy")
    expected = [load_model(folder, "cupy").forward(ids).get() for folder in folders] + [running.forward(ids).get()]
    found: list = [None] * 2

    def load(index):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            model = load_model(folders[index], "cupy")
            found[index] = model.forward(ids).get()
            stream.synchronize()

    for _ in range(3):
        threads = [threading.Thread(target=load, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert np.array_equal(running.forward(ids).get(), expected[2])
        for thread in threads:
            thread.join()
        for index in range(2):
            assert found[index] is not None and np.array_equal(found[index], expected[index]), folders[index].name
