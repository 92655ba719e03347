"""Names of a checkpoint to the parts of a model: which tensors each is made of, and how.

Every name and shape is checked here, before a byte of weights is read.
"""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyq._arrays import float16, float32
from cupyq.errors import FormatError, UnsupportedError
from cupyq.layers import HeadNorm, LayerNorm, Linear, RMSNorm
from cupyq.models import upload
from cupyq.models.config import ModelConfig
from cupyq.models.names import RenamedCheckpoint
from cupyq.models.upload import Wanted
from cupyq.ops.qmatrix import QMatrix

_EXL2_TENSORS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
_ON_HOST = ("q_scale_max", "q_groups", "q_invperm", "g_idx")


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
class Piece:
    """One of the objects that a part's tensors become."""

    part: Part
    index: int

    @property
    def value(self) -> Any:
        return self.part.value[self.index]


class Plan:
    """Looks up what a model needs in a checkpoint and remembers it as parts, in the order they are used."""

    def __init__(self, config: ModelConfig, checkpoint: Any, xp: Any, activations: np.dtype):
        """checkpoint: a Checkpoint or a RenamedCheckpoint."""
        self.config, self.checkpoint, self.xp = config, checkpoint, xp
        self.weight_dtype = activations
        self.parts: list[Part] = []
        self.used: set[str] = set()

    def _add(self, key: str, tensors: Mapping[str, Wanted], build: Callable[[dict[str, Any]], Any], parameters: int) -> Part:
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
            raise UnsupportedError(f"{self._place(name)}: dtype {info.dtype}, expected float16, bfloat16 or float32")

    def refuse(self, name: str, what: str) -> None:
        raise FormatError(f"{self._place(name)}: {what}")

    def _place(self, name: str) -> str:
        """File and tensor, by the name it has there, to start a message."""
        renamed = isinstance(self.checkpoint, RenamedCheckpoint)
        stored = self.checkpoint.stored_name(name) if renamed else name
        return f"{self.checkpoint.file(name).path}: tensor {stored!r}"

    def array(self, name: str, *shape: int) -> Part:
        """An unquantized tensor, such as the embedding."""
        self._require(name, shape)
        return self._add(name, {"weight": Wanted(name, self.weight_dtype)}, lambda t: t["weight"], int(np.prod(shape)))

    def norm(self, key: str, *, scale: float = 1.0, is_pre_norm: bool = True) -> Part:
        """A norm of whole rows, weights in float32, with the architecture's offset added; its result is times `scale`.

        A pre-norm, the final one included, reads the residual, which is kept divided by residual_scale: the norm takes that
        out again but for its eps, which is divided likewise.
        """
        config, row = self.config, self.config.architecture
        eps = config.rms_norm_eps / (config.residual_scale**2 if is_pre_norm else 1.0)

        def build(weight: Any, bias: Any) -> RMSNorm | LayerNorm:
            return RMSNorm(weight, eps) if row.norm == "rms" else LayerNorm(weight, bias, eps)

        return self._norm(key, (config.hidden_size,), row.has_norm_bias, scale, build)

    def head_norm(self, key: str, heads: int) -> Part:
        """A norm of each head, likewise."""
        config, row = self.config, self.config.architecture
        shape = (heads, config.head_dim) if row.has_norm_per_head else (config.head_dim,)
        options = {"eps": config.rms_norm_eps, "kind": config.head_norm}
        return self._norm(key, shape, False, 1.0, lambda weight, bias: HeadNorm(weight, **options))

    def _norm(self, key: str, shape: tuple[int, ...], has_bias: bool, scale: float, make: Callable[[Any, Any], Any]) -> Part:
        names = {short: f"{key}.{short}" for short in ("weight", *(["bias"] if has_bias else []))}
        for name in names.values():
            self._require(name, shape)
        offset = np.float32(self.config.architecture.norm_weight_offset)

        def build(tensors: dict[str, Any]) -> Any:
            # New arrays, so that no file stays mapped for them.
            weight = self.xp.asarray((tensors["weight"] + offset) * np.float32(scale))
            return make(weight, self.xp.asarray(tensors["bias"] * np.float32(scale)) if has_bias else None)

        tensors = {short: Wanted(name, float32, on_host=True) for short, name in names.items()}
        return self._add(key, tensors, build, len(names) * int(np.prod(shape)))

    def head(self, key: str, k: int, n: int) -> Part:
        """The linear layer that makes logits."""
        if not self.config.normalizes_head or f"{key}.weight" not in self.checkpoint:
            return self.linear(key, k, n, is_padded=True)
        name = f"{key}.weight"
        self._require(name, (n, k))
        stored = self.checkpoint.info(name).dtype

        def build(tensors: dict[str, Any]) -> Linear:
            weight = tensors["weight"]
            lengths = np.sqrt(np.sum(weight * weight, axis=1, keepdims=True))
            weight = (weight / np.maximum(lengths, np.float32(1e-12))).astype(self.weight_dtype)
            return Linear(self.xp.asarray(weight), None, key, stored)

        return self._add(key, {"weight": Wanted(name, float32, on_host=True)}, build, k * n)

    def side_by_side(
        self, keys: Sequence[str], fused: str | None, k: int, widths: Sequence[int], has_bias: bool, split: Callable[[Any], Any]
    ) -> Sequence[Part | Piece]:
        """Linear layers of one input; made of one where the checkpoint has them fused.

        split: rows of an array [sum of widths, ...], in the order of the fused tensor, to an array for each layer.
        """
        fused = fused if fused is not None and not any(f"{key}.q_weight" in self.checkpoint for key in keys) else None
        if fused is not None and f"{fused}.weight" in self.checkpoint:
            return self._fused(keys, fused, k, sum(widths), has_bias, split)
        if fused is not None and f"{fused}.qweight" in self.checkpoint:
            return self._fused_gptq(keys, fused, k, widths, has_bias)
        return [self.linear(key, k, n, has_bias) for key, n in zip(keys, widths, strict=True)]

    def _fused(
        self, keys: Sequence[str], fused: str, k: int, n: int, has_bias: bool, split: Callable[[Any], Any]
    ) -> Sequence[Piece]:
        tensors, is_transposed = self._plain_weight(fused, k, n), self.config.architecture.is_transposed
        tensors |= self._bias(fused, n, has_bias)
        stored = self.checkpoint.info(f"{fused}.weight").dtype

        def build(tensors: dict[str, Any]) -> list[Linear]:
            weight = tensors["weight"]
            weights = split(contiguous(self.xp, weight.T) if is_transposed else weight)
            biases = split(tensors["bias"]) if has_bias else [None] * len(keys)
            return [Linear(*both, key, stored) for both, key in zip(zip(weights, biases, strict=True), keys, strict=True)]

        part = self._add(fused, tensors, build, k * n + n * has_bias)
        return [Piece(part, index) for index in range(len(keys))]

    def _fused_gptq(self, keys: Sequence[str], fused: str, k: int, widths: Sequence[int], has_bias: bool) -> Sequence[Piece]:
        """A column of a GPTQ matrix is its own: one side by side with others is columns of what the file has."""
        if self.config.architecture.qkv_layout != "rows" or any(width % 32 for width in widths):
            raise UnsupportedError(
                f"{self._place(f'{fused}.qweight')}: several matrices in one, of widths {list(widths)}; cupyq takes GPTQ "
                "tensors apart where they lie side by side and are multiples of 32 wide: quantize the projections one by one"
            )
        names = ("qweight", "qzeros", "scales", *(["g_idx"] if f"{fused}.g_idx" in self.checkpoint else []))
        tensors = self._quantized(fused, names) | self._bias(fused, sum(widths), has_bias)
        bits = 32 * self.checkpoint.info(f"{fused}.qweight").shape[0] // k
        ends = list(itertools.accumulate(widths))

        def build(tensors: dict[str, Any]) -> list[Linear]:
            linears = []
            for key, begin, end in zip(keys, [0, *ends], ends, strict=False):
                columns = {"qweight": (begin, end), "scales": (begin, end)}
                columns["qzeros"] = (begin * bits // 32, end * bits // 32)
                own = {
                    short: contiguous(self.xp, array[..., slice(*columns[short])]) if short in columns else array
                    for short, array in tensors.items()
                }
                if has_bias:
                    own["bias"] = np.ascontiguousarray(tensors["bias"][begin:end])
                linears.append(self._quantized_linear(key, fused, names[0], own, k, end - begin, end - begin))
            return linears

        part = self._add(fused, tensors, build, (k + has_bias) * sum(widths))
        return [Piece(part, index) for index in range(len(keys))]

    def fused_experts(
        self, within: str, name: str, inputs: int, outputs: int, experts: int, is_transposed: bool
    ) -> Sequence[Piece]:
        """The matrices called `name` of all experts, one below the other; `is_transposed`: each as [inputs, outputs]."""
        key = f"{within}.{name}"
        rows, cols = (inputs, outputs) if is_transposed else (outputs, inputs)
        self._require(key, (experts * rows, cols))
        stored = self.checkpoint.info(key).dtype

        def build(tensors: dict[str, Any]) -> list[Linear]:
            weights = [tensors["weight"][expert * rows : (expert + 1) * rows] for expert in range(experts)]
            if is_transposed:
                weights = [contiguous(self.xp, weight.T) for weight in weights]
            return [Linear(weight, None, f"{within}.{expert}.{name}", stored) for expert, weight in enumerate(weights)]

        part = self._add(key, {"weight": Wanted(key, self.weight_dtype)}, build, experts * inputs * outputs)
        return [Piece(part, expert) for expert in range(experts)]

    def _plain_weight(self, key: str, k: int, n: int) -> dict[str, Wanted]:
        self._require(f"{key}.weight", (k, n) if self.config.architecture.is_transposed and key != "lm_head" else (n, k))
        return {"weight": Wanted(f"{key}.weight", self.weight_dtype)}

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
            is_transposed = self.config.architecture.is_transposed and key != "lm_head"
            tensors = self._plain_weight(key, k, n) | bias
            stored = self.checkpoint.info(f"{key}.weight").dtype

            def build_plain(tensors: dict[str, Any]) -> Linear:
                weight = contiguous(self.xp, tensors["weight"].T) if is_transposed else tensors["weight"]
                return Linear(weight, tensors.get("bias"), key, stored)

            return self._add(key, tensors, build_plain, parameters)

        tensors = self._quantized(key, names) | bias
        widest = -(-n // 32) * 32 if is_padded else n
        return self._add(key, tensors, lambda t: self._quantized_linear(key, key, names[0], t, k, n, widest), parameters)

    def _quantized(self, key: str, names: Sequence[str]) -> dict[str, Wanted]:
        for name in names:
            if f"{key}.{name}" not in self.checkpoint:
                raise FormatError(
                    f"{self.checkpoint.folder}: tensor '{key}.{name}' is missing beside '{key}.{names[0]}'; "
                    "the checkpoint is incomplete, download or convert it again"
                )
        return {name: Wanted(f"{key}.{name}", on_host=name in _ON_HOST) for name in names}

    def _quantized_linear(
        self, key: str, stored: str, first: str, tensors: dict[str, Any], k: int, n: int, widest: int
    ) -> Linear:
        """The Linear called `key` of the tensors of `stored`, the first of which is called `first`."""
        bias = tensors.pop("bias", None)
        try:
            matrix = QMatrix.from_tensors(tensors, bias=bias, name=key, **self._gptq_options(first))
        except FormatError as error:
            raise FormatError(f"{self.checkpoint.file(f'{stored}.{first}').path}: {error}") from None
        if matrix.k != k or not n <= matrix.n <= widest:
            self.refuse(
                f"{stored}.{first}",
                f"a matrix of {matrix.k} x {matrix.n}, expected {k} x {n}, as {self.config.path.name} says",
            )
        return Linear(matrix, name=key)

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


def contiguous(xp: Any, array: Any) -> Any:
    """A copy in C order where the array is not, of its bits: CuPy's kernels need not know its dtype."""
    bits = np.dtype(f"u{array.dtype.itemsize}")
    return xp.ascontiguousarray(array.view(bits)).view(array.dtype)
