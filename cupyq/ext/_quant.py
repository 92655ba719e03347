"""Packing, rounding and the search for scales and bit widths: quant of ops.md's index."""

import itertools

from cupyq import ops
from cupyq._arrays import check, float32
from cupyq.ext._arrays import entry, integer, number
from cupyq.quantize import anneal


@entry(arrays=("input", "output"), writes=("output",))
def pack_rows_4(input, output):
    """output[g, c] = the nibbles input[g, 8c + i] - 1, lowest first

    input int16 [G, N] of 1 to 16, output int32 [G, N/8]. Each nibble is masked: values out of range spoil no neighbour.
    """
    ops.pack_rows_4(input, out=output)


@entry(arrays=("input", "output"), writes=("output",))
def pack_columns(input, output, bits):
    """output = the codes of input as one bit stream down each column

    input int16 [rows, N], output int32 [rows * bits / 32, N], bits 2, 3, 4, 5, 6 or 8, rows a multiple of 32.
    """
    ops.pack_columns(input, integer(bits, "bits"), out=output)


@entry(arrays=("input", "output", "scale"), optional=("out_q",), writes=("output", "out_q"))
def quantize(input, output, scale, out_q, qzero, maxq):
    """out_q = the codes clamp(rint(input / scale) + qzero, 0, maxq), output = their values

    input and output float32 [rows, N], scale float32 [N], out_q int16 [rows, N] or None.
    """
    ops.quantize(input, scale, integer(qzero, "qzero"), integer(maxq, "maxq"), codes=out_q, out=output)


@entry(arrays=("input", "output", "scale"), writes=("output",))
def quantize_err(input, output, scale, qzero, maxq, err_norm, min_p, max_p, p_grid):
    """output[i] += the sum of |error| ** err_norm over input quantized with scale times the i-th of p_grid + 1 factors

    input float32 [rows, N], scale float32 [N], output float32 [p_grid + 1, slots]. exllamav2 spreads each sum over 128
    slots and adds them afterwards; here the whole sum, in a fixed order, is added to the first.
    """
    p_grid = integer(p_grid, "p_grid", low=1)
    check(output, "output", dtype=float32, shape=(p_grid + 1, None))
    if output.shape[1] == 0:
        raise ValueError(f"output must have a column for the sums, got shape {output.shape}")
    qzero, maxq = integer(qzero, "qzero"), integer(maxq, "maxq")
    err_norm, min_p, max_p = number(err_norm, "err_norm"), number(min_p, "min_p"), number(max_p, "max_p")
    output[:, 0] += ops.quantize_err(input, scale, qzero, maxq, err_norm, min_p, max_p, p_grid)


@entry(
    arrays=("quant", "scale", "hessian_inv", "weights", "error"),
    optional=("out_q",),
    writes=("quant", "out_q", "weights", "error"),
)
def quantize_range(quant, scale, out_q, qzero, maxq, hessian_inv, weights, error, a, b):
    """GPTQ over the rows a to b of weights, in place: see `cupyq.ops.quantize_range`

    quant, weights, error float32 [K, N]; scale float32 [N]; hessian_inv float32 [K, K], the upper Cholesky factor of the
    inverse Hessian; out_q int16 [K, N] or None.
    """
    qzero, maxq = integer(qzero, "qzero"), integer(maxq, "maxq")
    a, b = integer(a, "a", low=0), integer(b, "b", low=0)
    ops.quantize_range(weights, quant, error, scale, hessian_inv, qzero, maxq, a, b, codes=out_q)


@entry(arrays=("weights", "scale"), optional=("out_q",), writes=("weights", "out_q"))
def quantize_range_inplace(weights, scale, out_q, qzero, maxq, a, b):
    """The rows a to b of weights rounded to their nearest codes, in place; the codes to out_q

    weights float32 [K, N], scale float32 [N], out_q int16 [K, N] or None.
    """
    qzero, maxq = integer(qzero, "qzero"), integer(maxq, "maxq")
    a, b = integer(a, "a", low=0), integer(b, "b", low=0)
    ops.quantize_range_inplace(weights, scale, qzero, maxq, a, b, codes=out_q)


_anneal_seeds = itertools.count()


def sim_anneal(slots, max_cost, initial_temp, cooling_factor, min_temp, iterations, norm):
    """(solution, solution_idx, sum, cost, max_err) of one option per slot: see `cupyq.quantize.anneal.sim_anneal`

    slots: lists of (cost, err). exllamav2 seeds each call from the system. Here the calls of a process are numbered and
    the number is the seed: repeated calls explore anew, and a program that is run again finds the same solutions.
    """
    max_cost, iterations = integer(max_cost, "max_cost"), integer(iterations, "iterations", low=0)
    given = {"initial_temp": initial_temp, "cooling_factor": cooling_factor, "min_temp": min_temp, "norm": norm}
    initial_temp, cooling_factor, min_temp, norm = (number(value, name) for name, value in given.items())
    return anneal.sim_anneal(
        slots, max_cost, initial_temp, cooling_factor, min_temp, iterations, norm, seed=next(_anneal_seeds)
    )
