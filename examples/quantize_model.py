"""A float16 model to EXL2: python examples/quantize_model.py [--bits 3.5] [--out FOLDER] [--backend auto|numpy|cupy]

Measures what each layer loses at a few widths, shares the bits out so that the predictions suffer least, and quantizes. Few
rows and layouts, so that it takes seconds: for a model to keep, leave these two arguments at their defaults.
"""

import argparse
import tempfile
from pathlib import Path

import cupyq
from cupyq.generate import SamplerSettings, encode, generate, load_tokenizer
from cupyq.quantize import quantize_model

SOURCE = Path(__file__).parent / "models/shakespeare"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--bits", type=float, default=3.5)
parser.add_argument("--out", help="default: a temporary folder, which goes when this ends")
parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
arguments = parser.parse_args()

with tempfile.TemporaryDirectory() as temporary:
    out = Path(arguments.out or Path(temporary) / "shakespeare-exl2")
    result = quantize_model(
        SOURCE,
        out,
        bits=arguments.bits,
        calibration=SOURCE / "val.txt",
        rows=4,
        length=128,
        measured_layouts=3,
        sensitivity_tokens=128,
        windows=2,
        backend=arguments.backend,
        say=print,
    )
    print(f"in {result.seconds:.1f} s, to {out.name}: {', '.join(sorted(path.name for path in out.iterdir()))}\n")
    print(f"{'layer':<36}{'bits':>7}{'error':>8}   layout")
    for layer in result.layers[:7]:
        print(f"{layer.name:<36}{layer.bits_per_weight:>7.3f}{100 * layer.relative_error:>6.1f} %   {layer.layout}")
    print(f"... {len(result.layers) - 7} more, in {out.name}/quantization.md\n")

    model, tokenizer = cupyq.load_model(out, backend=arguments.backend), load_tokenizer(out)
    prompt = encode(tokenizer, "ROMEO:\n")
    text = tokenizer.decode(generate(model, prompt, max_new_tokens=40, settings=SamplerSettings.greedy()).tokens)
    print(f"ROMEO:\n{text}")
