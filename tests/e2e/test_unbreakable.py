"""Daemons and relays are killed again and again in the middle of a migration; it completes without a byte lost."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from demo import guest as vm
from demo.guest import Guest, job_statistics
from demo.lab import Lab, LabError, Node, until
from tests.e2e.test_libvirt_migration import (
    assert_heartbeat_goes_on,
    assert_nothing_is_left,
    assert_reads_its_hashes,
    assert_runs_only_on,
)
from tests.e2e.unbreakable import (
    MIB,
    PATIENCE,
    SUSPENDED,
    ByTurns,
    Killable,
    KillableRelay,
    Storm,
    Streams,
    Tide,
    carried,
    leaves_nothing,
    metronome,
    seed,
    startup,
)

pytestmark = pytest.mark.tier("soak")

BEAT = 0.3  # seconds
FIRST_PART = 32 * MIB  # of 192
SLOW = ("--bandwidth", "40", "--postcopy-bandwidth", "10")  # MiB/s, or it would be over before the second kill


@pytest.mark.parametrize(
    ("kills", "mib", "rounds"),  # of both daemons together
    [
        pytest.param(20, 128, 5, id="short", marks=pytest.mark.tier("gate")),
        pytest.param(300, 4096, 15, id="long"),
    ],
)
@pytest.mark.parametrize(
    ("killed", "tls"),
    [
        pytest.param("daemons", False, id="daemons"),
        pytest.param("relays", False, id="relays"),
        pytest.param("by turns", False, id="by turns"),
        pytest.param("daemons", True, id="daemons, with TLS in user space where the kernel has none"),
    ],
)
async def test_streams_come_through_a_storm(killed: str, tls: bool, kills: int, mib: int, rounds: int) -> None:
    async with Lab(libvirt=False, tls=tls) as lab:
        source, target = lab.nodes
        proxies = [node.proxy for node in lab.nodes]
        seconds = max([await startup(proxy) for proxy in proxies])
        for proxy in proxies:
            await proxy.ready()
        storm = Storm([killable(node, killed) for node in lab.nodes], seed(), seconds)
        total = mib * MIB
        async with leaves_nothing(lab.nodes):
            async with lab.migration(source, target, block=True) as uid:
                tide = Tide()
                streams = Streams(source, target, lab.vmi.read()["metadata"]["uid"], total, tide)

                def killing(chance: random.Random) -> None:
                    streams.shake(chance)
                    tide.rise(min(1.0, (storm.kills + 1) / kills))

                async with carried(streams):
                    for number in range(rounds):
                        await storm.blow(round((number + 1) * kills / rounds / 2) - storm.kills // 2, killing)
                        streams.calm()
                        await until(lambda: streams.are_settled, f"what is due: {streams}", PATIENCE)
                    print(f"{storm.kills} kills, {streams.moved / total:.0%} of the bytes moved meanwhile")
                    tide.end()
                await streams.assert_counted(uid)
            assert storm.kills == kills


def killable(node: Node, which: str) -> Killable:
    """What a storm is to kill of a node."""
    match which:
        case "daemons":
            return node.proxy
        case "relays":
            return KillableRelay(node)
        case _:
            return ByTurns(node.proxy, KillableRelay(node))


@pytest.mark.alone
@pytest.mark.parametrize("killed", ["daemons", "by turns"])
@pytest.mark.parametrize("parallel", [pytest.param(0, id="copy-storage-all"), pytest.param(4, id="parallel")])
async def test_a_running_guest_comes_through(parallel: int, killed: str) -> None:
    async with migrating(killed, disk=not parallel) as (guest, storm):
        source, target = storm.nodes
        move = await guest.migrate(source, target, *SUSPENDED, parallel=parallel, during=storm.blowing())
        print(f"{len(storm.struck)} kills on each node while the guest migrated for {move.seconds:.1f} s")
        assert len(storm.struck) > 1


@pytest.mark.alone
@pytest.mark.parametrize("killed", ["daemons", "by turns"])
async def test_a_guest_that_runs_on_the_target_already_gets_the_rest_of_its_memory(killed: str) -> None:
    """Post-copy: a connection that breaks would lose the guest, whose one half is here and the other one there."""
    async with migrating(killed, disk=False) as (guest, storm):
        source, target = storm.nodes
        async with asyncio.TaskGroup() as tasks:
            switched = tasks.create_task(switch(source, guest))
            move = await guest.migrate(source, target, "--postcopy", *SLOW, during=storm.blowing())
        running = switched.result()
        later = sum(at > running for at in storm.struck)
        print(f"{later} of {len(storm.struck)} kills on each node after the switch-over; {move.seconds:.1f} s")
        assert later > 1


async def switch(source: Node, guest: Guest) -> float:
    """Lets a guest go on on the target when a part of its memory is there; returns when it does."""

    async def processed() -> int:
        with suppress(LabError):  # the migration has not begun
            return (await job_statistics(source)).get("memory_processed", 0)
        return 0

    async with asyncio.timeout(PATIENCE):
        while await processed() < FIRST_PART:
            await asyncio.sleep(0.05)
    await source.virsh("migrate-postcopy", vm.DOMAIN)
    await until(lambda: guest.beats[-1].node != source.name, "its first heartbeat on the target")
    assert (await source.virsh("domstate", vm.DOMAIN, "--reason")).strip() == "paused (post-copy)"
    return time.monotonic()


@dataclass
class Beating:
    """Kills on both nodes, on one beat.

    Attributes:
        nodes: the source, and the target.
        struck: when there was one.
    """

    nodes: list[Node]
    proxies: list[Killable]
    struck: list[float] = field(default_factory=list)

    def blowing(self) -> AbstractAsyncContextManager[None]:
        """Kills as long as the context lasts."""
        return metronome(self.proxies, BEAT, self.struck)


@asynccontextmanager
async def migrating(killed: str, *, disk: bool) -> AsyncIterator[tuple[Guest, Beating]]:
    """A guest that the body migrates, which goes on on the target as if nobody had been killed; nothing is left."""
    vm.check()
    async with Lab(tls=False) as lab:
        source, target = lab.nodes
        for node in lab.nodes:
            await node.proxy.start()
            assert (await node.proxy.status())["tls"]["mode"] == "plaintext"
        descriptors = {node.name: node.proxy.descriptors() for node in lab.nodes}
        async with Guest.boot(lab, source, disk=disk) as guest:
            at_first = guest.hashes[0]
            async with leaves_nothing(lab.nodes):
                yield guest, Beating(lab.nodes, [killable(node, killed) for node in lab.nodes])
                await assert_runs_only_on(target, lab)
                await assert_heartbeat_goes_on(guest, *await guest.handover(source, target))
                for node in lab.nodes:
                    await assert_nothing_is_left(node, descriptors[node.name])
                await assert_reads_its_hashes(guest, target, at_first)
