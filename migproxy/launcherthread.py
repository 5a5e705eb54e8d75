"""The thread in which a migration looks into its launcher's folders, since a call into those may take long.

Nothing but the migration waits for it, and the event loop goes on. A thread that waits in the kernel keeps its process
from ending: hence nothing is looked up in a file system that somebody else answers for (`launcher`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from migproxy.launcher import LauncherError

SECONDS = 2.0
"""What a look may take; it takes some microseconds where the pod's file systems are in memory or on a disk."""

T = TypeVar("T")


class NoAnswer(LauncherError):
    """A launcher's folders keep a look into them waiting."""


class LauncherThread:
    """Carries out calls one after the other, in a thread of its own from the first one on.

    What a call has opened must be used and closed in the thread, too: a call that hung goes on some day, and must find
    its descriptors as they were.

    Args:
        whose: The launcher, for messages.
        seconds: What a call may take, its turn included.
    """

    def __init__(self, whose: str, seconds: float = SECONDS) -> None:
        self._whose = whose
        self._seconds = seconds
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._clock = asyncio.get_running_loop().time
        self._since: float | None = None  # when the call that is carried out began

    async def run(self, call: Callable[[], T], discard: Callable[[T], object] | None = None) -> T:
        """Carries out a call.

        Args:
            call: What to do.
            discard: Lets go of the result where nobody waits for it any more; in the thread.

        Raises:
            NoAnswer: The call is left to itself.
            Exception: Whatever the call raises.
        """
        if self._hangs:
            raise self._no_answer()
        job = _Job(call, discard)
        answer = asyncio.get_running_loop().run_in_executor(self, job)  # type: ignore[arg-type]
        try:
            await asyncio.wait([answer], timeout=self._seconds)
            if not answer.done():
                raise self._no_answer()
            return answer.result()
        except BaseException:
            answer.cancel()
            if job.abandon():
                self.later(job.discard)
            raise

    def later(self, call: Callable[[], object]) -> None:
        """Carries out a call that nobody waits for, after those before it."""
        self.submit(call)

    def close(self) -> None:
        """Ends the thread after what it has been told to do; waits for nothing."""
        self._queue.put(None)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """For `loop.run_in_executor`; see concurrent.futures.Executor."""
        future: Future[T] = Future()
        self._queue.put((future, call))
        if self._thread is None:
            # A daemon: the interpreter's end does not wait for it.
            thread = threading.Thread(target=self._work, name="launcher", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                future.cancel()
                why = f"{self._whose}: no thread can be started: {error}: raise the limit of processes (TasksMax=)"
                raise LauncherError(why) from error
            self._thread = thread
        return future

    @property
    def _hangs(self) -> bool:
        since = self._since
        return since is not None and self._clock() - since > self._seconds

    def _no_answer(self) -> NoAnswer:
        return NoAnswer(
            f"{self._whose}: its folders have not answered for {self._seconds:g} s: what they are on hangs: look at "
            "the node's disks (dmesg), or end the pod"
        )

    def _work(self) -> None:
        while asked := self._queue.get():
            future, call = asked
            if not future.set_running_or_notify_cancel():
                continue
            self._since = self._clock()
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                future.set_exception(error)
            else:
                future.set_result(result)
            self._since = None


class _Job(Generic[T]):
    """A call whose result is somebody's: the caller's, or else it is discarded."""

    def __init__(self, call: Callable[[], T], discard: Callable[[T], object] | None) -> None:
        self._call = call
        self._discard = discard
        self._results: list[T] = []
        self._is_abandoned = False
        self._lock = threading.Lock()

    def __call__(self) -> T:
        result = self._call()
        with self._lock:
            self._results.append(result)
            is_abandoned = self._is_abandoned
        if is_abandoned:
            self.discard()
        return result

    def abandon(self) -> bool:
        """Says that nobody waits any more; returns whether there is a result to discard already."""
        with self._lock:
            self._is_abandoned = True
            return bool(self._results)

    def discard(self) -> None:
        """Lets go of the result."""
        with self._lock:
            results, self._results = self._results, []
        for result in results:
            if self._discard is not None:
                self._discard(result)
