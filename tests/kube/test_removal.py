"""Taking migproxy away: its pod ends with status 0, and leaves nothing; virt-handler's proxy serves what comes."""

import asyncio
import signal
from pathlib import Path

import pytest

from migproxy.portmap import Channel, source_socket_name
from tests.kube.beside_daemons import nodes
from tests.kube.cluster import MERGE_PATCH, Cluster

pytestmark = pytest.mark.tier("gate")

ROLE = "/apis/rbac.authorization.k8s.io/v1/clusterroles/migproxy"


@pytest.mark.parametrize("has_rights", [True, False], ids=["as documented", "its rights went first"])
async def test_pod_that_is_deleted_leaves_nothing(kubernetes: Cluster, tmp_path: Path, has_rights: bool) -> None:
    async with nodes(kubernetes, tmp_path, tls=True) as made:
        for daemon in made.daemons:
            await daemon.start()
        await made.prepare("first")
        assert await made.live() == "served"
        if not has_rights:
            await kubernetes.request("PATCH", ROLE, {"rules": []}, MERGE_PATCH)
        ends = [end for daemon in made.daemons for end in (daemon.relay.stop(), daemon.stop(signal.SIGTERM))]
        assert await asyncio.gather(*ends) == [0, 0, 0, 0]
        assert (await made.announced() is None) is has_rights
        names = {source_socket_name(made.uid, channel) for channel in (Channel.LIBVIRT, Channel.DIRECT)}
        assert {path.name for path in made.folder.iterdir()} == names, "virt-handler's own sockets alone"
        before = made.theirs[0].relayed["source"]
        assert await made.live() == "served"
        assert made.theirs[0].relayed["source"] == before + 1
