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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from demo.lab import LabError, Node, VMIFile, until
from demo.stream import CONNECTIONS, Streams
from migproxy import control, daemon, devcerts, logs
from migproxy.relay.process import Relay
from migproxy.settings import Settings

SMALL, LARGE = 1 << 20, 64 << 20  # bytes, of all streams together
DEADLINE = 300.0
ADDRESSES = {"node01": "127.0.0.1", "node02": "127.0.0.2"}
MODES: tuple[tuple[dict[str, str], int], ...] = (
    ({"ktls": "on"}, LARGE),
    ({"ktls": "off"}, LARGE),
    ({"ktls": "auto", "tls_min_version": "1.3"}, SMALL),  # of which OpenSSL 3.0 offloads one direction
)


def kernel_counters() -> dict[str, int]:
    """The kernel's own account of its TLS sockets (Documentation/networking/tls.rst, Statistics)."""
    lines = Path("/proc/net/tls_stat").read_text().splitlines()
    return {name: int(value) for name, value in map(str.split, lines)}


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads: where the virtual machine counts instructions, their number."""
    return time.clock_gettime(~pid << 3 | 2)  # CPUCLOCK_SCHED of another process, linux/posix-timers.h


def serve(node: Node, vmis: Path, certificates: str, mode: dict[str, str]) -> NoReturn:
    """Is a node's daemon, until it ends."""
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
            **mode,
        }
    )
    try:
        os.dup2(os.open(node.proxy.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        logs.configure("json", "info")
        uvloop.run(daemon.serve(settings, lambda: settings))
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


def start(node: Node, vmis: Path, certificates: str, mode: dict[str, str]) -> int:
    """Starts a node's daemon, and returns its process ID."""
    return os.fork() or serve(node, vmis, certificates, mode)


def ended(pids: list[int]) -> bool:
    """Whether one of these children is over."""
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids)


def measure(certificates: str, mode: dict[str, str], size: int) -> dict[str, Any]:
    """Moves streams both ways through a pair of daemons."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        vmis = Path(folder) / "vmis"
        vmis.mkdir()
        vmi = VMIFile(vmis / "vmi.yaml")
        nodes = [Node(name, address, Path(folder) / name) for name, address in ADDRESSES.items()]
        pids = [start_relay(node) for node in nodes]
        pids += [start(node, vmis, certificates, mode) for node in nodes]
        try:
            return {"mode": mode} | asyncio.run(exchange(vmi, nodes, pids, size))
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
    most = dict(before)
    moved, spent = [], []
    for step in (SMALL, size):
        streams = Streams(source, target, vmi.read()["metadata"]["uid"], step)
        used = sum(map(cpu_seconds, pids))
        running = asyncio.create_task(streams.exchange())
        while not running.done():
            most = {name: max(value, most[name]) for name, value in kernel_counters().items()}
            await asyncio.wait([running], timeout=0.05)
        await running
        spent.append(sum(map(cpu_seconds, pids)) - used)
        moved.append(sum(streams.moved(channel) for channel in CONNECTIONS))
    status = [control.ask(str(node.proxy.control)) for node in nodes]
    return {
        "bytes": moved,
        "cpu_seconds": spent,
        "open": {name: most[name] - before[name] for name in ("TlsCurrTxSw", "TlsCurrRxSw")},
        "total": {name: value - before[name] for name, value in kernel_counters().items()},
        "tls": [report["tls"] for report in status],
        "channels": [report["migrations"][0]["channels"] for report in status],
    }


@contextmanager
def prepared() -> Iterator[str]:
    """Makes the virtual machine fit for daemons; yields the folder of their certificates."""
    subprocess.run(["modprobe", "tls"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory() as certificates:
        devcerts.make(certificates, days=2)
        yield certificates


def main() -> None:
    """Measures each mode."""
    with prepared() as certificates:
        for mode, size in MODES:
            print("RESULT", json.dumps(measure(certificates, mode, size)), flush=True)


if __name__ == "__main__":
    main()
