"""EXL2 models of random weights: a checkpoint that no file holds, for the loader to load as any other."""

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np

from cupyq._arrays import float16
from cupyq.bench.random_matrices import Words, head_kind, parse_kind, random_tensors, words_needed
from cupyq.formats.safetensors import TensorInfo
from cupyq.models import ModelConfig, loader

_SHARD_BYTES = 1 << 30


class RandomCheckpoint:
    """What the loader asks a `formats.safetensors.Checkpoint` for. Tensors of one kind and shape share their host memory."""

    def __init__(self, config, kind, head):
        self.folder = Path("random weights")
        self._config = config
        self._tensors = {}
        self._arrays = {}
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        largest = max(hidden * config["intermediate_size"], hidden * vocab)
        self._words = Words(np, words_needed(1, largest))
        self._values = (0.02 * np.random.default_rng(3).standard_normal(1_000_003)).astype(float16)
        self._add_plain("model.embed_tokens.weight", vocab, hidden)
        for layer in range(config["num_hidden_layers"]):
            self._add_layer(f"model.layers.{layer}", kind)
        self._add_plain("model.norm.weight", hidden)
        self._add_linear("lm_head", hidden, -(-vocab // 32) * 32, head)
        self.names = tuple(self._tensors)

    def _add_layer(self, key, kind):
        config = self._config
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        kv_width = kv_heads * (hidden // heads)
        for name, k, n in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden, kv_width),
            ("self_attn.v_proj", hidden, kv_width),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ):
            self._add_linear(f"{key}.{name}", k, n, kind)
            if config["architectures"] == ["Qwen2ForCausalLM"] and name.endswith(("q_proj", "k_proj", "v_proj")):
                self._add_plain(f"{key}.{name}.bias", n)
        for name in ("input_layernorm", "post_attention_layernorm"):
            self._add_plain(f"{key}.{name}.weight", hidden)

    def _add_plain(self, name, *shape):
        self._tensors[name] = self._plain(name.endswith("norm.weight"), shape)

    def _plain(self, is_norm, shape):
        key = (is_norm, shape)
        if key not in self._arrays:
            self._arrays[key] = np.ones(shape, float16) if is_norm else np.resize(self._values, shape)
        return self._arrays[key]

    def _add_linear(self, key, k, n, kind):
        # Matrices of one input share their order, as the converter makes them: it depends on the input alone.
        if (kind, k, n) not in self._arrays:
            self._arrays[kind, k, n] = random_tensors(kind, k, n, self._words, np, seed=k)
        for short, array in self._arrays[kind, k, n].items():
            self._tensors[f"{key}.{short}"] = array

    # --- what Checkpoint has ---

    def __contains__(self, name):
        return name in self._tensors

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def info(self, name):
        array = self._tensors[name]
        return TensorInfo(name, array.dtype, array.shape, 0, array.nbytes)

    def file(self, name):
        return self

    @property
    def path(self):
        return self.folder

    def array(self, name):
        array = self._tensors[name].view()
        array.setflags(write=False)
        return array

    def read_piece(self, name, begin, buffer):
        target = buffer.reshape(-1).view(np.uint8)
        target[...] = self._tensors[name].reshape(-1).view(np.uint8)[begin : begin + target.size]

    def total_bytes(self, names):
        return sum(self._tensors[name].nbytes for name in names)


def decoder_kind(bits):
    """The Kind of the decoder's layers, `bits` as `parse_kind` takes them. ValueError for bits that are none, or GPTQ."""
    kind = parse_kind(bits)
    if kind.is_gptq:
        raise ValueError(f"--bits: {bits!r}, but models are made as EXL2: name widths or mixtures")
    return kind


def random_checkpoint(config, bits, head_bits):
    """Of a shape's config. ValueError for bits that are none, or GPTQ."""
    return RandomCheckpoint(config, decoder_kind(bits), head_kind(head_bits))


def random_model(config, bits, head_bits, backend="auto"):
    """A Model of random weights, built by `load_model` as from a folder."""
    return model_of(random_checkpoint(config, bits, head_bits), config, backend)


def model_of(checkpoint, config, backend="auto"):
    """The same of a random checkpoint of this config."""
    with tempfile.TemporaryDirectory() as folder, _in_place_of_files(checkpoint):
        _write_config(config, folder)
        return loader.load_model(folder, backend=backend)


def model_config(config):
    """A shape's config as a ModelConfig, read as from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        return ModelConfig.from_file(_write_config(config, folder))


@contextlib.contextmanager
def _in_place_of_files(checkpoint):
    """Whatever folder the loader opens, it finds this checkpoint: so there is one way of building models, and no files."""
    opens_files = loader.Checkpoint
    loader.Checkpoint = lambda folder: checkpoint
    try:
        yield
    finally:
        loader.Checkpoint = opens_files


def _write_config(config, folder):
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "exl2"}}, indent=1))
    return path


def write_model(config, bits, head_bits, folder):
    """The same model as a folder with config.json and *.safetensors -> bytes written."""
    from safetensors.numpy import save_file

    checkpoint = random_checkpoint(config, bits, head_bits)
    _write_config(config, folder)
    shards: list[list[str]] = [[]]
    for name in checkpoint.names:
        if shards[-1] and checkpoint.total_bytes([*shards[-1], name]) > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    for number, names in enumerate(shards, 1):
        arrays = {name: checkpoint.array(name) for name in names}
        save_file(arrays, Path(folder) / f"model-{number:05}-of-{len(shards):05}.safetensors")
    return checkpoint.total_bytes(checkpoint.names)
