"""What the two proxies of a migration share: accepting, dialling the other leg, relaying, counting, ending."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import structlog

from migproxy import tcpinfo
from migproxy.bottleneck import Limits, add, together
from migproxy.budget import Budget, Full
from migproxy.connection import Connection, RelayedConnection
from migproxy.cpu import BusiestThread
from migproxy.fds import MORE_FILES, OUT_OF_RESOURCES, is_connected, reset
from migproxy.launcher import Launchers, SocketNode, new_unix
from migproxy.launcherthread import LauncherThread
from migproxy.limit import Limit
from migproxy.measure import Measures
from migproxy.netif import MigrationAddress
from migproxy.pauses import doubling
from migproxy.plan import Migration, Role
from migproxy.portmap import Channel
from migproxy.relay.client import Lease, RelayClient
from migproxy.relay.protocol import Way
from migproxy.sockets import TCPOptions, accept, ready, remote_address, widen_unix
from migproxy.state import ProxyState
from migproxy.survival import (
    Fate,
    LeftConnection,
    LeftListener,
    connection_name,
    fingerprint,
    listener_name,
    state_name,
)
from migproxy.tls import Meeting, Security, Unfinished
from migproxy.tlserrors import Reason, TLSError
from migproxy.traffic import Progress, Traffic
from migproxy.transport import PLAINTEXT, Transport

_ACCEPT_PAUSE = 0.2  # seconds, while the process is out of descriptors or memory
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.25  # seconds between two attempts to dial
_HISTORY = 60  # seconds of rates that are kept for people to look at
_LIMITED = 10  # seconds of what limits a migration now
_TURN_SECONDS = 2.0  # a handshake takes milliseconds
_AT_ONCE = 4  # connections of a source's channel that are set up side by side; the others' have their turn meanwhile
_ROUTINE_LINES = 32  # of each kind in ten seconds: several times what a migration has
_NOT_THIS_TIME = {errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO, errno.EPERM}  # whoever asked has gone, or may not
_CLOSED_AT_ONCE = (
    "the target closed the connection before the TLS handshake: its launcher's socket for this channel is missing or "
    "refuses (KubeVirt's target closes then), or its daemon has ended"
)

_BROKEN = {errno.ECONNRESET: "reset", errno.ETIMEDOUT: "timeout", errno.EPIPE: "closed", errno.EOWNERDEAD: "lost"}
_BROKEN_TLS = {Reason.TRUNCATED: "reset", Reason.BAD_RECORD: "other", Reason.KEY_UPDATE: "other"}


class ProxyError(Exception):
    """A proxy cannot do what its plan asks for (yet); the message says why, and what to do."""


class DialError(Exception):
    """The other leg of a connection cannot be had."""


@dataclass(slots=True)
class Surroundings:
    """What the proxies of a node use and do not own; a reload changes it, and they look at it each time.

    Attributes:
        launchers: Finds the launchers' folders.
        tcp: Options of the connections between the nodes.
        security: Protects them.
        migration_address: This node's migration addresses of an IP version (4 or 6); raises ProxyError without one.
        peer_timeout: Seconds without an answer, although asked, after which the other node counts as gone.
        dial_timeout: Seconds that the other leg may take to appear, retried meanwhile.
        max_connections: Open connections per channel of a migration; more wait in the listener's queue.
        max_handshakes: Unfinished TLS handshakes per channel of a migration.
        relay: Moves the connections, and keeps what is to outlive this process.
        budget: The connections of the node, of which each migration has a share.
        announces: Targets are announced, beside virt-handler, instead of published.
        measures: Where latencies and failures of the node are recorded.
        busiest: How busy the relay's busiest thread is.
    """

    launchers: Launchers
    tcp: TCPOptions
    security: Security
    migration_address: Callable[[int], MigrationAddress]
    peer_timeout: float
    dial_timeout: float
    max_connections: int
    max_handshakes: int
    relay: RelayClient
    budget: Budget
    announces: bool = False
    measures: Measures = field(default_factory=Measures)
    busiest: BusiestThread = field(default_factory=BusiestThread)


class _Turns:
    """Lets a node's connections reach the launcher in the order in which they came.

    QEMU before 8.0 takes the first of a migration's parallel connections for the main one (multifd), whatever it
    says, and handshakes that run side by side do not end in the order in which they began.
    """

    def __init__(self) -> None:
        self._last: dict[str, asyncio.Event] = {}

    @contextmanager
    def take(self, remote: str) -> Iterator[Callable[[], Awaitable[None]]]:
        """Takes the next turn of a node's address, which is over with the context.

        Returns:
            What waits for the turn before, within bounds: a connection that hangs must not keep others out.
        """
        before, mine = self._last.get(remote), asyncio.Event()
        self._last[remote] = mine

        async def wait() -> None:
            if before is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_TURN_SECONDS):
                        await before.wait()

        try:
            yield wait
        finally:
            mine.set()
            if self._last.get(remote) is mine:
                del self._last[remote]


class Proxy(ABC):
    """One side of one migration: owns its accepting tasks and its connections.

    Attributes:
        role: Which side.
        migration: Which migration.
        progress: What it has done.
        inherited: Listeners that an earlier daemon left and that are not taken over yet.
        begun: Connections that were being set up when it died.
        thread: Looks into the launcher's folders.
        share: What it has of the node's connections.
        waits: The channels whose further connections wait in the listener's queue, and why.
    """

    role: Role

    def __init__(self, migration: Migration, around: Surroundings) -> None:
        self.migration = migration
        self.progress = Progress()
        self.log = structlog.get_logger(__name__).bind(
            namespace=migration.namespace,
            name=migration.name,
            migration_uid=migration.migration_uid,
            role=str(self.role),
        )
        self.around = around
        self.thread = LauncherThread(f"launcher of {migration.namespace}/{migration.name}")
        self._connections: dict[asyncio.Task[None], tuple[socket.socket, ...]] = {}
        self.share = around.budget.share()
        self.waits: dict[Channel, Full] = {}
        self._migproxies: set[str] = set()  # targets that have shown that they are ours
        self._unfinished: dict[Channel, Unfinished] = {}
        self._turns: dict[Channel, _Turns] = {}
        self.inherited: list[LeftListener] = []
        self.begun: list[LeftConnection] = []
        self._storing = asyncio.Lock()
        self._failed_lines = Limit(self._log_more_failed)
        self._routine_lines = Limit(self._log_more, _ROUTINE_LINES)
        self._samples = deque([(time.monotonic(), 0, 0)], maxlen=_HISTORY + 1)
        self._limited: deque[Limits] = deque(maxlen=_HISTORY)

    @property
    def traffic(self) -> dict[Channel, Traffic]:
        """What each channel has carried."""
        return self.progress.traffic

    @abstractmethod
    async def _dial(self, channel: Channel, lease: Lease) -> socket.socket:
        """Tries once to connect the other leg, and stores it under the connection's lease.

        Raises:
            DialError: It cannot be had, and trying again will not help.
            OSError, ProxyError, LauncherError: It cannot be had yet.
        """

    @property
    @abstractmethod
    def retriable(self) -> tuple[type[Exception], ...]:
        """The errors of `_dial` that another try may mend."""

    def meeting(self, channel: Channel) -> Meeting:
        """What this end and the other node's know of each other."""
        return Meeting()

    @abstractmethod
    def peer(self, channel: Channel) -> str:
        """Where the other leg of a channel is, for people."""

    def no_answer(self, channel: Channel) -> str:
        """What to say where nothing was heard of the other leg of a channel in time."""
        return f"{self.peer(channel)}: no answer"

    @property
    def open_connections(self) -> int:
        """Connections that are relayed or being dialled now; who has not authenticated does not count."""
        return len(self._connections) - sum(map(len, self._unfinished.values()))

    @property
    def rate(self) -> tuple[float, float]:
        """Bytes per second sent and received, over the last one to two seconds."""
        then, sent, received = self._samples[-2] if len(self._samples) > 1 else self._samples[0]
        seconds = max(time.monotonic() - then, 1e-3)
        now_sent, now_received = self._moved()
        return (now_sent - sent) / seconds, (now_received - received) / seconds

    def glance(self) -> None:
        """Looks at what changes within a second; to be called ten times in each, while connections are open."""
        for traffic in self.traffic.values():
            for connection in traffic.open:
                connection.glance()

    def sample(self) -> None:
        """Remembers the counters for `rate` and `history`, and what limited it; to be called each second."""
        self._samples.append((time.monotonic(), *self._moved()))
        sends, cpu = self.role is Role.SOURCE, self.around.busiest.seconds
        each = [one.limited(sends=sends, cpu=cpu) for traffic in self.traffic.values() for one in traffic.open]
        known = [one for one in each if one]
        latest = together(known) if known else {}
        self.progress.limited = add(self.progress.limited, latest)
        self._limited.append(latest)

    @property
    def history(self) -> list[int]:
        """Bytes per second, both ways together, between the samples of the last minute, the latest last."""
        return [
            round((sent + received - sent_before - received_before) / max(at - before, 1e-3))
            for (before, sent_before, received_before), (at, sent, received) in pairwise(self._samples)
        ]

    @property
    def limited(self) -> Limits:
        """What limited it in the last ten seconds; nothing where no connection is open."""
        return add(*islice(reversed(self._limited), _LIMITED))

    @property
    def limited_by(self) -> list[str]:
        """What limited it most, in each second of `history`; "" where no connection was open."""
        return [str(max(one, key=one.__getitem__)) if one else "" for one in self._limited]

    def resume(self, progress: Progress) -> None:
        """Goes on counting where an earlier proxy of the same migration and role left off.

        Args:
            progress: What it had done.
        """
        self.progress = progress
        self._samples.clear()
        self.sample()
        self._limited.clear()

    def succeed(self, other: Proxy) -> None:
        """Takes over all that another proxy of the same migration and role has: connections, counters, listeners."""
        self._connections, self.share = other._connections, other.share
        self._unfinished, self._turns = other._unfinished, other._turns
        self.inherited, begun = other.inherited, other.begun
        self.resume(other.progress)
        for connection in begun:
            self._set_up(connection)

    def _set_up(self, left: LeftConnection) -> None:
        """Goes on with a connection that was being set up when an earlier daemon died."""
        for leg in filter(None, (left.accepted, left.dialled)):
            leg.setblocking(False)
        self.follow(self._go_on_setting_up(left), left.lease, left.accepted)

    async def _go_on_setting_up(self, left: LeftConnection) -> None:
        security = self.around.security
        try:
            await self._settled()
            fate = left.fate(encrypts=security.encrypts, announced=self.around.announces)
        except BaseException:
            left.close()
            raise
        channel = left.name.channel
        if fate is Fate.SET_UP:
            await self._connection(left.accepted, channel, left.lease, left.dialled)
        elif fate is Fate.ABANDON:
            self.abandon(left)
        elif connection := self.revive(left):
            self._begin(connection, channel)
            with self.share.take(channel):
                await self._relay(connection, left.lease, channel, self.log.bind(channel=channel.label))

    def revive(self, left: LeftConnection) -> RelayedConnection | None:
        """Makes a connection of one that was ready to be relayed; None where no descriptors are left for it."""
        assert left.dialled
        way = Way.KTLS if self.around.security.encrypts else Way.SPLICED
        try:
            return RelayedConnection(left.lease, left.dialled, Transport(left.accepted, way=way))
        except OSError as error:
            self.log.error("connection cannot be relayed", channel=left.name.channel.label, error=error.strerror)
            left.close()
            return None

    def abandon(self, connection: LeftConnection) -> None:
        """Ends a connection whose handshake died with an earlier daemon: the other node sees a reset."""
        channel = connection.name.channel.label
        self.log.info("connection ended in the middle of its TLS handshake", channel=channel)
        connection.close()

    def inherit(self, channel: Channel) -> list[LeftListener]:
        """Lets go of the listeners of a channel that an earlier daemon left; the caller owns them."""
        mine = [one for one in self.inherited if one.name.channel is channel]
        self.inherited = [one for one in self.inherited if one not in mine]
        return mine

    def inherit_only(self, channels: Container[Channel]) -> None:
        """Closes what an earlier daemon left of other channels: nobody accepts there any more."""
        for left in [one for one in self.inherited if one.name.channel not in channels]:
            self.inherited.remove(left)
            left.close()

    def lease_listener(self, channel: Channel, listener: socket.socket, identity: tuple[int, int]) -> Lease:
        """Has the relay keep a listener; what asks to be connected while no daemon runs waits in its queue.

        Args:
            identity: See `survival.listener_name`.
        """
        name = listener_name(self.role, channel, self.migration, identity)
        return self.around.relay.lease(name, listener.fileno())

    def _moved(self) -> tuple[int, int]:
        traffic = self.traffic.values()
        return sum(one.sent for one in traffic), sum(one.received for one in traffic)

    def state(self) -> ProxyState:
        """What the next daemon is to know, should this one die."""
        return ProxyState(
            namespace=self.migration.namespace,
            name=self.migration.name,
            vmi_uid=self.migration.vmi_uid,
            migration_uid=self.migration.migration_uid,
            role=self.role,
            began=self.progress.began,
            opened=self.progress.opened,
            closed=self.progress.closed,
            channels={channel.label: one.state() for channel, one in self.traffic.items()},
            paths=[(*path, count) for path, count in self.progress.paths.items()],
            limited={by: round(seconds, 3) for by, seconds in self.progress.limited.items()},
        )

    def note(self, *over: Lease, at_once: bool = False) -> None:
        """Has the relay keep what the next daemon is to know, if it has changed.

        Args:
            over: What has ended, and is counted; forgotten in the same instant, so that nothing is counted twice.
            at_once: The relay does not know of it otherwise.
        """
        name = state_name(self.role, self.migration)
        self.around.relay.note(name, lambda: self.state().model_dump_json(), *over, at_once=at_once)

    async def accept(self, listener: socket.socket, channel: Channel) -> None:
        """Accepts connections and relays each in a task of its own; runs until cancelled.

        Args:
            listener: A non-blocking listening socket; stays the caller's.
            channel: The channel that it serves.
        """
        unfinished = self._open(channel)
        await self._settled()  # until then whoever connects is safest in the listener's queue
        while True:
            try:
                await ready(listener.fileno(), writing=False)
                if self.meeting(channel).greet is None:  # else it is refused, and goes another way at once
                    await self._room(channel)
                await unfinished.room()
                # Else it would queue behind others, in this process alone; in the listener's queue it is safe.
                await self.around.relay.handed_over()
                lease = self.around.relay.lease(connection_name(self.role, channel, self.migration))
                fd = accept(listener)
            except OSError as error:
                if error.errno in _NOT_THIS_TIME:
                    continue
                remedy = (
                    MORE_FILES
                    if error.errno in OUT_OF_RESOURCES
                    else "restart this daemon: whoever shares this listener has shut it down"
                )
                self.log.error("cannot accept connections", channel=channel.label, error=error.strerror, remedy=remedy)
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            if not self._accepts_strangers:
                lease.keep(fd)  # at once: a connection that only this process has dies with it
            accepted = socket.socket(fileno=fd)
            self.follow(self._connection(accepted, channel, lease), lease, accepted)

    @property
    def _accepts_strangers(self) -> bool:
        """Whether what is accepted is a stranger's, who has yet to say who it is: nobody could go on with that."""
        return self.role is Role.TARGET and self.around.security.encrypts is True

    async def _room(self, channel: Channel) -> None:
        """Waits until a channel may have one more connection, and says so where it has to."""
        share = self.share
        try:
            while full := share.full(channel, self.around.max_connections):
                if channel not in self.waits and self._routine_lines.admits(("waited", channel)):
                    self.log.warning(full.event, channel=channel.label, why=full.why, remedy=full.remedy)
                self.waits[channel] = full
                await share.change()
        finally:
            self.waits.pop(channel, None)
        while self.role is Role.SOURCE and share.begun[channel] >= _AT_ONCE:
            await share.change()

    async def _settled(self) -> None:
        """Returns once it is known how connections are to be protected, or a connection has another way."""
        if self.role is Role.TARGET or not self.around.announces:
            await self.around.security.settled()

    def _open(self, channel: Channel) -> Unfinished:
        """Makes what the connections of a channel share; returns their unfinished handshakes."""
        self._turns.setdefault(channel, _Turns())
        self.traffic.setdefault(channel, Traffic())
        return self._unfinished.setdefault(channel, Unfinished(self.around.max_handshakes))

    def follow(self, connection: Coroutine[Any, Any, None], lease: Lease, *owned: socket.socket) -> None:
        """Runs what serves a connection in a task of its own, which ends with the proxy; closes what it owns then."""
        connections, task = self._connections, asyncio.create_task(connection)
        connections[task] = owned

        def close(done: asyncio.Task[None]) -> None:
            lease.drop()  # of a task that was cancelled before its first step
            for sock in connections.pop(done):
                sock.close()

        task.add_done_callback(close)

    async def _connection(
        self, accepted: socket.socket, channel: Channel, lease: Lease, dialled: socket.socket | None = None
    ) -> None:
        remote = remote_address(accepted)
        log = self.log.bind(channel=channel.label, remote=remote)
        self._open(channel)
        with ExitStack() as taken:
            legs = [accepted] + ([dialled] if dialled else [])
            try:
                with self.share.begin(channel):
                    if self.role is Role.SOURCE:
                        taken.enter_context(self.share.take(channel))
                        await self._drop_unusable(legs, lease)
                        unix, transport = accepted, await self.to_network(channel, legs, lease)
                    else:
                        unix, transport = await self._to_launcher(remote, channel, legs, lease, taken)
                widen_unix(unix)
                connection = RelayedConnection(lease, unix, transport)
            except (DialError, ProxyError, OSError) as error:
                told = self._fail(channel, error, "dial")
                if self._failed_lines.admits((channel, told.get("reason", ""))):
                    log.error("connection failed", peer=self.peer(channel), **told)
                self.note(lease, at_once=bool(lease.fds) or self.role is Role.SOURCE)  # a flood's can wait a moment
                for leg in legs:
                    reset(leg)
                return
            except BaseException:
                lease.drop()
                for leg in legs:
                    reset(leg)
                raise
            log = log.bind(peer=self.peer(channel), security=transport.label)
            if self._routine_lines.admits(("opened", channel)):
                log.info("connection opened")
            self._begin(connection, channel)
            await self._relay(connection, lease, channel, log)

    @asynccontextmanager
    async def stored(self, leg: socket.socket, lease: Lease) -> AsyncIterator[socket.socket]:
        """Hands a leg over before it is connected within the context; lets go of it and closes it if that fails.

        A connection that dies with this process after the other side has taken it looks there like one that came and
        went, beside the one that the next daemon makes: to QEMU, one of the migration's too many.
        """
        kept = lease.fds
        if kept:
            lease.keep(*kept, leg.fileno())
        try:
            async with self._storing:  # which is fair: connections are made in the order in which they were asked for
                await self.around.relay.handed_over()
            yield leg
        except BaseException:
            if kept:
                lease.keep(*kept)
            leg.close()
            raise

    async def connect_launcher(self, find: Callable[[], SocketNode], lease: Lease) -> socket.socket:
        """Connects to a socket of the launcher's, which is stored under the connection's lease before.

        Args:
            find: Finds the socket's file.

        Raises:
            LauncherError: It is not there, nobody listens, or the folder it is in does not answer.
        """
        node = await self.thread.run(find, SocketNode.close)

        def connect(sock: socket.socket) -> None:
            with node:
                node.connect(sock)

        try:
            async with self.stored(new_unix(), lease) as sock:
                await self.thread.run(partial(connect, sock))
                return sock
        finally:
            if node.is_open:  # it was not come to
                self.thread.later(node.close)

    async def to_network(self, channel: Channel, legs: list[socket.socket], lease: Lease) -> Transport:
        """Dials the other node, and protects the connection; `legs` has what is to be closed if anything fails."""
        deadline, pauses = self._deadline(), doubling(_FIRST_PAUSE, _LONGEST_PAUSE)
        is_committed = False

        def commit() -> None:
            nonlocal is_committed
            is_committed = True
            # From then on the other node may reach its launcher: the next daemon is not to dial a second time.
            lease.drop()

        while True:
            if len(legs) == 1:
                legs.append(await self._reach(channel, lease, deadline))
            dialled = legs[-1]
            target = remote_address(dialled)
            try:
                transport = await self._secure(dialled, self._meet(channel, "launcher"), server=False, commit=commit)
            except TLSError as error:
                if not is_committed and self._may_dial_again(error, target, deadline):
                    self._let_go(legs.pop(), lease)
                    await asyncio.sleep(next(pauses))
                    continue
                if error.reason is Reason.CLOSED and not _has_answered(dialled):
                    raise TLSError(Reason.CLOSED, f"{self.peer(channel)}: {_CLOSED_AT_ONCE}") from error
                raise
            if transport.is_migproxy:
                self._migproxies.add(target)
            legs[-1] = transport.tcp
            return transport

    def _may_dial_again(self, error: TLSError, target: str, deadline: float) -> bool:
        """Whether a handshake that was cut before this end's last words is tried once more.

        KubeVirt's target dials its launcher for each connection that it accepts, and QEMU counts them. Ours dials it
        for a handshake that is finished. A target is known to be ours by its first handshake.
        """
        is_cut = error.reason is Reason.CLOSED and target in self._migproxies
        return is_cut and asyncio.get_running_loop().time() < deadline

    async def _drop_unusable(self, legs: list[socket.socket], lease: Lease) -> None:
        """Lets go of the leg that an earlier daemon dialled, where this one cannot go on with it."""
        if len(legs) > 1 and not await self._is_usable(legs[-1]):
            self._let_go(legs.pop(), lease)

    @staticmethod
    def _let_go(dialled: socket.socket, lease: Lease) -> None:
        """Resets a leg that was dialled; the accepted one stays kept."""
        if lease.fds:
            lease.keep(lease.fds[0])
        reset(dialled)

    async def _is_usable(self, leg: socket.socket) -> bool:
        """Whether a leg was connected, and carries no handshake yet that only the daemon before could finish."""
        if leg.family == socket.AF_UNIX:
            return is_connected(leg)
        if self.around.security.encrypts:
            return False
        return await self._is_established(leg)

    @staticmethod
    async def _is_established(tcp: socket.socket) -> bool:
        info = tcpinfo.read(tcp)
        if info and info.state == tcpinfo.SYN_SENT:
            await ready(tcp.fileno(), writing=True)
            info = tcpinfo.read(tcp)
        return info is not None and info.state == tcpinfo.ESTABLISHED

    async def _to_launcher(
        self, remote: str, channel: Channel, legs: list[socket.socket], lease: Lease, taken: ExitStack
    ) -> tuple[socket.socket, Transport]:
        """Protects what was accepted, and then dials the launcher; see `_from_network`."""
        with self._turns[channel].take(remote) as turn:
            transport = await self._from_network(remote, channel, legs, taken)
            if not lease.fds:
                lease.keep(transport.tcp.fileno())
            await turn()
            await self._drop_unusable(legs, lease)
            if len(legs) == 1:
                legs.append(await self._reach(channel, lease, self._deadline()))
        return legs[-1], transport

    async def _from_network(
        self, remote: str, channel: Channel, legs: list[socket.socket], taken: ExitStack
    ) -> Transport:
        """Protects what was accepted: nothing is dialled for a peer that has not shown who it is.

        Args:
            taken: Is given one of the channel's connections: for a source that has another way, before it gives that
                up.
        """
        meeting, share = self._meet(channel, remote), self.share

        async def ready() -> None:
            assert meeting.greet
            await meeting.greet()
            if full := share.full(channel, self.around.max_connections):
                raise DialError(f"the {full.limit} is full: {full.why}: {full.remedy}")
            taken.enter_context(share.take(channel))

        async with self._unfinished[channel].place(remote) as place:
            met = replace(meeting, place=place, greet=ready if meeting.greet else None)
            transport = await self._secure(legs[0], met, server=True)
        if meeting.greet is None:
            await self._room(channel)
            taken.enter_context(share.take(channel))
        legs[0] = transport.tcp
        return transport

    def _meet(self, channel: Channel, remote: str) -> Meeting:
        """What a connection's meeting is, and whose turn it takes."""
        return replace(self.meeting(channel), whose=(fingerprint(self.migration), remote))

    async def _secure(
        self, tcp: socket.socket, meeting: Meeting, *, server: bool, commit: Callable[[], None] | None = None
    ) -> Transport:
        began = time.monotonic()
        transport = await self.around.security.secure(tcp, server=server, meeting=meeting, commit=commit)
        if transport.label != PLAINTEXT:
            self.around.measures.handshakes.labels(self.role).observe(time.monotonic() - began)
        return transport

    def _deadline(self) -> float:
        """Until when a connection that is accepted now may wait for its other leg, by the event loop's clock."""
        return asyncio.get_running_loop().time() + self.around.dial_timeout

    async def _reach(self, channel: Channel, lease: Lease, deadline: float) -> socket.socket:
        """Dials the other leg, and records how long that took."""
        began = time.monotonic()
        sock = await self._dial_until(channel, lease, deadline)
        self.around.measures.dials.labels(self.role, channel.label).observe(time.monotonic() - began)
        return sock

    def _fail(self, channel: Channel, error: Exception, reason: str) -> dict[str, str]:
        """Counts a failure, for that reason unless it is one of TLS; returns what a log line says of it."""
        why = getattr(error, "strerror", None) or str(error)
        self.progress.last_error = f"channel {channel.label}: {why}"
        told = {"error": why}
        if isinstance(error, TLSError):
            self.around.security.errors[error.reason] += 1
            reason, told["reason"] = _BROKEN_TLS.get(error.reason, "handshake"), str(error.reason)
        self.traffic[channel].failures[reason] += 1
        self.around.measures.failures.labels(self.role, reason).inc()
        return told

    def _log_more(self, kind: tuple[str, Channel], count: int) -> None:
        what, channel = kind
        self.log.info(f"more connections {what}", channel=channel.label, count=count)

    def _log_more_failed(self, kind: tuple[Channel, str], count: int) -> None:
        channel, reason = kind
        self.log.error("more connections failed", channel=channel.label, reason=reason or "dial", count=count)

    async def _dial_until(self, channel: Channel, lease: Lease, deadline: float) -> socket.socket:
        """Dials until it works, an error is final, or the time is up."""
        pauses = doubling(_FIRST_PAUSE, _LONGEST_PAUSE)
        last: Exception | None = None
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    try:
                        return await self._dial(channel, lease)
                    except self.retriable as error:
                        last = error
                    await asyncio.sleep(next(pauses))
        except TimeoutError:
            why = str(last) if last else self.no_answer(channel)
            raise DialError(f"{why} (tried for {self.around.dial_timeout:g} s)") from last

    def _begin(self, connection: Connection, channel: Channel) -> None:
        """Counts a connection from now on, which `_relay` is to relay."""
        self.traffic[channel].begin(connection)
        self.progress.opened = self.progress.opened or time.time()
        self.note()

    async def _relay(
        self, connection: Connection, lease: Lease, channel: Channel, log: structlog.stdlib.BoundLogger
    ) -> None:
        traffic = self.traffic[channel]
        failure: dict[str, str] = {}
        try:
            await connection.run(lambda: self.around.peer_timeout)
        except OSError as error:
            failure = self._fail(channel, error, _BROKEN.get(error.errno or 0, "other"))
        finally:
            traffic.end(connection)
            self.progress.closed = time.time()
            self.note(lease, at_once=not lease.fds)
            seconds = round(time.monotonic() - connection.opened, 3)
            counts = {"sent": connection.sent, "received": connection.received, "seconds": seconds}
            if failure:
                if self._routine_lines.admits(("broken", channel)):
                    log.warning("connection broken", **counts, **failure)
            elif self._routine_lines.admits(("closed", channel)):
                log.info("connection closed", **counts)

    async def close(self) -> None:
        """Ends every connection at once, and logs what the migration has moved."""
        for listener in self.inherited:
            listener.close()
        for connection in self.begun:
            connection.close()
        ending = list(self._connections)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._failed_lines.close()
        self._routine_lines.close()
        self.around.relay.forget_note(state_name(self.role, self.migration))
        sent, received = self._moved()
        self.log.info(
            "proxy ended",
            sent=sent,
            received=received,
            connections=sum(traffic.connections for traffic in self.traffic.values()),
            failed=sum(traffic.failed for traffic in self.traffic.values()),
            seconds=round(time.time() - self.progress.began, 3),
        )
        self.thread.close()


def _has_answered(tcp: socket.socket) -> bool:
    """Whether any data have arrived on a connection."""
    info = tcpinfo.read(tcp)
    return info is None or info.received > 1  # a FIN counts as one
