"""`cupyq bench model`: decoding, prompts, loading and the first token of a model of random weights."""

import os
import shutil
import sys
import tempfile
import time

import numpy as np

from cupyq.bench import peers
from cupyq.bench.first_token import first_token_seconds
from cupyq.bench.limits import measure_limits
from cupyq.bench.random_model import random_model, write_model
from cupyq.bench.shapes import shape_config
from cupyq.bench.table import emit
from cupyq.bench.timing import wait
from cupyq.models.sampler import SamplerSettings

WARM_STEPS = 8


def run(arguments, out=None, lines=None):
    """Measure what the arguments of `cupyq bench model` ask for; returns the rows. `lines`: a file for them as JSON lines."""
    out = sys.stdout if out is None else out
    config = shape_config(arguments.shape, arguments.layers)
    for option, tokens, more in (
        *(("--context", tokens, WARM_STEPS + arguments.steps) for tokens in arguments.context),
        *(("--prefill", tokens, 0) for tokens in arguments.prefill),
    ):
        if tokens + more > config["max_position_embeddings"]:
            limit = config["max_position_embeddings"]
            raise ValueError(f"{option}: {tokens} tokens and {more} steps pass the context of {limit}: ask for shorter ones")
    report = _Report(arguments, config, out, lines)
    model = random_model(config, arguments.bits, arguments.head_bits, arguments.backend)
    xp = model.xp
    limits = measure_limits() if xp is not np else None
    print(
        f"{limits or 'NumPy, no GPU'}\n{arguments.shape}: {config['num_hidden_layers']} layers, "
        f"{model.bits_per_weight:.3f} bits per weight, {step_bytes(model, 0) / 1e9:.3f} GB of weights read for a token",
        file=out,
        flush=True,
    )
    settings = SamplerSettings() if arguments.sampled else SamplerSettings.greedy()
    for context in arguments.context:
        report.add(_decode(model, context, arguments.steps, limits, settings))
    for tokens in arguments.prefill:
        report.add(_prefill(model, tokens, limits))
    if arguments.kernels:
        _print_kernels(model, settings, out)
    del model
    if xp is not np:
        xp.get_default_memory_pool().free_all_blocks()
    if arguments.load:
        for row in _load(arguments, config):
            report.add(row)
    return report.rows


class _Report:
    """Rows as they are measured: printed, kept, and written to a file."""

    def __init__(self, arguments, config, out, lines):
        self.out, self.lines, self.rows = out, lines, []
        self.common = {
            "family": "model",
            "shape": arguments.shape,
            "layers": config["num_hidden_layers"],
            "bits": arguments.bits,
            "head_bits": arguments.head_bits,
        }

    def add(self, row):
        self.rows.append(self.common | row)
        emit(self.rows[-1], row_text(row), self.out, self.lines)


def row_text(row):
    """A row as people read it."""
    if "seconds" in row:
        size = f", {row['gigabytes']:.2f} GB" if "gigabytes" in row else ""
        return f"{row['seconds']:8.2f} s  {row['what']}{size}, {row['kernel_cache']} kernel cache"
    text = f"{row['what']:<10} {row['tokens']:>6} tokens {row['tokens_per_s']:10.1f} tokens/s"
    if row["share"] is not None:
        text += f"   {row['share']:6.1%} of the limit, {row['limit_tokens_per_s']:.0f}"
    return text


# --- what a step must move and compute --------------------------------------------------------------------------------


def step_bytes(model, context):
    """Bytes that decoding one token reads: every linear layer as it is stored, and the keys and values of the context."""
    config = model.config
    weights = sum(layer.storage_bits for layer in model.linear_layers()) // 8
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return weights + cached * context


def prefill_flops(model, tokens):
    """Of a prompt: the products of the decoder, causal attention, and the head for the last token."""
    config = model.config
    *decoder, head = (layer.shape[0] * layer.shape[1] for layer in model.linear_layers())
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2 * (tokens * sum(decoder) + head) + attention


# --- decoding and prompts ---------------------------------------------------------------------------------------------


def _random_ids(model, count):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (1, count), np.int32)


def _decode(model, context, steps, limits, settings):
    """Tokens per second from `context` tokens on, by the decoder: on a GPU replays of captured steps."""
    decoder = model.decoder(batch=1, max_len=context + WARM_STEPS + steps, settings=settings, seed=0)
    for _ in range(2):  # the second time all graphs are there
        decoder.start(_random_ids(model, context))
        decoder.run(WARM_STEPS)
        wait(model.xp)
        start = time.perf_counter()
        tokens = decoder.run(steps)
        wait(model.xp)
        seconds = time.perf_counter() - start
    if (tokens < 0).any():
        raise ValueError(f"the model's logits are not finite after {context} tokens: a kernel is wrong")
    limit = None if limits is None else 1e6 / limits.microseconds(step_bytes(model, context), 0)
    return _rate_row("decode", context, steps / seconds, limit)


def _prefill(model, tokens, limits, repeats=3):
    """Tokens per second of a prompt into an empty cache, up to the logits of its last token."""
    cache, ids = model.new_cache(batch=1, capacity=tokens), model.xp.asarray(_random_ids(model, tokens))
    seconds = []
    for _ in range(1 + repeats):
        cache.reset()
        wait(model.xp)
        start = time.perf_counter()
        model.forward(ids, cache, last_only=True)
        wait(model.xp)
        seconds.append(time.perf_counter() - start)
    limit = None if limits is None else 1e6 * tokens / limits.microseconds(0, prefill_flops(model, tokens))
    return _rate_row("prefill", tokens, tokens / float(np.median(seconds[1:])), limit)


def _rate_row(what, tokens, rate, limit):
    share = None if limit is None else rate / limit
    return {"what": what, "tokens": tokens, "tokens_per_s": rate, "limit_tokens_per_s": limit, "share": share}


def _print_kernels(model, settings, out, steps=8):
    """Time of every kernel of a decode step, as PyTorch's profiler sees it: it watches the whole process."""
    torch = peers.torch_or_none()
    if torch is None or model.xp is np:
        print("kernels: needs a GPU and PyTorch, whose profiler is used", file=sys.stderr)
        return
    decoder = model.decoder(batch=1, max_len=256, settings=settings)
    decoder.start(_random_ids(model, 128))
    decoder.run(WARM_STEPS)
    wait(model.xp)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decoder.run(steps)
        wait(model.xp)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    print(f"{'kernel':<72} {'calls':>6} {'us':>8} {'us/step':>8}", file=out)
    for event in events:
        total = event.self_device_time_total
        if total > 0:
            name = event.key if len(event.key) <= 72 else f"{event.key[:69]}..."
            print(f"{name:<72} {event.count / steps:6.1f} {total / event.count:8.2f} {total / steps:8.1f}", file=out)


# --- loading ----------------------------------------------------------------------------------------------------------


def _load(arguments, config):
    """Rows of two new processes: one with an empty kernel cache, one with the kernels there; files in the page cache."""
    with tempfile.TemporaryDirectory(dir=_scratch(arguments), prefix="cupyq-bench-") as folder:
        nbytes = write_model(config, arguments.bits, arguments.head_bits, folder)
        cold, warm = first_token_seconds(folder, backend=_child_backend(arguments))
    for cache, found in (("empty", cold), ("full", warm)):
        common = {"kernel_cache": cache, "kernels": found["kernels"]}
        yield {"what": "load", "seconds": found["load"], "gigabytes": nbytes / 1e9} | common
        yield {"what": "token after loading", "seconds": found["first_token"]} | common
        yield {"what": "first token of a new process", "seconds": found["total"]} | common


def _child_backend(arguments):
    return "numpy" if arguments.backend == "numpy" else "cupy"


def _scratch(arguments):
    """Where the checkpoint goes: --folder, else memory (/dev/shm) where it has room to spare, else the temporary folder."""
    if arguments.folder is not None:
        if not os.path.isdir(arguments.folder):
            raise ValueError(f"--folder {arguments.folder}: no such folder")
        return arguments.folder
    memory = "/dev/shm"
    has_room = os.path.isdir(memory) and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 16 << 30
    return memory if has_room else None
