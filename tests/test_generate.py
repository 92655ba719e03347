"""Sampler settings, streaming text and the generation loop, with models small enough to follow by hand."""

import dataclasses
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from cupyq.errors import FormatError
from cupyq.generate import SamplerSettings, StreamDecoder, encode, generate, load_tokenizer
from cupyq.generate.text import with_special_tokens
from cupyq.models.sampler import Sampler
from cupyq.ops.penalties import penalize
from cupyq.ops.sampling import sample

MODELS = ROOT / "examples/models"


class FakeModel:
    """After token t at position p comes (3 t + p) mod vocab; `spread` of the logits left for the others."""

    xp = np
    backend = "numpy"

    def __init__(self, vocab_size=50, spread=None):
        self.config = SimpleNamespace(vocab_size=vocab_size, max_seq_len=64)
        self.spread = spread
        self.fed = []
        self.capacity = None

    def new_seed(self):
        return random.randrange(1 << 32)

    def new_cache(self, batch=1, capacity=None):
        assert batch == 1
        self.capacity = capacity
        return SimpleNamespace(length=0)

    def forward(self, ids, cache=None, *, last_only=False):
        assert ids.dtype == np.int32 and last_only
        self.fed.append(ids[0].tolist())
        cache.length += ids.shape[1]
        assert cache.length <= self.capacity
        logits = np.zeros((1, 1, self.config.vocab_size), np.float32)
        logits[0, 0, self.follower(int(ids[0, -1]), cache.length - 1)] = 30.0 if self.spread is None else self.spread
        return logits

    def follower(self, token, position):
        return (3 * token + position) % self.config.vocab_size

    def chain(self, prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.follower(tokens[-1], len(tokens) - 1))
        return tokens[len(prompt) :]


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_each_token_is_fed_back_once_and_the_prompt_in_one_piece():
    model = FakeModel()
    seen = []
    result = generate(model, [4, 7, 9], max_new_tokens=6, settings=SamplerSettings.greedy(), on_token=seen.append)
    expected = model.chain([4, 7, 9], 6)
    assert result.tokens == seen == expected
    assert model.fed == [[4, 7, 9], *([token] for token in expected[:-1])]
    assert model.capacity == 3 + 6 - 1
    assert result.prompt_tokens == [4, 7, 9] and result.stopped_by is None and result.steps == 6
    assert result.prefill_tokens_per_s > 0 and result.decode_tokens_per_s > 0


def test_one_token_has_no_decode_speed():
    result = generate(FakeModel(), [1], max_new_tokens=1, settings=SamplerSettings.greedy())
    assert len(result.tokens) == 1 and result.decode_tokens_per_s is None


def test_a_stop_token_ends_the_generation_and_is_left_out():
    model = FakeModel()
    chain = model.chain([4, 7, 9], 6)
    stop = chain[3]
    assert stop not in chain[:3]
    seen = []
    result = generate(
        model, [4, 7, 9], max_new_tokens=6, settings=SamplerSettings.greedy(), stop_ids=(stop, 49), on_token=seen.append
    )
    assert result.tokens == seen == chain[:3]
    assert result.stopped_by == stop and result.steps == 4


def test_the_seed_decides_and_none_draws_a_new_one():
    def run(seed):
        return generate(FakeModel(spread=1.0), [5], max_new_tokens=40, settings=SamplerSettings(1.0, 0, 1.0, seed=seed))

    assert run(7).tokens == run(7).tokens
    assert run(7).tokens != run(8).tokens
    free = run(None)
    assert run(free.seed).tokens == free.tokens
    assert run(None).seed != free.seed
    assert len(set(free.tokens)) > 5  # every step draws anew


def test_prompts_of_every_integer_kind_are_taken():
    expected = FakeModel().chain([4, 7], 3)
    for prompt in ([4, 7], (4, 7), np.array([4, 7]), np.array([4, 7], np.uint8), [np.int64(4), np.int64(7)]):
        assert generate(FakeModel(), prompt, max_new_tokens=3, settings=SamplerSettings.greedy()).tokens == expected


def test_numbers_of_every_integer_kind_are_taken():
    kinds = {"top_k": 5, "seed": 7, "repetition_range": -1, "repetition_decay": 2, "dry_range": 3}
    options = {"repetition_penalty": 1.5, "dry_multiplier": 1.0}
    expected = generate(FakeModel(spread=1.0), [4], max_new_tokens=9, settings=SamplerSettings(**kinds, **options)).tokens
    for kind in (np.int64, np.int8):
        settings = SamplerSettings(**{name: kind(value) for name, value in kinds.items()}, **options)
        assert generate(FakeModel(spread=1.0), [4], max_new_tokens=kind(9), settings=settings).tokens == expected


@pytest.mark.parametrize(
    ("prompt", "new", "error", "says"),
    [
        ([], 4, ValueError, "prompt_ids is empty"),
        ([1, 50], 4, ValueError, r"token 50 at position 1, expected 0 to 49"),
        ([-1], 4, ValueError, r"token -1 at position 0"),
        ([1.5], 4, TypeError, "whole numbers"),
        ([[1, 2]], 4, TypeError, r"got \[1, 2\] at position 0"),
        (np.ones((1, 2), int), 4, TypeError, "shape"),
        (["a"], 4, TypeError, "whole numbers"),
        ([True], 4, TypeError, "whole numbers"),
        ([1] * 65, 1, ValueError, "65 tokens, the model's context 64"),
        ([1] * 60, 6, ValueError, "at most 5 new tokens"),
        ([1], 0, ValueError, "max_new_tokens"),
        ([1], 2.5, TypeError, "max_new_tokens must be a whole number, got float"),
    ],
)
def test_wrong_calls_say_what_is_wrong(prompt, new, error, says):
    model = FakeModel()
    with pytest.raises(error, match=says) as caught:
        generate(model, prompt, max_new_tokens=new)
    assert "\n" not in str(caught.value)
    assert model.fed == []


def test_the_context_can_be_filled_to_the_last_place():
    assert len(generate(FakeModel(), [1] * 64, max_new_tokens=1).tokens) == 1
    assert len(generate(FakeModel(), [1] * 60, max_new_tokens=5).tokens) == 5


def test_logits_without_a_number_are_an_error_not_a_token():
    class Broken(FakeModel):
        def forward(self, ids, cache=None, *, last_only=False):
            logits = super().forward(ids, cache, last_only=last_only)
            return logits if cache.length < 4 else np.full_like(logits, np.nan)

    seen = []
    with pytest.raises(ValueError, match="logits at position 3 are not finite"):
        generate(Broken(), [1, 2], max_new_tokens=5, settings=SamplerSettings.greedy(), on_token=seen.append)
    assert len(seen) == 2


def test_the_kind_of_the_cache_reaches_the_model():
    class Keeper(FakeModel):
        def new_cache(self, batch=1, capacity=None, kind="fp16"):
            kinds.append(kind)
            return super().new_cache(batch, capacity)

    kinds = []
    for kind in ("fp16", "q4"):
        generate(Keeper(), [1], max_new_tokens=2, settings=SamplerSettings.greedy(), cache=kind)
    assert kinds == ["fp16", "q4"]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_exllamav2():
    settings = SamplerSettings()
    assert dataclasses.astuple(settings)[:5] == (0.8, 50, 0.8, 0.0, None)
    assert not settings.looks_back and not settings.token_bias and not settings.temperature_last
    off = ("smoothing_factor", "top_a", "tfs", "typical", "mirostat_tau", "max_temp", "xtc_probability", "skew")
    assert [name for name in off if getattr(settings, name) != 0] == []
    assert SamplerSettings.greedy().is_greedy and not SamplerSettings().is_greedy
    assert SamplerSettings(temperature=0).is_greedy and SamplerSettings(top_k=1).is_greedy


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", "1", TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 1.0, TypeError),
        ("top_k", True, TypeError),
        ("top_p", 1.01, ValueError),
        ("top_p", 0, ValueError),
        ("top_k", 1 << 31, ValueError),
        ("min_p", 2, ValueError),
        ("min_p", None, TypeError),
        ("seed", -1, ValueError),
        ("seed", 1 << 32, ValueError),
        ("seed", 0.5, TypeError),
        ("repetition_penalty", 0, ValueError),
        ("frequency_penalty", float("inf"), ValueError),
        ("presence_penalty", "1", TypeError),
        ("repetition_range", -2, ValueError),
        ("repetition_decay", 1.5, TypeError),
        ("dry_multiplier", -1, ValueError),
        ("dry_base", 0.5, ValueError),
        ("dry_allowed_length", 0, ValueError),
        ("dry_max_ngram", 0, ValueError),
        ("dry_range", -1, ValueError),
        ("dry_breakers", (3, -1), ValueError),
        ("dry_breakers", ["x"], ValueError),
        ("token_bias", [1], TypeError),
        ("token_bias", {1: float("nan")}, ValueError),
        ("token_bias", {1: float("inf")}, ValueError),
        ("token_bias", {1: "x"}, ValueError),
        ("token_bias", {-1: 0.5}, ValueError),
        ("smoothing_factor", -1, ValueError),
        ("top_a", -0.5, ValueError),
        ("tfs", 1.5, ValueError),
        ("typical", float("nan"), ValueError),
        ("mirostat_tau", -1, ValueError),
        ("mirostat_eta", None, TypeError),
        ("min_temp", -1, ValueError),
        ("max_temp", 1e7, ValueError),
        ("temp_exponent", -1, ValueError),
        ("temperature_last", 1, TypeError),
        ("xtc_probability", 1.5, ValueError),
        ("xtc_threshold", -1, ValueError),
        ("xtc_protected", (True,), ValueError),
        ("skew", 101, ValueError),
    ],
)
def test_settings_out_of_range_are_refused(name, value, error):
    with pytest.raises(error, match=f"^{name} must (be|hold|add)"):
        SamplerSettings(**{name: value})


EVERYTHING = SamplerSettings(
    temperature=1.5,
    top_k=40,
    top_p=0.99,
    seed=5,
    repetition_penalty=1.2,
    frequency_penalty=0.05,
    presence_penalty=0.1,
    repetition_range=20,
    repetition_decay=10,
    dry_multiplier=0.5,
    dry_allowed_length=1,
    dry_breakers=(3, 4),
    token_bias={7: 1.0, 9: float("-inf")},
    smoothing_factor=0.3,
    top_a=0.01,
    tfs=0.99,
    typical=0.97,
    mirostat_tau=4.0,
    mirostat_eta=0.2,
    max_temp=2.0,
    xtc_probability=0.5,
    xtc_threshold=0.05,
    xtc_protected=(2,),
    skew=0.1,
)


def by_hand(model, prompt, count):
    """EVERYTHING, by calls of the two ops, with a history that starts anew at every step."""
    tokens, cache, mu = list(prompt), model.new_cache(capacity=64), np.float32([8.0])
    breakers, protected = np.zeros(50, bool), np.zeros(50, bool)
    breakers[[3, 4]], protected[2] = True, True
    for step in range(count):
        ids = np.array([tokens if step == 0 else tokens[-1:]], np.int32)
        logits = penalize(
            model.forward(ids, cache, last_only=True)[:, -1],
            np.array([tokens]),
            repetition=1.2,
            frequency=0.05,
            presence=0.1,
            sustain=20,
            decay=10,
            dry_multiplier=0.5,
            dry_allowed_length=1,
            dry_breakers=breakers,
            bias=np.where(np.arange(50) == 7, 1, np.where(np.arange(50) == 9, -np.inf, 0)).astype(np.float32),
        )
        names = ("top_k", "top_p", "top_a", "tfs", "typical", "mirostat_tau", "mirostat_eta", "max_temp", "xtc_probability")
        settings = {name: getattr(EVERYTHING, name) for name in (*names, "xtc_threshold", "skew", "temperature", "seed")}
        tokens += sample(logits, **settings, smoothing=0.3, step=step, mirostat_mu=mu, xtc_mask=~protected).tolist()
    return tokens[len(prompt) :]


def test_every_setting_reaches_the_ops():
    class Noisy(FakeModel):
        def forward(self, ids, cache=None, *, last_only=False):
            logits = super().forward(ids, cache, last_only=last_only)
            return logits + np.random.default_rng(cache.length).normal(0, 1, logits.shape).astype(np.float32)

    prompt = [4, 7, 9, 4, 7]
    expected = by_hand(Noisy(spread=2.0), prompt, 40)
    assert len(set(expected)) > 8 and 9 not in expected
    assert generate(Noisy(spread=2.0), prompt, max_new_tokens=40, settings=EVERYTHING).tokens == expected
    changes = {"dry_multiplier": 9.0, "presence_penalty": 1.0, "token_bias": {}, "repetition_range": 2, "skew": 0.5}
    changes |= {"mirostat_eta": 0.5, "xtc_protected": (), "smoothing_factor": 0.5, "max_temp": 1.1, "typical": 0.8}
    for name, value in changes.items():
        other = dataclasses.replace(EVERYTHING, **{name: value})
        assert generate(Noisy(spread=2.0), prompt, max_new_tokens=40, settings=other).tokens != expected, name


def drawer(settings, xp, vocab_size, prompt, seed):
    """A Sampler that has begun with a prompt."""
    sampler = Sampler(settings, xp, vocab_size, capacity=60, seed=seed)
    sampler.start([prompt])
    return sampler


def test_the_temperature_can_come_last():
    row = np.log(np.float32([[0.5, 0.3, 0.15, 0.05]]))
    for last, kept in [(False, {0, 1, 2}), (True, {0, 1})]:  # after the temperature, top-p needs three tokens
        settings = SamplerSettings(temperature=3.0, top_k=0, top_p=0.75, temperature_last=last)
        draws = {int(drawer(settings, np, 4, [0], seed).draw(row.copy())[0]) for seed in range(200)}
        assert draws == kept
    assert drawer(SamplerSettings(temperature=0, temperature_last=True), np, 4, [0], 1).draw(row)[0] == 0


def test_greedy_text_can_be_kept_from_repeating():
    class Stuck(FakeModel):
        def follower(self, token, position):
            return 8

    run = generate(Stuck(spread=2.0), [1], max_new_tokens=5, settings=SamplerSettings.greedy())
    assert run.tokens == [8] * 5
    settings = dataclasses.replace(SamplerSettings.greedy(), presence_penalty=3.0)
    run = generate(Stuck(spread=2.0), [1], max_new_tokens=4, settings=settings)
    assert run.tokens == [8, 0, 2, 3]  # 1 was said by the prompt
    settings = dataclasses.replace(SamplerSettings.greedy(), token_bias={8: float("-inf"), 30: 0.5})
    assert generate(Stuck(spread=2.0), [1], max_new_tokens=3, settings=settings).tokens == [30] * 3


@pytest.mark.parametrize("name", ["token_bias", "dry_breakers", "xtc_protected"])
def test_ids_beyond_the_vocabulary_are_refused(name):
    settings = SamplerSettings(dry_multiplier=1.0, xtc_probability=1.0, **{name: {50: 1.0} if name == "token_bias" else (50,)})
    with pytest.raises(ValueError, match=f"{name}: token 50, expected 0 to 49"):
        generate(FakeModel(), [1], max_new_tokens=8, settings=settings)


def test_breakers_and_protected_tokens_come_from_the_tokenizer(byte_level):
    given = SamplerSettings(dry_multiplier=1.0, xtc_probability=0.5)
    settings = with_special_tokens(given, byte_level)
    special = [index for index, token in byte_level.get_added_tokens_decoder().items() if token.special]
    (newline,), (comma,), (letter,) = (encode(byte_level, text, special=False) for text in ("\n", ",", "x"))
    assert {newline, comma, *special} <= set(settings.dry_breakers) and letter not in settings.dry_breakers
    assert {newline, *special} <= set(settings.xtc_protected) and not {comma, letter} & set(settings.xtc_protected)
    own = dataclasses.replace(given, dry_breakers=(5,), xtc_protected=(6,))
    assert with_special_tokens(own, byte_level) == own
    assert with_special_tokens(SamplerSettings(), byte_level) == SamplerSettings()


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level():
    """Byte-level BPE trained on English: other scripts come out as one token per byte."""
    return load_tokenizer(MODELS / "shakespeare")


@pytest.fixture(scope="module")
def byte_fallback():
    """As sentencepiece makes them: word starts are spaces, the decoder strips the first one, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", "▁", "▁to", "▁be", "x", "。"]
    vocab = {word: index for index, word in enumerate(words)} | {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces(tokenizer, ids, prompt=()):
    decoder = StreamDecoder(tokenizer, prompt)
    return [decoder.add(token) for token in ids] + [decoder.finish()]


def test_a_character_comes_whole_with_its_last_byte(byte_level):
    text = "né 😀漢"
    ids = encode(byte_level, text)
    assert len(ids) == len(text.encode())  # one token per byte, so every split is possible
    assert pieces(byte_level, ids) == ["n", "", "é", " ", "", "", "", "😀", "", "", "漢", ""]


def test_byte_fallback_runs_come_whole_too(byte_fallback):
    characters = "漢字😀é" * 12
    ids = [2, *(6 + byte for byte in characters.encode()), 3, 4]
    result = pieces(byte_fallback, ids)
    assert "".join(result) == f"to{characters} bex"
    assert not any("\ufffd" in piece for piece in result)
    assert [len(piece) for piece in result[1:-3]] == [i for c in characters for i in [0] * (len(c.encode()) - 1) + [1]]


def test_pieces_join_to_the_whole_text(byte_level, byte_fallback):
    random = np.random.default_rng(1)
    for trial in range(300):
        words = random.choice(["a", "é", "😀", "漢", " ", "\n", "the ", "z\u0308", "👨\u200d👩"], random.integers(1, 80))
        for tokenizer, ids in (
            (byte_level, encode(byte_level, "".join(words))),
            (byte_level, random.integers(0, 1024, 100)),  # no text: invalid bytes, too
            (byte_fallback, [t for w in words for t in ([2] if w.isascii() else [6 + b for b in w.encode()])]),
        ):
            ids = [int(token) for token in ids]
            assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids), trial
            cut = int(random.integers(0, len(ids)))
            before = tokenizer.decode(ids[:cut])
            if before and "\ufffd" not in before:
                assert before + "".join(pieces(tokenizer, ids[cut:], ids[:cut])) == tokenizer.decode(ids), trial


def test_a_copy_goes_on_by_itself(byte_level):
    ids = encode(byte_level, "né 😀漢 and on " * 9)  # longer than a window
    whole = pieces(byte_level, ids)
    decoder = StreamDecoder(byte_level)
    for at, token in enumerate(ids):
        before = decoder.copy()
        assert decoder.add(token) == whole[at]
        for other in (0, *ids[:3]):
            before.add(other)
    assert decoder.finish() == whole[-1]
    for cut in (1, 5, len(ids) - 1):
        decoder = StreamDecoder(byte_level)
        for token in ids[:cut]:
            decoder.add(token)
        twin = decoder.copy()
        for text in (decoder, twin):
            assert [*(text.add(token) for token in ids[cut:]), text.finish()] == whole[cut:]


def test_the_space_after_the_prompt_is_kept(byte_fallback):
    assert "".join(pieces(byte_fallback, [3, 2])) == "be to"
    assert "".join(pieces(byte_fallback, [3, 2], prompt=[2])) == " be to"


def test_bytes_that_never_become_a_character_are_shown_in_the_end(byte_level):
    start = encode(byte_level, "😀")[0]
    assert pieces(byte_level, [start]) == ["", "\ufffd"]
    assert "".join(pieces(byte_level, [start] * 100)) == "\ufffd" * 100


def test_special_tokens_are_not_shown(byte_level):
    assert "".join(pieces(byte_level, [0, *encode(byte_level, "word"), 1])) == "word"


def test_a_step_decodes_a_short_window_only(byte_level):
    class Counting:
        longest = 0

        def decode(self, ids, **options):
            self.longest = max(self.longest, len(ids))
            return byte_level.decode(ids, **options)

    for ids in (encode(byte_level, "To be, or not to be. " * 40), encode(byte_level, "漢" * 200), [129] * 300, [0] * 300):
        counting = Counting()
        decoder = StreamDecoder(counting)
        for token in ids:
            decoder.add(token)
        assert counting.longest <= 32


def test_a_missing_tokenizer_names_file_and_mend(tmp_path):
    with pytest.raises(FormatError, match=r"tokenizer\.json: missing; copy it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(FormatError, match=r"tokenizer\.json: not a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


# --- the shipped models -----------------------------------------------------------------------------------------------


def continues_greedily(name, backend):
    from cupyq.models.loader import load_model

    golden = json.loads((MODELS / name / "greedy.json").read_text())
    model = load_model(MODELS / name, backend=backend)
    count = len(golden["greedy"])
    result = generate(model, golden["prompt"], max_new_tokens=count, settings=SamplerSettings.greedy())
    assert result.tokens == golden["greedy"]
    return golden, result


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare-gptq-g32"])
def test_greedy_continuation(name):
    continues_greedily(name, "numpy")


def test_greedy_text_of_the_recorded_run(byte_level):
    golden = json.loads((MODELS / "shakespeare/greedy.json").read_text())
    assert "".join(pieces(byte_level, golden["prompt"] + golden["greedy"])) == golden["text"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["shakespeare", "shakespeare-gptq-g32"])
def test_greedy_continuation_on_the_gpu(name):
    _, first = continues_greedily(name, "cupy")
    _, again = continues_greedily(name, "cupy")
    assert first.tokens == again.tokens


@pytest.mark.gpu
def test_sampled_tokens_repeat_on_the_gpu():
    from cupyq.models.loader import load_model

    model = load_model(MODELS / "shakespeare-exl2-4.0", backend="cupy")
    runs = [generate(model, [32, 200, 200], max_new_tokens=64, settings=SamplerSettings(seed=11)).tokens for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0]) > 0


@pytest.mark.gpu
def test_every_setting_works_on_the_gpu(cupy):
    """The same logits give the same tokens: what is drawn on the GPU is what NumPy draws."""
    random = np.random.default_rng(6)
    logits = random.normal(0, 2, (30, 1, 50)).astype(np.float32)
    drawn = []
    for xp in (np, cupy):
        sampler = drawer(EVERYTHING, xp, 50, [4, 7, 9, 4, 7], 3)
        drawn.append([int(sampler.draw(xp.array(row))[0]) for row in logits])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 8
