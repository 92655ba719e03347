"""Bit streams against golden words, Python integers and loops over single bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyq.formats import bits as packing
from cupyq.formats.bits import WIDTHS, pack_cols, pack_rows, unpack_cols, unpack_rows

# 32 values v_i = (7 i + 3) mod 2^b, words in the order of the stream.
GOLDEN = {
    2: "1b1b1b1b 1b1b1b1b",
    3: "53977053 70539770 97705397",
    4: "4d6f81a3 c5e7092b 4d6f81a3 c5e7092b",
    5: "4dfc4543 78245ba3 0753617d 4b276cf4 e55c7066",
    6: "9f611283 90bbd2d9 b2579740 8f201eb3 9cab91d5 71538703",
    8: "18110a03 342d261f 5049423b 6c655e57 88817a73 a49d968f c0b9b2ab dcd5cec7",
}


def golden_codes(bits):
    return np.array([(7 * i + 3) % 2**bits for i in range(32)], np.uint8)


def words_of_stream(values, bits):
    """The definition as one Python integer: value i at bit i * bits."""
    stream = sum(int(value) << (i * bits) for i, value in enumerate(values))
    return [stream >> (32 * word) & 0xFFFFFFFF for word in range(len(values) * bits // 32)]


def value_of_bits(words, i, bits):
    """Value i of a stream, one bit at a time."""
    value = 0
    for t in range(bits):
        position = i * bits + t
        value |= (int(words[position // 32]) >> (position % 32) & 1) << t
    return value


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden_words(bits):
    expected = np.array([int(word, 16) for word in GOLDEN[bits].split()], np.uint32)
    codes = golden_codes(bits)
    rows = pack_rows(codes[:, None], bits)
    cols = pack_cols(codes[None, :], bits)
    assert rows.dtype == cols.dtype == np.int32
    np.testing.assert_array_equal(rows.view(np.uint32), expected[:, None])
    np.testing.assert_array_equal(cols.view(np.uint32), expected[None, :])
    np.testing.assert_array_equal(unpack_rows(expected[:, None], bits, 32)[:, 0], codes)
    np.testing.assert_array_equal(unpack_cols(expected[None, :], bits, 32)[0], codes)


def most_significant_first(values, bits):
    stream = sum(int(value) << ((len(values) - 1 - i) * bits) for i, value in enumerate(values))
    count = len(values) * bits // 32
    return [stream >> (32 * (count - 1 - word)) & 0xFFFFFFFF for word in range(count)]


def without_straddling(values, bits):
    per_word = 32 // bits
    words = [0] * (len(values) * bits // 32)
    for i, value in enumerate(values[: per_word * len(words)]):
        words[i // per_word] |= int(value) << (i % per_word * bits)
    return words


def test_golden_words_reject_other_packings():
    for bits in WIDTHS:
        expected = [int(word, 16) for word in GOLDEN[bits].split()]
        assert words_of_stream(golden_codes(bits), bits) == expected
        assert most_significant_first(golden_codes(bits), bits) != expected
        assert (without_straddling(golden_codes(bits), bits) != expected) == (bits in (3, 5, 6))


@pytest.mark.parametrize("bits", WIDTHS)
def test_against_loops_over_single_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (96, 64), dtype=np.uint8)
    rows, cols = pack_rows(codes, bits).view(np.uint32), pack_cols(codes, bits).view(np.uint32)
    assert rows.shape == (96 * bits // 32, 64) and cols.shape == (96, 64 * bits // 32)
    for n in range(64):
        assert rows[:, n].tolist() == words_of_stream(codes[:, n], bits)
        assert [value_of_bits(rows[:, n], i, bits) for i in range(96)] == codes[:, n].tolist()
    for k in range(96):
        assert cols[k].tolist() == words_of_stream(codes[k], bits)
        assert [value_of_bits(cols[k], i, bits) for i in range(64)] == codes[k].tolist()
    np.testing.assert_array_equal(unpack_rows(rows, bits, 96), codes)
    np.testing.assert_array_equal(unpack_cols(cols, bits, 64), codes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(WIDTHS), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_random_words_survive_both_ways(bits, units, others, seed):
    """Every word is a legal stream, so unpacking and packing again returns any word."""
    per_unit = bits // np.gcd(bits, 32)
    values = units * 32 // int(np.gcd(bits, 32))
    words = np.random.default_rng(seed).integers(0, 2**32, (units * per_unit, others), dtype=np.uint32)
    np.testing.assert_array_equal(pack_rows(unpack_rows(words, bits, values), bits).view(np.uint32), words)
    np.testing.assert_array_equal(pack_cols(unpack_cols(words.T, bits, values), bits).view(np.uint32), words.T)


@pytest.mark.parametrize("bits", WIDTHS)
def test_sizes_above_one_pass(bits):
    """Large matrices go through the loops in several passes; their seams must not show."""
    codes = np.random.default_rng(1).integers(0, 2**bits, (4096 + 32, 352), dtype=np.uint8)
    assert codes.size > 4 * packing._PASS_VALUES
    rows, cols = pack_rows(codes, bits), pack_cols(codes, bits)
    for n in (0, 100, 351):
        assert rows.view(np.uint32)[:, n].tolist() == words_of_stream(codes[:, n], bits)
    for k in (0, 744, 745, 4127):
        assert cols.view(np.uint32)[k].tolist() == words_of_stream(codes[k], bits)
    np.testing.assert_array_equal(unpack_rows(rows, bits, codes.shape[0]), codes)
    np.testing.assert_array_equal(unpack_cols(cols, bits, codes.shape[1]), codes)


def test_strided_and_read_only_arguments():
    codes = np.random.default_rng(2).integers(0, 8, (64, 192)).astype(np.int64)
    codes.setflags(write=False)
    view = codes[:, ::3].T[::-1]
    np.testing.assert_array_equal(pack_rows(view, 3), pack_rows(view.copy(), 3))
    words = np.ascontiguousarray(pack_rows(codes, 3))
    before = words.copy()
    np.testing.assert_array_equal(unpack_rows(words[:, ::2], 3, 64), codes[:, ::2])
    np.testing.assert_array_equal(words, before)


def test_rows_that_are_no_multiple_of_32_but_fill_words():
    codes = np.arange(8)[:, None]
    assert pack_rows(codes, 4).view(np.uint32).tolist() == [[0x76543210]]


PACK_ERRORS = [
    (np.zeros((32, 1), np.uint8), 7, ValueError, "bits: 7, expected one of 2, 3, 4, 5, 6, 8"),
    (np.zeros((32, 1), np.uint8), 1, ValueError, "bits: 1"),
    (np.zeros((31, 1), np.uint8), 4, ValueError, "codes: 31 rows of 4 bits do not fill whole 32-bit words"),
    (np.zeros(32, np.uint8), 4, ValueError, r"codes: shape \(32,\), expected 2 dimensions"),
    (np.zeros((32, 1), np.float32), 4, TypeError, "codes: dtype float32, expected integers"),
    (np.full((32, 1), 16, np.uint8), 4, ValueError, "codes: values 16 to 16 do not fit 4 bits; expected 0 to 15"),
    (np.full((32, 1), -1), 4, ValueError, "codes: values -1 to -1 do not fit 4 bits"),
    (np.full((32, 1), 256), 8, ValueError, "codes: values 256 to 256 do not fit 8 bits"),
]


@pytest.mark.parametrize(("codes", "bits", "kind", "message"), PACK_ERRORS)
def test_pack_errors(codes, bits, kind, message):
    with pytest.raises(kind, match=message) as caught:
        pack_rows(codes, bits)
    assert "\n" not in str(caught.value)


UNPACK_ERRORS = [
    (np.zeros((3, 1), np.int32), 5, 32, ValueError, r"words: shape \(3, 1\), expected 5 along axis 0"),
    (np.zeros((4, 1), np.int32), 4, 33, ValueError, "rows: 33 rows of 4 bits do not fill"),
    (np.zeros((4, 1), np.int32), 4, -8, ValueError, "rows: -8 rows"),
    (np.zeros((4, 1), np.int64), 4, 32, TypeError, "words: dtype int64, expected int32 or uint32"),
    (np.zeros(4, np.int32), 4, 32, ValueError, "words: shape"),
    (np.zeros((9, 1), np.int32), 9, 32, ValueError, "bits: 9"),
]


@pytest.mark.parametrize(("words", "bits", "rows", "kind", "message"), UNPACK_ERRORS)
def test_unpack_errors(words, bits, rows, kind, message):
    with pytest.raises(kind, match=message) as caught:
        unpack_rows(words, bits, rows)
    assert "\n" not in str(caught.value)
    if words.ndim == 2:
        with pytest.raises(kind):
            unpack_cols(words.T, bits, rows)
