"""Taking over from a daemon that died: its connections go on at once, before anybody knows what they belong to now."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress

import structlog

from migproxy.fdstore import Lease, Store
from migproxy.liveness import Liveness
from migproxy.plan import Migration, Role
from migproxy.portmap import Channel
from migproxy.proxy import Proxy, Surroundings
from migproxy.relay import Progress, Relay, Traffic
from migproxy.state import ProxyState, RelayState, State, StateError, UnknownVersion, boot_id, load, save
from migproxy.survival import Connection, Estate, Fate, Key, close, sort

log = structlog.get_logger(__name__)

LOST = "lost"
_PAUSE = 0.05  # seconds between two writes of the state file at least: a burst of connections is one
_REFRESH = 1.0  # seconds between two writes at most
_LABELS = {channel.label: channel for channel in Channel}


class Survivor(Proxy):
    """What is left of one side of a migration, until there is a plan for it: it relays, and accepts nothing.

    Args:
        key: The migration's fingerprint, and the role.
        estate: What is left; owned from now on.
        around: See Proxy.
    """

    retriable = ()

    def __init__(self, key: Key, estate: Estate, around: Surroundings) -> None:
        fingerprint, self.role = key
        super().__init__(_migration(estate.state, fingerprint), around)
        self.inherited = estate.listeners
        state = estate.state
        if state:
            traffic = {_LABELS[label]: Traffic.restore(one) for label, one in state.channels.items()}
            self.resume(Progress(began=state.began, traffic=traffic))
        relays = dict(state.relays) if state else {}
        for connection in estate.connections:
            self._resume(connection, relays.pop(str(connection.name), None))
        for name, one in relays.items():
            self._lose(Lease(name), _LABELS[one.channel], one)
        self.sample()

    def _resume(self, connection: Connection, before: RelayState | None) -> None:
        channel = connection.name.channel
        self._open(channel)
        fate = connection.fate(before, encrypts=self.around.security.encrypts)
        if fate is Fate.RELAY:
            assert connection.unix
            assert connection.tcp
            try:
                relay = Relay.resume(connection.unix, connection.tcp, connection.lease, connection.pipes)
            except OSError as error:
                self.log.error("connection cannot be resumed", channel=channel.label, error=error.strerror)
                fate = Fate.LOSE
            else:
                relay.count_on(before, dialled=self.role is Role.SOURCE)
                self.follow(self._go_on(relay, channel), connection.unix)
        if fate is Fate.SET_UP:
            self.begun.append(connection)
        elif fate is Fate.ABANDON:
            self.abandon(connection)
        elif fate is Fate.LOSE:
            connection.close()
            self._lose(connection.lease, channel, before or RelayState(channel=channel.label))

    async def _go_on(self, relay: Relay, channel: Channel) -> None:
        logger = self.log.bind(channel=channel.label)
        logger.info("connection resumed", sent=relay.sent, received=relay.received)
        self.around.measures.resumed.labels(self.role).inc()
        slots = self._open(channel)
        async with AsyncExitStack() as slot:
            if not slots.locked():  # fewer are allowed now than the earlier daemon had: those go on
                await slot.enter_async_context(slots)
            await self._relay(relay, channel, logger)

    def _lose(self, lease: Lease, channel: Channel, before: RelayState) -> None:
        """Counts a connection that did not survive."""
        self._open(channel)
        traffic = self.traffic[channel]
        traffic.lose(before)
        traffic.failures[LOST] += 1
        self.around.measures.failures.labels(self.role, LOST).inc()
        why = (
            "its descriptors were not with the holder"
            if before.resumable
            else "user-space TLS cannot be resumed: its keys died with the process"
        )
        self.progress.last_error = f"channel {channel.label}: lost with the daemon: {why}"
        self.log.error(
            "connection lost",
            channel=channel.label,
            connection=lease.name,
            sent=before.sent,
            received=before.received,
            error=why,
            remedy="the migration has to be started again; with kernel TLS it would have gone on",
        )

    async def _dial(self, channel: Channel, lease: Lease) -> socket.socket:
        raise NotImplementedError("what is only being set up waits for the proxy that has a plan")

    def peer(self, channel: Channel) -> str:
        return "unknown until the inventory tells"

    def listening(self, channel: Channel) -> str | None:
        """Where a channel's connections are accepted; they wait in its queue for now."""
        return None


def _migration(state: ProxyState | None, fingerprint: str) -> Migration:
    if state is None:
        return Migration("", "unknown", "", fingerprint)
    return Migration(state.namespace, state.name, state.vmi_uid, state.migration_uid)


async def take_over(store: Store, path: str, around: Surroundings) -> dict[Key, Survivor]:
    """Takes over what an earlier daemon left, and goes on with it at once.

    Args:
        path: The state file.
        around: See Proxy.

    Returns:
        By migration and role.
    """
    stored = await store.take_back()
    state: State | None = None
    try:
        try:
            state = load(path)
        except UnknownVersion:
            raise
        except StateError as error:
            log.error("the state file is of no use: what it counted is lost", error=str(error))
        estates = sort(stored, state, store)
    except UnknownVersion as error:
        log.error(
            "another version of migproxy left connections: they are ended",
            error=str(error),
            names=len(stored),
            remedy="drain a node (SIGTERM) before it is given a version that does not know its state",
        )
        for name, fds in stored.items():
            store.renew(name, fds).release(keep_record=False)
            close(fds)
        return {}
    survivors = {key: Survivor(key, estate, around) for key, estate in estates.items()}
    if survivors:
        log.info(
            "took over from an earlier daemon",
            migrations=len(survivors),
            listeners=sum(len(estate.listeners) for estate in estates.values()),
            connections=sum(len(estate.connections) for estate in estates.values()),
        )
    return survivors


class StateKeeper:
    """Keeps the state file true; lets go of what is over once the file says so.

    Args:
        path: The state file.
        store: Whose names it speaks of.
        proxies: Tells what is to be written.
        liveness: Is told of each write.
    """

    def __init__(
        self, path: str, store: Store, proxies: Callable[[], Iterable[ProxyState]], liveness: Liveness
    ) -> None:
        self._path = path
        self._store = store
        self._proxies = proxies
        self._liveness = liveness
        self._boot = boot_id()
        self._problem: str | None = None

    async def run(self) -> None:
        """Writes whenever something changed, and each second, until cancelled."""
        while True:
            self._store.changed.clear()
            await self.write()
            await asyncio.sleep(_PAUSE)
            with suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH):
                    await self._store.changed.wait()

    async def write(self) -> None:
        """Writes once; what cannot be written is reported once."""
        over = self._store.released
        state = State(boot=self._boot, proxies=tuple(self._proxies()), ended=frozenset(over))
        try:
            with self._liveness.writing(self._path):
                await self._save(state)
        except OSError as error:
            if self._problem != str(error):
                log.error("the state file cannot be written", path=self._path, error=error.strerror)
            self._problem = str(error)
        else:
            self._problem = None
        self._store.remove_released(over)

    async def _save(self, state: State) -> None:
        """Saves to the end even when cancelled: two at once would write into the same temporary file."""
        saving = asyncio.ensure_future(asyncio.to_thread(save, self._path, state))
        try:
            await asyncio.shield(saving)
        except asyncio.CancelledError:
            await asyncio.wait([saving])
            raise
