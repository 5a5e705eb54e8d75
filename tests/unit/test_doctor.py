"""Each check of the doctor, made to fail: it says what to do."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from migproxy import offload
from migproxy.cli import app
from migproxy.doctor import api, host, peer
from migproxy.doctor.finding import Finding, Level, render
from migproxy.lifeline import Lifeline
from migproxy.netif import MigrationAddress
from migproxy.pki import SERVER_NAMES
from migproxy.route import Route, choose
from migproxy.settings import Settings
from tests.relays import Speaker, relay_thread

pytestmark = pytest.mark.tier("gate")

LOOPBACK = ip_address("127.0.0.1")
NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)


def by_name(findings: Iterator[Finding] | list[Finding]) -> dict[str, Finding]:
    return {one.check: one for one in findings}


def failing(finding: Finding, level: Level, remedy: str) -> None:
    """It fails as badly as it should, and its output has the remedy."""
    assert finding.level is level, finding
    assert remedy in finding.remedy
    assert finding.remedy in render([finding])


# Kernel


def test_splice_forbidden() -> None:
    def forbidden(*_: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    failing(host.check_splice(forbidden), Level.FAIL, "seccomp")
    assert host.check_splice().level is Level.OK


def test_pipes_too_small() -> None:
    failing(host.check_pipe_size(1 << 40), Level.WARN, "fs.pipe-max-size")
    assert host.check_pipe_size(4096).level is Level.OK


def test_no_kernel_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "problem", lambda: "the kernel has no TLS (No such file or directory)")
    failing(host.check_ktls(), Level.WARN, "modprobe tls")
    monkeypatch.setattr(offload, "problem", lambda: None)
    assert host.check_ktls().level is Level.OK


def test_congestion_control_not_available() -> None:
    failing(host.check_congestion_control("nosuch"), Level.WARN, "modprobe tcp_nosuch")
    assert host.check_congestion_control("reno").level is Level.OK
    assert "system's default" in host.check_congestion_control("system").finding


def test_no_mptcp_is_only_told() -> None:
    assert host.check_mptcp(9999) == Finding("MPTCP", Level.INFO, "not available (nothing needs it)")


# Migration network


def test_no_migration_address() -> None:
    missing = MigrationAddress((), "interface migration0", "there is no interface migration0: create it, or give ...")
    failing(host.check_address(missing), Level.FAIL, "create it")
    assert host.check_address(MigrationAddress((LOOPBACK,), "--migration-address", None)).level is Level.OK


def test_the_way_to_a_peer_and_what_is_wrong_with_it() -> None:
    far, own = ip_address("10.3.3.3"), MigrationAddress((LOOPBACK,), "interface migration0", None, "migration0")
    found = host.check_route(choose(far, own, LOOPBACK, lambda _: Route()), far)
    assert found == Finding("route", Level.OK, f"to {far} from {LOOPBACK}")
    for route, level in ((Route("eth0"), Level.WARN), (Route(refusal="the kernel has none"), Level.FAIL)):
        found = host.check_route(choose(far, own, None, {LOOPBACK: route}.__getitem__), far)
        failing(found, level, "ip route add 10.3.3.3 via ROUTER dev migration0")
        assert f"from {LOOPBACK} (interface migration0) to {far}" in found.finding


def test_ports_that_are_taken_or_used_by_others(tmp_path: Path) -> None:
    local = tmp_path / "sys/net/ipv4/ip_local_port_range"
    local.parent.mkdir(parents=True)
    local.write_text("1024\t65535\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = by_name(host.check_port_range(LOOPBACK, (port, port), tmp_path))
    failing(found["port range"], Level.FAIL, "widen --port-range")
    failing(found["reserved ports"], Level.WARN, "ip_local_reserved_ports")
    local.write_text("60000\t60001\n")
    assert by_name(host.check_port_range(LOOPBACK, (20000, 20100), tmp_path)).keys() == {"port range"}


# Launchers


def test_no_pods_folder(tmp_path: Path) -> None:
    failing(host.check_pods_dir(str(tmp_path / "none")), Level.FAIL, "--pods-dir")
    assert host.check_pods_dir(str(tmp_path)).level is Level.OK


def test_pid_namespace_is_not_the_hosts(tmp_path: Path) -> None:
    other = tmp_path / "pid"
    other.touch()
    failing(host.check_pid_namespace(str(other)), Level.FAIL, "hostPID: true")


# The relay


def test_a_relay_that_answers_is_told_with_its_process(tmp_path: Path) -> None:
    path = str(tmp_path / "relay.sock")
    with relay_thread(path), Speaker(path) as daemon:
        daemon.greet()
        found = host.check_relay(path, is_externally_managed=True)
        assert daemon.sync() == []  # it has its daemon still
    assert found == Finding("relay", Level.OK, f"process {os.getpid()} answers at {path}")


def test_no_relay_answers(tmp_path: Path) -> None:
    path = str(tmp_path / "relay.sock")
    failing(host.check_relay(path, is_externally_managed=True), Level.FAIL, "systemctl start migproxy")
    found = host.check_relay(path, is_externally_managed=False)
    assert found == Finding("relay", Level.OK, f"none runs at {path}: the daemon starts one")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(path)
    failing(host.check_relay(path, is_externally_managed=True), Level.FAIL, "systemctl start migproxy")


def test_a_relay_that_hangs_accepts_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "relay.sock")
    with ExitStack() as stack:
        hanging, first = (stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) for _ in range(2))
        hanging.bind(path)
        hanging.listen(0)
        first.connect(path)
        failing(host.check_relay(path, is_externally_managed=True), Level.FAIL, "SIGKILL will do")


def test_another_programs_socket_is_no_relay(tmp_path: Path) -> None:
    path = str(tmp_path / "control.sock")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        failing(host.check_relay(path, is_externally_managed=False), Level.FAIL, "--relay-socket")


# Certificates


class Authority:
    """A CA, and what it issues, as PEM files in a folder."""

    def __init__(self, folder: Path, name: str = "kubevirt.io") -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._issue(name, self.key, self.key, name, NOW - DAY, NOW + 100 * DAY)
        self.ca = self._write(f"{name}.crt", self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str = SERVER_NAMES[0],
        begins: dt.datetime = NOW - DAY / 10,
        ends: dt.datetime = NOW + DAY,
    ) -> host.Certificates:
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._issue(name, key, self.key, self._name(), begins, ends)
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        certificate = self._write("tls.crt", made.public_bytes(serialization.Encoding.PEM))
        return host.Certificates(self.ca, certificate, self._write("tls.key", key.private_bytes(*pem)), SERVER_NAMES)

    def _name(self) -> str:
        return str(self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)

    def _write(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.write_bytes(data)
        return str(path)

    @staticmethod
    def _issue(
        name: str,
        key: ec.EllipticCurvePrivateKey,
        issuer_key: ec.EllipticCurvePrivateKey,
        issuer: str,
        begins: dt.datetime,
        ends: dt.datetime,
    ) -> x509.Certificate:
        above, own = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)]) for one in (issuer, name))
        builder = x509.CertificateBuilder(above, own, key.public_key(), x509.random_serial_number(), begins, ends)
        return builder.sign(issuer_key, hashes.SHA256())


def examined(paths: host.Certificates) -> dict[str, Finding]:
    return by_name(host.check_certificates(paths, NOW))


def test_certificates_that_are_well(tmp_path: Path) -> None:
    found = examined(Authority(tmp_path).issue())
    assert {one.level for one in found.values()} == {Level.OK}
    assert found.keys() == {"certificate files", "key", "chain", "common name", "certificate expiry", "CA expiry"}


def test_an_intermediate_behind_the_certificate_completes_the_chain(tmp_path: Path) -> None:
    root = Authority(tmp_path)
    (tmp_path / "below").mkdir()
    between = Authority(tmp_path / "below", "between")
    between.certificate = root._issue("between", between.key, root.key, "kubevirt.io", NOW - DAY, NOW + DAY)
    paths = between.issue()
    chain = host.Certificates(root.ca, paths.certificate, paths.key, SERVER_NAMES)
    failing(examined(chain)["chain"], Level.FAIL, "put intermediates behind the certificate")
    with Path(paths.certificate).open("ab") as file:
        file.write(between.certificate.public_bytes(serialization.Encoding.PEM))
    assert examined(chain)["chain"].level is Level.OK


@pytest.mark.parametrize("missing", ["ca", "certificate"])
def test_missing_or_wrong_certificate_files(tmp_path: Path, missing: str) -> None:
    paths = Authority(tmp_path).issue()
    broken = Path(getattr(paths, missing))
    broken.write_text("no certificate")
    failing(examined(paths)["certificate files"], Level.FAIL, "--tls-ca and --tls-cert")
    broken.unlink()
    found = examined(paths)["certificate files"]
    failing(found, Level.FAIL, "--tls-ca and --tls-cert")
    assert str(broken) in found.finding


def test_a_key_that_is_not_the_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    paths = authority.issue()
    old = Path(paths.certificate).read_bytes()
    authority.issue()
    Path(paths.certificate).write_bytes(old)
    failing(examined(paths)["key"], Level.FAIL, "of one pair")
    Path(paths.key).write_text("none")
    failing(examined(paths)["key"], Level.FAIL, "--tls-key")


def test_a_certificate_of_another_ca(tmp_path: Path) -> None:
    paths = Authority(tmp_path).issue()
    other = Authority(tmp_path, "another")
    failing(
        examined(host.Certificates(other.ca, paths.certificate, paths.key, SERVER_NAMES))["chain"],
        Level.FAIL,
        "kubevirt-ca",
    )


def test_a_name_that_kubevirt_does_not_accept(tmp_path: Path) -> None:
    failing(examined(Authority(tmp_path).issue("node01"))["common name"], Level.WARN, "KubeVirt's certificates")


@pytest.mark.parametrize(
    ("begins", "ends", "level", "remedy"),
    [
        (NOW - 2 * DAY, NOW - DAY, Level.FAIL, "renew it"),
        (NOW + DAY, NOW + 2 * DAY, Level.FAIL, "clock"),
        (NOW - 9 * DAY, NOW + DAY, Level.WARN, "virt-operator"),
    ],
    ids=["expired", "not yet valid", "about to expire"],
)
def test_certificates_out_of_their_time(
    tmp_path: Path, begins: dt.datetime, ends: dt.datetime, level: Level, remedy: str
) -> None:
    failing(examined(Authority(tmp_path).issue(begins=begins, ends=ends))["certificate expiry"], level, remedy)


def test_clocks_that_disagree() -> None:
    failing(host.check_clock(-60, "the peer"), Level.FAIL, "chronyc")
    assert "60 s ahead of the peer's" in host.check_clock(-60, "the peer").finding
    assert host.check_clock(0.2, "the peer").level is Level.OK


# API server


@contextmanager
def api_server(folder: Path, *, forbidden: str = "", ahead: float = 0, minor: str = "36") -> Iterator[str]:
    """A server that answers /version and reviews of access; yields the path of its kubeconfig."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys = ("gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform")
            version = {"major": "1", "minor": minor, "gitVersion": f"v1.{minor}.0"}
            self._answer(dict.fromkeys(keys, "unknown") | version, 200)

        def do_POST(self) -> None:
            review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            attributes = review["spec"]["resourceAttributes"]
            what = f"{attributes['verb']} {attributes['resource']}"
            cluster_wide = attributes["resource"] in ("virtualmachineinstances", "events")
            assert ("namespace" in attributes) is not cluster_wide
            self._answer({**review, "status": {"allowed": what != forbidden}}, 201)

        def _answer(self, body: dict[str, Any], status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=ahead), usegmt=True)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield kubeconfig(folder, f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


def kubeconfig(folder: Path, server: str) -> str:
    path = folder / "kubeconfig"
    contents = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(yaml.safe_dump(contents))
    return str(path)


def test_permissions_are_asked_for_one_by_one(tmp_path: Path) -> None:
    with api_server(tmp_path, forbidden="patch virtualmachineinstances") as config:
        found = api.check_api(config, None, "kubevirt")
    denied = [one for one in found if one.level is Level.FAIL]
    assert len(denied) == 1
    failing(denied[0], Level.FAIL, 'resources ["virtualmachineinstances"], verbs ["patch"]')
    assert len([one for one in found if one.check == "permission"]) == len(api.PERMISSIONS)
    assert by_name(found)["clock"].level is Level.OK


def test_a_permission_in_kubevirts_namespace_is_asked_for_there(tmp_path: Path) -> None:
    with api_server(tmp_path, forbidden="watch configmaps") as config:
        (denied,) = (one for one in api.check_api(config, None, "kubevirt-here") if one.level is Level.FAIL)
    assert "may not watch configmaps kubevirt-ca in namespace kubevirt-here" in denied.finding
    failing(denied, Level.FAIL, 'Role in namespace kubevirt-here: apiGroups [""], resources ["configmaps"]')


@pytest.mark.parametrize(
    ("minor", "level"), [("36", Level.OK), ("30", Level.OK), ("30+", Level.OK), ("29", Level.WARN), ("", Level.WARN)]
)
def test_beside_virt_handler_it_is_told_whether_targets_can_be_announced(
    tmp_path: Path, minor: str, level: Level
) -> None:
    with api_server(tmp_path, minor=minor) as config:
        found = by_name(api.check_api(config, None, "kubevirt", beside=True))
        assert found["announcing"].level is level
        assert "announcing" not in by_name(api.check_api(config, None, "kubevirt"))


def test_the_api_servers_clock(tmp_path: Path) -> None:
    with api_server(tmp_path, ahead=90) as config:
        failing(by_name(api.check_api(config, None, "kubevirt"))["clock"], Level.FAIL, "synchronise")


def test_an_api_server_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    (found,) = api.check_api(kubeconfig(tmp_path, f"http://127.0.0.1:{port}"), None, "kubevirt")
    failing(found, Level.FAIL, "check the address in the kubeconfig")


# The path to a peer


def test_nobody_listens_at_the_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    (found,) = peer.check_peer(LOOPBACK, port, LOOPBACK, None, [], 0.1)
    failing(found, Level.FAIL, "migproxy doctor --serve")


def test_a_far_peer_whose_clock_is_wrong(tmp_path: Path) -> None:
    """The answers come late, and from tomorrow."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as lines:
                for _ in lines:
                    late.wait(0.01)
                    connection.sendall(f"{NOW.timestamp() + 86400}\n".encode())

        late = threading.Event()
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        found = by_name(peer._check_round_trip(path))
        thread.join(10)
    failing(found["round trip"], Level.WARN, "shorter or less loaded path")
    failing(found["clock"], Level.FAIL, "synchronise")


# The command


def test_the_command_says_what_is_wrong_and_exits_with_1(tmp_path: Path) -> None:
    options = ["doctor", "--migration-interface", "none0", "--pods-dir", str(tmp_path / "none"), "--json"]
    done = CliRunner().invoke(app, options)
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["ok"]) == (1, False)
    assert {"pods folder", "migration address"} <= {
        one["check"] for one in answer["findings"] if one["level"] == "fail" and one["remedy"]
    }


def test_the_command_exits_with_0_where_nothing_failed(tmp_path: Path) -> None:
    options = ["doctor", "--migration-address", "127.0.0.1", "--launcher-run-dir", str(tmp_path), "--disable-tls"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.stdout
    assert " 0 failed" in done.stdout
    assert "kernel TLS" not in done.stdout


def test_the_command_beside_virt_handler_looks_for_the_failsafe(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    control, config = str(folder / "control.sock"), kubeconfig(tmp_path, "http://127.0.0.1:9")

    def level() -> str:
        options = ["doctor", "--json", "--disable-tls", "--kubeconfig", config, "--control-socket", control]
        findings = json.loads(CliRunner().invoke(app, options).stdout)["findings"]
        return next(str(one["level"]) for one in findings if one["check"] == "failsafe")

    assert level() == "warn"
    assert not list(folder.iterdir()), "looking changes nothing"
    with closing(Lifeline(Settings(control_socket=control).failsafe_lock)) as failsafe, failsafe.taken():
        assert level() == "ok"


def test_wrong_options_exit_with_2() -> None:
    assert CliRunner().invoke(app, ["doctor", "--port-range", "9-8"]).exit_code == 2
    assert CliRunner().invoke(app, ["doctor", "--tls-cert", os.devnull]).exit_code == 2
