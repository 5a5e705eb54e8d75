"""What protects the connections in a cluster: KubeVirt's settings, less what options override."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from migproxy.devcerts import make
from migproxy.kube.cluster import ClusterSettings
from migproxy.security import ClusterSecurity, OptionsSecurity, SecurityError
from migproxy.settings import Settings
from migproxy.tlserrors import Reason, TLSError
from migproxy.transport import Transport
from tests.clock import Clock

pytestmark = pytest.mark.tier("gate")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "set"
    make(str(folder), 1)
    return folder


def settings(certificates: Path, run: Path, **given: Any) -> Settings:
    """As a node's: KubeVirt's certificates are mounted, its CA is not."""
    pairs = {"tls_server_dir": str(certificates / "server"), "tls_client_dir": str(certificates / "client")}
    return Settings.model_validate(pairs | {"control_socket": str(run / "control.sock"), "ktls": "off"} | given)


def cluster(certificates: Path, **values: Any) -> ClusterSettings:
    return ClusterSettings(ca_bundle=(certificates / "ca.crt").read_text(), **values)


async def connect(security: OptionsSecurity) -> tuple[Transport, Transport]:
    """Both roles of one node's, with each other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    for end in (client, server):
        end.setblocking(False)
    try:
        sides = (security.secure(client, server=False), security.secure(server, server=True))
        source, target = await asyncio.gather(*sides)
    except BaseException:
        client.close()
        server.close()
        raise
    return source, target


async def label(security: OptionsSecurity) -> str:
    source, target = await connect(security)
    source.tcp.close()
    target.tcp.close()
    return source.label


async def test_before_the_cluster_is_known_nothing_is_relayed_and_never_in_plaintext(
    certificates: Path, tmp_path: Path
) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path))
    with pytest.raises(TLSError, match="not known yet") as refused:
        await connect(security)
    assert refused.value.reason == Reason.NO_CREDENTIALS
    assert "not known yet" in security.report()["problem"]


@pytest.mark.simulated_time
async def test_connections_wait_for_the_cluster_and_not_for_ever(
    certificates: Path, tmp_path: Path, clock: Clock
) -> None:
    given = settings(certificates, tmp_path, tls_ca=str(certificates / "ca.crt"))
    security = ClusterSecurity(given)
    waiting = asyncio.create_task(security.settled())
    await asyncio.sleep(0)
    assert (waiting.done(), security.encrypts) == (False, None)
    security.apply(cluster(certificates, disable_tls=True))
    await waiting
    assert security.encrypts is False
    assert clock() == 0

    security = ClusterSecurity(given)
    await asyncio.sleep(9.9)
    assert (security.encrypts, clock()) == (None, 9.9)
    await security.settled()
    assert clock() == 10
    assert security.encrypts is True
    assert (await label(security)).startswith("TLS")


async def test_the_clusters_ca_is_used_and_kept_for_a_restart_without_the_api(
    certificates: Path, tmp_path: Path
) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path))
    security.apply(cluster(certificates))
    assert (await label(security)).startswith("TLSv1.3")
    assert security.problem is None
    assert (tmp_path / "kubevirt-ca.crt").read_text() == (certificates / "ca.crt").read_text()


async def test_a_link_in_the_place_of_the_clusters_ca_is_told_and_not_followed(
    certificates: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("a file of root's")
    (tmp_path / "kubevirt-ca.crt").symlink_to(tmp_path / "precious")
    security = ClusterSecurity(settings(certificates, tmp_path))
    security.apply(cluster(certificates))
    told = f"cannot keep KubeVirt's CA in {tmp_path}/kubevirt-ca.crt: a symbolic link stands there"
    assert told in (security.problem or "")
    assert (tmp_path / "precious").read_text() == "a file of root's"


async def test_plaintext_is_what_kubevirts_disable_tls_asks_for_and_ends_with_it(
    certificates: Path, tmp_path: Path
) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path))
    security.apply(cluster(certificates, disable_tls=True))
    assert await label(security) == "plaintext"
    security.apply(cluster(certificates))
    assert (await label(security)).startswith("TLS")


@pytest.mark.parametrize(("given", "wanted"), [({"disable_tls": True}, "plaintext"), ({"disable_tls": False}, "TLSv")])
async def test_the_option_beats_the_cluster_both_ways(
    certificates: Path, tmp_path: Path, given: dict[str, Any], wanted: str
) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path, **given))
    security.apply(cluster(certificates, disable_tls=not given["disable_tls"]))
    assert (await label(security)).startswith(wanted)


async def test_version_and_ciphers_are_the_clusters(certificates: Path, tmp_path: Path) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path))
    security.apply(cluster(certificates, min_tls="VersionTLS13"))
    assert security.report()["min_version"] == "1.3"
    security.apply(cluster(certificates, min_tls="VersionTLS12"))
    assert security.report()["min_version"] == "1.2"


@pytest.mark.parametrize(
    ("min_tls", "warns"), [("VersionTLS10", False), ("VersionTLS11", False), ("VersionTLS14", True), ("1.1", True)]
)
async def test_a_cluster_that_allows_older_or_unknown_versions_has_1_2(
    certificates: Path, tmp_path: Path, min_tls: str, warns: bool
) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path))
    security.apply(cluster(certificates, min_tls="VersionTLS13"))
    with structlog.testing.capture_logs() as logs:
        security.apply(cluster(certificates, min_tls=min_tls))
    assert security.problem is None
    assert security.report()["min_version"] == "1.2"
    assert [line["unknown"] for line in logs if "minTLSVersion" in line["event"]] == [min_tls] * warns


GOOD, OLD, NEWER = (
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
)


@pytest.mark.parametrize(
    ("ciphers", "min_tls", "left_out"),
    [
        ((GOOD,), None, ()),
        ((GOOD, "TLS_OF_NEXT_YEAR", OLD), None, (OLD, "TLS_OF_NEXT_YEAR")),
        (("TLS_OF_NEXT_YEAR",), None, ("TLS_OF_NEXT_YEAR",)),
        ((OLD,), "VersionTLS12", (OLD,)),
        ((NEWER,), None, (NEWER,)),
        ((NEWER, OLD), "VersionTLS10", (NEWER, OLD)),
        ((NEWER,), "VersionTLS13", ()),
        ((NEWER, OLD), "VersionTLS13", (OLD,)),
        ((OLD,), "VersionTLS13", (OLD,)),
    ],
)
async def test_ciphers_of_the_cluster_that_cannot_be_used_are_left_out(
    certificates: Path, tmp_path: Path, ciphers: tuple[str, ...], min_tls: str | None, left_out: tuple[str, ...]
) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path))
    with structlog.testing.capture_logs() as logs:
        security.apply(cluster(certificates, ciphers=ciphers, min_tls=min_tls))
    assert security.problem is None
    assert [line["left_out"] for line in logs if line["log_level"] == "warning"] == [left_out] * bool(left_out)
    shown = await label(security)
    assert (NEWER in shown) == (NEWER in ciphers and NEWER not in left_out), shown


async def test_unknown_ciphers_of_the_options_are_an_error_with_a_cluster_too(
    certificates: Path, tmp_path: Path
) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path, tls_ciphers=("TLS_OF_NEXT_YEAR",)))
    security.apply(cluster(certificates, ciphers=(GOOD,)))
    assert "TLS_OF_NEXT_YEAR is not known" in security.report()["problem"]


async def test_a_setting_that_cannot_be_followed_leaves_the_last_good_one(certificates: Path, tmp_path: Path) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path))
    security.apply(cluster(certificates))
    security.apply(ClusterSettings(ca_bundle="no certificate"))
    assert "cannot be followed" in security.report()["problem"]
    assert (await label(security)).startswith("TLS")


async def test_refusals_are_counted_across_changes(certificates: Path, tmp_path: Path) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path))
    security.errors[Reason.WRONG_CA] += 1
    security.apply(cluster(certificates))
    security.apply(cluster(certificates, min_tls="VersionTLS13"))
    assert security.report()["errors"] == {Reason.WRONG_CA: 1}


async def test_other_options_count_at_once_and_wrong_ones_change_nothing(certificates: Path, tmp_path: Path) -> None:
    ca = {"tls_ca": str(certificates / "ca.crt")}
    security = OptionsSecurity(settings(certificates, tmp_path, **ca))
    with pytest.raises(SecurityError, match="nowhere"):
        security.reconfigure(settings(certificates, tmp_path, **ca | {"tls_server_dir": "/nowhere"}))
    assert (await label(security)).startswith("TLS")
    security.reconfigure(settings(certificates, tmp_path, **ca, tls_min_version="1.3"))
    assert security.report()["min_version"] == "1.3"
    security.reconfigure(settings(certificates, tmp_path, disable_tls=True))
    assert await label(security) == "plaintext"


async def test_an_option_taken_back_leaves_the_cluster_to_decide(certificates: Path, tmp_path: Path) -> None:
    security = ClusterSecurity(settings(certificates, tmp_path, disable_tls=True))
    security.apply(cluster(certificates))
    assert await label(security) == "plaintext"
    security.reconfigure(settings(certificates, tmp_path))
    assert (await label(security)).startswith("TLS")
    with pytest.raises(SecurityError, match="nowhere"):
        security.reconfigure(settings(certificates, tmp_path, tls_server_dir="/nowhere"))
    security.apply(cluster(certificates, min_tls="VersionTLS13"))
    assert security.problem is None, "the options are still those before"
