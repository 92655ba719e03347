"""Who holds what: whole models covered once, shares as even as units allow, the same on every rank."""

import doctest
import itertools
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT

from cupyq import tp
from cupyq.models.config import ModelConfig
from cupyq.tp import plan as plan_module
from cupyq.tp.plan import TPPlan, shares


@dataclass
class Sizes:
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 14336
    vocab_size: int = 128256
    expert_size: int = 0


def spans(ranges):
    return [(part.start, part.stop) for part in ranges]


def check_whole(ranges, size, unit):
    """The ranges cover 0 to size - 1 once and in order, and their borders are multiples of `unit`."""
    assert list(itertools.chain(*ranges)) == list(range(size))
    assert all(part.start % unit == 0 or part.start == size for part in ranges)


def check_heads(sizes, plan):
    """Every query head once; the KV heads of a rank are those of its query heads, each of as many of them."""
    group = sizes.num_attention_heads // sizes.num_key_value_heads
    check_whole(plan.heads, sizes.num_attention_heads, 1)
    for heads, kv_heads in zip(plan.heads, plan.kv_heads, strict=True):
        needed = [head // group for head in heads]
        assert sorted(set(needed)) == list(kv_heads)
        assert len({needed.count(kv_head) for kv_head in kv_heads}) <= 1


def test_a_large_model_in_equal_parts():
    sizes = Sizes(num_attention_heads=64, intermediate_size=28672)
    for ranks in (1, 2, 4, 8):
        plan = TPPlan.of(sizes, ranks)
        for ranges, size in (
            (plan.heads, 64),
            (plan.kv_heads, 8),
            (plan.inner, 28672),
            (plan.vocab, 128256),
        ):
            assert spans(ranges) == [(rank * size // ranks, (rank + 1) * size // ranks) for rank in range(ranks)]
        assert plan.head_columns(ranks - 1) == range(64 * 128 - 64 * 128 // ranks, 64 * 128)
        assert plan.kv_columns(ranks - 1) == range(1024 - 1024 // ranks, 1024)


def test_kv_heads_are_held_by_several_ranks_where_they_are_fewer():
    plan = TPPlan.of(Sizes(num_attention_heads=64, intermediate_size=28672), 16)
    assert spans(plan.heads) == [(4 * rank, 4 * rank + 4) for rank in range(16)]
    assert spans(plan.kv_heads) == [(rank // 2, rank // 2 + 1) for rank in range(16)]
    plan = TPPlan.of(Sizes(4, 2, 64, 768, 1024), 3)
    assert (spans(plan.heads), spans(plan.kv_heads)) == ([(0, 1), (1, 2), (2, 4)], [(0, 1), (0, 1), (1, 2)])


def test_more_ranks_than_heads_leave_some_without():
    plan = TPPlan.of(Sizes(3, 1, 64, 384, 512), 4)
    assert (spans(plan.heads), spans(plan.kv_heads)) == ([(0, 1), (1, 2), (2, 3), (3, 3)], [(0, 1)] * 3 + [(0, 0)])
    assert spans(plan.inner) == [(96 * rank, 96 * rank + 96) for rank in range(4)]
    assert len(plan.head_columns(3)) == len(plan.kv_columns(3)) == 0
    # The lightest rank goes without.
    plan = TPPlan.of(Sizes(2, 1, 64, 384, 512), 3, weights=(1, 3, 2))
    assert spans(plan.heads) == [(0, 0), (0, 1), (1, 2)]


@pytest.mark.parametrize(
    "inner, ranks, unit",
    [(14336, 2, 128), (14336, 3, 128), (11008, 4, 128), (768, 2, 128), (768, 4, 32), (352, 2, 32), (384, 4, 32), (256, 3, 32)],
)
def test_inner_features_go_by_128_where_that_is_about_as_even(inner, ranks, unit):
    parts = TPPlan.of(Sizes(intermediate_size=inner), ranks).inner
    check_whole(parts, inner, unit)
    assert max(map(len, parts)) - min(map(len, parts)) <= unit
    assert max(map(len, parts)) <= 1.05 * 32 * -(-inner // 32 // ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("weights", [None, (5, 1, 2, 2, 7, 1, 1, 3)])
def test_models_of_all_shapes_are_covered(ranks, weights):
    weights = None if weights is None else weights[:ranks]
    for heads, kv_heads in ((32, 8), (4, 2), (3, 1), (28, 4), (40, 40), (12, 6), (71, 1), (16, 4), (5, 5), (25, 5)):
        for inner, vocab in ((320, 512), (1056, 1000), (13440, 32001)):
            sizes = Sizes(heads, kv_heads, 64, inner, vocab)
            plan = TPPlan.of(sizes, ranks, weights)
            check_heads(sizes, plan)
            check_whole(plan.inner, inner, 32)
            check_whole(plan.vocab, vocab, 32)
            assert all(map(len, plan.inner)) and all(map(len, plan.vocab))
            assert heads < ranks or kv_heads < ranks or all(map(len, plan.heads))


@pytest.mark.parametrize("model", sorted((ROOT / "tests/models").iterdir()) + sorted((ROOT / "examples/models").iterdir()))
def test_every_model_of_the_tree_splits(model):
    config = ModelConfig.from_file(model)
    for ranks in (1, 2, 3, 4):
        plan = TPPlan.of(config, ranks)
        check_heads(config, plan)
        check_whole(plan.inner, config.intermediate_size, 32)
        check_whole(plan.vocab, config.vocab_size, 32)


def test_shares_keep_the_fullest_rank_as_empty_as_can_be():
    rng = np.random.default_rng(1)
    for _ in range(60):
        count = int(rng.integers(1, 4))
        weights = [Fraction(int(w)) for w in rng.integers(1, 9, count)]
        total = int(rng.integers(count, 14))
        found = shares(total, weights)
        every = (c for c in itertools.product(range(1, total + 1), repeat=count) if sum(c) == total)
        least = min(max(c / w for c, w in zip(counts, weights, strict=True)) for counts in every)
        assert sum(found) == total and min(found) >= 1
        assert max(c / w for c, w in zip(found, weights, strict=True)) == least


def test_shares_follow_memory():
    plan = TPPlan.of(Sizes(), 3, weights=[80e9, 40e9, 40e9])
    assert [len(part) for part in plan.kv_heads] == [4, 2, 2]
    assert [len(part) for part in plan.heads] == [16, 8, 8]
    assert [len(part) for part in plan.inner] == [7168, 3584, 3584]
    assert [len(part) for part in plan.vocab] == [64128, 32064, 32064]
    # A rank of almost no memory still takes part; a heavy rank of several on one KV head serves more of its query heads.
    assert min(len(part) for part in TPPlan.of(Sizes(), 2, weights=[1, 1e-6]).inner) == 32
    plan = TPPlan.of(Sizes(num_key_value_heads=1), 2, weights=[3, 1])
    assert (spans(plan.heads), spans(plan.kv_heads)) == ([(0, 24), (24, 32)], [(0, 1)] * 2)
    # Teams: the heavy rank is one of its own.
    plan = TPPlan.of(Sizes(num_key_value_heads=2), 3, weights=[4, 2, 2])
    assert spans(plan.heads) == [(0, 16), (16, 24), (24, 32)]


def test_equal_inputs_give_equal_plans():
    plans = [TPPlan.of(Sizes(), 3, w) for w in ([2, 1, 1], (2.0, 1.0, 1.0), np.array([2, 1, 1], np.float32), (80, 40, 40))]
    assert len(set(plans)) == 1
    assert TPPlan.of(Sizes(), 3) == TPPlan.of(Sizes(), np.int64(3)) == TPPlan.of(Sizes(), 3, [0.1] * 3) != plans[0]


@pytest.mark.parametrize(
    "sizes, arguments, kind, message",
    [
        (Sizes(), (0,), ValueError, "ranks must be from 1 to 256, got 0"),
        (Sizes(), (2.0,), TypeError, "ranks must be a whole number, got float"),
        (Sizes(), (True,), TypeError, "got bool"),
        (Sizes(), (2, [1]), ValueError, "weights must be 2 numbers, one for each rank, got 1"),
        (Sizes(), (2, [1, 0]), ValueError, r"weights\[1\] must be above 0"),
        (Sizes(), (2, [float("nan"), 1]), ValueError, r"weights\[0\] must be a finite number"),
        (Sizes(), (2, [1, float("inf")]), ValueError, r"weights\[1\] must be a finite number"),
        (Sizes(), (2, [1, None]), ValueError, r"weights\[1\] must be a finite number"),
        (Sizes(30, 8), (2,), ValueError, "num_attention_heads must be a multiple of num_key_value_heads, 8, got 30"),
        (Sizes(intermediate_size=96), (4,), ValueError, "intermediate_size 96 makes 3 parts of 32, fewer than 4 ranks"),
        (Sizes(vocab_size=65), (4,), ValueError, "vocab_size 65 makes 3 parts of 32, fewer than 4 ranks: use at most 3"),
    ],
)
def test_what_does_not_divide_is_named(sizes, arguments, kind, message):
    with pytest.raises(kind, match=message) as error:
        TPPlan.of(sizes, *arguments)
    assert "\n" not in str(error.value)


def test_the_example_of_shares():
    assert doctest.testmod(plan_module) == (0, 1)


def test_rules_need_neither_a_gpu_nor_the_ops():
    bare = f"import sys, types; sys.modules['cupyq.tp'] = bare = types.ModuleType('cupyq.tp'); bare.__path__ = {tp.__path__}; "
    code = bare + "import cupyq.tp.plan, cupyq.tp.split; print(*(m for m in sys.modules if m.startswith(('cupy.', 'cupyq.'))))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[1] if name.startswith("cupyq.") else name for name in result.stdout.split()}
    assert loaded == {"_version", "errors", "formats", "tp"}
