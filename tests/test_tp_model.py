"""tp/model.py: whole models on 2, 3 and 4 ranks against one, on NumPy threads and on GPUs.

On NumPy activations are float32, partial products too, and sums over ranks are made in float64 and rounded once. A model on
several ranks so differs from one by the last bits of float32 sums: 2**-24 for each of a few hundred roundings, which the
longest of these models turns into 1e-6 of the logits' norm. FLOAT32 leaves out anything larger: a missing term, a wrong
column, a rounding to 16 bits (2**-11) in one layer.
"""

import functools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from kernel_checks import host
from test_adapters import sizes_of, tensors_of, write
from test_models import (
    ARCH_MODELS,
    EXAMPLES,
    MODELS,
    check_float16,
    folder_of,
    golden,
    loaded,
    on_gpu,
    packed,
    setting,
    variant,
)
from tp_checks import free_port, several_gpus  # noqa: F401

from cupyq import tp
from cupyq.formats.safetensors import SafetensorsFile
from cupyq.generate import SamplerSettings, generate
from cupyq.layers import CACHE_KINDS
from cupyq.models import load_model
from cupyq.tp.layers import NoHeads, SummingNorm

FLOAT32 = 2e-6
GREEDY = SamplerSettings.greedy()
SAMPLED = SamplerSettings(temperature=1.0, top_k=40, top_p=0.95, seed=11)
PROMPT = [3, 140, 25, 6, 80]
SHAKESPEARES = ["shakespeare", "shakespeare-exl2-4.0", "shakespeare-gptq-g32"]


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def on_ranks(name, ranks, work, backend="numpy", **options):
    """work(model) of each rank, whose results must be equal, bit for bit: one of them."""
    results = tp.run(lambda comm: work(tp.load_model(folder_of(name), comm, **options)), ranks, backend=backend)
    for other in results[1:]:
        assert same(results[0], other)
    return results[0]


def same(one, other):
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return one == other


def count_of(name):
    return 3 if "shakespeare-" in name else 8


@functools.cache
def greedy_text(name):
    return generate(loaded(name), PROMPT, max_new_tokens=count_of(name), settings=GREEDY).tokens


def ids_of(batch=2, seq=12, vocab=500, seed=3):
    return np.random.default_rng(seed).integers(0, vocab, (batch, seq)).astype(np.int32)


# --- logits and text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_together_are_one(name, ranks):
    ids = golden(name)[0][:1, :16]
    writes = ranks == 2 or "shakespeare-" not in name  # whose decoding of weights, anew for each token, takes seconds

    def work(model):
        text = generate(model, PROMPT, max_new_tokens=count_of(name), settings=GREEDY).tokens if writes else None
        return model.forward(ids), text, model.parameters, model.format

    logits, tokens, parameters, form = on_ranks(name, ranks, work)
    one = loaded(name)
    expected = one.forward(ids)
    assert logits.dtype == np.float32 and logits.shape == expected.shape and logits.flags.c_contiguous
    assert relative(logits, expected) <= FLOAT32, relative(logits, expected)
    assert tokens == (greedy_text(name) if writes else None) and parameters == one.parameters and form == one.format


@pytest.mark.parametrize("name", ["llama3-rope", "gemma2", "mixtral"])
def test_activations_of_16_bits(name):
    """On ranks, products are rounded to 16 bits no more often than on one: at most twice as far from float32."""
    ids = golden(name)[0][:1, :16]
    exact = loaded(name).forward(ids)
    alone = relative(load_model(folder_of(name), "numpy", dtype="float16").forward(ids), exact)
    together = relative(on_ranks(name, 2, lambda model: model.forward(ids), dtype="float16"), exact)
    assert 1e-5 < together <= 2 * alone, (together, alone)


class Mute:
    """A rank's Comm that leaves this rank out of sums: what a forgotten part looks like."""

    def __init__(self, comm):
        self.rank, self.comm = comm.rank, comm

    def all_reduce(self, array, out):
        if self.rank == 1:
            array[...] = 0
        return self.comm.all_reduce(array, out)

    def all_reduce_norm(self, array, weight, **options):
        if self.rank == 1:
            array[...] = 0
        return self.comm.all_reduce_norm(array, weight, **options)


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["llama3-rope", "gemma2", "mixtral"])
def test_a_part_left_out_would_be_seen(name, part):
    ids = golden(name)[0][:1, :8]

    def work(model):
        layer = model.layers[-1]
        block = layer.attention.o if part == "attention" else getattr(layer.mlp, "down", layer.mlp)
        norm = layer.mlp_norm if part == "attention" else model.norm
        sums = norm if isinstance(norm, SummingNorm) else block
        assert (sums is norm) == (name == "llama3-rope" or (name, part) == ("mixtral", "attention"))
        assert getattr(block, "leaves_sum", False) == (sums is norm)
        sums.comm = Mute(sums.comm)
        return model.forward(ids)

    assert relative(on_ranks(name, 2, work), loaded(name).forward(ids)) > 100 * FLOAT32


def test_a_wrong_order_of_logits_would_be_seen():
    ids = golden("qwen2")[0][:1, :8]

    def work(model):
        begin = model.plan.vocab[model.comm.rank].start
        model.head.weight = np.roll(model.head.weight, 1 if begin else 0, axis=0)
        return model.forward(ids)

    assert relative(on_ranks("qwen2", 2, work), loaded("qwen2").forward(ids)) > 100 * FLOAT32


# --- who holds what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3-rope", "shakespeare-exl2-4.0", "mixtral"])
def test_uneven_weights(name):
    ids, weights = ids_of(1, 6), [3.0, 1.0]

    def work(model):
        sizes = [(linear.name, linear.shape) for linear in model.linear_layers()]
        return model.forward(ids), sizes, model.kv_heads

    results = tp.run(lambda comm: work(tp.load_model(folder_of(name), comm, weights=weights)), 2, backend="numpy")
    (logits, big, _), (other, small, _) = results
    assert same(logits, other) and relative(logits, loaded(name).forward(ids)) <= FLOAT32
    for (key, (k, n)), (_, (k2, n2)), whole in zip(big, small, loaded(name).linear_layers(), strict=True):
        assert whole.name == key and (k + k2 == whole.shape[0]) != (n + n2 == whole.shape[1])
        if key.endswith(("down_proj", "w2")):
            assert k > 1.5 * k2


@pytest.mark.parametrize(("name", "ranks"), [("qwen2", 5), ("gemma2", 7)])
def test_more_ranks_than_heads(tmp_path, name, ranks):
    """Ranks without heads compute their share of the MLP, hold no keys, and adapters pass them by."""
    ids = ids_of()
    folder = write(tmp_path / "style", tensors_of(sizes_of(name), 4, scale=0.5))
    idle = []

    def work(model):
        has_none = isinstance(model.layers[0].attention, NoHeads)
        idle.append(has_none)
        cache = model.new_cache(batch=2, capacity=16, kind="q4")
        assert has_none == (model.kv_heads == 0) == (cache.nbytes == 0)
        model.load_adapter(folder)
        styled = model.forward(ids, adapters="style")
        paged = model.new_paged_cache(8, batch=2, page_size=8)
        stepped = [model.forward(ids[:, :8], paged, last_only=True), model.forward(ids[:, 8:], paged, last_only=True)]
        model.unload_adapter("style")
        return model.forward(ids), styled, stepped[-1], model.forward(ids, cache)

    plain, styled, stepped, coded = on_ranks(name, ranks, work)
    assert sum(idle) == ranks - loaded(name).config.num_attention_heads
    one = load_model(folder_of(name), "numpy")
    assert relative(plain, one.forward(ids)) <= FLOAT32 and relative(stepped, one.forward(ids)[:, -1:]) <= FLOAT32
    assert relative(coded, one.forward(ids, one.new_cache(batch=2, capacity=16, kind="q4"))) <= 1e-2
    one.load_adapter(folder)
    assert relative(styled, one.forward(ids, adapters="style")) <= FLOAT32


def test_quantized_experts(tmp_path):
    """EXL2 in groups of 32, whose rows are stored in an order of their own in every expert."""
    rng, config = np.random.default_rng(5), loaded("mixtral").config
    hidden, inner, tensors = config.hidden_size, config.intermediate_size, {}
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_experts):
            for name, k, n in (("w1", hidden, inner), ("w3", hidden, inner), ("w2", inner, hidden)):
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors |= packed(rng, key, k, n) | {f"{key}.q_invperm": rng.permutation(k).astype(np.int32)}
    drop = [key.rpartition(".")[0] + ".weight" for key in tensors]
    folder, ids = variant(tmp_path, "mixtral", drop=drop, tensors=tensors), ids_of(1, 8)
    found = tp.run(lambda comm: tp.load_model(folder, comm).forward(ids), 3, backend="numpy")
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert relative(found[0], load_model(folder, "numpy").forward(ids)) <= FLOAT32


def test_the_last_rank_has_what_pads_the_head(tmp_path):
    """A vocabulary of 481 in 512 columns, and an adapter of 481."""
    embed = SafetensorsFile(folder_of("qwen2") / "model.safetensors").array("model.embed_tokens.weight")
    tensors = packed(np.random.default_rng(481), "lm_head", 192, 481) | {"model.embed_tokens.weight": embed[:481]}
    folder = variant(tmp_path, "qwen2", setting(vocab_size=481), drop=["lm_head"], tensors=tensors)
    style, ids = write(tmp_path / "style", tensors_of({"lm_head": (192, 481)}, 4)), ids_of(2, 8, vocab=481)

    def work(model):
        model.load_adapter(style)
        return model.forward(ids), model.forward(ids, adapters="style")

    found = tp.run(lambda comm: work(tp.load_model(folder, comm)), 3, backend="numpy")
    assert same(found[0], found[1]) and same(found[0], found[2])
    for one, other in zip(found[0], work(load_model(folder, "numpy")), strict=True):
        assert one.shape == (2, 8, 481) and relative(one, other) <= FLOAT32


def test_one_rank_is_the_model():
    ids = ids_of()
    assert same(on_ranks("gemma2", 1, lambda model: model.forward(ids)), loaded("gemma2").forward(ids))


def test_too_many_ranks_are_refused_by_name():
    with pytest.raises(ValueError, match="intermediate_size 352 makes 11 parts of 32, fewer than 12 ranks: use at most 11"):
        on_ranks("llama3-rope", 12, lambda model: None)


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3-rope", "gemma2"])
def test_caches_hold_the_heads_of_a_rank(name):
    """Contiguous and paged, numbers and codes. Codes of the same heads are the same, up to values at a border between two."""
    ids = ids_of()

    def steps(model):
        found, sizes = [], []
        for kind in CACHE_KINDS:
            cache, pages = model.new_cache(2, 16, kind), model.new_paged_cache(8, 2, page_size=8, kind=kind)
            assert cache.kv_heads == pages.kv_heads == model.kv_heads
            sizes += [cache.nbytes, pages.nbytes]
            for kept in (cache, pages):
                model.forward(ids[:, :10], kept, last_only=True)
                found.append(model.forward(ids[:, 10:11], kept))
        return found, sizes

    found, sizes = on_ranks(name, 2, steps)
    expected, whole_sizes = steps(loaded(name))
    assert [2 * size for size in sizes] == whole_sizes
    for kind, one, other in zip([kind for kind in CACHE_KINDS for _ in range(2)], found, expected, strict=True):
        assert relative(one, other) <= (FLOAT32 if kind == "fp16" else 1e-2), kind


def test_pages_are_shared_and_texts_have_lengths_of_their_own():
    name, ids = "qwen3", ids_of(1, 16)

    def work(model):
        pages = model.new_paged_cache(12, 2, page_size=8)
        model.forward(ids, pages.row(0), last_only=True)
        pages.share(0, 1, 8)
        tail = model.forward(ids[:, 8:12], pages.row(1), last_only=True)
        return tail, model.forward(np.array([[5], [6]]), pages)

    found, expected = on_ranks(name, 2, work), work(loaded(name))
    assert all(relative(one, other) <= FLOAT32 for one, other in zip(found, expected, strict=True))


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ranks"), [(name, 2) for name in ARCH_MODELS] + [("shakespeare-exl2-4.0", 3)])
def test_adapters_are_split_like_their_projections(tmp_path, name, ranks):
    """On every projection, router and head included; two rows of a batch with different ones."""
    ids = ids_of()
    tensors = [tensors_of(sizes_of(name), 3 + i, seed=i, scale=0.5) for i in range(2)]
    folders = [write(tmp_path / f"style{i}", tensors[i], r=3 + i) for i in range(2)]

    def work(model):
        for folder in folders:
            model.load_adapter(folder)
        mixed = model.forward(ids, adapters=["style0", {"style0": 0.5, "style1": 2.0}])
        model.unload_adapter("style0")
        return mixed, model.forward(ids, adapters="style1"), model.forward(ids)

    found, expected = on_ranks(name, ranks, work), work(load_model(folder_of(name), "numpy"))
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) <= 2 * FLOAT32
    assert relative(expected[0], expected[2]) > 1e-2


def test_an_adapter_of_another_model_is_refused_on_all_ranks(tmp_path):
    folder = write(tmp_path / "other", tensors_of({"layers.0.self_attn.q_proj": (256, 128)}, 4))
    with pytest.raises(Exception, match="expected .*the adapter was trained on another model"):
        on_ranks("llama3-rope", 2, lambda model: model.load_adapter(folder))


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_all_ranks_draw_the_same_tokens():
    """With a seed, those of one rank; without, one that rank 0 chose."""
    prompts = [PROMPT, [9, 8]]

    def work(model):
        drawn = []
        for settings in (GREEDY, SAMPLED, SamplerSettings(temperature=1.5, top_k=0, top_p=1.0)):
            decoder = model.decoder(2, 24, settings=settings)
            drawn.append((np.concatenate([decoder.start(prompts)[:, None], decoder.run(8)], axis=1), decoder.seed))
        free = generate(model, PROMPT, max_new_tokens=6, settings=SamplerSettings(temperature=1.5))
        return *drawn, free.tokens, free.seed

    greedy, sampled, unseeded, _, seed = on_ranks("qwen3", 3, work)
    one = work(loaded("qwen3"))
    assert same(greedy[0], one[0][0]) and same(sampled, one[1])
    assert unseeded[1] != one[2][1] and seed != one[4]
    again = loaded("qwen3").decoder(2, 24, settings=SamplerSettings(temperature=1.5, top_k=0, top_p=1.0), seed=unseeded[1])
    assert same(np.concatenate([again.start(prompts)[:, None], again.run(8)], axis=1), unseeded[0])


# --- on GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_ranks_on_gpus(several_gpus, name):  # noqa: F811
    """Threads of one process: prompts, single tokens through a cache, a decoder with and without graphs."""
    ids, expected = golden(name)
    ids, expected = ids[:, :64], expected[:, :64]

    def work(model):
        cache = model.new_cache(batch=len(ids), capacity=64)
        parts = [model.forward(ids[:, :40], cache)] + [model.forward(ids[:, i : i + 1], cache) for i in range(40, 64)]
        decoders = [model.decoder(2, 64, settings=SAMPLED, graph=graph) for graph in (True, False)]
        prompts = [PROMPT, [9, 8, 7]]
        drawn = [np.concatenate([host(d.start(prompts))[:, None], host(d.run(40))], axis=1) for d in decoders]
        assert np.array_equal(*drawn) and drawn[0].min() >= 0
        return model.forward(ids).get(), np.concatenate([part.get() for part in parts], axis=1), drawn[0]

    for ranks in sorted({2, min(several_gpus, 4)}):
        prompt, stepped, _ = on_ranks(name, ranks, work, "cupy")
        check_float16(name, prompt, expected)
        check_float16(name, stepped, expected)


@functools.cache
def sure_greedy_text(name):
    """A greedy text of NumPy's, as far as float16 can tell the two best tokens apart."""
    tokens = generate(loaded(name), PROMPT, max_new_tokens=24, settings=GREEDY).tokens
    logits = loaded(name).forward(PROMPT + tokens[:-1])[0, len(PROMPT) - 1 :]
    two_best = np.sort(logits, axis=-1)[:, -2:]
    unsure = np.flatnonzero(two_best[:, 1] - two_best[:, 0] <= 0.03)
    return tokens[: unsure[0]] if unsure.size else tokens


@pytest.mark.parametrize("name", SHAKESPEARES)
def test_there_is_text_to_compare(name):
    assert len(sure_greedy_text(name)) >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAKESPEARES)
def test_greedy_text_on_gpus(several_gpus, name):  # noqa: F811
    expected = sure_greedy_text(name)

    def work(model):
        return generate(model, PROMPT, max_new_tokens=len(expected), settings=GREEDY).tokens

    assert work(on_gpu(name)) == expected
    assert on_ranks(name, min(several_gpus, 4), work, "cupy") == expected


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["q4", "fp8"])
def test_caches_and_adapters_on_gpus(several_gpus, tmp_path, kind):  # noqa: F811
    name, ids = "shakespeare-exl2-4.0", ids_of(2, 24)
    folder = write(tmp_path / "style", tensors_of(sizes_of(name), 4, scale=0.5))

    def work(model):
        model.load_adapter(folder)
        pages = model.new_paged_cache(8, 2, page_size=16, kind=kind)
        first = model.forward(ids[:, :20], pages, last_only=True, adapters="style")
        last = [model.forward(ids[:, i : i + 1], pages, adapters=[None, "style"]) for i in range(20, 24)]
        decoder = model.decoder(2, 48, settings=GREEDY, adapters=["style", None], cache=kind)
        decoder.start(ids)
        return host(first), host(last[-1]), host(decoder.run(16))

    first, last, _ = on_ranks(name, 2, work, "cupy")
    exact = work(load_model(folder_of(name), "numpy"))
    alone = work(load_model(folder_of(name), "cupy"))
    for found, one, expected in zip((first, last), alone, exact, strict=False):
        assert relative(found, expected) <= 3 * relative(one, expected) + 2e-3


@pytest.mark.gpu
def test_a_process_for_each_gpu(several_gpus, tmp_path):  # noqa: F811
    """As torchrun starts them: the same text on each, and rank 0 alone prints it."""
    folder = EXAMPLES / "shakespeare-exl2-4.0"
    expected = sure_greedy_text(folder.name)
    command = [sys.executable, "-m", "cupyq", "generate", str(folder), "--greedy", "--json"]
    command += ["--tokens", ",".join(map(str, PROMPT)), "--max-new-tokens", str(len(expected))]
    ranks = min(several_gpus, 4)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT)}
    place |= {"LOCAL_WORLD_SIZE": str(ranks), "CUPYQ_WATCH_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [*command, "--tp"],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), [error[-500:] for _, error in outputs]
    assert json.loads(outputs[0][0].splitlines()[-1])["tokens"] == expected
    assert all(text == "" for text, _ in outputs[1:])


RANK_WITH_A_DECODER = """
import os, signal, sys, time
from cupyq import tp
from cupyq.generate import SamplerSettings
with tp.connect(backend="cupy") as comm:
    decoder = tp.load_model(sys.argv[1], comm).decoder(max_len=250, settings=SamplerSettings.greedy())
    decoder.start([[1, 2, 3]])
    for step, tokens in enumerate(decoder.stream(100)):
        if sys.argv[2] == "killed" and step == 60 and comm.rank == comm.ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()
print("left")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["killed", "left"])
def test_graphs_outlive_their_communicator(several_gpus, tmp_path, how):  # noqa: F811
    """Nobody waits for the graph of a decoder to go, which whoever ends holds; the dead rank is named within 10 s."""
    ranks = min(several_gpus, 4)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT)}
    place |= {"LOCAL_WORLD_SIZE": str(ranks), "CUPYQ_WATCH_DIR": str(tmp_path)}
    command = [sys.executable, "-c", RANK_WITH_A_DECODER, str(EXAMPLES / "shakespeare-exl2-4.0"), how]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(ranks)
    ]
    try:
        *survivors, last = processes
        last.wait(120)
        start = time.monotonic()
        said = [process.communicate(timeout=60) for process in survivors]
        seconds = time.monotonic() - start
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert seconds < 10, (codes, said)
    if how == "killed":
        assert codes == [1] * (ranks - 1) + [-9], said
        assert all(f"rank {ranks - 1} " in error and "died" in error for _, error in said), said
    else:
        assert codes == [0] * ranks and all(told == "left\n" for told, _ in said), (codes, said)
