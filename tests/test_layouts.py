"""Layouts: rows by width against exllamav2's own arithmetic, bits against the tensors written, menus, names, refusals."""

import math
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyq.formats.exl2 import pack_exl2
from cupyq.layers.linear import Linear
from cupyq.ops.qmatrix import QMatrix
from cupyq.quantize.layouts import HEAD_LAYOUTS, MENU, Layout, Part

# Of exllamav2's own menus: source exllamav2 (qparams.py).
EXLLAMAV2 = """
    3x.05g64+2x.95g64  3x.1g64+2x.9g64  3x.3g64+2x.7g64  4x.1g128+3x.9g128  5x.05g32+3x.95g32  5x.1g64+4x.9g64
    6x.05g32+3x.2g64+2x.75g64  8x.05g32+4x.1g128+3x.85g128  8x.05g32+4x.1g32+3x.85g32  8x.1g128+6x.9g128
"""
EVERY = {*MENU, *HEAD_LAYOUTS.values(), *map(Layout.parse, EXLLAMAV2.split())}


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "k", "expected"),
    [
        ("4g128", 256, [(4, 128), (4, 128)]),
        ("4g128", 32, [(4, 32)]),
        ("4g128", 288, [(4, 128), (4, 128), (4, 32)]),
        ("3x.1g64+2x.9g64", 256, [(3, 64), (2, 64), (2, 64), (2, 64)]),  # 25.6 rows make one group
        ("8x.05g32+4x.1g128+3x.85g128", 768, [(8, 32), (8, 32), (4, 128), *[(3, 128)] * 4, (3, 64)]),
        ("8x.15g128+6x.85g128", 128, [(8, 128)]),  # nothing left for the narrow width
        ("8x.15g128+6x.85g128", 160, [(8, 128), (6, 32)]),
        ("8x.05g128+4x.1g128+3x.85g128", 96, [(8, 96)]),
        ("3x.3g64+2x.7g64", 640, [*[(3, 64)] * 3, *[(2, 64)] * 7]),  # exactly three groups
    ],
)
def test_rows_of_known_layers(name, k, expected):
    groups = Layout.parse(name).groups(k)
    assert groups == expected
    assert {type(number) for group in groups for number in group} == {int}


def groups_in_floats(layout, k):
    """[(bits, groups)] by the float arithmetic of exllamav2's converter, whose shares are floats; None at a negative count."""
    remaining, counts = k, []
    for part in layout.parts:
        count = math.ceil(min(k * part.share, remaining) / part.group_size)
        if count < 0:
            return None
        counts.append((part.bits, count))
        remaining -= count * part.group_size
    assert remaining <= 0
    return [(bits, count) for bits, count in counts if count]


def test_as_many_groups_as_exllamav2_makes():
    compared = 0
    for layout in EVERY:
        for k in [*range(32, 2049, 32), 2560, 2880, 4096, 5120, 8192, 11008, 13824, 14336, 28672, 53248]:
            expected = groups_in_floats(layout, k)
            if expected is not None:
                groups = layout.groups(k)
                assert [(bits, len(list(run))) for bits, run in groupby(bits for bits, _ in groups)] == expected, (layout, k)
                compared += 1
    assert compared > 3000


@st.composite
def layouts(draw):
    widths = sorted(draw(st.sets(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=1, max_size=4)), reverse=True)
    cuts = draw(st.lists(st.integers(1, 99), min_size=len(widths) - 1, max_size=len(widths) - 1, unique=True))
    edges = [0, *sorted(cuts), 100]
    shares = [(b - a) / 100 for a, b in zip(edges, edges[1:], strict=False)]
    sizes = [draw(st.sampled_from([32, 64, 96, 128, 256])) for _ in widths]
    return Layout(tuple(map(Part, widths, shares, sizes)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layouts(), st.integers(1, 400))
def test_rows_of_any_layout(layout, blocks):
    k = 32 * blocks
    groups = layout.groups(k)
    assert sum(rows for _, rows in groups) == k
    widths = [bits for bits, _ in groups]
    assert widths == sorted(widths, reverse=True)
    sizes = {part.bits: part.group_size for part in layout.parts}
    assert all(rows == sizes[bits] for bits, rows in groups[:-1])
    assert groups[-1][1] <= sizes[groups[-1][0]] and all(rows % 32 == 0 and rows > 0 for _, rows in groups)
    share = 0
    for part in layout.parts:
        share += round(100 * part.share)
        rows = sum(rows for bits, rows in groups if bits >= part.bits)
        # Never fewer than the shares so far; beyond them, at most what rounding up to groups adds.
        assert 100 * rows >= share * k
        assert rows - share * k / 100 < sum(p.group_size for p in layout.parts if p.bits >= part.bits)
    assert Layout.parse(layout.name) == layout


# --- bits -------------------------------------------------------------------------------------------------------------


def written(layout, k, n, has_bias):
    """The tensors of a layer of that layout, as a checkpoint has them."""
    rng = np.random.default_rng(k + n)
    groups = layout.groups(k)
    codes = np.concatenate([rng.integers(0, 2**bits, (rows, n)) for bits, rows in groups])
    scale_max = rng.random(len(groups)).astype(np.float16)
    scale_codes = rng.integers(0, 16, (len(groups), n))
    tensors = pack_exl2(codes, scale_codes, scale_max, *zip(*groups, strict=True), rng.permutation(k))
    return tensors | ({"bias": np.zeros(n, np.float16)} if has_bias else {})


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("k", "n"), [(32, 32), (256, 96), (416, 64)])
def test_bits_are_those_of_the_tensors(k, n, has_bias):
    for layout in EVERY:
        tensors = written(layout, k, n, has_bias)
        bits = layout.storage_bits(k, n, has_bias)
        assert type(bits) is int
        assert bits == 8 * sum(tensor.nbytes for tensor in tensors.values())
        assert layout.storage_bits(k, n - 31, has_bias) == bits, "columns are padded to a multiple of 32"
        assert layout.storage_bits(k, n + 1, has_bias) > bits


def test_bits_are_those_a_layer_counts():
    layout = Layout.parse("8x.05g32+4x.1g128+3x.85g128")
    q = QMatrix.from_tensors(written(layout, 768, 256, True))
    assert layout.storage_bits(768, 256, True) == q.storage_bits == Linear(q).storage_bits
    assert layout.storage_bits(np.int64(768), np.int32(256)) == q.storage_bits - 16 * 256


def test_bits_by_hand():
    codes = 128 * (4 * 128 + 3 * 384)
    groups = 4 * (16 + 32 + 4 * 128)  # scale maximum, two table entries, a scale code per column
    assert Layout.parse("4x.1g128+3x.9g128").storage_bits(512, 128) == codes + groups + 32 * 512


def test_bits_of_many_layers_are_quick():
    from time import process_time

    start = process_time()
    for _ in range(500):
        for layout in MENU:
            layout.storage_bits(14336, 4096)
    assert process_time() - start < 1  # 0.02 s, as equal layers are counted once


# --- names ------------------------------------------------------------------------------------------------------------


def test_names():
    layout = Layout((Part(3, 0.1, 64), Part(2, 0.9, 32)))
    assert layout.name == "3x.1g64+2x.9g32" and Layout.parse(layout.name) == layout
    assert Layout((Part(4, 1, 128),)).name == "4g128" == Layout.parse("4x1g128").name == Layout.parse("4x1.0g128").name
    assert Layout.parse("3x0.100g64+2x.90g32") == layout
    assert Part(8, 0.00001, 32).name == "8x.00001g32"
    assert {Layout.parse("3x.1g64+2x.9g32"): 1}[layout] == 1
    for layout in EVERY:
        assert Layout.parse(layout.name) == layout


def test_shares_are_the_decimals_they_are_written_as():
    """0.6 + 0.3 + 0.1 is below 1 in floats, and 55 % of 100 blocks above 55."""
    layout = Layout.parse("4x.6g32+3x.3g32+2x.1g32")
    six, three, one = (part.share for part in layout.parts)
    assert six + three + one < 1  # Python's sum makes up for roundings, from 3.12 on
    assert [bits for bits, _ in Layout.parse("4x.55g32+3x.45g32").groups(3200)].count(4) == 55


# --- menus ------------------------------------------------------------------------------------------------------------


def test_the_menu_is_fine_and_wide():
    assert len(set(MENU)) == len(MENU) and 18 <= len(MENU) <= 28
    for k in (4096, 14336):
        bits = [layout.storage_bits(k, 4096) / (k * 4096) for layout in MENU]
        assert bits == sorted(bits)
        assert bits[0] < 2.1 and 8 < bits[-1] < 8.2
        steps = np.diff(bits)
        assert (steps > 0.005).all()
        assert (steps[np.array(bits[1:]) < 6.2] < 0.501).all() and steps.max() <= 1
    assert {part.group_size for layout in MENU for part in layout.parts} == {32, 64, 128}


def test_the_menu_suits_small_layers():
    """Rounding up to groups leaves different sizes, close to each other, in a layer of two groups of 128."""
    bits = sorted({layout.storage_bits(256, 256) / 256**2 for layout in MENU})
    assert len(bits) >= 20 and bits[0] < 2.2
    assert max(np.diff([b for b in bits if b < 6.3])) <= 0.5


def test_head_layouts():
    assert list(HEAD_LAYOUTS) == [2, 3, 4, 5, 6, 8]
    assert HEAD_LAYOUTS[6].name == "8x.15g128+6x.85g128"
    for bits, layout in HEAD_LAYOUTS.items():
        assert bits <= layout.storage_bits(4096, 32000) / (4096 * 32000) < bits + 0.85


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Part(7, 1, 32), "bits: 7, expected 2, 3, 4, 5, 6, 8"),
        (lambda: Part(4, 0, 32), "share: 0, expected a part"),
        (lambda: Part(4, 1.5, 32), r"share: 1\.5"),
        (lambda: Part(4, math.nan, 32), "share: nan"),
        (lambda: Part(4, 1, 48), "group_size: 48, expected a multiple of 32"),
        (lambda: Part(4, 1, 0), "group_size: 0"),
        (lambda: Part(4, 1, -32), "group_size: -32"),
        (lambda: Layout(()), "parts is empty"),
        (lambda: Layout.parse("3x.1g64+4x.9g64"), r"widths \[3, 4\], expected widths that fall"),
        (lambda: Layout.parse("4x.5g64+4x.5g32"), "expected widths that fall"),
        (lambda: Layout.parse("4x.1g64+3x.8g64"), r"sum to 0\.9\d*, expected 1"),
        (lambda: Layout.parse("4x.1g64+3g64"), r"sum to 1\.1, expected 1"),
        (lambda: Layout.parse("4"), "layout '4': '4' is not WIDTHxSHAREgROWS"),
        (lambda: Layout.parse(""), "layout ''"),
        (lambda: Layout.parse("4g128+"), "'' is not WIDTHxSHAREgROWS"),
        (lambda: Layout.parse("4x1.2.3g128"), "is not WIDTHxSHAREgROWS"),
        (lambda: Layout.parse("4x1g128 "), "is not WIDTHxSHAREgROWS"),
        (lambda: Layout.parse("7g128"), "bits: 7"),
        (lambda: Layout.parse("4g128").groups(100), "k: 100 rows, an EXL2 layer has a multiple of 32 from 32 to 65536"),
        (lambda: Layout.parse("4g128").groups(0), "k: 0 rows"),
        (lambda: Layout.parse("4g128").groups(65568), "k: 65568 rows"),
        (lambda: Layout.parse("4g128").storage_bits(40, 32), "k: 40 rows"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
