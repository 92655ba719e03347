"""A model folder to a Model: config.json and *.safetensors, unquantized, EXL2 or GPTQ.

First a plan: every name and shape is checked before a byte of weights is read. On a GPU, a model of one layer of each kind
is then made of zeros and run without launching anything, to learn which kernels the model needs; those are compiled while
the weights are on their way (`upload`).
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
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
from cupyq.layers import MLP, Attention, DecoderLayer, HeadNorm, Linear, MoE, RMSNorm
from cupyq.models import upload
from cupyq.models.config import ModelConfig
from cupyq.models.model import Model
from cupyq.models.upload import Wanted
from cupyq.models.warmup import compile_traced, trace_kernels
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.rope import rope_tables

_DTYPES = {"float16": float16, "bfloat16": bfloat16, "float32": float32}
_EXL2_TENSORS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
_ON_HOST = ("q_scale_max", "q_groups", "q_invperm", "g_idx")


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
    max_seq_len: the longest context to serve, at most what config.json allows (default: that).
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
    xp = _choose_backend(backend)
    activations = choose_dtype(dtype, xp)
    config = read_config(path, max_seq_len)
    with Checkpoint(path) as checkpoint:
        yield Blueprint(Plan(config, checkpoint, xp, activations))


def read_config(path: str | os.PathLike[str], max_seq_len: int | None) -> ModelConfig:
    """The configuration of a folder, for contexts of up to max_seq_len."""
    config = ModelConfig.from_file(Path(path))
    if max_seq_len is None:
        return config
    if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int):
        raise TypeError(f"max_seq_len must be a whole number, got {type(max_seq_len).__name__}")
    if not 1 <= max_seq_len <= config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"max_seq_len must be from 1 to {most}, as {config.path} says, got {max_seq_len}")
    return dataclasses.replace(config, max_seq_len=max_seq_len)


def _choose_backend(backend: str) -> Any:
    if backend not in ("auto", "numpy", "cupy"):
        raise ValueError(f"backend must be 'auto', 'numpy' or 'cupy', got {backend!r}")
    if backend == "numpy" or (backend == "auto" and _device.count() == 0):
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


# --- from names to parts ----------------------------------------------------------------------------------------------


@dataclass
class Part:
    """Tensors that become one object: planned first, so that every name and shape is checked before a byte is read."""

    key: str
    tensors: Mapping[str, Wanted]
    build: Callable[[dict[str, Any]], Any]
    nbytes: int
    parameters: int
    kind: Hashable
    """Equal for parts that run the same kernels."""
    value: Any = None


@dataclass
class _LayerPlan:
    """The parts of a layer, and what makes the layer of their values, to be the index-th one of a model."""

    attention: Sequence[Part]
    mlp: Sequence[Part]
    norms: Sequence[Part]
    finish: Callable[[int], DecoderLayer]
    window: int | None

    @property
    def parts(self) -> list[Part]:
        return [*self.attention, *self.mlp, *self.norms]

    @property
    def kinds(self) -> set[Hashable]:
        """Of its two halves; those of one kind run the same kernels."""
        attention, mlp = (tuple(part.kind for part in half) for half in (self.attention, self.mlp))
        return {("attention", self.window, attention), ("mlp", mlp)}


class Plan:
    """Looks up what a model needs in a checkpoint and remembers it as parts, in the order they are used.

    Who keeps less than all of it overrides `held` and `read`.
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, xp: Any, activations: np.dtype):
        self.config, self.checkpoint, self.xp = config, checkpoint, xp
        self.weight_dtype = activations
        self.parts: list[Part] = []
        self.used: set[str] = set()

    def held(self, key: str, k: int, n: int) -> tuple[int, int]:
        """Inputs and outputs of what is kept of a linear layer."""
        return k, n

    def read(self, parts: Iterable["Part"]) -> Generator[tuple["Part", dict[str, Any]], None, None]:
        """Each part and the tensors to build it of."""
        return upload.read(self.checkpoint, parts, self.xp)

    def _add(self, key: str, tensors: Mapping[str, Wanted], build: Callable[[dict[str, Any]], Any], parameters: int) -> "Part":
        self.used.update(wanted.name for wanted in tensors.values())
        nbytes = self.checkpoint.total_bytes(wanted.name for wanted in tensors.values())
        self.parts.append(Part(key, tensors, build, nbytes, parameters, self._kind_of(tensors)))
        return self.parts[-1]

    def _kind_of(self, tensors: Mapping[str, Wanted]) -> Hashable:
        if self.xp is np:
            return None
        infos = {short: self.checkpoint.info(wanted.name) for short, wanted in tensors.items()}
        if "q_groups" not in tensors:
            return tuple((short, info.dtype, info.shape) for short, info in infos.items())
        # The sizes of EXL2's tensors tell how many rows have which width, which is for kernels to cope with.
        widths = upload.read_on_host(self.checkpoint, tensors["q_groups"]).reshape(-1)[::2]
        return infos["q_invperm"].shape, infos["q_weight"].shape[1:], frozenset(widths.tolist()), "bias" in tensors

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        """FormatError unless the checkpoint has this unquantized tensor, in this shape."""
        if name not in self.checkpoint:
            raise FormatError(
                f"{self.checkpoint.folder}: tensor {name!r} is missing, expected shape {list(shape)}, as "
                f"{self.config.path.name} says; the checkpoint is incomplete or its config.json is another model's"
            )
        info = self.checkpoint.info(name)
        if tuple(info.shape) != shape:
            self.refuse(name, f"shape {list(info.shape)}, expected {list(shape)}, as {self.config.path.name} says")
        if info.dtype not in upload.FLOAT_DTYPES:
            path = self.checkpoint.file(name).path
            raise UnsupportedError(f"{path}: tensor {name!r}: dtype {info.dtype}, expected float16, bfloat16 or float32")

    def refuse(self, name: str, what: str) -> None:
        raise FormatError(f"{self.checkpoint.file(name).path}: tensor {name!r}: {what}")

    def array(self, name: str, *shape: int) -> Part:
        """An unquantized tensor, such as the embedding."""
        self._require(name, shape)
        return self._add(name, {"weight": Wanted(name, self.weight_dtype)}, lambda t: t["weight"], int(np.prod(shape)))

    def norm_weight(self, key: str, size: int) -> Part:
        """A norm's weight, float32, with the architecture's offset added."""
        name, offset = f"{key}.weight", self.config.architecture.norm_weight_offset
        self._require(name, (size,))

        def build(tensors: dict[str, Any]) -> Any:
            weight = tensors["weight"] + np.float32(offset)  # a new array, so that no file stays mapped for it
            return self.xp.asarray(weight)

        return self._add(key, {"weight": Wanted(name, float32, on_host=True)}, build, size)

    def linear(self, key: str, k: int, n: int, has_bias: bool = False, is_padded: bool = False) -> Part:
        """EXL2, GPTQ or unquantized, whichever tensors there are. `is_padded`: N may be rounded up to 32 (lm_head)."""
        bias = self._bias(key, n, has_bias)
        parameters = k * n + n * has_bias
        if f"{key}.q_weight" in self.checkpoint:
            names: tuple[str, ...] = _EXL2_TENSORS
        elif f"{key}.qweight" in self.checkpoint:
            names = ("qweight", "qzeros", "scales")
            names += ("g_idx",) * (f"{key}.g_idx" in self.checkpoint)
        else:
            self._require(f"{key}.weight", (n, k))
            tensors = {"weight": Wanted(f"{key}.weight", self.weight_dtype)} | bias
            stored = self.checkpoint.info(f"{key}.weight").dtype
            return self._add(key, tensors, lambda t: Linear(t["weight"], t.get("bias"), key, stored), parameters)

        for name in names:
            if f"{key}.{name}" not in self.checkpoint:
                raise FormatError(
                    f"{self.checkpoint.folder}: tensor '{key}.{name}' is missing beside '{key}.{names[0]}'; "
                    "the checkpoint is incomplete, download or convert it again"
                )
        tensors = {name: Wanted(f"{key}.{name}", on_host=name in _ON_HOST) for name in names} | bias
        file = self.checkpoint.file(f"{key}.{names[0]}").path

        def build(tensors: dict[str, Any]) -> Linear:
            bias = tensors.pop("bias", None)
            try:
                matrix = QMatrix.from_tensors(tensors, bias=bias, name=key, **self._gptq_options(names[0]))
            except FormatError as error:
                raise FormatError(f"{file}: {error}") from None
            held_k, held_n = self.held(key, k, n)
            widest = -(-held_n // 32) * 32 if is_padded else held_n
            if matrix.k != held_k or not held_n <= matrix.n <= widest:
                raise FormatError(
                    f"{file}: tensor '{key}.{names[0]}': a matrix of {matrix.k} x {matrix.n}, expected {held_k} x {held_n}, as "
                    f"{self.config.path.name} says"
                )
            return Linear(matrix, name=key)

        return self._add(key, tensors, build, parameters)

    def _gptq_options(self, first_tensor: str) -> dict[str, Any]:
        quantization = self.config.quantization
        if first_tensor != "qweight" or quantization is None or quantization.method != "gptq":
            return {}
        return {"zeros": quantization.zeros, "bits": quantization.bits, "group_size": quantization.group_size}

    def _bias(self, key: str, n: int, is_expected: bool) -> dict[str, Wanted]:
        name = f"{key}.bias"
        if is_expected:
            self._require(name, (n,))
            if any(f"{key}.{first}" in self.checkpoint for first in ("q_weight", "qweight")):
                return {"bias": Wanted(name, float16, on_host=True)}  # what QMatrix takes
            return {"bias": Wanted(name, self.weight_dtype)}
        if name in self.checkpoint:
            # GPTQ writers store a bias of zeros for layers that have none.
            if self.checkpoint.array(name).astype(np.float32).any():
                self.refuse(name, f"not zero, but {self.config.architecture.name} has no such bias by its config.json")
            self.used.add(name)
        return {}

    def refuse_leftovers(self) -> None:
        """FormatError if the checkpoint holds weights of the decoder that no part has asked for."""
        for name in self.checkpoint.names:
            is_known = name in self.used or name.rpartition(".")[2] in ("q_perm", "q_group_map", "inv_freq")
            if name.startswith("model.") and not is_known:
                model = f"a {self.config.architecture.name} of {self.config.num_hidden_layers} layers"
                self.refuse(name, f"not part of {model}; {self.config.path.name} does not describe this checkpoint")


# --- from parts to a model --------------------------------------------------------------------------------------------


class Blueprint:
    """A model whose every name and shape is known to fit, and whose weights may be loaded. `plan`: one without parts yet."""

    def __init__(self, plan: Plan):
        self.plan = plan
        config, checkpoint, xp = plan.config, plan.checkpoint, plan.xp
        self.config, self.checkpoint, self.xp, self.activations = config, checkpoint, xp, plan.weight_dtype
        hidden, vocab = config.hidden_size, config.vocab_size
        self.embedding = plan.array("model.embed_tokens.weight", vocab, hidden)
        self.layers = [_plan_layer(plan, config, layer) for layer in range(config.num_hidden_layers)]
        self.norm = plan.norm_weight("model.norm", hidden)
        # Quantizers write a head of its own even for tied models.
        has_own_head = any(f"lm_head.{name}" in checkpoint for name in ("q_weight", "qweight", "weight"))
        self.head = None
        if has_own_head or not config.tie_word_embeddings:
            self.head = plan.linear("lm_head", hidden, vocab, is_padded=True)
        plan.refuse_leftovers()
        self.sin, self.cos = _rope_tables(config, xp)

    def load(self, parts: Sequence[Part] | None = None) -> None:
        """Give every part its value, or those given, without a progress bar.

        None keeps one after an error, whose traceback may live for long.
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
            norm=RMSNorm(self.norm.value, self.config.rms_norm_eps),
            head=self.head.value if self.head is not None else Linear(embedding, None, "lm_head", stored),
            sin=self.sin,
            cos=self.cos,
            parameters=sum(part.parameters for part in self.plan.parts),
        )

    def layer(self, index: int) -> DecoderLayer:
        """One layer, read now; nothing else holds its weights."""
        layer = self.layers[index]
        with self._loaded(layer.parts):
            return layer.finish(index)

    def without_layers(self, *, embedding: bool = False, head: bool = False) -> Model:
        """A Model of no layers, whose embedding, or norm and head, are read now; the other end is not to be used."""
        parts = [self.embedding] if embedding or (head and self.head is None) else []
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
        ends = [part for part in (self.embedding, self.norm, self.head) if part is not None]
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
    try:
        return rope_tables(config.head_dim, config.max_seq_len, theta=config.rope_theta, scaling=config.rope_scaling, xp=xp)
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{config.path}: {error}") from None


def _plan_layer(plan: Plan, config: ModelConfig, layer: int) -> _LayerPlan:
    row, key, first = config.architecture, f"model.layers.{layer}", len(plan.parts)
    attention = _plan_attention(plan, config, layer, f"{key}.{row.attention}")
    middle = len(plan.parts)
    mlp = (_plan_experts if row.has_experts else _plan_mlp)(plan, config, f"{key}.{row.mlp}")
    names = {
        "attention_norm": row.attention_norm,
        "mlp_norm": row.mlp_norm,
        "attention_post_norm": row.attention_post_norm,
        "mlp_post_norm": row.mlp_post_norm,
    }
    end = len(plan.parts)
    norms = {role: plan.norm_weight(f"{key}.{name}", config.hidden_size) for role, name in names.items() if name}

    def finish(index: int) -> DecoderLayer:
        weights = {role: RMSNorm(part.value, config.rms_norm_eps) for role, part in norms.items()}
        return DecoderLayer(attention(index), mlp(), **weights)

    attention_parts, mlp_parts = plan.parts[first:middle], plan.parts[middle:end]
    return _LayerPlan(attention_parts, mlp_parts, plan.parts[end:], finish, config.windows[layer])


def _plan_attention(plan: Plan, config: ModelConfig, layer: int, key: str) -> Callable[[int], Attention]:
    hidden, head_dim = config.hidden_size, config.head_dim
    width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    q = plan.linear(f"{key}.q_proj", hidden, width, config.has_qkv_bias)
    k = plan.linear(f"{key}.k_proj", hidden, kv_width, config.has_qkv_bias)
    v = plan.linear(f"{key}.v_proj", hidden, kv_width, config.has_qkv_bias)
    o = plan.linear(f"{key}.o_proj", width, hidden, config.has_output_bias)
    norm_names = ("q_norm", "k_norm") if config.architecture.head_norm else ()
    norms = [plan.norm_weight(f"{key}.{name}", head_dim) for name in norm_names]

    def finish(index: int) -> Attention:
        head_norms = [HeadNorm(norm.value, eps=config.rms_norm_eps) for norm in norms]
        q_norm, k_norm = head_norms or (None, None)
        return Attention(
            q.value,
            k.value,
            v.value,
            o.value,
            layer=index,
            head_dim=head_dim,
            scale=config.attention_scale,
            window=config.windows[layer],
            softcap=config.attention_softcap,
            q_norm=q_norm,
            k_norm=k_norm,
        )

    return finish


def _plan_mlp(plan: Plan, config: ModelConfig, key: str) -> Callable[[], MLP]:
    row, hidden, inner = config.architecture, config.hidden_size, config.intermediate_size
    gate = plan.linear(f"{key}.{row.gate}", hidden, inner, config.has_mlp_bias)
    up = plan.linear(f"{key}.{row.up}", hidden, inner, config.has_mlp_bias)
    down = plan.linear(f"{key}.{row.down}", inner, hidden, config.has_mlp_bias)
    return lambda: MLP(gate.value, up.value, down.value, config.activation)


def _plan_experts(plan: Plan, config: ModelConfig, key: str) -> Callable[[], MoE]:
    row = config.architecture
    router = plan.linear(f"{key}.{row.router}", config.hidden_size, config.num_experts)
    experts = [_plan_mlp(plan, config, f"{key}.{row.experts}.{expert}") for expert in range(config.num_experts)]
    return lambda: MoE(router.value, [expert() for expert in experts], config.num_experts_per_tok)
