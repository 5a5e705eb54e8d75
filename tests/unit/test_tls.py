"""mTLS on loopback: who is let in, who is not and why, and what crosses unchanged."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from migproxy import devcerts, offload, pki
from migproxy.credentials import Validity
from migproxy.ktls import check_control
from migproxy.pki import CLIENT_NAMES, OLDER_CLIENT_NAME, SERVER_NAMES, locate
from migproxy.settings import Settings
from migproxy.tls import Awaits, MutualTLS, SecurityError, Suites, TLSOptions, Unfinished, parse_ciphers
from migproxy.tlserrors import Reason, TLSError
from migproxy.transport import Transport
from migproxy.verify import Peers
from tests.certificates import (
    CLIENT,
    DAY,
    SERVER,
    SOURCE,
    TARGET,
    Cluster,
    Issued,
    Leaf,
    SecretMount,
    authority,
    client_context,
    self_signed,
    server_context,
)
from tests.clock import Clock

pytestmark = pytest.mark.tier("gate")

DEADLINE = 60.0


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster.make(tmp_path / "pki")


@contextlib.contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection, not blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        for end in (near, far):
            end.setblocking(False)
        yield near, far


async def outcome(secured: Awaitable[Transport]) -> Transport | TLSError:
    """What became of a handshake."""
    async with asyncio.timeout(DEADLINE):
        try:
            return await secured
        except TLSError as error:
            return error


async def shake(source: MutualTLS, target: MutualTLS) -> tuple[Transport | TLSError, Transport | TLSError]:
    """Lets two nodes shake hands; returns what the source and what the target made of it."""
    with connection() as (near, far):

        async def side(security: MutualTLS, sock: socket.socket, *, server: bool) -> Transport | TLSError:
            result = await outcome(security.secure(sock, server=server))
            if isinstance(result, TLSError):
                sock.close()  # as its owner does
            return result

        source_made, target_made = await asyncio.gather(
            side(source, near, server=False), side(target, far, server=True)
        )
        return source_made, target_made


def other(cluster: Cluster, folder: Path, **members: Issued) -> Cluster:
    """A node with the cluster's certificates but for some."""
    node = replace(cluster, folder=folder, **members)
    folder.mkdir()
    node.write()
    return node


STRANGER = authority("stranger")
INTERMEDIATE = Leaf(names=("intermediate",), usages=None, ca=True)

# How each is made of the cluster's CA and of a certificate that would be good, and why it is refused.
BAD: dict[str, tuple[Callable[[Issued, Leaf], Issued], Reason]] = {
    "self-signed": (lambda ca, good: self_signed(good), Reason.SELF_SIGNED),
    "expired": (lambda ca, good: ca.issue(replace(good, begins=-2 * DAY, ends=-DAY)), Reason.EXPIRED),
    "not-yet-valid": (lambda ca, good: ca.issue(replace(good, begins=DAY, ends=2 * DAY)), Reason.NOT_YET_VALID),
    "wrong-ca": (lambda ca, good: STRANGER.issue(good), Reason.WRONG_CA),
    "a-ca-of-the-same-name": (lambda ca, good: authority().issue(good), Reason.WRONG_CA),
    "wrong-usage": (
        lambda ca, good: ca.issue(replace(good, usages=(SERVER,) if good is SOURCE else (CLIENT,))),
        Reason.WRONG_USAGE,
    ),
    "wrong-name": (lambda ca, good: ca.issue(replace(good, names=("kubevirt.io:system",))), Reason.WRONG_NAME),
    "no-name": (lambda ca, good: ca.issue(replace(good, names=())), Reason.WRONG_NAME),
    "embedded-nul": (
        lambda ca, good: ca.issue(replace(good, names=(good.names[0] + "\0.example.com",))),
        Reason.WRONG_NAME,
    ),
    "longer-name": (lambda ca, good: ca.issue(replace(good, names=(good.names[0] + "2",))), Reason.WRONG_NAME),
    "name-as-suffix": (lambda ca, good: ca.issue(replace(good, names=("x" + good.names[0],))), Reason.WRONG_NAME),
    "two-names": (lambda ca, good: ca.issue(replace(good, names=("other", good.names[0]))), Reason.WRONG_NAME),
    "a-ca-as-leaf": (lambda ca, good: ca.issue(replace(good, ca=True)), Reason.CA_AS_LEAF),
    "an-intermediate-as-leaf": (
        lambda ca, good: ca.issue(replace(good, ca=True, usages=None, sign_only=True)),
        Reason.WRONG_USAGE,  # OpenSSL is first to see that its key usage is signing certificates alone
    ),
    "the-root-as-leaf": (lambda ca, good: ca, Reason.CA_AS_LEAF),
    "by-an-intermediate": (lambda ca, good: ca.issue(INTERMEDIATE).issue(good), Reason.INTERMEDIATE),
    "by-a-leaf": (lambda ca, good: ca.issue(replace(good, names=("leaf",))).issue(good), Reason.WRONG_CA),
}


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("case", BAD)
async def test_a_target_refuses_a_source_with(cluster: Cluster, tmp_path: Path, case: str, version: str) -> None:
    make, reason = BAD[case]
    source = other(cluster, tmp_path / "bad", source=make(cluster.ca, SOURCE)).security()
    _, refused = await shake(source, cluster.security(min_version=version))
    assert isinstance(refused, TLSError)
    assert refused.reason == reason


@pytest.mark.parametrize("case", BAD)
async def test_a_source_refuses_a_target_with(cluster: Cluster, tmp_path: Path, case: str) -> None:
    make, reason = BAD[case]
    target = other(cluster, tmp_path / "bad", target=make(cluster.ca, TARGET)).security()
    refused, _ = await shake(cluster.security(), target)
    assert isinstance(refused, TLSError)
    assert refused.reason == reason


ALERTS = {
    Reason.SELF_SIGNED: "UNKNOWN_CA",
    Reason.WRONG_CA: "UNKNOWN_CA",
    Reason.INTERMEDIATE: "UNKNOWN_CA",
    Reason.EXPIRED: "CERTIFICATE_EXPIRED",
    Reason.NOT_YET_VALID: "BAD_CERTIFICATE",
    Reason.CA_AS_LEAF: "BAD_CERTIFICATE",
    Reason.WRONG_USAGE: "UNSUPPORTED_CERTIFICATE",
    Reason.WRONG_NAME: "ACCESS_DENIED",
}


@pytest.mark.parametrize(
    ("case", "role", "version"),
    [
        pytest.param(case, role, version, id=f"{case}-{role}-{version.name}")
        for case in BAD
        for role in ("source", "target")
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        # Of a certificate that may sign nothing but certificates, OpenSSL's server of TLS 1.2 makes no use.
        if (case, role, version) != ("an-intermediate-as-leaf", "target", ssl.TLSVersion.TLSv1_2)
    ],
)
async def test_whoever_is_refused_is_told_why(
    cluster: Cluster, tmp_path: Path, case: str, role: str, version: ssl.TLSVersion
) -> None:
    """By the alert that the peer's own log shows; the peer is the standard library."""
    make, reason = BAD[case]
    is_client = role == "source"
    shown = make(cluster.ca, SOURCE if is_client else TARGET).write(tmp_path / "bad")
    ca = cluster.folder / "ca.crt"
    peer = client_context(ca, shown) if is_client else server_context(ca, shown)
    peer.minimum_version = peer.maximum_version = version
    told: list[ssl.SSLError] = []

    def talk(near: socket.socket) -> None:
        with contextlib.suppress(ssl.SSLEOFError, ConnectionError):
            try:
                with peer.wrap_socket(near, server_side=not is_client) as tls:
                    tls.recv(1)
            except ssl.SSLError as error:
                told.append(error)
                raise

    refused = await shake_with(talk, cluster.security(), peer_is_client=is_client)
    assert refused.reason == reason
    assert [str(error.reason).partition("ALERT_")[2] for error in told] == [ALERTS[reason]]


async def test_the_former_name_of_sources_is_refused_unless_it_is_configured(cluster: Cluster, tmp_path: Path) -> None:
    """virt-api has it, too."""
    older = other(cluster, tmp_path / "older", source=cluster.ca.issue(replace(SOURCE, names=(OLDER_CLIENT_NAME,))))
    default = Settings(vmi_dir="/vmis", node_name="node").tls_client_names
    _, refused = await shake(older.security(), cluster.security(sources=Peers(default)))
    assert isinstance(refused, TLSError)
    assert refused.reason is Reason.WRONG_NAME


GOOD: dict[str, tuple[Callable[[Issued], Issued], dict[str, object]]] = {
    "today's": (lambda ca: ca.issue(SOURCE), {}),
    "the former, where it is configured": (
        lambda ca: ca.issue(replace(SOURCE, names=(OLDER_CLIENT_NAME,))),
        {"sources": Peers((*CLIENT_NAMES, OLDER_CLIENT_NAME))},
    ),
    "for both roles": (lambda ca: ca.issue(replace(SOURCE, usages=(SERVER, CLIENT))), {}),
    "for every use, as Go has it": (lambda ca: ca.issue(replace(SOURCE, usages=None)), {}),
    "a name of the configuration": (
        lambda ca: ca.issue(replace(SOURCE, names=("mine",))),
        {"sources": Peers(("mine", "yours"))},
    ),
    "externally managed": (
        lambda ca: ca.issue(INTERMEDIATE).issue(replace(SOURCE, names=("whoever",))),
        {"sources": Peers(CLIENT_NAMES, externally_managed=True)},
    ),
}


@pytest.mark.parametrize("case", GOOD)
async def test_a_target_accepts(cluster: Cluster, tmp_path: Path, case: str) -> None:
    make, changes = GOOD[case]
    source = other(cluster, tmp_path / "good", source=make(cluster.ca)).security()
    assert not [end for end in await shake(source, cluster.security(**changes)) if isinstance(end, TLSError)]


async def test_an_externally_managed_ca_still_has_to_be_the_right_one_for_the_right_use(
    cluster: Cluster, tmp_path: Path
) -> None:
    target = cluster.security(sources=Peers((), externally_managed=True))
    for number, (issued, reason) in enumerate(
        [
            (STRANGER.issue(INTERMEDIATE).issue(SOURCE), Reason.WRONG_CA),
            (cluster.ca.issue(replace(SOURCE, usages=(SERVER,))), Reason.WRONG_USAGE),
        ]
    ):
        source = other(cluster, tmp_path / str(number), source=issued).security()
        _, refused = await shake(source, target)
        assert isinstance(refused, TLSError)
        assert refused.reason == reason


async def say(sock: socket.socket, words: bytes) -> None:
    """Sends what is no handshake, and waits for the end of the connection."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, words)
    with contextlib.suppress(ConnectionResetError):
        while await loop.sock_recv(sock, 4096):
            pass


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", Reason.NOT_TLS, id="http"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Reason.NOT_TLS, id="http2"),
        pytest.param(b"\x00" * 100, Reason.NOT_TLS, id="zeroes"),
        pytest.param(b"\x28\x00\x00\x00\x20\x00\x80\x86" * 8, Reason.NOT_TLS, id="libvirt-rpc"),
        pytest.param(b"\x16\x03\x01\xff\xff" + b"x" * 100, Reason.NOT_TLS, id="oversized-record"),
    ],
)
async def test_who_does_not_speak_tls_is_refused(cluster: Cluster, words: bytes, reason: Reason) -> None:
    with connection() as (near, far):
        talking = asyncio.create_task(say(near, words))
        refused = await outcome(cluster.security().secure(far, server=True))
        far.close()
        await talking
    assert isinstance(refused, TLSError)
    assert refused.reason == reason


@pytest.mark.simulated_time
async def test_a_silent_peer_is_refused_when_its_time_is_up(cluster: Cluster, clock: Clock) -> None:
    with connection() as (_, far):
        refused = await outcome(cluster.security().secure(far, server=True))
    assert clock() == 10
    assert isinstance(refused, TLSError)
    assert refused.reason == Reason.TIMEOUT
    assert "10 s" in str(refused)


async def test_a_peer_that_leaves_during_the_handshake_is_said_to_have_left(cluster: Cluster) -> None:
    with connection() as (near, far):
        near.close()
        refused = await outcome(cluster.security().secure(far, server=True))
    assert isinstance(refused, TLSError)
    assert refused.reason == Reason.CLOSED


async def shake_with(
    peer: ssl.SSLContext | Callable[[socket.socket], None], security: MutualTLS, *, peer_is_client: bool
) -> TLSError:
    """Lets a peer that is not ours shake hands with a node that is to refuse it; returns why it did."""
    with connection() as (near, far):
        near.setblocking(True)
        near.settimeout(DEADLINE)

        def theirs() -> None:
            with contextlib.suppress(OSError):
                if not isinstance(peer, ssl.SSLContext):
                    peer(near)
                    return
                with peer.wrap_socket(near, server_side=not peer_is_client) as tls:
                    tls.recv(1)

        running = asyncio.create_task(asyncio.to_thread(theirs))
        refused = await outcome(security.secure(far, server=peer_is_client))
        far.close()
        await running
    assert isinstance(refused, TLSError)
    return refused


def context_of(cluster: Cluster, *, certificate: bool = True) -> ssl.SSLContext:
    return client_context(cluster.folder / "ca.crt", cluster.folder / "client" if certificate else None)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_a_source_without_a_certificate_is_refused(cluster: Cluster, version: str) -> None:
    refused = await shake_with(
        context_of(cluster, certificate=False), cluster.security(min_version=version), peer_is_client=True
    )
    assert refused.reason == Reason.NO_CERTIFICATE


async def test_an_old_version_is_refused_and_so_is_an_old_cipher(cluster: Cluster) -> None:
    old = context_of(cluster)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    refused = await shake_with(old, cluster.security(min_version="1.3"), peer_is_client=True)
    assert refused.reason == Reason.VERSION
    old.set_ciphers("ECDHE-ECDSA-AES128-SHA256")
    refused = await shake_with(old, cluster.security(), peer_is_client=True)
    assert refused.reason == Reason.CIPHER


async def test_tls_1_1_is_refused(cluster: Cluster) -> None:
    oldest = context_of(cluster)
    oldest.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        oldest.minimum_version, oldest.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    refused = await shake_with(oldest, cluster.security(), peer_is_client=True)
    assert refused.reason == Reason.VERSION


async def test_sessions_are_not_resumed(cluster: Cluster) -> None:
    """A client of TLS 1.2 that offers the last session gets a whole handshake."""
    target = cluster.security()
    context = context_of(cluster)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    session: ssl.SSLSession | None = None
    reused = []
    for _ in range(3):
        with connection() as (near, far):
            near.setblocking(True)
            near.settimeout(DEADLINE)

            def theirs(near: socket.socket = near, session: ssl.SSLSession | None = session) -> ssl.SSLSession | None:
                with context.wrap_socket(near, session=session) as tls:
                    reused.append(tls.session_reused)
                    return tls.session

            running = asyncio.create_task(asyncio.to_thread(theirs))
            assert isinstance(await outcome(target.secure(far, server=True)), Transport)
            session = await running
    assert reused == [False] * 3


class Crowd:
    """Handshakes of one listener that are not finished.

    Attributes:
        unfinished: Under test.
        given_up: Their names, sorted.
    """

    def __init__(self, limit: int) -> None:
        self.unfinished = Unfinished(limit)
        self.given_up: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._done = asyncio.Event()

    async def begin(self, name: str, awaits: Awaits = Awaits.FIRST_WORDS) -> None:
        """Begins another one, of the address that is the name's first word, which then waits for something."""
        self._tasks.append(asyncio.create_task(self._shake_hands(name, awaits)))
        for _ in range(5):
            await asyncio.sleep(0)

    async def _shake_hands(self, name: str, awaits: Awaits) -> None:
        try:
            async with self.unfinished.place(name.split()[0]) as place:
                if awaits is not Awaits.FIRST_WORDS:
                    place.wait_for(Awaits.US)
                    place.wait_for(awaits)
                await self._done.wait()
        except TLSError:
            self.given_up.append(name)

    async def finish(self) -> None:
        """Finishes those that were not given up."""
        self._done.set()
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*self._tasks)
        assert len(self.unfinished) == 0


async def test_when_too_many_are_unfinished_the_oldest_of_a_greedy_address_goes() -> None:
    crowd = Crowd(3)
    for name in ("honest", "silent 1", "silent 2", "silent 3", "silent 4"):
        await crowd.begin(name)
    assert len(crowd.unfinished) == 3
    await crowd.finish()
    assert crowd.given_up == ["silent 1", "silent 2"]


async def test_silent_peers_of_many_addresses_displace_each_other_and_nobody_who_speaks() -> None:
    crowd = Crowd(16)
    await crowd.begin("honest 1", Awaits.PEER)
    await crowd.begin("honest 2", Awaits.US)
    for number in range(900):
        await crowd.begin(f"10.0.0.{number % 240}")
    assert len(crowd.unfinished) == 16
    await crowd.finish()
    assert crowd.given_up == [f"10.0.0.{number % 240}" for number in range(900 - 14)]


async def test_of_peers_that_have_spoken_the_one_that_has_kept_quiet_for_longest_goes() -> None:
    crowd = Crowd(8)
    for number in range(6):
        await crowd.begin(f"waits-{number}", Awaits.US if number % 2 else Awaits.PEER)
    for number in range(4):
        await crowd.begin(f"answered-{number}", Awaits.PEER)
    await crowd.finish()
    assert crowd.given_up == ["waits-0", "waits-2"]


async def test_nobody_is_accepted_while_half_of_the_handshakes_wait_for_this_end() -> None:
    crowd = Crowd(4)
    await crowd.begin("one", Awaits.US)
    async with asyncio.timeout(DEADLINE):
        await crowd.unfinished.room()
    await crowd.begin("another", Awaits.US)
    waiting = asyncio.create_task(crowd.unfinished.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await crowd.finish()
    async with asyncio.timeout(DEADLINE):
        await waiting


async def test_a_peer_that_says_nothing_costs_no_handshake(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migproxy.tls.Handshake", None)
    target = cluster.security(handshake_timeout=0.1)
    with connection() as (_, far):
        error = await outcome(target.secure(far, server=True))
        assert isinstance(error, TLSError)
        assert error.reason is Reason.TIMEOUT


async def test_new_connections_use_new_certificates_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """Secrets are replaced by the swap of a link; a source of the new CA is let in, one of the old no longer."""
    mount = SecretMount(tmp_path / "secret")

    def put(ca: Issued) -> None:
        target = ca.issue(TARGET)
        mount.put({"tls.crt": target.pem(), "tls.key": target.key_pem(), "ca.crt": ca.pem()})

    put(cluster.ca)
    server, _ = locate(server=None, client=None, pair=None, folder=str(mount.folder), ca=None)
    target = cluster.security(server=server)
    old = cluster.security()
    assert all(isinstance(end, Transport) for end in await shake(old, target))

    renewed = authority()
    put(renewed)
    new = other(cluster, tmp_path / "new", ca=renewed, source=renewed.issue(SOURCE)).security()
    assert all(isinstance(end, Transport) for end in await shake(new, target))
    refusals = await shake(old, target)
    assert all(isinstance(end, TLSError) for end in refusals)
    assert target.report()["reloads"] == 1


@pytest.mark.parametrize("damage", ["half-written certificate", "other key", "half-written bundle", "missing key"])
async def test_files_that_cannot_be_used_leave_the_last_good_ones_in_force(cluster: Cluster, damage: str) -> None:
    source, target = cluster.security(), cluster.security()
    good = cluster.target
    if damage == "half-written certificate":
        (cluster.folder / "server/tls.crt").write_bytes(good.pem()[:200])
    elif damage == "other key":
        (cluster.folder / "server/tls.key").write_bytes(cluster.source.key_pem())
    elif damage == "half-written bundle":
        (cluster.folder / "ca.crt").write_bytes(cluster.ca.pem()[:200])
    else:
        (cluster.folder / "server/tls.key").unlink()
    for _ in range(2):
        assert all(isinstance(end, Transport) for end in await shake(source, target))
    report = target.report()
    assert report["reload_failures"] == 1
    assert str(cluster.folder) in report["problems"]["server"]

    cluster.write()
    assert all(isinstance(end, Transport) for end in await shake(source, target))
    assert not target.report()["problems"]


def test_a_daemon_without_certificates_says_which_file_is_missing_and_what_to_do(cluster: Cluster) -> None:
    (cluster.folder / "server/tls.key").unlink()
    with pytest.raises(SecurityError, match=r"server/tls\.key: No such file.*--tls-dir.*--disable-tls"):
        cluster.security()


@pytest.mark.parametrize("name", ["server/tls.crt", "client/tls.key", "ca.crt"])
def test_a_fifo_in_place_of_a_certificate_is_told_and_nobody_waits_for_its_writer(cluster: Cluster, name: str) -> None:
    (cluster.folder / name).unlink()
    os.mkfifo(cluster.folder / name)
    with pytest.raises(SecurityError, match=rf"{name}.*no regular file"):
        cluster.security()


def test_a_key_of_an_unknown_kind_is_refused_with_its_file(cluster: Cluster) -> None:
    der = cluster.target.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    curve = bytes.fromhex("06072a8648ce3d0201")  # id-ecPublicKey
    assert curve in der
    text = base64.encodebytes(der.replace(curve, bytes.fromhex("06072a8648ce3d0209"))).decode()
    (cluster.folder / "server/tls.key").write_text(f"-----BEGIN PRIVATE KEY-----\n{text}-----END PRIVATE KEY-----\n")
    with pytest.raises(SecurityError, match=r"server/tls\.key are no pair"):
        cluster.security()


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_a_password(cluster: Cluster) -> None:
    encrypted = cluster.target.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (cluster.folder / "server/tls.key").write_bytes(encrypted)
    with pytest.raises(SecurityError, match="not encrypted"):
        cluster.security()


async def test_a_certificate_that_ends_soon_is_announced(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.target = cluster.ca.issue(replace(TARGET, begins=-2 * DAY, ends=DAY / 2))
    cluster.write()
    watching = asyncio.create_task(cluster.security(expiry_notice=None).watch())
    said = ""
    async with asyncio.timeout(DEADLINE):
        while "certificate expires soon" not in said:
            await asyncio.sleep(0.01)
            said += capsys.readouterr().out
    watching.cancel()
    assert str(cluster.folder / "server/tls.crt") in said
    assert str(cluster.folder / "client/tls.crt") not in said


@pytest.mark.parametrize(
    ("lasts", "notice", "warned_at"),
    [
        pytest.param(timedelta(days=1), None, timedelta(hours=8), id="KubeVirt's: a third"),
        pytest.param(timedelta(days=365), None, timedelta(days=14), id="a year's: two weeks"),
        pytest.param(timedelta(days=365), timedelta(hours=5), timedelta(hours=5), id="as wanted"),
    ],
)
def test_how_long_before_its_end_a_certificate_is_announced(
    lasts: timedelta, notice: timedelta | None, warned_at: timedelta
) -> None:
    begins = datetime(2026, 1, 1, tzinfo=UTC)
    validity = Validity("server", "tls.crt", begins, begins + lasts)
    due = validity.ends - warned_at
    assert validity.nears_end(due, notice)
    assert not validity.nears_end(due - timedelta(seconds=1), notice)


def test_kubevirts_cipher_names_and_openssls_mean_the_same() -> None:
    kubevirt = ["TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"]
    assert parse_ciphers(kubevirt) == Suites("ECDHE-RSA-AES256-GCM-SHA384", "TLS_AES_128_GCM_SHA256", (), ())
    assert parse_ciphers(["ECDHE-RSA-AES256-GCM-SHA384", "TLS_AES_128_GCM_SHA256"]) == parse_ciphers(kubevirt)


def test_old_ciphers_are_left_out_and_unknown_ones_are_an_error(cluster: Cluster) -> None:
    old = ["TLS_RSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", "ECDHE-RSA-AES128-SHA"]
    suites = parse_ciphers([*old, "NONSENSE"])
    assert (suites.older, suites.old, suites.unknown) == ("", tuple(old), ("NONSENSE",))
    with pytest.raises(SecurityError, match="--tls-ciphers: NONSENSE is not known"):
        cluster.security(ciphers=("ECDHE-RSA-AES128-GCM-SHA256", "NONSENSE"))


def test_ciphers_that_leave_nothing_of_tls_1_2_are_an_error_where_1_2_is_allowed(cluster: Cluster) -> None:
    with pytest.raises(SecurityError, match=r"--tls-min-version 1\.3"):
        cluster.security(ciphers=("TLS_AES_128_GCM_SHA256",))
    cluster.security(ciphers=("TLS_AES_128_GCM_SHA256",), min_version="1.3")


async def test_the_configured_cipher_is_the_one_spoken(cluster: Cluster) -> None:
    context = context_of(cluster)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    target = cluster.security(ciphers=("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",))
    with connection() as (near, far):
        near.settimeout(DEADLINE)
        shaking = asyncio.create_task(asyncio.to_thread(context.wrap_socket, near))
        transport = await outcome(target.secure(far, server=True))
        (await shaking).close()
    assert isinstance(transport, Transport)
    assert "TLSv1.2 ECDHE-ECDSA-CHACHA20-POLY1305" in transport.label


@pytest.mark.parametrize("source_follows", [True, False])
@pytest.mark.parametrize("target_follows", [True, False])
async def test_either_end_knows_whether_the_other_can_follow_new_keys(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, source_follows: bool, target_follows: bool
) -> None:
    """Kernel TLS cannot; a kernel that then does not take the keys of a connection changes nothing."""

    def node(follows: bool) -> MutualTLS:
        monkeypatch.setattr(offload, "problem", lambda: "no kernel TLS" if follows else None)
        return cluster.security(ktls="auto")

    monkeypatch.setattr(offload, "install", lambda *_: False)
    ends = await shake(node(source_follows), node(target_follows))
    renews = [end.keys[1] == 1 for end in ends if isinstance(end, Transport)]
    assert renews == [target_follows, source_follows]


async def test_a_peer_with_other_protocols_of_its_own_gets_none_of_ours(cluster: Cluster) -> None:
    context = context_of(cluster)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with connection() as (near, far):
        near.settimeout(DEADLINE)
        shaking = asyncio.create_task(asyncio.to_thread(context.wrap_socket, near))
        transport = await outcome(cluster.security().secure(far, server=True))
        with await shaking as tls:
            assert tls.selected_alpn_protocol() is None
    assert isinstance(transport, Transport)
    assert transport.keys[1] == 1


def test_kernel_tls_that_was_demanded_and_cannot_be_had_is_refused_with_its_reason(cluster: Cluster) -> None:
    if MutualTLS(cluster.options(ktls="auto")).kernel:
        pytest.skip("this kernel has TLS: tests/e2e/test_ktls_vm.py covers it")
    with pytest.raises(SecurityError, match=r"--ktls on: .*modprobe tls.*--ktls auto"):
        cluster.security(ktls="on")


@pytest.mark.parametrize(
    ("kind", "body", "goes_on"),
    [
        pytest.param(21, b"\x01\x00", False, id="close_notify"),
        pytest.param(21, b"\x02\x00", False, id="close_notify marked as fatal"),
        pytest.param(22, b"\x04\x00\x00\x02ab", True, id="session ticket"),
        pytest.param(22, b"\x04\x00\x00\x02ab" * 2, True, id="two session tickets"),
        pytest.param(21, b"\x01\x5a", True, id="warning"),
    ],
)
def test_records_that_are_no_data_and_no_error(kind: int, body: bytes, goes_on: bool) -> None:
    assert check_control(kind, body) is goes_on


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        pytest.param(21, b"\x02\x30", Reason.REFUSED_BY_PEER, id="fatal alert"),
        pytest.param(22, b"\x18\x00\x00\x01\x01", Reason.KEY_UPDATE, id="key update"),
        pytest.param(22, b"\x04\x00\x00\x02ab\x18\x00\x00\x01\x00", Reason.KEY_UPDATE, id="ticket, key update"),
        pytest.param(22, b"\x04\x00\x00\xff", Reason.BAD_RECORD, id="torn message"),
        pytest.param(22, b"\x00\x00\x00\x00", Reason.BAD_RECORD, id="renegotiation"),
        pytest.param(None, b"", Reason.BAD_RECORD, id="unknown"),
    ],
)
def test_records_that_end_the_connection(kind: int | None, body: bytes, reason: Reason) -> None:
    with pytest.raises(TLSError) as error:
        check_control(kind, body)
    assert error.value.reason == reason


def test_the_most_particular_files_win(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    server, client = locate(server=None, client=None, pair=None, folder=str(tmp_path), ca=None)
    assert server.cert == f"{tmp_path}/server/tls.crt"
    assert client.cert == f"{tmp_path}/tls.crt"  # without a folder of its own, the pair for both
    server, client = locate(server=None, client="/mine", pair=("/a.crt", "/a.key"), folder=str(tmp_path), ca="/ca")
    assert (server.cert, server.key, server.ca) == ("/a.crt", "/a.key", "/ca")
    assert client.cert == "/mine/tls.crt"
    server, client = locate(server=None, client=None, pair=None, folder=None, ca=None)
    assert server.key == "/etc/virt-handler/servercertificates/tls.key"
    assert client.key == "/etc/virt-handler/clientcertificates/tls.key"


def test_the_clients_files_are_where_todays_virt_handler_has_them_else_an_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pki, "CLIENT_DIR", str(tmp_path / "today"))
    monkeypatch.setattr(pki, "OLDER_CLIENT_DIR", str(tmp_path / "older"))

    def key() -> str:
        return locate(server=None, client=None, pair=None, folder=None, ca=None)[1].key

    assert key() == f"{tmp_path}/older/tls.key"
    (tmp_path / "today").mkdir()
    assert key() == f"{tmp_path}/today/tls.key"


async def test_development_certificates_are_what_two_nodes_need(tmp_path: Path) -> None:
    folder = str(tmp_path / "made")
    devcerts.make(folder, days=2)
    server, client = locate(server=None, client=None, pair=None, folder=folder, ca=None)
    options = TLSOptions(server, client, Peers(CLIENT_NAMES), Peers(SERVER_NAMES), ktls="off")
    assert all(isinstance(end, Transport) for end in await shake(MutualTLS(options), MutualTLS(options)))
    strict = ssl.create_default_context(cafile=f"{folder}/ca.crt")
    strict.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python's clients from 3.13 on
    strict.check_hostname = False
    strict.load_cert_chain(f"{folder}/client/tls.crt", f"{folder}/client/tls.key")
    with connection() as (near, far):
        near.settimeout(DEADLINE)
        shaking = asyncio.create_task(asyncio.to_thread(strict.wrap_socket, near))
        assert isinstance(await outcome(MutualTLS(options).secure(far, server=True)), Transport)
        (await shaking).close()
    assert (tmp_path / "made/server/tls.key").stat().st_mode & 0o077 == 0
    with pytest.raises(FileExistsError):
        devcerts.make(folder, days=2)
