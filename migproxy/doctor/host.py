"""Whether this node can serve migrations, and what to do where it cannot.

Each check is a function of what it looks at, and returns what it found with the remedy; nothing is changed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from migproxy import offload
from migproxy.doctor.finding import Finding, Level
from migproxy.fds import peer_of
from migproxy.lifeline import is_locked
from migproxy.netif import AddressWatcher, MigrationAddress
from migproxy.portmap import IPAddress
from migproxy.route import Departure
from migproxy.safefiles import read_regular
from migproxy.sockets import PortTaken, TCPOptions, listen_tcp
from migproxy.splice import PIPE_SIZES, Pipe
from migproxy.verify import issued

MAX_SKEW = 5.0  # seconds; timestamps in a VMI's status are compared with the node's clock
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # linux/proc_ns.h, PROC_PID_INIT_INO
_IPPROTO_MPTCP = 262
_SIOCGIFFLAGS, _SIOCGIFMTU, _IFF_RUNNING = 0x8913, 0x8921, 0x40
_ETHERNET_MTU = 1500
_EXPIRY_WARNING = 0.2  # of a certificate's life; KubeVirt renews at that point


# Kernel


def check_splice(splice: Callable[[int, int, int], int] = os.splice) -> Finding:
    """Whether bytes can be spliced from socket to pipe to socket."""
    with ExitStack() as stack:
        ends = [stack.enter_context(end) for _ in range(2) for end in socket.socketpair()]
        pipe = Pipe()
        stack.callback(pipe.close)
        ends[0].sendall(b"splice")
        try:
            moved = splice(pipe.reader, ends[2].fileno(), splice(ends[1].fileno(), pipe.writer, 6))
        except OSError as error:
            return Finding(
                "splice",
                Level.FAIL,
                f"splice(2) does not work here: {error.strerror}",
                "allow the system call splice in the container's seccomp profile (RuntimeDefault does)",
            )
    return Finding("splice", Level.OK, f"the kernel moves bytes between sockets ({moved} of 6)")


def check_pipe_size(wanted: int = PIPE_SIZES[0]) -> Finding:
    """Whether a connection's pipes get their full size."""
    pipe = Pipe()
    capacity = pipe.capacity
    pipe.close()
    if capacity >= wanted:
        return Finding("pipe size", Level.OK, f"{capacity >> 10} KiB")
    return Finding(
        "pipe size",
        Level.WARN,
        f"{capacity >> 10} KiB instead of {wanted >> 10} KiB: a third of the throughput is lost at 64 KiB",
        f"sysctl fs.pipe-max-size={wanted}, and run as root or with CAP_SYS_RESOURCE",
    )


def check_ktls() -> Finding:
    """Whether the kernel can encrypt; where this process may, the kernel loads its module for it."""
    if why := offload.problem():
        found = f"{why}: encryption is in user space, at several times the CPU"
        return Finding("kernel TLS", Level.WARN, found, offload.REMEDY)
    return Finding("kernel TLS", Level.OK, "the kernel can encrypt and decrypt")


def check_congestion_control(wanted: str, proc: Path = Path("/proc")) -> Finding:
    """Whether the congestion control asked for can be had."""
    name = "congestion control"
    available = "unknown"
    with suppress(OSError):
        available = (proc / "sys/net/ipv4/tcp_available_congestion_control").read_text().strip()
    if wanted == "system":
        default = "unknown"
        with suppress(OSError):
            default = (proc / "sys/net/ipv4/tcp_congestion_control").read_text().strip()
        return Finding(name, Level.OK, f"the system's default ({default})")
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, wanted.encode())
        except OSError as error:
            return Finding(
                name,
                Level.WARN,
                f"{wanted} cannot be had: {error.strerror}; available: {available}",
                f"modprobe tcp_{wanted}, add it to net.ipv4.tcp_allowed_congestion_control, or give another "
                "--congestion-control",
            )
    return Finding(name, Level.OK, wanted)


def check_mptcp(protocol: int = _IPPROTO_MPTCP) -> Finding:
    """Whether the kernel knows Multipath TCP; for information."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol).close()
    except OSError:
        return Finding("MPTCP", Level.INFO, "not available (nothing needs it)")
    return Finding("MPTCP", Level.INFO, "available")


# Migration network


async def migration_address(watcher: AddressWatcher) -> MigrationAddress:
    """The address that the daemon would use now."""
    async with aclosing(watcher.states()) as states:
        return await anext(states)


def check_address(address: MigrationAddress) -> Finding:
    """Whether there is a migration address."""
    if address.problem or not address.addresses:
        problem, _, remedy = (address.problem or "none").partition(": ")
        return Finding("migration address", Level.FAIL, problem, remedy or f"give {address.source} an address")
    return Finding("migration address", Level.OK, f"{address.addresses[0]} ({address.source})")


def check_route(departure: Departure, far: IPAddress) -> Finding:
    """Whether packets find their way to another node's migration address."""
    if departure.problem:
        found, _, remedy = departure.problem.rpartition(": ")
        return Finding("route", Level.WARN if departure.has_route else Level.FAIL, found, remedy)
    return Finding("route", Level.OK, f"to {far} from {departure.address}")


def check_interface(name: str) -> Iterator[Finding]:
    """The migration interface's carrier and MTU; nothing where it does not exist."""
    try:
        running = _ask_interface(name, _SIOCGIFFLAGS, "H") & _IFF_RUNNING
        mtu = _ask_interface(name, _SIOCGIFMTU, "i")
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return
    if running:
        yield Finding("carrier", Level.OK, f"{name} is up")
    else:
        yield Finding(
            "carrier",
            Level.FAIL,
            f"{name} has no carrier or is down",
            f"ip link set {name} up; check the cable, the bond and the lower interface (ip -d link show {name})",
        )
    if mtu >= _ETHERNET_MTU:
        yield Finding("MTU", Level.OK, f"{mtu} on {name}")
    else:
        yield Finding(
            "MTU",
            Level.WARN,
            f"{mtu} on {name}: smaller than Ethernet's {_ETHERNET_MTU}, so more packets and CPU per byte",
            f"raise it on both nodes and on what is between them: ip link set {name} mtu {_ETHERNET_MTU} (or 9000)",
        )


def _ask_interface(name: str, request: int, layout: str) -> int:
    """netdevice(7): an ioctl, because it asks this network namespace, which a mounted /sys may not show."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, request, struct.pack("16s24x", name.encode()[:15]))
    return int(struct.unpack_from(layout, answer, 16)[0])


def check_port_range(
    address: IPAddress | None, ports: tuple[int, int] | None, proc: Path = Path("/proc")
) -> Iterator[Finding]:
    """Whether targets find ports to listen on."""
    name = "port range"
    with suppress(OSError, ValueError):
        low, high = (int(word) for word in (proc / "sys/net/ipv4/ip_local_port_range").read_text().split())
        if ports is None:
            yield Finding(name, Level.OK, f"the kernel's choice, {low}-{high}: a firewall has to let all of them in")
            return
        if ports[0] <= high and low <= ports[1]:
            yield Finding(
                "reserved ports",
                Level.WARN,
                f"{ports[0]}-{ports[1]} overlaps {low}-{high}, which outgoing connections of this node take from",
                f"choose --port-range elsewhere, or sysctl net.ipv4.ip_local_reserved_ports={ports[0]}-{ports[1]}",
            )
    if address is None or ports is None:
        return
    free = sum(_is_free(address, port) for port in range(ports[0], ports[1] + 1))
    size = ports[1] - ports[0] + 1
    if free >= max(3, size // 10):
        yield Finding(name, Level.OK, f"{free} of {size} ports are free on {address}")
        return
    yield Finding(
        name,
        Level.FAIL if free < 3 else Level.WARN,
        f"{free} of the {size} ports {ports[0]}-{ports[1]} are free on {address}; a migration takes up to 3",
        "widen --port-range, or end what listens there (ss -ltnp)",
    )


def _is_free(address: IPAddress, port: int) -> bool:
    try:
        listen_tcp(address, port, TCPOptions("system")).close()
    except PortTaken:
        return False
    except OSError:
        return False
    return True


# Launchers


def check_pods_dir(path: str) -> Finding:
    """Whether the kubelet's pods folder is there."""
    try:
        pods = len(os.listdir(path))
    except OSError as error:
        return Finding(
            "pods folder",
            Level.FAIL,
            f"{path}: {error.strerror}",
            "mount the kubelet's pods folder there (hostPath /var/lib/kubelet/pods), or name it with --pods-dir",
        )
    return Finding("pods folder", Level.OK, f"{path}: {pods} pods")


def check_pid_namespace(path: str = "/proc/self/ns/pid") -> Finding:
    """Whether this process sees the launchers' pids."""
    if os.stat(path).st_ino == _INITIAL_PID_NAMESPACE:
        return Finding("pid namespace", Level.OK, "the host's")
    return Finding(
        "pid namespace",
        Level.FAIL,
        "not the host's: a launcher's pid and its /proc/PID/root cannot be seen",
        "hostPID: true in the pod's spec, or --launcher-run-dir without {pid}",
    )


# Certificates


@dataclass(frozen=True, slots=True)
class Certificates:
    """What one role shows, and checks the other by.

    Attributes:
        ca, certificate, key: Paths of PEM files; those of the CA and the certificate may hold several.
        names: Common names that the other role accepts.
    """

    ca: str
    certificate: str
    key: str
    names: tuple[str, ...]


def check_certificates(paths: Certificates, now: datetime | None = None) -> Iterator[Finding]:
    """Whether a certificate can be used: its files, key, chain, name and validity.

    Args:
        paths: What to look at.
        now: The time to judge by.
    """
    try:
        roots = _certificates(paths.ca)
        leaf, *intermediates = _certificates(paths.certificate)
    except (OSError, ValueError) as error:
        yield Finding(
            "certificate files",
            Level.FAIL,
            _reason(error),
            "name PEM files that exist and are readable with --tls-dir, or --tls-ca and --tls-cert; or --disable-tls",
        )
        return
    yield Finding("certificate files", Level.OK, f"{paths.certificate}, {len(roots)} CA certificates in {paths.ca}")
    yield _check_key(leaf, paths.key)
    yield _check_chain(leaf, intermediates, roots)
    yield _check_name(leaf, paths.names)
    yield from (
        _check_expiry(what, one, now or datetime.now(UTC)) for what, one in (("certificate", leaf), *_cas(roots))
    )


def _cas(roots: Sequence[x509.Certificate]) -> Iterator[tuple[str, x509.Certificate]]:
    yield "CA", max(roots, key=lambda root: root.not_valid_after_utc)


def _certificates(path: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(read_regular(path))
    except ValueError as error:
        raise ValueError(f"{path}: no PEM certificate in it: {error}") from error


def _reason(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _check_key(leaf: x509.Certificate, path: str) -> Finding:
    try:
        key = serialization.load_pem_private_key(read_regular(path), None)
    except (OSError, ValueError, TypeError) as error:
        return Finding(
            "key", Level.FAIL, f"{path}: {_reason(error)}", "name the certificate's unencrypted key with --tls-key"
        )
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != leaf.public_key().public_bytes(*form):
        return Finding(
            "key", Level.FAIL, f"{path} is not the certificate's key", "give --tls-cert and --tls-key of one pair"
        )
    return Finding("key", Level.OK, "fits the certificate")


def _check_chain(
    leaf: x509.Certificate, intermediates: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]
) -> Finding:
    at = leaf
    for _ in range(len(intermediates) + 1):
        if any(issued(at, root) for root in roots):
            return Finding("chain", Level.OK, "the certificate leads to a CA of the bundle")
        above = next((one for one in intermediates if issued(at, one)), None)
        if above is None:
            break
        at = above
    return Finding(
        "chain",
        Level.FAIL,
        f"nothing in the CA bundle issued {at.subject.rfc4514_string()} (issuer {at.issuer.rfc4514_string()})",
        "give the CA bundle that signs the nodes' certificates (ConfigMap kubevirt-ca, key ca-bundle), and put "
        "intermediates behind the certificate in its file",
    )


def _check_name(leaf: x509.Certificate, accepted: Sequence[str]) -> Finding:
    names = [str(one.value) for one in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if any(name in accepted for name in names):
        return Finding("common name", Level.OK, names[0])
    return Finding(
        "common name",
        Level.WARN,
        f"{', '.join(names) or 'none'}: the other nodes accept {', '.join(accepted)} only",
        "use KubeVirt's certificates, or tell all nodes to accept this name (--tls-server-names, --tls-client-names)",
    )


def _check_expiry(what: str, one: x509.Certificate, now: datetime) -> Finding:
    begins, ends = one.not_valid_before_utc, one.not_valid_after_utc
    if now > ends or now < begins:
        return Finding(
            f"{what} expiry",
            Level.FAIL,
            f"valid from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC, and now it is {now:%Y-%m-%d %H:%M}",
            "renew it (KubeVirt's operator does: look at virt-operator's log), and compare this node's clock",
        )
    left = ends - now
    if left < (ends - begins) * _EXPIRY_WARNING:
        return Finding(
            f"{what} expiry",
            Level.WARN,
            f"ends in {_span(left)}, at {ends:%Y-%m-%d %H:%M} UTC",
            "see that whatever renews it does (KubeVirt's operator: virt-operator's log), or renew it",
        )
    return Finding(f"{what} expiry", Level.OK, f"in {_span(left)}")


def _span(time: timedelta) -> str:
    hours = time.total_seconds() / 3600
    return f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.1f} hours"


def check_clock(skew: float, other: str) -> Finding:
    """Whether this node's clock agrees with another one.

    Args:
        skew: Seconds that the other clock is ahead.
        other: Whose it is.
    """
    if abs(skew) <= MAX_SKEW:
        return Finding("clock", Level.OK, f"within {max(abs(skew), 0.001):.3f} s of {other}'s")
    return Finding(
        "clock",
        Level.FAIL,
        f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} {other}'s: certificates and start times are "
        "judged wrongly",
        "synchronise both clocks (chronyc tracking, timedatectl)",
    )


def check_failsafe(lock: str) -> Finding:
    """Whether a failsafe runs, beside virt-handler.

    Args:
        lock: What it locks.
    """
    if is_locked(lock):
        return Finding("failsafe", Level.OK, "runs, and would give back to virt-handler what a dead daemon leaves")
    return Finding(
        "failsafe",
        Level.WARN,
        "none runs: a daemon that is killed, and not started anew, would stay in virt-handler's way",
        "run `migproxy failsafe` with the daemon's --control-socket (a container in daemonset.yaml)",
    )


# The relay


def check_relay(path: str, *, is_externally_managed: bool) -> Finding:
    """Whether a relay answers.

    Args:
        path: Its socket. Nothing is said there: it has one daemon, and refuses others.
        is_externally_managed: The daemon does not start one where none answers.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        try:
            sock.connect(path)
        except OSError as error:
            return _no_relay(path, error, is_externally_managed=is_externally_managed)
        pid, _, _ = peer_of(sock)
    return Finding("relay", Level.OK, f"process {pid} answers at {path}")


def _no_relay(path: str, error: OSError, *, is_externally_managed: bool) -> Finding:
    if isinstance(error, BlockingIOError):
        remedy = "see what holds it up, or end it (SIGKILL will do): the next one goes on with everything"
        return Finding("relay", Level.FAIL, f"the one at {path} accepts nobody", remedy)
    if not isinstance(error, FileNotFoundError | ConnectionRefusedError):
        remedy = "run this and the daemon as root or as the relay's user, and name the relay's socket (--relay-socket)"
        return Finding("relay", Level.FAIL, f"{path}: {error.strerror}", remedy)
    if not is_externally_managed:
        return Finding("relay", Level.OK, f"none runs at {path}: the daemon starts one")
    remedy = (
        "start it (systemctl start migproxy, or the pod's container relay); or leave --relay-externally-managed away, "
        "and the daemon starts one"
    )
    return Finding("relay", Level.FAIL, f"none answers at {path}: {error.strerror}; nothing is relayed", remedy)


# This node


@dataclass(frozen=True, slots=True)
class Patient:
    """What to look at; the daemon's options of the same names.

    Attributes:
        certificates: By role; none where TLS is off.
        relay_socket: Where the relay is reached.
        failsafe_lock: Beside virt-handler; else None.
    """

    migration_interface: str
    port_range: tuple[int, int] | None
    launcher_run_dir: str
    pods_dir: str
    congestion_control: str
    certificates: Mapping[str, Certificates]
    relay_socket: str
    relay_externally_managed: bool
    failsafe_lock: str | None = None


def interface_mtu(name: str) -> int | None:
    """Bytes that a packet on an interface may have; None where there is no such interface."""
    with suppress(OSError):
        return _ask_interface(name, _SIOCGIFMTU, "i")
    return None


def examine(patient: Patient, address: MigrationAddress) -> Iterator[Finding]:
    """Every check of this node that needs nobody else.

    Args:
        patient: What to look at.
        address: What `migration_address` said.
    """
    yield check_splice()
    yield check_pipe_size()
    yield check_congestion_control(patient.congestion_control)
    yield check_mptcp()
    yield check_address(address)
    yield from check_interface(patient.migration_interface)
    usable = None if address.problem or not address.addresses else address.addresses[0]
    yield from check_port_range(usable, patient.port_range)
    if "{pid}" in patient.launcher_run_dir:
        yield check_pods_dir(patient.pods_dir)
        yield check_pid_namespace()
    yield check_relay(patient.relay_socket, is_externally_managed=patient.relay_externally_managed)
    if patient.failsafe_lock:
        yield check_failsafe(patient.failsafe_lock)
    if patient.certificates:
        yield check_ktls()
    for role, paths in patient.certificates.items():
        for finding in check_certificates(paths):
            yield replace(finding, check=f"{role} {finding.check}")
