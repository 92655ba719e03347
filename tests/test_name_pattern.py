"""layers/name_pattern.py against Python's `re`, whose answers it must give, and on what `re` would never finish."""

import random
import re
import time

import pytest

from cupyq.layers.name_pattern import MOST_CHARACTERS, NamePattern

PIECES = ["a", "b", ".", "\\.", "\\d", "(", ")", "|", "*", "+", "?", "[ab]", "[^a.]", "1", "(?:", "^", "$", ".*", "_", "-"]


def expected(text, name):
    """As PEFT asks: the whole name, or its end after a dot."""
    return re.match(rf"(?:.*\.)?(?:{text})$", name) is not None


def test_it_answers_as_re_does():
    rng, compared, matched, refused = random.Random(0), 0, 0, 0
    for _ in range(8000):
        text = "".join(rng.choices(PIECES, k=rng.randrange(9)))
        try:
            pattern = NamePattern(text)
            re.compile(text)
        except (ValueError, re.error):
            refused += 1
            continue
        for _ in range(6):
            name = "".join(rng.choices("ab.1_-", k=rng.randrange(8)))
            assert pattern.matches(name) == expected(text, name), (text, name)
            compared, matched = compared + 1, matched + expected(text, name)
    assert compared > 10_000 and matched > 500 and refused > 500


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        r"layers\.1\..*",
        "model.layers.1.self_attn.q_proj",
        r"layers\.\d+\.(mlp|self_attn)\..*",
        "q_proj|up_proj",
        r"^model\.layers\.[0-1]\.self_attn\.(?:q|k)_proj$",
        r".*\.1\.(self_attn.)?q_pro\w",
        "",
        r"a\$",
    ],
)
def test_expressions_people_write(text):
    names = [f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.up_proj", "q_proj")]
    assert [NamePattern(text).matches(name) for name in names] == [expected(text, name) for name in names]


@pytest.mark.parametrize(
    "text", ["(", ")", "a)", "(?=a)", r"(a)\1", "a{3}", "[b-a]", "[", "*", "a**", "\\", "\\Q", "(" * 30 + ")" * 30]
)
def test_what_is_not_read(text):
    with pytest.raises(ValueError, match="is not read here|bad character range"):
        NamePattern(text)


@pytest.mark.parametrize("text", ["(a+)+b", "(a|a)*b", "(((a*)*)*)*b", "(.*)*(.*)*(.*)*b", "(a?)" * 60 + "b", ".*" * 200 + "b"])
def test_no_expression_takes_long(text):
    """`re` is still at the first of these when the sun goes out."""
    begin = time.process_time()
    assert not NamePattern(text).matches("a" * MOST_CHARACTERS)
    assert time.process_time() - begin < 3


def test_lengths_are_bounded():
    NamePattern("a" * MOST_CHARACTERS).matches("a" * MOST_CHARACTERS)
    with pytest.raises(ValueError, match="501 characters, expected at most 500"):
        NamePattern("a" * 501)
    with pytest.raises(ValueError, match="a name of 501 characters, expected at most 500"):
        NamePattern("a").matches("a" * 501)
