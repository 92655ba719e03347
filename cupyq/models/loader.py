"""A model folder to a Model: config.json and *.safetensors, unquantized, EXL2 or GPTQ.

First a plan (`parts`): every name and shape is checked before a byte of weights is read. On a GPU, a model of one layer of each
kind is then made of zeros and run without launching anything, to learn which kernels the model needs; those are compiled while
the weights are on their way (`upload`).
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyq import _device, _kernels
from cupyq._arrays import bfloat16, float16, float32, require_cupy
from cupyq._progress import progress
from cupyq.errors import BackendError, FormatError, UnsupportedError
from cupyq.formats.safetensors import Checkpoint
from cupyq.formats.stored import stored_kind
from cupyq.layers import MLP, Attention, DecoderLayer, Linear, MoE, ParallelDecoderLayer
from cupyq.models import upload
from cupyq.models.config import ModelConfig
from cupyq.models.model import Model
from cupyq.models.parts import Part, Piece, Plan, contiguous, split_rows
from cupyq.models.warmup import compile_traced, trace_kernels
from cupyq.ops._common import whole_number
from cupyq.ops.rope import rope_tables

_MOST_TABLE_BYTES = 2 << 30  # that a config.json may ask for by itself: four million positions of 128 values
_DTYPES = {"float16": float16, "bfloat16": bfloat16, "float32": float32}


def load_model(
    path: str | os.PathLike[str],
    backend: str = "auto",
    *,
    dtype: Any = None,
    max_seq_len: int | None = None,
) -> Model:
    """The model in a folder: config.json and *.safetensors, unquantized, EXL2 or GPTQ (told apart layer by layer).

    backend: "cupy" runs the kernels on CuPy's current GPU, "numpy" the reference; "auto" is "cupy" if there is a GPU.
    dtype: of activations and unquantized weights; float16 (default) or bfloat16 on CuPy; float32 (default), float16 or
    bfloat16 on NumPy. The residual stream is float32 throughout, as are norm weights.
    max_seq_len: the longest context to serve, at most what config.json allows (default: that; with RoPE of type dynamic up to
    `factor` times that, and all positions then turn as this length asks).
    Memory: on NumPy, weights stay in the files, mapped. On a GPU, the host takes 64 MiB of pinned buffers whatever the
    model's size, and the GPU, beyond the model, the packed tensors on their way: 128 MiB and two matrices (`upload`).
    After an error, or an interrupt, no thread is left, nor anything on the GPU.
    FormatError names file and tensor or key; UnsupportedError: an architecture or quantization cupyq does not know;
    BackendError: backend="cupy" without a usable GPU.
    """
    with open_blueprint(path, backend, dtype=dtype, max_seq_len=max_seq_len) as blueprint:
        with _meanwhile(compile_traced, blueprint.kernels()):
            blueprint.load()
        return blueprint.model()


@contextlib.contextmanager
def open_blueprint(
    path: str | os.PathLike[str], backend: str = "auto", *, dtype: Any = None, max_seq_len: int | None = None
) -> Iterator["Blueprint"]:
    """What `load_model` loads all of, for those who want a part at a time; its files are open within this context."""
    xp = _library(backend)
    activations = choose_dtype(dtype, xp)
    config = read_config(path, max_seq_len)
    with Checkpoint(path) as checkpoint:
        yield Blueprint(Plan(config, checkpoint, xp, activations))


def read_config(path: str | os.PathLike[str], max_seq_len: int | None) -> ModelConfig:
    """The configuration of a folder, for contexts of up to max_seq_len."""
    config = ModelConfig.from_file(Path(path))
    if max_seq_len is None:
        if 4 * config.rotary_dim * config.max_seq_len > _MOST_TABLE_BYTES:
            raise UnsupportedError(
                f"{config.path}: max_position_embeddings: {config.max_seq_len} positions take more than "
                f"{_MOST_TABLE_BYTES >> 30} GiB of sines and cosines; say how many you need: max_seq_len=..., or --max-seq-len"
            )
        return config
    max_seq_len, most = whole_number(max_seq_len, "max_seq_len"), config.longest_seq_len
    if not 1 <= max_seq_len <= most:
        raise ValueError(f"max_seq_len must be from 1 to {most}, as {config.path} says, got {max_seq_len}")
    return dataclasses.replace(config, max_seq_len=max_seq_len)


def _library(backend: str) -> Any:
    if _device.choose_backend(backend) == "numpy":
        return np
    cupy = require_cupy()
    if _device.count() == 0:
        raise BackendError(
            "no usable GPU for backend='cupy': run `cupyq doctor` to see what is missing, or use backend='numpy'"
        )
    return cupy


def choose_dtype(dtype: Any, xp: Any) -> np.dtype:
    """Of activations, from what `load_model` takes as dtype."""
    allowed = (float32, float16, bfloat16) if xp is np else (float16, bfloat16)
    if dtype is None:
        return allowed[0]
    try:
        chosen = _DTYPES[dtype] if isinstance(dtype, str) else np.dtype(dtype)
    except (KeyError, TypeError):
        chosen = None
    if chosen not in allowed:
        backend = "numpy" if xp is np else "cupy"
        raise ValueError(f"dtype must be one of {', '.join(map(str, allowed))} with backend {backend!r}, got {dtype!r}")
    return chosen


# --- from parts to a model --------------------------------------------------------------------------------------------


@dataclass
class _LayerPlan:
    """The parts of a layer, and what makes the layer of their values, to be the index-th one of a model."""

    attention: Sequence[Part]
    mlp: Sequence[Part]
    norms: Sequence[Part]
    finish: Callable[[int], DecoderLayer | ParallelDecoderLayer]
    window: int | None

    @property
    def parts(self) -> list[Part]:
        return [*self.attention, *self.mlp, *self.norms]

    @property
    def kinds(self) -> set[Hashable]:
        """Of its two halves; those of one kind run the same kernels."""
        attention, mlp = (tuple(part.kind for part in half) for half in (self.attention, self.mlp))
        return {("attention", self.window, attention), ("mlp", mlp)}


class Blueprint:
    """A model whose every name and shape is known to fit, and whose weights may be loaded. `plan`: one without parts yet."""

    def __init__(self, plan: Plan):
        self.plan = plan
        config, checkpoint, xp = plan.config, plan.checkpoint, plan.xp
        self.config, self.checkpoint, self.xp, self.activations = config, checkpoint, xp, plan.weight_dtype
        hidden, vocab = config.hidden_size, config.vocab_size
        self.embedding = plan.array("model.embed_tokens.weight", vocab, hidden)
        has_rope = config.architecture.rope is not None
        self.places = None if has_rope else plan.array("model.wpe.weight", config.max_position_embeddings, hidden)
        self.sin, self.cos = _rope_tables(config, xp) if has_rope else (None, None)
        local = _local_rope_tables(config, xp)
        layers = range(config.num_hidden_layers)
        self.layers = [_plan_layer(plan, config, layer, local if config.windows[layer] else None) for layer in layers]
        self.norm = plan.norm("model.norm", scale=config.logit_scale)
        # Quantizers write a head of its own even for tied models.
        self.head = None
        if stored_kind(checkpoint, "lm_head") is not None or not config.tie_word_embeddings:
            self.head = plan.head("lm_head", hidden, vocab)
        plan.refuse_leftovers()

    def load(self, parts: Sequence[Part] | None = None) -> None:
        """Give `parts` their values; None: all parts, with a progress bar.

        After an error none of them keeps a value: the traceback may live for long.
        """
        arriving: Iterable[Part] = parts or ()
        if parts is None:
            parts = self.plan.parts
            arriving = progress(parts, sum(part.nbytes for part in parts), "loading")
        try:
            with contextlib.closing(self.plan.read(arriving)) as arrived:
                for part, tensors in arrived:
                    part.value = part.build(tensors)
                    del tensors  # a repacked matrix no longer needs what it was made from
        except BaseException:
            _drop_values(parts)
            raise

    def model(self, layers: Sequence[_LayerPlan] | None = None, make: Callable[..., Model] = Model) -> Model:
        """The Model of the parts' values, with all layers or those given. make: what is called with what `Model` takes."""
        stored = self.checkpoint.info(self.embedding.key).dtype
        embedding = self.embedding.value
        chosen = self.layers if layers is None else layers
        return make(
            config=self.config,
            xp=self.xp,
            dtype=self.activations,
            embedding=embedding,
            layers=[layer.finish(index) for index, layer in enumerate(chosen)],
            norm=self.norm.value,
            head=self.head.value if self.head is not None else Linear(embedding, None, "lm_head", stored),
            sin=self.sin,
            cos=self.cos,
            places=None if self.places is None else self.places.value,
            parameters=sum(part.parameters for part in self.plan.parts),
        )

    def layer(self, index: int) -> DecoderLayer | ParallelDecoderLayer:
        """One layer, read now; nothing else holds its weights."""
        layer = self.layers[index]
        with self._loaded(layer.parts):
            return layer.finish(index)

    def without_layers(self, *, embedding: bool = False, head: bool = False) -> Model:
        """A Model of no layers, whose embedding, or norm and head, are read now; the other end is not to be used."""
        parts = [self.embedding] if embedding or (head and self.head is None) else []
        parts += [self.places] if embedding and self.places is not None else []
        if head:
            parts += [part for part in (self.norm, self.head) if part is not None]
        with self._loaded(parts):
            return self.model([])

    @contextlib.contextmanager
    def _loaded(self, parts: Sequence[Part]) -> Iterator[None]:
        """A context in which these parts have their values."""
        self.load(parts)
        try:
            yield
        finally:
            _drop_values(parts)

    def kernels(self) -> list[tuple[_kernels.Instance, str]]:
        """What loading and running the model will launch: found out on layers of all kinds there are, made of zeros."""
        if self.xp is np:
            return []
        layers = _one_of_each_kind(self.layers)
        ends = [part for part in (self.embedding, self.places, self.norm, self.head) if part is not None]
        parts = [*(part for layer in layers for part in layer.parts), *ends]
        try:
            with _kernels.tracing() as to_load:
                for part in parts:
                    part.value = part.build(upload.new_arrays(self.checkpoint, part, self.xp.zeros))
                return to_load + trace_kernels(self.model(layers))
        finally:
            _drop_values(parts)


def _one_of_each_kind(layers: Sequence[_LayerPlan]) -> list[_LayerPlan]:
    chosen: list[_LayerPlan] = []
    seen: set[Hashable] = set()
    for layer in layers:
        if not layer.kinds <= seen:
            chosen.append(layer)
            seen |= layer.kinds
    return chosen


def _drop_values(parts: Sequence[Part]) -> None:
    for part in parts:
        part.value = None


@contextlib.contextmanager
def _meanwhile(task: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """Run task(*arguments) in a thread during this context, which ends after it. An error of the context comes first."""
    with ThreadPoolExecutor(1, "cupyq-meanwhile") as thread:
        done = thread.submit(task, *arguments)
        yield
        done.result()


def _rope_tables(config: ModelConfig, xp: Any) -> tuple[Any, Any]:
    options = {"theta": config.rope_theta, "scaling": config.rope_scaling}
    try:
        return rope_tables(config.rotary_dim, config.max_seq_len, **options, xp=xp)
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{config.path}: {error}") from None


def _local_rope_tables(config: ModelConfig, xp: Any) -> tuple[Any, Any] | None:
    """Tables of the layers with a window, where these have their own."""
    if config.local_rope_theta is None or not any(config.windows):
        return None
    return rope_tables(config.rotary_dim, config.max_seq_len, theta=config.local_rope_theta, xp=xp)


def _plan_layer(plan: Plan, config: ModelConfig, layer: int, tables: tuple[Any, Any] | None) -> _LayerPlan:
    row, key, first = config.architecture, f"model.layers.{layer}", len(plan.parts)
    attention = _plan_attention(plan, config, layer, f"{key}.{row.attention}", tables)
    middle = len(plan.parts)
    has_experts = row.has_experts and config.sparse_layers[layer]
    mlp = (_plan_experts if has_experts else _plan_mlp)(plan, config, f"{key}.{row.mlp}")
    end = len(plan.parts)
    pre_norms = {"attention_norm": row.attention_norm, "mlp_norm": row.mlp_norm}
    post_norms = {"attention_post_norm": row.attention_post_norm, "mlp_post_norm": row.mlp_post_norm}
    norms = {role: plan.norm(f"{key}.{name}") for role, name in pre_norms.items() if name}
    norms |= {role: plan.norm(f"{key}.{name}", is_pre_norm=False) for role, name in post_norms.items() if name}

    def finish(index: int) -> DecoderLayer | ParallelDecoderLayer:
        if row.mlp_norm is None:
            return ParallelDecoderLayer(attention(index), mlp(), norm=norms["attention_norm"].value)
        return DecoderLayer(attention(index), mlp(), **{role: part.value for role, part in norms.items()})

    attention_parts, mlp_parts = plan.parts[first:middle], plan.parts[middle:end]
    return _LayerPlan(attention_parts, mlp_parts, plan.parts[end:], finish, config.windows[layer])


def _plan_attention(
    plan: Plan, config: ModelConfig, layer: int, key: str, tables: tuple[Any, Any] | None
) -> Callable[[int], Attention]:
    row, hidden, head_dim = config.architecture, config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)

    def split(array: Any) -> list[Any]:
        if row.qkv_layout == "rows":
            return split_rows(array, widths)
        groups = array.reshape(kv_heads, heads // kv_heads + 2, head_dim, *array.shape[1:])
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return [contiguous(part).reshape(-1, *array.shape[1:]) for part in parts]

    names = [f"{key}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    fused = row.fused_qkv and f"{key}.{row.fused_qkv}"
    q, k, v = plan.side_by_side(names, fused, hidden, widths, config.has_qkv_bias, split)
    o = plan.linear(f"{key}.o_proj", widths[0], hidden, config.has_output_bias)
    norms: dict[str, Part] = {}
    if config.head_norm is not None:
        norms = {name: plan.head_norm(f"{key}.{name}", n) for name, n in (("q_norm", heads), ("k_norm", kv_heads))}
    window = config.windows[layer]

    def finish(index: int) -> Attention:
        return Attention(
            q.value,
            k.value,
            v.value,
            o.value,
            layer=index,
            head_dim=head_dim,
            scale=config.attention_scale,
            window=window,
            softcap=config.attention_softcap,
            clip=config.qkv_clip,
            rope_style=None if row.rotates_window_only and window is None else row.rope,
            tables=tables,
            **{name: norm.value for name, norm in norms.items()},
        )

    return finish


def _plan_mlp(plan: Plan, config: ModelConfig, key: str, inner: int | None = None) -> Callable[[], MLP]:
    """inner: its size; None: that of an MLP which is no expert."""
    row, hidden, inner = config.architecture, config.hidden_size, inner or config.intermediate_size
    if row.gate is None:
        pieces: Sequence[Any] = [plan.linear(f"{key}.{row.up}", hidden, inner, config.has_mlp_bias)]
    else:
        names, widths = [f"{key}.{row.gate}", f"{key}.{row.up}"], (inner, inner)
        fused = row.fused_gate_up and f"{key}.{row.fused_gate_up}"
        pieces = plan.side_by_side(names, fused, hidden, widths, config.has_mlp_bias, lambda array: split_rows(array, widths))
    down = plan.linear(f"{key}.{row.down}", inner, hidden, config.has_mlp_bias)

    def finish() -> MLP:
        *gate, up = (piece.value for piece in pieces)
        return MLP(gate[0] if gate else None, up, down.value, config.activation)

    return finish


def _plan_experts(plan: Plan, config: ModelConfig, key: str) -> Callable[[], MoE]:
    row, count, inner = config.architecture, config.num_experts, config.expert_size
    router = plan.linear(f"{key}.{row.router}", config.hidden_size, count)
    within = f"{key}.{row.experts}"
    if row.has_fused_experts and f"{within}.{row.gate}" in plan.checkpoint:
        experts = _plan_fused_experts(plan, config, within)
    else:
        experts = [_plan_mlp(plan, config, f"{within}.{expert}", inner) for expert in range(count)]
    options = {"renormalize": config.renormalizes_experts}
    return lambda: MoE(router.value, [expert() for expert in experts], config.num_experts_per_tok, **options)


def _plan_fused_experts(plan: Plan, config: ModelConfig, key: str) -> list[Callable[[], MLP]]:
    row, hidden, inner, count = config.architecture, config.hidden_size, config.expert_size, config.num_experts
    gates, ups = (plan.fused_experts(key, name, hidden, inner, count, False) for name in (str(row.gate), row.up))
    downs = plan.fused_experts(key, row.down, inner, hidden, count, True)

    def expert(gate: Piece, up: Piece, down: Piece) -> Callable[[], MLP]:
        return lambda: MLP(gate.value, up.value, down.value, config.activation)

    return [expert(*pieces) for pieces in zip(gates, ups, downs, strict=True)]
