"""`make demo`: a virtual machine migrates live from one node to another and back, through two migproxies.

Where there is no QEMU, libvirt or kernel to boot, hashed streams take the virtual machine's place.
"""

import argparse
import asyncio
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo import guest as vm
from demo.guest import Guest
from demo.lab import Lab, LabError, Node, Traffic, background
from demo.stream import CONNECTIONS, Streams

PARALLEL = 4

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


@dataclass(frozen=True, slots=True)
class Leg:
    """One migration as the summary shows it.

    Args:
        seconds: how long it took.
        sent, received: what the two daemons counted, by channel.
        facts: what else is to be said of it, by title.
    """

    source: str
    target: str
    seconds: float
    sent: Mapping[str, Traffic]
    received: Mapping[str, Traffic]
    facts: Mapping[str, str]


def main() -> int:
    """Runs the demonstration; returns 0 if all went well, 1 if not, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--loopback",
        metavar="WHY",
        nargs="?",
        const="without namespaces there are no nodes for it to run on",
        help="no namespaces: streams between 127.0.0.1 and 127.0.0.2, because of this",
    )
    parser.add_argument("--gib", type=float, default=4, help="of streams in each migration (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        asyncio.run(demonstrate(loopback=arguments.loopback, size=int(arguments.gib * (1 << 30))))
    except LabError as error:
        console.print(f"[bold red]It did not work:[/] {error}", soft_wrap=True)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("Interrupted; everything is taken down again.")
        return 130
    return 0


async def demonstrate(*, loopback: str | None, size: int) -> None:
    """Shows the whole of it.

    Args:
        loopback: why to do without namespaces, and so without a virtual machine; None to make them.
        size: bytes that each migration moves where there is no virtual machine.

    Raises:
        LabError: what went wrong.
    """
    this = asyncio.current_task()
    assert this
    for signum in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(signum, this.cancel)
    began = time.monotonic()
    why_streams = loopback or _why_no_guest()
    _step("Two nodes, joined by a migration network, run a migproxy each")
    async with Lab(libvirt=not why_streams, loopback=bool(loopback), say=_say) as lab:
        for node in lab.nodes:
            _say(f"{node.name} is {node.address}")
            _say(f"{node.name}# migproxy {shlex.join(node.proxy.arguments)}")
            await node.proxy.start()
        legs = await (_streams(lab, size, why_streams) if why_streams else _virtual_machine(lab))
        for leg in legs:
            _check_counts(leg)
    console.print("", _summary(legs), "", _bytes(legs), sep="\n")
    console.print(
        f"Both daemons counted the same bytes, and everything arrived whole ({time.monotonic() - began:.0f} s)."
    )


def _why_no_guest() -> str:
    try:
        vm.check()
    except LabError as error:
        return str(error)
    return ""


async def _virtual_machine(lab: Lab) -> list[Leg]:
    here, there = lab.nodes
    _step(f"A virtual machine with a disk boots under libvirt on {here.name}")
    async with Guest.boot(lab, here, disk=True) as guest:
        _say(f"it counts its heartbeats: {guest.beats[-1].number} so far")
        return [await _move(lab, guest, *ends) for ends in ((here, there), (there, here))]


async def _move(lab: Lab, guest: Guest, source: Node, target: Node) -> Leg:
    _step(f"It migrates live from {source.name} to {target.name}, its memory over {PARALLEL} connections")
    at_first = guest.hashes[0]
    with _progress() as progress:
        memory, disk = (progress.add_task(title, total=None) for title in ("memory", "disk"))

        def watch(job: dict[str, int]) -> None:
            for task, name in ((memory, "memory"), (disk, "disk")):
                if total := job.get(f"{name}_total"):
                    progress.update(task, total=total, completed=total - job[f"{name}_remaining"])

        move = await guest.migrate(source, target, parallel=PARALLEL, watch=watch)
        watch(move.job)
    before, after = await guest.handover(source, target)
    _say(f"heartbeat {before.number} was on {source.name}, {after.number} is on {target.name}; it reads its hashes")
    now = await guest.fresh_hashes()
    if (now.memory, now.disk) != (at_first.memory, at_first.disk):
        raise LabError(f"the virtual machine's memory or disk is not what it was: {at_first}, now {now}")
    facts = {
        "memory moved, says QEMU": f"{move.job['memory_processed']:,} bytes",
        "disk moved, says QEMU": f"{move.job['disk_processed']:,} bytes",
        "downtime, says QEMU": f"{move.job['downtime']} ms",
        "silence of the heartbeat": f"{after.seen - before.seen:.2f} s",
        "its number before and after": f"{before.number}, {after.number}",
        "hashes of memory and disk": "unchanged",
    }
    return await _leg(move.uid, source, target, move.seconds, facts)


async def _streams(lab: Lab, size: int, why: str) -> list[Leg]:
    _step("Hashed streams take the virtual machine's place")
    _say(f"because {why}")
    here, there = lab.nodes
    return [await _exchange(lab, size, *ends) for ends in ((here, there), (there, here))]


async def _exchange(lab: Lab, size: int, source: Node, target: Node) -> Leg:
    _step(
        f"A migration from {source.name} to {target.name}: {sum(CONNECTIONS.values())} connections, both ways at once"
    )
    async with lab.migration(source, target, block=True) as uid:
        streams = Streams(source, target, lab.vmi.read()["metadata"]["uid"], size)
        began = time.monotonic()
        with _progress() as progress:
            tasks = {channel: progress.add_task(channel.label, total=streams.size(channel)) for channel in CONNECTIONS}

            def draw() -> None:
                for channel, task in tasks.items():
                    progress.update(task, completed=streams.moved(channel))

            async with background(_repeatedly(draw)):
                await streams.exchange()
            draw()
        seconds = time.monotonic() - began
    return await _leg(uid, source, target, seconds, {"SHA-256 of every stream": "the same at both ends"})


async def _repeatedly(draw: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(0.1)
        draw()


async def _leg(uid: str, source: Node, target: Node, seconds: float, facts: Mapping[str, str]) -> Leg:
    sent, received = await source.proxy.traffic(uid), await target.proxy.traffic(uid)
    return Leg(source.name, target.name, seconds, sent, received, facts)


def _check_counts(leg: Leg) -> None:
    if not leg.sent or leg.sent.keys() != leg.received.keys():
        raise LabError(f"{leg.source} counted {list(leg.sent)} and {leg.target} {list(leg.received)}")
    for channel, sent in leg.sent.items():
        received = leg.received[channel]
        if (sent.sent, sent.received) != (received.received, received.sent):
            raise LabError(f"{leg.source} and {leg.target} disagree on the channel {channel}: {sent}, {received}")


def _summary(legs: list[Leg]) -> Table:
    table = Table("", *(f"{leg.source} -> {leg.target}" for leg in legs), title="The migrations")
    table.add_row("time", *(f"{leg.seconds:.2f} s" for leg in legs))
    for title in legs[0].facts:
        table.add_row(title, *(leg.facts[title] for leg in legs))
    return table


def _bytes(legs: list[Leg]) -> Table:
    table = Table("to", "channel", title="The bytes, as both daemons counted them")
    for title in ("connections", "source sent", "target received", "target sent", "rate"):
        table.add_column(title, justify="right", no_wrap=True)
    for leg in legs:
        for channel, there in leg.sent.items():
            back = leg.received[channel]
            rate = decimal(int((there.sent + back.sent) / leg.seconds))
            counts = (there.connections, there.sent, back.received, back.sent)
            table.add_row(leg.target, channel, *(f"{count:,}" for count in counts), f"{rate}/s")
        table.add_section()
    return table


def _progress() -> Progress:
    return Progress(
        TextColumn("    {task.description:8}"),
        BarColumn(30),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _step(text: str) -> None:
    console.print(f"\n[bold]{text}[/]", soft_wrap=True)


def _say(text: str) -> None:
    console.print(f"    {text}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
