"""The relay's TLS workers, without a relay: whom they get messages to, and what is told of those that die."""

from __future__ import annotations

import errno
import os
import selectors
import signal
import time
from collections.abc import Iterator

import pytest

from migproxy.relay import workers
from migproxy.relay.protocol import Ended, Move, ProtocolError, Way
from migproxy.relay.workers import Workers
from tests.relays import DEADLINE, Wire

pytestmark = pytest.mark.tier("gate")


class Hearing:
    """Workers, and what is heard of them.

    Attributes:
        workers: Under test.
        ends, deaths: In the order in which they were told.
    """

    def __init__(self) -> None:
        self.ends: list[Ended] = []
        self.deaths: list[str] = []
        self._selector = selectors.DefaultSelector()
        self.workers = Workers(self._selector, self.ends.append, self.deaths.append)

    def move(self, name: str) -> None:
        """Has a connection moved whose keys are none: the worker says so, and it has ended."""
        reader, writer = os.pipe()
        os.close(writer)
        with Wire() as wire:
            self.workers.move(Move(name, Way.TLS), (*wire.fds[:2], wire.fds[-1], reader))
        os.close(reader)

    def until(self, count: int) -> None:
        """Listens until so many connections have ended."""
        deadline = time.monotonic() + DEADLINE
        while len(self.ends) < count:
            assert time.monotonic() < deadline, self.ends
            for key, _ in self._selector.select(0.01):
                assert self.workers.hear(key.fileobj)
            self.workers.flush()

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self.workers._workers]

    def close(self) -> None:
        self.workers.close()
        self._selector.close()


@pytest.fixture
def hearing() -> Iterator[Hearing]:
    made = Hearing()
    yield made
    made.close()


def test_what_a_busy_worker_does_not_take_yet_waits_for_it(hearing: Hearing) -> None:
    hearing.move("first")
    hearing.until(1)
    (pid,) = hearing.pids
    os.kill(pid, signal.SIGSTOP)
    for number in range(400):  # a socket holds fewer
        hearing.move(f"{number}")
    hearing.workers.look()
    assert hearing.workers.is_behind
    os.kill(pid, signal.SIGCONT)
    hearing.until(401)
    assert hearing.deaths == []
    assert [end.name for end in hearing.ends[1:]] == [f"{number}" for number in range(400)]
    assert {end.number for end in hearing.ends} == {errno.EIO}
    assert not hearing.workers.is_behind


def test_a_connection_that_comes_before_the_news_of_a_death_gets_another_worker(hearing: Hearing) -> None:
    hearing.move("first")
    hearing.until(1)
    (pid,) = hearing.pids
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    hearing.move("second")
    hearing.until(2)
    assert hearing.ends[1] == Ended("second", errno.EIO, "it cannot be moved: no keys of a connection")
    assert hearing.deaths == [f"TLS worker {pid}, which moved 0 connections, died"]


def test_a_worker_that_cannot_be_understood_is_ended(hearing: Hearing, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> Ended:
        raise ProtocolError("not JSON")

    monkeypatch.setattr(workers, "for_daemon", read)
    hearing.move("first")
    (pid,) = hearing.pids
    hearing.until(1)
    assert hearing.ends == [Ended("first", errno.EOWNERDEAD, f"process {pid}, which had its keys, has died")]
    assert "not JSON" in hearing.deaths[0]
    assert hearing.pids == []


def test_the_end_of_a_connection_that_a_worker_does_not_have_is_not_passed_on(hearing: Hearing) -> None:
    hearing.move("first")
    (worker,) = hearing.workers._workers
    worker.names.clear()
    hearing.move("second")
    hearing.until(1)
    assert [end.name for end in hearing.ends] == ["second"]


def test_worker_that_is_still_starting_does_not_hang(hearing: Hearing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_HANG_SECONDS", 0.0)
    hearing.move("one")
    for _ in range(3):
        hearing.workers.look()
    assert not hearing.deaths
    hearing.until(1)
    hearing.workers.look()
    deadline = time.monotonic() + DEADLINE
    while not hearing.workers._workers[0].has_begun:
        assert time.monotonic() < deadline
        for key, _ in hearing._selector.select(0.01):
            hearing.workers.hear(key.fileobj)
    os.kill(hearing.pids[0], signal.SIGSTOP)
    for _ in range(3):
        hearing.workers.look()
    assert len(hearing.deaths) == 1
