"""Who may begin next.

A job begins when a row of the batch and all pages it can ever need are free: what it has begun it can finish, nothing is
ever computed twice, and while it runs its row's table of pages stays as it is. In turn; a job that finds too few pages may
be overtaken by smaller ones, but only so many times: then nobody begins before it, and as running jobs end, it does.
"""

from collections.abc import Callable, Iterator
from typing import Any

from cupyq.serve.pages import MustWait


class WaitingLine:
    """Jobs that have not begun, in the order in which they came. `max_skips`: how many may overtake one of them."""

    def __init__(self, max_skips: int):
        self._max_skips = max_skips
        self._waiting: list[Any] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._waiting)

    def add(self, run: Any) -> None:
        self._waiting.append(run)

    def remove(self, run: Any) -> None:
        self._waiting.remove(run)

    def begin(self, lease: Callable[[Any], Any], room: int) -> Iterator[Any]:
        """Up to `room` of them, each with a lease now; `lease(run)` gives it one, returns None or raises MustWait."""
        blocked = None
        for run in list(self._waiting):
            if not room or (blocked is not None and blocked.skips >= self._max_skips):
                return
            try:
                run.lease = lease(run)
            except MustWait:
                continue  # not for long: for as long as another one's prompt takes
            if run.lease is None:
                blocked = run if blocked is None else blocked
                continue
            if blocked is not None:
                blocked.skips += 1
            self._waiting.remove(run)
            room -= 1
            yield run
