"""How long a connection takes to the target's launcher beside virt-handler: each path, and each failure of ours.

In namespaces of its own: `scripts/sandbox .venv/bin/python -m benchmarks.paths`. The
time is from the source launcher's connect(2) to the first byte at the target's launcher, and the peer is virt-handler's
stand-in alone, in the same run.
"""

import asyncio
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.kube.beside_daemons import Nodes, nodes
from tests.kube.cluster import cluster

ROUNDS = 9

Act = Callable[[Nodes], Awaitable[None]]


async def nothing(_: Nodes) -> None:
    pass


async def kill_target(made: Nodes) -> None:
    await made.daemons[1].stop(signal.SIGKILL)


async def kill_target_and_relay(made: Nodes) -> None:
    await made.daemons[1].stop(signal.SIGKILL)
    await made.daemons[1].relay.stop(signal.SIGKILL)


async def stop_target(made: Nodes) -> None:
    made.daemons[1].signal(signal.SIGSTOP)


async def resume_target(made: Nodes) -> None:
    made.daemons[1].signal(signal.SIGCONT)


async def start_target(made: Nodes) -> None:
    await made.daemons[1].start()


CASES: list[tuple[str, Act, Act]] = [
    ("both migproxies", nothing, nothing),
    ("the target's daemon is killed", kill_target, start_target),
    ("its relay as well", kill_target_and_relay, start_target),
    ("it is stopped (SIGSTOP)", stop_target, resume_target),
]


async def once(made: Nodes) -> float:
    """Milliseconds to the first byte at the target's launcher."""
    began = time.monotonic()
    assert await made.live() == "served"
    return (made.arrived - began) * 1e3


async def measure(way: str) -> None:
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as name:
        folder = Path(name)
        async with cluster(folder, separate=True) as kubernetes, nodes(kubernetes, folder, tls=way == "mTLS") as made:
            found: dict[str, list[float]] = {}
            for _ in range(ROUNDS):
                await made.prepare("alone", by_ours=False)
                found.setdefault("virt-handlers alone", []).append(await once(made))
            for daemon in made.daemons:
                await daemon.start()
            for number in range(ROUNDS):
                for case, act, undo in CASES:
                    await made.prepare(f"{case}-{number}".replace(" ", "-"))
                    await act(made)
                    found.setdefault(case, []).append(await once(made))
                    found.setdefault(f"{case}: the next one", []).append(await once(made))
                    await undo(made)
            await made.daemons[1].stop()
            for number in range(ROUNDS):
                await made.prepare(f"unannounced-{number}", announced=False)
                found.setdefault("the source's migproxy alone", []).append(await once(made))
    alone = statistics.median(found["virt-handlers alone"])
    for case, times in found.items():
        median = statistics.median(times)
        print(f"| {way} | {case} | {median:.1f} | {max(times):.1f} | {median - alone:+.1f} |", flush=True)


async def main() -> None:
    print("| | | median, ms | longest, ms | more than without us, ms |\n|---|---|---|---|---|")
    for way in ("plaintext", "mTLS"):
        await measure(way)


if __name__ == "__main__":
    asyncio.run(main())
