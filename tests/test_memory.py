"""quantize/memory.py: the memory that is stated before the work, against all that NumPy takes, counted."""

import random
import re
import tracemalloc

import pytest
import test_quantize_job
from test_quantize_job import MENU, MIXTRAL, quantize, write_source

from cupyq.quantize import gather, memory, plan, quantization, writer

GPTQ = {"bits": 4, "format": "gptq", "group_size": 32}

# What takes the most: (changes of the model, options). Sizes are such that it takes a few times of what the rest takes.
PHASES = {
    "residuals": ({}, GPTQ | {"rows": 400, "length": 64, "batch_tokens": 1024}),
    "activations": ({}, GPTQ | {"rows": 100, "length": 64, "batch_tokens": 1 << 20}),
    "attention": (
        {"max_position_embeddings": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
        GPTQ | {"rows": 2, "length": 1024, "batch_tokens": 1024},
    ),
    "sensitivity": ({}, {"rows": 40, "length": 64, "sensitivity_tokens": 40 * 64, "batch_tokens": 512}),
    "hessians": ({"intermediate_size": 768, "num_hidden_layers": 1}, GPTQ | {"rows": 10, "length": 64, "batch_tokens": 256}),
    "experts": (
        MIXTRAL | {"intermediate_size": 384, "num_local_experts": 8},
        GPTQ | {"rows": 10, "length": 64, "batch_tokens": 256},
    ),
    "comparison": (
        {"intermediate_size": 256, "num_hidden_layers": 12},
        GPTQ | {"rows": 2, "length": 32, "windows": 2, "batch_tokens": 32},
    ),
    "logits": ({"vocab_size": 8192, "num_hidden_layers": 1}, GPTQ | {"rows": 8, "length": 64, "windows": 8}),
}


@pytest.mark.parametrize("phase", PHASES)
def test_no_more_than_was_stated_nor_less_than_half(tmp_path, monkeypatch, phase):
    changes, options = PHASES[phase]
    for name, key in (("VOCAB", "vocab_size"), ("INNER", "intermediate_size"), ("EXPERTS", "num_local_experts")):
        monkeypatch.setattr(test_quantize_job, name, changes.get(key, getattr(test_quantize_job, name)))
    vocab = test_quantize_job.VOCAB
    source = write_source(tmp_path / "in", **{"num_hidden_layers": 2, "vocab_size": vocab} | changes)
    words = random.Random(4)
    (tmp_path / "text.txt").write_text(" ".join(f"w{words.randrange(vocab)}" for _ in range(33_000)))
    # What does not grow with the model, so that phases of small models show.
    monkeypatch.setattr(memory, "_SCRATCH", 4 << 20)
    monkeypatch.setattr(writer, "_PIECE", 1 << 20)
    monkeypatch.setattr(quantization, "SWEEPS", 0)  # which take time, and no more memory
    stated, real = [], plan.Plan.peak_bytes

    def peak_bytes(*arguments, **named):
        stated.append(real(*arguments, **named))
        tracemalloc.start()
        return stated[0]

    monkeypatch.setattr(plan.Plan, "peak_bytes", peak_bytes)
    try:
        quantize(source, tmp_path / "out", **{"windows": 0, "menu": MENU[1:3], "bits": 4} | options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert stated[0] / 2 < peak < stated[0]


def test_experts_gathered_in_turns_take_less(monkeypatch):
    """Hessians of a chunk are in memory together, with what is lent."""
    experts = [(64, True)] * 8
    assert gather.most_bytes(experts) == 8 * 8 * 64**2
    monkeypatch.setattr(gather, "HESSIAN_BYTES", 3 * 8 * 64**2)
    assert gather.most_bytes(experts) == (3 + 1) * 8 * 64**2


def test_it_is_stated_first(tmp_path):
    said = []
    source = write_source(tmp_path / "in", num_hidden_layers=1)
    quantize(source, tmp_path / "out", windows=0, say=said.append, **GPTQ)
    assert re.fullmatch(r"peak memory: about \d+\.\d\d GB on the host, NumPy", said[0]) and len(said) > 2
