"""The paths of a connection beside virt-handler where the nodes speak mTLS; bytes are moved by another process."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from migproxy.announcement import server_name
from migproxy.tls import Meeting
from tests import certificates
from tests.clock import eventually
from tests.kube.beside import STRANGER, TARGET, Act, Scene, close, listening, migrating, say_nothing, say_something_else
from tests.kube.cluster import Cluster, start

pytestmark = pytest.mark.tier("gate")


@pytest.fixture
async def scene(kubernetes: Cluster, tmp_path: Path) -> AsyncIterator[Scene]:
    (tmp_path / "tls").mkdir()
    protect = certificates.Cluster.make(tmp_path / "tls").security
    async with migrating(kubernetes, tmp_path, protect) as made:
        yield made


async def test_connection_goes_by_the_two_migproxies(scene: Scene) -> None:
    async with scene.target_runs(), scene.source_runs():
        await scene.publish()
        await scene.in_place()
        for _ in range(3):
            await scene.migrate()
        await scene.change(start())
        await eventually(lambda: scene.target.migration("one")["state"] == "running", "the start")
        await scene.migrate()
        assert (scene.path(), scene.paths()) == (("migproxy", ""), [("migproxy", "", 4)])
        assert scene.relayed == 0
        for node in (scene.source, scene.target):  # the two's own words are not counted
            await eventually(lambda node=node: counted(node.migration("one")) == (28, 28), "the count")  # type: ignore[misc]


def counted(migration: dict[str, Any]) -> tuple[int, int]:
    (channel,) = [one for one in migration["channels"] if one["channel"] == "libvirt"]
    return channel["bytes_sent"], channel["bytes_received"]


REFUSALS: dict[str, tuple[Act, str]] = {
    "says nothing": (say_nothing, "timeout"),
    "closes": (close, "refused"),
    "says something else": (say_something_else, "refused"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_target_that_does_not_take_it_leaves_it_to_virt_handler(scene: Scene, refusal: str) -> None:
    act, reason = REFUSALS[refusal]
    async with scene.source_runs(), listening(act) as port:
        await scene.announce(f"1 first {port}:0,{port + 1}:49152 {STRANGER}")
        await scene.publish()
        await scene.in_place()
        await scene.migrate()
        assert scene.paths() == [("virt-handler", reason, 1)]


# Who may come to an announced target


async def come(scene: Scene, name: str | None) -> None:
    """Connects to the announced target as a source would, and stops before its last word."""

    with socket.socket() as tcp:
        tcp.setblocking(False)
        await asyncio.get_running_loop().sock_connect(tcp, (TARGET, await scene.announced_port()))
        ready = asyncio.Event()

        async def stop() -> None:
            ready.set()
            await asyncio.Event().wait()

        meeting = asyncio.create_task(scene.protect().secure(tcp, server=False, meeting=Meeting(name, stop)))
        waiting = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait([meeting, waiting], return_when=asyncio.FIRST_COMPLETED)
            if meeting.done():
                meeting.result()
        finally:
            for task in (meeting, waiting):
                task.cancel()
            await asyncio.gather(meeting, waiting, return_exceptions=True)


async def test_source_that_goes_away_before_its_last_word_reaches_no_launcher(scene: Scene) -> None:
    async with scene.target_runs():
        await come(scene, server_name(scene.uid, "first"))
        await eventually(lambda: scene.target.migration("one")["channels"][0]["connections_failed"] == 1, "the failure")
        assert scene.launcher.accepted == []


@pytest.mark.parametrize("name", [None, server_name("another", "first"), server_name("one", "second"), "nonsense"])
async def test_source_that_means_another_migration_is_refused_before_its_launcher_is_dialled(
    scene: Scene, name: str | None
) -> None:
    async with scene.target_runs():
        with pytest.raises(OSError, match="unrecognized_name"):
            await come(scene, name)
        assert scene.target.node.report()["tls"]["errors"] == {"other_migration": 1}
        assert scene.launcher.accepted == []
