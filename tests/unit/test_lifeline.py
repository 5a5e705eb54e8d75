"""The lock that tells whether a process lives."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from migproxy import lifeline as lifeline_module
from migproxy.lifeline import HANG_SECONDS, Lifeline, LifelineError, is_locked
from tests.clock import Clock

pytestmark = pytest.mark.tier("gate")

HOLD = """
import asyncio, sys
from migproxy.lifeline import Lifeline

async def hold():
    async with Lifeline(sys.argv[1], is_folder=bool(sys.argv[2:])).held():
        print("held", flush=True)
        await asyncio.sleep(60)

asyncio.run(hold())
"""


@contextmanager
def another(path: Path, *prefix: str) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds it, started by a command that runs it."""
    command = [*prefix, sys.executable, "-c", HOLD, str(path), *(["folder"] if path.is_dir() else [])]
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


@pytest.mark.simulated_time
@pytest.mark.parametrize("is_folder", [False, True])
async def test_who_waits_is_told_for_whom_and_begins_when_that_one_was_killed(
    tmp_path: Path, clock: Clock, is_folder: bool
) -> None:
    path, told = tmp_path if is_folder else tmp_path / "lock", list[str]()
    with closing(Lifeline(str(path), is_folder=is_folder)) as lifeline:
        with another(path) as process:
            waiting = asyncio.create_task(lifeline.wait(told.append))
            await asyncio.sleep(10)
            assert told == [f"process {process.pid} (ps -fp {process.pid})"]
            assert not waiting.done()
        began = clock()
        await waiting
        assert clock() - began <= 0.1
        with closing(Lifeline(str(path), is_folder=is_folder)) as next_one:
            assert next_one.is_held


async def test_who_cannot_be_seen_is_named_by_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another host, over NFS, or in another PID namespace."""
    monkeypatch.setattr(lifeline_module, "_holders", lambda _: [])
    with closing(Lifeline(str(tmp_path / "lock"))) as lifeline, closing(Lifeline(str(tmp_path / "lock"))) as other:
        assert await lifeline.take(1)
        assert other.holder == f"process {os.getpid()} of {os.uname().nodename}"
    with closing(Lifeline(str(tmp_path), is_folder=True)) as folder:
        assert folder.holder == "a process of another PID namespace"


@pytest.mark.root
async def test_who_may_only_read_a_folder_holds_up_nobody() -> None:
    stranger = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with (
            another(Path(folder), *stranger) as process,
            closing(Lifeline(folder, is_folder=True)) as lifeline,
            pytest.raises(PermissionError, match=f"process {process.pid} of user 65534 has locked it"),
        ):
            await lifeline.wait(print)
