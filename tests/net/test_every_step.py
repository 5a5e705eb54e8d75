"""A daemon or a relay is killed at each step of a connection's life: QEMU sees it once, and every byte is counted.

The steps are found by the test itself: a process dies at the first, its successor at the second, until one has served a
connection to its end without coming to the step at which it was to die.
"""

import asyncio
import os
import signal
import socket
import sys
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from demo.lab import until
from migproxy import control
from migproxy.portmap import Channel
from tests.certificates import Cluster
from tests.net.nodes import Daemon, Migration, Nodes, assert_ends, connect, receive, send
from tests.net.test_restarts import direct, has_all, served

pytestmark = pytest.mark.tier("gate")

MESSAGE = os.urandom(64)
PATIENCE = 60.0  # seconds, for what takes one where a few processes share a CPU
NOTED = 0.3  # seconds, many times what a daemon takes
FEWEST = 12  # steps that a connection's life has, whatever becomes of the code
SENT = "sendmsg"
"""The step with which a daemon hands over what it has accepted."""


class Dying:
    """A node's daemon or relay, that dies at a step.

    Args:
        node: its node.
        which: "daemon" or "relay".
        steps: the file in which the steps are counted.
    """

    def __init__(self, node: Daemon, which: str, steps: Path) -> None:
        self._node, self._steps = node, steps
        self._process = node if which == "daemon" else node.relay
        self._at = 0
        self._ended: asyncio.Task[int] | None = None

    @property
    def steps(self) -> list[str]:
        """The steps that were begun; it died before the last one."""
        return [line.partition(" ")[2] for line in self._steps.read_text().splitlines()]

    async def start(self, at: int) -> None:
        """Starts one that is to die at a step, in place of the one before."""
        self._at = at
        await self._process.stop(signal.SIGKILL)
        self._steps.unlink(missing_ok=True)
        await self._process.start(prefix=(sys.executable, "-m", "tests.net.dying", str(self._steps), str(at)))
        await until(lambda: has_all(self._node), f"{self._node.name}'s daemon and relay to have everything")
        self._ended = asyncio.create_task(self._process.ended(60))

    def arm(self) -> None:
        """From now on, the steps of the next connection count."""
        self._steps.touch()

    async def meanwhile(self, work: "asyncio.Task[str]") -> bool:
        """Waits for a piece of work, and for its death a moment longer; returns whether it has died."""
        assert self._ended
        await asyncio.wait([work, self._ended], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([self._ended], timeout=NOTED)  # what is over is noted a moment later
        if len(self.steps) >= self._at:  # it dies, and beside load its end is heard of late
            await asyncio.wait([self._ended], timeout=PATIENCE)
        return self._ended.done()


async def live(vm: Migration) -> str:
    """One connection's life: a message goes there and comes back, and both ends are closed.

    Returns:
        "served", or "ended" where it ended before, on both sides.
    """
    with ExitStack() as stack:
        near = stack.enter_context(connect(vm.source_path(Channel.DIRECT)))
        arrived: list[socket.socket] = []

        async def answer() -> None:
            far, _ = await asyncio.get_running_loop().sock_accept(vm.listener(Channel.DIRECT))
            arrived.append(stack.enter_context(far))
            await send(far, await receive(far, len(MESSAGE), seconds=PATIENCE))

        answering = asyncio.create_task(answer())
        received = b""
        with suppress(ConnectionError):
            await send(near, MESSAGE)
            received = await receive(near, len(MESSAGE), seconds=PATIENCE)  # a daemon starts meanwhile
        if is_served := received == MESSAGE:
            near.shutdown(socket.SHUT_WR)
            await assert_ends(arrived[0])
            arrived[0].close()
        else:
            assert received == b""
            for far in arrived:
                await assert_ends(far)
        await assert_ends(near)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
    await until(
        lambda: all(is_over(vm, node) for node in (vm.source, vm.target)), "both daemons to say that it is over"
    )
    await assert_seen_once(vm, len(arrived))
    return "served" if is_served else "ended"


def is_over(vm: Migration, node: Daemon) -> bool:
    """Whether a node's daemon answers, and has no connection open."""
    try:
        return bool(direct(vm, node)["connections_open"] == 0)
    except (control.ControlError, StopIteration, KeyError):
        return False


async def assert_seen_once(vm: Migration, seen: int) -> None:
    """QEMU has not been connected another time."""
    with suppress(BlockingIOError):
        while True:
            vm.listener(Channel.DIRECT).accept()[0].close()
            seen += 1
    assert seen <= 1


@pytest.mark.parametrize(
    "stride", [pytest.param(3, id="third"), pytest.param(1, id="each", marks=pytest.mark.tier("soak"))]
)
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("which", ["daemon", "relay"])
async def test_death_at_any_step(nodes: Nodes, tmp_path: Path, which: str, side: str, stride: int) -> None:
    vm = await served(nodes)
    before = [direct(vm, node)["bytes_sent"] for node in nodes.both]
    fates = await live_and_die(vm, Dying(getattr(nodes, side), which, tmp_path / "steps"), stride)
    for fate, steps in fates:
        # Only what a daemon has not handed over yet ends with it.
        assert fate == "served" or (which == "daemon" and SENT not in steps[:-1]), steps
    counts = Counter(fate for fate, _ in fates)
    for node, sent in zip(nodes.both, before, strict=True):
        carried = direct(vm, node)["bytes_sent"] - sent - counts["served"] * len(MESSAGE)
        assert 0 <= carried <= counts["ended"] * len(MESSAGE)


@pytest.mark.tier("soak")
@pytest.mark.parametrize("side", ["source", "target"])
async def test_death_at_any_step_with_user_space_tls(nodes: Nodes, tmp_path: Path, side: str) -> None:
    cluster = Cluster.make(tmp_path / "pki")
    for node in nodes.both:
        node.protect("--tls-dir", str(cluster.folder), "--ktls", "off")
    fates = await live_and_die(await served(nodes), Dying(getattr(nodes, side), "daemon", tmp_path / "steps"))
    assert {fate for fate, _ in fates} == {"served", "ended"}


async def live_and_die(vm: Migration, dying: Dying, stride: int = 1) -> list[tuple[str, list[str]]]:
    """Makes a connection for each step at which a process can die, and one at which it does not.

    Args:
        stride: From one step to the next that is tried.

    Returns:
        What became of each (see `live`), and the steps that were begun.
    """
    fates = []
    dies, at = True, 1
    await dying.start(at)
    while dies:
        await until(vm.is_served, "the migration to be served")
        dying.arm()
        life = asyncio.create_task(live(vm))
        dies = await dying.meanwhile(life)
        steps = dying.steps
        at += stride
        await dying.start(at)
        try:
            fates.append((await life, steps))
        except BaseException:
            for node in (vm.source, vm.target):
                print(node.name, steps, *node.log.read_text().splitlines()[-20:], sep="\n")
            raise
    assert at > FEWEST
    return fates
