"""How long a migration's stream stands still while its daemons or its relays are killed.

    scripts/sandbox .venv/bin/python -m benchmarks.pauses [--kills 20]

A word crosses one connection each millisecond; what is told is the time between two arrivals. An undisturbed stream of
as many seconds stands beside the killed ones: on a busy machine, it has gaps too.
"""

import argparse
import asyncio
import signal
import socket
import statistics
import time
from collections.abc import Awaitable, Callable

from demo.lab import until
from tests.net.nodes import Nodes, make_nodes

_WORD_SECONDS = 0.001
_LIFE_SECONDS = 0.4

Kill = Callable[[Nodes], Awaitable[None]]


async def nobody(nodes: Nodes) -> None:
    """Kills nobody."""


async def daemons(nodes: Nodes) -> None:
    """Kills both daemons, and starts them again."""
    for node in nodes.both:
        await node.stop(signal.SIGKILL)
    for node in nodes.both:
        await node.start()


async def relays(nodes: Nodes) -> None:
    """Kills the source's relay, and starts it again."""
    relay = nodes.source.relay
    await relay.stop(signal.SIGKILL)
    await relay.start()
    await until(lambda: nodes.source.status()["relay"]["pid"] == relay.pid, "the daemon to go on with it")


async def gaps(nodes: Nodes, kill: Kill, kills: int) -> tuple[list[float], list[float]]:
    """Returns the seconds between arrivals, and the longest of each time that somebody was killed."""
    vm = nodes.migration(kill.__name__, block=False)
    vm.begin()
    await vm.served(30)
    loop, found, longest = asyncio.get_running_loop(), [0.0], list[float]()

    async def say(near: socket.socket) -> None:
        while True:
            await loop.sock_sendall(near, b"word")
            await asyncio.sleep(_WORD_SECONDS)

    async def hear(far: socket.socket) -> None:
        last = time.monotonic()
        while await loop.sock_recv(far, 1 << 16):
            now = time.monotonic()
            found.append(now - last)
            last = now

    async with vm.connection() as (near, far):
        talking = [asyncio.create_task(say(near)), asyncio.create_task(hear(far))]
        for _ in range(kills):
            heard = len(found)
            await kill(nodes)
            await asyncio.sleep(_LIFE_SECONDS)
            longest.append(max(found[heard:], default=0.0))
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)
    vm.end()
    await vm.gone()
    return found, longest


async def main(kills: int) -> None:
    """Prints the table."""
    print("| killed | times | 99.9 % of the gaps | median of the longest gaps | longest gap |\n|---|---|---|---|---|")
    for kill in (nobody, daemons, relays):
        async with make_nodes() as nodes:
            await nodes.start()
            found, longest = await gaps(nodes, kill, kills)
        most = statistics.quantiles(found, n=1000)[-1]
        values = (most, statistics.median(longest), max(longest))
        print(
            f"| {kill.__name__} | {kills} | " + " | ".join(f"{1000 * one:.0f} ms" for one in values) + " |", flush=True
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pauses", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    asyncio.run(main(parser.parse_args().kills))
