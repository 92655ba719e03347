"""What reads files from outside: for each reader small well-formed folders to start from, and a call that reads one.

`tools/fuzz.py` runs them for hours, `test_fuzz.py` for seconds.
"""

import ast
import contextlib
import io
import json
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import architecture_cases
import numpy as np
from fuzz_mutators import TEMPLATE, Case, file_of

from cupyq.errors import CupyqError, FormatError, UnsupportedError
from cupyq.formats.exl2 import pack_exl2
from cupyq.formats.gptq import pack_gptq
from cupyq.formats.safetensors import Checkpoint, SafetensorsFile
from cupyq.generate.text import load_tokenizer
from cupyq.layers.lora import Adapter
from cupyq.models.chat_template import ChatTemplate
from cupyq.models.config import ModelConfig
from cupyq.models.loader import open_blueprint
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.reconstruct import reconstruct
from cupyq.quantize import writer
from cupyq.quantize.calibration import calibration_rows
from cupyq.quantize.layouts import Layout
from cupyq.quantize.measurement import Measurement, read_errors, read_worths, weighted
from cupyq.quantize.report import Comparison, LinearReport, read_report, summary, table
from cupyq.quantize.work import WorkFolder, check_settings

ROOT = Path(__file__).parent.parent
MOST_SECONDS, MOST_BYTES = 10.0, 3 << 30


@dataclass(frozen=True)
class Target:
    name: str
    seeds: Callable[[], list[Case]]
    read: Callable[[Path], object]
    sources: tuple[str, ...]
    """Files of cupyq whose words are worth trying as keys."""
    words: tuple[str, ...] = ()


@cache
def words(target: Target) -> list[str]:
    """The strings in a target's sources and the file names of its seeds."""
    found = set(target.words)
    for source in target.sources:
        for node in ast.walk(ast.parse((ROOT / "cupyq" / source).read_text())):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and len(node.value) < 60
                and " " not in node.value
            ):
                found.add(node.value)
    return sorted(found | {name for seed in target.seeds() for name in seed})


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


# --- tensors ----------------------------------------------------------------------------------------------------------

_NAMES = {"float16": "F16", "float32": "F32", "int32": "I32", "int16": "I16", "uint8": "U8", "bool": "BOOL", "float64": "F64"}


def stored(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    entries = [(name, _NAMES[str(a.dtype)], list(a.shape), a.tobytes()) for name, a in tensors.items()]
    return file_of(entries, [("__metadata__", metadata)] if metadata else ())


def random(seed: int, *shape: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float16)


def exl2_tensors(k: int = 32, n: int = 32) -> dict[str, np.ndarray]:
    rng, groups = np.random.default_rng(1), k // 32
    bits = [4] * groups if groups == 1 else [5, *[3] * (groups - 1)]
    codes = np.concatenate([rng.integers(0, 1 << b, (32, n)) for b in bits])
    maxima = np.full(groups, 0.01, np.float16)
    return pack_exl2(codes, rng.integers(0, 16, (groups, n)), maxima, bits, [32] * groups, rng.permutation(k))


def gptq_tensors(k: int = 32, n: int = 32, g_idx: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    groups = np.arange(k) // 32
    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(1, 17, (k // 32, n))
    return pack_gptq(codes, zeros, np.full((k // 32, n), 0.01, np.float16), groups if g_idx else None, 4)


def prefixed(tensors: dict[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    return {f"{key}.{name}": array for name, array in tensors.items()}


# --- safetensors ------------------------------------------------------------------------------------------------------


def _safetensors_seeds() -> list[Case]:
    many = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones(4, np.bool_), "none": np.empty((0, 4), np.int32)}
    return [
        {"model.safetensors": stored(many, {"format": "pt"})},
        {"a.safetensors": stored({"a": random(0, 3)}), "b.safetensors": stored({"b": random(1, 2), "c": random(2, 1, 1, 2)})},
        {"model.safetensors": stored({})},
    ]


def _read_safetensors(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            for name in file.names:
                array = file.array(name)
                buffer = np.empty(array.nbytes, np.uint8)
                file.read_into(name, buffer)
                if not np.array_equal(buffer, array.reshape(-1).view(np.uint8)):
                    raise AssertionError(f"{name}: read_into and array differ")
    with Checkpoint(folder) as checkpoint:
        for name in checkpoint.names:
            checkpoint.info(name)
        checkpoint.total_bytes(checkpoint.names)


# --- quantized matrices -----------------------------------------------------------------------------------------------


def _exl2_seeds() -> list[Case]:
    return [{"m.safetensors": stored(exl2_tensors(k))} for k in (32, 96)]


def _gptq_seeds() -> list[Case]:
    return [{"m.safetensors": stored(gptq_tensors(k, g_idx=g_idx))} for k in (32, 96) for g_idx in (True, False)]


def _read_matrix(folder: Path) -> None:
    with SafetensorsFile(folder / "m.safetensors") as file:
        tensors = {name: file.array(name) for name in file.names}
    reconstruct(QMatrix.from_tensors(tensors, name=f"{folder}: layer"))


# --- config.json ------------------------------------------------------------------------------------------------------


def _config_seeds() -> list[Case]:
    configs = [keys for keys, _ in architecture_cases.CASES.values()]
    seeds = [{"config.json": encoded(keys)} for keys in configs]
    published = sorted(ROOT.glob("tests/models/*/config*.json")) + sorted(ROOT.glob("examples/models/*/config.json"))
    seeds += [{"config.json": path.read_bytes()} for path in published]
    beside = (ROOT / "examples/models/shakespeare-gptq-g32/quantize_config.json").read_bytes()
    return [*seeds, {"config.json": encoded(configs[0]), "quantize_config.json": beside}]


def _read_config(folder: Path) -> None:
    ModelConfig.from_file(folder)


# --- whole models -----------------------------------------------------------------------------------------------------

_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LINEARS = {f"self_attn.{p}_proj": (32, n) for p, n in (("q", 32), ("k", 16), ("v", 16), ("o", 32))}
_LINEARS |= {f"mlp.{p}_proj": (32, 32) for p in ("gate", "up", "down")}


def _tiny_tensors(linear: Callable[[int, int], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    tensors = {
        "model.embed_tokens.weight": random(0, 32, 32),
        "model.norm.weight": random(1, 32),
        "lm_head.weight": random(2, 32, 32),
    }
    tensors |= {f"model.layers.0.{name}.weight": random(3, 32) for name in _NORMS}
    for name, (k, n) in _LINEARS.items():
        tensors |= prefixed(linear(k, n), f"model.layers.0.{name}")
    return tensors


def _model_seeds() -> list[Case]:
    plain = _tiny_tensors(lambda k, n: {"weight": random(k + n, n, k)})
    exl2, gptq = _tiny_tensors(exl2_tensors), _tiny_tensors(lambda k, n: gptq_tensors(k, 32))
    wide = {"head_dim": 16, "num_key_value_heads": 2}
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    halves = [dict(list(plain.items())[::2]), dict(list(plain.items())[1::2])]
    index = {"weight_map": {name: f"m{i}.safetensors" for i, half in enumerate(halves) for name in half}}
    seeds: list[Case] = [
        {"config.json": encoded(_TINY), "model.safetensors": stored(plain)},
        {"config.json": encoded(_TINY | {"quantization_config": {"quant_method": "exl2"}}), "model.safetensors": stored(exl2)},
        {"config.json": encoded(_TINY | wide | {"quantization_config": quantization}), "model.safetensors": stored(gptq)},
        {
            "config.json": encoded(_TINY | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
            "m0.safetensors": stored(halves[0]),
            "m1.safetensors": stored(halves[1]),
            "model.safetensors.index.json": encoded(index),
        },
    ]
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32,
    }
    seeds.append({"config.json": encoded(_TINY | {"rope_scaling": longrope}), "model.safetensors": stored(plain)})
    tied = {name: array for name, array in plain.items() if name != "lm_head.weight"}
    scaled = _TINY | {"architectures": ["GraniteForCausalLM"], "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
    scaled |= {"logits_scaling": 2.0, "attention_multiplier": 0.25, "tie_word_embeddings": True}
    seeds.append({"config.json": encoded(scaled), "model.safetensors": stored(tied)})
    # GPTQ with three matrices, or two, in one.
    apart = {name: array for name, array in gptq.items() if not any(part in name for part in ("self_attn", "gate", "up_proj"))}
    joined = {"self_attn.qkv_proj": 96, "mlp.gate_up_proj": 64, "self_attn.o_proj": 32}
    for name, n in joined.items():
        apart |= prefixed(gptq_tensors(32, n), f"model.layers.0.{name}")
    phi3 = _TINY | wide | {"architectures": ["Phi3ForCausalLM"], "quantization_config": quantization}
    seeds.append({"config.json": encoded(phi3), "model.safetensors": stored(apart)})
    return seeds


def _read_model(folder: Path) -> None:
    with open_blueprint(folder, "numpy", dtype="float16") as blueprint, contextlib.redirect_stderr(io.StringIO()):
        blueprint.load()
        blueprint.model()
    with Checkpoint(folder) as checkpoint:
        writer.check_shards(checkpoint)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _adapter_seeds() -> list[Case]:
    key = "base_model.model.model.layers.0"
    pairs = {f"{key}.mlp.up_proj.lora_A.weight": random(0, 4, 32), f"{key}.mlp.up_proj.lora_B.weight": random(1, 32, 4)}
    more = {
        f"{key}.self_attn.q_proj.lora_A.weight": random(2, 2, 32),
        f"{key}.self_attn.q_proj.lora_B.weight": random(3, 32, 2),
    }
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "bias": "none"}
    patterns = plain | {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"layers\.\d+\.self_attn.(q|k)_proj": 3},
        "use_rslora": True,
    }
    return [
        {"adapter_config.json": encoded(plain), "adapter_model.safetensors": stored(pairs)},
        {"adapter_config.json": encoded(patterns), "adapter_model.safetensors": stored(pairs | more)},
    ]


def _read_adapter(folder: Path) -> None:
    for pair in Adapter.from_peft(folder).projections.values():
        pair.arrays(np.dtype(np.float16))


# --- tokenizers and chat templates ------------------------------------------------------------------------------------

_CHAT = "{% for message in messages %}<|{{ message['role'] }}|>{{ message.content | trim }}{{ eos_token }}{% endfor %}"


def _chat_seeds() -> list[Case]:
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    several = [{"name": "default", "template": _CHAT}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    return [
        {"tokenizer_config.json": encoded(tokens | {"chat_template": _CHAT})},
        {"tokenizer_config.json": encoded(tokens | {"chat_template": several}), "special_tokens_map.json": encoded(tokens)},
        {"chat_template.json": encoded({"chat_template": _CHAT}), "tokenizer_config.json": encoded(tokens)},
        {"chat_template.jinja": _CHAT.encode(), "tokenizer_config.json": encoded(tokens)},
    ]


def _read_chat(folder: Path) -> None:
    ChatTemplate.from_folder(folder)


_TOKENIZER_WORDS = ("Precompiled", "precompiled_charsmap", "WordPiece", "WordLevel", "Metaspace", "replacement", "Fixed")
_TOKENIZER_WORDS += ("Strip", "Fuse", "CTC", "Prepend", "strategy", "direction", "max_length", "stride", "pad_to_multiple_of")
_TOKENIZER_WORDS += (
    "continuing_subword_prefix",
    "max_input_chars_per_word",
    "dropout",
    "byte_fallback",
    "FixedLength",
    "length",
)
_TOKENIZER_WORDS += (
    "BertProcessing",
    "RobertaProcessing",
    "Lowercase",
    "StripAccents",
    "Digits",
    "Punctuation",
    "UnicodeScripts",
)


def _tokenizer_seeds() -> list[Case]:
    vocab = {letter: index for index, letter in enumerate(["<s>", *"abcdĠ", "ab", "abc"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]]}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    token = {
        "id": 0,
        "content": "<s>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [token], "normalizer": None}
    whole |= {"pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]], "byte_fallback": False}
    split = {"type": "Split", "pattern": {"Regex": "a|b+"}, "behavior": "Isolated", "invert": False}
    steps = [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "_"}]
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }
    template |= {
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    other = whole | {
        "model": unigram,
        "pre_tokenizer": split,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": None,
    }
    return [{"tokenizer.json": encoded(whole)}, {"tokenizer.json": encoded(other | {"post_processor": template})}]


def _read_tokenizer(folder: Path) -> None:
    load_tokenizer(folder)


# --- the quantizer's files --------------------------------------------------------------------------------------------


def _measurement(unit: str) -> dict:
    options = {"4g128": 1e-3, "3g64": 2e-3, "4x.1g128+3x.9g128": 1.5e-3}
    linears = {name: {"tokens": 10, "output": 2.0, "weight": 0.5, "options": options} for name in ("a.q_proj", "a.k_proj")}
    return {"cupyq_measurement": 2, "source_sha256": "0" * 64, "unit": unit, "menu": list(options), "linears": linears}


def _measurement_seeds() -> list[Case]:
    return [{"measurement.json": encoded(_measurement(unit))} for unit in ("nats", "share")]


def _read_measurement(folder: Path) -> None:
    found = Measurement.from_file(folder / "measurement.json")
    found.check_names(["a.q_proj", "a.k_proj"])
    found.check_source("0" * 64)
    json.dumps([found.to_json(), found.sha256, found.worths], allow_nan=False)
    found.allocate(["a.q_proj", "a.k_proj"], lambda name, layout: Layout.parse(layout.name).storage_bits(128, 64), 10**6)


def _calibration_seeds() -> list[Case]:
    tokenizer = _tokenizer_seeds()[0]
    lines = b"\n".join(encoded({"text": "abc ab " * 8}) for _ in range(4))
    return [tokenizer | {"t.txt": b"abc ab\nabcd\n" * 9}, tokenizer | {"t.jsonl": lines}]


def _read_calibration(folder: Path) -> None:
    path = next(
        (folder / name for name in ("t.txt", "t.jsonl") if (folder / name).is_symlink() or (folder / name).exists()),
        folder / "t.txt",
    )
    calibration_rows(path, folder, rows=2, length=4)


_SETTINGS = {"bits": 4.0, "format": "exl2", "seed": 0, "calibration_sha256": "0" * 64}
_NAMES_OF_LAYER = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


def _resume_seeds() -> list[Case]:
    options = {"4g128": 1e-3, "3g64": 2e-3}
    case: Case = {
        "out.partial/job.json": encoded(_SETTINGS),
        "out.partial/lock": b"",
        "out.partial/sensitivity.json": encoded(dict.fromkeys(_NAMES_OF_LAYER, 0.25)),
        "out.partial/measured/layer-00000.json": encoded(
            {name: {"tokens": 9, "output": 2.0, "options": options} for name in _NAMES_OF_LAYER}
        ),
    }
    reports = [LinearReport(name, 32, 32, "4g128", 5000, 0.01, 2.0, 9, 0.1) for name in _NAMES_OF_LAYER]
    for report in reports:
        values = {key: json.dumps(value) for key, value in vars(report).items()}
        case[f"out.partial/linears/{report.name}.safetensors"] = stored(exl2_tensors(), values)
    comparison = vars(Comparison("calibration text", 9.0, 8.0, 0.1, 0.9, 64))
    data = {"settings": _SETTINGS, "bits_per_weight": 4.9, "comparison": comparison, "layers": [vars(r) for r in reports]}
    return [case | {"out/quantization.json": encoded(data)}]


def _read_resume(folder: Path) -> None:
    """What a resumed run reads, in its order; a report that does not read counts as none."""
    found = read_report(folder / "out")
    if found is not None:
        summary(found[1], found[2]), table(found[1])
        check_settings(folder / "out", found[0], _SETTINGS)
    work = WorkFolder(folder / "out")
    with work.locked():
        work.begin(_SETTINGS)
        worths = read_worths(work.sensitivity, _NAMES_OF_LAYER)
        linears = weighted(read_errors(work.measured(0), _NAMES_OF_LAYER), 10, worths)
        json.dumps(linears, allow_nan=False)
        for name in _NAMES_OF_LAYER:
            work.weights(name, (32, 32), np, {})
            for tensor in work.tensors(name):
                tensor.read()
        reports = [work.report(name) for name in _NAMES_OF_LAYER]
        summary(reports, None), table(reports)


TARGETS = {
    target.name: target
    for target in (
        Target("safetensors", _safetensors_seeds, _read_safetensors, ("formats/safetensors.py",)),
        Target("exl2", _exl2_seeds, _read_matrix, ("formats/exl2.py",)),
        Target("gptq", _gptq_seeds, _read_matrix, ("formats/gptq.py",)),
        Target("config", _config_seeds, _read_config, ("models/config.py", "models/architectures.py")),
        Target("model", _model_seeds, _read_model, ("models/config.py", "models/parts.py", "models/loader.py", "ops/rope.py")),
        Target("adapter", _adapter_seeds, _read_adapter, ("layers/lora.py",)),
        Target("chat", _chat_seeds, _read_chat, ("models/chat_template.py",), TEMPLATE),
        Target("tokenizer", _tokenizer_seeds, _read_tokenizer, ("generate/text.py",), _TOKENIZER_WORDS),
        Target("measurement", _measurement_seeds, _read_measurement, ("quantize/measurement.py",)),
        Target("resume", _resume_seeds, _read_resume, ("quantize/work.py", "quantize/measurement.py", "quantize/report.py")),
        Target("calibration", _calibration_seeds, _read_calibration, ("quantize/calibration.py",)),
    )
}


# --- what a reader may do ---------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """Raised by the clock; no reader may catch it."""


@contextlib.contextmanager
def clock(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise TooSlow(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory(more: int = MOST_BYTES) -> Iterator[None]:
    """So many bytes of address space more than there are now: beyond them, MemoryError."""
    sizes = Path("/proc/self/statm")
    if not sizes.exists():  # not Linux
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(sizes.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def problem_of(target: Target, folder: Path) -> tuple[str | None, str]:
    """(what is wrong with how a reader took a folder, or None; what it said of it).

    It may read it, or raise a ValueError on one line that names the file. All else is wrong: other exceptions, several lines,
    characters that steer a terminal, more than 10 seconds.
    """
    try:
        with clock(MOST_SECONDS):
            target.read(folder)
        return None, "read"
    except (CupyqError, ValueError) as error:
        message = str(error)
        what = None
        if type(error) not in (FormatError, UnsupportedError, ValueError):
            what = f"{type(error).__name__}: {message[:200]}"
        elif str(folder) not in message:
            what = f"names no file: {message[:200]}"
        elif not message.isprintable():
            what = f"not one printable line: {message[:300]!r}"
        elif len(message) > 2000:
            what = f"{len(message)} characters: {message[:100]}"
        if what is not None:
            what += f" ({_place(error)})"
        return what, message.replace(str(folder), "")
    except TooSlow as error:
        return f"{error} ({_place(error)})", "slow"
    except (Exception, MemoryError, SystemExit) as error:
        return f"{type(error).__name__}: {str(error)[:200]} ({_place(error)})", "crash"
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return f"{type(error).__name__}: {str(error)[:200]} ({_place(error)})", "crash"


def _place(error: BaseException) -> str:
    """The last line of cupyq's that an exception came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/cupyq/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
