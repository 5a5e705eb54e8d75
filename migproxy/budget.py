"""The connections of a node, and each migration's share of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from migproxy.capacity import Capacity
from migproxy.portmap import Channel

RESERVE: Final = 16
"""Connections that each migration gets, whatever the others have: one and eight of QEMU's (KubeVirt's multifd), a few
of libvirt's, and those of its disks."""


@dataclass(frozen=True, slots=True)
class Full:
    """Why a channel takes no further connection now.

    Attributes:
        limit: "channel" or "node".
        event, why, remedy: For people.
    """

    limit: str
    event: str
    why: str
    remedy: str


def admits(room: int, mine: int, others: Iterable[int]) -> bool:
    """Whether a migration may have one more connection.

    The first RESERVE are its own in any case: a migration that has some of its connections, and waits for the others,
    would hold what another one waits for. Beyond them a migration may take as much as it leaves free: a single one gets
    half, two a third each, and the next one still finds as much (dynamic thresholds, Choudhury and Hahne 1998).

    Args:
        room: Connections that the node can have.
        mine: What it has.
        others: What each of the others has that have any.
    """
    if mine < RESERVE:
        return True
    free = room - mine - sum(max(one, RESERVE) for one in others)
    return mine + 1 - RESERVE < free


class Budget:
    """The connections of a node.

    Args:
        capacity: How many there can be, as far as is known now.
    """

    def __init__(self, capacity: Callable[[], Capacity]) -> None:
        self._capacity = capacity
        self._shares: set[Share] = set()  # those with connections
        self._changed = asyncio.Event()

    def report(self) -> dict[str, object]:
        """What `migproxy status` shows of it, as plain values."""
        room = self._capacity()
        return {"connections": self.used, "capacity": room.connections, "limit": room.limit, "remedy": room.remedy}

    def share(self) -> Share:
        """Makes a migration's share, with nothing in it yet."""
        return Share(self)

    @property
    def used(self) -> int:
        """Connections that there are, and those that are being dialled."""
        return sum(share.used for share in self._shares)

    def full(self, share: Share) -> Full | None:
        """Why a migration takes no further connection; None where it may."""
        room = self._capacity()
        if admits(room.connections, share.used, (other.used for other in self._shares if other is not share)):
            return None
        why = f"{room.limit} allow {room.connections} connections, {self.used} are open"
        event = "connections wait: the node is full"
        return Full("node", event, f"{why}, {share.used} of them this migration's", room.remedy)

    def note(self, share: Share) -> None:
        """Takes notice of what a share has now."""
        (self._shares.add if share.used else self._shares.discard)(share)
        self.look_again()

    def look_again(self) -> None:
        """Has everybody who waits look again: a limit may have changed, of which nobody tells."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Returns when there may be room."""
        await self._changed.wait()


class Share:
    """What one migration has of a node's budget.

    Attributes:
        begun: Connections that were accepted, and are being set up: by channel.
    """

    def __init__(self, budget: Budget) -> None:
        self.begun: Counter[Channel] = Counter()
        self._budget = budget
        self._held: Counter[Channel] = Counter()

    @property
    def used(self) -> int:
        """Connections of all channels."""
        return self._held.total()

    def full(self, channel: Channel, most: int) -> Full | None:
        """Why a channel takes no further connection; None where it may.

        Args:
            most: Connections that a channel may have.
        """
        if self._held[channel] >= most:
            remedy = "end the launcher's surplus connections, or raise --max-connections"
            event = "connections wait: the channel is full"
            return Full("channel", event, f"{most} connections are open (--max-connections)", remedy)
        return self._budget.full(self)

    async def change(self) -> None:
        """Returns when there may be room."""
        await self._budget.change()

    @contextmanager
    def take(self, channel: Channel) -> Iterator[None]:
        """Has one more connection within the context."""
        with self._counted(self._held, channel):
            yield

    @contextmanager
    def begin(self, channel: Channel) -> Iterator[None]:
        """Sets one up within the context."""
        with self._counted(self.begun, channel):
            yield

    @contextmanager
    def _counted(self, counter: Counter[Channel], channel: Channel) -> Iterator[None]:
        counter[channel] += 1
        self._budget.note(self)
        try:
            yield
        finally:
            counter[channel] -= 1
            self._budget.note(self)
