"""The lock that tells whether a process lives."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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
    monkeypatch.setattr(lifeline_module, "_lockers", lambda _: [])
    with closing(Lifeline(str(tmp_path / "lock"))) as lifeline, closing(Lifeline(str(tmp_path / "lock"))) as other:
        assert await lifeline.take(1)
        assert other.holder == f"process {os.getpid()} of {os.uname().nodename}"


async def held_up(folder: Path, clock: Clock) -> tuple[float, str]:
    """For how many seconds whoever locks a folder holds up a daemon, and what is told of it then."""
    began = clock()
    with closing(Lifeline(str(folder), is_folder=True)) as lifeline, pytest.raises(PermissionError) as refused:
        await lifeline.wait(lambda _: None)
    return clock() - began, str(refused.value)


@pytest.mark.simulated_time
@pytest.mark.root
async def test_who_may_only_read_a_folder_does_not_hold_up_a_daemon(clock: Clock) -> None:
    stranger = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        with another(Path(folder), *stranger) as process:
            seconds, why = await held_up(Path(folder), clock)
    assert seconds <= 2.1
    assert f"process {process.pid} (ps -fp {process.pid}) has locked it, which is not seen to be a daemon" in why


@pytest.mark.simulated_time
async def test_a_lock_whose_process_has_ended_does_not_hold_up_a_daemon(tmp_path: Path, clock: Clock) -> None:
    """Its child keeps the descriptor, and so the lock; the kernel names the process alone that took it."""
    lock = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX);"
        "os.fork() and os._exit(0); sys.stdin.read()"  # the child lives until our end of the pipe is closed
    )
    with subprocess.Popen([sys.executable, "-c", lock, str(tmp_path)], stdin=subprocess.PIPE) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        process.poll()
        seconds, why = await held_up(tmp_path, clock)
    assert seconds <= 2.1
    assert "an unknown process (it has ended" in why


@pytest.mark.simulated_time
@pytest.mark.parametrize("lockers", [list[int], lambda: [os.getppid()]], ids=["nobody", "another one with its PID"])
async def test_a_lock_that_nobody_is_seen_to_hold_does_not_hold_up_a_daemon(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, lockers: Callable[[], list[int]]
) -> None:
    monkeypatch.setattr(lifeline_module, "_lockers", lambda _: lockers())
    with another(tmp_path):
        seconds, why = await held_up(tmp_path, clock)
    assert seconds <= 2.1
    assert "has locked it, which is not seen to be a daemon" in why
