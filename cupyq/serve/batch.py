"""Which row of the running batch is whose, and what the device knows of it."""

from collections.abc import Sequence

from cupyq.serve.engine import Engine
from cupyq.serve.pages import Lease
from cupyq.serve.rows import Rows, RowState
from cupyq.serve.running import Running


class Batch:
    """Jobs whose prompts have passed: row i of the batch is the job of runs[i]. The next step draws those of `going`.

    engines: the model's, then that of a draft model, if there is one; both have the same rows and pages.
    """

    def __init__(self, engines: Sequence[Engine], vocab_size: int):
        self._engines = engines
        self.runs: list[Running] = []
        self.state = Rows(engines[0].xp, vocab_size, engines[0].batch)
        self._count = 0
        self._leases: list[Lease | None] = [None] * engines[0].batch

    @property
    def going(self) -> list[Running]:
        """The first rows: those that draw a token. As of the last `set_aside`."""
        return self.runs[: self._count]

    def enter(self, run: Running) -> None:
        self.runs.append(run)

    def leave(self, run: Running) -> None:
        """The last row takes the place of one that ends."""
        row, last = self.runs.index(run), len(self.runs) - 1
        moved = self.runs.pop()
        if row != last:
            self.runs[row] = moved
            self._move(moved, last, row)

    def set_aside(self) -> None:
        """Rows that draw no more, as all their tokens are on their way, go to the end."""
        goes = [run.wants_step for run in self.runs]
        self._count = sum(goes)
        # As many rows at the front are free as there are rows behind that draw.
        free = [row for row in range(self._count) if not goes[row]]
        for row, other in zip(free, (other for other in range(self._count, len(goes)) if goes[other]), strict=True):
            self._move(self.runs[other], other, row)
            self.runs[row].is_placed = False
            self.runs[row], self.runs[other] = self.runs[other], self.runs[row]

    def _move(self, run: Running, source: int, to: int) -> None:
        if run.is_placed:
            with self._engines[0].stepping():
                self.state.move(source, to)

    def give_pages(self) -> None:
        """Rows that draw have their pages; a graph may pass some more, which must not write to any."""
        for row, before in enumerate(self._leases):
            run = self.runs[row] if row < len(self.runs) else None
            lease = run.lease if run is not None and row < self._count else None
            if lease is before:
                continue
            self._leases[row] = lease
            for engine in self._engines:
                engine.set_pages(row, () if lease is None else lease.pages)
            if lease is None:
                with self._engines[0].stepping():
                    self.state.put(row, RowState())
                if run is not None:
                    run.is_placed = False

    def arrange(self) -> None:
        """The device learns where the rows that draw stand, and their settings, as far as it does not know."""
        self.give_pages()
        going = self.going
        with self._engines[0].stepping():
            for row, run in enumerate(going):
                if not run.is_placed:
                    self.state.put(row, run.state(), run.most + 1)
                    run.is_placed = True
            self.state.configure([run.row_settings for run in going])
