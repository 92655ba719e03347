"""Decoding over the GPUs of this machine: tokens per second of a model of random weights, split over 1, 2, 4 or 8 of them."""

import gc
import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from cupyq import _device
from cupyq._arrays import require_cupy
from cupyq._copies import to_host
from cupyq.bench.limits import read_gigabytes_per_s
from cupyq.bench.model import step_bytes
from cupyq.bench.random_matrices import Words
from cupyq.bench.random_model import decoder_kind, model_config, model_of, random_checkpoint
from cupyq.bench.shapes import CONFIGS, shape_config
from cupyq.bench.table import emit, number, percent
from cupyq.bench.tp import sum_us
from cupyq.errors import BackendError
from cupyq.models.loader import Blueprint, choose_dtype
from cupyq.models.sampler import SamplerSettings
from cupyq.models.warmup import compile_kernels
from cupyq.tp.loading import RankPlan
from cupyq.tp.model import RankModel
from cupyq.tp.plan import TPPlan
from cupyq.tp.reading import linear_tensors
from cupyq.tp.running import run as run_ranks
from cupyq.tp.split import take_columns, take_rows

HEAD_BITS = 6
PROMPT, WARM_STEPS, REPEATS = 16, 8, 3
QUICK_LAYERS, QUICK_STEPS = 8, 32
_NARROW = 32  # columns of a matrix whose tables are looked at: what a kernel's tile has, and any layer
COLUMNS = (
    f"{'GPUs':>4} {'tokens/s':>9} {'ms/token':>9} {'speed-up':>8} {'GB each':>8} {'of limit':>8} {'us/sum':>7} {'in sums':>7}"
)


@dataclass(frozen=True)
class Options:
    """Which model, on which numbers of GPUs, or of threads on NumPy."""

    shape: str = "llama-3.1-70b"
    bits: str = "4"
    layers: int = 80
    gpus: tuple = (1, 2, 4)
    backend: str = "cupy"
    steps: int = 128

    @classmethod
    def parse(cls, shape, bits, layers=None, gpus=None, backend="auto", is_quick=False):
        """layers: None for all; gpus: numbers of GPUs, None for 1, 2, 4 and 8 as far as there are so many."""
        backend = _device.choose_backend(backend)
        usable = _device.count() if backend == "cupy" else 2
        gpus = tuple(count for count in (1, 2, 4, 8) if count <= usable) if gpus is None else tuple(gpus)
        if backend == "cupy" and (not gpus or max(gpus) > usable):
            raise BackendError(
                f"this process sees {usable} GPUs, asked for {list(gpus) or 1}: ask for fewer, or --backend numpy"
            )
        decoder_kind(bits)
        shape_config(shape)
        if layers is None:
            layers = CONFIGS[shape]["num_hidden_layers"]
            layers = min(layers, QUICK_LAYERS) if is_quick else layers
        return cls(shape, bits, layers, gpus, backend, QUICK_STEPS if is_quick else 128)


def run(options, out, lines=None):
    """([row], whether all ranks drew the same tokens); the table goes to `out`, JSON lines to `lines`."""
    config = shape_config(options.shape, options.layers)
    checkpoint, rows = random_checkpoint(config, options.bits, HEAD_BITS), []
    gigabytes_per_s = read_gigabytes_per_s() if options.backend == "cupy" else None
    machine = (
        "NumPy, no GPU" if gigabytes_per_s is None else f"{_device.current().name}: streaming read {gigabytes_per_s:.0f} GB/s"
    )
    print(
        f"{machine}\n{options.shape}: {options.layers} layers at {options.bits} bits, a head at {HEAD_BITS}; one text, greedy,"
        f" {options.steps} steps after {PROMPT} tokens\n{COLUMNS}",
        file=out,
        flush=True,
    )
    for count in options.gpus:
        row = _row(options, config, checkpoint, count, gigabytes_per_s, rows)
        rows.append(row)
        emit(row, row_text(row), out, lines)
    return rows, all(row["is_right"] for row in rows)


def _row(options, config, checkpoint, count, gigabytes_per_s, before):
    is_on_gpus = options.backend == "cupy"
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    one_sum_us = sum_us(count, hidden) if is_on_gpus and count > 1 else None
    found = run_ranks(partial(_on_rank, options, config, checkpoint), count, backend=options.backend)
    if is_on_gpus:
        _free_memory(count)
    # A step ends when the last rank's does.
    seconds = float(np.median(np.max([times for times, _, _ in found], axis=0))) / options.steps
    weight_bytes = max(size for _, _, size in found)
    # Two sums a layer. They take no less than in a graph of nothing else, where no rank waits for another's product.
    sums_share = None if one_sum_us is None else 2 * layers * one_sum_us / 1e6 / seconds
    alone = next((row["tokens_per_s"] for row in before if row["gpus"] == 1), 1 / seconds if count == 1 else None)
    limit = None if gigabytes_per_s is None else 1e9 * gigabytes_per_s / weight_bytes
    return {
        "family": "tp",
        "what": "decode",
        "gpus": count,
        "shape": options.shape,
        "layers": layers,
        "bits": options.bits,
        "head_bits": HEAD_BITS,
        "tokens": PROMPT,
        "steps": options.steps,
        "tokens_per_s": 1 / seconds,
        "milliseconds": 1e3 * seconds,
        "speed_up": None if alone is None else 1 / seconds / alone,
        "gigabytes": weight_bytes / 1e9,
        "limit_tokens_per_s": limit,
        "share": None if limit is None else 1 / seconds / limit,
        "sum_us": one_sum_us,
        "sums_share": sums_share,
        "is_right": _is_agreed([tokens for _, tokens, _ in found]),
    }


def _is_agreed(tokens):
    """Whether all ranks drew the same tokens, and none from logits that are not finite, for which a decoder gives -1."""
    return all(np.array_equal(own, tokens[0]) for own in tokens) and bool((tokens[0] >= 0).all())


def _free_memory(count):
    """Models and graphs of threads that have ended: the next model is made in the same memory."""
    gc.collect()
    cupy = require_cupy()
    for device in range(count):
        with cupy.cuda.Device(device):
            cupy.get_default_memory_pool().free_all_blocks()


# --- on each rank -----------------------------------------------------------------------------------------------------


def _on_rank(options, config, checkpoint, comm):
    """([seconds of each repeat], tokens drawn, bytes of weights that a step reads)."""
    model = model_of(checkpoint, config, options.backend) if comm.ranks == 1 else _rank_model(config, checkpoint, comm)
    max_len = PROMPT + WARM_STEPS + REPEATS * options.steps
    decoder = model.decoder(batch=1, max_len=max_len, settings=SamplerSettings.greedy(), seed=0)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, PROMPT), np.int32)
    drawn, seconds = [_on_host(comm, decoder.start(prompt))], []
    drawn.append(_on_host(comm, decoder.run(WARM_STEPS)))
    for _ in range(REPEATS):
        comm.barrier()
        start = time.perf_counter()
        tokens = decoder.run(options.steps)
        comm.wait()
        seconds.append(time.perf_counter() - start)
        drawn.append(_on_host(comm, tokens))
        del tokens  # the next ones take its memory: nothing is allocated while a kernel waits for other ranks
    return seconds, np.concatenate(drawn), step_bytes(model, 0)


def _on_host(comm, tokens):
    comm.wait()
    return to_host(tokens).reshape(-1).copy()


def _rank_model(config, checkpoint, comm):
    """As `tp.load_model`, of random weights."""
    sizes = model_config(config)
    split = TPPlan.of(sizes, comm.ranks)
    plan = RandomRankPlan(sizes, checkpoint, comm.xp, choose_dtype(None, comm.xp), comm, split)
    blueprint = Blueprint(plan)
    blueprint.load(plan.parts)
    model = blueprint.model(make=partial(RankModel, comm=comm, plan=split, shares=plan.shares()))
    if comm.xp is not np:
        compile_kernels(model)
    comm.barrier()
    return model


class RandomRankPlan(RankPlan):
    """A rank's part of a RandomCheckpoint, whose words, unlike those of a file, are made where they are used.

    Groups, their order and what pads them are as in the rank's part of each layer; the words are this rank's own, the same for
    every layer, but repacked for each, so that no two share their memory. Norms and embedding are equal on all ranks.
    """

    def __init__(self, *given):
        super().__init__(*given)
        self._tables = {}

    def read(self, parts):
        parts = list(parts)
        words = Words(self.xp, max(map(self._words_of, parts)), seed=self.comm.rank)
        for part in parts:
            yield part, self._random(part, words)

    def _words_of(self, part):
        """How many `_random` takes at once."""
        if part.key not in part.linears:
            return 1
        share = self._share(part.key, *part.linears[part.key])
        return 1 if share.is_empty else self._part_tables(part.key, share)["q_weight"].shape[0] * _width(share)

    def _random(self, part, words):
        if part.key not in part.linears:
            return self._on_device(self._whole(part), part.tensors)
        share = self._share(part.key, *part.linears[part.key])
        if share.is_empty:
            return {}
        tables, width = self._part_tables(part.key, share), _width(share)
        tensors = tables | {
            "q_weight": words.take(tables["q_weight"].shape[0], width),
            "q_scale": words.take(tables["q_scale"].shape[0], width // 8),
        }
        if "bias" in part.tensors:
            tensors["bias"] = self.checkpoint.array(f"{part.key}.bias")[share.columns.start : share.columns.stop]
        return tensors

    def _part_tables(self, key, share):
        """The tensors of a few columns of the rank's part: but for their width, they are those of the part.

        Layers of one name are alike in all of a random model's layers.
        """
        name = key.rpartition(".")[2]
        if name not in self._tables:
            narrow = take_columns(linear_tensors(self.checkpoint, key), range(_NARROW), name=key)
            narrow.pop("bias", None)
            self._tables[name] = narrow if share.rows is None else take_rows(narrow, share.rows, name=key)
        return self._tables[name]

    def _features_of(self, down):
        return next(iter(self._features.values())) if self._features else super()._features_of(down)


def _width(share):
    return share.n if share.columns is None else len(share.columns)


def row_text(row):
    text = (
        f"{row['gpus']:>4} {row['tokens_per_s']:>9.1f} {row['milliseconds']:>9.3f} {number(row['speed_up'], 8, 2)}"
        f" {row['gigabytes']:>8.2f} {percent(row['share'], 8)} {number(row['sum_us'], 7, 1)} {percent(row['sums_share'], 7)}"
    )
    return text if row["is_right"] else f"{text}  WRONG"
