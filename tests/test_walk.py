"""quantize/walk.py: a model a layer at a time computes what the whole model does, and shows what its linear layers read."""

import gc
import json
import shutil
import weakref

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from kernel_checks import host, same_bits
from safetensors.numpy import save_file

from cupyq.errors import FormatError, UnsupportedError
from cupyq.formats.safetensors import SafetensorsFile
from cupyq.layers import Linear, MoE, Step
from cupyq.models import load_model
from cupyq.models.loader import Blueprint
from cupyq.quantize.recording import layer_inputs
from cupyq.quantize.walk import LayerWalk, replace

ARCH, EXAMPLES = ROOT / "tests/models", ROOT / "examples/models"
ARCHITECTURES = ["llama3-rope", "qwen2", "qwen3", "mixtral", "gemma2"]
QUANTIZED = ["shakespeare-exl2-2.5", "shakespeare-gptq-g32"]


def folder_of(name):
    return ARCH / name if name in ARCHITECTURES else EXAMPLES / name


@pytest.fixture
def folder(request, tmp_path):
    """Of a model by its name; "mistral" is the Llama with that name and a window."""
    if request.param != "mistral":
        return folder_of(request.param)
    data = json.loads((folder_of("llama3-rope") / "config.json").read_text())
    data |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 24}
    (tmp_path / "config.json").write_text(json.dumps(data))
    shutil.copy(folder_of("llama3-rope") / "model.safetensors", tmp_path)
    return tmp_path


def ids_of(folder, rows=3, length=36):
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(3).integers(0, vocab, (rows, length)).astype(np.int32)


def whole_model(model, ids, at_once):
    """Model.hidden and its logits, of batches of so many rows."""
    hidden, logits = [], []
    for begin in range(0, len(ids), at_once):
        part = model.checked_ids(ids[begin : begin + at_once])
        step = Step(model.sin, model.cos, model.xp.zeros(len(part), np.int32))
        hidden.append(model.hidden(part, step))
        logits.append(host(model.logits(hidden[-1], step)))
    return np.concatenate([host(batch) for batch in hidden]), np.concatenate(logits)


def walk_through(walk, hidden):
    for _, layer in walk.layers():
        walk.run(layer, hidden)
    return hidden


def check_walk(folder, ids, backend, **options):
    """The walk against the whole model, bit for bit: hidden states and logits, with 2 rows at a time."""
    length = ids.shape[1]
    expected = whole_model(load_model(folder, backend, **options), ids, 2)
    with LayerWalk(folder, backend, batch_tokens=3 * length - 1, **options) as walk:
        start = walk.embed(ids)
        assert start.dtype == np.float32 and start.shape == (*ids.shape, walk.config.hidden_size)
        on_host = walk.embed(ids, on_host=True)
        assert isinstance(on_host, np.ndarray) and same_bits(on_host, host(start))
        hidden = walk_through(walk, start)
        assert hidden is start and type(hidden) is walk.xp.ndarray
        assert same_bits(host(hidden), expected[0]), folder.name
        assert walk.xp is np or same_bits(walk_through(walk, on_host), expected[0])
        head = walk.head()
        logits = [head.logits(batch, walk.step(len(batch))) for _, batch in walk.batches(hidden)]
        assert [len(batch) for batch in logits] == [2, 1]
        assert same_bits(np.concatenate([host(batch) for batch in logits]), expected[1])


@pytest.mark.parametrize("folder", [*ARCHITECTURES, "mistral", "shakespeare", *QUANTIZED], indirect=True)
def test_hidden_states_are_the_models(folder):
    check_walk(folder, ids_of(folder), "numpy")


def test_hidden_states_of_16_bits():
    check_walk(folder_of("gemma2"), ids_of(folder_of("gemma2")), "numpy", dtype="bfloat16")


def test_a_layer_left_out_would_be_seen():
    """So would weights of another layer."""
    folder = folder_of("llama3-rope")
    ids = ids_of(folder)
    expected, _ = whole_model(load_model(folder, "numpy"), ids, 2)
    with LayerWalk(folder, "numpy", batch_tokens=72) as walk:
        for order in ([0, 1], [0, 2, 1], [0, 1, 2]):
            hidden = walk.embed(ids)
            for index in order:
                walk.run(next(walk.layers(index))[1], hidden)
            assert same_bits(hidden, expected) == (order == [0, 1, 2])


def test_golden_logits():
    """Recorded from transformers, without this project's code."""
    for name in ARCHITECTURES:
        file = SafetensorsFile(folder_of(name) / "golden.safetensors")
        with LayerWalk(folder_of(name), "numpy") as walk:
            hidden = walk_through(walk, walk.embed(file.array("input_ids")[:1]))
            logits = walk.head().logits(hidden, walk.step(1))
        assert np.abs(logits - file.array("logits")[:1]).max() <= 1e-3, name


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3-rope", "mixtral"])
def test_one_layer_is_in_memory_at_a_time(monkeypatch, name):
    """Also while the caller still holds the layer before, and what it reads."""
    alive, real, counts = [], Blueprint.layer, []

    def layer(blueprint, index):
        gc.collect()
        counts.append(sum(weight() is not None for weight in alive))
        assert all(part.value is None for part in blueprint.plan.parts)
        return real(blueprint, index)

    monkeypatch.setattr(Blueprint, "layer", layer)
    with LayerWalk(folder_of(name), "numpy") as walk:
        hidden = walk.embed(ids_of(folder_of(name)))
        for _, held in walk.layers():
            inputs = layer_inputs(held)
            walk.record(held, hidden, {read.name: lambda x: None for read in inputs})
            walk.run(held, hidden)
            weights = [linear.weight for linear in held.linears()]
            assert len(weights) >= 7 and all(weight.dtype == np.float32 for weight in weights)
            alive += [weakref.ref(weight) for weight in weights]
            del weights
        assert inputs[0].linears[0].weight is None
        with pytest.raises(ValueError, match="layer has lost its weights, as the walk went on to the next one"):
            walk.run(held, hidden)
    assert counts == [0] * len(walk)


def test_only_asked_for_parts_are_read(monkeypatch):
    read = []
    real = Blueprint.load

    def load(blueprint, parts=None):
        read.append([part.key for part in parts])
        real(blueprint, parts)

    monkeypatch.setattr(Blueprint, "load", load)
    for name, head in {"qwen2": ["model.norm", "lm_head"], "qwen3": ["model.embed_tokens.weight", "model.norm"]}.items():
        read.clear()
        with LayerWalk(folder_of(name), "numpy") as walk:
            assert walk.shapes() and not read
            walk.embed(ids_of(folder_of(name)))
            assert read.pop() == ["model.embed_tokens.weight"]
            assert next(walk.layers(1))[0] == 1
            assert read[0] and all(key.startswith("model.layers.1.") for key in read.pop())
            walk.head()
            assert read.pop() == head and not read


def test_files_are_closed():
    with LayerWalk(folder_of("qwen2"), "numpy") as walk:
        hidden = walk.embed(ids_of(folder_of("qwen2")))
    with pytest.raises(ValueError, match="the file was closed"):
        next(walk.layers())
    assert np.isfinite(hidden).all()


# --- what linear layers read ------------------------------------------------------------------------------------------


def listened(monkeypatch):
    """{name: inputs} of every Linear called from now on, in the order of the calls."""
    calls = {}
    real = Linear.__call__

    def call(self, x, *arguments, **options):
        calls.setdefault(self.name, []).append(np.array(host(x)))
        return real(self, x, *arguments, **options)

    monkeypatch.setattr(Linear, "__call__", call)
    return calls


def collect(recorded):
    return {name: np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs]) for name, inputs in recorded.items()}


@pytest.mark.parametrize("folder", [*ARCHITECTURES, "mistral"], indirect=True)
def test_inputs_are_what_every_linear_reads(monkeypatch, folder):
    ids = ids_of(folder)
    recorded, sharing, order = {}, {}, []
    with LayerWalk(folder, "numpy", batch_tokens=72) as walk:
        hidden = walk.embed(ids)
        for _, layer in walk.layers():
            inputs = layer_inputs(layer)
            own = layer.linears()
            assert [linear for read in inputs for linear in read.linears] == own
            assert {name: walk.shapes()[name] for name in (linear.name for linear in own)} == {
                linear.name: (linear.k, linear.n) for linear in own
            }
            sharing |= {linear.name: read.name for read in inputs for linear in read.linears}
            before = hidden.copy()

            def feed(name):
                def take(x):
                    order.append(name)
                    assert x.ndim == 2 and x.dtype == np.float32 and len(x)
                    recorded.setdefault(name, []).append(x.copy())

                return take

            tokens = walk.record(layer, hidden, {read.name: feed(read.name) for read in inputs})
            assert same_bits(hidden, before)
            assert tokens == {name: sum(map(len, recorded[name])) for name in tokens} and len(tokens) == len(inputs)
            ordered = [read.name for read in inputs]
            assert order[: len(ordered)] == ordered or isinstance(layer.mlp, MoE)
            assert np.count_nonzero(np.diff([ordered.index(name) for name in order]) <= 0) == 1  # two batches
            order.clear()
            assert all(type(linear) is Linear for linear in layer.linears()) and layer.linears() == own
            walk.run(layer, hidden)
        assert list(walk.shapes()) == [*sharing, "lm_head"]

    calls = listened(monkeypatch)
    whole_model(load_model(folder, "numpy"), ids, 2)
    calls, recorded = collect(calls), collect(recorded)
    for name, source in sharing.items():
        assert same_bits(calls[name], recorded[source]), name
    assert len(set(sharing.values())) < len(sharing)


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def record_all(walk, layer, hidden):
    """(tokens of each input, {name: x})"""
    recorded = {}
    tokens = walk.record(layer, hidden, {read.name: recorded.setdefault(read.name, []).append for read in layer_inputs(layer)})
    return tokens, {name: np.concatenate([host(x) for x in inputs]) for name, inputs in recorded.items() if inputs}


def test_inputs_by_plain_arithmetic():
    """Of the first layer of Qwen2, in float64, from the tensors of its file; attention itself is left out."""
    folder = folder_of("qwen2")
    file = SafetensorsFile(folder / "model.safetensors")
    ids = ids_of(folder)
    with LayerWalk(folder, "numpy") as walk:
        eps = walk.config.rms_norm_eps
        hidden = walk.embed(ids)
        layer = next(walk.layers())[1]
        tokens, found = record_all(walk, layer, hidden)
    key = "model.layers.0."

    def tensor(name):
        return file.array(f"{key}{name}").astype(np.float64)

    x = file.array("model.embed_tokens.weight")[ids.reshape(-1)].astype(np.float64)
    normed = rms(x, tensor("input_layernorm.weight"), eps)
    assert np.abs(found[f"{key}self_attn.q_proj"] - normed).max() < 1e-5
    x += found[f"{key}self_attn.o_proj"] @ tensor("self_attn.o_proj.weight").T
    normed = rms(x, tensor("post_attention_layernorm.weight"), eps)
    assert np.abs(found[f"{key}mlp.gate_proj"] - normed).max() < 1e-4
    gate, up = normed @ tensor("mlp.gate_proj.weight").T, normed @ tensor("mlp.up_proj.weight").T
    assert np.abs(found[f"{key}mlp.down_proj"] - gate / (1 + np.exp(-gate)) * up).max() < 1e-3
    # The first token of each row attends to itself alone: what o reads is v.
    v = (rms(x := hidden[:, 0].astype(np.float64), tensor("input_layernorm.weight"), eps)) @ tensor("self_attn.v_proj.weight").T
    v = np.repeat((v + tensor("self_attn.v_proj.bias")).reshape(len(ids), 1, 64), 3, axis=1).reshape(len(ids), -1)
    assert np.abs(found[f"{key}self_attn.o_proj"].reshape(*ids.shape, -1)[:, 0] - v).max() < 1e-4
    assert set(tokens.values()) == {ids.size}


def test_experts_get_their_rows_alone():
    folder = folder_of("mixtral")
    with LayerWalk(folder, "numpy", batch_tokens=72) as walk:
        ids = ids_of(folder)
        layer = next(walk.layers())[1]
        check_experts(walk, layer, walk.embed(ids), ids.size)


def check_experts(walk, layer, hidden, count):
    """Expert by expert, the rows whose router logits are among the two largest, found by plain arithmetic."""
    key = "model.layers.0.block_sparse_moe"
    read = []
    watched = layer.mlp

    class Listening:
        def __call__(self, x, adapters=None, *, norm=None, residual=None, workspace=None):
            if norm is not None:
                x = rms(host(x).astype(np.float64), host(norm.weight).astype(np.float64), norm.eps)
            read.append(np.array(host(x), np.float64).reshape(-1, walk.config.hidden_size))
            return residual

    layer.mlp = Listening()
    with_rest = hidden.copy()
    for begin in range(0, len(hidden), 2):
        layer(with_rest[begin : begin + 2], walk.step(len(hidden[begin : begin + 2])), walk.dtype)
    layer.mlp = watched
    x = np.concatenate(read)
    logits = x @ host(layer.mlp.router.weight).astype(np.float64).T
    tokens, found = record_all(walk, layer, hidden)
    largest = np.argsort(-logits, axis=1)[:, :2]
    assert len({tokens[f"{key}.experts.{e}.w1"] for e in range(4)}) > 1
    for expert in range(4):
        own = x[(largest == expert).any(axis=1)]
        name = f"{key}.experts.{expert}.w1"
        assert 0 < len(own) < count and tokens[name] == tokens[f"{key}.experts.{expert}.w2"] == len(own)
        assert np.abs(found[name] - own).max() < (1e-4 if walk.xp is np else 2e-2)
    assert sum(tokens[f"{key}.experts.{expert}.w2"] for expert in range(4)) == 2 * count


def test_an_expert_without_rows():
    folder = folder_of("mixtral")
    with LayerWalk(folder, "numpy") as walk:
        check_idle_experts(walk, walk.embed(ids_of(folder)))


def check_idle_experts(walk, hidden):
    """All router logits equal: the first two experts get every row."""
    layer = next(walk.layers())[1]
    layer.mlp.router.weight = walk.xp.zeros_like(layer.mlp.router.weight)
    tokens, found = record_all(walk, layer, hidden)
    count = hidden.shape[0] * hidden.shape[1]
    for expert in range(4):
        for short in ("w1", "w2"):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{short}"
            assert tokens[name] == (count if expert < 2 else 0)
            assert (name in found) == (expert < 2)
    assert walk.run(layer, hidden, {name: lambda x: 1 / 0}) == {name: 0}


def test_nothing_is_computed_behind_the_last_feed(monkeypatch):
    folder = folder_of("llama3-rope")
    with LayerWalk(folder, "numpy", batch_tokens=72) as walk:
        hidden = walk.embed(ids_of(folder))
        layer = next(walk.layers())[1]
        key = "model.layers.0."
        calls = listened(monkeypatch)
        for last, computed in {
            "self_attn.q_proj": [],
            "self_attn.o_proj": ["q", "k", "v"],
            "mlp.gate_proj": ["q", "k", "v", "o"],
            "mlp.down_proj": ["q", "k", "v", "o", "gate", "up"],
        }.items():
            calls.clear()
            assert walk.record(layer, hidden, {key + last: lambda x: None}) == {key + last: 108}
            assert [name.rpartition(".")[2] for name in calls] == [f"{name}_proj" for name in computed]
            assert all(len(inputs) == 2 for inputs in calls.values())  # three rows, two at a time
        calls.clear()
        assert walk.record(layer, hidden, {}) == {} and not calls
        assert walk.run(layer, hidden, {f"{key}self_attn.q_proj": lambda x: None}) == {f"{key}self_attn.q_proj": 108}
        assert f"{key}mlp.down_proj" in calls


def test_recording_while_running():
    """The same inputs, and the same result, in one go."""
    folder = folder_of("gemma2")
    with LayerWalk(folder, "numpy", batch_tokens=72) as walk:
        first, second = walk.embed(ids_of(folder)), walk.embed(ids_of(folder))
        for _, layer in walk.layers():
            _, expected = record_all(walk, layer, first)
            walk.run(layer, first)
            found = {}
            walk.run(layer, second, {name: found.setdefault(name, []).append for name in expected})
            assert same_bits(first, second)
            assert all(same_bits(np.concatenate(found[name]), expected[name]) for name in expected)


def test_a_feed_that_fails_leaves_the_layer_as_it_was():
    folder = folder_of("mixtral")
    with LayerWalk(folder, "numpy") as walk:
        hidden = walk.embed(ids_of(folder))
        layer = next(walk.layers())[1]
        own, before = [*layer.linears(), layer.mlp.router], hidden.copy()
        with pytest.raises(KeyboardInterrupt):
            walk.record(layer, hidden, {layer_inputs(layer)[3].name: interrupt})
        assert [*layer.linears(), layer.mlp.router] == own and same_bits(hidden, before)


def interrupt(x):
    raise KeyboardInterrupt


def test_an_mlp_without_a_gate():
    """Its up reads what is normed for it by the product itself, in some models."""
    folder = folder_of("qwen2")
    with LayerWalk(folder, "numpy") as walk:
        hidden = walk.embed(ids_of(folder))
        layer = next(walk.layers())[1]
        _, expected = record_all(walk, layer, hidden)
        layer.mlp.gate = None
        assert [len(read.linears) for read in layer_inputs(layer)] == [3, 1, 1, 1]
        _, found = record_all(walk, layer, hidden)
        assert same_bits(found["model.layers.0.mlp.up_proj"], expected["model.layers.0.mlp.gate_proj"])


def test_what_the_head_reads():
    folder = folder_of("gemma2")
    with LayerWalk(folder, "numpy", batch_tokens=72) as walk:
        hidden = walk_through(walk, walk.embed(ids_of(folder)))
        head, found = walk.head(), []
        assert walk.record_head(head, hidden, found.append) == 108
        assert head.head.name == "lm_head" and [len(x) for x in found] == [72, 36]
        weight = SafetensorsFile(folder / "model.safetensors").array("model.norm.weight").astype(np.float64) + 1
        expected = rms(hidden.astype(np.float64), weight, walk.config.rms_norm_eps).reshape(108, -1)
        assert np.abs(np.concatenate(found) - expected).max() < 1e-4


# --- other weights ----------------------------------------------------------------------------------------------------


def test_replaced_weights_are_used():
    """In every linear layer: against the whole model with the same weights."""
    for name in ("mixtral", "gemma2"):
        check_replaced(folder_of(name), "numpy")


def check_replaced(folder, backend, **options):
    ids = ids_of(folder)
    model = load_model(folder, backend, **options)
    rng = np.random.default_rng(9)
    values = {}
    plain, _ = whole_model(model, ids, 2)
    for layer in model.layers:
        for linear in layer.linears():
            old = host(linear.weight).T.astype(np.float32)
            noise = rng.normal(0, 0.1 * old.std(), old.shape)
            values[linear.name] = (old + noise).astype(np.float16).astype(np.float32)
            new = np.ascontiguousarray(values[linear.name].T.astype(linear.weight.dtype))
            linear.weight = model.xp.asarray(new)
    expected, _ = whole_model(model, ids, 2)
    assert np.abs(expected - plain).max() > 0.01
    with LayerWalk(folder, backend, batch_tokens=2 * ids.shape[1], **options) as walk:
        hidden = walk.embed(ids)
        again = walk.embed(ids)
        for _, layer in walk.layers():
            old = {linear: replace(linear, values[linear.name]) for linear in layer.linears()}
            assert all(array.shape == values[linear.name].shape for linear, array in old.items())
            walk.run(layer, hidden)
            for linear, array in old.items():
                mine = replace(linear, array)
                assert same_bits(host(mine).astype(np.float32), values[linear.name].astype(host(mine).dtype).astype(np.float32))
            walk.run(layer, again)
        assert same_bits(host(hidden), expected)
        assert same_bits(host(again), plain)


def test_recording_after_a_replacement():
    """What o reads follows from the q, k and v that are there now; what q reads does not."""
    folder = folder_of("qwen2")
    with LayerWalk(folder, "numpy") as walk:
        hidden = walk.embed(ids_of(folder))
        layer = next(walk.layers())[1]
        _, before = record_all(walk, layer, hidden)
        v = layer.attention.v
        assert v.bias is not None
        replace(v, np.zeros((v.k, v.n), np.float32))
        _, after = record_all(walk, layer, hidden)
        q, o, *_ = (read.name for read in layer_inputs(layer))
        assert same_bits(after[q], before[q])
        # v is its bias alone, of one head, which three heads of q attend to.
        assert np.abs(after[o] - np.tile(v.bias, 3)).max() < 1e-6


def test_a_replaced_head():
    """The embedding of a tied model stays what it was."""
    folder = folder_of("qwen3")
    with LayerWalk(folder, "numpy") as walk:
        ids = ids_of(folder)
        before = walk.embed(ids)
        head = walk.head()
        assert walk.config.tie_word_embeddings and walk.shapes()["lm_head"] == (head.head.k, head.head.n)
        replace(head.head, 2 * head.head.weight.T)
        twice = head.logits(before, walk.step(len(before)))
        assert same_bits(walk.embed(ids), before)
        assert same_bits(twice, 2 * walk.head().logits(before, walk.step(len(before))))


def test_replacing_changes_no_array():
    rng = np.random.default_rng(1)
    weight, values = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    copies = weight.copy(), values.copy()
    linear = Linear(weight, np.ones(6, np.float32), "one")
    old = replace(linear, values)
    assert same_bits(linear.weight, np.ascontiguousarray(values.T)) and linear.weight.flags.c_contiguous
    assert old.base is weight or old.base is weight.base
    replace(linear, old)
    assert same_bits(linear.weight, copies[0])
    assert same_bits(weight, copies[0]) and same_bits(values, copies[1]) and linear.bias.tolist() == [1] * 6
    narrow = Linear(weight.astype(ml_dtypes.bfloat16), None, "narrow")
    for numbers in (values, rng.integers(0, 1 << 16, (4, 6)).astype(np.float32) * 2.0**-120, values.astype(np.float16)):
        replace(narrow, numbers)
        assert same_bits(narrow.weight, np.ascontiguousarray(numbers.T).astype(ml_dtypes.bfloat16))
    ties = np.array([1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, 257, 259, 1.0])
    replace(narrow, np.tile(ties, (4, 1)).astype(np.float32))
    assert narrow.weight[:, 0].astype(float).tolist() == [1, 1 + 4 / 256, -1, 256, 260, 1]
    replace(linear, values.astype(ml_dtypes.bfloat16))
    assert same_bits(linear.weight, values.T.astype(ml_dtypes.bfloat16).astype(np.float32, order="C"))


def test_values_that_cannot_be_put_there():
    linear = Linear(np.zeros((6, 4), np.float16), None, "model.layers.0.mlp.up_proj")
    with pytest.raises(ValueError, match=r"values of 'model.layers.0.mlp.up_proj' must have shape \(4, 6\), got \(6, 4\)"):
        replace(linear, np.zeros((6, 4), np.float32))
    for wrong in (np.nan, np.inf, 70000.0):
        values = np.zeros((4, 6), np.float32)
        values[3, 5] = wrong
        with pytest.raises(ValueError, match="values of .* must be finite numbers within the range of float16"):
            replace(linear, values)
    narrow = Linear(np.zeros((6, 4), ml_dtypes.bfloat16), None, "narrow")
    replace(narrow, np.full((4, 6), 70000, np.float32))
    for wrong in (np.nan, -np.inf, np.finfo(np.float32).max):
        with pytest.raises(ValueError, match="must be finite numbers within the range of bfloat16"):
            replace(narrow, np.full((4, 6), wrong, np.float32))
    assert not linear.weight.any()
    quantized = load_model(folder_of(QUANTIZED[0]), "numpy").layers[0].attention.q
    with pytest.raises(ValueError, match=r"linear 'model.layers.0.self_attn.q_proj' is quantized \(exl2\): only unquantized"):
        replace(quantized, np.zeros((quantized.k, quantized.n), np.float32))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_model_is_not_recorded(name):
    with LayerWalk(folder_of(name), "numpy") as walk:
        with pytest.raises(UnsupportedError, match=f"{name}: .* is quantized already: take the original model"):
            walk.shapes()
        layer = next(walk.layers())[1]
        with pytest.raises(UnsupportedError, match=r"self_attn.q_proj is quantized already \((exl2|gptq)\)"):
            walk.record(layer, walk.embed(ids_of(folder_of(name))), {"model.layers.0.self_attn.q_proj": interrupt})


def test_what_a_walk_is_given():
    folder = folder_of("qwen2")
    with pytest.raises(ValueError, match="batch_tokens must be 1 or more, got 0"):
        LayerWalk(folder, batch_tokens=0)
    with pytest.raises(ValueError, match="backend must be"):
        LayerWalk(folder, "torch")
    with pytest.raises(FormatError):
        LayerWalk(folder / "nowhere", "numpy")
    with LayerWalk(folder, "numpy", batch_tokens=1) as walk:  # a row at a time, at least
        context = walk.config.max_seq_len
        with pytest.raises(ValueError, match=f"ids: {context + 1} tokens per row, but the model's context is {context}"):
            walk.embed(np.zeros((1, context + 1), np.int32))
        with pytest.raises(ValueError, match=r"ids: 100000 at \[0, 1\], expected 0 to"):
            walk.embed([[0, 100000]])
        hidden = walk.embed(ids_of(folder))
        layer = next(walk.layers())[1]
        with pytest.raises(ValueError, match=r"feeds has 'q_proj', expected names of inputs of this layer: model\.layers"):
            walk.record(layer, hidden, {"q_proj": interrupt})
        with pytest.raises(ValueError, match="feeds has 'model.layers.0.self_attn.k_proj'"):  # it reads what q does
            walk.record(layer, hidden, {"model.layers.0.self_attn.k_proj": interrupt})
        with pytest.raises(ValueError, match="hidden must have shape"):
            walk.run(layer, hidden[0])
        with pytest.raises(ValueError, match="hidden must have shape"):
            walk.run(layer, hidden[..., :-32])
        with pytest.raises(TypeError, match="hidden must have dtype float32, got float64"):
            walk.run(layer, hidden.astype(np.float64))
        with pytest.raises(TypeError, match="hidden must be a NumPy or CuPy array"):
            walk.run(layer, hidden.tolist())
        assert list(walk.layers(len(walk))) == []


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, wrong):
    source = folder_of("qwen2")
    shutil.copy(source / "config.json", tmp_path)
    file = SafetensorsFile(source / "model.safetensors")
    tensors = {name: np.array(file.array(name)) for name in file.names}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = wrong
    save_file(tensors, tmp_path / "model.safetensors")
    with LayerWalk(tmp_path, "numpy") as walk:
        hidden = walk.embed(ids_of(tmp_path))
        _, layer = next(walk.layers())
        walk.run(layer, hidden)
        _, layer = next(walk.layers(1))
        feeds = {read.name: lambda x: None for read in layer_inputs(layer)}
        with np.errstate(invalid="ignore"):
            with pytest.raises(
                ValueError, match="the input of model.layers.1.mlp.down_proj has values that are not finite; the"
            ):
                walk.record(layer, hidden, feeds)
            with pytest.raises(
                ValueError, match="^model.layers.1 makes values that are not finite; the model's weights are dam"
            ):
                walk.run(layer, hidden)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("folder", [*ARCHITECTURES, "mistral", "shakespeare", *QUANTIZED], indirect=True)
def test_hidden_states_on_the_gpu(cupy, folder):
    check_walk(folder, ids_of(folder), "cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_hidden_states_of_bfloat16_on_the_gpu(cupy, name):
    check_walk(folder_of(name), ids_of(folder_of(name)), "cupy", dtype="bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("folder", [*ARCHITECTURES, "mistral"], indirect=True)
def test_inputs_on_the_gpu(cupy, monkeypatch, folder, dtype):
    """Bit for bit what the whole model's linear layers read; of experts, which compute all rows there, their own."""
    ids = ids_of(folder)
    recorded, sharing, experts, counts = {}, {}, set(), {}
    with LayerWalk(folder, "cupy", dtype=dtype, batch_tokens=72) as walk:
        hidden = walk.embed(ids)
        for _, layer in walk.layers():
            inputs = layer_inputs(layer)
            before = hidden.get()
            tokens, found = record_all(walk, layer, hidden)
            assert same_bits(hidden.get(), before)
            assert {name: len(x) for name, x in found.items()} == {name: count for name, count in tokens.items() if count}
            recorded |= found
            counts |= tokens
            sharing |= {linear.name: read.name for read in inputs for linear in read.linears}
            experts |= {read.name for read in inputs if read.expert is not None}
            walk.run(layer, hidden)
    model = load_model(folder, "cupy", dtype=dtype)  # which runs layers to find their kernels
    calls = listened(monkeypatch)
    whole_model(model, ids, 2)
    calls = collect(calls)
    for name, source in sharing.items():
        if source not in experts:
            assert same_bits(calls[name], recorded[source]), name
        else:
            rows = [row.tobytes() for row in calls[name]]
            own = [row.tobytes() for row in recorded[source]]
            positions = iter(rows)
            assert all(row in positions for row in own), f"{name}: rows of another input, or in another order"
    assert sum(counts[name] for name in experts) == (0 if not experts else 2 * 2 * ids.size * len(walk))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_experts_on_the_gpu(cupy, dtype):
    folder = folder_of("mixtral")
    ids = SafetensorsFile(folder / "golden.safetensors").array("input_ids")[:, :64]  # whose router logits are far apart
    with LayerWalk(folder, "cupy", dtype=dtype, batch_tokens=128) as walk:
        check_idle_experts(walk, walk.embed(ids))
        if dtype == "float16":
            check_experts(walk, next(walk.layers())[1], walk.embed(ids), ids.size)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replaced_weights_on_the_gpu(cupy, name):
    check_replaced(folder_of(name), "cupy")


@pytest.mark.gpu
def test_values_on_the_gpu(cupy):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(64, 96)).astype(np.float32)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        linear = Linear(cupy.asarray(np.zeros((96, 64), dtype)), None, "one")
        for given in (values, cupy.asarray(values)):
            replace(linear, cupy.asarray(np.zeros((64, 96), np.float32)))
            replace(linear, given)
            assert same_bits(linear.weight.get(), np.ascontiguousarray(values.T).astype(dtype))
        broken = values.copy()
        broken[5, 7] = np.nan
        with pytest.raises(ValueError, match="must be finite numbers within the range of"):
            replace(linear, cupy.asarray(broken))
    linear = Linear(np.zeros((96, 64), np.float32), None, "one")
    with pytest.raises(TypeError, match=r"values of 'one' is a CuPy array and the model runs on NumPy: pass values.get\(\)"):
        replace(linear, cupy.asarray(values))
    with LayerWalk(folder_of("qwen2"), "numpy") as walk:
        layer = next(walk.layers())[1]
        with pytest.raises(TypeError, match=r"hidden is a CuPy array and the model runs on NumPy: pass hidden.get\(\)"):
            walk.run(layer, cupy.zeros((1, 2, walk.config.hidden_size), np.float32))


@pytest.mark.gpu
def test_memory_on_the_gpu(cupy):
    """A layer's weights come and go: beyond the hidden states nothing stays."""
    folder = folder_of("shakespeare")
    ids = ids_of(folder)

    def used():
        gc.collect()
        return cupy.get_default_memory_pool().used_bytes()

    def walk_once(check):
        with LayerWalk(folder, "cupy") as walk:
            hidden = walk.embed(ids)
            before = used()
            for _, layer in walk.layers():
                if check:
                    weights = sum(linear.weight.nbytes for linear in layer.linears())
                    assert weights <= used() - before < 1.1 * weights
                record_all(walk, layer, hidden)
                walk.run(layer, hidden)
            del layer  # which still has its norms
            assert not check or used() == before
            return hidden.get()

    first = walk_once(check=False)  # with it comes what stays for good: workspaces of cuBLAS
    before = used()
    assert same_bits(walk_once(check=True), first)
    assert used() == before
