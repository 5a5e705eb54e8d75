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
from types import TracebackType
from typing import Final, Self

from asyncinotify import Inotify, Mask, Watch

__all__ = ["Event", "Mask", "Subscription", "Watcher"]

Aside = Callable[[Callable[[], Watch], Callable[[Watch], object]], Awaitable[Watch]]
QUEUE_LIMIT: Final = 1024
"""Events that may wait for one subscriber; more become a single overflow."""


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

    Raises:
        OSError: on entering, when the user has no inotify instance left (EMFILE).
    """

    def __init__(self) -> None:
        self._inotify: Inotify | None = None
        self._reader: asyncio.Task[None] | None = None
        self._subscriptions: dict[int, list[Subscription]] = {}

    async def __aenter__(self) -> Self:
        self._inotify = Inotify()
        self._reader = asyncio.create_task(self._read(self._inotify), name="inotify")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._inotify
        assert self._reader
        self._reader.cancel()
        try:
            with suppress(asyncio.CancelledError):
                await self._reader
        finally:
            self._inotify.close()
            self._inotify = None

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

    async def _read(self, inotify: Inotify) -> None:
        try:
            async for event in inotify:
                self._dispatch(Event(event.mask, None if event.name is None else str(event.name)), event.watch)
        finally:
            for subscribers in self._subscriptions.values():
                for subscription in subscribers:
                    subscription._end()
            self._subscriptions.clear()

    def _dispatch(self, event: Event, watch: Watch | None) -> None:
        if event.overflow:
            receivers = [one for subscribers in self._subscriptions.values() for one in subscribers]
        elif watch is None:  # of a watch that was removed
            receivers = []
        elif event.gone:
            receivers = self._subscriptions.pop(watch.wd, [])
        else:
            receivers = self._subscriptions.get(watch.wd, [])
        for subscription in receivers:
            subscription._deliver(event)
