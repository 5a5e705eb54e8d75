"""The lock that tells whether a process lives."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from migproxy.lifeline import HANG_SECONDS, Lifeline, LifelineError, is_locked
from tests.clock import Clock

pytestmark = pytest.mark.tier("gate")

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


@pytest.mark.simulated_time
async def test_who_starts_waits_until_nobody_acts_for_the_dead_any_more(tmp_path: Path, clock: Clock) -> None:
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
            await asyncio.wait_for(begun.wait(), 5)
    await begun.wait()
    assert clock() <= 5.02
    with acting.taken() as is_taken:
        assert not is_taken
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not acting.is_held


@pytest.mark.simulated_time
async def test_who_starts_does_not_wait_for_ever(tmp_path: Path, clock: Clock) -> None:
    acting, starting = (Lifeline(str(tmp_path / "lock")) for _ in range(2))
    with acting.taken():
        assert not await starting.take(1)
        assert clock() == 1
        async with starting.held():
            assert clock() == 1 + HANG_SECONDS + 5


async def test_each_life_leaves_another_mark_and_a_look_leaves_none(tmp_path: Path) -> None:
    marks = [Lifeline(str(tmp_path / "lock")).life]
    for _ in range(2):
        with closing(Lifeline(str(tmp_path / "lock"))) as lifeline:
            assert await lifeline.take(1)
            assert is_locked(str(tmp_path / "lock"))
            marks.append(lifeline.life)
        assert not is_locked(str(tmp_path / "lock"))
    assert len(set(marks)) == 3


def test_looking_makes_nothing(tmp_path: Path) -> None:
    assert not is_locked(str(tmp_path / "lock"))
    assert not list(tmp_path.iterdir())


def test_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LifelineError, match="file/lock"):
        Lifeline(str(tmp_path / "file" / "lock"))
