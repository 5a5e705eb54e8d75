"""What the Kubernetes side costs: first synchronisation, from a status change to the sockets, idle memory and CPU.

Run with: python -m benchmarks.kube. The API server is the test double, in a process of its own.
"""

import argparse
import asyncio
import calendar
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from asyncinotify import Inotify, Mask

from tests.kube.cluster import MERGE_PATCH, VMIS, Cluster, begin, cluster, end, vmi

VMI_BYTES = 12_000
"""About the size of a VMI with a disk, an interface and its managedFields."""


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vmis", type=int, default=1000)
    parser.add_argument("--changes", type=int, default=300)
    parser.add_argument("--idle", type=float, default=30, help="seconds over which the idle daemon is watched")
    options = parser.parse_args()
    # A launcher has its /run in memory; a disk would add its own latency.
    with tempfile.TemporaryDirectory(prefix="kube-", dir="/dev/shm") as folder:
        async with cluster(Path(folder), separate=True) as kubernetes:
            await measure(kubernetes, Path(folder), options)


async def measure(kubernetes: Cluster, folder: Path, options: argparse.Namespace) -> None:
    uids = {}
    for number in range(options.vmis):
        made = await kubernetes.request("POST", VMIS, vmi(f"vmi-{number}", padding=VMI_BYTES))
        uids[f"vmi-{number}"] = made["metadata"]["uid"]
    async with AsyncExitStack() as stack:
        daemon = Daemon(kubernetes, folder, uids)
        stack.push_async_callback(daemon.stop)
        synchronised = await daemon.start()
        cpu, began = daemon.cpu(), time.monotonic()
        await asyncio.sleep(options.idle)
        load = (daemon.cpu() - cpu) / (time.monotonic() - began)
        idle = daemon.memory()
        change = await changes(kubernetes, daemon, random.Random(1).choices(sorted(uids), k=options.changes))
        plain = [await timed(kubernetes.request("GET", f"{VMIS}/vmi-0")) for _ in range(options.changes)]
        print(
            f"{options.vmis} VMIs of {VMI_BYTES} bytes; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )
        row("first synchronisation", f"{synchronised:.2f} s", "2 s")
        row("idle memory (RSS)", f"{idle:.0f} MiB", "130 MiB")
        row("memory after the changes", f"{daemon.memory():.0f} MiB", "")
        row("idle CPU", f"{load:.2%} of a core", "1 %")
        row("status change to sockets", quantiles(change), "p99 20 ms")
        row("plain GET of a VMI", quantiles(plain), "")


class Daemon:
    """A migproxy with a launcher for each VMI."""

    def __init__(self, kubernetes: Cluster, folder: Path, uids: dict[str, str]) -> None:
        self.launchers = folder / "launchers"
        self.uids = uids
        self._log = folder / "migproxy.log"
        self._process: subprocess.Popen[bytes] | None = None
        for uid in uids.values():
            (self.launchers / uid / "kubevirt/migrationproxy").mkdir(parents=True)
        kubeconfig = kubernetes.kubeconfig(folder, "node01")
        self._command = [sys.executable, "-m", "migproxy", "run", "--node-name", "node01", "--log-format", "json"]
        self._command += ["--kubeconfig", str(kubeconfig), "--migration-address", "127.78.0.1", "--disable-tls"]
        self._command += ["--launcher-run-dir", f"{self.launchers}/{{uid}}", "--control-socket", f"{folder}/control"]
        self._command += ["--http-listen", "127.0.0.1:0", "--socket-owner", f"{os.getuid()}:{os.getgid()}"]

    async def start(self) -> float:
        """Starts it, and returns the seconds from there to its synchronisation, imports and all."""
        began = time.time()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stderr=log)
        while not any(event.get("event") == "synchronised" for event in self._events()):
            assert self._process.poll() is None, self._log.read_text()
            await asyncio.sleep(0.02)
        (event,) = [event for event in self._events() if event.get("event") == "synchronised"]
        assert event["vmis"] == len(self.uids)
        at = time.strptime(event["timestamp"][:19], "%Y-%m-%dT%H:%M:%S")
        return calendar.timegm(at) + float("0" + event["timestamp"][19:-1]) - began

    def _events(self) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def memory(self) -> float:
        """Its resident set, in MiB."""
        (line,) = [one for one in Path(f"/proc/{self.pid}/status").read_text().splitlines() if one.startswith("VmRSS")]
        return int(line.split()[1]) / 1024

    def cpu(self) -> float:
        """The seconds of CPU that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()


async def changes(kubernetes: Cluster, daemon: Daemon, names: Sequence[str]) -> list[float]:
    """Seconds from sending the patch that publishes a target, to both sockets being in place."""
    seconds = []
    for number, name in enumerate(names):
        uid = daemon.uids[name]
        patch = begin(f"migration-{number}")
        patch["status"]["migrationState"] |= dict.fromkeys(("endTimestamp", "completed", "failed"))
        ports = {"targetNodeAddress": "127.78.0.2", "targetDirectMigrationNodePorts": {"1": 0, "2": 49152}}
        await kubernetes.request("PATCH", f"{VMIS}/{name}", patch, MERGE_PATCH)
        with Inotify() as inotify:
            inotify.add_watch(daemon.launchers / uid / "kubevirt/migrationproxy", Mask.MOVED_TO)
            began = time.perf_counter()
            publishing = kubernetes.request(
                "PATCH", f"{VMIS}/{name}", {"status": {"migrationState": ports}}, MERGE_PATCH
            )
            answer = asyncio.create_task(publishing)
            for _ in range(2):
                await asyncio.wait_for(inotify.get(), 30)
            seconds.append(time.perf_counter() - began)
            await answer
        over = end(failed=True)
        over["status"]["migrationState"] |= dict.fromkeys(ports)
        await kubernetes.request("PATCH", f"{VMIS}/{name}", over, MERGE_PATCH)
    return seconds


async def timed(request: Any) -> float:
    began = time.perf_counter()
    await request
    return time.perf_counter() - began


def quantiles(seconds: Sequence[float]) -> str:
    cut = statistics.quantiles(seconds, n=100)
    return f"p50 {cut[49] * 1e3:.1f} ms, p99 {cut[98] * 1e3:.1f} ms, worst {max(seconds) * 1e3:.1f} ms"


def row(what: str, value: str, limit: str) -> None:
    print(f"  {what:28}{value:48}{limit and 'to be under ' + limit}")


if __name__ == "__main__":
    asyncio.run(main())
