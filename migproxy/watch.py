"""The daemon's one inotify descriptor, shared by everybody who watches a folder or a file.

The kernel allows a user 128 inotify instances (fs.inotify.max_user_instances), so one serves the whole
daemon. Within an instance a folder has one watch however often it is asked for, and each new request
replaces the mask of the last (inotify_add_watch(2)). Masks are therefore added up with IN_MASK_ADD, every
subscriber gets the events of its own mask only, and the watch goes when its last subscriber does.

A folder that some process (this one too) holds open is reported gone only when the last of those
descriptors is closed: the kernel tells of a folder's end when it frees the inode. Who keeps a descriptor
of the folder it watches has to watch the parent too, for DELETE.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Final, Self

import structlog
from asyncinotify import Inotify, Mask, Watch

from migproxy.fds import MORE_FILES
from migproxy.pauses import doubling

__all__ = ["FIRST_RETRY", "LAST_RETRY", "Event", "Mask", "Subscription", "WatchError", "Watcher"]

Aside = Callable[[Callable[[], Watch], Callable[[Watch], object]], Awaitable[Watch]]
QUEUE_LIMIT: Final = 1024
"""Events that may wait for one subscriber; more become a single overflow."""
FIRST_RETRY: Final = 0.05
LAST_RETRY: Final = 1.0
"""Seconds between two times that what has failed is tried again: the first pause, and the longest."""

_BATCH: Final = 256  # events that are taken in one turn of the loop: a pod may make any number

log = structlog.get_logger()


class WatchError(Exception):
    """Nothing can be watched at all; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to what a subscription watches.

    Args:
        mask: what happened, inotify(7)'s bits.
        name: the entry of the watched folder that it happened to; None for the watched file or folder
            itself, and for an overflow.
    """

    mask: Mask
    name: str | None

    @property
    def gone(self) -> bool:
        """The watch has ended: what it watched was deleted or unmounted. The last event there is."""
        return Mask.IGNORED in self.mask

    @property
    def overflow(self) -> bool:
        """Events were lost: look at everything again."""
        return Mask.Q_OVERFLOW in self.mask


class Subscription:
    """The events of one watched path for one subscriber: a context manager and an async iterator.

    Iteration ends after an event that is `gone`, when the subscription is closed, and when the watcher is.
    """

    def __init__(self, watcher: "Watcher", watch: Watch, mask: Mask) -> None:
        self._watcher = watcher
        self._watch = watch
        self._mask = mask | Mask.IGNORED
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the subscription; other subscribers to the same path are not affected. Idempotent."""
        self._watcher._drop(self, self._watch)
        self._events.clear()
        self._end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()

    def _deliver(self, event: Event) -> None:
        if not event.overflow and not event.mask & self._mask:
            return
        if len(self._events) >= QUEUE_LIMIT:
            self._events.clear()
            event = Event(event.mask & Mask.IGNORED | Mask.Q_OVERFLOW, None)
        self._events.append(event)
        self._arrived.set()
        if event.gone:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._arrived.set()


class Watcher:
    """Owns the inotify descriptor: an async context manager, within which `watch` may be called.

    Attributes:
        problem: What keeps events from being read, None while they are. Each vain try is an overflow to everybody.

    Raises:
        WatchError: on entering, when there is no inotify instance to be had.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self._inotify: Inotify | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._pauses = doubling(FIRST_RETRY, LAST_RETRY)
        self._subscriptions: dict[int, list[Subscription]] = {}

    async def __aenter__(self) -> Self:
        try:
            self._inotify = Inotify(sync_timeout=0)
        except OSError as error:
            remedy = f"{MORE_FILES}, or the sysctl fs.inotify.max_user_instances"
            raise WatchError(f"no folder can be watched (inotify_init1): {error.strerror}: {remedy}") from error
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._read)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._inotify
        asyncio.get_running_loop().remove_reader(self._inotify.fd)
        if self._retry:
            self._retry.cancel()
        self._inotify.close()
        self._inotify = None
        for subscription in self._everybody():
            subscription._end()
        self._subscriptions.clear()

    def watch(self, path: str, mask: Mask) -> Subscription:
        """Subscribe to what happens to a file, or to a folder and its entries.

        Args:
            path: followed if it is a symbolic link (unless mask has DONT_FOLLOW); "/proc/self/fd/N"
                watches what that descriptor refers to.
            mask: the events wanted; the end of the watch and an overflow are always told.

        Raises:
            OSError: naming the path: it is missing, unreadable, or the user's watches are used up (ENOSPC,
                fs.inotify.max_user_watches).
        """
        return self._subscribe(self._add(path, mask), mask)

    async def watch_aside(self, run: Aside, path: str, mask: Mask) -> Subscription:
        """`watch`, where the call into the kernel may hang.

        Args:
            run: Carries it out in another thread; lets go of the result there where nobody waits for it any more.
        """
        loop = asyncio.get_running_loop()

        def discard(watch: Watch) -> None:
            loop.call_soon_threadsafe(self._remove_unused, watch)

        return self._subscribe(await run(lambda: self._add(path, mask), discard), mask)

    def _add(self, path: str, mask: Mask) -> Watch:
        if self._inotify is None:
            raise RuntimeError("the watcher is not running")
        return self._inotify.add_watch(path, mask | Mask.MASK_ADD)

    def _subscribe(self, watch: Watch, mask: Mask) -> Subscription:
        subscription = Subscription(self, watch, mask)
        self._subscriptions.setdefault(watch.wd, []).append(subscription)
        return subscription

    def _drop(self, subscription: Subscription, watch: Watch) -> None:
        subscribers = self._subscriptions.get(watch.wd, [])
        if subscription not in subscribers:
            return
        subscribers.remove(subscription)
        if not subscribers:
            del self._subscriptions[watch.wd]
            self._remove_unused(watch)

    def _remove_unused(self, watch: Watch) -> None:
        if self._inotify is not None and watch.wd not in self._subscriptions:
            with suppress(OSError, KeyError):  # the kernel has ended the watch already and is about to say so
                self._inotify.rm_watch(watch)

    def _read(self) -> None:
        """Delivers what has happened; where that cannot be read, tries again later."""
        if self._inotify is None:
            return
        loop = asyncio.get_running_loop()
        try:
            events = list(islice(self._inotify, _BATCH))
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        if self.problem:
            log.info("inotify is read again")
            self.problem, self._pauses = None, doubling(FIRST_RETRY, LAST_RETRY)
            loop.add_reader(self._inotify.fd, self._read)
        for event in events:
            self._dispatch(Event(event.mask, None if event.name is None else str(event.name)), event.watch)
        if len(events) == _BATCH:
            loop.call_soon(self._read)  # more may have been read than was taken

    def _fail(self, why: str) -> None:
        """Has everybody look for themselves, since events may be lost, and tries again after a pause."""
        assert self._inotify
        problem = f"changes of files are noticed late: inotify cannot be read: {why}"
        if self.problem != problem:
            log.error("inotify cannot be read", error=why)
        self.problem = problem
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._inotify.fd)
        if self._retry:
            self._retry.cancel()
        self._retry = loop.call_later(next(self._pauses), self._read)
        for subscription in self._everybody():
            subscription._deliver(Event(Mask.Q_OVERFLOW, None))

    def _everybody(self) -> list[Subscription]:
        return [one for subscribers in self._subscriptions.values() for one in subscribers]

    def _dispatch(self, event: Event, watch: Watch | None) -> None:
        if event.overflow:
            receivers = self._everybody()
        elif watch is None:  # of a watch that was removed
            receivers = []
        elif event.gone:
            receivers = self._subscriptions.pop(watch.wd, [])
        else:
            receivers = self._subscriptions.get(watch.wd, [])
        for subscription in receivers:
            subscription._deliver(event)
