"""What is compared: pairs of relays, each a source (unix -> TCP) and a target (TCP -> unix)."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from migproxy.bench.stage import BenchError, Network, Process, Stage, until
from migproxy.portmap import Channel, source_socket_name, target_socket_path
from migproxy.settings import Settings

LIMIT = "limit"
MIGPROXY = "migproxy"
MTLS = f"{MIGPROXY}-mtls"
KTLS = f"{MIGPROXY}-ktls"
GO = "go"
GO_MTLS = f"{GO}-mtls"
DIRECT = "no relay"

NGINX_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"

_HAPROXY = """
global
    maxconn 4096
    tune.pipesize 1048576
defaults
    mode tcp
    option splice-auto
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen relay
    bind {listen}
    server next {connect}
"""

_NGINX = """
load_module {module};
user root;
worker_processes auto;
worker_rlimit_nofile 8192;
error_log {folder}/error.log;
pid {folder}/nginx.pid;
daemon off;
events {{ worker_connections 4096; }}
stream {{
    server {{
        listen {listen};
        proxy_pass {connect};
        proxy_buffer_size 256k;
        proxy_timeout 1h;
        tcp_nodelay on;
    }}
}}
"""


class Contestant(ABC):
    """A running pair of relays; a context manager that owns its processes.

    Attributes:
        name: For the tables.
        sources: Unix sockets to connect to, one for each migration.
        targets: Unix sockets that are connected to in turn.
    """

    name: str
    sources: list[str]
    targets: list[str]

    def __init__(self, name: str) -> None:
        self.name = name
        self.sources, self.targets = [], []
        self._processes: list[Process] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @abstractmethod
    def _start(self) -> None: ...

    def _run(self, command: Sequence[str], log: Path) -> Process:
        process = Process(command, log)
        self._stack.callback(process.close)
        self._processes.append(process)
        return process

    @property
    def pids(self) -> list[int]:
        """The relays' processes."""
        return [process.pid for process in self._processes]

    def check(self) -> None:
        """Raises BenchError, with its last words, where a relay has ended."""
        for process in self._processes:
            if process.has_ended:
                raise process.failure("ended")


class Direct(Contestant):
    """No relay at all: what the generator itself can do."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(DIRECT)
        self._stage = stage

    def _start(self) -> None:
        self.sources = self.targets = [str(self._stage.subfolder("direct") / "d")]


@dataclass(frozen=True, slots=True)
class Templates:
    """How a pair of relays is started; {source} and {target} are its unix sockets, {address} and {port} where the
    target listens, {folder} a folder of its own.

    Attributes:
        source, target: The commands.
        files: Files to write into the folder first, by name; with the same placeholders.
    """

    source: str
    target: str
    files: Mapping[str, str] = field(default_factory=dict)


class Commands(Contestant):
    """A pair of relays started by commands."""

    def __init__(self, name: str, templates: Templates, stage: Stage, network: Network, port: int) -> None:
        super().__init__(name)
        self._templates, self._stage, self._network, self._port = templates, stage, network, port

    def _start(self) -> None:
        folder = self._stage.subfolder(self.name.replace("/", "-").replace(" ", "-")[:16])
        source, target = folder / "s", folder / "t"
        self.sources, self.targets = [str(source)], [str(target)]
        places = {
            "source": str(source),
            "target": str(target),
            "address": self._network.target,
            "port": str(self._port),
            "folder": str(folder),
        }
        try:
            for name, text in self._templates.files.items():
                (folder / name).write_text(text.format_map(places))
            target_command = shlex.split(self._templates.target.format_map(places))
            source_command = shlex.split(self._templates.source.format_map(places))
        except (KeyError, ValueError, IndexError) as error:
            raise BenchError(f"{self.name}: its command template cannot be filled in: {error}") from error
        for command in (target_command, source_command):
            if not command or not shutil.which(command[0]):
                raise BenchError(f"{self.name}: there is no command {command[:1]}")
        listening = self._run([*self._network.target_prefix, *target_command], folder / "target.log")
        until(lambda: self._ended() or _listens(listening.pid, self._port), f"{self.name} to listen on {self._port}")
        self.check()
        self._run(source_command, folder / "source.log")
        until(lambda: self._ended() or source.is_socket(), f"{self.name} to listen on {source}")
        self.check()

    def _ended(self) -> bool:
        return any(process.has_ended for process in self._processes)


def _listens(pid: int, port: int) -> bool:
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                return True
    return False


def peers(stage: Stage) -> dict[str, Templates]:
    """Those that come with the benchmark, the limit first, whether installed or not."""
    haproxy = {
        "source.cfg": _HAPROXY.replace("{listen}", "unix@{source}").replace("{connect}", "{address}:{port}"),
        "target.cfg": _HAPROXY.replace("{listen}", "{address}:{port}").replace("{connect}", "unix@{target}"),
    }
    module = NGINX_MODULE
    nginx_source = _NGINX.replace("{listen}", "unix:{source}").replace("{connect}", "{address}:{port}")
    nginx_target = _NGINX.replace("{listen}", "{address}:{port}").replace("{connect}", "unix:{target}")
    nginx = "nginx -p {folder} -e {folder}/error.log -c {folder}/"
    return {
        LIMIT: Templates(
            f"{stage.limit} source {{source}} {{address}} {{port}}",
            f"{stage.limit} target {{target}} {{address}} {{port}}",
        ),
        "socat": Templates(
            "socat -b 262144 UNIX-LISTEN:{source},fork,backlog=512 TCP:{address}:{port},nodelay",
            "socat -b 262144 TCP-LISTEN:{port},bind={address},fork,reuseaddr,backlog=512,nodelay UNIX-CONNECT:{target}",
        ),
        "haproxy": Templates("haproxy -db -f {folder}/source.cfg", "haproxy -db -f {folder}/target.cfg", haproxy),
        "nginx": Templates(
            f"{nginx}source.conf",
            f"{nginx}target.conf",
            {
                "source.conf": nginx_source.replace("{module}", module).replace("nginx.pid", "source.pid"),
                "target.conf": nginx_target.replace("{module}", module).replace("nginx.pid", "target.pid"),
            },
        ),
    }


def go_peer(stage: Stage, *, mtls: bool) -> Templates:
    """What KubeVirt's migration proxy does (peer.go)."""
    ends = "{address}:{port}" + (f" {stage.certificates}" if mtls else "")
    return Templates(f"{stage.peer} source {{source}} {ends}", f"{stage.peer} target {{target}} {ends}")


def missing(name: str) -> str | None:
    """The package that a peer lacks here, None where it can run."""
    if name in (GO, GO_MTLS) and not shutil.which("go"):
        return "golang-go"
    if name in ("socat", "haproxy") and not shutil.which(name):
        return name
    if name == "nginx" and not (shutil.which("nginx") and Path(NGINX_MODULE).exists()):
        return "nginx libnginx-mod-stream"
    return None


def daemons(stage: Stage) -> dict[str, tuple[str, ...]]:
    """The ways in which migproxy takes part, and its options: in plaintext, and with TLS where this version has it."""
    plain: dict[str, tuple[str, ...]] = {MIGPROXY: ("--disable-tls",)}
    if "tls_dir" not in Settings.model_fields:
        return plain
    protected = ("--tls-dir", stage.certificates, "--ktls")
    return plain | {MTLS: (*protected, "off"), KTLS: (*protected, "on")}


class Migproxy(Contestant):
    """Two real daemons and their relays, with a folder of VMIs of which some migrate from the one node to the other.

    Attributes:
        vmis: The folder of VMIs that both watch.
        controls: The control sockets of the target's and the source's daemon.
        parts: The processes of the daemons, and those of the relays, by "daemon" and "relay".

    Args:
        migrations: How many VMIs migrate.
        options: What both are started with besides what joins them.
    """

    def __init__(
        self,
        stage: Stage,
        network: Network,
        *,
        name: str = MIGPROXY,
        migrations: int = 1,
        options: Sequence[str] = ("--disable-tls",),
    ) -> None:
        super().__init__(name)
        self._stage, self._network, self._migrations, self._options = stage, network, migrations, options
        self._folder = stage.subfolder("migproxy")
        self.vmis = self._folder / "vmis"
        self.vmis.mkdir()
        self.controls = [f"{self._folder}/{node}.control" for node in ("target", "source")]
        self.parts: dict[str, list[int]] = {"daemon": [], "relay": []}

    def _start(self) -> None:
        for number in range(self._migrations):
            self.add(f"vm{number}")
        network = self._network
        for node, address, prefix, control in (
            ("target", network.target, network.target_prefix, self.controls[0]),
            ("source", network.source, (), self.controls[1]),
        ):
            relay = f"{self._folder}/{node}.relay"
            moves = self._run([sys.executable, "-m", "migproxy.relay", relay], self._folder / f"{node}.relay.log")
            daemon = ["-m", "migproxy", "run", "--node-name", node, "--vmi-dir", str(self.vmis)]
            daemon += ["--launcher-run-dir", f"{self._folder}/{node[0]}/{{uid}}", "--migration-address", address]
            daemon += ["--libvirt-socket", "libvirtd", "--control-socket", control, "--http-listen", "off"]
            daemon += ["--relay-socket", relay, "--relay-externally-managed"]
            decides = self._run([*prefix, sys.executable, *daemon, *self._options], self._folder / f"{node}.log")
            self.parts["relay"].append(moves.pid)
            self.parts["daemon"].append(decides.pid)
        until(lambda: self._ended() or all(Path(path).is_socket() for path in self.sources), "migproxy's sockets", 60)
        self.check()

    def _ended(self) -> bool:
        return any(process.has_ended for process in self._processes)

    def add(self, uid: str) -> Path:
        """Writes a VMI that migrates, and returns its file; its sockets are the last of `sources` and `targets`."""
        source, target = (self._folder / side / uid for side in "st")
        (source / "kubevirt").mkdir(parents=True)
        (target / "kubevirt/migrationproxy").mkdir(parents=True)
        self.sources.append(f"{source}/kubevirt/migrationproxy/{source_socket_name(uid, Channel.DIRECT)}")
        self.targets.append(f"{target}/{target_socket_path(uid, Channel.DIRECT, 'libvirtd')}")
        return self.write(f"{uid}.json", vmi(uid, migrating=True))

    def write(self, name: str, document: Mapping[str, Any]) -> Path:
        """Puts a file into the folder of VMIs, whole at once."""
        new, path = self.vmis / f".{name}", self.vmis / name
        new.write_text(json.dumps(document))
        return new.rename(path)


def vmi(uid: str, *, migrating: bool) -> dict[str, Any]:
    """A VMI as a cluster has it, on its node or on its way from "source" to "target"."""
    status: dict[str, Any] = {
        "phase": "Running",
        "nodeName": "source",
        "migrationMethod": "LiveMigration",
        "migrationTransport": "Unix",
        "activePods": {str(uuid.uuid4()): "source"},
        "conditions": [{"type": "Ready", "status": "True"}, {"type": "LiveMigratable", "status": "True"}],
        "interfaces": [{"name": "default", "ipAddress": "10.244.1.17", "mac": "02:00:00:00:00:01"}],
    }
    labels = {"kubevirt.io/nodeName": "source"}
    if migrating:
        labels["kubevirt.io/migrationTargetNodeName"] = "target"
        status["migrationState"] = {
            "migrationUid": str(uuid.uuid4()),
            "sourceNode": "source",
            "targetNode": "target",
        }
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {"namespace": "default", "name": uid, "uid": uid, "labels": labels},
        "spec": {"evictionStrategy": "LiveMigrate"},
        "status": status,
    }
