"""Values on the command line, from text, whose errors say what was expected; and an option that many commands have."""

import argparse
import contextlib
import os


def whole(low):
    """A type: a whole number of at least `low`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"expected {low} or more, got {value}")
        return value

    return parse


def number_list(text):
    """[3.0, 1.0] of 3,1."""
    with contextlib.suppress(ValueError):
        return [float(part) for part in text.split(",")]
    raise argparse.ArgumentTypeError(f"expected numbers separated by commas, as in 3,1, got {text!r}")


def token_list(text):
    """[1, 2, 3] of 1,2,3."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ids separated by commas, as in 1,2,3, got {text!r}") from None


def adapter(text):
    """(folder, weight) of FOLDER or FOLDER=WEIGHT; a folder whose own name ends in =WEIGHT goes first."""
    folder, separator, weight = text.rpartition("=")
    if not separator or os.path.isdir(text):
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected FOLDER or FOLDER=WEIGHT, got {text!r}") from None


def add_backend(sub):
    """Give a command --backend."""
    sub.add_argument("--backend", choices=("auto", "numpy", "cupy"), default="auto", help="default: cupy where a GPU is usable")
