"""The async face: steps in a thread as long as somebody waits for events, and to each its own."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cupyq.errors import UnsupportedError
from cupyq.serve.job import Event, Job


class Driver:
    """Of one generator, for the tasks of the running event loop."""

    def __init__(self, generator: Any):
        if generator.model.is_part:  # requests reach each rank at a time of its own
            raise UnsupportedError(
                "model is one rank's part and stream takes whole models: add the same jobs to all ranks and call step() alike"
            )
        self._generator, self.loop = generator, asyncio.get_running_loop()
        self._subscribers: dict[int, asyncio.Queue] = {}
        self._thread = ThreadPoolExecutor(1, "cupyq-serve")
        self._task: asyncio.Task | None = None

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """Add a job, and its events as they come; a loop over them that is left early cancels it."""
        self._generator.add(job)
        events = self._subscribers[job.number] = asyncio.Queue()
        if self._task is None or self._task.done():
            self._task = self.loop.create_task(self._drive())
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.kind == "finished":
                    return
        finally:
            if not job.is_done:
                job.cancel()
            del self._subscribers[job.number]

    async def _drive(self) -> None:
        try:
            while not self._generator.is_idle:
                for event in await self.loop.run_in_executor(self._thread, self._generator.step):
                    events = self._subscribers.get(event.job.number)
                    if events is not None:
                        events.put_nowait(event)
        except Exception as error:
            if not self._subscribers:
                raise
            for events in self._subscribers.values():
                events.put_nowait(error)
