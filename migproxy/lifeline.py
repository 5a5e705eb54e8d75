"""A lock that a process holds for as long as it lives: another one knows by it, at once and for certain, that it died.

The kernel releases a flock(2) at its holder's death, however that comes. Who takes it then also knows that no successor
acts in the meantime.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import structlog

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 0.02
_MOST_SECONDS = 5.0
"""That another process may delay this one's start; it acts for milliseconds only, unless it is stopped."""


class LifelineError(Exception):
    """The lock's file cannot be made."""


class Lifeline:
    """Owns a descriptor of the lock's file, which is made if need be and stays.

    Args:
        path: Of the file.

    Raises:
        LifelineError: It cannot be made.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LifelineError(f"{path}: {error.strerror}") from error

    @property
    def is_held(self) -> bool:
        """Whether another process lives that holds it."""
        with self.taken() as is_taken:
            return not is_taken

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Holds the lock while the context lasts; who has it now is waited for, though not for ever."""
        taking = asyncio.create_task(self._take())
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_MOST_SECONDS):
                    await asyncio.shield(taking)
            if not taking.done():
                log.error("somebody else has the lock: goes on without it", lock=self._path)
            yield
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    async def _take(self) -> None:
        while not self._try():
            await asyncio.sleep(_RETRY_SECONDS)

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Takes the lock while the context lasts, if nobody holds it; tells whether it did."""
        is_taken = self._try()
        try:
            yield is_taken
        finally:
            if is_taken:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
