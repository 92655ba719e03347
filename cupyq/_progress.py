"""A progress bar for waits longer than a second."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item", bound=Any)


@contextlib.contextmanager
def bar(total: int, label: str, *, unit: str = "B", force: bool = False, hide: bool = False) -> Iterator[Callable[[int], Any]]:
    """A context that gives a function to be called with how many of `total` units were done since its last call.

    After one second a bar with units per second and the time left appears on stderr, if that is a terminal or `force` is set;
    never with `hide`.
    """
    from tqdm import tqdm  # takes longer to import than small models to load

    shown = (force or sys.stderr.isatty()) and not hide
    # A bar that stays on screen after the work would be one more line to scroll past: leave=False.
    with tqdm(total=total, desc=label, unit=unit, unit_scale=True, delay=1, leave=False, disable=not shown) as shown_bar:
        yield shown_bar.update


def progress(items: Iterable[Item], total_bytes: int, label: str, *, force: bool = False) -> Iterator[Item]:
    """Yield `items`, counting `item.nbytes` of each once the caller is done with it, on a `bar`."""
    with bar(total_bytes, label, force=force) as advance:
        for item in items:
            yield item
            advance(int(item.nbytes))
