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
        print(text + ("" if is_right else "  WRONG"), file=self.out, flush=True)
        if self.lines is not None:
            print(json.dumps(row), file=self.lines, flush=True)


def finite(error):
    """As JSON can hold it."""
    return error if math.isfinite(error) else None
