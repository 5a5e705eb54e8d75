"""The lock that tells whether a process lives."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migproxy.lifeline import Lifeline, LifelineError

HOLD = """
import asyncio, sys
from migproxy.lifeline import Lifeline

async def hold():
    async with Lifeline(sys.argv[1]).held():
        print("held", flush=True)
        await asyncio.sleep(60)

asyncio.run(hold())
"""


@contextmanager
def another(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds it."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_who_is_stopped_lives_and_who_was_killed_is_dead_at_once(tmp_path: Path) -> None:
    lifeline = Lifeline(str(tmp_path / "lock"))
    with another(tmp_path / "lock") as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert lifeline.is_held
    assert not lifeline.is_held


async def test_who_starts_waits_until_nobody_acts_for_the_dead_any_more(tmp_path: Path) -> None:
    acting, starting = (Lifeline(str(tmp_path / "lock")) for _ in range(2))
    begun = asyncio.Event()

    async def begin() -> None:
        async with starting.held():
            begun.set()
            await asyncio.Event().wait()

    with acting.taken() as is_taken:
        assert is_taken
        task = asyncio.create_task(begin())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(begun.wait(), 0.2)
    await asyncio.wait_for(begun.wait(), 5)
    with acting.taken() as is_taken:
        assert not is_taken
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not acting.is_held


async def test_who_starts_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migproxy.lifeline._MOST_SECONDS", 0.1)
    acting, starting = (Lifeline(str(tmp_path / "lock")) for _ in range(2))
    with acting.taken():
        async with starting.held():
            pass


def test_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LifelineError, match="file/lock"):
        Lifeline(str(tmp_path / "file" / "lock"))
