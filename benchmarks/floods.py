"""A healthy migration over mTLS beside each flood: set-up and throughput as ratios to those without one, in one run.

In namespaces of its own: `scripts/sandbox .venv/bin/python -m benchmarks.floods`. Each flood is a process at nice 10,
as its CPU would be another machine's. Before each, the same is measured without it.
"""

import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from migproxy.devcerts import make
from migproxy.portmap import Channel
from tests.net.fuse import Silent
from tests.net.nodes import Migration, Nodes, connect, make_nodes

SETUPS = 60
STREAM_SECONDS = 3.0
HTTP = 9470

CLIENTS = """
import random, socket, sys, time
kind, host, port, addresses = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
said = {
    "silent": b"",
    "hello": b"\\x16\\x03\\x01\\x00\\xff\\x01\\x00\\x00\\xfb\\x03\\x03",
    "head": b"GET /metrics HTTP/1.1\\r\\nX: ",
    "junk": b"GET / HTTP/9.9\\r\\n\\r\\n",
    "metrics": b"GET /metrics HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n",
}[kind]
held, number = [], 0
while True:
    sock = socket.socket()
    sock.settimeout(1)
    number += 1
    try:
        sock.bind((f"127.1.{number % addresses // 250}.{number % addresses % 250 + 1}", 0))
        sock.connect((host, port))
        sock.sendall(said)
    except OSError:
        pass
    held.append(sock)
    if len(held) > 600:
        held.pop(0).close()
    if number % 20 == 0:
        time.sleep(0.005)
"""

LOOP = """
import socket, sys
held = []
while True:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(0.05)
    try:
        sock.connect(sys.argv[1])
    except OSError:
        pass
    held.append(sock)
    if len(held) > 20:
        held.pop(0).close()
"""

CHURN = """
import os, sys, time
path = sys.argv[1]
text, number = open(path).read(), 0
uid = text.split("migrationUid: ")[1].split()[0]
while True:
    number += 1
    with open(f"{path}.new~", "w") as file:
        file.write(text.replace(uid, f"{uid[:-6]}{number:06}"))
    os.rename(f"{path}.new~", path)
    time.sleep(0.02)
"""


@contextmanager
def flood(script: str, *words: str) -> Iterator[None]:
    process = subprocess.Popen(["nice", "-n", "10", sys.executable, "-c", script, *words], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def set_up(vm: Migration) -> float:
    """Milliseconds from the source launcher's connect(2) to the first byte at the target's; infinite if it fails."""
    began = time.monotonic()
    loop = asyncio.get_running_loop()
    with connect(vm.source_path(Channel.LIBVIRT)) as near:
        try:
            async with asyncio.timeout(20):
                await loop.sock_sendall(near, b"x")
                far, _ = await loop.sock_accept(vm.listener(Channel.LIBVIRT))
                with far:
                    if not await loop.sock_recv(far, 1):
                        return float("inf")
        except OSError:
            return float("inf")
    return (time.monotonic() - began) * 1e3


async def stream(vm: Migration) -> float:
    """Bytes per second of a connection that was made before."""
    loop = asyncio.get_running_loop()
    block, received = b"z" * (1 << 18), 0
    async with vm.connection() as (near, far):

        async def send() -> None:
            while True:
                await loop.sock_sendall(near, block)

        sending = asyncio.create_task(send())
        began = time.monotonic()
        while (seconds := time.monotonic() - began) < STREAM_SECONDS:
            received += len(await loop.sock_recv(far, 1 << 18))
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    return received / seconds


async def measured(vm: Migration) -> tuple[list[float], float]:
    times = sorted([await set_up(vm) for _ in range(SETUPS)])
    return times, await stream(vm)


async def prepared(made: Nodes, name: str) -> Migration:
    vm = made.migration(name, block=False)
    vm.begin()
    await vm.served(30)
    return vm


def serve(listener: socket.socket) -> None:
    """Takes and ends whatever comes, so that whoever connects in a loop is never held up by a full queue."""
    listener.setblocking(True)
    while True:
        listener.accept()[0].close()


async def main() -> None:
    """See the module."""
    async with make_nodes() as made:
        with tempfile.TemporaryDirectory() as folder:
            make(folder, 1)
            for port, node in enumerate(made.both, HTTP):
                node.protect("--tls-dir", folder, "--ktls", "off", "--http-listen", f"127.0.0.1:{port}")
            await made.start()
            vm = await prepared(made, "healthy")
            loops, churns = await prepared(made, "loops"), await prepared(made, "churns")
            threading.Thread(target=serve, args=(loops.listener(Channel.LIBVIRT).dup(),), daemon=True).start()
            target = ("127.0.0.2", str(vm.published()[Channel.LIBVIRT]))
            web = ("127.0.0.1", str(HTTP))
            stuck = made.migration("stuck", block=False)
            floods: list[tuple[str, tuple[str, ...]]] = [
                ("TCP and then silence, from one address", (CLIENTS, "silent", *target, "1")),
                ("the same from 240 addresses", (CLIENTS, "silent", *target, "240")),
                ("half a ClientHello, from 240 addresses", (CLIENTS, "hello", *target, "240")),
                ("another launcher connects in a loop", (LOOP, str(loops.source_path(Channel.LIBVIRT)))),
                ("half a head to HTTP, from 240 addresses", (CLIENTS, "head", *web, "240")),
                ("junk to HTTP", (CLIENTS, "junk", *web, "240")),
                ("/metrics asked for and not read", (CLIENTS, "metrics", *web, "240")),
                ("a VMI with 50 migration UIDs a second", (CHURN, str(churns.path))),
            ]
            print(f"{'':44}{'set-up, ms':>22}{'ratio to none':>15}{'MB/s':>8}{'ratio':>7}")
            for what, words in floods:
                quiet = await measured(vm)
                with flood(*words):
                    await asyncio.sleep(2)
                    report(what, quiet, await measured(vm))
                await asyncio.sleep(1)
            quiet = await measured(vm)
            with closing(Silent(stuck.run_dir(made.source) / "kubevirt")):
                stuck.begin()
                await asyncio.sleep(2)
                report("a launcher's folder never answers", quiet, await measured(vm))


def report(what: str, quiet: tuple[list[float], float], loud: tuple[list[float], float]) -> None:
    def ranks(times: list[float]) -> tuple[float, float]:
        return statistics.median(times), times[int(len(times) * 0.95)]

    (median, worst), (before, before_worst) = ranks(loud[0]), ranks(quiet[0])
    failed = sum(one == float("inf") for one in loud[0])
    print(
        f"{what:44}{f'{median:.1f}, p95 {worst:.1f}':>22}{f'{median / before:.1f}, {worst / before_worst:.1f}':>15}"
        f"{loud[1] / 1e6:8.0f}{loud[1] / quiet[1]:7.2f}" + (f"  {failed} of {SETUPS} failed" if failed else ""),
        flush=True,
    )


if __name__ == "__main__":
    asyncio.run(main())
