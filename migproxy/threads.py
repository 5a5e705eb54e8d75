"""Threads that block in the kernel, kept for a moment to be used again."""

from __future__ import annotations

import _thread
import queue
from collections.abc import Callable

Work = Callable[[], object]


class Threads:
    """Runs each piece of work in a thread of its own, which then waits a while for the next one.

    A connection needs two threads. To start them took a third of the CPU time that a short connection costs, and
    `threading.Thread.start`, which waits until the thread runs, as much again in time.

    The interpreter does not wait for these threads at its end.

    Args:
        linger: Seconds that a thread without work stays.
    """

    def __init__(self, linger: float) -> None:
        self._linger = linger
        self._idle: list[queue.SimpleQueue[Work]] = []

    def start(self, work: Work) -> None:
        """Begins some work and does not wait for it.

        Args:
            work: Does not raise.

        Raises:
            RuntimeError: There are no more threads to be had.
        """
        try:
            mailbox = self._idle.pop()  # the one that worked last: the others may go
        except IndexError:
            _thread.start_new_thread(self._serve, (work,))
        else:
            mailbox.put(work)

    def _serve(self, work: Work) -> None:
        mailbox: queue.SimpleQueue[Work] = queue.SimpleQueue()
        while True:
            work()
            self._idle.append(mailbox)
            try:
                work = mailbox.get(timeout=self._linger)
            except queue.Empty:
                try:
                    self._idle.remove(mailbox)
                except ValueError:  # somebody took it in this instant, and has work for it
                    work = mailbox.get()
                else:
                    return
