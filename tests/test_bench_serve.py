"""bench/serve.py: what its rows say of jobs, on NumPy and on a GPU."""

import json

import pytest
from conftest import ROOT

from cupyq.cli import main

MODEL = ROOT / "examples/models/shakespeare-exl2-2.5"
TEXT = ROOT / "examples/models/shakespeare/val.txt"


def bench(capsys, *options):
    code = main(["bench", "serve", "--json", *map(str, options)])
    assert code == 0
    said = capsys.readouterr()
    return json.loads(said.out)["rows"], said.err.splitlines()


def check(row, jobs, new):
    assert row["jobs"] == jobs and row["new"] == new
    assert row["tokens_per_s"] == pytest.approx(jobs * row["tokens_per_s_of_a_job"])
    # Every step gives every job a token, or more where they are guessed.
    per_step = row["tokens_per_step"]
    assert row["tokens_per_s"] == pytest.approx(1e3 * jobs * per_step / row["ms_per_step"], rel=1e-6)
    assert 0 < row["host_ms"] <= row["ms_per_step"] and row["first_token_s"] > 0 and row["prompt_tokens_per_s"] > 0


def test_rows_of_random_weights(capsys, tmp_path):
    options = ("--shape", "tiny", "--concurrent", "1,3", "--prompt", 24, "--new", 16, "--backend", "numpy")
    rows, lines = bench(capsys, *options, "--out", tmp_path / "rows")
    for row, jobs in zip(rows, (1, 3), strict=True):
        check(row, jobs, 16)
        # A step queued late has one step too many at the end, of which nothing is seen.
        assert 0.8 < row["tokens_per_step"] <= 1 and row["launches_ms"] > 0 and row["accepted"] is None
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == rows
    assert "NumPy" in lines[0] and lines[1].split()[0] == "jobs" and [line.split()[0] for line in lines[2:]] == ["1", "3"]


@pytest.mark.parametrize("draft", ["ngram", MODEL])
def test_guesses_are_counted(capsys, draft):
    options = ("--model", MODEL, "--text", TEXT, "--concurrent", "2", "--prompt", 48, "--new", 16, "--backend", "numpy")
    ((row,), _) = bench(capsys, *options, "--draft", draft, "--guesses", 3)
    check(row, 2, 16)
    assert row["launches_ms"] is None and row["draft"] == str(draft)
    if draft == "ngram":
        assert 0 <= row["accepted"] < 1 and 1 <= row["tokens_per_step"] < 4
    else:  # by the model itself: all guesses are right, but for those beyond the end of a text
        assert row["accepted"] == 1 and row["tokens_per_step"] > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", TEXT), "give --model too"),
        (("--shape", "tiny", "--prompt", 10**6), "pass the context of"),
        (("--model", MODEL, "--text", MODEL / "tokenizer_config.json", "--prompt", 800), "give a longer text"),
    ],
)
def test_what_cannot_be_measured(capsys, options, message):
    assert main(["bench", "serve", "--backend", "numpy", *map(str, options)]) == 2
    assert message in capsys.readouterr().err


def test_texts_that_end_with_their_first_step(capsys):
    """Of 15 right guesses and the token behind them nothing is left to be measured."""
    options = ("--model", MODEL, "--draft", MODEL, "--guesses", 15, "--new", 16, "--concurrent", 1, "--prompt", 8)
    assert main(["bench", "serve", "--backend", "numpy", *map(str, options)]) == 2
    assert "--new: every job got all its tokens in the step of its first one" in capsys.readouterr().err


@pytest.mark.gpu
def test_rows_on_a_gpu(capsys):
    options = ("--model", MODEL, "--concurrent", "1,4", "--prompt", 40, "--new", 32)
    rows, _ = bench(capsys, *options)
    for row, jobs in zip(rows, (1, 4), strict=True):
        check(row, jobs, 32)
        assert 0 <= row["host_share"] < 1
    ((row,), _) = bench(capsys, *options[:2], "--concurrent", 4, "--prompt", 40, "--new", 32, "--draft", MODEL)
    assert row["accepted"] > 0.5 and row["tokens_per_step"] > 1.5
