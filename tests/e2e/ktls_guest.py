"""Runs inside the virtual machine of test_ktls_vm: two daemons with mTLS move hashed streams, in each mode.

Prints one line of JSON for each mode: what the kernel counted, what the daemons report, and their CPU time.

The daemons are forked, not started: over the virtual machine's file system, imports take longer than anything else.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import uvloop
from OpenSSL import SSL

from demo.lab import LabError, Node, VMIFile, until
from demo.stream import CONNECTIONS, Streams
from migproxy import control, daemon, devcerts, logs
from migproxy.bench.meter import usage
from migproxy.relay.process import Relay
from migproxy.settings import Settings
from migproxy.tls import MutualTLS

SMALL, LARGE = 1 << 20, 64 << 20  # bytes, of all streams together
DEADLINE = 300.0
ADDRESSES = {"node01": "127.0.0.1", "node02": "127.0.0.2"}
CHACHA20 = "TLS_CHACHA20_POLY1305_SHA256,TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"


@dataclass(frozen=True)
class Mode:
    """How two daemons protect their connections.

    Attributes:
        source, target: Where each of them encrypts (--ktls).
        version: TLS's.
        size: Bytes to move.
        ciphers: See --tls-ciphers; empty for its default.
    """

    name: str
    source: str
    target: str
    version: str = "1.3"
    size: int = SMALL
    ciphers: str = ""


MODES = (
    Mode("kernel", "on", "on", size=LARGE),
    Mode("user space", "off", "off", size=LARGE),
    Mode("the source's kernel", "on", "off"),
    Mode("the target's kernel", "off", "on"),
    Mode("kernel, 1.2", "on", "on", "1.2"),
    Mode("the source's kernel, 1.2", "on", "off", "1.2"),
    Mode("kernel, ChaCha20", "on", "on", ciphers=CHACHA20),
    Mode("kernel, ChaCha20, 1.2", "on", "on", "1.2", ciphers=CHACHA20),
)


def kernel_counters() -> Counter[str]:
    """The kernel's own account of its TLS sockets (Documentation/networking/tls.rst, Statistics)."""
    path = Path("/proc/net/tls_stat")
    lines = path.read_text().splitlines() if path.exists() else []  # the first daemon has the module loaded
    return Counter({name: int(value) for name, value in map(str.split, lines)})


def securities(node: Node) -> list[str]:
    """What protected a daemon's connections, as its log says."""
    lines = [json.loads(line) for line in node.proxy.log.read_text().splitlines() if line.startswith("{")]
    return sorted({line["security"] for line in lines if line.get("event") == "connection opened"})


def serve(node: Node, vmis: Path, certificates: str, mode: Mode, ktls: str) -> NoReturn:
    """Is a node's daemon, until it ends."""
    if mode.version == "1.2":
        make = MutualTLS._context

        def limited(self: MutualTLS, *, server: bool) -> SSL.Context:
            context = make(self, server=server)
            context.set_max_proto_version(SSL.TLS1_2_VERSION)
            return context

        MutualTLS._context = limited  # type: ignore[method-assign]
    settings = Settings.model_validate(
        {
            "node_name": node.name,
            "vmi_dir": str(vmis),
            "migration_address": node.address,
            "launcher_run_dir": str(node.run_dir),
            "libvirt_socket": "libvirt/libvirt-sock",
            "control_socket": str(node.proxy.control),
            "relay_socket": str(node.relay.socket),
            "relay_externally_managed": True,
            "http_listen": "off",
            "tls_dir": certificates,
            "ktls": ktls,
            **({"tls_ciphers": mode.ciphers} if mode.ciphers else {}),
        }
    )
    try:
        os.dup2(os.open(node.proxy.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        logs.configure("json", "info")
        uvloop.run(daemon.serve(settings, lambda: settings))
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


def start_relay(node: Node) -> int:
    """Starts a node's relay, and returns its process ID."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # of the streams, whose ends it would keep open
        os.dup2(os.open(node.relay.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        Relay(str(node.relay.socket)).serve()
    finally:
        os._exit(0)


def start(node: Node, vmis: Path, certificates: str, mode: Mode, ktls: str) -> int:
    """Starts a node's daemon, and returns its process ID."""
    return os.fork() or serve(node, vmis, certificates, mode, ktls)


def ended(pids: list[int]) -> bool:
    """Whether one of these children is over."""
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids)


def measure(certificates: str, mode: Mode) -> dict[str, Any]:
    """Moves streams both ways through a pair of daemons."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        vmis = Path(folder) / "vmis"
        vmis.mkdir()
        vmi = VMIFile(vmis / "vmi.yaml")
        nodes = [Node(name, address, Path(folder) / name) for name, address in ADDRESSES.items()]
        pids = [start_relay(node) for node in nodes]
        pids += [
            start(node, vmis, certificates, mode, ktls)
            for node, ktls in zip(nodes, (mode.source, mode.target), strict=True)
        ]
        try:
            return {"mode": mode.name} | asyncio.run(exchange(vmi, nodes, pids, mode.size))
        except Exception:
            for node in nodes:
                print(node.proxy.log.read_text(), file=sys.stderr)
            raise
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


async def exchange(vmi: VMIFile, nodes: list[Node], pids: list[int], size: int) -> dict[str, Any]:
    """Carries one migration through, and returns what everybody counted."""
    source, target = nodes
    before = kernel_counters()
    vmi.begin(source, target, block=True)
    await until(lambda: ended(pids) or len(source.sockets()) == len(CONNECTIONS), "the source's sockets", DEADLINE)
    if ended(pids):
        raise LabError("a daemon did not start")
    vmi.start()
    most = before.copy()
    moved, spent = [], []
    for step in (SMALL, SMALL, size):  # the first has the workers started
        streams = Streams(source, target, vmi.read()["metadata"]["uid"], step)
        used = usage(pids).cpu
        running = asyncio.create_task(streams.exchange())
        while not running.done():
            most |= kernel_counters()
            await asyncio.wait([running], timeout=0.05)
        await running
        spent.append(usage(pids).cpu - used)
        moved.append(sum(streams.moved(channel) for channel in CONNECTIONS))
    status = [control.ask(str(node.proxy.control)) for node in nodes]
    return {
        "bytes": moved[1:],
        "cpu_seconds": spent[1:],
        "open": {name: most[name] - before[name] for name in ("TlsCurrTxSw", "TlsCurrRxSw")},
        "total": {name: value - before[name] for name, value in kernel_counters().items()},
        "tls": [report["tls"] for report in status],
        "security": [securities(node) for node in nodes],
        "channels": [report["migrations"][0]["channels"] for report in status],
    }


@contextmanager
def prepared() -> Iterator[str]:
    """Makes the virtual machine fit for daemons; yields the folder of their certificates."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory() as certificates:
        devcerts.make(certificates, days=2)
        yield certificates


def main() -> None:
    """Measures each mode."""
    with prepared() as certificates:
        for mode in MODES:
            print("RESULT", json.dumps(measure(certificates, mode)), flush=True)


if __name__ == "__main__":
    main()
