"""How the rows of an EXL2 layer are shared out between code widths, and the menus a quantizer chooses from.

A layout is written "4x.1g128+3x.9g128": the first tenth of the rows at 4 bits, the rest at 3, both in groups of 128 rows.
Rows are stored with those of the strongest inputs first, so the wide codes go to the rows that matter most. "4g128" is
all rows at 4 bits. The bytes that a layout becomes are described in formats/exl2.py.
"""

import functools
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np

from cupyq.formats.bits import WIDTHS
from cupyq.formats.exl2 import MAX_ROWS, exl2_layout, exl2_size_bits

_PART = re.compile(r"(\d+)(?:x(\d*\.?\d+))?g(\d+)", re.ASCII)


@dataclass(frozen=True)
class Part:
    """A share of the rows, above 0 and at most 1, with codes of `bits` bits in groups of group_size rows."""

    bits: int
    share: float
    group_size: int

    def __post_init__(self):
        if self.bits not in WIDTHS:
            raise ValueError(f"bits: {self.bits!r}, expected {', '.join(map(str, WIDTHS))}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share: {self.share!r}, expected a part of the rows above 0 and at most 1")
        if self.group_size < 32 or self.group_size % 32:
            raise ValueError(f"group_size: {self.group_size!r}, expected a multiple of 32 rows")

    @property
    def exact_share(self):
        """The share as it is written: .1 is a tenth, not the float beside it."""
        return Fraction(str(float(self.share)))

    @property
    def name(self):
        share = "" if self.share == 1 else "x" + format(Decimal(str(float(self.share))), "f").lstrip("0")
        return f"{self.bits}{share}g{self.group_size}"


@dataclass(frozen=True)
class Layout:
    """Parts with widths that fall and shares that sum to 1.

    >>> layout = Layout.parse("4x.1g128+3x.9g128")
    >>> layout.groups(512)
    [(4, 128), (3, 128), (3, 128), (3, 128)]
    >>> layout.storage_bits(512, 1024) / (512 * 1024)
    3.3128662109375
    """

    parts: tuple[Part, ...]

    def __post_init__(self):
        if not self.parts:
            raise ValueError("parts is empty: give at least one Part")
        widths = [part.bits for part in self.parts]
        if any(after >= before for before, after in zip(widths, widths[1:], strict=False)):
            raise ValueError(f"parts: widths {widths}, expected widths that fall, as the format stores wide codes first")
        total = sum(part.exact_share for part in self.parts)
        if total != 1:
            raise ValueError(f"parts: shares that sum to {float(total)!r}, expected 1")

    @classmethod
    def parse(cls, text):
        """The layout that a name stands for; ValueError if it is none."""
        parts = []
        for piece in text.split("+"):
            match = _PART.fullmatch(piece)
            if match is None:
                raise ValueError(f"layout {text!r}: {piece!r} is not WIDTHxSHAREgROWS, such as 4x.1g128 or 4g128")
            parts.append(Part(int(match[1]), float(match[2] or 1), int(match[3])))
        return cls(tuple(parts))

    @property
    def name(self):
        return "+".join(part.name for part in self.parts)

    def groups(self, k):
        """[(bits, rows)] of each group of a layer with k rows, widths falling, rows multiples of 32 that sum to k.

        Each part takes ceil(min(k * share, rows left) / group_size) groups, so that shares are rounded up to whole groups
        at the cost of the narrow widths, which a small layer may not reach; the last group ends at row k. ValueError for
        a k that EXL2 cannot hold. Source: exllamav2 (adaptivegptq.py, configure), where a part that finds no rows left
        may count fewer than no groups.

        >>> Layout.parse("3x.05g64+2x.95g64").groups(160)
        [(3, 64), (2, 64), (2, 32)]
        """
        k = int(k)
        if not 0 < k <= MAX_ROWS or k % 32:
            raise ValueError(f"k: {k} rows, an EXL2 layer has a multiple of 32 from 32 to {MAX_ROWS}; keep this one as it is")
        groups, first = [], 0
        for part in self.parts:
            count = -(-min(k * part.exact_share, k - first) // part.group_size)
            for _ in range(count):
                groups.append((part.bits, min(part.group_size, k - first)))
                first += groups[-1][1]
        return groups

    def storage_bits(self, k, n, has_bias=False):
        """Bits that a layer of k rows and n columns takes in its checkpoint: codes, scales, scale maxima, group table and
        permutation, and a bias of float16. Columns are stored in multiples of 32, as the writer pads them."""
        return _storage_bits(self, int(k), -(-int(n) // 32) * 32, bool(has_bias))


@functools.lru_cache(4096)  # a model has many layers of few shapes
def _storage_bits(layout, k, n, has_bias):
    bits, rows = np.array(layout.groups(k)).T
    words = rows * bits // 32
    table = np.stack([bits, np.cumsum(words) - words], axis=1).astype(np.uint16).reshape(-1)
    return exl2_size_bits(exl2_layout(table, int(words.sum()), n), has_bias)


def _menu(*names):
    return tuple(map(Layout.parse, names))


MENU = _menu(
    "2g128",
    "2g32",
    "3x.25g64+2x.75g64",
    "6x.05g32+3x.2g32+2x.75g64",
    "3x.5g64+2x.5g64",
    "3x.75g64+2x.25g64",
    "3g128",
    "3g64",
    "3g32",
    "4x.1g32+3x.9g32",
    "8x.05g32+3x.95g128",
    "4x.25g32+3x.75g32",
    "4x.5g32+3x.5g32",
    "4x.75g64+3x.25g64",
    "4g64",
    "4g32",
    "8x.05g32+4x.95g128",
    "5x.5g32+4x.5g32",
    "5g64",
    "5g32",
    "6x.5g32+5x.5g32",
    "6g64",
    "6g32",
    "8x.5g64+6x.5g64",
    "8g64",
    "8g32",
)
"""The options of every linear layer, fewest bits first in wide layers: 2.1 to 8.1 bits per weight, in steps of at most half a
bit up to 6.1.

Most have one width. Where rows are quantized in the order they are stored, each makes up for the errors of those before
it, and the first ones, of the strongest inputs, are left with no more of the loss than the last: wider codes there gain
little. The mixtures of two neighbouring widths fill the steps. A few percent of rows at 6 or 8 bits are for layers with some
inputs far above the rest, as the last projection of an MLP may have."""

HEAD_LAYOUTS = {
    2: Layout.parse("4x.3g32+2x.7g32"),
    3: Layout.parse("4x.15g32+3x.85g32"),
    4: Layout.parse("6x.15g32+4x.85g32"),
    5: Layout.parse("6x.15g128+5x.85g128"),
    6: Layout.parse("8x.15g128+6x.85g128"),
    8: Layout.parse("8g128"),
}
"""The layout of the head by its head bits. Source: exllamav2 (qparams.py)."""
