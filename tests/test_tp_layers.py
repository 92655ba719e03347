"""tp/layers.py: sums over ranks behind products that are split by rows, exact wherever the arithmetic is."""

import numpy as np
import pytest
from layer_checks import gptq, make_mlp, numbers
from tp_checks import in_threads

from cupyq._kernels import tracing
from cupyq.layers import DecoderLayer, LayerNorm, Linear, MoE, ParallelDecoderLayer, QMatrix, RMSNorm
from cupyq.ops.norm import rms_norm
from cupyq.ops.qmatmul import InputNorm
from cupyq.tp.layers import SUMMED_ROWS, NoHeads, SummedLinear, SummedMoE, SummingNorm, leave_sums_to_norms
from cupyq.tp.local import LocalComm
from cupyq.tp.split import take_rows


def on_ranks(ranks, work):
    """work(comm) of each rank, in threads."""
    results = in_threads([lambda comm=comm: work(comm) for comm in LocalComm.group(ranks)])
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def whole_numbers(*shape, seed=0):
    """Products of up to 1000 such numbers are exact in float32, in any order."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def part_of(weight, rank, ranks, bias=None):
    share = weight.shape[1] // ranks
    columns = slice(rank * share, (rank + 1) * share)
    return Linear(np.ascontiguousarray(weight[:, columns]), bias if rank == 0 else None, "o"), columns


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_sum_over_ranks_is_the_whole_product(ranks, has_bias):
    """Of whole numbers, so that every sum is exact: equal bits, whatever is added in which order."""
    x, weight, residual = whole_numbers(2, 3, 16), whole_numbers(8, 16, seed=1), whole_numbers(2, 3, 8, seed=2)
    bias = whole_numbers(8, seed=3) if has_bias else None
    whole = Linear(weight, bias)

    def work(comm):
        linear, columns = part_of(weight, comm.rank, ranks, bias)
        summed, mine = SummedLinear(linear, comm), np.ascontiguousarray(x[..., columns])
        hidden = residual.copy()
        assert summed(mine, residual=hidden, out=hidden) is hidden
        return summed(mine), hidden, summed(mine, residual=residual)

    for alone, hidden, added in on_ranks(ranks, work):
        assert alone.dtype == np.float32 and np.array_equal(alone, whole(x))
        assert np.array_equal(hidden, residual + whole(x)) and np.array_equal(added, hidden)


@pytest.mark.parametrize("ranks", [2, 4])
def test_quantized_parts(ranks):
    """GPTQ, whose products are those of float16 weights: the sum in float64 of the parts, rounded once."""
    k, n = 128, 32
    tensors = gptq(k, n, 5)
    whole = QMatrix.from_tensors(tensors)
    x, residual = numbers(3, k, seed=1).astype(np.float16), numbers(3, n, seed=2)
    exact = residual + x.astype(np.float64) @ whole.dense.astype(np.float64) + tensors["bias"].astype(np.float64)

    def work(comm):
        share = k // ranks
        rows = slice(comm.rank * share, (comm.rank + 1) * share)
        part = QMatrix.from_tensors(take_rows(tensors, range(k)[rows]))
        hidden = residual.copy()
        return SummedLinear(Linear(part), comm)(np.ascontiguousarray(x[:, rows]), residual=hidden, out=hidden)

    found = on_ranks(ranks, work)
    assert all(np.array_equal(found[0], other) for other in found)
    # Each rank rounds its part to float32 once, and the sum is rounded once.
    most = np.finfo(np.float32).eps * (np.abs(exact) + np.abs(x.astype(np.float64)) @ np.abs(whole.dense.astype(np.float64)))
    assert (np.abs(found[0] - exact) <= most).all()
    without_last = exact - x[:, k - 32 :].astype(np.float64) @ whole.dense[k - 32 :].astype(np.float64)
    assert not (np.abs(found[0] - without_last) <= most).all()


def test_float16_parts_are_not_rounded_before_the_sum():
    """Two large parts that cancel leave what float16 could not have held beside them."""
    x = np.ones((1, 2), np.float16)
    weight = np.array([[2048.0, 1.0, -2048.0, 0.5]], np.float32).astype(np.float16)

    def work(comm):
        linear, _ = part_of(weight, comm.rank, 2)
        hidden = np.zeros((1, 1), np.float32)
        return SummedLinear(linear, comm)(x), SummedLinear(linear, comm)(x, residual=hidden, out=hidden)

    for alone, added in on_ranks(2, work):
        assert alone[0, 0] == added[0, 0] == 1.5


def test_experts_are_split_and_summed():
    experts = [make_mlp(8, 32, "silu") for _ in range(3)]
    router = Linear(numbers(3, 8, seed=30))
    x, residual = numbers(2, 5, 8, seed=31), numbers(2, 5, 8, seed=32)
    whole = MoE(router, experts, 2)(x)

    def work(comm):
        mine = slice(comm.rank * 16, comm.rank * 16 + 16)
        parts = []
        for expert in experts:
            part = make_mlp(8, 32, "silu")
            part.gate, part.up = (Linear(linear.weight[mine]) for linear in (expert.gate, expert.up))
            part.down = Linear(np.ascontiguousarray(expert.down.weight[:, mine]))
            parts.append(part)
        moe = SummedMoE(MoE(router, parts, 2), comm)
        hidden = residual.copy()
        assert moe(x, residual=hidden) is hidden and moe.router is router
        assert len(moe.linears()) == 9 and moe.matrices() == []
        return moe(x), hidden

    (alone, hidden), (other, _) = on_ranks(2, work)
    assert np.array_equal(alone, other) and np.array_equal(hidden, residual + alone)
    assert np.linalg.norm(alone - whole) <= 1e-6 * np.linalg.norm(whole)


def test_a_rank_without_heads_adds_nothing():
    x, weight = whole_numbers(2, 3, 8), whole_numbers(8, 8, seed=1)
    whole = Linear(weight)

    for empty in (0, 1):  # rank 0 has the residual to add even where it has no heads

        def work(comm, empty=empty):
            hidden = x.copy()
            if comm.rank == empty:
                nothing = NoHeads(comm)
                assert nothing.linears() == nothing.matrices() == []
                return nothing(x, None), nothing(hidden, None, residual=hidden)
            linear = SummedLinear(Linear(weight), comm)
            return linear(x), linear(x, residual=hidden, out=hidden)

        for alone, hidden in on_ranks(2, work):
            assert np.array_equal(alone, whole(x)) and np.array_equal(hidden, x + whole(x))


# --- sums that are left to the next norm ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, SUMMED_ROWS, SUMMED_ROWS + 1])
def test_a_norm_sums_what_was_left_to_it(rows):
    """In one call for a few rows, beforehand for more: x is the sum after it, and the norm is of that."""
    parts, weight = [whole_numbers(1, rows, 16, seed=rank) for rank in range(3)], numbers(16, seed=9)
    total = parts[0] + parts[1] + parts[2]
    order = np.array([3, -1, 15, 0], np.int32)

    def work(comm):
        norm = SummingNorm(RMSNorm(weight, 1e-5), comm)
        x = parts[comm.rank].copy()
        before = norm.of_product(x, np.dtype(np.float16))
        assert np.array_equal(x, total) == (rows > SUMMED_ROWS) == (type(before) is InputNorm)
        y = before.applied(x, order if comm.rank == 1 else None)
        alone = parts[comm.rank].copy()
        return x, y, alone, norm(alone, np.dtype(np.float16))

    for rank, (x, y, alone, called) in enumerate(on_ranks(3, work)):
        assert np.array_equal(x, total) and np.array_equal(alone, total)
        expected = rms_norm(total, weight, eps=1e-5, dtype=np.float16)
        assert np.array_equal(called, expected)
        assert np.array_equal(y, rms_norm(total, weight, eps=1e-5, dtype=np.float16, order=order) if rank == 1 else expected)


def test_a_product_that_leaves_its_sum_makes_this_ranks_part():
    x, weight, residual = whole_numbers(2, 3, 16), whole_numbers(8, 16, seed=1), whole_numbers(2, 3, 8, seed=2)

    def work(comm):
        linear, columns = part_of(weight, comm.rank, 2)
        left, hidden, nothing, empty = SummedLinear(linear, comm), residual.copy(), NoHeads(comm), residual.copy()
        left.leaves_sum = nothing.leaves_sum = True
        left(np.ascontiguousarray(x[..., columns]), residual=hidden, out=hidden)
        assert np.array_equal(nothing(empty, None, residual=empty), residual * (comm.rank == 0))
        return hidden

    found = on_ranks(2, work)
    half = [Linear(np.ascontiguousarray(weight[:, s]))(np.ascontiguousarray(x[..., s])) for s in (slice(8), slice(8, 16))]
    assert np.array_equal(found[0], residual + half[0]) and np.array_equal(found[1], half[1])


def test_a_rank_without_heads_takes_part_in_the_sum_of_its_norm():
    parts, weight = [whole_numbers(1, 2, 8, seed=rank) for rank in range(2)], numbers(8, seed=3)

    def work(comm):
        hidden, nothing = parts[comm.rank].copy(), NoHeads(comm)
        nothing.leaves_sum = True
        norm = SummingNorm(RMSNorm(weight, 1e-5), comm).of_product(hidden, np.dtype(np.float32))
        if comm.rank == 1:
            return nothing(hidden, None, norm=norm, residual=hidden)
        norm.applied(hidden)
        return hidden

    summed, nothing = on_ranks(2, work)
    assert np.array_equal(summed, parts[0] + parts[1]) and not nothing.any()


class Part:
    def __init__(self, comm, name):
        setattr(self, name, SummedLinear(Linear(whole_numbers(4, 4)), comm))


class Experts:
    pass


def test_who_sums():
    """Each sum once: in the next RMSNorm of a DecoderLayer or of the model, else where it was."""
    comm = LocalComm.group(2)[0]

    def layer(norm=lambda: RMSNorm(np.ones(4, np.float32), 1e-5), mlp=lambda: Part(comm, "down"), **options):
        return DecoderLayer(Part(comm, "o"), mlp(), attention_norm=norm(), mlp_norm=norm(), **options)

    def layer_norm():
        return LayerNorm(np.ones(4, np.float32), None, 1e-5)

    def sums_of(layers, last):
        last = leave_sums_to_norms(layers, last, comm)
        said = []
        for one in layers:
            if type(one) is ParallelDecoderLayer:
                said.append((type(one.norm) is SummingNorm, one.attention.o.leaves_sum, one.mlp.down.leaves_sum))
                continue
            down = one.mlp.down.leaves_sum if hasattr(one.mlp, "down") else None
            norms = [type(norm) is SummingNorm for norm in (one.attention_norm, one.mlp_norm)]
            said.append((norms[0], one.attention.o.leaves_sum, norms[1], down))
        return [*said, type(last) is SummingNorm]

    rms = RMSNorm(np.ones(4, np.float32), 1e-5)
    plain, kept = (True, True, True, True), (False, False, False, False)
    assert sums_of([layer(), layer(), layer()], rms) == [(False, True, True, True), plain, plain, True]
    assert sums_of([layer()], layer_norm()) == [(False, True, True, False), False]
    assert sums_of([layer(layer_norm)], layer_norm()) == [kept, False]
    posts = [layer(attention_post_norm=rms, mlp_post_norm=rms) for _ in range(2)]
    assert sums_of(posts, rms) == [kept, kept, False]
    assert sums_of([layer(mlp=Experts), layer()], rms) == [(False, True, True, None), (False, True, True, True), True]
    parallel = ParallelDecoderLayer(Part(comm, "o"), Part(comm, "down"), norm=rms)
    assert sums_of([layer(), parallel, layer()], rms) == [
        (False, True, True, False),
        (False, False, False),
        (False, True, True, True),
        True,
    ]


def test_nothing_is_exchanged_while_kernels_are_traced():
    comm = LocalComm.group(2, stall_s=0.1)[0]
    with tracing():
        assert SummedLinear(Linear(whole_numbers(4, 4)), comm)(whole_numbers(1, 4)).shape == (1, 4)
        norm = SummingNorm(RMSNorm(np.ones(4, np.float32), 1e-5), comm)
        for rows in (1, SUMMED_ROWS + 1):
            x = whole_numbers(rows, 4)
            assert norm.of_product(x, np.dtype(np.float32)).applied(x).shape == (rows, 4)
