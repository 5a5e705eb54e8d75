"""What the two proxies of a migration share: accepting, dialling the other leg, relaying, counting, ending."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise

import structlog

from migproxy.launcher import Launchers
from migproxy.measure import Measures
from migproxy.plan import Migration, Role
from migproxy.portmap import Channel, IPAddress
from migproxy.relay import Relay, Traffic
from migproxy.sockets import TCPOptions, reset, widen_unix
from migproxy.splice import Transport
from migproxy.tls import Security, Unfinished
from migproxy.verify import Reason, TLSError

_ACCEPT_PAUSE = 0.2  # seconds, while the process is out of descriptors or memory
_HISTORY = 60  # seconds of rates that are kept for people to look at
_TURN_SECONDS = 2.0  # a handshake takes milliseconds
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


_BROKEN = {errno.ECONNRESET: "reset", errno.ETIMEDOUT: "timeout", errno.EPIPE: "closed"}
_BROKEN_TLS = {Reason.TRUNCATED: "reset", Reason.BAD_RECORD: "other", Reason.KEY_UPDATE: "other"}


class ProxyError(Exception):
    """A proxy cannot do what its plan asks for (yet); the message says why, and what to do."""


class DialError(Exception):
    """The other leg of a connection cannot be had."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the proxies of a node use and do not own.

    Attributes:
        launchers: Finds the launchers' folders.
        tcp: Options of the connections between the nodes.
        security: Protects them.
        local_address: This node's migration address of an IP version (4 or 6); raises ProxyError without one.
        dial_timeout: Seconds that the other leg may take to appear, retried meanwhile.
        max_connections: Open connections per channel of a migration; more wait in the listener's queue, so that
            no launcher can use up the daemon's descriptors.
        max_handshakes: Unfinished TLS handshakes per channel of a migration.
        measures: Where latencies and failures of the node are recorded.
    """

    launchers: Launchers
    tcp: TCPOptions
    security: Security
    local_address: Callable[[int], IPAddress]
    dial_timeout: float
    max_connections: int
    max_handshakes: int
    measures: Measures = field(default_factory=Measures)


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
                    await asyncio.wait_for(before.wait(), _TURN_SECONDS)

        try:
            yield wait
        finally:
            mine.set()
            if self._last.get(remote) is mine:
                del self._last[remote]


class Proxy(ABC):
    """One side of one migration: owns its accepting tasks and its relays.

    Attributes:
        role: Which side.
        migration: Which migration.
        traffic: What each channel has carried.
        last_error: The latest connection's failure, for people.
        began: When it was made (`time.time`).
        opened: When its first connection was relayed (`time.monotonic`), None before that.
    """

    role: Role

    def __init__(self, migration: Migration, around: Surroundings) -> None:
        self.migration = migration
        self.traffic: dict[Channel, Traffic] = {}
        self.last_error: str | None = None
        self.began = time.time()
        self.opened: float | None = None
        self.log = structlog.get_logger(__name__).bind(
            namespace=migration.namespace,
            name=migration.name,
            migration_uid=migration.migration_uid,
            role=str(self.role),
        )
        self._around = around
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._slots: dict[Channel, asyncio.Semaphore] = {}
        self._unfinished: dict[Channel, Unfinished] = {}
        self._turns: dict[Channel, _Turns] = {}
        self._samples = deque([(time.monotonic(), 0, 0)], maxlen=_HISTORY + 1)

    @abstractmethod
    async def _dial(self, channel: Channel) -> socket.socket:
        """Tries once to connect the other leg.

        Raises:
            DialError: It cannot be had, and trying again will not help.
            OSError, ProxyError, LauncherError: It cannot be had yet.
        """

    @property
    @abstractmethod
    def retriable(self) -> tuple[type[Exception], ...]:
        """The errors of `_dial` that another try may mend."""

    @abstractmethod
    def peer(self, channel: Channel) -> str:
        """Where the other leg of a channel is, for people."""

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

    def sample(self) -> None:
        """Remembers the counters for `rate` and `history`; to be called each second."""
        self._samples.append((time.monotonic(), *self._moved()))

    @property
    def history(self) -> list[int]:
        """Bytes per second, both ways together, between the samples of the last minute, the latest last."""
        return [
            round((sent + received - sent_before - received_before) / max(at - before, 1e-3))
            for (before, sent_before, received_before), (at, sent, received) in pairwise(self._samples)
        ]

    def resume(self, traffic: dict[Channel, Traffic], began: float) -> None:
        """Goes on counting where an earlier proxy of the same migration and role left off.

        Args:
            traffic: What it had carried.
            began: When it was made (`time.time`).
        """
        self.traffic, self.began = traffic, began
        self._samples.clear()
        self.sample()

    def _moved(self) -> tuple[int, int]:
        traffic = self.traffic.values()
        return sum(one.sent for one in traffic), sum(one.received for one in traffic)

    async def accept(self, listener: socket.socket, channel: Channel) -> None:
        """Accepts connections and relays each in a task of its own; runs until cancelled.

        Args:
            listener: A non-blocking listening socket; stays the caller's.
            channel: The channel that it serves.
        """
        slots = self._slots.setdefault(channel, asyncio.Semaphore(self._around.max_connections))
        self._unfinished.setdefault(channel, Unfinished(self._around.max_handshakes))
        self._turns.setdefault(channel, _Turns())
        self.traffic.setdefault(channel, Traffic())
        while True:
            if slots.locked():
                self.log.warning(
                    "connections wait: the channel is full",
                    channel=channel.label,
                    open=self._around.max_connections,
                    remedy="end the launcher's surplus connections, or raise --max-connections",
                )
            async with slots:  # there is one; each connection takes its own, a target's only once it is authenticated
                pass
            try:
                accepted, address = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self.log.error(
                        "cannot accept connections",
                        channel=channel.label,
                        error=error.strerror,
                        remedy="raise the limit of open files (ulimit -n, LimitNOFILE=)",
                    )
                    await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            remote = str(address[0]) if address else "launcher"
            task = asyncio.create_task(self._connection(accepted, remote, channel, slots))
            self._connections[task] = accepted
            task.add_done_callback(lambda done: self._connections.pop(done).close())

    async def _connection(
        self, accepted: socket.socket, remote: str, channel: Channel, slots: asyncio.Semaphore
    ) -> None:
        log = self.log.bind(channel=channel.label, peer=self.peer(channel), remote=remote)
        async with AsyncExitStack() as slot:
            legs = [accepted]
            try:
                if accepted.family == socket.AF_UNIX:
                    await slot.enter_async_context(slots)
                    unix, transport = accepted, await self._to_network(channel, legs)
                else:
                    with self._turns[channel].take(remote) as turn:
                        transport = await self._from_network(accepted, remote, channel, legs)
                        await turn()
                        await slot.enter_async_context(slots)
                        unix = await self._reach(channel)
                    legs.append(unix)
                widen_unix(unix)
                relay = Relay(unix, transport)
            except (DialError, ProxyError, OSError) as error:
                log.error("connection failed", **self._fail(channel, error, "dial"))
                for leg in legs:
                    reset(leg)
                return
            except BaseException:
                for leg in legs:
                    reset(leg)
                raise
            await self._relay(relay, channel, log.bind(security=transport.label))

    async def _to_network(self, channel: Channel, legs: list[socket.socket]) -> Transport:
        """Dials the other node, and protects the connection; `legs` has what is to be closed if anything fails."""
        legs.append(await self._reach(channel))
        transport = await self._secure(legs[-1], server=False)
        legs[-1] = transport.tcp
        return transport

    async def _from_network(
        self, accepted: socket.socket, remote: str, channel: Channel, legs: list[socket.socket]
    ) -> Transport:
        """Protects what was accepted: nothing is dialled for a peer that has not shown who it is."""
        async with self._unfinished[channel].place(remote):
            transport = await self._secure(accepted, server=True)
        legs[0] = transport.tcp
        return transport

    async def _secure(self, tcp: socket.socket, *, server: bool) -> Transport:
        began = time.monotonic()
        transport = await self._around.security.secure(tcp, server=server)
        if transport.label != Transport.label:
            self._around.measures.handshakes.labels(self.role).observe(time.monotonic() - began)
        return transport

    async def _reach(self, channel: Channel) -> socket.socket:
        """Dials the other leg, and records how long that took."""
        began = time.monotonic()
        sock = await self._dial_until(channel)
        self._around.measures.dials.labels(self.role, channel.label).observe(time.monotonic() - began)
        return sock

    def _fail(self, channel: Channel, error: Exception, reason: str) -> dict[str, str]:
        """Counts a failure, for that reason unless it is one of TLS; returns what a log line says of it."""
        why = getattr(error, "strerror", None) or str(error)
        self.last_error = f"channel {channel.label}: {why}"
        told = {"error": why}
        if isinstance(error, TLSError):
            self._around.security.errors[error.reason] += 1
            reason, told["reason"] = _BROKEN_TLS.get(error.reason, "handshake"), str(error.reason)
        self.traffic[channel].failures[reason] += 1
        self._around.measures.failures.labels(self.role, reason).inc()
        return told

    async def _dial_until(self, channel: Channel) -> socket.socket:
        """Dials until it works, an error is final, or the time is up."""
        pause = 0.005
        last: Exception | None = None
        try:
            async with asyncio.timeout(self._around.dial_timeout):
                while True:
                    try:
                        return await self._dial(channel)
                    except self.retriable as error:
                        last = error
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 0.25)
        except TimeoutError:
            why = str(last) if last else f"{self.peer(channel)}: no answer"
            raise DialError(f"{why} (tried for {self._around.dial_timeout:g} s)") from last

    async def _relay(self, relay: Relay, channel: Channel, log: structlog.stdlib.BoundLogger) -> None:
        traffic = self.traffic[channel]
        traffic.begin(relay)
        self.opened = self.opened or relay.opened
        log.info("connection opened")
        failure: dict[str, str] = {}
        try:
            await relay.run()
        except OSError as error:
            failure = self._fail(channel, error, _BROKEN.get(error.errno or 0, "other"))
        finally:
            traffic.end(relay)
            seconds = round(time.monotonic() - relay.opened, 3)
            counts = {"sent": relay.sent, "received": relay.received, "seconds": seconds}
            if failure:
                log.warning("connection broken", **counts, **failure)
            else:
                log.info("connection closed", **counts)

    async def close(self) -> None:
        """Ends every connection at once, and logs what the migration has moved."""
        ending = list(self._connections)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        sent, received = self._moved()
        self.log.info(
            "proxy ended",
            sent=sent,
            received=received,
            connections=sum(traffic.connections for traffic in self.traffic.values()),
            failed=sum(traffic.failed for traffic in self.traffic.values()),
            seconds=round(time.time() - self.began, 3),
        )
