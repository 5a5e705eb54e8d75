"""The path to another node, measured as a migration would take it: through a migproxy at each end.

`migproxy doctor --serve` there and `migproxy doctor --peer ADDRESS` here each start a real daemon, with the options
(protection included) that the node's own has, for a made-up VMI whose migration they serve. What answers behind the
far daemon is `_Responder`: the launcher's part. One UDP port beside it tells which packets arrive whole.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from migproxy import control
from migproxy.doctor.finding import Finding, Level
from migproxy.doctor.host import check_clock
from migproxy.portmap import MIGRATION_PROXY_DIR, Channel, IPAddress, source_socket_name
from migproxy.sockets import TCPOptions, family, new_tcp, sockaddr
from migproxy.status import size

PORT: Final = 9471
"""Where the direct channel of the made-up migration is served; the libvirt channel's is the next one."""

SLOW: Final = 125_000_000  # bytes per second: a migration network of less than a gigabit
FAR: Final = 0.005  # seconds of round trip: not a LAN any more
_CHUNK = 1 << 20
_PINGS = 50
_START_SECONDS = 30.0
_ANSWER_SECONDS = 15.0
_HEADERS = {4: 28, 6: 48}  # of IP and UDP, bytes
_SMALLEST = {4: 576, 6: 1280}  # RFC 1122, RFC 8200
# linux/in.h, linux/in6.h: packets leave whole or not at all, whatever the kernel believes of the path
_PROBE = {4: (socket.IPPROTO_IP, 10, 3), 6: (socket.IPPROTO_IPV6, 23, 3)}


class PeerError(Exception):
    """The path cannot be measured; the message says why."""


# The two daemons


@contextmanager
def _daemon(vmi: Mapping[str, Any], options: Sequence[str], address: IPAddress) -> Iterator[Path]:
    """A daemon that serves one VMI's migration; yields the folder that has its launcher's run folder and socket."""
    with tempfile.TemporaryDirectory(prefix="migproxy-doctor-") as made:
        folder = Path(made)
        (folder / "run" / MIGRATION_PROXY_DIR).mkdir(parents=True)
        (folder / "vmi.json").write_text(json.dumps(vmi))
        command = [sys.executable, "-m", "migproxy", "run", *options]
        command += ["--node-name", vmi["status"]["nodeName"], "--vmi-dir", f"{folder}/vmi.json"]
        command += ["--launcher-run-dir", f"{folder}/run", "--migration-address", str(address)]
        command += ["--control-socket", f"{folder}/control.sock", "--http-listen", "off", "--drain-timeout", "0"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MIGPROXY_")}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)  # noqa: S603
        try:
            _until(lambda: _is_prepared(folder, process), f"{folder}/log")
            yield folder
        finally:
            process.terminate()
            process.wait()


def _is_prepared(folder: Path, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise PeerError(f"migproxy ended at once: {(folder / 'log').read_text().strip()}")
    with suppress(control.ControlError):
        for migration in control.ask(str(folder / "control.sock"))["migrations"]:
            if migration["state"] == "error":
                raise PeerError(migration["error"])
            return bool(migration.get("channels"))
    return False


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise PeerError(f"migproxy did not get ready within {_START_SECONDS:g} s, see {what}")
        time.sleep(0.05)


def _vmi(node: str, address: IPAddress, port: int) -> dict[str, Any]:
    """A VMI of which `node`, doctor-source or doctor-target, is one side."""
    label = "migrationTargetNodeName" if node == "doctor-target" else "nodeName"
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {
            "namespace": "migproxy",
            "name": "doctor",
            "uid": "doctor",  # a short one: a unix socket's path has 107 bytes
            "labels": {f"kubevirt.io/{label}": node},
        },
        "status": {
            "phase": "Running",
            "nodeName": node,
            "migrationTransport": "Unix",
            "migrationMethod": "LiveMigration",
            "migrationState": {
                "migrationUid": str(uuid4()),
                "sourceNode": "doctor-source",
                "targetNode": "doctor-target",
                "startTimestamp": "2026-01-01T00:00:00Z",  # from then on, exactly the published ports are served
                "targetNodeAddress": str(address),
                "targetDirectMigrationNodePorts": {
                    str(port): int(Channel.DIRECT),
                    str(port + 1): int(Channel.LIBVIRT),
                },
            },
        },
    }


def _socket(folder: Path, vmi: Mapping[str, Any]) -> str:
    """The direct channel's socket, which has the same name on both sides."""
    return str(folder / "run" / MIGRATION_PROXY_DIR / source_socket_name(vmi["metadata"]["uid"], Channel.DIRECT))


# There


@contextmanager
def serve(address: IPAddress, port: int, options: Sequence[str]) -> Iterator[None]:
    """Answers another node's `--peer` while the context lasts.

    Args:
        address: This node's migration address.
        port: TCP and UDP; the next one is used too.
        options: Of the daemon, such as --disable-tls.

    Raises:
        PeerError: The daemon does not start, or the ports are taken.
    """
    vmi = _vmi("doctor-target", address, port)
    with ExitStack() as stack:
        udp = stack.enter_context(_udp(address))
        try:
            udp.bind(sockaddr(address, port))
        except OSError as error:
            raise PeerError(f"UDP port {port} of {address}: {error.strerror}: choose another --peer-port") from error
        threading.Thread(target=_answer_packets, args=(udp,), daemon=True).start()
        stack.callback(_wake, udp)
        folder = stack.enter_context(_daemon(vmi, options, address))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(_socket(folder, vmi))
        listener.listen()
        threading.Thread(target=_answer_connections, args=(listener,), daemon=True).start()
        stack.callback(_wake, listener)
        yield


def _wake(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _answer_packets(udp: socket.socket) -> None:
    while True:
        try:
            packet, sender = udp.recvfrom(65536)
        except OSError:
            return
        if not packet:
            return  # woken by the end
        with suppress(OSError):
            udp.sendto(struct.pack("!I", len(packet)), sender)


def _answer_connections(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    """Each line is answered with the time; after the line "take", all is read to the end, and counted."""
    with connection, connection.makefile("rb") as lines, suppress(OSError):
        while (line := lines.readline(64)) and line != b"take\n":
            connection.sendall(f"{time.time()}\n".encode())
        taken, buffer = 0, bytearray(_CHUNK)
        while count := lines.readinto1(buffer):
            taken += count
        connection.sendall(f"{taken}\n".encode())


# Here


def check_peer(
    peer: IPAddress, port: int, local: IPAddress, mtu: int | None, options: Sequence[str], seconds: float
) -> Iterator[Finding]:
    """The path to another node, on which `migproxy doctor --serve` runs.

    Args:
        peer: Its migration address.
        port: That it serves on.
        local: This node's migration address.
        mtu: Of this node's migration interface, None where it is not known.
        options: Of the daemon here, such as --disable-tls.
        seconds: To measure the throughput for.
    """
    reached = _check_reachable(peer, port, local)
    yield reached
    if reached.level is not Level.OK:
        return
    if mtu is not None:
        yield _check_path_mtu(peer, port, local, mtu)
    vmi = _vmi("doctor-source", peer, port)
    try:
        with _daemon(vmi, options, local) as folder:
            yield from _check_round_trip(_socket(folder, vmi))
            yield _check_throughput(_socket(folder, vmi), folder, seconds)
    except (PeerError, OSError, ValueError) as error:
        yield Finding(
            "peer",
            Level.FAIL,
            f"{peer}: no connection through two migproxies: {error}",
            "see that both ends are protected alike (the same CA, or --disable-tls on both), and what "
            "`migproxy doctor --serve` says there",
        )


def _check_reachable(peer: IPAddress, port: int, local: IPAddress) -> Finding:
    name, where = "peer reachable", f"{peer} port {port}"
    began = time.monotonic()
    try:
        with new_tcp(local, TCPOptions("system")) as sock:
            sock.settimeout(5)
            sock.connect(sockaddr(peer, port))
    except ConnectionRefusedError:
        return Finding(name, Level.FAIL, f"nobody listens at {where}", "start `migproxy doctor --serve` on that node")
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        remedy = (
            "check the address, routes and VLANs (ip route get), and that firewalls let --port-range and "
            f"{port}-{port + 1} in"
        )
        return Finding(name, Level.FAIL, f"{where} from {local}: {why}", remedy)
    return Finding(name, Level.OK, f"{where} from {local}, connected in {(time.monotonic() - began) * 1e3:.2f} ms")


def _check_round_trip(path: str) -> Iterator[Finding]:
    """Small messages to the other launcher and back, as libvirt's are."""
    times, skews = [], []
    with _connected(path) as connection, connection.makefile("rb") as answers:
        for _ in range(_PINGS):
            sent = time.time()
            began = time.perf_counter()
            connection.sendall(b"ping\n")
            answer = answers.readline()
            times.append(time.perf_counter() - began)
            if not answer:
                raise PeerError("the connection was closed before an answer came")
            skews.append(float(answer) - sent - times[-1] / 2)
    rtt = statistics.median(times)
    finding = f"{rtt * 1e3:.2f} ms through two migproxies (median of {_PINGS}, worst {max(times) * 1e3:.2f} ms)"
    if rtt > FAR:
        yield Finding(
            "round trip",
            Level.WARN,
            finding,
            "a guest that changes memory quickly may never converge over it: look for a shorter or less loaded path",
        )
    else:
        yield Finding("round trip", Level.OK, finding)
    yield check_clock(skews[times.index(min(times))], "the peer")


def _check_throughput(path: str, folder: Path, seconds: float) -> Finding:
    chunk, sent = os.urandom(_CHUNK), 0
    with _connected(path) as connection, connection.makefile("rb") as answers:
        connection.sendall(b"take\n")
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            connection.sendall(chunk)
            sent += len(chunk)
        # While it is open: the kernel forgets its view of a connection with the connection.
        (migration,) = control.ask(str(folder / "control.sock"))["migrations"]
        connection.shutdown(socket.SHUT_WR)
        taken = int(answers.readline() or b"0")
        took = time.monotonic() - began
    if taken != sent:
        raise PeerError(f"of {sent} bytes {taken} arrived")
    (direct,) = (one for one in migration["channels"] if one["channel"] == Channel.DIRECT.label)
    modes = ", ".join(mode for mode, count in direct["modes"].items() if count)
    finding = f"{size(sent / took)}/s through two migproxies ({modes}, {direct['retransmits']} retransmits)"
    if sent / took >= SLOW:
        return Finding("throughput", Level.OK, finding)
    return Finding(
        "throughput",
        Level.WARN,
        finding,
        "less than a gigabit: look at the link's speed (ethtool), its load, and at retransmits for loss",
    )


@contextmanager
def _connected(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_SECONDS)
        connection.connect(path)
        yield connection


def _check_path_mtu(peer: IPAddress, port: int, local: IPAddress, mtu: int) -> Finding:
    """The largest packet that gets through whole, found by halving."""
    name = "path MTU"
    with _udp(local) as udp:
        udp.bind(sockaddr(local, 0))
        udp.connect(sockaddr(peer, port))
        udp.settimeout(0.3)
        low, high = _SMALLEST[peer.version], mtu
        if not _passes(udp, low):
            return Finding(
                name, Level.WARN, f"no answer on UDP port {port}, so not measured", f"let UDP port {port} through"
            )
        if _passes(udp, high):
            return Finding(name, Level.OK, f"{mtu}: full packets of this node's interface get through")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _passes(udp, middle) else (low, middle)
    return Finding(
        name,
        Level.FAIL,
        f"{low}, although this node's interface has {mtu}: larger packets vanish, and connections may hang",
        f"set the same MTU everywhere on the path (switches, bridges, both nodes), or ip link set ... mtu {low}",
    )


def _udp(address: IPAddress) -> socket.socket:
    sock = socket.socket(family(address), socket.SOCK_DGRAM)
    sock.setsockopt(*_PROBE[address.version])
    return sock


def _passes(udp: socket.socket, packet: int) -> bool:
    """Whether a packet of that size, headers included, arrives whole; one that is lost is sent again."""
    payload = bytes(packet - _HEADERS[4 if udp.family == socket.AF_INET else 6])
    for _ in range(3):
        try:
            udp.send(payload)
            while len(answer := udp.recv(64)) == 4:
                if struct.unpack("!I", answer)[0] == len(payload):
                    return True
        except TimeoutError:
            continue
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                return False
            if error.errno != errno.ECONNREFUSED:
                raise
    return False
