"""A lock that a process holds for as long as it lives: another one knows by it, at once and for certain, that it died.

The kernel releases a flock(2) at its holder's death, however that comes. Who takes it then also knows that no successor
acts in the meantime. Each life leaves another mark in the file, so that one which was too short to be seen is noticed
all the same.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

import structlog

from migproxy.safefiles import Planted, open_file

log = structlog.get_logger(__name__)

HANG_SECONDS: Final = 10
"""After which whoever acts for the dead, and has the lock for that, must have ended: it acts for milliseconds."""

_MOST_SECONDS: Final = HANG_SECONDS + 5.0
_RETRY_SECONDS = 0.02
_MARK_BYTES = 64


class LifelineError(Exception):
    """The lock's file cannot be made."""


class Lifeline:
    """Owns a descriptor of the lock's file, which is made if need be and stays.

    Args:
        path: Of the file.

    Raises:
        LifelineError: It cannot be made; says what to do.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._fd = open_file(path, os.O_RDWR | os.O_CREAT)
        except Planted as error:
            raise LifelineError(f"{path}: {error.strerror} as --control-socket") from error
        except OSError as error:
            remedy = "remove it, or run as the user that made it, or name another --control-socket"
            raise LifelineError(f"{path}: {error.strerror}: {remedy}") from error

    def close(self) -> None:
        """Lets go of the lock, and closes the file."""
        os.close(self._fd)

    @property
    def is_held(self) -> bool:
        """Whether another process lives that holds it."""
        return _is_held(self._fd)

    @property
    def life(self) -> bytes:
        """The mark of the one that held it last: another one for each."""
        return os.pread(self._fd, _MARK_BYTES, 0)

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

    async def _take(self) -> None:
        while not _try(self._fd, fcntl.LOCK_EX):
            await asyncio.sleep(_RETRY_SECONDS)
        os.pwrite(self._fd, f"{os.getpid()} {time.time_ns()}".encode().ljust(_MARK_BYTES), 0)

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Takes the lock while the context lasts, if nobody lives that holds it; tells whether it did."""
        is_taken = _try(self._fd, fcntl.LOCK_EX)
        try:
            yield is_taken
        finally:
            if is_taken:
                fcntl.flock(self._fd, fcntl.LOCK_UN)


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
