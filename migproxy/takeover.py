"""Taking over from a daemon that died: its connections go on, before anybody knows what they belong to now."""

from __future__ import annotations

import socket
from collections import Counter

import structlog

from migproxy.connection import Connection, EndedConnection, RelayedConnection
from migproxy.plan import Migration
from migproxy.portmap import Channel
from migproxy.proxy import Proxy, Surroundings
from migproxy.relay.client import Contents, Lease
from migproxy.survival import Fate, Inheritance, Key, LeftConnection, RelayedLeft, sort
from migproxy.traffic import Progress, Traffic

log = structlog.get_logger(__name__)

_LABELS = {channel.label: channel for channel in Channel}


class AdoptedProxy(Proxy):
    """What is left of one side of a migration, until there is a plan for it: its connections go on, none is accepted.

    Args:
        key: The migration's fingerprint, and the role.
        inheritance: What is left; owned from now on.
        around: See Proxy.
    """

    retriable = ()

    def __init__(self, key: Key, inheritance: Inheritance, around: Surroundings) -> None:
        fingerprint, self.role = key
        known = inheritance.state
        migration = Migration("", "unknown", "", fingerprint)
        if known:
            migration = Migration(known.namespace, known.name, known.vmi_uid, known.migration_uid)
        super().__init__(migration, around)
        self.inherited = inheritance.listeners
        if known:
            traffic = {_LABELS[label]: Traffic.restore(one) for label, one in known.channels.items()}
            paths = Counter({(path, reason): count for path, reason, count in known.paths})
            self.resume(
                Progress(
                    began=known.began,
                    opened=known.opened,
                    closed=known.closed,
                    traffic=traffic,
                    paths=paths,
                    limited=known.limited,
                )
            )
        for relayed in inheritance.relayed:
            self._go_on(relayed)
        for connection in inheritance.connections:
            self._find_fate(connection)
        if known:
            self.note()
        self.sample()

    def _find_fate(self, left: LeftConnection) -> None:
        channel = left.name.channel
        self._open(channel)
        fate = left.fate(encrypts=self.around.security.encrypts, announced=self.around.announces)
        if fate is Fate.SET_UP:
            self.begun.append(left)
        elif fate is Fate.ABANDON:
            self.abandon(left)
        elif connection := self.revive(left):
            self._follow(connection, left.lease, channel)

    def _go_on(self, relayed: RelayedLeft) -> None:
        """Goes on with a connection that the relay moves, or counts one that it has moved to its end."""
        self._open(relayed.name.channel)
        left = relayed.left
        connection = EndedConnection(left) if left.end else RelayedConnection.adopt(relayed.lease, left)
        self._follow(connection, relayed.lease, relayed.name.channel)

    def _follow(self, connection: Connection, lease: Lease, channel: Channel) -> None:
        self._begin(connection, channel)  # now: nobody is to see counters without it
        self.follow(self._relay_on(connection, lease, channel), lease)

    async def _relay_on(self, connection: Connection, lease: Lease, channel: Channel) -> None:
        logger = self.log.bind(channel=channel.label)
        logger.info("connection goes on", sent=connection.sent, received=connection.received)
        self.around.measures.resumed.labels(self.role).inc()
        with self.share.take(channel):  # whatever is allowed now: what the earlier daemon had goes on
            await self._relay(connection, lease, channel, logger)

    async def _dial(self, channel: Channel, lease: Lease) -> socket.socket:
        raise NotImplementedError("what is only being set up waits for the proxy that has a plan")

    def peer(self, channel: Channel) -> str:
        return "unknown until the inventory tells"

    def listening(self, channel: Channel) -> str | None:
        """Where a channel's connections are accepted; they wait in its queue for now."""
        return None


def take_over(contents: Contents, around: Surroundings) -> dict[Key, AdoptedProxy]:
    """Takes over what an earlier daemon left, and goes on with it at once.

    Args:
        contents: What the relay has; owned from now on.
        around: See Proxy.

    Returns:
        By migration and role.
    """
    found = sort(contents, around.relay)
    if found:
        log.info(
            "took over from an earlier daemon",
            migrations=len(found),
            listeners=sum(len(one.listeners) for one in found.values()),
            connections=sum(len(one.connections) + len(one.relayed) for one in found.values()),
        )
    return {key: AdoptedProxy(key, inheritance, around) for key, inheritance in found.items()}
