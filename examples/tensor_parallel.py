"""One model on several ranks: threads of this process, or processes that mpirun, torchrun or srun started.

python examples/tensor_parallel.py                              two ranks: two GPUs, or threads on the CPU
torchrun --nproc-per-node 4 examples/tensor_parallel.py         a process for each rank
"""

import argparse
from pathlib import Path

from cupyq import tp
from cupyq.generate import SamplerSettings, encode, generate, load_tokenizer

MODEL = Path(__file__).parent / "models/shakespeare-exl2-4.0"


def write(comm):
    """What every rank does; all come to the same tokens."""
    model = tp.load_model(MODEL, comm)
    tokenizer = load_tokenizer(MODEL)
    prompt = encode(tokenizer, "ROMEO:\n")
    tokens = generate(model, prompt, max_new_tokens=24, settings=SamplerSettings.greedy()).tokens
    held = sum(linear.storage_bits for linear in model.linear_layers()) / 8
    return f"{held / 1e6:.2f} MB of linear layers, {model.kv_heads} KV heads", tokenizer.decode(prompt + tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="where no launcher says how many; default 2")
    parser.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto")
    arguments = parser.parse_args()
    if tp.find_place().ranks > 1:
        with tp.connect(backend=arguments.backend) as comm:
            first, results = comm.rank, [write(comm)]
    else:
        first, results = 0, tp.run(write, arguments.ranks, backend=arguments.backend)
    for rank, (held, _) in enumerate(results, first):
        print(f"rank {rank}: {held}")
    if first == 0:
        print(results[0][1])


if __name__ == "__main__":
    main()
