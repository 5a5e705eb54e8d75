"""What mTLS in user space costs: `scripts/sandbox .venv/bin/python -m tests.net.tls_throughput`.

Two daemons on loopback, a writer and a reader of their own, plaintext and mTLS in turn, one stream and eight;
medians of five. Fails where mTLS with one stream is below 40 % of plaintext, or mTLS with eight streams below mTLS
with one. Only the ratios mean something, and only on a machine that does nothing else.
"""

import asyncio
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from migproxy.portmap import Channel
from tests.certificates import Cluster
from tests.net.nodes import Migration, make_nodes

RUNS = 5
SIZE = 2 << 30  # bytes of each run, all streams together
CHUNK = 1 << 20


def write(path: str, streams: int) -> None:
    """Sends zeroes over so many connections; a process of its own."""

    def one() -> None:
        data = memoryview(bytes(CHUNK))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            for _ in range(SIZE // streams // CHUNK):
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)

    _in_threads(one, streams)


def read(listener: socket.socket, streams: int) -> None:
    """Receives over so many connections; a process of its own."""
    listener.setblocking(True)

    def one() -> None:
        buffer = memoryview(bytearray(CHUNK))
        sock, _ = listener.accept()
        with sock:
            while sock.recv_into(buffer):
                pass

    _in_threads(one, streams)


def _in_threads(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def fork(work: Callable[..., None], *arguments: object) -> int:
    """Does some work in a process of its own, and returns its ID."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        finally:
            os._exit(0)
    return pid


async def run(migration: Migration, streams: int) -> tuple[float, float]:
    """Moves the bytes once; returns gigabytes per second, and the daemons' CPU seconds per GiB."""
    daemons = (migration.source, migration.target)
    used = sum(daemon.cpu_seconds() for daemon in daemons)
    began = time.monotonic()
    listener = migration.listener(Channel.DIRECT)
    pids = [fork(read, listener, streams), fork(write, str(migration.source_path(Channel.DIRECT)), streams)]
    for pid in pids:
        await asyncio.to_thread(os.waitpid, pid, 0)
    seconds = time.monotonic() - began
    listener.setblocking(False)
    spent = sum(daemon.cpu_seconds() for daemon in daemons) - used
    return SIZE / seconds / 1e9, spent / (SIZE / (1 << 30))


async def main() -> int:
    """Measures everything in turn, so that what else the machine does hits all alike."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster.make(Path(folder) / "pki")
        figures: dict[tuple[str, int], list[tuple[float, float]]] = {}
        async with make_nodes() as plain, make_nodes("127.0.0.3", "127.0.0.4") as tls:
            await plain.start()
            for node in tls.both:
                node.protect()
            options = ("--tls-dir", str(cluster.folder), "--ktls", "off")
            await tls.start(source=options, target=options)
            migrations = {"plaintext": plain.migration(block=False), "mTLS": tls.migration(block=False)}
            for migration in migrations.values():
                migration.begin()
                await migration.served()
            for _ in range(RUNS):
                for streams in (1, 8):
                    for name, migration in migrations.items():
                        figures.setdefault((name, streams), []).append(await run(migration, streams))
    rate = {}
    for (name, streams), values in figures.items():
        rate[name, streams] = statistics.median(value for value, _ in values)
        cpu = statistics.median(value for _, value in values)
        print(
            f"{name:9} {streams} streams: {rate[name, streams]:.2f} GB/s, {cpu:.2f} CPU seconds per GiB, both daemons"
        )
    share = rate["mTLS", 1] / rate["plaintext", 1]
    growth = rate["mTLS", 8] / rate["mTLS", 1]
    print(f"mTLS is {share:.0%} of plaintext with 1 stream; with 8 streams {growth:.2f} times what it is with one")
    return int(share < 0.4 or growth < 1)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
