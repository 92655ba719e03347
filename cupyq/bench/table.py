"""What the tables of all families do with a row: print it, keep it, write it to a file."""

import json
import math


class Table:
    """Rows as they are measured; `is_right`: whether all of them were. A family has `columns` and the text of a row."""

    columns = ""

    def __init__(self, options, limits, torch, out, lines):
        self.options, self.limits, self.torch = options, limits, torch
        self.out, self.lines = out, lines
        self.rows: list[dict] = []
        self.is_right = True
        print(f"{limits}\n{self.columns}", file=out, flush=True)

    def add(self, row, text, is_right):
        """Keep a row and print its text; `lines`, if there is such a file, gets a JSON object."""
        self.is_right &= is_right
        self.rows.append(row)
        emit(row, text + ("" if is_right else "  WRONG"), self.out, self.lines)


def emit(row, text, out, lines):
    """Print a row's text; `lines`, if there is such a file, gets a JSON object."""
    print(text, file=out, flush=True)
    if lines is not None:
        print(json.dumps(row), file=lines, flush=True)


def number(value, width, digits):
    """As it stands in a column; a dash for None."""
    return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"


def percent(value, width):
    """A share as it stands in a column; a dash for None."""
    return f"{'-' if value is None else f'{value:.1%}':>{width}}"


def finite(error):
    """As JSON can hold it."""
    return error if math.isfinite(error) else None
