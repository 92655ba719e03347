"""Hostile files, for every reader: what is promised of them holds for damaged folders made on the spot, for those that once
broke it, and for whatever may stand in place of a file. docs/reliability.md says what is promised; tools/fuzz.py tries more."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import architecture_cases
import numpy as np
import pytest
from fuzz_mutators import KINDS, Pairs, from_text, join_safetensors, mutate, split_safetensors, to_text, write
from fuzz_targets import ROOT, TARGETS, Target, clock, encoded, exl2_tensors, little_memory, problem_of, random, stored, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cupyq.errors import FormatError, UnsupportedError
from cupyq.ext import stloader_read
from cupyq.formats.safetensors import SafetensorsFile
from cupyq.quantize.work import WorkFolder
from cupyq.tp.bootstrap import model_digest

NAMES = list(TARGETS)
EXAMPLES = 60
CORPUS = Path(__file__).parent / "fuzz_corpus"


def outcome(name, folder, case):
    write(folder, case)
    with little_memory():
        problem, said = problem_of(TARGETS[name], folder)
    assert problem is None, to_text(case)[:5000]
    return said


@pytest.mark.parametrize("name", NAMES)
def test_the_folders_to_start_from_are_read(name, tmp_path):
    for case in TARGETS[name].seeds():
        assert outcome(name, tmp_path / "case", case) == "read"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of weights that are not numbers
@pytest.mark.parametrize("name", NAMES)
def test_damaged_folders(name, tmp_path):
    """Of each reader, the same ones in every run."""
    seeds, said = TARGETS[name].seeds(), set()

    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(range(len(seeds))), st.randoms(use_true_random=False), st.integers(1, 3))
    def check(seed, rng, times):
        case = seeds[seed]
        for _ in range(times):
            case = mutate(case, rng, words(TARGETS[name]), rng.choice(seeds))
        said.add(outcome(name, tmp_path / "case", case)[:40])

    check()
    assert len(said) > 3, said


@pytest.mark.parametrize("name", NAMES)
def test_what_may_stand_in_place_of_a_file(name, tmp_path):
    """Folders, pipes, devices, links to nothing, to themselves, out of the folder; nothing at all; and every cut."""
    case = max(TARGETS[name].seeds(), key=len)
    for file, content in case.items():
        for other in (*KINDS, b"", *(content[: len(content) * part // 8] for part in range(1, 8))):
            outcome(name, tmp_path / "case", case | {file: other})
        outcome(name, tmp_path / "case", {key: value for key, value in case.items() if key != file} or {"other": b""})


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_cases_that_were_kept(path, tmp_path):
    """Of runs of tools/fuzz.py: those that reached the most lines, and those that once broke a promise."""
    outcome(path.parent.name, tmp_path / "case", from_text(path.read_text()))


# --- cases that broke a promise, or would have --------------------------------------------------------------------------


def changed(name, file, change, seed=0):
    """A seed of a target with one JSON file changed: by keys, or put in its place as text."""
    case = dict(TARGETS[name].seeds()[seed])
    old = json.loads(case[file]) if file in case else {}
    case[file] = encoded(old | change) if isinstance(change, dict) else change
    return case


def with_tensor(name, seed, file, tensor, **entry):
    """A seed with the header entry of one tensor changed, its data as it was."""
    case = dict(TARGETS[name].seeds()[seed])
    header, data = split_safetensors(case[file])
    header = {key: dict(value) | (entry if key == tensor else {}) for key, value in header}
    case[file] = join_safetensors(Pairs((key, Pairs(value.items())) for key, value in header.items()), data)
    return case


HUGE = b"9" * 400
LINEAR = "out.partial/linears/model.layers.0.mlp.up_proj"
CASES = {
    "a pattern of exponential time": (
        "adapter",
        changed("adapter", "adapter_config.json", {"rank_pattern": {"([a-z0-9._]+)+X": 2}}),
        "read",
    ),
    "a pattern that refers back": (
        "adapter",
        changed("adapter", "adapter_config.json", {"rank_pattern": {r"(q)\1": 2}}),
        "expected regular expressions as its keys",
    ),
    "more patterns than can be tried": (
        "adapter",
        changed("adapter", "adapter_config.json", {"rank_pattern": {f".*{i}.*.*.*": 2 for i in range(50_000)}}),
        "50000 expressions in 'rank_pattern' and 'alpha_pattern' take too long",
    ),
    "a line break in a layer's name": (
        "measurement",
        changed("measurement", "measurement.json", {"linears": {"a\nb\x1b[2J": {"weight": -1, "options": {}}}}),
        r"a\\nb\\x1b\[2J has -1, expected numbers",
    ),
    "an integer beyond every float": (
        "measurement",
        changed(
            "measurement",
            "measurement.json",
            b'{"cupyq_measurement": 2, "source_sha256": "0", "unit": "nats", "menu": ["4g128"], "linears": {"a.q_proj": '
            b'{"weight": ' + HUGE + b', "options": {"4g128": 0.5}}}}',
        ),
        "expected numbers from 0 to 1e.100",
    ),
    "a menu of a million parts": (
        "measurement",
        changed("measurement", "measurement.json", {"menu": ["+".join(["4g128"] * 40_000)]}),
        "menu is no list of at most 1000 layouts",
    ),
    "a number that is written but not a float": (
        "config",
        changed("config", "config.json", b'{"unused": 1e999}'),
        "not JSON .1e999 is too large for a number",
    ),
    "a value too deep to be shown": (
        "config",
        changed("config", "config.json", b'{"architectures": ' + b"[" * 950 + b"]" * 950 + b"}"),
        "not JSON that can be read .nested too deeply",
    ),
    "a key that says two things": (
        "config",
        changed("config", "config.json", b'{"hidden_size": 64, "hidden_size": 128}'),
        "the key 'hidden_size' stands twice, with two values",
    ),
    "a list of layers to be searched for each layer": (
        "config",
        {"config.json": encoded(architecture_cases.CASES["qwen3-moe"][0] | {"mlp_only_layers": [-1] * 60_000})},
        "mlp_only_layers: found .* expected a list of numbers of layers",
    ),
    "sines for 2^27 positions": (
        "model",
        changed("model", "config.json", {"max_position_embeddings": 1 << 27}),
        "134217728 positions take more than 2 GiB of sines and cosines",
    ),
    "a residual scale whose square is 0": (
        "model",
        changed("model", "config.json", {"residual_multiplier": 1e-200}, seed=5),
        "residual_multiplier: found 1e-200, expected a number above 1e-06",
    ),
    "a GPTQ matrix of no dimension, to be taken apart": (
        "model",
        with_tensor("model", 6, "model.safetensors", "model.layers.0.self_attn.qkv_proj.qweight", shape=[384], dtype="I32"),
        "tensor 'model.layers.0.self_attn.qkv_proj.qweight': not a matrix",
    ),
    "a theta of 1, whose logarithm divides": (
        "model",
        changed("model", "config.json", {"rope_theta": 1.0}, seed=3),
        "rope scaling: numbers from which no frequencies follow .* theta is 1",
    ),
    "frequencies beyond float32": (
        "model",
        changed("model", "config.json", {"rope_scaling": {"rope_type": "linear", "factor": 1e-320}}),
        "rope_scaling.factor: found|angles follow that are beyond float32",
    ),
    "a template that computes while it is compiled": (
        "chat",
        {"chat_template.jinja": b"{{ 9 ** (9 ** 9) }}{{ 'a' * 99999999999 }}{% if 'a'|center(99999999999) %}{% endif %}"},
        "read",
    ),
    "loops within loops": (
        "chat",
        {"chat_template.jinja": b"{% for a in b %}" * 30 + b"{% endfor %}" * 30},
        "no template .too many statically nested blocks",
    ),
    "half a surrogate pair in a template": (
        "chat",
        {"tokenizer_config.json": b'{"chat_template": "\\ud800"}'},
        "tokenizer_config.json: not JSON that can be read .half a surrogate pair",
    ),
    "a template longer than any": (
        "chat",
        {"chat_template.jinja": b"{{ a }}" * 60_000},
        "420000 characters, expected a template of at most 262144",
    ),
    "a tokenizer whose fault has two lines": (
        "tokenizer",
        changed("tokenizer", "tokenizer.json", {"version": "two\nlines"}),
        "not a tokenizer .Unknown tokenizer version 'two lines'",
    ),
    "a tokenizer at which its library panics": (
        "tokenizer",
        changed("tokenizer", "tokenizer.json", {"normalizer": {"type": "Precompiled"}}),
        "not a tokenizer .Precompiled: Error",
    ),
    "sensitivities of another model": (
        "resume",
        changed("resume", "out.partial/sensitivity.json", b'{"model.layers.0.mlp.up_proj": 0.5}'),
        "sensitivity.json: damaged .KeyError: 'model.layers.0.mlp.down_proj'.; delete it",
    ),
    "errors that are no numbers": (
        "resume",
        changed("resume", "out.partial/measured/layer-00000.json", {"model.layers.0.mlp.up_proj": {"tokens": "9"}}),
        "layer-00000.json: damaged .KeyError: 'output'.; delete it",
    ),
    "errors of a layer too many": (
        "resume",
        changed("resume", "out.partial/measured/layer-00000.json", {"more": {"tokens": 9, "output": 1.0, "options": {}}}),
        "layer-00000.json: damaged .ValueError: of model.layers.0.mlp.up_proj, model.layers.0.mlp.down_proj, more, expected",
    ),
    "a job of other settings": (
        "resume",
        changed("resume", "out.partial/job.json", {"bits": 3.0}),
        r"out.partial was begun with bits 3.0, not 4.0",
    ),
    "a linear layer without its report": (
        "resume",
        TARGETS["resume"].seeds()[0] | {f"{LINEAR}.safetensors": stored(exl2_tensors(), {"name": '"other"'})},
        "up_proj.safetensors: its metadata is no report of model.layers.0.mlp.up_proj; delete the file",
    ),
    "a linear layer of another shape": (
        "resume",
        TARGETS["resume"].seeds()[0] | {f"{LINEAR}.safetensors": stored(exl2_tensors(64))},
        r"up_proj.safetensors: a matrix of \[64, 32\], expected \[32, 32\]; delete the file",
    ),
    "a linear layer that is none": (
        "resume",
        TARGETS["resume"].seeds()[0] | {f"{LINEAR}.safetensors": stored({"a": random(0, 3)})},
        "up_proj.safetensors: model.layers.0.mlp.up_proj: neither EXL2 .* nor GPTQ .*; delete the file",
    ),
    "a tensor of 2^60 values": (
        "safetensors",
        with_tensor("safetensors", 1, "a.safetensors", "a", shape=[1 << 30, 1 << 30]),
        "tensor 'a': data_offsets span 6 bytes, but shape",
    ),
    "a tensor that overlaps another": (
        "safetensors",
        with_tensor("safetensors", 1, "b.safetensors", "c", data_offsets=[2, 6]),
        "tensor 'c': overlaps tensor 'b'",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_a_case_is_refused_for_what_it_is(what, tmp_path):
    name, case, message = CASES[what]
    said = outcome(name, tmp_path / "case", case)
    assert re.search(message, said), said


def test_a_file_that_shrinks_before_it_is_mapped(tmp_path, monkeypatch):
    """Between the look at its size and the map; afterwards `read_into` says so too."""
    path = tmp_path / "a.safetensors"
    write(tmp_path, {path.name: TARGETS["safetensors"].seeds()[1]["a.safetensors"]})
    whole = path.read_bytes()
    for size in (len(whole) - 1, 20, 9, 0):
        path.write_bytes(whole)
        check = SafetensorsFile._check_entries

        def cut(self, *arguments, size=size, check=check):
            os.truncate(path, size)
            return check(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsFile, "_check_entries", cut)
            with pytest.raises(FormatError, match=f"shorter than the {len(whole)} bytes it had when it was opened"):
                SafetensorsFile(path)
    path.write_bytes(whole)
    with SafetensorsFile(path) as file:
        os.truncate(path, len(whole) - 1)
        with pytest.raises(FormatError, match="tensor 'a': ends 1 bytes early"):
            file.read_into("a", np.empty(6, np.uint8))


def test_an_index_looks_at_nothing_outside_of_its_folder(tmp_path, monkeypatch):
    """Names such as ../../etc/passwd, absolute ones, and ones that no file system takes."""
    case = dict(TARGETS["model"].seeds()[3])
    outside = ["../secret", str(tmp_path / "secret"), "x" * 5000, "\0", "m0.safetensors/../../secret"]
    (tmp_path / "secret").write_text("")
    weights = json.loads(case["model.safetensors.index.json"])["weight_map"]
    asked, is_file = [], Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path) or is_file(path))
    for name in outside:
        case["model.safetensors.index.json"] = encoded({"weight_map": weights | {"more.weight": name}})
        asked.clear()
        said = outcome("model", tmp_path / "case", case)
        assert "missing though model.safetensors.index.json names it" in said
        assert {path.parent for path in asked} == {tmp_path / "case"} and name not in {path.name for path in asked}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """Opening it must not empty the file it points to."""
    (tmp_path / "kept").write_text("kept")
    case = dict(TARGETS["resume"].seeds()[0])
    write(tmp_path / "case", case | {"out.partial/lock": "dangling"})
    (tmp_path / "case/out.partial/lock").unlink()
    (tmp_path / "case/out.partial/lock").symlink_to(tmp_path / "kept")
    problem, said = problem_of(TARGETS["resume"], tmp_path / "case")
    assert problem is None and "lock: cannot be opened" in said
    assert (tmp_path / "kept").read_text() == "kept"


def test_nobody_waits_for_a_pipe(tmp_path):
    """Readers that look at files before, or without, the one that knows their format."""
    write(tmp_path / "case", TARGETS["model"].seeds()[0] | {"model.safetensors": "fifo"})
    path = tmp_path / "case/model.safetensors"
    with clock(5):
        with pytest.raises(FormatError, match="model.safetensors: no regular file"):
            model_digest(tmp_path / "case")
        with pytest.raises(OSError, match="model.safetensors' is no regular file"):
            stloader_read(str(path), 0, 4, np.zeros(4, np.uint8))
        write(tmp_path / "case", TARGETS["resume"].seeds()[0] | {"out.partial/lock": "fifo"})
        with WorkFolder(tmp_path / "case/out").locked():
            pass


def test_messages_are_one_line_of_bounded_length():
    for kind in (FormatError, UnsupportedError):
        assert str(kind("a\nb\x1b[31m\u202e\ud800 ключ")) == "a\\nb\\x1b[31m\\u202e\\ud800 ключ"
        message = str(kind(f"/folder/file: {'x' * 10**6}; mend"))
        assert message.startswith("/folder/file: xxx") and message.endswith("xxx; mend") and len(message) < 2000
        assert str(kind("plain")) == "plain" and kind(3).args == (3,)


# --- the checks bite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read, problem",
    [
        (lambda folder: {}["key"], "KeyError"),
        (lambda folder: json.loads("{"), "JSONDecodeError"),
        (lambda folder: b"\xff".decode(), "UnicodeDecodeError"),
        (lambda folder: int("x"), "names no file"),
        (lambda folder: bytearray(1 << 40), "MemoryError"),
        (lambda folder: (_ for _ in ()).throw(ValueError(f"{folder}\nline")), "not one printable line"),
        (lambda folder: (_ for _ in ()).throw(ValueError(f"{folder}" + "x" * 3000)), "3[0-9]+ characters"),
        (lambda folder: sys.exit(1), "SystemExit"),
        (lambda folder: [None for _ in iter(int, 1)], "more than 0.2 s"),
    ],
)
def test_a_reader_that_breaks_the_promise_is_caught(read, problem, tmp_path, monkeypatch):
    monkeypatch.setattr("fuzz_targets.MOST_SECONDS", 0.2)
    with little_memory():
        found, _ = problem_of(Target("bad", lambda: [], read, ()), tmp_path)
    assert found is not None and re.match(problem, found), found


def test_a_case_is_kept_as_text(tmp_path):
    case = {"a": bytes(range(256)), "b/c": "loop", "d": b""}
    assert from_text(to_text(case)) == case


def test_the_tool_runs_and_replays(tmp_path):
    command = [sys.executable, str(ROOT / "tools/fuzz.py"), "measurement", "--folder", str(tmp_path)]
    done = subprocess.run([*command, "--minutes", "0.02"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    assert line["executions"] > 10 and line["found"] == {} and line["pairs of lines"] > 50
    kept = sorted((tmp_path / "measurement/corpus").glob("*.json"))[:2]
    done = subprocess.run([*command, "--replay", *map(str, kept)], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("as promised") == len(kept) > 0, done.stderr


def test_the_tool_names_its_targets(tmp_path):
    for arguments in (["nothing"], ["all", "--replay", "a.json"]):  # a case that was kept is one target's
        command = [sys.executable, str(ROOT / "tools/fuzz.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 2 and f"target: '{arguments[0]}', expected one of" in done.stderr
    assert list(tmp_path.iterdir()) == []
