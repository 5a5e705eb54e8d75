"""Taking turns: whoever asks for much waits for the others, and nobody waits for all that one has asked for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Rounds(Generic[T]):
    """A queue in which everybody has one turn in each round. Pure.

    Whose an item is may have several parts: the first ones take turns, and those with the same first one share theirs
    in the same way by the next.
    """

    def __init__(self) -> None:
        self._parts: dict[Hashable, Rounds[T]] = {}
        self._items: deque[T] = deque()

    def __bool__(self) -> bool:
        return bool(self._parts or self._items)

    def put(self, item: T, *whose: Hashable) -> None:
        """Adds an item behind those of the same."""
        if whose:
            self._parts.setdefault(whose[0], Rounds()).put(item, *whose[1:])
        else:
            self._items.append(item)

    def pop(self) -> T:
        """Takes the next item.

        Raises:
            IndexError: There is none.
        """
        if self._items or not self._parts:
            return self._items.popleft()
        first = next(iter(self._parts))
        part = self._parts.pop(first)
        item = part.pop()
        if part:
            self._parts[first] = part  # behind the others
        return item


class Permits:
    """Lets a bounded number do something at a time; those who wait take turns.

    Args:
        most: The bound.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: Rounds[asyncio.Future[None]] = Rounds()

    @asynccontextmanager
    async def permit(self, *whose: Hashable) -> AsyncIterator[None]:
        """Has a permit within the context.

        Args:
            whose: See Rounds.
        """
        if self._free:
            self._free -= 1
        else:
            await self._wait(*whose)
        try:
            yield
        finally:
            self._give()

    async def _wait(self, *whose: Hashable) -> None:
        granted = asyncio.get_running_loop().create_future()
        self._waiting.put(granted, *whose)
        try:
            await granted
        except asyncio.CancelledError:
            if not granted.cancelled():  # it was granted in this instant
                self._give()
            raise

    def _give(self) -> None:
        while self._waiting:
            granted = self._waiting.pop()
            if not granted.done():  # else nobody waits for it any more
                granted.set_result(None)
                return
        self._free += 1
