"""A progress bar for waits longer than a second."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item", bound=Any)


def progress(items: Iterable[Item], total_bytes: int, label: str, *, force: bool = False) -> Iterator[Item]:
    """Yield `items`, counting `item.nbytes` of each once the caller is done with it.

    After one second a bar with bytes and bytes per second appears on stderr, if that is a terminal or `force` is set.
    """
    from tqdm import tqdm  # takes longer to import than small models to load

    shown = force or sys.stderr.isatty()
    # A bar that stays on screen after the work would be one more line to scroll past: leave=False.
    with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, delay=1, leave=False, disable=not shown) as bar:
        for item in items:
            yield item
            bar.update(int(item.nbytes))
