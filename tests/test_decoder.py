"""models/decoder.py: decoding on the device, against token by token; on a GPU as graphs, against launch by launch."""

import copy
import dataclasses
import gc
import itertools
import random

import numpy as np
import pytest
from kernel_checks import host
from test_adapters import sizes_of, tensors_of, write
from test_models import folder_of, loaded, on_gpu, variant

from cupyq.errors import UnsupportedError
from cupyq.generate import SamplerSettings, generate
from cupyq.layers import CACHE_KINDS
from cupyq.models import load_model, queues
from cupyq.models import model as model_module

MODELS = ["shakespeare", "shakespeare-exl2-4.0", "shakespeare-gptq-g32", "llama3-rope", "qwen2", "qwen3", "mixtral", "gemma2"]
GREEDY = SamplerSettings.greedy()
SAMPLED = SamplerSettings(temperature=1.0, top_k=40, top_p=0.95, seed=11)
PENALISED = SamplerSettings(
    temperature=1.1,
    top_k=0,
    top_p=0.98,
    seed=5,
    repetition_penalty=1.2,
    frequency_penalty=0.1,
    presence_penalty=0.2,
    dry_multiplier=0.8,
    dry_allowed_length=1,
    token_bias={7: 1.0, 9: float("-inf")},
    tfs=0.99,
    mirostat_tau=4.0,
    xtc_probability=0.5,
    xtc_threshold=0.05,
)
PROMPT = [3, 140, 25, 6, 80]
PROMPTS = [PROMPT, [9, 8], [100, 2, 3, 4, 5, 6, 7]]


def rows_of(decoder, prompts, steps):
    """The tokens of each text, as lists."""
    first = decoder.start(prompts)
    return np.concatenate([host(first)[:, None], host(decoder.run(steps))], axis=1).tolist()


def test_nothing_is_collected_while_any_thread_captures():
    assert gc.isenabled()
    first, second = queues.without_collecting(), queues.without_collecting()
    with first:
        second.__enter__()
        assert not gc.isenabled()
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
    gc.disable()
    try:
        with queues.without_collecting():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


# --- on NumPy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("name", ["shakespeare", "shakespeare-exl2-4.0", "mixtral", "gemma2"])
def test_the_tokens_are_those_of_generate(name, settings):
    """generate() passes a NumPy model's logits through a sampler, token by token, with another cache."""
    model = loaded(name)
    expected = generate(model, PROMPT, max_new_tokens=12, settings=settings).tokens
    decoder = model.decoder(max_len=len(PROMPT) + 11, settings=settings)
    assert rows_of(decoder, [PROMPT], 11) == [expected]
    assert decoder.length == decoder.capacity + 1  # the last token was not fed
    assert rows_of(decoder, PROMPT, 4) == [expected[:5]]
    assert [int(decoder.step()[0]) for _ in range(3)] == expected[5:8]
    decoder.start(np.array([PROMPT]))
    assert [int(tokens[0]) for tokens in decoder.stream(12)] == expected


def test_texts_of_a_batch_do_not_see_each_other():
    """Prompts of different lengths, each text as it would be alone."""
    model = loaded("qwen2")
    for settings in (SAMPLED, PENALISED):
        found = rows_of(model.decoder(3, 40, settings=settings), PROMPTS, 8)
        for row, prompt in enumerate(PROMPTS):
            alone = model.decoder(max_len=20, settings=settings, seed=settings.seed + row)
            assert rows_of(alone, prompt, 8) == [found[row]]
        assert len({tuple(row) for row in found}) == 3
    same = rows_of(model.decoder(3, 40, settings=SAMPLED), [PROMPT] * 3, 8)
    assert len({tuple(row) for row in same}) == 3  # seeds of their own


def test_tokens_stay_until_the_next_start():
    decoder = loaded("qwen2").decoder(2, 20, settings=GREEDY)
    drawn = [decoder.start([PROMPT, PROMPT]), *(decoder.step() for _ in range(5))]
    copies = [tokens.copy() for tokens in drawn]
    more = decoder.run(3)
    assert more.shape == (2, 3) and more.dtype == np.int32 and more.flags.c_contiguous
    assert all(np.array_equal(tokens, copy) for tokens, copy in zip(drawn, copies, strict=True))
    assert decoder.run(0).shape == (2, 0)
    assert decoder.length == len(PROMPT) + 9


def test_the_seed():
    model = loaded("qwen2")
    loose = SamplerSettings(temperature=2.0, top_k=0, top_p=1.0)
    decoder = model.decoder(max_len=20, settings=loose)
    tokens = rows_of(decoder, PROMPT, 10)
    assert rows_of(decoder, PROMPT, 10) == tokens  # a new text begins anew
    assert rows_of(model.decoder(max_len=20, settings=loose, seed=decoder.seed), PROMPT, 10) == tokens
    assert rows_of(model.decoder(max_len=20, settings=loose), PROMPT, 10) != tokens
    assert model.decoder(max_len=20, settings=SAMPLED).seed == 11


def test_a_stream_can_be_left():
    decoder = loaded("qwen2").decoder(max_len=20, settings=GREEDY)
    first = int(decoder.start([PROMPT])[0])
    assert [int(tokens[0]) for tokens in itertools.islice(decoder.stream(9), 2)][0] == first
    assert decoder.length == len(PROMPT) + 2  # NumPy works on nothing ahead
    assert len(list(decoder.stream(1))) == 1 and list(decoder.stream(0)) == []


def test_the_default_length_is_the_context():
    model = load_model(folder_of("qwen2"), "numpy", max_seq_len=12)
    decoder = model.decoder(settings=GREEDY)
    assert decoder.capacity == 12
    tokens = rows_of(decoder, PROMPT, 7)
    assert tokens == [generate(model, PROMPT, max_new_tokens=8, settings=GREEDY).tokens]
    with pytest.raises(ValueError, match="1 more steps pass the decoder's max_len of 12: ask for at most 0"):
        decoder.step()


def test_a_decoder_starts_over():
    decoder = loaded("shakespeare").decoder(max_len=20, settings=PENALISED)
    tokens = rows_of(decoder, PROMPT, 6)
    rows_of(decoder, [90, 91, 92, 93, 94, 95, 96], 9)
    assert rows_of(decoder, PROMPT, 6) == tokens
    decoder.reset()
    with pytest.raises(ValueError, match="no texts yet: call start"):
        decoder.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch must be 1 or more, got 0"),
        ({"batch": 1.0}, TypeError, "batch must be a whole number, got float"),
        ({"max_len": 257}, ValueError, "capacity must be at most 256"),
        ({"max_len": 0}, ValueError, "capacity must be 1 or more"),
        ({"seed": -1}, ValueError, "seed must be from 0 to 4294967295, got -1"),
        ({"seed": 1.5}, TypeError, "seed must be a whole number, got float"),
        ({"settings": {"temperature": 1}}, TypeError, "settings must be SamplerSettings, got dict"),
        ({"adapters": "absent"}, ValueError, "no adapter 'absent' is loaded"),
        ({"settings": SamplerSettings(token_bias={512: 1.0})}, ValueError, "token_bias: token 512, expected 0 to 511"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        loaded("qwen2").decoder(**arguments)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([[1, 2]], ValueError, "prompts must be 2 rows of ids, one for each text of the decoder, got 1"),
        ([[1], [2], [3]], ValueError, "prompts must be 2 rows of ids, .*got 3"),
        ([1, 2], ValueError, "prompts must be 2 rows of ids, .*got 1"),
        (np.zeros((2, 9), np.int32), ValueError, "prompts: 9 tokens pass the decoder's max_len of 8"),
        ([[1], [2] * 9], ValueError, "prompts: 9 tokens pass"),
        ([[1], []], ValueError, "ids is empty"),
        ([[1], [512]], ValueError, "512 at .0, 0., expected 0 to 511"),
        ([[1], [0.5]], TypeError, "whole numbers"),
        ("ab", TypeError, "whole numbers"),
    ],
)
def test_wrong_prompts(prompts, error, message):
    decoder = loaded("qwen2").decoder(2, 8, settings=GREEDY)
    with pytest.raises(error, match=message):
        decoder.start(prompts)


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [(-1, ValueError, "0 or more, got -1"), (1.0, TypeError, "a whole number"), (True, TypeError, "bool")],
)
def test_wrong_numbers_of_steps(n, error, message):
    decoder = loaded("qwen2").decoder(max_len=8, settings=GREEDY)
    decoder.start([PROMPT])
    with pytest.raises(error, match=f"the number of steps must be .*{message}"):
        decoder.run(n)
    with pytest.raises(ValueError, match="4 more steps pass the decoder's max_len of 8: ask for at most 3"):
        list(decoder.stream(5))
    assert decoder.length == len(PROMPT) + 1


def test_logits_that_are_not_finite():
    model = load_model(folder_of("qwen2"), "numpy")
    decoder = model.decoder(max_len=20, settings=GREEDY)
    decoder.start([PROMPT])
    model.norm.weight = np.full_like(model.norm.weight, np.nan)
    assert decoder.step().tolist() == [-1]


def two_adapters(tmp_path, model):
    sizes = sizes_of("qwen2")
    for name, seed in (("x", 5), ("y", 6)):
        model.load_adapter(write(tmp_path / name, tensors_of(sizes, 4, seed, scale=0.5)), name)


def test_adapters(tmp_path):
    """Fixed when the decoder is made, also for each text; loading others changes nothing, and one that is gone is missed."""
    model = load_model(folder_of("qwen2"), "numpy")
    two_adapters(tmp_path, model)
    for adapters in ("x", {"x": 1, "y": 0.5}, None):
        expected = generate(model, PROMPT, max_new_tokens=6, settings=GREEDY, adapters=adapters).tokens
        assert rows_of(model.decoder(max_len=20, settings=GREEDY, adapters=adapters), PROMPT, 5) == [expected]
    choices = ["y", None, "x"]
    decoder = model.decoder(3, 20, settings=GREEDY, adapters=choices)
    found = rows_of(decoder, PROMPTS, 5)
    for row, (prompt, choice) in enumerate(zip(PROMPTS, choices, strict=True)):
        alone = model.decoder(max_len=20, settings=GREEDY, adapters=choice)
        assert rows_of(alone, prompt, 5) == [found[row]]
    model.load_adapter(tmp_path / "x", "z")
    assert rows_of(decoder, PROMPTS, 5) == found
    decoder.start(PROMPTS)
    model.unload_adapter("y")
    with pytest.raises(ValueError, match="no adapter 'y' is loaded"):
        decoder.step()


def test_prompts_longer_than_a_chunk(monkeypatch):
    model, prompt = loaded("qwen2"), list(range(50))
    expected = rows_of(model.decoder(max_len=60, settings=GREEDY), prompt, 5)
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 20)
    assert rows_of(model.decoder(max_len=60, settings=GREEDY), prompt, 5) == expected


CODES = [kind for kind in CACHE_KINDS if kind != "fp16"]


@pytest.mark.parametrize("kind", CODES)
def test_the_tokens_are_those_of_generate_for_every_cache(kind):
    model = loaded("qwen3")
    expected = generate(model, PROMPT, max_new_tokens=12, settings=SAMPLED, cache=kind).tokens
    decoder = model.decoder(max_len=len(PROMPT) + 11, settings=SAMPLED, cache=kind)
    assert rows_of(decoder, [PROMPT], 11) == [expected] and decoder._cache.kind == kind
    found = rows_of(model.decoder(3, 40, settings=SAMPLED, cache=kind), PROMPTS, 8)
    for row, prompt in enumerate(PROMPTS):
        assert rows_of(model.decoder(max_len=20, settings=SAMPLED, seed=SAMPLED.seed + row, cache=kind), prompt, 8) == [
            found[row]
        ]


def paged(model, batch, kind="fp16", pages=40, page_size=4, seed=3):
    """A paged cache whose pages are given out in no order."""
    cache = model.new_paged_cache(pages, batch, page_size=page_size, kind=kind)
    random.Random(seed).shuffle(cache._books.free)
    return cache


@pytest.mark.parametrize("kind", ["fp16", "q6"])
def test_pages_give_the_same_tokens(kind):
    model = loaded("qwen2")
    expected = rows_of(model.decoder(3, 40, settings=PENALISED, cache=kind), PROMPTS, 20)
    cache = paged(model, 3, kind)
    decoder = model.decoder(3, 40, settings=PENALISED, cache=cache)
    assert decoder.capacity == 40 and cache.free_pages == 10
    table = cache.block_table.copy()
    for _ in range(2):
        assert rows_of(decoder, PROMPTS, 20) == expected
    assert np.array_equal(cache.block_table, table) and decoder._cache is cache
    same = rows_of(decoder, [PROMPT] * 3, 8)
    assert same == rows_of(model.decoder(3, 40, settings=PENALISED, cache=kind), [PROMPT] * 3, 8)


def test_pages_that_texts_shared_become_their_own():
    model = loaded("qwen2")
    cache = paged(model, 2)
    model.forward(PROMPT, cache.row(0))
    cache.share(0, 1, 5)
    decoder = model.decoder(2, 20, settings=GREEDY, cache=cache)
    assert not set(cache.pages_of(0)) & set(cache.pages_of(1)) and cache.free_pages == 40 - 10
    assert rows_of(decoder, PROMPTS[:2], 10) == rows_of(model.decoder(2, 20, settings=GREEDY), PROMPTS[:2], 10)


def test_caches_a_decoder_cannot_take():
    model = loaded("qwen2")
    for cache in ("q5", None, model.new_cache(capacity=8)):
        with pytest.raises(ValueError, match="kind must be one of fp16, fp8, e4m3, q4, q6, q8, got"):
            model.decoder(max_len=8, cache=cache)
    with pytest.raises(ValueError, match="cache has 2 rows and ids 1"):
        model.decoder(cache=paged(model, 2))
    with pytest.raises(ValueError, match="cache is another model's"):
        model.decoder(cache=paged(loaded("qwen3"), 1))
    with pytest.raises(ValueError, match="out of pages: row 1 needs 10 more for 40 tokens, 2 of 12 are free"):
        model.decoder(2, 40, cache=paged(model, 2, pages=12))
    with pytest.raises(ValueError, match="tokens must be from 0 to 256, the cache's capacity, got 257"):
        model.decoder(max_len=257, cache=paged(model, 1, pages=100))
    with pytest.raises(UnsupportedError, match="multiple of 64, got 96"):
        narrow = copy.copy(model)
        narrow.config = dataclasses.replace(model.config, head_dim=96)
        narrow.decoder(cache="q8")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def state_of(decoder):
    """Everything a decoder has written: tokens, and the bits of its cache."""
    cache = decoder._cache
    parts = [*cache.k, *cache.v]
    if cache.holds_codes:
        parts = [array for part in parts for array in (part.codes, part.scales) if array is not None]
    return [host(decoder._sampler.tokens), *(host(array).view(np.uint8) for array in parts)]


def same_state(one, other):
    return all(np.array_equal(a, b) for a, b in zip(state_of(one), state_of(other), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_gives_the_bits_of_its_launches(cupy, name, batch):
    model, steps = on_gpu(name), 24
    prompts = PROMPTS[:batch]
    for settings in (GREEDY, PENALISED):
        eager = model.decoder(batch, 40, settings=settings, graph=False)
        graph = model.decoder(batch, 40, settings=settings)
        assert rows_of(graph, prompts, steps) == rows_of(eager, prompts, steps)
        assert graph._graph is not None and eager._graph is None
        assert same_state(graph, eager)
        assert rows_of(graph, prompts, steps) == rows_of(eager, prompts, steps)  # without a capture
        assert same_state(graph, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("name", ["shakespeare-exl2-4.0", "gemma2"])
def test_a_graph_gives_the_bits_of_its_launches_for_every_cache(cupy, name, kind):
    model, steps = on_gpu(name), 24
    for batch in (1, 3):
        eager = model.decoder(batch, 40, settings=SAMPLED, graph=False, cache=kind)
        graph = model.decoder(batch, 40, settings=SAMPLED, cache=kind)
        for _ in range(2):
            assert rows_of(graph, PROMPTS[:batch], steps) == rows_of(eager, PROMPTS[:batch], steps)
            assert same_state(graph, eager)
        assert graph._graph is not None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp16", "e4m3", "q4"])
def test_one_graph_serves_every_page(cupy, kind):
    """Pages in no order; then moved, under the graph that is there."""
    model, prompt = on_gpu("shakespeare-exl2-4.0"), np.random.default_rng(0).integers(0, 1000, 250)
    prompts = [prompt, prompt[:100], prompt[50:]]
    caches = [paged(model, 3, kind, pages=90, page_size=16, seed=seed) for seed in (1, 1, 2)]
    decoders = [
        model.decoder(3, 380, settings=SAMPLED, graph=graph, cache=cache)
        for graph, cache in zip((False, True, True), caches, strict=True)
    ]
    eager, graph, elsewhere = decoders
    expected = rows_of(eager, prompts, 130)
    assert rows_of(graph, prompts, 130) == expected and same_state(graph, eager)
    assert rows_of(elsewhere, prompts, 130) == expected
    captured, table = elsewhere._graph, host(caches[2].block_table)
    caches[2].defragment()
    assert not np.array_equal(host(caches[2].block_table), table)
    assert rows_of(elsewhere, prompts, 130) == expected and elsewhere._graph is captured


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["shakespeare", "shakespeare-exl2-4.0", "shakespeare-gptq-g32"])
def test_one_graph_serves_every_length(cupy, name):
    model = on_gpu(name)
    prompt = np.random.default_rng(0).integers(0, 1000, 250)
    eager = model.decoder(max_len=620, settings=SAMPLED, graph=False)
    graph = model.decoder(max_len=620, settings=SAMPLED)
    expected = rows_of(eager, [prompt], 370)
    assert rows_of(graph, [prompt], 370) == expected and same_state(graph, eager)
    captured, short = graph._graph, [PROMPT]
    assert rows_of(graph, short, 20) == rows_of(eager, short, 20) and graph._graph is captured


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
def test_the_tokens_are_those_of_one_forward_after_the_other(cupy, settings):
    """generate() draws by a decoder on a GPU; here as on NumPy, every token is waited for."""
    from cupyq.generate.generator import _forwarded

    for name in ("shakespeare-exl2-4.0", "gemma2"):
        model = on_gpu(name)
        expected = list(_forwarded(model, PROMPT, 40, settings, settings.seed, None))
        assert generate(model, PROMPT, max_new_tokens=40, settings=settings).tokens == expected


@pytest.mark.gpu
def test_a_stop_token_ends_what_is_drawn_ahead(cupy):
    model = on_gpu("shakespeare")
    tokens = generate(model, PROMPT, max_new_tokens=30, settings=SAMPLED).tokens
    stop = next(token for index, token in enumerate(tokens) if index >= 5 and token not in tokens[:index])
    seen = []
    result = generate(model, PROMPT, max_new_tokens=30, settings=SAMPLED, stop_ids=[stop], on_token=seen.append)
    assert result.tokens == seen == tokens[: tokens.index(stop)] and result.stopped_by == stop

    def interrupt(token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPT, max_new_tokens=30, settings=SAMPLED, on_token=interrupt)
    assert generate(model, PROMPT, max_new_tokens=30, settings=SAMPLED).tokens == tokens


@pytest.mark.gpu
def test_logits_that_are_not_finite_are_an_error_on_the_gpu(cupy, tmp_path):
    norm = {"model.norm.weight": np.full(192, np.nan, np.float16)}
    model = load_model(variant(tmp_path, "qwen2", tensors=norm), "cupy")
    with pytest.raises(ValueError, match="logits at position 4 are not finite"):
        generate(model, PROMPT, max_new_tokens=5, settings=GREEDY)
    decoder = model.decoder(max_len=20, settings=GREEDY)
    assert rows_of(decoder, PROMPT, 3) == [[-1] * 4]


@pytest.mark.gpu
def test_decoders_do_not_disturb_each_other(cupy):
    """Interleaved, with memory of the usual pool taken and overwritten in between, and one freed while the other lives."""
    names, count = ("shakespeare-exl2-4.0", "shakespeare-gptq-g32", "shakespeare-exl2-4.0"), 30
    settings = (SAMPLED, GREEDY, PENALISED)
    alone = [
        rows_of(on_gpu(name).decoder(max_len=60, settings=chosen, graph=False), [PROMPT], count)[0]
        for name, chosen in zip(names, settings, strict=True)
    ]
    decoders = [on_gpu(name).decoder(max_len=60, settings=chosen) for name, chosen in zip(names, settings, strict=True)]
    found = [[int(decoder.start([PROMPT])[0])] for decoder in decoders]
    for step in range(count):
        drawn = [decoder.step() for decoder in decoders]
        for size in (64, 1024, 1 << 16, 1 << 20):
            cupy.full(size, 0x7FC00000, np.int32)  # freed at once
        for tokens, row in zip(drawn, found, strict=False):
            row.append(int(tokens[0]))
        if step == count // 2:
            del decoders[-1], drawn, tokens
            gc.collect()
    assert found[:2] == alone[:2] and found[2] == alone[2][: len(found[2])] and len(found[2]) > count // 2


@pytest.mark.gpu
def test_tokens_are_ready_for_the_stream_of_the_caller(cupy):
    model = on_gpu("shakespeare")
    expected = rows_of(model.decoder(max_len=60, settings=SAMPLED, graph=False), [PROMPT], 30)[0]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        decoder = model.decoder(max_len=60, settings=SAMPLED)
        ids = cupy.asarray(np.array([PROMPT], np.int32))
        copies = [decoder.start(ids) + 0]
        ids.fill(0)
        copies += [decoder.step() + 0 for _ in range(30)]  # queued here, right behind each step
        stream.synchronize()
    assert [int(copy.get()[0]) for copy in copies] == expected
    tokens = [int(tokens[0]) for _ in range(2) for tokens in restarted(decoder)]
    assert tokens == expected + expected


def restarted(decoder):
    decoder.start([PROMPT])
    return decoder.stream(31)


@pytest.mark.gpu
def test_steps_take_no_more_memory(cupy):
    gc.collect()  # what other tests have left
    decoder = on_gpu("shakespeare-exl2-4.0").decoder(max_len=400, settings=PENALISED)
    decoder.start([PROMPT])
    decoder.run(380)
    own, shared = decoder._queue.pool, cupy.get_default_memory_pool()
    before = own.total_bytes(), own.used_bytes()
    for _ in range(3):
        decoder.start([PROMPT])
        used = shared.used_bytes()
        for _ in range(340):
            decoder.step()
        assert shared.used_bytes() <= used
        assert (own.total_bytes(), own.used_bytes()) == before


@pytest.mark.gpu
def test_adapters_on_the_gpu(tmp_path, cupy):
    model = load_model(folder_of("qwen2"), "cupy")
    two_adapters(tmp_path, model)
    choices = ["y", None, {"x": 1, "y": 0.5}]
    graph = model.decoder(3, 40, settings=GREEDY, adapters=choices)
    eager = model.decoder(3, 40, settings=GREEDY, adapters=choices, graph=False)
    expected = rows_of(eager, PROMPTS, 20)
    assert rows_of(graph, PROMPTS, 20) == expected and same_state(graph, eager)
    graph.start(PROMPTS)
    graph.run(3)
    model.load_adapter(tmp_path / "x", "z")  # moves the arrays of the others
    assert host(graph.run(17)).tolist() == [row[4:] for row in expected]
    model.unload_adapter("y")
    with pytest.raises(ValueError, match="no adapter 'y' is loaded"):
        graph.step()


@pytest.mark.gpu
def test_decoding_compiles_nothing_more(cupy, monkeypatch, tmp_path):
    from cupyq import _kernels

    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(tmp_path))
    model = load_model(folder_of("shakespeare-exl2-2.5"), "cupy")
    compiled = {path.name for path in tmp_path.iterdir()}
    _kernels.forget_loaded()  # what other tests have loaded does not count
    generate(model, PROMPT, max_new_tokens=600, settings=SAMPLED)
    rows_of(model.decoder(3, 300, settings=GREEDY), PROMPTS, 280)
    assert {path.name for path in tmp_path.iterdir()} == compiled
    # The kernels of other caches are compiled with the first of each kind.
    model.new_cache(capacity=8, kind="q6")
    with_codes = {path.name for path in tmp_path.iterdir()}
    assert with_codes > compiled
    generate(model, PROMPT, max_new_tokens=600, settings=SAMPLED, cache="q6")
    rows_of(model.decoder(3, 300, settings=GREEDY, cache="q6"), PROMPTS, 280)
    assert {path.name for path in tmp_path.iterdir()} == with_codes
