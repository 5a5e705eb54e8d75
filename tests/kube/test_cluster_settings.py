"""KubeVirt's own settings and CA are followed, and options override them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from migproxy.daemon import warn_without_network
from migproxy.kube.api import ApiServer
from migproxy.kube.cluster import Cluster as KubeVirt
from migproxy.kube.cluster import ClusterSettings, Overrides, merge, parse_kubevirt
from migproxy.settings import Settings
from migproxy.status import render
from tests.clock import eventually
from tests.kube.cluster import KUBEVIRTS, MERGE_PATCH, NAMESPACE, Cluster, kubevirt
from tests.kube.gate import Gate
from tests.kube.world import PACE

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
FULL = {
    "migrations": {"disableTLS": True, "network": "migration", "parallelMigrationsPerCluster": 5},
    "tlsConfiguration": {"minTLSVersion": "VersionTLS13", "ciphers": ["TLS_AES_128_GCM_SHA256"]},
}


def config_map(bundle: str, name: str = "kubevirt-ca") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "data": {"ca-bundle": bundle},
    }


class Followed:
    """A daemon's view of the cluster's settings.

    Attributes:
        told: The settings, as they were told.
    """

    def __init__(self, api: ApiServer, namespace: str) -> None:
        self.told: list[ClusterSettings] = []
        self.kubevirt = KubeVirt(api, namespace, self.told.append, PACE)


@asynccontextmanager
async def following(
    kubernetes: Cluster, folder: Path, url: str | None = None, namespace: str = NAMESPACE
) -> AsyncIterator[Followed]:
    async with ApiServer(str(kubernetes.kubeconfig(folder, "node01", url))) as api:
        followed = Followed(api, namespace)
        task = asyncio.create_task(followed.kubevirt.run())
        try:
            yield followed
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_settings_are_read_and_followed(kubernetes: Cluster, tmp_path: Path) -> None:
    await kubernetes.request("POST", KUBEVIRTS, kubevirt(FULL))
    await kubernetes.request("POST", CONFIG_MAPS, config_map(CERTIFICATE))
    await kubernetes.request("POST", CONFIG_MAPS, config_map("none of our business", "another"))
    async with following(kubernetes, tmp_path) as followed:
        await eventually(lambda: len(followed.told) == 1, "the settings")
        assert followed.told[0] == ClusterSettings(
            True, "migration", "VersionTLS13", ("TLS_AES_128_GCM_SHA256",), CERTIFICATE
        )
        assert followed.kubevirt.problem is None
        await kubernetes.request(
            "PATCH",
            f"{KUBEVIRTS}/kubevirt",
            {"spec": {"configuration": {"migrations": {"disableTLS": None}}}},
            MERGE_PATCH,
        )
        await eventually(lambda: len(followed.told) == 2, "the change of the KubeVirt resource")
        assert not followed.told[1].disable_tls
        await kubernetes.request(
            "PATCH", f"{CONFIG_MAPS}/kubevirt-ca", {"data": {"ca-bundle": CERTIFICATE * 2}}, MERGE_PATCH
        )
        await eventually(lambda: len(followed.told) == 3, "the CA's rotation")
        assert followed.told[2].ca_certificates == 2
        await kubernetes.request("PATCH", f"{KUBEVIRTS}/kubevirt", {"metadata": {"labels": {"a": "b"}}}, MERGE_PATCH)
        await kubernetes.request("DELETE", f"{CONFIG_MAPS}/kubevirt-ca")
        await eventually(lambda: len(followed.told) == 4, "the CA's end")
        assert followed.told[3].ca_bundle is None


async def test_namespace_without_kubevirt_is_said(kubernetes: Cluster, tmp_path: Path) -> None:
    async with following(kubernetes, tmp_path) as followed:
        await eventually(lambda: len(followed.told) == 1, "the defaults")
        assert followed.told == [ClusterSettings()]
        problem = followed.kubevirt.problem or ""
        assert f"namespace {NAMESPACE} has no KubeVirt resource" in problem
        assert "--kubevirt-namespace" in problem
        await kubernetes.request("POST", KUBEVIRTS, kubevirt(FULL))
        await eventually(lambda: len(followed.told) == 2, "KubeVirt's installation")
        assert "ConfigMap kubevirt-ca" in (followed.kubevirt.problem or "")


async def test_namespace_that_may_not_be_read_is_said(kubernetes: Cluster, tmp_path: Path) -> None:
    async with following(kubernetes, tmp_path, namespace="elsewhere") as followed:
        told = "cannot read the KubeVirt resource in namespace elsewhere: 403"
        await eventually(lambda: told in (followed.kubevirt.problem or ""), "the problem")
        assert followed.told == []


async def test_settings_stay_while_the_server_is_away(kubernetes: Cluster, door: Gate, tmp_path: Path) -> None:
    await kubernetes.request("POST", KUBEVIRTS, kubevirt(FULL))
    await kubernetes.request("POST", CONFIG_MAPS, config_map(CERTIFICATE))
    async with following(kubernetes, tmp_path, door.url) as followed:
        await eventually(lambda: len(followed.told) == 1, "the settings")
        await door.close()
        await eventually(lambda: followed.kubevirt.problem is not None, "the problem")
        assert followed.kubevirt.settings == followed.told[0]
        await door.open()
        await eventually(lambda: followed.kubevirt.problem is None, "its end")
        assert len(followed.told) == 1


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"spec": None},
        {"spec": {"configuration": {"migrations": 3, "tlsConfiguration": []}}},
        {"spec": {"configuration": {"migrations": {"disableTLS": "yes", "network": ""}}}},
        {"spec": {"configuration": {"tlsConfiguration": {"minTLSVersion": 3, "ciphers": "x"}}}},
    ],
)
def test_what_is_not_configured_is_the_default(document: dict[str, Any]) -> None:
    assert parse_kubevirt(document) == ClusterSettings()


def test_options_override_the_cluster_one_by_one() -> None:
    cluster = ClusterSettings(True, "migration", "VersionTLS12", ("A",), CERTIFICATE)
    assert merge(cluster, Overrides()) == cluster
    given = Overrides(False, "other", "VersionTLS13", ("B",), "pem")
    assert merge(cluster, given) == ClusterSettings(False, "other", "VersionTLS13", ("B",), "pem")
    assert merge(cluster, Overrides(disable_tls=False)).network == "migration"


@pytest.mark.parametrize(
    ("options", "network", "told"),
    [
        ({}, "x", ["KubeVirt has a migration network, and this node is not on it"]),
        ({}, None, []),
        ({"migration_address": "127.0.0.1"}, "x", []),
        ({"migration_interface": "lo"}, "x", []),
    ],
)
def test_node_that_is_not_on_the_migration_network_is_told(
    options: dict[str, Any], network: str | None, told: list[str]
) -> None:
    with capture_logs() as logs:
        warn_without_network(Settings(**options), ClusterSettings(network=network))
    assert [entry["event"] for entry in logs] == told


async def test_status_shows_the_settings(kubernetes: Cluster, tmp_path: Path) -> None:
    await kubernetes.request("POST", KUBEVIRTS, kubevirt(FULL))
    async with following(kubernetes, tmp_path) as followed:
        await eventually(lambda: len(followed.told) == 1, "the settings")
        report = {
            "node": "node01",
            "address": "10.1.1.1",
            "ready": True,
            "draining": False,
            "problems": {},
            "flaws": {"count": 0, "first": {}},
            "ended_dropped": 0,
            "log": {"lines_lost": 0, "problem": None},
            "budget": {"connections": 0, "capacity": 100, "limit": "files"},
            "migrations": [],
            "tls": {"errors": {}},
            "relay": {"pid": 1, "connections": 0, "problem": None},
            "cluster": followed.kubevirt.report(),
        }
    shown = render(report)
    assert "KubeVirt in kubevirt: TLS off; migration network migration; 0 CA certificates" in shown
    assert "has no ConfigMap kubevirt-ca" in shown
