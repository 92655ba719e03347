"""The command line: JSON keys, what goes where, and one line for every wrong input."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, needs_cupy

from cupyq import _device, _kernels, cli, doctor
from cupyq.cli import main
from cupyq.errors import BackendError
from cupyq.generate import SamplerSettings
from cupyq.generate.arguments import sampler_settings
from cupyq.layers import CACHE_KINDS
from cupyq.models.model import Model
from cupyq.ops import norm

MODELS = ROOT / "examples/models"
EXL2 = str(MODELS / "shakespeare-exl2-4.0")
GPTQ = str(MODELS / "shakespeare-gptq-g32")
PLAIN = str(MODELS / "shakespeare")

KEYS = {
    "doctor": {"ok", "backend", "checks"},
    "inspect": {"architecture", "format", "bits_per_weight", "parameters", "layers"},
    "generate": {"backend", "prompt_tokens", "tokens", "text", "prefill_tokens_per_s", "decode_tokens_per_s"},
    "perplexity": {"perplexity", "tokens", "kl", "top1"},
    "quantize": {"bits_per_weight", "seconds", "comparison", "layers"},
    "compile": {"kernels", "seconds"},
    "bench": {"rows"},
}


@pytest.fixture
def run_json(capsys):
    """Run a command with --json -> the object, after checking that it is all of stdout and has the promised keys."""

    def run(*arguments, code=0):
        assert main([*arguments, "--json"]) == code
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert len(lines) == 1 and captured.out.endswith("\n")
        result = json.loads(lines[0])
        assert result.keys() == KEYS[arguments[0]]
        return result, captured.err

    return run


@pytest.fixture
def refused(capsys):
    """Run a command that must fail -> its one line on stderr."""

    def run(*arguments):
        assert main(list(map(str, arguments))) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("cupyq: error: ")
        return lines[0]

    return run


@pytest.fixture
def copy(tmp_path):
    """A model folder that a test may damage."""

    def make(source=EXL2):
        return shutil.copytree(source, tmp_path / "model")

    return make


def run_process(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "cupyq", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, **options
    )


# --- the program ------------------------------------------------------------------------------------------------------


def test_help_shows_every_command_and_examples(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in KEYS) and "examples:" in text
    assert main([]) == 0
    assert capsys.readouterr().out == text
    for name in KEYS:
        assert main([name, "--help"]) == 0
        assert "--json" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    script = (
        "import sys, cupyq.cli; cupyq.cli.main(['generate', '--help']);"
        "sys.exit(str({'cupy', 'tokenizers', 'tqdm', 'cupyq._kernels', 'cupyq.models', 'cupyq.ops'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "set()"


def test_version_as_a_module():
    done = run_process("--version")
    assert done.returncode == 0 and done.stdout.startswith("cupyq ") and done.stderr == ""


def test_text_comes_from_the_program_as_a_process():
    done = run_process("generate", EXL2, "--prompt", "ROMEO:", "--greedy", "--max-new-tokens", "4", "--backend", "numpy")
    assert done.returncode == 0 and len(done.stdout) > 1 and "tokens/s" in done.stderr and "tokens/s" not in done.stdout


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "cupyq", "inspect", EXL2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    process.stdout.close()  # long before the first line
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", interrupt)
    assert main(["doctor"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.strip() == ""


def test_an_unexpected_error_is_one_line_too(monkeypatch, refused):
    def fail():
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "diagnose", fail)
    assert refused("doctor").startswith("cupyq: error: RuntimeError: first line second line (unexpected")


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "bits", "head"),
    [(EXL2, "exl2", 4.0, "exl2"), (GPTQ, "gptq", 4.71875, "float16"), (PLAIN, "float16", 16.0, "float16")],
)
def test_inspect(run_json, path, kind, bits, head):
    result, shown = run_json("inspect", path)
    assert result["architecture"] == "LlamaForCausalLM" and result["format"] == kind
    # GPTQ: 4 bits, for each group of 32 rows a 16-bit scale and a 4-bit zero, for each row 32 bits of g_idx.
    assert result["bits_per_weight"] == pytest.approx(bits, abs=1e-3)
    layers = result["layers"]
    assert len(layers) == 4 * 7 + 1
    assert all(layer.keys() == {"name", "shape", "kind", "bits"} for layer in layers)
    assert [layer["kind"] for layer in layers] == [kind] * 28 + [head]
    down = next(layer for layer in layers if layer["name"] == "model.layers.2.mlp.down_proj")
    assert down["shape"] == [768, 256]
    # Embedding, two norms a layer and the last one besides the matrices.
    assert result["parameters"] == sum(k * n for k, n in (x["shape"] for x in layers)) + 1024 * 256 + 9 * 256
    assert "model.layers.2.mlp.down_proj" in shown


def test_inspect_for_people(capsys):
    assert main(["inspect", EXL2]) == 0
    captured = capsys.readouterr()
    assert "LlamaForCausalLM" in captured.out and "lm_head" in captured.out and captured.err == ""


# --- generate ---------------------------------------------------------------------------------------------------------


def recorded(path):
    with open(f"{path}/greedy.json") as file:
        return json.load(file)


@pytest.mark.parametrize("path", [PLAIN, GPTQ])
def test_generate_from_tokens(run_json, path):
    golden = recorded(path)
    prompt = ",".join(map(str, golden["prompt"]))
    result, shown = run_json("generate", path, "--tokens", prompt, "--greedy", "--max-new-tokens", "12", "--backend", "numpy")
    assert result["tokens"] == golden["greedy"][:12] and result["prompt_tokens"] == golden["prompt"]
    assert result["backend"] == "numpy"
    assert result["prefill_tokens_per_s"] > 0 and result["decode_tokens_per_s"] > 0
    assert result["text"] in shown and len(result["text"]) > 4


def test_generate_from_text_streams_to_stdout(capsys):
    arguments = ["generate", EXL2, "--prompt", "ROMEO:\n", "--seed", "5", "--max-new-tokens", "8", "--backend", "numpy"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out and first.out.strip()
    assert "seed 5" in first.err and "8 new tokens" in first.err


def test_generate_needs_no_tokenizer_for_tokens(run_json, copy):
    folder = copy(PLAIN)
    (folder / "tokenizer.json").unlink()
    golden = recorded(PLAIN)
    prompt = ",".join(map(str, golden["prompt"]))
    result, shown = run_json("generate", str(folder), "--tokens", prompt, "--greedy", "--max-new-tokens", "3")
    assert result["tokens"] == golden["greedy"][:3] and result["text"] is None
    assert ",".join(map(str, result["tokens"])) in shown


def test_generate_stops_at_the_end_token(run_json, copy):
    golden = recorded(PLAIN)
    folder = copy(PLAIN)
    config = json.loads((folder / "config.json").read_text())
    stop = golden["greedy"][2]
    assert stop not in golden["greedy"][:2]
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, stop]}))
    prompt = ",".join(map(str, golden["prompt"]))
    result, _ = run_json("generate", str(folder), "--tokens", prompt, "--greedy", "--max-new-tokens", "9")
    assert result["tokens"] == golden["greedy"][:2]


def test_a_context_too_long_for_tables_is_cut_where_asked(run_json, refused, copy):
    folder = copy(PLAIN)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 27}))
    arguments = ("generate", str(folder), "--tokens", "5,6", "--greedy", "--max-new-tokens", "3")
    assert "--max-seq-len" in refused(*arguments)
    result, _ = run_json(*arguments, "--max-seq-len", "64")
    assert len(result["tokens"]) == 3
    assert "pass the model's context of 8" in refused(*arguments[:-1], "30", "--max-seq-len", "8")


def test_one_new_token_has_no_decode_speed(run_json):
    result, _ = run_json("generate", EXL2, "--tokens", "5", "--greedy", "--max-new-tokens", "1", "--backend", "numpy")
    assert len(result["tokens"]) == 1 and result["decode_tokens_per_s"] is None


def test_without_a_number_of_tokens_the_context_is_filled_but_not_passed(run_json):
    prompt = ",".join(["7"] * 1020)
    result, _ = run_json("generate", EXL2, "--tokens", prompt, "--greedy", "--backend", "numpy")
    assert 1 <= len(result["tokens"]) <= 5


EVERY_FILTER = "--smoothing-factor 0.1 --tfs 0.99 --typical 0.95 --mirostat-tau 4 --xtc-probability 0.5 --xtc-threshold 0.2"
EVERY_FILTER += " --skew 0.1 --dynamic-temperature 0.5 1.5"
EVERY_PENALTY = "--repetition-penalty 1.3 --frequency-penalty 0.2 --presence-penalty 0.3 --dry-multiplier 0.8"


def test_the_sampler_s_options(run_json):
    def tokens(options):
        arguments = ["generate", EXL2, "--prompt", "ROMEO:", "--max-new-tokens", "16", "--backend", "numpy"]
        return run_json(*arguments, *options.split())[0]["tokens"]

    plain = tokens("--seed 3")
    assert tokens(f"--seed 3 {EVERY_FILTER}") == tokens(f"--seed 3 {EVERY_FILTER}") != plain
    assert tokens(f"--seed 3 {EVERY_PENALTY}") != plain
    assert tokens("--seed 3 --repetition-penalty 1") == plain
    greedy = tokens("--greedy")
    assert tokens("--greedy --repetition-penalty 3") not in (greedy, plain)


def test_the_sampler_s_options_reach_the_settings():
    arguments = ["generate", "MODEL", "--tokens", "1", *EVERY_FILTER.split(), *EVERY_PENALTY.split()]
    settings = sampler_settings(cli.build_parser().parse_args(arguments))
    assert settings == SamplerSettings(
        smoothing_factor=0.1,
        tfs=0.99,
        typical=0.95,
        mirostat_tau=4.0,
        xtc_probability=0.5,
        xtc_threshold=0.2,
        skew=0.1,
        min_temp=0.5,
        max_temp=1.5,
        repetition_penalty=1.3,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        dry_multiplier=0.8,
    )


def test_every_kind_of_cache_can_be_asked_for(run_json):
    assert cli.CACHES == tuple(CACHE_KINDS)
    arguments = ["generate", EXL2, "--prompt", "ROMEO:", "--greedy", "--max-new-tokens", "4", "--backend", "numpy"]
    plain = run_json(*arguments)[0]["tokens"]
    assert run_json(*arguments, "--cache", "fp16")[0]["tokens"] == plain
    assert run_json(*arguments, "--cache", "q8")[0]["tokens"] == plain


def test_the_cache_reaches_the_generation(run_json, monkeypatch):
    asked = []

    def new_cache(model, batch=1, capacity=None, kind="fp16", make=Model.new_cache):
        asked.append(kind)
        return make(model, batch, capacity, kind)

    monkeypatch.setattr(Model, "new_cache", new_cache)
    text = ("--text", f"{PLAIN}/val.txt", "--window", "2", "--max-windows", "1", "--backend", "numpy")
    for kind in cli.CACHES:
        run_json("generate", EXL2, "--tokens", "5", "--max-new-tokens", "1", "--backend", "numpy", "--cache", kind)
        run_json("perplexity", EXL2, *text, "--cache", kind)
    assert asked == [kind for kind in cli.CACHES for _ in range(2)]
    run_json("perplexity", EXL2, *text)
    assert len(asked) == 12  # whole windows need none


# --- perplexity -------------------------------------------------------------------------------------------------------


def test_perplexity(run_json):
    text = str(MODELS / "shakespeare/val.txt")
    arguments = ["perplexity", EXL2, "--text", text, "--window", "64", "--max-windows", "6", "--backend", "numpy"]
    alone, _ = run_json(*arguments)
    assert alone["kl"] is None and alone["top1"] is None and alone["tokens"] == 6 * 63
    both, shown = run_json(*arguments, "--reference", PLAIN)
    assert both["perplexity"] == alone["perplexity"] and 5 < both["perplexity"] < 100
    assert 0 < both["kl"] < 0.2 and 0.5 < both["top1"] < 1
    assert f"{both['perplexity']:.4f}" in shown and "top-1" in shown


def test_perplexity_of_a_cache(run_json):
    """Against the same model without one: what the cache alone costs."""
    arguments = ["perplexity", PLAIN, "--text", f"{PLAIN}/val.txt", "--window", "6", "--max-windows", "4"]
    arguments += ["--backend", "numpy", "--reference", PLAIN]
    found = {kind: run_json(*arguments, "--cache", kind)[0] for kind in ("q8", "q4")}
    assert 1e-7 < found["q8"]["kl"] < 2e-4 < found["q4"]["kl"] < 3e-2
    assert all(result["tokens"] == 4 * 5 for result in found.values())


# --- compile ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "all_instances", lambda: norm.INSTANCES[:2])
    return tmp_path / "cache"


def test_compile_fills_the_cache(two_kernels, run_json, monkeypatch):
    needs_cupy()
    result, _ = run_json("compile", "--arch", "sm_80", "sm_90", "sm_90a")  # the last two are one
    assert result["kernels"] == 4 and result["seconds"] > 0
    files = sorted(path.name for path in two_kernels.glob("*.cubin"))
    assert len(files) == 4 and sum("sm_90a" in name for name in files) == 2

    def refuse(*arguments):
        raise AssertionError("compiled again")

    monkeypatch.setattr(_kernels, "compile_instance", refuse)
    assert run_json("compile", "--arch", "sm_80", "sm_90a")[0]["kernels"] == 4


def test_every_listed_kernel_is_compiled():
    instances = cli.all_instances()
    assert len(instances) == len(set(instances)) > 50
    files = {wanted.file for wanted in instances}
    assert files == {path.stem for path in _kernels.SOURCE_FOLDER.glob("*.cu")}


@pytest.mark.parametrize(
    ("arch", "says"),
    [("90a", "must look like sm_90a"), ("sm_91", "know sm_75"), ("sm_60", "know sm_75"), ("sm_", "must look like")],
)
def test_compile_refuses_unknown_architectures(two_kernels, refused, arch, says):
    needs_cupy()
    assert says in refused("compile", "--arch", arch)


def test_compile_without_a_gpu_wants_an_arch(two_kernels, refused, monkeypatch):
    monkeypatch.setattr(_device, "count", lambda: 0)
    assert "--arch" in refused("compile")


def test_compile_into_an_unwritable_folder(two_kernels, refused, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(tmp_path / "file/below"))
    assert "set CUPYQ_CACHE_DIR to a folder that is writable" in refused("compile", "--arch", "sm_80")


# --- wrong input: one line, exit code 2 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["inspect"], "required: MODEL (see cupyq inspect --help)"),
        (["inspect", EXL2, "--speed"], "unrecognized arguments: --speed"),
        (["generate", EXL2], "one of the arguments --prompt --tokens is required"),
        (["generate", EXL2, "--prompt", "a", "--tokens", "1"], "not allowed with"),
        (["generate", EXL2, "--tokens", "1,x"], "ids separated by commas"),
        (["generate", EXL2, "--tokens", ""], "ids separated by commas"),
        (["generate", EXL2, "--tokens", "1,,2"], "ids separated by commas"),
        (["generate", EXL2, "--tokens", "1.5"], "ids separated by commas"),
        (["generate", EXL2, "--tokens", "1024"], "token 1024 at position 0, expected 0 to 1023"),
        (["generate", EXL2, "--tokens=3,-1"], "token -1 at position 1"),
        (["generate", EXL2, "--tokens", "99999999999999999999"], "token 99999999999999999999 at position 0"),
        (["generate", EXL2, "--tokens", ",".join(["5"] * 1025)], "the prompt has 1025 tokens, the model's context 1024"),
        (["generate", EXL2, "--tokens", "5", "--max-new-tokens", "1025"], "at most 1024 new tokens"),
        (["generate", EXL2, "--prompt", ""], "no tokens"),
        (["generate", EXL2, "--tokens", "5", "--max-new-tokens", "0"], "expected 1 or more, got 0"),
        (["generate", EXL2, "--tokens", "5", "--max-new-tokens", "many"], "expected a whole number, got 'many'"),
        (["generate", EXL2, "--tokens", "5", "--temperature", "-1"], "temperature must be"),
        (["generate", EXL2, "--tokens", "5", "--temperature", "nan"], "temperature must be"),
        (["generate", EXL2, "--tokens", "5", "--top-p", "2"], "top_p must be"),
        (["generate", EXL2, "--tokens", "5", "--min-p", "-1"], "min_p must be"),
        (["generate", EXL2, "--tokens", "5", "--top-k", "-1"], "expected 0 or more"),
        (["generate", EXL2, "--tokens", "5", "--seed", "4294967296"], "seed must be"),
        (["generate", EXL2, "--tokens", "5", "--greedy", "--top-k", "5"], "--greedy and --top-k exclude each other"),
        (["generate", EXL2, "--tokens", "5", "--greedy", "--skew", "1"], "--greedy and --skew exclude each other"),
        (["generate", EXL2, "--tokens", "5", "--typical", "2"], "typical must be from 0 to 1"),
        (["generate", EXL2, "--tokens", "5", "--repetition-penalty", "0"], "repetition_penalty must be above 0"),
        (["generate", EXL2, "--tokens", "5", "--dynamic-temperature", "2", "1"], "MIN 2 must be below MAX 1"),
        (["generate", EXL2, "--tokens", "5", "--dynamic-temperature", "2"], "expected 2 arguments"),
        (["generate", EXL2, "--tokens", "5", "--backend", "torch"], "invalid choice: 'torch'"),
        (["generate", EXL2, "--tokens", "5", "--cache", "q5"], "invalid choice: 'q5'"),
        (["perplexity", EXL2, "--text", f"{PLAIN}/val.txt", "--cache", "8"], "invalid choice: '8'"),
        (["perplexity", EXL2], "required: --text"),
        (["perplexity", EXL2, "--text", "/nowhere/val.txt"], "/nowhere/val.txt: No such file or directory"),
        (["perplexity", EXL2, "--text", str(ROOT)], f"{ROOT}: Is a directory"),
        (["perplexity", EXL2, "--text", f"{EXL2}/output.safetensors"], "not UTF-8 at byte"),
        (["perplexity", EXL2, "--text", f"{EXL2}/tokenizer_config.json"], "fewer than one window of 256"),
        (["perplexity", EXL2, "--text", f"{PLAIN}/val.txt", "--window", "1"], "expected 2 or more"),
        (["perplexity", EXL2, "--text", f"{PLAIN}/val.txt", "--window", "2000"], "window must be from 2 to 1024"),
        (["compile", "--arch"], "expected at least one argument"),
    ],
)
def test_wrong_arguments(refused, arguments, says):
    assert says in refused(*arguments)


MODEL_COMMANDS = {
    "inspect": [],
    "generate": ["--tokens", "1,2,3"],
    "perplexity": ["--text", f"{PLAIN}/val.txt", "--max-windows", "1"],
}


@pytest.mark.parametrize("command", MODEL_COMMANDS)
class TestDamagedModels:
    def test_missing_folder(self, refused, command, tmp_path):
        assert str(tmp_path / "nowhere") in refused(command, tmp_path / "nowhere", *MODEL_COMMANDS[command])

    def test_folder_without_safetensors(self, refused, command, copy):
        folder = copy()
        (folder / "output.safetensors").unlink()
        (folder / "golden.safetensors").unlink(missing_ok=True)
        assert "no *.safetensors file" in refused(command, folder, *MODEL_COMMANDS[command])

    @pytest.mark.parametrize("length", [0, 7, 5000, 2_000_000])
    def test_truncated_safetensors(self, refused, command, copy, length):
        folder = copy()
        os.truncate(folder / "output.safetensors", length)
        assert "output.safetensors: " in refused(command, folder, *MODEL_COMMANDS[command])

    def test_unknown_architecture(self, refused, command, copy):
        folder = copy()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["ParrotForCausalLM"]}))
        assert "ParrotForCausalLM" in refused(command, folder, *MODEL_COMMANDS[command])

    def test_config_that_is_no_json(self, refused, command, copy):
        folder = copy()
        (folder / "config.json").write_text("{")
        assert "config.json: " in refused(command, folder, *MODEL_COMMANDS[command])


@pytest.mark.parametrize("arguments", [["generate", "--prompt", "a"], ["perplexity", "--text", f"{PLAIN}/val.txt"]])
def test_text_without_a_tokenizer(refused, copy, arguments):
    folder = copy()
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: missing; copy it" in refused(arguments[0], folder, *arguments[1:])


@pytest.mark.parametrize("command", ["generate", "perplexity"])
def test_cupy_without_a_gpu(refused, monkeypatch, command):
    needs_cupy()
    monkeypatch.setattr(_device, "count", lambda: 0)
    line = refused(command, EXL2, *MODEL_COMMANDS[command], "--backend", "cupy")
    assert "no usable GPU" in line and "numpy" in line


# --- doctor -----------------------------------------------------------------------------------------------------------


def checks_of(result):
    assert all(check.keys() == {"name", "ok", "found", "mend"} for check in result["checks"])
    return {check["name"]: check for check in result["checks"]}


def test_doctor_names_every_part(run_json, monkeypatch, tmp_path):
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(tmp_path))
    result, shown = run_json("doctor")
    checks = checks_of(result)
    expected = {"python", "numpy", "packages", "cupy", "driver", "gpu", "nvrtc", "headers", "nccl", "cache"}
    assert checks.keys() - {"kernel"} == expected
    assert result["ok"] and result["backend"] in ("numpy", "cupy")
    assert checks["python"]["ok"] and checks["numpy"]["ok"] and checks["packages"]["ok"]
    assert checks["cache"]["found"].startswith(f"{tmp_path}: 0 kernels")
    for check in result["checks"]:
        assert (check["mend"] is None) == check["ok"] and "\n" not in check["found"]
        assert check["name"] in shown and (check["mend"] or "") in shown


class FakeDriver:
    """libcuda of a machine with two GPUs."""

    def __init__(self, version=12080, capabilities=((9, 0), (7, 0)), status=0):
        self.version, self.capabilities, self.status = version, capabilities, status

    def cuDriverGetVersion(self, out):
        out._obj.value = self.version
        return 0

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, out):
        out._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, out, index):
        out._obj.value = index

    def cuDeviceGetName(self, out, size, device):
        out.value = b"Fake GPU"

    def cuDeviceGetAttribute(self, out, attribute, device):
        out._obj.value = self.capabilities[device.value][attribute - 75]

    def cuDeviceTotalMem_v2(self, out, device):
        out._obj.value = 80 << 30


@pytest.fixture
def driver(monkeypatch):
    def install(fake):
        monkeypatch.setattr(doctor, "_load_driver", lambda: fake)
        monkeypatch.setattr(doctor, "_driver_release", lambda: "570.1")

    return install


@pytest.fixture
def wheels(monkeypatch):
    def install(**found):
        monkeypatch.setattr(doctor, "_cupy_wheels", lambda: {name.replace("_", "-"): v for name, v in found.items()})

    return install


def test_doctor_reads_driver_and_gpus_without_cupy(driver, wheels):
    driver(FakeDriver())
    wheels(cupy_cuda12x="14.2.0")
    assert doctor._driver() == doctor.Check("driver", True, "570.1, runs up to CUDA 12.8")
    gpu = doctor._gpu()
    assert gpu.ok and gpu.found == "0: Fake GPU, sm_90, 80 GiB; 1: Fake GPU, sm_70, 80 GiB"
    assert "GPU 1: older than sm_75" in gpu.mend


def test_doctor_finds_a_driver_too_old_for_the_wheel(driver, wheels):
    driver(FakeDriver(version=12080))
    wheels(cupy_cuda13x="14.2.0")
    check = doctor._driver()
    assert not check.ok and "too old for cupy-cuda13x" in check.found
    assert check.mend.startswith("pip uninstall -y cupy-cuda13x && pip install 'cupyq[cuda12]'")


def test_doctor_finds_conflicting_wheels(driver, wheels):
    driver(FakeDriver(version=13000))
    wheels(cupy_cuda12x="14.2.0", cupy="14.0.0")
    check = doctor._cupy()
    assert not check.ok and check.found == "several at once: cupy 14.0.0, cupy-cuda12x 14.2.0"
    assert check.mend == "pip uninstall -y cupy cupy-cuda12x && pip install 'cupyq[cuda13]'"


def test_doctor_lists_wheels_by_their_metadata(monkeypatch):
    import importlib.metadata
    from types import SimpleNamespace

    names = ["numpy", "cupy-cuda12x", "CuPy", "cupyx-extra", "cupyq", "cupy-rocm-5-0"]
    fakes = [SimpleNamespace(metadata={"Name": name}, version="1") for name in names]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: fakes)
    assert doctor._cupy_wheels().keys() == {"cupy-cuda12x", "cupy", "cupy-rocm-5-0"}


@pytest.mark.parametrize(
    ("fake", "found"),
    [(None, "none: no driver"), (FakeDriver(status=100), "driver error 100"), (FakeDriver(capabilities=()), "none")],
)
def test_doctor_without_a_gpu(driver, fake, found):
    driver(fake)
    check = doctor._gpu()
    assert not check.ok and found in check.found and check.mend


def test_doctor_without_cupy_is_well_with_numpy():
    script = (
        "import sys; sys.modules['cupy'] = None;"  # makes `import cupy` fail
        "from cupyq.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    result = json.loads(done.stdout)
    checks = checks_of(result)
    assert result["ok"] and result["backend"] == "numpy"
    assert not checks["cupy"]["ok"] and "pip install" in checks["cupy"]["mend"]
    assert all(checks[name]["mend"] == "mend cupy first" for name in ("nvrtc", "headers", "nccl"))


def test_doctor_says_no_only_where_nothing_runs(run_json, monkeypatch):
    monkeypatch.setattr(doctor, "_numpy", lambda: doctor.Check("numpy", False, "missing", "pip install numpy"))
    result, shown = run_json("doctor", code=2)
    assert result["ok"] is False and "Nothing can run yet" in shown


def test_doctor_survives_a_check_that_breaks(monkeypatch):
    def breaks():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "_nccl", breaks)
    checks = checks_of(doctor.diagnose())
    assert checks["nccl"]["found"] == "RuntimeError: two lines" and not checks["nccl"]["ok"]


def test_doctor_finds_an_unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPYQ_CACHE_DIR", str(tmp_path / "file/below"))
    check = doctor.cache_check()
    assert not check.ok and "not writable" in check.found and "CUPYQ_CACHE_DIR" in check.mend


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_doctor_with_a_gpu(run_json):
    result, shown = run_json("doctor")
    checks = checks_of(result)
    assert result["backend"] == "cupy" and checks["kernel"]["ok"]
    assert all(checks[name]["ok"] for name in ("cupy", "driver", "gpu", "nvrtc", "cache")), shown
    assert _device.current().arch in checks["nvrtc"]["found"]


@pytest.mark.gpu
@pytest.mark.parametrize("path", [PLAIN, GPTQ])
def test_generate_on_the_gpu(run_json, path):
    golden = recorded(path)
    prompt = ",".join(map(str, golden["prompt"]))
    for backend in ("auto", "cupy"):
        result, _ = run_json("generate", path, "--tokens", prompt, "--greedy", "--max-new-tokens", "40", "--backend", backend)
        assert result["backend"] == "cupy" and result["tokens"] == golden["greedy"][:40]


@pytest.mark.gpu
def test_perplexity_on_the_gpu(run_json):
    arguments = ["perplexity", EXL2, "--text", f"{PLAIN}/val.txt", "--max-windows", "4", "--reference", PLAIN]
    on_gpu, _ = run_json(*arguments, "--backend", "cupy")
    on_cpu, _ = run_json(*arguments, "--backend", "numpy")
    assert on_gpu["perplexity"] == pytest.approx(on_cpu["perplexity"], rel=1e-3)
    assert on_gpu["kl"] == pytest.approx(on_cpu["kl"], rel=0.02) and on_gpu["tokens"] == on_cpu["tokens"]


# --- bench (what it measures: test_bench.py) --------------------------------------------------------------------------


def test_bench_shows_its_families_and_their_options(capsys):
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert "qmatmul" in text and "model" in text
    for family, options in {
        "qmatmul": ("--shapes", "--bits", "--rows", "--dtype", "--peers", "--exllamav2", "--quick", "--sweep", "--out"),
        "attention": ("--heads", "--kv-heads", "--head-dim", "--dtype", "--cache", "--peers", "--quick", "--out"),
        "model": ("--shape", "--bits", "--head-bits", "--context", "--prefill", "--layers", "--load", "--kernels", "--out"),
    }.items():
        assert main(["bench", family, "--help"]) == 0
        text = capsys.readouterr().out
        assert [option for option in (*options, "--json") if option not in text] == []


BENCH_MODEL = ("--shape", "tiny", "--backend", "numpy", "--context", "5", "--steps", "2", "--prefill", "6")


def test_bench_measures_a_model(run_json, tmp_path):
    result, err = run_json("bench", "model", *BENCH_MODEL, "--out", str(tmp_path / "rows.jsonl"))
    assert [row["what"] for row in result["rows"]] == ["decode", "prefill"] and "tokens/s" in err
    run_json("bench", "model", *BENCH_MODEL, "--out", str(tmp_path / "rows.jsonl"))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0]) == result["rows"][0]


def test_bench_speaks_to_people_without_json(capsys):
    assert main(["bench", "model", *BENCH_MODEL]) == 0
    captured = capsys.readouterr()
    assert "decode" in captured.out and captured.err == ""


def test_a_wrong_result_ends_the_bench_with_1(run_json, monkeypatch):
    from cupyq.bench import qmatmul

    asked = []

    def measure(options, out, lines=None):
        asked.append(options)
        return [{"us": 1.0}], False

    monkeypatch.setattr(qmatmul, "run", measure)
    assert run_json("bench", "qmatmul", "--bits", "4,2.5", "--rows", "1", code=1)[0] == {"rows": [{"us": 1.0}]}
    assert [kind.name for kind in asked[0].kinds] == ["4", "2.5"] and asked[0].rows == (1,)
    run_json("bench", code=1)
    assert asked[1] == qmatmul.Options.parse(is_quick=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attentions",), "argument FAMILY: invalid choice: 'attentions'"),
        (("attention", "--cache", "q5"), "--cache: 'q5' is not one of fp16, fp8"),
        (("attention", "--head-dim", "4"), "--head-dim: expected 8 or more"),
        (("qmatmul", "--bits", "9"), "--bits: '9' is no kind of matrix"),
        (("qmatmul", "--shapes", "4096"), "--shapes: '4096', expected K x N"),
        (("qmatmul", "--rows", "x"), "--rows: 'x'"),
        (("qmatmul", "--out", "/nowhere/at/all/rows"), "/nowhere/at/all/rows: No such file"),
        (("model", "--shape", "gpt-5"), "--shape: 'gpt-5' is not one of"),
        (("model", "--context", "x"), "--context: expected numbers separated by commas"),
        (("model", "--layers", "0"), "--layers: expected 1 or more"),
    ],
)
def test_bench_refuses_on_one_line(refused, arguments, message):
    assert message in refused("bench", *arguments)


def test_bench_of_products_needs_a_gpu(refused, monkeypatch):
    def no_gpu():
        raise BackendError("no usable GPU (none): run `cupyq doctor` to see what is missing")

    monkeypatch.setattr(_device, "current", no_gpu)
    assert "no usable GPU" in refused("bench", "qmatmul", "--quick", "--peers", "none")
