"""The failsafe: what a killed daemon has left in virt-handler's way is given back, whoever follows."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, MutableMapping
from contextlib import AsyncExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from migproxy.failsafe import Failsafe
from migproxy.inventory import BYPASSED
from migproxy.kube.api import ApiServer
from migproxy.launcher import Launchers
from migproxy.lifeline import Lifeline
from migproxy.shared import SharedFolder
from tests.clock import Clock, eventually
from tests.kube.cluster import NODES, VMIS, Cluster, begin, start, vmi
from tests.kube.gate import Gate
from tests.kube.test_beside_source import Scene
from tests.kube.test_beside_target import (
    THEIRS,
    announced,
    change,
    path,
    policy_in_force,
    publish,
    published,
    until_announced,
    until_withdrawn,
)
from tests.kube.world import LocalNode

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

ADDRESS = "127.77.0.1"
HERE, THERE = NODES
PATIENCE = pytest.approx(1.0, abs=0.26)
"""Seconds that a daemon has been dead when something is done about it: looked at four times in each."""


class Guarded(Scene):
    """A node with a daemon and a failsafe, and a VMI that migrates from it, or to it.

    Attributes:
        logs: What both have logged.
        failsafe: It runs.
        ending: Tells it to end.
    """

    def __init__(self, kubernetes: Cluster, node: LocalNode, uid: str, target: socket.socket, url: str) -> None:
        super().__init__(kubernetes, node, uid, target)
        folder = node.launchers.parent
        self.logs: list[MutableMapping[str, Any]] = []
        self.failsafe: asyncio.Task[None]
        self.ending = asyncio.Event()
        self._lock, self._kubeconfig = str(folder / "lock"), kubernetes.kubeconfig(folder, HERE, url)
        self._life = AsyncExitStack()

    async def start(self) -> None:
        """Starts the daemon."""
        lifeline = self._life.enter_context(closing(Lifeline(self._lock)))
        await self._life.enter_async_context(lifeline.held())
        await self._life.enter_async_context(self.node.run(self._kubeconfig, beside=True))

    async def kill(self) -> None:
        """The daemon dies, and nobody starts it anew: its sockets are closed, and all else stays as it is."""
        with pytest.MonkeyPatch.context() as death:
            death.setattr(SharedFolder, "remove", lambda *_: None)
            await self._life.aclose()

    async def watch_over(self) -> None:
        """Runs the failsafe until it has been told to end."""
        launchers, owner = Launchers(f"{self.node.launchers}/{{uid}}", "/nowhere"), (os.getuid(), os.getgid())
        with closing(Lifeline(self._lock)) as daemon:
            async with ApiServer(str(self._kubeconfig)) as api:
                await Failsafe(daemon, HERE, launchers, owner, api).run(self.ending)

    async def complete(self) -> None:
        """The failsafe has looked at everything since the daemon's death: told to end, it does that first."""
        self.ending.set()
        await self.failsafe

    async def source_in_path(self) -> None:
        """The VMI migrates from here, virt-handler has prepared that, and ours lead there."""
        await self.change(begin("first"))
        await self.publish()
        self.prepare()
        await eventually(self.is_ours, "our sockets over virt-handler's")

    def told(self, event: str) -> int:
        """How often that has been logged."""
        return sum(one["event"].startswith(event) for one in self.logs)


@pytest.fixture
async def scene(kubernetes: Cluster, tmp_path: Path, door: Gate) -> AsyncIterator[Guarded]:
    """The daemon and the failsafe run."""
    await kubernetes.install_beside()
    await policy_in_force(kubernetes)
    uid = (await kubernetes.request("POST", VMIS, vmi("one")))["metadata"]["uid"]
    node = LocalNode(HERE, ADDRESS, tmp_path)
    node.boot_launcher(uid)
    with socket.create_server(("127.77.0.3", 0)) as target, capture_logs() as logs:
        target.setblocking(False)
        made = Guarded(kubernetes, node, uid, target, door.url)
        made.logs = logs
        made.failsafe = asyncio.create_task(made.watch_over())
        await made.start()
        yield made
        await made.kill()
        await made.complete()
        await made.virt_handler.close()


async def test_killed_daemons_sources_go_by_virt_handler_again_until_there_is_another_daemon(
    scene: Guarded, clock: Clock
) -> None:
    await scene.source_in_path()
    await asyncio.sleep(60)
    assert scene.is_ours()

    death = clock()
    await scene.kill()
    await eventually(scene.is_given_back, "virt-handler's sockets")
    assert clock() - death == PATIENCE
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}

    await scene.start()
    await eventually(scene.is_ours, "our sockets again")
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}


async def test_daemon_that_is_started_anew_at_once_finds_its_sockets_where_they_were(
    scene: Guarded, clock: Clock
) -> None:
    await scene.source_in_path()
    death = clock()
    await scene.kill()
    await asyncio.sleep(0.7)
    await scene.start()
    assert clock() - death == pytest.approx(0.7)
    assert scene.is_ours()
    await asyncio.sleep(60)
    assert scene.is_ours()
    assert not scene.told("the daemon does not run")


async def test_killed_daemons_announcement_goes_before_virt_handler_publishes(scene: Guarded, clock: Clock) -> None:
    await scene.change(begin("first", source=THERE, target=HERE))
    await until_announced(scene.kubernetes)

    death = clock()
    await scene.kill()
    await until_withdrawn(scene.kubernetes)
    assert clock() - death == PATIENCE
    await publish(scene.kubernetes, targetNodeAddress=ADDRESS)
    assert (await published(scene.kubernetes))["ports"] == THEIRS


async def test_what_is_published_or_runs_is_left_to_the_next_daemon(scene: Guarded) -> None:
    await scene.source_in_path()
    await scene.change(start())
    await scene.kubernetes.request("POST", VMIS, vmi("two", node=THERE))
    await change(scene.kubernetes, begin("second", source=THERE, target=HERE), "two")
    await until_announced(scene.kubernetes, "two")
    await publish(scene.kubernetes, "two", targetNodeAddress=ADDRESS)
    ports = (await published(scene.kubernetes, "two"))["ports"]
    assert ports != THEIRS

    await scene.kill()
    await scene.complete()

    assert scene.is_ours()
    assert await announced(scene.kubernetes, "two")
    assert (await published(scene.kubernetes, "two"))["ports"] == ports
    await scene.start()
    await eventually(lambda: path(scene.node) == ("migproxy", ""), "the sockets to lead to it")
    await scene.connect()
    assert not scene.virt_handler.relayed


async def test_what_cannot_be_given_back_at_once_is_tried_again(scene: Guarded, door: Gate, clock: Clock) -> None:
    await scene.change(begin("first", source=THERE, target=HERE))
    await until_announced(scene.kubernetes)
    tries: list[float] = []

    def refuse(request: web.Request) -> int | None:
        if request.method != "PATCH" or "virtualmachineinstances" not in request.path:
            return None
        tries.append(clock())
        return 500 if len(tries) < 7 else None

    door.refuse = refuse
    await scene.kill()
    await eventually(lambda: len(tries) == 7, "the last try")
    await until_withdrawn(scene.kubernetes)
    assert scene.told("cannot give back, trying again") == 1
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses == pytest.approx([0.25, 0.5, 1, 2, 2, 2])


async def test_api_server_that_is_away_at_the_daemons_death_is_waited_for(scene: Guarded, door: Gate) -> None:
    await scene.source_in_path()

    await door.close()
    await scene.kill()
    await eventually(lambda: scene.told("the daemon does not run") > 0, "the failsafe to see it")
    await asyncio.sleep(60)
    assert scene.told("cannot follow the API server") > 0
    assert scene.is_ours()
    await door.open()
    await eventually(scene.is_given_back, "virt-handler's sockets")


async def test_daemon_that_lives_too_short_to_be_seen_is_cleared_away_after(scene: Guarded, clock: Clock) -> None:
    await scene.source_in_path()
    await scene.kill()
    await eventually(lambda: scene.told("virt-handler's sockets are back") == 1, "virt-handler's sockets")

    life = clock()
    await scene.start()
    await eventually(scene.is_ours, "our sockets again")
    await scene.kill()
    assert clock() - life < 0.25, "the failsafe has looked meanwhile"
    await eventually(scene.is_given_back, "virt-handler's sockets again")


async def test_request_that_nobody_answers_keeps_no_other_vmi_from_being_looked_after_nor_the_end(
    scene: Guarded, door: Gate, clock: Clock
) -> None:
    await scene.source_in_path()
    for number in range(3):
        name = f"target-{number}"
        await scene.kubernetes.request("POST", VMIS, vmi(name, node=THERE))
        await change(scene.kubernetes, begin(name, source=THERE, target=HERE), name)
        await until_announced(scene.kubernetes, name)

    door.hold = lambda request: request.method == "PATCH" and "virtualmachineinstances" in request.path
    await scene.kill()
    await eventually(scene.is_given_back, "virt-handler's sockets")
    await eventually(lambda: door.held == 3, "the requests that are not answered")
    told = clock()
    await scene.complete()
    assert 10 <= clock() - told <= 10.5


async def test_announcements_of_a_daemon_that_lives_again_stay(scene: Guarded, door: Gate) -> None:
    await scene.change(begin("first", source=THERE, target=HERE))
    await until_announced(scene.kubernetes)
    answer = asyncio.Event()
    is_asked = asyncio.Event()

    def looks(request: web.Request) -> int | None:
        """It has not been answered yet when the next daemon lives."""
        if request.method == "GET" and request.path == f"{VMIS}/one" and not answer.is_set():
            is_asked.set()
            return 500
        return None

    door.refuse = looks
    await scene.kill()
    await is_asked.wait()
    await scene.start()
    ours = await until_announced(scene.kubernetes)
    await eventually(lambda: scene.told("a daemon has been started") > 0, "the failsafe to see it")
    answer.set()
    await asyncio.sleep(60)
    assert await until_announced(scene.kubernetes) == ours
    assert not scene.told("nothing is announced any more")


async def test_failsafe_that_is_told_to_end_waits_for_a_daemon_that_drains(scene: Guarded) -> None:
    await scene.source_in_path()

    scene.ending.set()
    async with scene.connection():  # it lives as long as the daemon does
        await asyncio.sleep(60)
        assert not scene.failsafe.done()
        await scene.kill()
        await scene.failsafe
    assert scene.is_given_back()
    assert any("daemon does not run" in one for one in await scene.events(BYPASSED))
