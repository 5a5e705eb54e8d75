"""Threads that are used again: nothing waits for another's work, nothing is lost, none stays for good."""

from __future__ import annotations

import os
import queue
import threading
import time
from functools import partial

import pytest

from migproxy.threads import Threads

pytestmark = pytest.mark.tier("gate")

DEADLINE = 20.0


def test_work_that_blocks_keeps_no_other_work_waiting() -> None:
    threads, met = Threads(linger=0.01), threading.Barrier(9)
    for _ in range(8):
        threads.start(lambda: met.wait(DEADLINE))
    met.wait(DEADLINE)  # breaks unless all eight have come too


def test_a_thread_that_is_done_takes_the_next_work() -> None:
    threads, done = Threads(linger=DEADLINE), queue.SimpleQueue[int]()
    seen = set()
    for _ in range(5):
        threads.start(lambda: done.put(threading.get_ident()))
        seen.add(done.get(timeout=DEADLINE))
        time.sleep(0.01)  # it is idle in a moment; were it not, there would be a second thread, of five
    assert len(seen) < 5


def test_all_work_is_done_once_though_threads_end_all_the_time() -> None:
    threads, done = Threads(linger=0.0001), queue.SimpleQueue[int]()
    for number in range(5000):
        threads.start(partial(done.put, number))
        if number % 7 == 0:
            time.sleep(0.0002)
    assert sorted(done.get(timeout=DEADLINE) for _ in range(5000)) == list(range(5000))


def test_threads_without_work_end() -> None:
    before = len(os.listdir("/proc/self/task"))
    threads, met = Threads(linger=0.05), threading.Barrier(20)
    for _ in range(20):
        threads.start(lambda: met.wait(DEADLINE))
    deadline = time.monotonic() + DEADLINE
    while len(os.listdir("/proc/self/task")) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
