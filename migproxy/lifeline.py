"""A lock that a process holds for as long as it lives: another one knows by it, at once and for certain, that it died.

The kernel releases a flock(2) at its holder's death, however that comes. Who takes it then also knows that no successor
acts in the meantime. Each life leaves another mark in the file, so that one which was too short to be seen is noticed
all the same.

The lock belongs to whoever has the descriptor: it is closed on exec, and never handed to the relay, which outlives the
daemon.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from functools import cached_property
from typing import Final, TextIO

import structlog

from migproxy.safefiles import Planted, open_file

log = structlog.get_logger(__name__)

HANG_SECONDS: Final = 10
"""After which whoever acts for the dead, and has the lock for that, must have ended: it acts for milliseconds."""

_MOST_SECONDS: Final = HANG_SECONDS + 5.0
_RETRY_SECONDS = 0.02
_LOOK_SECONDS = 0.1  # between two looks at who has a lock that may be held for days
_STRANGER_SECONDS: Final = 2.0
"""How long a folder's lock is waited for while no process of root's or of our own user's is seen to hold it."""

_MARK_BYTES = 128


class LifelineError(Exception):
    """The lock's file cannot be made, or the folder cannot be opened; `__cause__` is the OSError."""


class Lifeline:
    """Owns a descriptor of what is locked.

    Args:
        path: Of a file, which is made if need be and stays.
        is_folder: It is a folder instead, in which nothing is left: whoever may read it can lock it.

    Raises:
        LifelineError: It cannot be had; says what to do.
    """

    def __init__(self, path: str, *, is_folder: bool = False) -> None:
        self._path = path
        self._is_folder = is_folder
        try:
            if is_folder:
                self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            else:
                self._fd = open_file(path, os.O_RDWR | os.O_CREAT)
        except Planted as error:
            raise LifelineError(f"{path}: {error.strerror} as --control-socket") from error
        except OSError as error:
            remedy = "remove it, or run as the user that made it, or name another --control-socket"
            raise LifelineError(f"{path}: {error.strerror}: {remedy}") from error

    def close(self) -> None:
        """Lets go of the lock, and closes what is locked."""
        os.close(self._fd)

    @property
    def is_held(self) -> bool:
        """Whether another process lives that holds it."""
        return _is_held(self._fd)

    @property
    def life(self) -> bytes:
        """The mark of the one that held it last: another one for each; a folder has none."""
        return b"" if self._is_folder else os.pread(self._fd, _MARK_BYTES, 0)

    @property
    def holder(self) -> str:
        """Who holds it, for people."""
        if pids := [pid for pid in _lockers(self._lock) if os.path.exists(f"/proc/{pid}")]:
            return f"process {pids[0]} (ps -fp {pids[0]})"
        with suppress(ValueError):  # on another machine, over NFS
            pid, _, host = self.life.decode(errors="replace").split()
            return f"process {pid} of {host}"
        return "an unknown process (it has ended, or is of another PID namespace)"

    @cached_property
    def _lock(self) -> str:
        return _name_of_lock(self._fd)

    async def take(self, seconds: float) -> bool:
        """Begins to live: holds the lock from then on.

        Args:
            seconds: To wait for it at most.

        Returns:
            Whether it is held.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._take()
                return True
        return False

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Lives while the context lasts. Who acts for the dead is waited for, though not for ever."""
        taking = asyncio.create_task(self._take())
        try:
            done, _ = await asyncio.wait([taking], timeout=_MOST_SECONDS)
            if not done:
                log.error("somebody else has the lock: goes on without it", lock=self._path)
            yield
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    async def wait(self, tell: Callable[[str], None]) -> None:
        """Begins to live, as soon as nobody else does.

        Args:
            tell: Is told who holds it, where that has to be waited for.

        Raises:
            OSError: It cannot be locked there, or it is a folder, and for 2 s no process of root's or of this
                process's user was seen to hold it.
        """
        told, unseen = "", 0.0
        while not self._begin():
            if (holder := self.holder) != told:
                told = holder
                tell(holder)
            if self._is_folder and not any(_holds(pid, self._lock) for pid in _lockers(self._lock)):
                if unseen >= _STRANGER_SECONDS:
                    why = f"{self.holder} has locked it, which is not seen to be a daemon"
                    raise PermissionError(errno.EACCES, why)
                unseen += _LOOK_SECONDS
            else:
                unseen = 0.0
            await asyncio.sleep(_LOOK_SECONDS)

    async def _take(self) -> None:
        while not self._begin():
            await asyncio.sleep(_RETRY_SECONDS)

    def _begin(self) -> bool:
        is_taken = _try(self._fd, fcntl.LOCK_EX)
        if is_taken and not self._is_folder:
            mark = f"{os.getpid()} {time.time_ns()} {os.uname().nodename}"
            os.pwrite(self._fd, mark.encode().ljust(_MARK_BYTES), 0)
        return is_taken

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Takes the lock while the context lasts, if nobody lives that holds it; tells whether it did."""
        is_taken = _try(self._fd, fcntl.LOCK_EX)
        try:
            yield is_taken
        finally:
            if is_taken:
                fcntl.flock(self._fd, fcntl.LOCK_UN)


@asynccontextmanager
async def living(path: str) -> AsyncIterator[None]:
    """Holds a file's lock while the context lasts: see `Lifeline.held`.

    Raises:
        LifelineError: The file cannot be made.
    """
    with closing(Lifeline(path)) as lifeline:
        async with lifeline.held():
            yield


def is_locked(path: str) -> bool:
    """Whether a process lives that holds the lock of that file; nothing is made, and nothing is changed."""
    try:
        fd = open_file(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _is_held(fd)
    finally:
        os.close(fd)


def _is_held(fd: int) -> bool:
    if not _try(fd, fcntl.LOCK_SH):  # two that ask at once are not in each other's way
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _try(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _name_of_lock(fd: int) -> str:
    """What /proc/locks and /proc/PID/fdinfo call the file that is open, by device and inode.

    The device is the file system's. stat(2) tells another one of btrfs's subvolumes, so it is mountinfo's.
    """
    status = os.fstat(fd)
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    with suppress(OSError), _lines(f"/proc/self/fdinfo/{fd}") as about, _lines("/proc/self/mountinfo") as mounts:
        mount = next(line.split()[1] for line in about if line.startswith("mnt_id:"))
        for line in mounts:
            number, _, device, *_ = line.split()
            if number == mount:
                major, minor = map(int, device.split(":"))
    return f"{major:02x}:{minor:02x}:{status.st_ino}"


def _lockers(lock: str) -> list[int]:
    """The processes of this PID namespace that have taken a lock, by /proc/locks (proc_locks(5)).

    The lock outlives such a process where a child of its keeps the descriptor.
    """
    with suppress(OSError), _lines("/proc/locks") as locks:
        return _takers(locks, lock)
    return []


def _holds(pid: int, lock: str) -> bool:
    """Whether a process of root's or of our own user's has a lock's descriptor open; False where that is not seen.

    That of /proc/locks may have ended, and another process have its PID by now.
    """
    with suppress(OSError):
        if _users(pid) <= {0, os.geteuid()}:
            for name in os.listdir(f"/proc/{pid}/fdinfo"):
                with suppress(FileNotFoundError), _lines(f"/proc/{pid}/fdinfo/{name}") as about:
                    if pid in _takers((line.removeprefix("lock:") for line in about if line.startswith("lock:")), lock):
                        return True
    return False


def _takers(locks: Iterable[str], lock: str) -> list[int]:
    found = []
    for line in locks:
        _, kind, _, _, pid, what, *_ = line.split()  # who waits has "->" for a kind
        if kind == "FLOCK" and what == lock and int(pid) > 0:
            found.append(int(pid))
    return found


def _users(pid: int) -> set[int]:
    """A process's real, effective and saved user.

    Raises:
        OSError: It has ended.
    """
    with _lines(f"/proc/{pid}/status") as status:
        return next({int(user) for user in line.split()[1:4]} for line in status if line.startswith("Uid:"))


def _lines(path: str) -> TextIO:
    return open(path, encoding="utf-8", errors="replace")
