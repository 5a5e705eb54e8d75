"""Runs inside the virtual machine of test_unbreakable_vm: a storm of SIGKILLs over daemons and relays with kernel TLS.

Prints a line of JSON: what everybody counted, and what the kernel had offloaded before the storm and after it.
"""

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp.web  # noqa: F401 - here once, and not in each daemon that is forked

from demo.lab import Node, VMIFile, until
from migproxy import control, logs
from tests.e2e.ktls_guest import ADDRESSES, DEADLINE, MODES, kernel_counters, prepared, serve, start_relay
from tests.e2e.unbreakable import MIB, ByTurns, Storm, Streams, Tide, carried, is_whole, seed

KILLS = 20
TOTAL = 64 * MIB
ROUNDS = 4


class ForkedDaemon:
    """A daemon that a process of its own forks again whenever it is dead: that process has no threads, we have.

    Args:
        node: Its node.
        vmis: The folder of VMIs.
        certificates: The folder of certificates.
    """

    def __init__(self, node: Node, vmis: Path, certificates: str) -> None:
        self.control, self.pid = node.proxy.control, 0
        self._pids, told = os.pipe()
        self._go, self._gone = os.pipe()
        self._keeper = os.fork()
        if self._keeper == 0:
            while os.read(self._go, 1):
                pid = os.fork() or serve(node, vmis, certificates, MODES[0], "on")
                os.write(told, pid.to_bytes(4, "little"))
                os.waitpid(pid, 0)

    @property
    def listens(self) -> bool:
        """Whether its control socket is there."""
        return self.control.exists()

    async def spawn(self) -> None:
        """Starts it, and waits for nothing."""
        self.control.unlink(missing_ok=True)
        os.write(self._gone, b"g")
        self.pid = int.from_bytes(os.read(self._pids, 4), "little")

    async def ready(self) -> None:
        """Waits until it is ready."""

        def is_ready() -> bool:
            try:
                return bool(control.ask(str(self.control))["ready"])
            except control.ControlError:
                return False

        await until(is_ready, f"{self.control} to be ready", DEADLINE)

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends it."""
        os.kill(self.pid, how)
        await until(lambda: not Path(f"/proc/{self.pid}/exe").exists(), "its end", DEADLINE)
        return 0

    def close(self) -> None:
        """Ends it, and the process that forks it."""
        for pid in (self._keeper, self.pid):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(self._keeper, 0)


class ForkedRelay:
    """A node's relay, that can be killed and started again.

    Args:
        node: Its node.
    """

    def __init__(self, node: Node) -> None:
        self.control, self._node = node.proxy.control, node
        self.pid = start_relay(node)

    @property
    def listens(self) -> bool:
        """Whether the daemon has handed everything over to it."""
        return is_whole(self.control, self.pid)

    async def spawn(self) -> None:
        """Starts it, and waits for nothing."""
        self.pid = start_relay(self._node)

    async def ready(self) -> None:
        """Waits until the daemon has handed everything over to it."""
        await until(lambda: self.listens, f"{self.control} to have its relay", DEADLINE)

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ends it."""
        os.kill(self.pid, how)
        os.waitpid(self.pid, 0)
        return 0

    def descriptors(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def offloaded() -> dict[str, int]:
    """How many sockets the kernel encrypts and decrypts for now."""
    counters = kernel_counters()
    return {name: counters[name] for name in ("TlsCurrTxSw", "TlsCurrRxSw")}


async def survive(
    vmi: VMIFile, nodes: list[Node], daemons: list[ForkedDaemon], relays: list[ForkedRelay]
) -> dict[str, Any]:
    """Carries streams through a storm, and returns what everybody counted."""
    source, target = nodes
    for one in daemons:
        await one.spawn()
        await one.ready()
    before = [relay.descriptors() for relay in relays]
    vmi.begin(source, target, block=True)
    await until(lambda: len(source.sockets()) == 3, "the source's sockets", DEADLINE)
    vmi.start()
    by_turns = [ByTurns(*both) for both in zip(daemons, relays, strict=True)]
    storm, tide = Storm(by_turns, seed(), 1.0), Tide()
    streams = Streams(source, target, vmi.read()["metadata"]["uid"], TOTAL, tide)
    seen = []

    def killing(chance: random.Random) -> None:
        streams.shake(chance)
        tide.rise(min(0.98, (storm.kills + 1) / KILLS))  # so that they are open at its end

    async with carried(streams):
        tide.rise(0.01)
        await until(lambda: streams.are_settled, "the first bytes", DEADLINE)
        seen.append(offloaded())
        for _ in range(ROUNDS):
            await storm.blow(KILLS // ROUNDS // 2, killing)
            streams.calm()
            await until(lambda: streams.are_settled, f"what is due: {streams}", DEADLINE)
        await until(lambda: offloaded() == seen[0], f"as many offloaded as before, not {offloaded()}", DEADLINE)
        seen.append(offloaded())
        tide.end()
    status = [control.ask(str(one.control)) for one in daemons]
    vmi.end(failed=False)
    await until(lambda: [relay.descriptors() for relay in relays] == before, "the relays to be empty", DEADLINE)
    return {
        "kills": storm.kills,
        "offloaded": seen,
        "descriptors": before,
        "moved": streams.moved,
        "expected": {label: asdict(streams.expected(label)) for label in ("libvirt", "direct", "block")},
        "tls": [report["tls"] for report in status],
        "channels": [report["migrations"][0]["channels"] for report in status],
        "counters": kernel_counters(),
    }


def main() -> None:
    """Runs the storm."""
    logs.configure("json", "info")
    with prepared() as certificates, tempfile.TemporaryDirectory(prefix="lab-") as folder:
        vmis = Path(folder) / "vmis"
        vmis.mkdir()
        vmi = VMIFile(vmis / "vmi.yaml")
        nodes = [Node(name, address, Path(folder) / name) for name, address in ADDRESSES.items()]
        relays = [ForkedRelay(node) for node in nodes]
        daemons = [ForkedDaemon(node, vmis, certificates) for node in nodes]
        try:
            print("RESULT", json.dumps(asyncio.run(survive(vmi, nodes, daemons, relays))), flush=True)
        except BaseException:
            for node in nodes:
                print(*node.proxy.log.read_text().splitlines()[-30:], sep="\n", file=sys.stderr)
            raise
        finally:
            for daemon in daemons:
                daemon.close()
            for relay in relays:
                os.kill(relay.pid, signal.SIGKILL)
                os.waitpid(relay.pid, 0)


if __name__ == "__main__":
    main()
