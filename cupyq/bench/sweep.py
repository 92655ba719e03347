"""`cupyq bench qmatmul --sweep`: every sensible way of a product, and what the one in use loses.

The ways `pick_kernel` chooses from: the few-rows kernel (mma) and Hopper's own (wgmma), each in every configuration that its
module lists as a candidate, and weights reconstructed for cuBLAS. So what `pick_kernel`, `pick_config` and
`pick_wgmma_config` choose can be measured again on another GPU.
"""

import contextlib
import dataclasses
import importlib
import sys

from cupyq import _device, _kernels, _replay
from cupyq._arrays import require_cupy
from cupyq.bench.limits import measure_limits
from cupyq.bench.peers import free_memory
from cupyq.bench.qmatmul import ALLOWED_ERROR, Exact, Products, product_flops, random_rows
from cupyq.bench.random_matrices import Words, random_tensors, words_needed
from cupyq.bench.table import emit
from cupyq.ops.qmatmul_config import candidate_configs, current_problem, pick_config

_ops = importlib.import_module("cupyq.ops.qmatmul")  # the op of the same name hides the module
_wgmma = importlib.import_module("cupyq.ops.qmatmul_wgmma")
WAYS = ("mma", "wgmma", "dequantise")
MMA_ROWS = 256
"""Beyond so many rows the few-rows kernel is not worth timing."""
_FINALISTS = 3


@contextlib.contextmanager
def pinned(way, config=None):
    """Products go this way, with this config (None: the one that would be picked), whatever their number of rows."""
    names = {"mma": "pick_config", "wgmma": "wgmma_config"}
    changes = [(_ops, "pick_kernel", way)]
    if config is not None:
        changes += [(module, names[way], config) for module in (_ops, _wgmma) if hasattr(module, names[way])]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, lambda *arguments, value=value, **options: value)
    _replay.forget()
    try:
        yield
    finally:
        _replay.forget()
        for module, name, function in before:
            setattr(module, name, function)


def run(options, out=None, lines=None):
    """Measure all; returns (rows, whether all results were right). `lines`: a file for one JSON object per row."""
    out = sys.stdout if out is None else out
    cupy, limits, found = require_cupy(), measure_limits(), []
    head = f"{'K x N':>13} {'bits':>9} {'rows':>5} {'in use us':>9} {'mma':>9} {'wgmma':>9} {'dequant':>9} {'best us':>9}"
    print(f"{limits}\n{head} {'regret':>7}  best", file=out, flush=True)
    for k, n in options.shapes:
        words = Words(cupy, words_needed(k, n))
        x = random_rows(max(options.rows), k, options.dtype, cupy)
        for kind in options.kinds:
            products = Products(kind, k, n, random_tensors(kind, k, n, words, cupy), options.rows, options.dtype)
            cases = {rows: _cases(products, rows) for rows in options.rows}
            _compile(products, cases, x)
            exact = Exact(products.matrices[0], x, options.rows)
            for rows in options.rows:
                limit_us = limits.microseconds(kind.product_bytes(rows, k, n), product_flops(rows, k, n))
                row = {
                    "family": "qmatmul sweep",
                    "device": limits.device,
                    "k": k,
                    "n": n,
                    "bits": kind.name,
                    "layout": kind.layout,
                    "rows": rows,
                    "dtype": str(x.dtype),
                    "limit_us": limit_us,
                }
                found.append(row | _measure(products, cases[rows], x[:rows], exact, limit_us))
                emit(found[-1], row_text(found[-1]), out, lines)
            del products, exact
            free_memory()
        del words, x
    regrets = [row["regret"] for row in found]
    print(f"regret: mean {sum(regrets) / len(regrets):.1%}, largest {max(regrets):.1%}", file=out)
    return found, not any(row["wrong"] for row in found)


def _cases(products, rows):
    """[(way, config or None)] worth timing."""
    device, joined = _device.current(), products.matrices[0]
    cases = [("dequantise", None)]
    if device.arch == "sm_90a":
        sizes = (rows, (joined.n,), joined.width_blocks, joined.kind == "gptq", device.sm_count)
        cases += [("wgmma", config) for config in _wgmma.candidate_wgmma_configs(*sizes)]
    if rows <= MMA_ROWS:
        problem = current_problem(rows, joined)
        cases += [("mma", config) for config in dict.fromkeys([pick_config(problem), *candidate_configs(problem)])]
    return cases


def _compile(products, cases, x):
    """The kernels of all cases, and a workspace for the largest of them."""
    joined = products.matrices[0]
    with _kernels.tracing() as wanted:
        for rows, ways in cases.items():
            for way, config in ways:
                with pinned(way, config):
                    if way == "wgmma":
                        products.reserve(rows, sum(_wgmma.wgmma_workspace_parts(rows, joined.blocks, config)))
                    products.reserve(rows)
                    products.product(x[:rows], products.matrices[0])
    _kernels.compile_all([instance for instance, _ in wanted], _device.current().arch, "compiling for the sweep")


def _measure(products, cases, x, exact, limit_us):
    """What is known of one product afterwards; the fastest cases are measured again, with more care."""
    found, wrong = {}, []
    in_use = products.microseconds(x, 2 * limit_us, repeats=9)
    for case in cases:
        with pinned(*case):
            if exact.error(products.verified(x)) > ALLOWED_ERROR[x.dtype]:
                wrong.append(case)
                print(f"WRONG: {case}", file=sys.stderr, flush=True)
            else:
                found[case] = products.microseconds(x, 2 * limit_us, repeats=3)
    for case in sorted(found, key=found.get)[:_FINALISTS]:
        with pinned(*case):
            found[case] = products.microseconds(x, 2 * limit_us, repeats=9)
    best = sorted(found, key=found.get)[:_FINALISTS]
    ways = {way: min((us for (name, _), us in found.items() if name == way), default=None) for way in WAYS}
    return {
        "in_use_us": in_use,
        "ways_us": ways,
        "best": [{"us": found[case]} | _case(case) for case in best],
        "regret": in_use / found[best[0]] - 1 if best else 0.0,
        "cases": len(cases),
        "wrong": [_case(case) for case in wrong],
    }


def _case(case):
    way, config = case
    return {"way": way, "config": None if config is None else dataclasses.asdict(config)}


def row_text(row):
    best = row["best"][0] if row["best"] else {"us": float("nan"), "way": "none", "config": None}
    config = " ".join(f"{name}={value}" for name, value in (best["config"] or {}).items())
    ways = " ".join(f"{'-' if row['ways_us'][way] is None else format(row['ways_us'][way], '.1f'):>9}" for way in WAYS)
    shape = f"{row['k']}x{row['n']}"
    return (
        f"{shape:>13} {row['bits']:>9} {row['rows']:>5} {row['in_use_us']:>9.1f} {ways} {best['us']:>9.1f} "
        f"{row['regret']:>7.1%}  {best['way']} {config}"
    )
