"""exllamav2's own Python package, unmodified, on `cupyq.ext` in place of its compiled extension.

    python benchmarks/exllamav2_on_cupyq.py --exllamav2 CHECKOUT [MODEL ...]

CHECKOUT is a clone of github.com/turboderp-org/exllamav2 (0.3.2 was tried). Each model is loaded and made to write text
in several ways twice, each time in a process of its own: once with the extension exllamav2 builds for itself with nvcc,
once with `sys.modules["exllamav2_ext"]` set to `cupyq.ext`. Printed: whether the texts agree, tokens per second of both,
and how often exllamav2 called each function. `--only cupyq` leaves out the build.
"""

import argparse
import collections
import functools
import json
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

MODELS = Path(__file__).parent.parent / "examples/models"
PROMPT = "ROMEO:\nWhat light through yonder window breaks?"
TOKENS = 64

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", nargs="*", default=[str(MODELS / "shakespeare-exl2-4.0"), str(MODELS / "shakespeare-gptq-g32")])
parser.add_argument("--exllamav2", required=True, help="folder that holds the package exllamav2/")
parser.add_argument("--only", choices=("own", "cupyq"), help="one of the two extensions")
parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)


# --- one process, one extension ---------------------------------------------------------------------------------------


def counting(module, calls):
    """A module like `module` that counts the calls of each function in `calls`."""
    counted = types.ModuleType("exllamav2_ext")
    for name in module.__all__:
        function = getattr(module, name)

        def call(*args, _function=function, _name=name, **kwargs):
            calls[_name] += 1
            return _function(*args, **kwargs)

        setattr(counted, name, functools.wraps(function)(call))
    return counted


def write_adapter(folder, config):
    """A random PEFT adapter of rank 8 for the q, v, o and down projections, strong enough to change the text."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes["mlp.down_proj"] = (hidden, inner)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (n, k) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((8, k)).astype(np.float32) * k**-0.5
            tensors[f"{key}.lora_B.weight"] = rng.standard_normal((n, 8)).astype(np.float32) * 0.05
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 8, "peft_type": "LORA"}))


def run_child(arguments):
    calls = collections.Counter()
    if arguments.only == "cupyq":
        import cupyq.ext

        sys.modules["exllamav2_ext"] = counting(cupyq.ext, calls)
    sys.path.insert(0, arguments.exllamav2)
    import torch
    from exllamav2 import (
        ExLlamaV2,
        ExLlamaV2Cache,
        ExLlamaV2Cache_8bit,
        ExLlamaV2Cache_Q4,
        ExLlamaV2Cache_Q6,
        ExLlamaV2Cache_Q8,
        ExLlamaV2Config,
        ExLlamaV2Lora,
        ExLlamaV2Tokenizer,
    )
    from exllamav2.generator import ExLlamaV2BaseGenerator, ExLlamaV2DynamicGenerator, ExLlamaV2Sampler

    results = {}

    def record(scenario, write, tokens=TOKENS):
        before = calls.copy()
        torch.cuda.synchronize()
        start = time.perf_counter()
        text = write()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        results[scenario] = {"text": text, "tokens_per_s": tokens / seconds, "calls": dict(calls - before)}

    for folder in arguments.models:
        name = Path(folder).name
        config = ExLlamaV2Config(folder)
        model = ExLlamaV2(config)
        record(f"{name}: load", lambda model=model: model.load() and "loaded")
        tokenizer = ExLlamaV2Tokenizer(config)
        greedy = ExLlamaV2Sampler.Settings.greedy()

        def simple(scenario, cache, prompt, settings, name=name, model=model, tokenizer=tokenizer, **options):
            generator = ExLlamaV2BaseGenerator(model, cache, tokenizer)
            generator.generate_simple(prompt, settings, 4, **options)  # compiles, and builds graphs
            write = functools.partial(generator.generate_simple, prompt, settings, TOKENS, **options)
            record(f"{name}: {scenario}", write, TOKENS * (1 if isinstance(prompt, str) else len(prompt)))

        for kind in (ExLlamaV2Cache, ExLlamaV2Cache_8bit, ExLlamaV2Cache_Q8, ExLlamaV2Cache_Q6, ExLlamaV2Cache_Q4):
            simple(f"greedy, {kind.__name__}", kind(model, max_seq_len=256), PROMPT, greedy)
        prompts = [PROMPT, "JULIET:\n", "KING RICHARD III:\nNow is the winter of our"]
        simple("greedy, batch of 3", ExLlamaV2Cache(model, max_seq_len=256, batch_size=3), prompts, greedy)

        cache = ExLlamaV2Cache(model, max_seq_len=256)
        sampled = ExLlamaV2Sampler.Settings(
            temperature=0.9, top_k=40, top_p=0.9, min_p=0.02, typical=0.95, tfs=0.97, token_repetition_penalty=1.1,
            token_frequency_penalty=0.1, token_presence_penalty=0.1, xtc_probability=0.2, skew=0.1,
        )  # fmt: skip
        simple("sampled", cache, PROMPT, sampled, seed=1)
        mirostat = ExLlamaV2Sampler.Settings(temperature=1.0, top_k=0, top_p=0.0, mirostat=True, smoothing_factor=0.3)
        mirostat.disallow_tokens(tokenizer, [5, 6, 7])
        simple("mirostat", cache, PROMPT, mirostat, seed=2)
        with tempfile.TemporaryDirectory() as scratch:
            write_adapter(Path(scratch), json.loads((Path(folder) / "config.json").read_text()))
            simple("greedy, LoRA", cache, PROMPT, greedy, loras=ExLlamaV2Lora.from_directory(model, scratch))

        dynamic = ExLlamaV2DynamicGenerator(model, ExLlamaV2Cache(model, max_seq_len=512), tokenizer, paged=False)
        stop = ["\n\n\nNEVER", tokenizer.eos_token_id]
        options = dict(max_new_tokens=TOKENS, gen_settings=greedy, stop_conditions=stop, completion_only=True)
        record(
            f"{name}: dynamic generator",
            lambda d=dynamic, o=options: [d.generate(PROMPT, **o), d.generate(PROMPT, **o)],
            2 * TOKENS,
        )
        model.unload()

    from exllamav2.hadamard.hadamard import get_hadamard

    record("hadamard", lambda: [get_hadamard(n).sum(0).tolist() for n in (12, 28, 44, 36)])
    Path(arguments.child).write_text(json.dumps(results))


# --- both, compared ---------------------------------------------------------------------------------------------------


def main(arguments):
    found = {}
    for extension in [arguments.only] if arguments.only else ["cupyq", "own"]:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            start = time.perf_counter()
            command = [sys.executable, __file__, "--exllamav2", arguments.exllamav2, "--only", extension, "--child", file.name]
            subprocess.run([*command, *arguments.models], check=True)
            print(f"{extension}: {time.perf_counter() - start:.0f} s in all")
            found[extension] = json.loads(Path(file.name).read_text())

    for scenario in next(iter(found.values())):
        runs = {extension: results[scenario] for extension, results in found.items()}
        speeds = ", ".join(f"{extension} {run['tokens_per_s']:.0f} tok/s" for extension, run in runs.items())
        texts = [run["text"] for run in runs.values()]
        verdict = "" if len(texts) == 1 else "same text; " if texts[0] == texts[1] else "TEXTS DIFFER; "
        print(f"{scenario:55s} {verdict}{speeds}")
        if len(texts) == 2 and texts[0] != texts[1]:
            for extension, run in runs.items():
                print(f"    {extension}: {run['text']!r}")
    if "cupyq" in found:
        total = collections.Counter()
        for run in found["cupyq"].values():
            total.update(run["calls"])
        print(f"{len(total)} functions of cupyq.ext were called:")
        print("  " + ", ".join(f"{name} {count}" for name, count in total.most_common()))
    if len(found) == 2:
        different = [s for s in found["own"] if found["own"][s]["text"] != found["cupyq"][s]["text"]]
        print(f"{len(found['own']) - len(different)} of {len(found['own'])} scenarios gave the same text")


if __name__ == "__main__":
    given = parser.parse_args()
    run_child(given) if given.child else main(given)
