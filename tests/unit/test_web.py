"""The HTTP server on loopback: what it answers, and why it does not start."""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from structlog.testing import capture_logs

from migproxy import pages, web
from migproxy.measure import Measures
from migproxy.settings import SettingsError, load, parse_listen
from tests.clock import Clock
from tests.unit.test_metrics import migration, report

pytestmark = pytest.mark.tier("gate")


class FakeNode:
    def __init__(self, migrations: int = 1) -> None:
        self.checks: dict[str, str | None] = {"synchronised": None, "address": None}
        self.hangs: list[str] = []
        self.reports = 0
        self.measures = Measures()
        self._migrations = [migration(name=f"vmi-{number}") for number in range(migrations)]

    def report(self) -> dict[str, Any]:
        self.reports += 1
        return report(*self._migrations)

    def refused(self) -> dict[str, int]:
        """How many HTTP connections were refused for which reason, of those for which any were."""
        (family,) = self.measures.http_refused.collect()
        samples = [one for one in family.samples if one.name.endswith("_total") and one.value]
        return {one.labels["reason"]: int(one.value) for one in samples}


@asynccontextmanager
async def served(node: FakeNode, host: str = "127.0.0.1", **options: Any) -> AsyncIterator[str]:
    made = web.HTTPOptions(host, 0, **options)
    async with web.serve(made, node.report, lambda: node.checks, node.measures, lambda: node.hangs) as url:
        yield url


def send(url: str, data: bytes) -> None:
    """Sends what need not be HTTP, and returns when the server has closed."""
    host, _, port = url.rstrip("/").rpartition("/")[2].rpartition(":")
    with socket.create_connection((host, int(port))) as connection, suppress(ConnectionResetError):
        connection.sendall(data)
        while connection.recv(4096):
            pass


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


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ("gzip, deflate, br", True),
        ("deflate, GZIP;q=0.5", True),
        ("gzip; q=1.0", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000, identity", False),
        ("x-gzip, *", False),
        ("", False),
    ],
)
async def test_what_is_large_is_compressed_where_that_is_asked_for(header: str, taken: bool) -> None:
    assert pages.accepts(header, "gzip") is taken
    async with served(FakeNode(migrations=20)) as url, aiohttp.ClientSession(auto_decompress=False) as session:
        for path in ("", "metrics", "api/status"):
            async with session.get(url + path, headers={"Accept-Encoding": header}) as answer:
                body = await answer.read()
                assert answer.headers.get("Content-Encoding") == ("gzip" if taken else None)
                assert answer.headers["Vary"] == "Accept-Encoding"
                plain = gzip.decompress(body) if taken else body
            async with session.get(url + path, headers={"Accept-Encoding": "identity"}) as answer:
                assert (plain == await answer.read()) or path == "metrics", "metrics tell of this process, too"
            assert not taken or len(body) < len(plain) / 2


async def test_the_status_is_json_without_white_space() -> None:
    node = FakeNode(migrations=2)
    async with served(node) as url:
        _, kind, text = await get(f"{url}api/status")
    assert kind == "application/json"
    assert json.loads(text) == node.report()
    assert text == json.dumps(node.report(), separators=(",", ":"))


@pytest.mark.simulated_time
@pytest.mark.parametrize("path", ["metrics", "api/status"])
async def test_who_asks_within_a_second_shares_one_answer(path: str, clock: Clock) -> None:
    node = FakeNode()
    async with served(node) as url:
        await asyncio.gather(*(get(url + path) for _ in range(5)))
        await asyncio.sleep(0.9)
        await get(url + path)
        assert node.reports == 1
        await asyncio.sleep(0.2)
        await get(url + path)
        assert node.reports == 2
        await get(url + path, headers={"Accept-Encoding": "identity"})
        assert node.reports == 3, "another variant is another answer"


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"\x16\x03\x01\x02\x00\x01", "it is TLS, and this port"), (b"GET / HTTP/9.9\r\n\r\n", "its first line is not")],
)
async def test_what_is_no_request_is_counted_and_a_flood_of_it_told_in_a_few_lines(data: bytes, error: str) -> None:
    node = FakeNode()
    with capture_logs() as lines:
        async with served(node) as url:
            for _ in range(20):
                await asyncio.to_thread(send, url, data)
    assert node.refused() == {"malformed": 20}
    *first, last = lines
    assert len(first) == 5
    for line in first:
        assert line["event"] == "HTTP connection refused"
        assert (line["reason"], line["peer"]) == ("malformed", "127.0.0.1")
        assert line["error"].startswith(error)
    assert (last["event"], last["count"]) == ("more HTTP connections refused", 15)


async def test_a_report_that_cannot_be_made_is_told_and_costs_that_request_alone() -> None:
    node = FakeNode()
    node.report = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    with capture_logs() as lines:
        async with served(node) as url:
            assert (await get(f"{url}api/status"))[0] == 500
            assert (await get(f"{url}healthz"))[0] == 200
    (line,) = lines
    assert line["event"] == "HTTP request cannot be answered"
    assert isinstance(line["exc_info"], ZeroDivisionError)
    assert node.refused() == {"error": 1}


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


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("192.0.2.1", "not an address of this machine"),
        ("fe80::1%nonesuch", "there is no interface of the name after the %"),
    ],
)
async def test_a_foreign_address_is_named(host: str, why: str) -> None:
    options = web.HTTPOptions(host, 0)
    with pytest.raises(web.HTTPError, match=rf"--http-listen \[?{host}\]?:0: .*{why}"):
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


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_what_is_not_tls_is_counted_on_https_and_costs_nobody(run: Any, tmp_path: Path) -> None:
    node = FakeNode()
    trust = ssl.create_default_context()

    async def ask() -> None:
        async with served(node, **write_certificate(tmp_path, "localhost")) as url:
            trust.load_verify_locations(tmp_path / "tls.crt")
            for data in (b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n"):
                await asyncio.to_thread(send, url, data)
            trust.check_hostname = False
            assert (await get(f"{url}healthz", ssl=trust))[::2] == (200, "ok\n")

    with capture_logs() as lines:
        run(ask())
    assert node.refused() == {"tls": 2}
    assert [(line["event"], line["reason"]) for line in lines] == [("HTTP connection refused", "tls")] * 2


@pytest.mark.parametrize(("name", "why"), [("none", "No such file"), ("fifo", "one is no regular file")])
async def test_certificates_that_cannot_be_used_are_named(tmp_path: Path, name: str, why: str) -> None:
    os.mkfifo(tmp_path / "fifo.crt")  # nobody waits for its writer
    paths = {"certificate": str(tmp_path / f"{name}.crt"), "key": str(tmp_path / f"{name}.key")}
    with pytest.raises(web.HTTPError, match=rf"--http-tls-cert .*{name}\.crt.*{why}"):
        async with served(FakeNode(), **paths):
            pass


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (":9470", ("", 9470)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[fd00::1]:80", ("fd00::1", 80)),
        ("[10.1.1.1]:80", ("10.1.1.1", 80)),
        ("[::ffff:10.1.1.1]:80", ("10.1.1.1", 80)),
        ("[fe80::1%migration0]:80", ("fe80::1%migration0", 80)),
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
