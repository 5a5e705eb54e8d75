"""The HTTP server on loopback: what it answers, and why it does not start."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from migproxy import web
from migproxy.measure import Measures
from migproxy.settings import SettingsError, load, parse_listen
from tests.unit.test_metrics import migration, report

pytestmark = pytest.mark.tier("gate")


class FakeNode:
    def __init__(self) -> None:
        self.checks: dict[str, str | None] = {"synchronised": None, "address": None}
        self.hangs: list[str] = []

    def report(self) -> dict[str, Any]:
        return report(migration())


@asynccontextmanager
async def served(node: FakeNode, host: str = "127.0.0.1", **options: Any) -> AsyncIterator[str]:
    made = web.HTTPOptions(host, 0, **options)
    async with web.serve(made, node.report, lambda: node.checks, Measures(), lambda: node.hangs) as url:
        yield url


async def get(url: str, **options: Any) -> tuple[int, str, str]:
    async with aiohttp.ClientSession() as session, session.get(url, **options) as answer:
        return answer.status, answer.content_type, await answer.text()


async def test_readiness_names_each_check_and_why_it_fails() -> None:
    node = FakeNode()
    async with served(node) as url:
        assert await get(f"{url}readyz") == (200, "text/plain", "[+] synchronised: ok\n[+] address: ok\n")
        node.checks["address"] = "interface migration0 is down"
        status, _, text = await get(f"{url}readyz")
        assert (status, text) == (503, "[+] synchronised: ok\n[-] address: interface migration0 is down\n")
        assert (await get(f"{url}healthz"))[0] == 200, "a node that is not ready is alive"


async def test_a_daemon_that_hangs_is_not_alive_and_says_why() -> None:
    node = FakeNode()
    async with served(node) as url:
        assert await get(f"{url}healthz") == (200, "text/plain", "ok\n")
        node.hangs.append("the disk hangs: /run/state.json")
        assert await get(f"{url}healthz") == (503, "text/plain", "the disk hangs: /run/state.json\n")


async def test_the_format_of_metrics_is_negotiated() -> None:
    async with served(FakeNode()) as url:
        assert (await get(f"{url}metrics"))[1] == "text/plain"
        wanted = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
        _, kind, text = await get(f"{url}metrics", headers=wanted)
        assert kind == "application/openmetrics-text"
        assert text.endswith("# EOF\n")


async def test_the_page_may_load_nothing_from_elsewhere() -> None:
    async with served(FakeNode()) as url, aiohttp.ClientSession() as session, session.get(url) as page:
        policy = page.headers["Content-Security-Policy"]
        text = await page.text()
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_without_an_address_both_families_are_answered() -> None:
    async with served(FakeNode(), host="") as url:
        port = url.rstrip("/").rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            assert (await get(f"http://{host}:{port}/healthz"))[0] == 200


async def test_a_taken_port_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        options = web.HTTPOptions("127.0.0.1", port)
        with pytest.raises(web.HTTPError, match=rf"--http-listen 127.0.0.1:{port}: .*in use.*ss -ltnp"):
            async with web.serve(options, dict, dict, Measures(), list):
                pass


async def test_a_foreign_address_is_named() -> None:
    options = web.HTTPOptions("192.0.2.1", 0)
    with pytest.raises(web.HTTPError, match=r"192\.0\.2\.1:0: .*not an address of this machine"):
        async with web.serve(options, dict, dict, Measures(), list):
            pass


def write_certificate(folder: Path, name: str) -> dict[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "tls.key").write_bytes(key.private_bytes(*pem))
    return {"certificate": str(folder / "tls.crt"), "key": str(folder / "tls.key")}


async def test_https_uses_files_that_were_replaced_from_the_next_connection_on(tmp_path: Path) -> None:
    def presented(port: int) -> str:
        pem = ssl.get_server_certificate(("127.0.0.1", port))
        return x509.load_pem_x509_certificate(pem.encode()).subject.rfc4514_string()

    paths = write_certificate(tmp_path, "first")
    async with served(FakeNode(), **paths) as url:
        assert url.startswith("https://")
        port = int(url.rstrip("/").rpartition(":")[2])
        assert await asyncio.to_thread(presented, port) == "CN=first"
        write_certificate(tmp_path, "second")
        assert await asyncio.to_thread(presented, port) == "CN=second"
        Path(paths["certificate"]).write_text("half")
        assert await asyncio.to_thread(presented, port) == "CN=second"


async def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    paths = {"certificate": str(tmp_path / "none.crt"), "key": str(tmp_path / "none.key")}
    with pytest.raises(web.HTTPError, match=r"--http-tls-cert .*none\.crt.*No such file"):
        async with served(FakeNode(), **paths):
            pass


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (":9470", ("", 9470)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[fd00::1]:80", ("fd00::1", 80)),
        ("off", None),
    ],
)
def test_listen_addresses(text: str, where: tuple[str, int] | None) -> None:
    assert parse_listen(text) == where


@pytest.mark.parametrize("text", ["9470", "", ":", ":x", ":70000", "fd00::1:80", "host:80", "[::1]", "1.2.3:4"])
def test_bad_listen_addresses_are_named(text: str) -> None:
    with pytest.raises(SettingsError, match="--http-listen"):
        load({"vmi_dir": "/", "http_listen": text}, {}, None)


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(SettingsError, match="--http-tls-cert and --http-tls-key"):
        load({"vmi_dir": "/", "http_tls_cert": "a"}, {}, None)
