"""`cupyq bench tp --what decode`: random parts against parts that are cut, rows, ranks that disagree; on GPUs, too."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from tp_checks import several_gpus  # noqa: F401

from cupyq._arrays import float16
from cupyq.bench import tp as bench_tp
from cupyq.bench import tp_decode as bench
from cupyq.bench.random_model import model_config, random_checkpoint, random_model
from cupyq.bench.shapes import CONFIGS
from cupyq.cli import main
from cupyq.errors import BackendError
from cupyq.models.loader import Blueprint
from cupyq.tp.loading import RankPlan
from cupyq.tp.local import LocalComm
from cupyq.tp.model import RankModel
from cupyq.tp.plan import TPPlan

TINY = bench.Options("tiny", layers=2, gpus=(1, 2), backend="numpy", steps=5)
# Groups of 128 that a rank has but a part of, a vocabulary that the head is padded for, biases.
QWEN = CONFIGS["tiny"] | {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 256, "intermediate_size": 384, "vocab_size": 250, "dtype": "float16",
}  # fmt: skip


def plans(config, ranks, bits="4"):
    """(of random words, of what is cut) for each rank."""
    sizes, checkpoint = model_config(config), random_checkpoint(config, bits, 6)
    for comm in LocalComm.group(ranks):
        both = [
            kind(sizes, checkpoint, np, float16, comm, TPPlan.of(sizes, ranks)) for kind in (bench.RandomRankPlan, RankPlan)
        ]
        for plan in both:
            Blueprint(plan)
        yield both


@pytest.mark.parametrize("bits", ["4", "4.65"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_random_parts_are_like_parts_that_are_cut(ranks, bits):
    padded = 0
    for rank, (made, cut) in enumerate(plans(QWEN, ranks, bits)):
        for (part, tensors), (_, expected) in zip(made.read(made.parts), cut.read(cut.parts), strict=True):
            assert tensors.keys() == expected.keys(), part.key
            padded += "row_input" in tensors
            for short, array in tensors.items():
                assert (array.shape, array.dtype) == (expected[short].shape, expected[short].dtype), (part.key, short)
                if short not in ("q_weight", "q_scale"):
                    assert np.array_equal(array, expected[short]), (rank, part.key, short)
        assert {key: bench._width(share) for key, share in made.shares().items()} == {
            key: bench._width(share) for key, share in cut.shares().items()
        }
        down = "model.layers.1.mlp.down_proj"
        assert np.array_equal(made.shares()[down].rows, cut.shares()[down].rows)
    assert padded, "no layer of any rank was padded"


def test_ranks_have_words_of_their_own():
    heads = []
    for made, _ in plans(QWEN, 2):
        heads.append({part.key: tensors for part, tensors in made.read(made.parts)}["lm_head"]["q_weight"][:, :64])
    assert not np.array_equal(*heads)


def test_the_table_on_threads():
    out, lines = io.StringIO(), io.StringIO()
    rows, is_right = bench.run(TINY, out, lines)
    assert is_right and [json.loads(line) for line in lines.getvalue().splitlines()] == rows
    common = {"family": "tp", "what": "decode", "shape": "tiny", "layers": 2, "bits": "4", "head_bits": 6, "steps": 5}
    assert [row["gpus"] for row in rows] == [1, 2] and all(common.items() <= row.items() for row in rows)
    for row in rows:
        assert row["tokens_per_s"] * row["milliseconds"] == pytest.approx(1000) and row["tokens_per_s"] > 0
        assert row["speed_up"] == pytest.approx(row["tokens_per_s"] / rows[0]["tokens_per_s"])
        assert [row[name] for name in ("limit_tokens_per_s", "share", "sum_us", "sums_share")] == [None] * 4
    whole = sum(layer.storage_bits for layer in random_model(QWEN | CONFIGS["tiny"], "4", 6, "numpy").linear_layers()) // 8
    assert rows[0]["gigabytes"] == whole / 1e9 and 0.5 * whole <= 1e9 * rows[1]["gigabytes"] < 0.8 * whole
    text = out.getvalue().splitlines()
    assert text[0] == "NumPy, no GPU" and text[1].startswith("tiny: 2 layers at 4 bits") and len(text) == 3 + len(rows)
    assert {len(line) for line in text[2:]} == {len(bench.COLUMNS)}


def test_limits_and_sums_of_a_row(monkeypatch):
    """4 MB of weights at 2 GB/s are 2 ms at least; a step of 4 ms is half of the limit, 2 x 2 sums of 100 us a tenth."""
    tokens = np.arange(6)
    found = [([0.020, 0.016, 0.018], tokens, 4_000_000), ([0.019, 0.020, 0.024], tokens, 3_000_000)]
    monkeypatch.setattr(bench, "sum_us", lambda ranks, values: {(2, 64): 100.0}[ranks, values])
    monkeypatch.setattr(bench, "run_ranks", lambda work, ranks, backend: found)
    monkeypatch.setattr(bench, "_free_memory", lambda count: None)
    config = {"hidden_size": 64, "num_hidden_layers": 2}
    row = bench._row(replace(TINY, backend="cupy"), config, None, 2, 2.0, [{"gpus": 1, "tokens_per_s": 125.0}])
    assert row["milliseconds"] == pytest.approx(4) and row["tokens_per_s"] == pytest.approx(250)  # 20 ms, 5 steps
    assert row["speed_up"] == pytest.approx(2) and row["gigabytes"] == pytest.approx(0.004) and row["is_right"]
    assert row["limit_tokens_per_s"] == pytest.approx(500) and row["share"] == pytest.approx(0.5)
    assert row["sum_us"] == 100 and row["sums_share"] == pytest.approx(0.1)
    assert bench.row_text(row).split() == ["2", "250.0", "4.000", "2.00", "0.00", "50.0%", "100.0", "10.0%"]
    assert len(bench.row_text(row)) == len(bench.COLUMNS)
    assert bench._row(replace(TINY, backend="cupy"), config, None, 2, 2.0, [])["speed_up"] is None


def test_ranks_that_draw_other_tokens_are_found(monkeypatch):
    joined = RankModel._joined
    monkeypatch.setattr(RankModel, "_joined", lambda self, logits: np.roll(joined(self, logits), self.comm.rank, axis=-1))
    out = io.StringIO()
    rows, is_right = bench.run(TINY, out)
    assert not is_right and [row["is_right"] for row in rows] == [True, False]
    assert [line.endswith("WRONG") for line in out.getvalue().splitlines()[3:]] == [False, True]


def test_tokens_of_no_logits_are_wrong():
    right = np.array([3, 1, 4])
    assert bench._is_agreed([right, right.copy()]) and bench._is_agreed([right])
    assert not bench._is_agreed([right, right, np.array([3, 1, 5])]) and not bench._is_agreed([np.array([3, -1])] * 2)


def test_the_text_is_more_than_one_token():
    checkpoint = random_checkpoint(CONFIGS["tiny"] | {"dtype": "float16"}, "4", 6)
    (_, tokens, _), (_, others, _) = bench.run_ranks(
        lambda comm: bench._on_rank(TINY, CONFIGS["tiny"] | {"dtype": "float16"}, checkpoint, comm), 2, backend="numpy"
    )
    assert len(tokens) == 1 + bench.WARM_STEPS + bench.REPEATS * TINY.steps and np.array_equal(tokens, others)
    assert len(set(tokens.tolist())) > 5


def test_what_is_measured_where(monkeypatch):
    monkeypatch.setattr(bench._device, "count", lambda: 5)
    assert bench.Options.parse("llama-3.1-70b", "4") == bench.Options()
    quick = bench.Options.parse("llama-3.1-70b", "2.5", is_quick=True)
    assert (quick.bits, quick.layers, quick.steps) == ("2.5", bench.QUICK_LAYERS, bench.QUICK_STEPS)
    assert bench.Options.parse("tiny", "4", is_quick=True).layers == 2
    assert bench.Options.parse("tiny", "4", 1, (3,)).gpus == (3,) and bench.Options.parse("tiny", "4", 1).layers == 1
    assert bench.Options.parse("tiny", "4", backend="numpy") == replace(TINY, steps=128)
    with pytest.raises(BackendError, match=r"this process sees 5 GPUs, asked for \[1, 8\]: ask for fewer"):
        bench.Options.parse("tiny", "4", gpus=(1, 8))
    for shape, bits, message in (("gpt-5", "4", "--shape: 'gpt-5'"), ("tiny", "9", "--bits: '9'"), ("tiny", "gptq", "--bits")):
        with pytest.raises(ValueError, match=message):
            bench.Options.parse(shape, bits)


# --- the command line -------------------------------------------------------------------------------------------------

DECODE = ["bench", "tp", "--what", "decode", "--backend", "numpy", "--shape", "tiny", "--layers", "1", "--quick"]


def test_the_command_measures_decoding(capsys, tmp_path):
    target = tmp_path / "rows.jsonl"
    assert main([*DECODE, "--gpus", "2", "--json", "--out", str(target)]) == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["rows"]
    assert (row["what"], row["gpus"], row["speed_up"], row["steps"]) == ("decode", 2, None, bench.QUICK_STEPS)
    assert json.loads(target.read_text()) == row and "tiny: 1 layers" in captured.err
    assert main(["bench", "tp", "--help"]) == 0
    text = capsys.readouterr().out
    options = ("--what", "--gpus", "--shape", "--bits", "--layers", "--backend", "--quick", "--out", "--json")
    assert [option for option in options if option not in text] == []


def test_sums_come_first_and_one_gpu_has_none(capsys, monkeypatch):
    done = []

    def stand_in(name, is_right):
        def run(options, out, lines):
            done.append((name, options.gpus))
            return [{"what": name}], is_right

        return run

    for module in (bench, bench_tp):
        monkeypatch.setattr(module._device, "count", lambda: 4)
    monkeypatch.setattr(bench_tp, "run", stand_in("sums", False))
    monkeypatch.setattr(bench, "run", stand_in("decode", True))
    assert main(["bench", "tp", "--json"]) == 1  # the sums were wrong
    assert json.loads(capsys.readouterr().out)["rows"] == [{"what": "sums"}, {"what": "decode"}]
    assert main(["bench", "tp", "--gpus", "1,4"]) == 1 and main(["bench", "tp", "--gpus", "1"]) == 0
    assert main(["bench", "tp", "--gpus", "1", "--what", "decode"]) == 0
    assert main(["bench", "tp", "--gpus", "3", "--what", "all-reduce"]) == 1
    both = [("sums", (2, 4)), ("decode", (1, 2, 4)), ("sums", (4,)), ("decode", (1, 4))]
    assert done == [*both, ("decode", (1,)), ("decode", (1,)), ("sums", (3,))]
    capsys.readouterr()
    assert main(["bench", "tp", "--gpus", "1", "--what", "all-reduce"]) != 0
    assert "all-reduces take 2 GPUs or more" in capsys.readouterr().err


# --- on several GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_table_on_gpus(several_gpus, monkeypatch):  # noqa: F811
    monkeypatch.setattr(bench, "read_gigabytes_per_s", lambda: 3000.0)
    out = io.StringIO()
    rows, is_right = bench.run(replace(TINY, backend="cupy", gpus=(1, 2), steps=32), out)
    assert is_right, out.getvalue()
    assert rows[0]["sum_us"] is None and rows[1]["sum_us"] > 0 and rows[1]["sums_share"] > 0
    assert all(0 < row["share"] < 1 and row["speed_up"] > 0 for row in rows) and rows[1]["gigabytes"] < rows[0]["gigabytes"]


@pytest.mark.gpu
def test_a_wider_model_on_gpus(several_gpus, monkeypatch):  # noqa: F811
    """Parts with rows that pad them, heads that ranks have, a vocabulary in unequal parts."""
    wide = QWEN | {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1536}
    monkeypatch.setitem(bench.CONFIGS, "wide", wide | {"vocab_size": 1000})
    monkeypatch.setattr(bench, "read_gigabytes_per_s", lambda: 3000.0)
    ranks = min(several_gpus, 4)
    rows, is_right = bench.run(replace(TINY, shape="wide", backend="cupy", gpus=(ranks,), steps=32), io.StringIO())
    assert is_right and rows[0]["gpus"] == ranks and rows[0]["speed_up"] is None
