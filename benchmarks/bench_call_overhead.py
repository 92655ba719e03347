"""Host time of a call: ops on CuPy arrays, PyTorch tensors and JAX arrays, beside a bare launch of the same kernels by CuPy.

    python benchmarks/bench_call_overhead.py [--calls 100] [--rounds 30] [--lines FILE]

Arrays are tiny and a round queues fewer calls than a stream holds, so that the host never waits for the GPU; between rounds
it does. `us` is the median over rounds of the time of a call; `bare` is the same for `cupy.RawKernel` launching the kernels
of that call with arguments that were prepared beforehand; `beyond` is the difference. The goals: on CuPy arrays at most 8 us
beyond the bare launch, on PyTorch's tensors at most 30 us in all. Each result is compared first, bit for bit, with that of
the op on CuPy arrays.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import cupy
import numpy as np

from cupyq import QMatrix, _device, _kernels, interop, ops
from cupyq.bench.table import emit, number
from cupyq.formats import exl2

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of the GPU's memory

BEYOND_BARE_US, TORCH_US = 8.0, 30.0
_random = np.random.default_rng(0)


def normal(*shape, dtype=np.float16):
    return _random.standard_normal(shape).astype(dtype)


@dataclass
class Problem:
    """An op and its arguments: NumPy arrays, copied to each library, and what is the same for all of them."""

    name: str
    op: Callable
    arrays: dict
    out: tuple | None  # shape and dtype; None: it writes into its arguments
    workspace: tuple | None = None  # of zeros
    fixed: dict | None = None


def problems():
    positions, tables = np.zeros(1, np.int32), [normal(64, 32, dtype=np.float32) for _ in range(2)]
    cache = {"k_cache": normal(1, 64, 2, 64), "v_cache": normal(1, 64, 2, 64)}
    token = {"k": normal(1, 1, 2, 64), "v": normal(1, 1, 2, 64)}
    heads, logits = normal(1, 1, 8, 64), normal(1, 512, dtype=np.float32)
    table = ops.SamplerTable(1, cupy, temperature=0.8, top_p=0.9)
    matrix = random_matrix()
    attended = {"q": heads, "k": cache["k_cache"], "v": cache["v_cache"], "kv_lengths": np.full(1, 33, np.int32)}
    rows, half = ((1, 256), np.float16), np.float16
    space = ((ops.qmatmul_workspace_size(matrix, 1),), np.float32)
    return [
        Problem("rms_norm", ops.rms_norm, {"x": normal(1, 256), "weight": normal(256)}, rows),
        Problem("silu_mul", ops.silu_mul, {"gate": normal(1, 256), "up": normal(1, 256)}, rows),
        Problem("qmatmul", ops.qmatmul, {"x": normal(1, 256)}, rows, space, {"q": matrix}),
        Problem("attention", ops.attention, attended, (heads.shape, half), ((ops.attention_workspace_size(64),), np.float32)),
        Problem(
            "rope", ops.rope, {"x": heads, "sin": tables[0], "cos": tables[1], "positions": positions}, (heads.shape, half)
        ),
        Problem("kv_append", ops.kv_append, token | cache | {"positions": positions}, None),
        Problem("sample", ops.sample, {"logits": logits}, ((1,), np.int32), None, {"temperature": 0.0}),
        Problem("sample, table", ops.sample, {"logits": logits}, ((1,), np.int32), None, {"table": table}),
    ]


def random_matrix():
    """256 x 256, 4 bits, on the GPU."""
    codes, scales = _random.integers(0, 16, (256, 256)).astype(np.uint8), _random.integers(0, 16, (2, 256))
    tensors = exl2.pack_exl2(codes, scales, np.ones(2, np.float16), [4, 4], [128, 128], None)
    return QMatrix.from_tensors({key: cupy.asarray(value) for key, value in tensors.items()})


# --- libraries --------------------------------------------------------------------------------------------------------


def libraries():
    """{name: function from a NumPy array to one of the library}, of those that are here and have the GPU."""
    found = {"cupy": cupy.asarray}
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            found["torch"] = lambda array: torch.from_numpy(array.copy()).cuda()
    with contextlib.suppress(ImportError, RuntimeError):
        import jax

        gpu = jax.devices("gpu")[0]
        found["jax"] = lambda array: jax.device_put(array, gpu)
    return found


def to_host(array):
    return (
        array.get() if isinstance(array, cupy.ndarray) else array.cpu().numpy() if hasattr(array, "cpu") else np.asarray(array)
    )


# --- time -------------------------------------------------------------------------------------------------------------


def host_microseconds(call, options):
    """Median over rounds of the mean time of a call."""
    times = []
    for _ in range(3 + options.rounds):  # the first ones load kernels and fill pools
        start = time.perf_counter()
        for _ in range(options.calls):
            call()
        times.append((time.perf_counter() - start) / options.calls)
        cupy.cuda.runtime.deviceSynchronize()
    return 1e6 * float(np.median(times[3:]))


def bare_launches(call):
    """What launches the kernels of call() again by cupy.RawKernel, and how many there are; None where one takes a structure."""
    launched, inner = [], _kernels.launch_here

    def noting(wanted, device_id, layout, grid, block, values, shared_bytes, cuda):
        launched.append((wanted, device_id, layout, grid, block, tuple(values), shared_bytes))
        inner(wanted, device_id, layout, grid, block, values, shared_bytes, cuda)

    _kernels.launch_here = noting
    try:
        call()
    finally:
        _kernels.launch_here = inner
    if any(layout.structures for _, _, layout, *_ in launched):
        return None, len(launched)
    prepared = []
    for wanted, device_id, layout, grid, block, values, shared_bytes in launched:
        addresses = {*layout.arrays, *layout.nulls}
        arguments = tuple(np.uint64(v) if i in addresses else v for i, v in enumerate(values))
        prepared.append((_kernels.loaded[wanted, device_id].kernel, grid, block, arguments, shared_bytes))

    def launch():
        for kernel, grid, block, arguments, shared_bytes in prepared:
            kernel(grid, block, arguments, shared_mem=shared_bytes)

    return launch, len(launched)


# --- the table --------------------------------------------------------------------------------------------------------


def calls_of(problem, library):
    """{"out": call, "new": call} on arrays of that library; `out` is left out where it cannot be given."""
    made = {key: library(value) for key, value in problem.arrays.items()} | (problem.fixed or {})
    if problem.out is None:
        return {"out": lambda: problem.op(**made) or (made["k_cache"], made["v_cache"])}
    given = {"out": library(np.zeros(*problem.out))}
    if problem.workspace is not None:
        given["workspace"] = library(np.zeros(*problem.workspace))
    return {"out": lambda: problem.op(**made, **given), "new": lambda: problem.op(**made)}


def measure(problem, found, options, lines):
    expected = bare = kernels = None
    for name, library in found.items():
        if name == "jax" and problem.out is None:
            continue  # immutable
        for way, call in calls_of(problem, library).items():
            if name == "jax" and way == "out":
                continue
            result = call()
            values = [to_host(array).tobytes() for array in (result if isinstance(result, tuple) else (result,))]
            if expected is None:
                expected = values
                launch, kernels = bare_launches(call)
                bare = None if launch is None else host_microseconds(launch, options)
            if values != expected:
                raise SystemExit(f"wrong result: {problem.name} on {name} arrays")
            del result
            us = host_microseconds(call, options)
            row = {"family": "call_overhead", "op": problem.name, "library": name, "out": way == "out", "us": us}
            row |= {"bare_us": bare, "kernels": kernels, "beyond_us": None if bare is None else us - bare}
            row |= {"goal": GOALS.get(name), "is_met": is_met(row)}
            report(row, lines)


GOALS = {"cupy": f"{BEYOND_BARE_US:.0f} us beyond bare", "torch": f"{TORCH_US:.0f} us"}


def is_met(row):
    if row["library"] == "torch":
        return row["us"] <= TORCH_US
    return row["beyond_us"] <= BEYOND_BARE_US if row["library"] == "cupy" and row["beyond_us"] is not None else None


def report(row, lines):
    way, met = "given" if row["out"] else "new", {True: "met", False: "missed", None: ""}[row["is_met"]]
    numbers = " ".join(number(row[key], 8, 1) for key in ("us", "bare_us", "beyond_us"))
    text = f"{row['op']:<14} {row['library']:<13} {way:<6} {row['kernels']:>7} {numbers}  {row['goal'] or '':<20} {met}"
    emit(row, text.rstrip(), sys.stdout, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100, help="in a round; a stream holds about 1000 launches")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--lines", help="file for a JSON object a row; default: stderr")
    options = parser.parse_args()
    found = libraries()
    print(f"{_device.current().name}, CuPy {cupy.__version__}, Python {sys.version.split()[0]}; libraries: {', '.join(found)}")
    print(f"{'op':<14} {'library':<13} {'out':<6} {'kernels':>7} {'us':>8} {'bare':>8} {'beyond':>8}  goal")
    with open(options.lines, "w") if options.lines else contextlib.nullcontext(sys.stderr) as lines:
        for problem in problems():
            measure(problem, found, options, lines)
        if "torch" in found:
            with cupy.cuda.using_allocator(interop.torch_allocator()):
                pooled = {"cupy": found["cupy"], "torch": found["torch"]}
                print("CuPy's memory from PyTorch's pool:")
                measure(problems()[0], pooled, options, lines)


if __name__ == "__main__":
    main()
