"""The failsafe: what a killed daemon has left in virt-handler's way is given back, whoever follows."""

import asyncio
import os
from collections.abc import AsyncIterator, MutableMapping
from contextlib import AsyncExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from migproxy import failsafe, shared
from migproxy.announcement import TARGET_ANNOTATION
from migproxy.failsafe import Failsafe
from migproxy.inventory import BYPASSED
from migproxy.kube.api import ApiServer
from migproxy.launcher import LauncherError, Launchers
from migproxy.lifeline import Lifeline
from migproxy.shared import SharedFolder
from tests.clock import Clock, eventually
from tests.kube.beside_source import SourceScene, Targets, targets
from tests.kube.cluster import MERGE_PATCH, NODES, VMIS, Cluster, begin, start, vmi
from tests.kube.gate import Gate
from tests.kube.world import LocalNode

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

ADDRESS = "127.77.0.1"
HERE, THERE = NODES
PATIENCE = pytest.approx(1.0, abs=0.26)
"""Seconds that a daemon has been dead when something is done about it: looked at four times in each."""


class Guarded(SourceScene):
    """A node with a daemon and a failsafe, and a VMI that migrates from it, or to it.

    Attributes:
        logs: What both have logged.
        failsafe: It runs.
        ending: Tells it to end.
    """

    def __init__(self, kubernetes: Cluster, node: LocalNode, uid: str, far: Targets, url: str) -> None:
        super().__init__(kubernetes, node, uid, far)
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
    uid = (await kubernetes.request("POST", VMIS, vmi("one")))["metadata"]["uid"]
    node = LocalNode(HERE, ADDRESS, tmp_path)
    node.boot_launcher(uid)
    async with targets() as far:
        with capture_logs() as logs:
            made = Guarded(kubernetes, node, uid, far, door.url)
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


async def test_sockets_of_a_migration_that_runs_are_given_back_too(scene: Guarded) -> None:
    """Whoever connects from then on goes by virt-handler, which leads to the same launcher."""
    await scene.source_in_path()
    await scene.change(start())
    await eventually(lambda: scene.node.migration("one")["state"] == "running", "the start")
    await scene.kill()
    await eventually(scene.is_given_back, "virt-handler's sockets")
    await scene.connect()
    assert scene.virt_handler.relayed == {"source": 1}
    await scene.start()
    await asyncio.sleep(60)
    assert scene.is_given_back(), "a daemon that comes after the start stays out"


async def test_announcement_of_a_killed_daemon_stays_as_nobody_needs_it(scene: Guarded) -> None:
    await scene.change(begin("first", source=THERE, target=HERE))
    path = f"{VMIS}/one"
    async with asyncio.timeout(20):
        while TARGET_ANNOTATION not in (await scene.kubernetes.request("GET", path))["metadata"]["annotations"]:
            await asyncio.sleep(0.01)
    await scene.kill()
    await eventually(lambda: scene.told("the daemon does not run") > 0, "the failsafe to see it")
    await asyncio.sleep(60)
    assert TARGET_ANNOTATION in (await scene.kubernetes.request("GET", path))["metadata"]["annotations"]


async def test_what_cannot_be_given_back_at_once_is_tried_again(
    scene: Guarded, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.source_in_path()
    tries: list[float] = []
    give_back = shared.mend

    def refuse(*arguments: Any) -> list[str]:
        tries.append(clock())
        if len(tries) < 7:
            raise LauncherError("its folder is away")
        return give_back(*arguments)

    monkeypatch.setattr(failsafe, "mend", refuse)
    await scene.kill()
    await eventually(scene.is_given_back, "virt-handler's sockets")
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


async def test_vmi_that_cannot_be_mended_keeps_neither_another_waiting_nor_the_end(
    scene: Guarded, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.source_in_path()
    await scene.kubernetes.request("POST", VMIS, vmi("two"))
    await scene.kubernetes.request("PATCH", f"{VMIS}/two", begin("second"), MERGE_PATCH)
    await scene.kill()
    await eventually(scene.is_given_back, "virt-handler's sockets")
    await eventually(lambda: scene.told("cannot give back, trying again") == 1, "the launcher that is not there")
    told = clock()
    await scene.complete()
    assert 10 <= clock() - told <= 10.5


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
