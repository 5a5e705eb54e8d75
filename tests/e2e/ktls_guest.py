"""Runs inside the virtual machine of test_ktls_vm: two daemons with mTLS move hashed streams, in each mode.

Prints one line of JSON for each mode: what the kernel counted, what the daemons report, and their CPU time.
"""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from demo.lab import MIGPROXY, Lab, background, run
from demo.stream import CONNECTIONS, Streams

SIZE = 1 << 20  # bytes of each direction of each connection


def kernel_counters() -> dict[str, int]:
    """The kernel's own account of its TLS sockets (Documentation/networking/tls.rst, Statistics)."""
    lines = Path("/proc/net/tls_stat").read_text().splitlines()
    return {name: int(value) for name, value in map(str.split, lines)}


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads: where the virtual machine counts instructions, their number."""
    return time.clock_gettime(~pid << 3 | 2)  # CPUCLOCK_SCHED of another process, linux/posix-timers.h


async def measure(certificates: str, *options: str) -> dict[str, Any]:
    """Moves streams both ways through a pair of daemons."""
    async with Lab(libvirt=False, loopback=True) as lab:
        source, target = lab.nodes
        for node in lab.nodes:
            node.proxy.arguments.remove("--disable-tls")
            await node.proxy.start("--tls-dir", certificates, *options)
        streams = Streams(source, target, lab.vmi.read()["metadata"]["uid"], SIZE)
        before = kernel_counters()
        most: dict[str, int] = {}
        async with lab.migration(source, target, block=True) as uid:
            used = [cpu_seconds(node.proxy.pid) for node in lab.nodes]
            async with background(watch(most)):
                await streams.exchange()
            spent = sum(cpu_seconds(node.proxy.pid) - then for node, then in zip(lab.nodes, used, strict=True))
        return {
            "options": options,
            "bytes": sum(streams.moved(channel) for channel in CONNECTIONS),
            "cpu_seconds": spent,
            "most": most,
            "before": before,
            "after": kernel_counters(),
            "status": [await node.proxy.status() for node in lab.nodes],
            "uid": uid,
            "log": [node.proxy.log.read_text() for node in lab.nodes],
        }


async def watch(most: dict[str, int]) -> None:
    """Notes the most TLS sockets that the kernel had at one time."""
    while True:
        for name, value in kernel_counters().items():
            most[name] = max(value, most.get(name, 0))
        await asyncio.sleep(0.05)


async def main() -> None:
    """Measures with the kernel's TLS, without, and with TLS 1.3 alone, of which OpenSSL 3.0 offloads one direction."""
    subprocess.run(["modprobe", "tls"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    certificates = "/tmp/certificates"
    await run(*MIGPROXY, "certs", certificates)
    for options in (("--ktls", "on"), ("--ktls", "off"), ("--ktls", "auto", "--tls-min-version", "1.3")):
        print("RESULT", json.dumps(await measure(certificates, *options)), flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
