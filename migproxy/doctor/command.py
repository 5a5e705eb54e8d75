"""What the command line asks of the doctor: examine this node, or answer another one's."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from migproxy import route
from migproxy.doctor import api, host, peer
from migproxy.doctor.finding import Finding, Level, render
from migproxy.doctor.peer import PeerError
from migproxy.netif import AddressWatcher, MigrationAddress
from migproxy.portmap import AddressError, IPAddress, parse_address
from migproxy.settings import Settings, option

__all__ = ["PeerError", "Request", "examine", "serve"]


_PASSED_ON = (
    "congestion_control",
    "tls_dir",
    "tls_cert",
    "tls_key",
    "tls_server_dir",
    "tls_client_dir",
    "tls_client_names",
    "tls_server_names",
    "tls_min_version",
    "tls_ciphers",
    "ktls",
)
_PASSED_ON_FLAGS = ("disable_tls", "tls_externally_managed")
"""Options of the daemons that measure the path, where they are given."""


@dataclass(frozen=True, slots=True)
class Request:
    """The command's options.

    Attributes:
        settings: The daemon's.
        peer: The other node's migration address.
        port: That it serves on.
        seconds: To measure the throughput for.
    """

    settings: Settings
    peer: str | None
    port: int
    seconds: float

    @property
    def ca(self) -> str | None:
        """The CA bundle: in a cluster, the daemon reads it from the API and keeps it beside its control socket."""
        settings = self.settings
        if settings.tls_ca or settings.tls_dir or not api.is_configured(settings.kubeconfig):
            return settings.tls_ca
        return settings.cluster_ca

    @property
    def certificates(self) -> dict[str, host.Certificates]:
        """What each role shows, and checks the other by."""
        settings = self.settings
        server, client = settings.certificate_files(self.ca)
        names = {"server": settings.tls_server_names, "client": settings.tls_client_names}
        return {
            role: host.Certificates(files.bundle(), files.cert, files.key, names[role])
            for role, files in (("server", server), ("client", client))
        }

    @property
    def daemon_options(self) -> list[str]:
        """What the daemons that measure the path are started with."""
        given = self.settings.model_fields_set
        values = {name: getattr(self.settings, name) for name in _PASSED_ON if name in given}
        chosen = [part for name, value in values.items() for part in (option(name), _text(value))]
        chosen += [option(name) for name in _PASSED_ON_FLAGS if getattr(self.settings, name)]
        return [*chosen, "--tls-ca", self.ca] if self.ca else chosen


def _text(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def examine(request: Request, *, as_json: bool) -> int:
    """Runs the checks and prints what they found; returns the exit status, 1 where one failed."""
    findings = []
    for finding in _findings(request):
        findings.append(finding)
        if not as_json and sys.stdout.isatty():
            print(render([finding]).rpartition("\n")[0], flush=True)  # noqa: T201 - the command's output
    if as_json:
        failed = any(one.level is Level.FAIL for one in findings)
        print(json.dumps({"ok": not failed, "findings": [asdict(one) for one in findings]}, indent=2))  # noqa: T201
    elif sys.stdout.isatty():
        print(render(findings).rpartition("\n")[2])  # noqa: T201
    else:
        print(render(findings))  # noqa: T201
    return int(any(one.level is Level.FAIL for one in findings))


def _findings(request: Request) -> Iterator[Finding]:
    settings = request.settings
    if api.is_configured(settings.kubeconfig):
        yield from api.check_api(
            settings.kubeconfig, settings.context, settings.kubevirt_namespace, beside=settings.is_beside
        )
    address = _address(settings)
    yield from host.examine(
        host.Patient(
            settings.migration_interface,
            settings.port_range,
            settings.launcher_run_dir,
            settings.pods_dir,
            settings.congestion_control,
            {} if settings.disable_tls else request.certificates,
            settings.relay_path,
            settings.relay_externally_managed,
            settings.failsafe_lock if settings.is_beside and api.is_configured(settings.kubeconfig) else None,
        ),
        address,
    )
    if request.peer is not None:
        yield from _check_peer(request, request.peer, address)


def _check_peer(request: Request, peer_address: str, address: MigrationAddress) -> Iterator[Finding]:
    try:
        far = parse_address(peer_address)
    except AddressError as error:
        yield Finding("peer", Level.FAIL, str(error), "give --peer the other node's migration address")
        return
    own = address.of_version(far.version)
    if own is None:
        yield Finding(
            "peer",
            Level.FAIL,
            f"this node has no IPv{far.version} migration address to reach {far} from",
            f"give {request.settings.migration_interface} one, or say --migration-address",
        )
        return
    departure = route.depart(far, own)
    yield host.check_route(departure, far)
    if not departure.has_route:
        return
    mtu = host.interface_mtu(request.settings.migration_interface)
    yield from peer.check_peer(far, request.port, departure.address, mtu, request.daemon_options, request.seconds)


def serve(request: Request) -> int:
    """Answers another node's checks until SIGINT or SIGTERM.

    Raises:
        PeerError: That cannot be done; says why.
    """
    address = _address(request.settings)
    if address.problem or not address.addresses:
        raise PeerError(f"no migration address to serve on: {address.problem}")
    where: IPAddress = address.addresses[0]
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with peer.serve(where, request.port, request.daemon_options):
        print(f"serving; on the other node: migproxy doctor --peer {where}", flush=True)  # noqa: T201
        ended.wait()
    return 0


def _address(settings: Settings) -> MigrationAddress:
    watcher = AddressWatcher(settings.migration_interface, settings.migration_address, settings.pod_ip)
    return asyncio.run(host.migration_address(watcher))
