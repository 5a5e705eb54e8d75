"""What a scrape each second costs: the daemon's CPU time, and throughput of eight streams, in pairs of periods.

    scripts/sandbox .venv/bin/python -m benchmarks.scrape [--pairs 12] [--seconds 5]

The CPU time of a scrape is the same on a busy machine as on an idle one, so it is the figure to trust; it is taken
while the eight connections are open and silent. Then the streams run on throughout: each pair is a period without
scrapes and one in which both daemons are scraped each second, in turns first. The figure is the median of the pairs'
ratios, which a machine that others use too moves less than either period's rate.
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from demo.lab import Lab, Node, run
from migproxy.portmap import Channel, source_socket_name, target_socket_path

STREAMS = 8
_CHUNK = 1 << 20
_SCRAPES = 100


class Load:
    """Connections from one launcher to the other; streams at full speed once told to go, until closed."""

    def __init__(self, source: Node, target: Node, key: str, count: int) -> None:
        self._stack = ExitStack()
        self._taken = [0] * count
        self.go = threading.Event()
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(self._short(target.run_dir / target_socket_path(key, Channel.DIRECT, "libvirt/libvirt-sock")))
        listener.listen()
        departure = self._short(source.migrationproxy / source_socket_name(key, Channel.DIRECT))
        for number in range(count):
            sender = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            sender.connect(departure)
            taker = self._stack.enter_context(listener.accept()[0])
            for work in (self._send, sender), (self._take, taker, number):
                threading.Thread(target=work[0], args=work[1:], daemon=True).start()
            self._stack.callback(sender.shutdown, socket.SHUT_RDWR)

    @property
    def taken(self) -> int:
        """Bytes that have arrived."""
        return sum(self._taken)

    def close(self) -> None:
        """Ends the streams."""
        self.go.set()
        self._stack.close()

    def _short(self, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_PATH)
        self._stack.callback(os.close, folder)
        return f"/proc/self/fd/{folder}/{path.name}"

    def _send(self, sock: socket.socket) -> None:
        chunk = os.urandom(_CHUNK)
        self.go.wait()
        try:
            while True:
                sock.sendall(chunk)
        except OSError:
            return

    def _take(self, sock: socket.socket, number: int) -> None:
        buffer = bytearray(_CHUNK)
        try:
            while count := sock.recv_into(buffer):
                self._taken[number] += count
        except OSError:
            return


def scrape(nodes: list[Node]) -> float:
    """Scrapes each node once; returns the longest time that one took, in seconds."""
    longest = 0.0
    for node in nodes:
        began = time.perf_counter()
        with urllib.request.urlopen(f"http://{node.address}:9470/metrics", timeout=30) as answer:
            answer.read()
        longest = max(longest, time.perf_counter() - began)
    return longest


def period(load: Load, seconds: float, nodes: list[Node]) -> tuple[float, list[float]]:
    """Bytes per second that arrive, and how long scrapes took; without nodes there are none."""
    began, before, latencies = time.perf_counter(), load.taken, []
    while (passed := time.perf_counter() - began) < seconds:
        if nodes:
            latencies.append(scrape(nodes))
        time.sleep(max(0.0, min(1.0, seconds - passed) - (latencies[-1] if latencies else 0)))
    return (load.taken - before) / (time.perf_counter() - began), latencies


async def measure(pairs: int, seconds: float) -> None:
    """Measures and prints."""
    async with Lab(libvirt=False, tls=False) as lab:
        await run("ip", "address", "add", "10.1.1.254/24", "dev", "migration")
        for node in lab.nodes:
            await node.proxy.start()
        source, target = lab.nodes
        async with lab.migration(source, target):
            load = await asyncio.to_thread(Load, source, target, lab.vmi.read()["metadata"]["uid"], STREAMS)
            try:
                await asyncio.to_thread(_report, load, lab.nodes, pairs, seconds)
            finally:
                load.close()


def cpu_seconds(pid: int) -> float:
    """CPU time that all threads of a process have used (proc(5), schedstat)."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(one.read_text().split()[0]) for one in threads) / 1e9


def _report(load: Load, nodes: list[Node], pairs: int, seconds: float) -> None:
    scrape(nodes)
    began, before = time.perf_counter(), [cpu_seconds(node.proxy.pid) for node in nodes]
    for _ in range(_SCRAPES):
        scrape(nodes)
    took = time.perf_counter() - began
    for node, used in zip(nodes, before, strict=True):
        each = (cpu_seconds(node.proxy.pid) - used) / _SCRAPES
        print(f"{node.name}: a scrape costs {each * 1e3:.2f} ms of CPU: one a second, {each:.2%} of a core")
    print(f"alone, a scrape of one daemon takes {took / _SCRAPES / len(nodes) * 1e3:.1f} ms\n")
    load.go.set()
    period(load, 2, [])  # to get up to speed
    ratios: list[float] = []
    latencies: list[float] = []
    for _ in range(pairs):
        order: list[list[Node]] = [[], nodes] if random.random() < 0.5 else [nodes, []]
        rates = {}
        for scraped in order:
            rates[bool(scraped)], longest = period(load, seconds, scraped)
            latencies += longest
        ratios.append(rates[True] / rates[False])
        print(f"without {rates[False] / 1e9:.3f} GB/s, with {rates[True] / 1e9:.3f} GB/s, ratio {ratios[-1]:.4f}")
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"\n{STREAMS} streams, {pairs} pairs of {seconds:g} s, load average {os.getloadavg()[0]:.1f}")
    print(f"throughput with a scrape each second: {middle:.2%} of that without (quartiles {low:.2%}, {high:.2%})")
    print(f"a scrape took {statistics.median(latencies) * 1e3:.1f} ms (worst {max(latencies) * 1e3:.1f} ms)")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scrape", description=__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    asyncio.run(measure(options.pairs, options.seconds))


if __name__ == "__main__":
    main()
