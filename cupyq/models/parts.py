"""Names of a checkpoint to the parts of a model: which tensors each is made of, and how.

Every name and shape is checked here, before a byte of weights is read.
"""

import itertools
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cupyq._arrays import float16, float32, namespace
from cupyq.errors import FormatError, UnsupportedError
from cupyq.formats.safetensors import Checkpoint
from cupyq.formats.stored import stored_kind, stored_tensors
from cupyq.layers import HeadNorm, LayerNorm, Linear, RMSNorm
from cupyq.models import upload
from cupyq.models.config import ModelConfig
from cupyq.models.names import RenamedCheckpoint
from cupyq.models.upload import Wanted
from cupyq.ops.qmatrix import QMatrix

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
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The linear layers it becomes, by name: inputs and outputs, as the whole model has them."""
    take_apart: Any = None
    """Of linear layers that are not stored as others are, several of them in one: its tensors, or some, -> those of each."""
    value: Any = None


@dataclass
class Piece:
    """One of the linear layers that a part's tensors become."""

    part: Part
    index: int

    @property
    def value(self) -> Any:
        return self.part.value[self.index]


class Plan:
    """Looks up what a model needs in a checkpoint and remembers it as parts, in the order they are used.

    Who keeps less than all of it overrides `held`, `maker`, `taken_apart` and `read`.
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, xp: Any, activations: np.dtype):
        renames = config.architecture.renames
        self.checkpoint: Any = RenamedCheckpoint(checkpoint, renames) if renames else checkpoint
        self.config, self.xp = config, xp
        self.weight_dtype = activations
        self.parts: list[Part] = []
        self.used: set[str] = set()

    # --- what is kept ---

    def held(self, key: str, k: int, n: int) -> tuple[int, int]:
        """Inputs and outputs of what is kept of a linear layer."""
        return k, n

    def maker(self, key: str, make: Callable[[dict[str, Any]], Linear]) -> Callable[[dict[str, Any]], Any]:
        """What makes a linear layer of its tensors, or of those that are kept."""
        return make

    def taken_apart(self, part: Part, tensors: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """The tensors of each of the linear layers that are stored as one, or those that are kept."""
        return part.take_apart(tensors)

    def read(self, parts: Iterable[Part]) -> Generator[tuple[Part, dict[str, Any]], None, None]:
        """Each part and the tensors to build it of."""
        return upload.read(self.checkpoint, parts, self.xp)

    # --- parts ---

    def _add(self, key: str, tensors: Mapping[str, Wanted], build: Callable[[dict[str, Any]], Any], parameters: int) -> Part:
        self.used.update(wanted.name for wanted in tensors.values())
        nbytes = self.checkpoint.total_bytes(wanted.name for wanted in tensors.values())
        self.parts.append(Part(key, tensors, build, nbytes, parameters, self._kind_of(tensors)))
        return self.parts[-1]

    def _add_linear(
        self, key: str, tensors: Mapping[str, Wanted], k: int, n: int, parameters: int, make: Callable[[dict[str, Any]], Linear]
    ) -> Part:
        part = self._add(key, tensors, self.maker(key, make), parameters)
        part.linears = {key: (k, n)}
        return part

    def _add_apart(
        self,
        stored: str,
        tensors: Mapping[str, Wanted],
        linears: Mapping[str, tuple[int, int]],
        parameters: int,
        take_apart: Callable[[dict[str, Any]], Iterable[dict[str, Any]]],
        make: Callable[[str, dict[str, Any]], Linear],
    ) -> list[Piece]:
        """Linear layers of tensors that have to be taken apart first; make(name, its tensors) makes each."""
        makers = [self.maker(key, partial(make, key)) for key in linears]

        def build(tensors: dict[str, Any]) -> list[Any]:
            return [make(own) for make, own in zip(makers, self.taken_apart(part, tensors), strict=True)]

        part = self._add(stored, tensors, build, parameters)
        part.linears, part.take_apart = linears, take_apart
        return [Piece(part, index) for index in range(len(linears))]

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
        """The linear layer that makes logits; N may be rounded up to 32."""
        if not self.config.normalizes_head or f"{key}.weight" not in self.checkpoint:
            return self._whole_linear(key, k, n, is_padded=True)
        name = f"{key}.weight"
        self._require(name, (n, k))
        stored = self.checkpoint.info(name).dtype

        def make(tensors: dict[str, Any]) -> Linear:
            weight = tensors["weight"]
            lengths = np.sqrt(np.sum(weight * weight, axis=1, keepdims=True))
            weight = (weight / np.maximum(lengths, np.float32(1e-12))).astype(self.weight_dtype)
            return Linear(self.xp.asarray(weight), None, key, stored)

        return self._add_linear(key, {"weight": Wanted(name, float32, on_host=True)}, k, n, k * n, make)

    def side_by_side(
        self, keys: Sequence[str], fused: str | None, k: int, widths: Sequence[int], has_bias: bool, split: Callable[[Any], Any]
    ) -> Sequence[Part | Piece]:
        """Linear layers of one input; made of one where the checkpoint has them fused.

        split: rows of an array [sum of widths, ...], in the order of the fused tensor, to an array for each layer.
        """
        linears = {key: (k, n) for key, n in zip(keys, widths, strict=True)}
        if fused is not None and not any(stored_kind(self.checkpoint, key) == "exl2" for key in keys):
            kind = stored_kind(self.checkpoint, fused)
            if kind == "plain":
                return self._plain_apart(fused, linears, has_bias, split)
            if kind == "gptq":
                return self._gptq_apart(fused, linears, has_bias)
        return [self.linear(key, k, n, has_bias) for key, n in zip(keys, widths, strict=True)]

    def _plain_apart(
        self, stored: str, linears: Mapping[str, tuple[int, int]], has_bias: bool, split: Callable[[Any], Any]
    ) -> Sequence[Piece]:
        """Unquantized layers of one input that are stored in one, or one that is stored the other way round."""
        (k, *_), widths = zip(*linears.values(), strict=True)
        is_transposed = self.config.architecture.is_transposed
        tensors = self._plain_weight(stored, k, sum(widths), is_transposed) | self._bias(stored, sum(widths), has_bias)
        dtype = self.checkpoint.info(f"{stored}.weight").dtype

        def take_apart(tensors: dict[str, Any]) -> Iterable[dict[str, Any]]:
            columns = []
            for short, array in tensors.items():
                if is_transposed and short == "weight":
                    array = contiguous(array.T)
                columns.append([(short, own) for own in split(array)])
            return [dict(own) for own in zip(*columns, strict=True)]

        parameters = (k + has_bias) * sum(widths)
        return self._add_apart(stored, tensors, linears, parameters, take_apart, partial(_plain_linear, dtype))

    def _gptq_apart(self, stored: str, linears: Mapping[str, tuple[int, int]], has_bias: bool) -> Sequence[Piece]:
        """A column of a GPTQ matrix is its own: one side by side with others is columns of what the file has."""
        (k, *_), widths = zip(*linears.values(), strict=True)
        if self.config.architecture.qkv_layout != "rows" or any(width % 32 for width in widths):
            raise UnsupportedError(
                f"{self._place(f'{stored}.qweight')}: several matrices in one, of widths {list(widths)}; cupyq takes GPTQ "
                "tensors apart where they lie side by side and are multiples of 32 wide: quantize the projections one by one"
            )
        names = stored_tensors(self.checkpoint, stored)
        tensors = self._quantized(stored, names) | self._bias(stored, sum(widths), has_bias)
        for name in names:
            if len(self.checkpoint.info(f"{stored}.{name}").shape) != (1 if name == "g_idx" else 2):
                self.refuse(f"{stored}.{name}", "not a matrix" if name != "g_idx" else "not a list of groups")
        bits = 32 * self.checkpoint.info(f"{stored}.qweight").shape[0] // k
        ends = list(itertools.accumulate(widths))

        def take_apart(tensors: dict[str, Any]) -> Iterable[dict[str, Any]]:
            for begin, end in zip([0, *ends], ends, strict=False):
                columns = {"qweight": slice(begin, end), "scales": slice(begin, end), "bias": slice(begin, end)}
                columns["qzeros"] = slice(begin * bits // 32, end * bits // 32)
                yield {
                    short: contiguous(array[..., columns[short]]) if short in columns else array
                    for short, array in tensors.items()
                }

        def make(key: str, tensors: dict[str, Any]) -> Linear:
            return self._quantized_linear(key, stored, names[0], tensors, *linears[key])

        return self._add_apart(stored, tensors, linears, (k + has_bias) * sum(widths), take_apart, make)

    def fused_experts(
        self, within: str, name: str, inputs: int, outputs: int, experts: int, is_transposed: bool
    ) -> Sequence[Piece]:
        """The matrices called `name` of all experts, one below the other; `is_transposed`: each as [inputs, outputs]."""
        key = f"{within}.{name}"
        rows, cols = (inputs, outputs) if is_transposed else (outputs, inputs)
        self._require(key, (experts * rows, cols))
        linears = {f"{within}.{expert}.{name}": (inputs, outputs) for expert in range(experts)}

        def take_apart(tensors: dict[str, Any]) -> Iterable[dict[str, Any]]:
            weights = split_rows(tensors["weight"], [rows] * experts)
            return [{"weight": contiguous(weight.T) if is_transposed else weight} for weight in weights]

        make = partial(_plain_linear, self.checkpoint.info(key).dtype)
        tensors = {"weight": Wanted(key, self.weight_dtype)}
        return self._add_apart(key, tensors, linears, experts * inputs * outputs, take_apart, make)

    def _plain_weight(self, key: str, k: int, n: int, is_transposed: bool = False) -> dict[str, Wanted]:
        self._require(f"{key}.weight", (k, n) if is_transposed else (n, k))
        return {"weight": Wanted(f"{key}.weight", self.weight_dtype)}

    def linear(self, key: str, k: int, n: int, has_bias: bool = False) -> Part | Piece:
        """EXL2, GPTQ or unquantized, whichever tensors there are."""
        if self.config.architecture.is_transposed and not self._is_quantized(key):
            return self._plain_apart(key, {key: (k, n)}, has_bias, lambda array: [array])[0]
        return self._whole_linear(key, k, n, has_bias)

    def _whole_linear(self, key: str, k: int, n: int, has_bias: bool = False, is_padded: bool = False) -> Part:
        parameters = k * n + n * has_bias
        if not self._is_quantized(key):
            tensors = self._plain_weight(key, k, n) | self._bias(key, n, has_bias)
            dtype = self.checkpoint.info(f"{key}.weight").dtype
            return self._add_linear(key, tensors, k, n, parameters, partial(_plain_linear, dtype, key))

        names = stored_tensors(self.checkpoint, key)
        tensors = self._quantized(key, names) | self._bias(key, n, has_bias)

        def make(tensors: dict[str, Any]) -> Linear:
            return self._quantized_linear(key, key, names[0], tensors, k, n, is_padded)

        return self._add_linear(key, tensors, k, n, parameters, make)

    def _is_quantized(self, key: str) -> bool:
        return stored_kind(self.checkpoint, key) in ("exl2", "gptq")

    def _quantized(self, key: str, names: Sequence[str]) -> dict[str, Wanted]:
        for name in names:
            if f"{key}.{name}" not in self.checkpoint:
                raise FormatError(
                    f"{self.checkpoint.folder}: tensor '{key}.{name}' is missing beside '{key}.{names[0]}'; "
                    "the checkpoint is incomplete, download or convert it again"
                )
        return {name: Wanted(f"{key}.{name}", on_host=name in _ON_HOST) for name in names}

    def _quantized_linear(
        self, key: str, stored: str, first: str, tensors: dict[str, Any], k: int, n: int, is_padded: bool = False
    ) -> Linear:
        """The Linear called `key` of the tensors of `stored`, the first of which is called `first`."""
        bias = tensors.pop("bias", None)
        try:
            matrix = QMatrix.from_tensors(tensors, bias=bias, name=key, **self._gptq_options(first))
        except FormatError as error:
            raise FormatError(f"{self.checkpoint.file(f'{stored}.{first}').path}: {error}") from None
        k, n = self.held(key, k, n)
        widest = -(-n // 32) * 32 if is_padded else n
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
            if self._is_quantized(key):
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


def _plain_linear(stored_dtype: np.dtype, key: str, tensors: dict[str, Any]) -> Linear:
    return Linear(tensors["weight"], tensors.get("bias"), key, stored_dtype)


def split_rows(array: Any, heights: Sequence[int]) -> list[Any]:
    """The array's rows in parts of so many each."""
    ends = list(itertools.accumulate(heights))
    return [array[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def contiguous(array: Any) -> Any:
    """A copy in C order where the array is not, of its bits: CuPy's kernels need not know its dtype."""
    bits = np.dtype(f"u{array.dtype.itemsize}")
    return namespace(array=array).ascontiguousarray(array.view(bits)).view(array.dtype)
