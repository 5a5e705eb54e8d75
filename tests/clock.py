"""Simulated time: an event loop whose clock stands still while anything happens, and jumps when nothing can.

A test that is marked `simulated_time` runs on it, its asynchronous fixtures too. Ten seconds of the product's patience
then take a millisecond or two, and are ten seconds exactly, by the fixture `clock`, which begins at 0.

The clock jumps to the next timer only when the process is quiet: no descriptor is ready, no job of an executor runs,
and no other thread (a relay's pumps) runs or waits for the CPU. What happens in another process goes unnoticed, so a
test that starts one has no use for it.
"""

import asyncio
import math
import os
import selectors
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Clock = Callable[[], float]

_TURN = 1e-12  # seconds: whoever is woken a rounding error too early, and looks again and again, gets there
_MOMENT = 0.001  # seconds of real time before each jump, in which something may turn up


class SimulatedLoop(asyncio.SelectorEventLoop):
    """The event loop; see the module."""

    def __init__(self) -> None:
        self._simulated = 0.0
        self._jobs: set[asyncio.Future[Any]] = set()
        self._conditions: dict[asyncio.Future[None], Callable[[], bool]] = {}
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Seconds of simulated time since the test began."""
        return self._simulated

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        job = super().run_in_executor(executor, func, *args)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    async def holds(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as a condition holds while the process is quiet; time stands still then."""
        holds = self.create_future()
        self._conditions[holds] = condition
        try:
            await holds
        finally:
            del self._conditions[holds]

    def tell(self) -> bool:
        """Wakes those whose condition holds; whether there were any."""
        told = [holds for holds, condition in self._conditions.items() if not holds.done() and condition()]
        for holds in told:
            holds.set_result(None)
        return bool(told)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing but this thread runs."""
        return not self._jobs and not any(map(_runs, os.listdir("/proc/self/task")))

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self._simulated = math.nextafter(self._simulated + seconds, math.inf)


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Waits for what is ready; where there is a time-out, time jumps instead of passing."""
        self._loop.advance(_TURN)
        if timeout is not None and timeout <= 0:
            return super().select(0)
        quiet, wait = 0, 0.0
        while quiet < 2:
            if ready := super().select(None if timeout is None else wait):
                return ready
            quiet, wait = quiet + 1 if self._loop.is_quiet else 0, _MOMENT
        if timeout is not None and not self._loop.tell():
            self._loop.advance(timeout)
        return []


def _runs(task: str) -> bool:
    """Whether another thread of this process runs, is about to, or waits for a disk."""
    if int(task) == threading.get_native_id():
        return False
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{task}/stat", "rb") as file:
        return file.read().rpartition(b") ")[2][:1] in b"RD"
    return False


async def eventually(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Waits for a condition that an event brings about.

    Args:
        condition: Has no effect.
        what: It is, for people.
        seconds: To wait at most.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            if isinstance(loop, SimulatedLoop):
                await loop.holds(condition)
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError as error:
        raise AssertionError(f"waited {seconds} s in vain for {what}") from error
