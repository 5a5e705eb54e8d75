"""A storm of SIGKILLs over both nodes' daemons and relays, and hashed streams that must come through it.

The storm's moments come from a seed (STORM_SEED), so that a run's schedule can be had again; what the machine does
in between is its own.
"""

import asyncio
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from demo.lab import LabError, Node, Traffic, until
from demo.stream import Flow, Wires
from migproxy import control
from migproxy.portmap import Channel

MIB = 1 << 20
MOST_LOST = 2  # connections in a row; docs/unbreakable.md tells of the moment in which one is
SUSPENDED = ("--timeout", "60")
"""Options of `virsh migrate`: a guest that writes faster than killed daemons relay is suspended after a minute."""
PATIENCE = 90.0  # seconds, for what takes a fraction of one on a machine that is not overloaded


def seed() -> int:
    """The storm's seed, from STORM_SEED or by chance; printed, so that it is known when a test fails."""
    chosen = int(os.environ.get("STORM_SEED") or random.randrange(1 << 32))
    print(f"STORM_SEED={chosen}")
    return chosen


class Killable(Protocol):
    """What can be killed and started again: a daemon (`Proxy`), a relay, or both by turns.

    Attributes:
        control: The daemon's control socket.
        listens: Whether it serves.
    """

    control: Path

    @property
    def listens(self) -> bool: ...

    async def spawn(self) -> None: ...

    async def ready(self) -> None: ...

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int: ...


def is_whole(path: Path, pid: int) -> bool:
    """Whether a daemon answers at its control socket, and that relay has everything of it."""
    try:
        report = control.ask(str(path))["relay"]
    except control.ControlError:
        return False
    return bool(report["pid"] == pid and report["problem"] is None)


class KillableRelay:
    """A node's relay."""

    def __init__(self, node: Node) -> None:
        self.control, self._relay = node.proxy.control, node.relay

    @property
    def listens(self) -> bool:
        """Whether the daemon has handed everything over to it."""
        return is_whole(self.control, self._relay.pid)

    async def spawn(self) -> None:
        """Starts it, and waits for nothing."""
        await self._relay.start()

    async def ready(self) -> None:
        """Waits until the daemon has handed everything over to it."""
        await until(lambda: self.listens, f"{self.control} to have its relay", PATIENCE)

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends it."""
        return await self._relay.stop(how)


class ByTurns:
    """A node's daemon and relay by turns, neither of them while the other one is being started."""

    def __init__(self, daemon: Killable, relay: Killable) -> None:
        self.control = daemon.control
        self._both = (daemon, relay)
        self._next = 0

    @property
    def listens(self) -> bool:
        """Whether the relay has everything of the daemon."""
        return self._both[1].listens

    async def spawn(self) -> None:
        """Starts the one that was stopped."""
        await self._both[self._next].spawn()
        self._next = 1 - self._next

    async def ready(self) -> None:
        """Waits until both are there, and have everything."""
        for one in self._both:
            await one.ready()

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends one of them, as soon as the other one could do without it."""
        await self.ready()
        return await self._both[self._next].stop(how)


class Storm:
    """Kills daemons and starts them again, each on its own, at moments that a seed chooses.

    A life ends while the daemon starts and takes over, soon after it serves, or later: a third of them each way.

    Attributes:
        kills: How many there were.
    """

    def __init__(self, proxies: Sequence[Killable], seed: int, startup: float) -> None:
        self.kills = 0
        self._proxies = proxies
        self._startup = startup
        self._chance = {proxy: random.Random(f"{seed}/{number}") for number, proxy in enumerate(proxies)}

    async def blow(self, kills: int, killing: Callable[[random.Random], None] = lambda chance: None) -> None:
        """Kills each daemon so often; they run at the end, and are ready.

        Args:
            kills: Of each daemon.
            killing: Called right before each kill.
        """
        async with asyncio.TaskGroup() as tasks:
            for proxy in self._proxies:
                tasks.create_task(self._blow(proxy, kills, killing))

    async def _blow(self, proxy: Killable, kills: int, killing: Callable[[random.Random], None]) -> None:
        chance = self._chance[proxy]
        for _ in range(kills):
            killing(chance)
            await asyncio.sleep(chance.uniform(0, 0.02))
            await proxy.stop(signal.SIGKILL)
            self.kills += 1
            await proxy.spawn()
            await self._live(proxy, chance)
        await proxy.ready()

    async def _live(self, proxy: Killable, chance: random.Random) -> None:
        match chance.choice(("young", "serving", "old")):
            case "young":
                await asyncio.sleep(chance.uniform(0, 1.5 * self._startup))
            case "serving":
                await until(lambda: proxy.listens, f"{proxy.control}", PATIENCE)
                await asyncio.sleep(chance.expovariate(1 / 0.03))
            case _:
                await until(lambda: proxy.listens, f"{proxy.control}", PATIENCE)
                await asyncio.sleep(chance.uniform(0.1, 0.6))


async def startup(proxy: Killable) -> float:
    """Seconds that a daemon takes from its start until it listens on its control socket."""
    began = time.monotonic()
    await proxy.spawn()
    await until(lambda: proxy.listens, f"{proxy.control}", PATIENCE)
    return time.monotonic() - began


@asynccontextmanager
async def metronome(proxies: Sequence[Killable], seconds: float, struck: list[float]) -> AsyncIterator[None]:
    """Kills all the daemons and starts them again, so many seconds after all of them serve, until the context ends.

    They live at the same time, however slowly they start: QEMU's NBD server gives its client ten seconds to negotiate.

    Args:
        proxies: The daemons.
        seconds: That they live once they serve.
        struck: Gets the times at which they were killed (`time.monotonic`).
    """

    async def beat() -> None:
        while not over.is_set():
            for proxy in proxies:
                await until(lambda proxy=proxy: proxy.listens, f"{proxy.control}", PATIENCE)  # type: ignore[misc]
            await asyncio.sleep(seconds)
            await asyncio.gather(*(proxy.stop(signal.SIGKILL) for proxy in proxies))
            struck.append(time.monotonic())
            await asyncio.gather(*(proxy.spawn() for proxy in proxies))
        await asyncio.gather(*(proxy.ready() for proxy in proxies))

    over = asyncio.Event()
    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        over.set()
        await beating


class Tide:
    """How far the streams may go: the storm lets them on with each kill, so that bytes move when it strikes."""

    def __init__(self) -> None:
        self._level = 0.0
        self._over = False
        self._changed = threading.Condition()

    @property
    def level(self) -> float:
        """The part of the storm that has passed, from 0 to 1."""
        return self._level

    def rise(self, level: float) -> None:
        """Lets everything on that waits for a level up to this one."""
        with self._changed:
            self._level = level
            self._changed.notify_all()

    def end(self) -> None:
        """Lets everything on."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait(self, level: float) -> None:
        """Waits until the tide is so high, or at its end."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._level >= level)


@dataclass(slots=True)
class Stream:
    """One direction of a connection: what is sent, what has arrived, and a valve at the receiver.

    Attributes:
        size: Bytes that it carries.
        begin, end: The parts of the storm between which it does.
    """

    size: int
    begin: float
    end: float
    channel: Channel
    sent: Flow = field(init=False)
    received: Flow = field(init=False)
    valve: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.sent, self.received = Flow(self.channel), Flow(self.channel)
        self.valve.set()

    def due(self, tide: float) -> int:
        """Bytes that are sent at a level of the tide, at least."""
        share = (tide - self.begin) / (self.end - self.begin)
        return max(0, min(self.size, int(self.size * share)))

    def complaint(self) -> str | None:
        """What is wrong with it after its end; None where nothing is."""
        if (self.sent.moved, self.received.moved) != (self.size, self.size):
            return f"{self.channel.label}: {self.size} bytes, {self.sent.moved} sent, {self.received.moved} arrived"
        if self.sent.hash.digest() != self.received.hash.digest():
            return f"{self.channel.label}: {self.size} bytes arrived with another hash"
        return None


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection's part in the storm: the tides at which it begins, and at which each direction ends."""

    channel: Channel
    begin: float
    sent_until: float
    received_until: float


SCRIPT = (
    Connection(Channel.LIBVIRT, 0.0, 1.0, 1.0),
    Connection(Channel.DIRECT, 0.0, 0.25, 1.0),  # a half-close
    Connection(Channel.BLOCK, 0.0, 1.0, 0.3),  # and one the other way
    Connection(Channel.DIRECT, 0.0, 0.5, 0.5),  # both ends, and in its place
    Connection(Channel.DIRECT, 0.5, 1.0, 1.0),  # another connection
)


class Streams:
    """Carries the script's connections through a migration while the tide rises.

    Args:
        source, target: The nodes.
        key: The VMI's UID.
        total: Bytes of all streams together.
        tide: Lets them on.
    """

    def __init__(self, source: Node, target: Node, key: str, total: int, tide: Tide) -> None:
        self._nodes, self._key, self._tide = (source, target), key, tide
        lengths = sum(one.sent_until + one.received_until - 2 * one.begin for one in SCRIPT)

        def stream(one: Connection, end: float) -> Stream:
            return Stream(int(total * (end - one.begin) / lengths), one.begin, end, one.channel)

        self._pairs = [(one, stream(one, one.sent_until), stream(one, one.received_until)) for one in SCRIPT]
        self._all = [stream for _, there, back in self._pairs for stream in (there, back)]
        self._lost: Counter[str] = Counter()

    @property
    def moved(self) -> int:
        """Bytes that have arrived."""
        return sum(stream.received.moved for stream in self._all)

    def __str__(self) -> str:
        return ", ".join(f"{one.received.moved}/{one.due(self._tide.level)} of {one.size}" for one in self._all)

    @property
    def are_settled(self) -> bool:
        """Whether all that was due has arrived."""
        return all(stream.received.moved >= stream.due(self._tide.level) for stream in self._all)

    def expected(self, channel: str) -> Traffic:
        """What the source's daemon must count on a channel, by its label."""
        mine = [(one, there, back) for one, there, back in self._pairs if one.channel.label == channel]
        return Traffic(len(mine), sum(there.size for _, there, _ in mine), sum(back.size for _, _, back in mine))

    async def assert_counted(self, migration: str) -> None:
        """Asserts that both daemons counted a migration's traffic as it was.

        A daemon may have counted a connection, too, that was lost before it arrived at its end, and carried nothing.
        """
        source, target = [await node.proxy.traffic(migration) for node in self._nodes]
        assert source.keys() == target.keys() == {one.channel.label for one in SCRIPT}
        for channel in source:
            expected = self.expected(channel)
            for counted in (source[channel], target[channel].reversed):
                lost = counted.connections - expected.connections
                assert 0 <= lost <= self._lost[channel], (channel, counted, expected, self._lost)
                assert replace(counted, connections=expected.connections) == expected, channel

    def shake(self, chance: random.Random) -> None:
        """Closes some receivers, and opens the others: behind a closed one, everything fills up to the sender."""
        for stream in self._all:
            (stream.valve.clear if chance.random() < 0.3 else stream.valve.set)()

    def calm(self) -> None:
        """Opens all receivers."""
        for stream in self._all:
            stream.valve.set()

    async def run(self) -> None:
        """Carries everything; raises LabError where what arrives is not what was sent."""
        with ExitStack() as stack:
            # Its end waits for the threads, which the sockets' and the tide's end wake: so it is entered first.
            threads = stack.enter_context(ThreadPoolExecutor(4 * len(SCRIPT)))
            wires = {
                channel: stack.enter_context(Wires(*self._nodes, self._key, channel))
                for channel in dict.fromkeys(one.channel for one in SCRIPT)
            }
            stack.callback(self.calm)
            stack.callback(self._tide.end)
            async with asyncio.TaskGroup() as tasks:
                for number, pair in enumerate(self._pairs):
                    tasks.create_task(self._carry(threads, wires[pair[0].channel], number, *pair))
        if complaints := [words for stream in self._all if (words := stream.complaint())]:
            raise LabError("; ".join(complaints))

    async def _carry(
        self, threads: ThreadPoolExecutor, wires: Wires, number: int, one: Connection, there: Stream, back: Stream
    ) -> None:
        while self._tide.level < one.begin:
            await asyncio.sleep(0.005)
        near, far = await self._connect(wires)
        run = asyncio.get_running_loop().run_in_executor
        start = number * MIB // len(SCRIPT)
        await asyncio.gather(
            run(threads, there.sent.send, near, there.size, start, self._gate(there)),
            run(threads, there.received.receive, far, there.valve.wait),
            run(threads, back.sent.send, far, back.size, start + 1, self._gate(back)),
            run(threads, back.received.receive, near, back.valve.wait),
        )

    async def _connect(self, wires: Wires) -> tuple[socket.socket, socket.socket]:
        """Makes a connection; one that a daemon had accepted and not yet handed over when it was killed is lost."""
        for _ in range(MOST_LOST):
            try:
                return await wires.connect(PATIENCE)
            except ConnectionResetError as error:
                print(f"dialled again: {error}")
                self._lost[wires.channel.label] += 1
        return await wires.connect(PATIENCE)

    def _gate(self, stream: Stream) -> Callable[[], None]:
        def wait() -> None:
            share = stream.sent.moved / stream.size
            self._tide.wait(stream.begin + share * (stream.end - stream.begin))

        return wait


@asynccontextmanager
async def carried(streams: Streams) -> AsyncIterator["asyncio.Task[None]"]:
    """Carries streams meanwhile; a failure of theirs ends the body, too."""
    async with asyncio.TaskGroup() as tasks:
        yield tasks.create_task(streams.run())


def defects(node: Node) -> list[str]:
    """What a daemon has logged that it should not: no JSON, or an exception that nobody expected."""
    found = []
    for line in node.proxy.log.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            found.append(line)
        else:
            if "exception" in event:
                found.append(event["exception"])
    return found


@asynccontextmanager
async def leaves_nothing(nodes: list[Node]) -> AsyncIterator[None]:
    """Asserts that relays and daemons have no more descriptors at the end than at the beginning, and no defects.

    Shows what the daemons logged last where anything fails.
    """
    before = [count(node) for node in nodes]
    try:
        yield
        for node, at_first in zip(nodes, before, strict=True):
            await until(
                lambda node=node, at_first=at_first: holds_no_more(count(node), at_first),  # type: ignore[misc]
                f"{at_first} descriptors again in {node.name}'s relay and daemon: {count(node)}, {held(node)}",
            )
            if found := defects(node):
                raise LabError(f"{node.name}'s daemon logged what it should not: {found}")
    except BaseException:
        for node in nodes:
            lines = node.proxy.log.read_text().splitlines()
            troubles = [line for line in lines[:-40] if '"level": "info"' not in line]
            print(f"--- {node.name}", *troubles, "...", *lines[-40:], sep="\n")
        raise


def count(node: Node) -> tuple[int, int]:
    """How many descriptors a node's relay has open, and its daemon."""
    return node.relay.descriptors(), node.proxy.descriptors()


def holds_no_more(now: tuple[int, int], before: tuple[int, int]) -> bool:
    """Whether the relay has as many descriptors as before, and the daemon no more."""
    return now[0] == before[0] and now[1] <= before[1]


def held(node: Node) -> list[str]:
    """What a node's relay has open."""
    folder = f"/proc/{node.relay.pid}/fd"
    return [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
