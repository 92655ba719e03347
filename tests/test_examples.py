"""Every example runs, from another folder, and says what it promises."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from tp_checks import several_gpus  # noqa: F401

EXAMPLES = ROOT / "examples"


def run(name, folder, *arguments, said=None):
    """What the example prints; `said`: what is typed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        input=said,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUPYQ_CACHE_DIR": os.environ.get("CUPYQ_CACHE_DIR", str(folder / "cache"))},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def largest_error(text):
    return float(re.search(r"largest error against float64 (\S+)", text)[1])


def test_every_example_is_run_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    ops = {"ops_numpy", "ops_torch", "ops_jax", "torch_ops", "torch_quant_linear"}
    serving = {"chat", "batch_prompts", "http_server"}
    models = {"lora", "graph_decoder", "cache_kinds", "logits", "quantize_model", "tensor_parallel"}
    assert names == ops | serving | models | {"inspect_checkpoint", "demo"}


def test_ops_numpy(tmp_path):
    text = run("ops_numpy", tmp_path)
    assert "exl2 [768, 256] at 4.71 bits per weight" in text
    assert largest_error(text) < 2e-3


@pytest.mark.parametrize(
    ("name", "framework"),
    [
        ("ops_torch", "PyTorch"),
        ("torch_ops", "PyTorch"),
        ("torch_quant_linear", "PyTorch"),
        ("ops_jax", "JAX"),
        ("http_server", "starlette or uvicorn"),
    ],
)
def test_without_the_framework_a_line_says_so(name, framework, tmp_path):
    script = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'jax', 'uvicorn')));"  # makes the imports fail
        f"runpy.run_path({str(EXAMPLES / f'{name}.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"{framework} is not installed") and len(done.stdout.splitlines()) == 1


def test_inspect_checkpoint(tmp_path):
    text = run("inspect_checkpoint", tmp_path)
    assert text.count("exl2") == 29 and "3,407,872 quantized weights, 2.845 bits each" in text
    text = run("inspect_checkpoint", tmp_path, str(EXAMPLES / "models/shakespeare-gptq-g32"))
    assert text.count("gptq") == 28 and "3,145,728 quantized weights" in text


def test_lora(tmp_path):
    text = run("lora", tmp_path, "--backend", "numpy")
    without, adapted = re.findall(r"^(?:no adapter|ranting) +(ROMEO:.*)$", text, re.MULTILINE)
    assert without != adapted and "alone, the adapter gives the same tokens" in text
    assert not list(tmp_path.iterdir())  # its adapter lay in a temporary folder


def test_graph_decoder(tmp_path):
    text = run("graph_decoder", tmp_path, "--backend", "numpy")
    assert all(f"{speaker}:\n" in text for speaker in ("ROMEO", "KING RICHARD II", "First Citizen", "Nurse"))
    assert "tokens per second, streamed and at once the same" in text


def check_cache_kinds(text, bytes_of_fp16):
    rows = dict(re.findall(r"^(fp16|fp8|e4m3|q4|q6|q8) +(\d+) {3}(?=\S)", text, re.MULTILINE))
    # 4 layers of 2 heads of 64 keys and 64 values
    sizes = {"fp16": bytes_of_fp16, "fp8": 1024, "e4m3": 1056, "q4": 576, "q6": 832, "q8": 1088}
    assert {kind: int(size) for kind, size in rows.items()} == sizes


def test_cache_kinds(tmp_path):
    check_cache_kinds(run("cache_kinds", tmp_path, "--backend", "numpy"), 4096)  # NumPy's models are float32


def test_quantize_model(tmp_path):
    text = run("quantize_model", tmp_path, "--backend", "numpy", "--out", str(tmp_path / "out"))
    bits, kl = (float(re.search(rf"^{name} +([\d.]+)", text, re.MULTILINE)[1]) for name in ("bits", "KL"))
    assert 3.4 < bits <= 3.5 and 0 < kl < 0.05
    assert "... 22 more, in out/quantization.md" in text and "\nROMEO:\n" in text
    assert f"bits        {bits:.4f}" in (tmp_path / "out/quantization.md").read_text()


def check_tensor_parallel(text):
    ranks = re.findall(r"^rank (\d): ([\d.]+) MB of linear layers, (\d) KV heads$", text, re.MULTILINE)
    assert [rank for rank, _, _ in ranks] == ["0", "1"] and all(0.7 < float(held) < 1.3 for _, held, _ in ranks), text
    assert all(kv_heads == "1" for _, _, kv_heads in ranks) and "\nROMEO:\n" in text


def test_tensor_parallel(tmp_path):
    check_tensor_parallel(run("tensor_parallel", tmp_path, "--backend", "numpy"))


def test_logits(tmp_path):
    text = run("logits", tmp_path, "--backend", "numpy", "--text", "ROMEO:\nO, my love")
    assert re.search(r"^'\\n' +0\.9\d+   '\\n' 0\.9", text, re.MULTILINE)
    assert 1 < float(re.search(r"tokens, perplexity (\S+)", text)[1]) < 100


def test_chat(tmp_path):
    arguments = ("--backend", "numpy", "--max-new-tokens", "5", "--seed", "1")
    text = run("chat", tmp_path, *arguments, said="ROMEO:\nJULIET:\n\n")
    assert text.count("[5 tokens") == 2 and text == run("chat", tmp_path, *arguments, said="ROMEO:\nJULIET:\n")


def test_batch_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("ROMEO:\\n\nJULIET:\\nO\nROMEO:\\n\n")
    arguments = ("prompts.txt", "--backend", "numpy", "--max-new-tokens", "4", "--greedy", "--out", "answers.jsonl")
    assert run("batch_prompts", tmp_path, *arguments) == ""
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["ROMEO:\n", "JULIET:\nO", "ROMEO:\n"]
    assert answers[0]["text"] == answers[2]["text"] and all(answer["tokens"] == 4 for answer in answers)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_http_server(tmp_path, is_streamed, monkeypatch):
    """Over HTTP where starlette and httpx are installed; where they are not, the line that says so is tested above."""
    pytest.importorskip("uvicorn")
    client = pytest.importorskip("starlette.testclient").TestClient
    monkeypatch.syspath_prepend(str(EXAMPLES))
    endpoint = importlib.import_module("http_server").Endpoint(
        EXAMPLES / "models/shakespeare-exl2-4.0", backend="numpy", max_batch=4, cache_tokens=1024
    )
    with client(endpoint.app) as http:
        asked = {"prompt": "ROMEO:\n", "max_tokens": 5, "seed": 3, "logprobs": 2, "stream": is_streamed}
        answer = http.post("/v1/completions", json=asked)
        assert answer.status_code == 200
        if is_streamed:
            lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            assert lines.pop() == "[DONE]"
            choices = [json.loads(line)["choices"][0] for line in lines]
            assert choices[-1]["finish_reason"] == "length" and "".join(choice["text"] for choice in choices)
            return
        found = answer.json()
        assert found["usage"]["completion_tokens"] == 5 and found["choices"][0]["finish_reason"] == "length"
        assert len(found["choices"][0]["logprobs"]["token_logprobs"]) == 5
        assert http.post("/v1/completions", json=asked).json()["choices"] == found["choices"]
        for wrong in (
            {"prompt": ""},
            {"prompt": "a", "max_tokens": -1},
            {"prompt": [5000]},
            {"prompt": "a", "max_tokens": 10**6},
        ):
            refused = http.post("/v1/completions", json=wrong)
            assert refused.status_code == 400 and refused.json()["error"]["message"]
        assert http.post("/v1/completions", content=b"{").status_code == 400
        assert http.post("/v1/chat/completions", json={"messages": []}).status_code == 400  # no chat template
        assert http.get("/v1/models").json()["data"][0]["id"] == "shakespeare-exl2-4.0"


def perplexities(text):
    """{row name: perplexity} of the demo's table."""
    return {name: float(value) for name, value in re.findall(r"^(float16|EXL2) +[\d.]+ +([\d.]+)$", text, re.MULTILINE)}


def test_demo(tmp_path):
    text = run("demo", tmp_path, "--backend", "numpy")
    assert perplexities(text) == pytest.approx({"float16": 20.3162, "EXL2": 20.4258}, abs=2e-3)
    assert "backend numpy" in text and "over 24 windows" in text and "\nROMEO:\n" in text and "200 tokens" in text


@pytest.mark.gpu
def test_ops_torch_on_the_gpu(tmp_path):
    pytest.importorskip("torch")
    text = run("ops_torch", tmp_path)
    assert "torch (3, 256) torch.float16 on cuda:0" in text and largest_error(text) < 2e-3


@pytest.mark.gpu
def test_torch_ops_on_the_gpu(tmp_path):
    pytest.importorskip("torch")
    text = run("torch_ops", tmp_path)
    assert "torch (2, 5, 256) torch.float16 on cuda:0" in text and largest_error(text) < 5e-3


@pytest.mark.gpu
def test_ops_jax_on_the_gpu(tmp_path):
    pytest.importorskip("jax")
    text = run("ops_jax", tmp_path)
    assert "(3, 256) float16 on " in text and largest_error(text) < 2e-3


@pytest.mark.gpu
def test_graph_decoder_on_the_gpu(tmp_path):
    assert "cupy: " in run("graph_decoder", tmp_path)


@pytest.mark.gpu
def test_cache_kinds_on_the_gpu(tmp_path):
    check_cache_kinds(run("cache_kinds", tmp_path), 2048)


@pytest.mark.gpu
def test_tensor_parallel_on_gpus(several_gpus, tmp_path):  # noqa: F811
    check_tensor_parallel(run("tensor_parallel", tmp_path))


@pytest.mark.gpu
def test_batch_prompts_on_the_gpu(tmp_path):
    answers = [json.loads(line) for line in run("batch_prompts", tmp_path, "--max-new-tokens", "16").splitlines()]
    assert len(answers) == 6 and all(answer["tokens"] <= 16 and answer["text"] for answer in answers)


@pytest.mark.gpu
def test_chat_on_the_gpu(tmp_path):
    assert run("chat", tmp_path, "--max-new-tokens", "9", said="ROMEO:\n").count(" tokens, ") == 1


@pytest.mark.gpu
def test_demo_on_the_gpu(tmp_path):
    text = run("demo", tmp_path)
    assert "backend cupy" in text and "over 193 windows" in text
    assert perplexities(text) == pytest.approx({"float16": 29.0918, "EXL2": 29.0282}, abs=2e-2)
