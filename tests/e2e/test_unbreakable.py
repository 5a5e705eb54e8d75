"""Daemons and relays are killed again and again in the middle of a migration; it completes without a byte lost."""

import random

import pytest

from demo import guest as vm
from demo.guest import Guest
from demo.lab import Lab, Node, until
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


@pytest.mark.parametrize(
    ("kills", "mib", "rounds"),  # of both daemons together
    [
        pytest.param(20, 128, 5, id="short", marks=pytest.mark.tier("gate")),
        pytest.param(300, 4096, 15, id="long"),
    ],
)
@pytest.mark.parametrize("killed", ["daemons", "relays", "by turns"])
async def test_streams_come_through_a_storm(killed: str, kills: int, mib: int, rounds: int) -> None:
    async with Lab(libvirt=False, tls=False) as lab:
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
@pytest.mark.parametrize("parallel", [pytest.param(0, id="copy-storage-all"), pytest.param(4, id="parallel")])
async def test_a_running_guest_comes_through(parallel: int) -> None:
    vm.check()
    disk = not parallel
    async with Lab(tls=False) as lab:
        source, target = lab.nodes
        proxies = [node.proxy for node in lab.nodes]
        for proxy in proxies:
            await proxy.start()
            assert (await proxy.status())["tls"]["mode"] == "plaintext"
        descriptors = {node.name: node.proxy.descriptors() for node in lab.nodes}
        async with Guest.boot(lab, source, disk=disk) as guest:
            at_first = guest.hashes[0]
            kills: list[int] = []
            async with leaves_nothing(lab.nodes):
                beating = metronome(proxies, BEAT, kills)
                move = await guest.migrate(source, target, *SUSPENDED, parallel=parallel, during=beating)
                print(f"{kills[0]} kills of each while the guest migrated for {move.seconds:.1f} s")
                assert kills[0] > 1
                await assert_runs_only_on(target, lab)
                await assert_heartbeat_goes_on(guest, *await guest.handover(source, target))
                for node in lab.nodes:
                    await assert_nothing_is_left(node, descriptors[node.name])
                await assert_reads_its_hashes(guest, target, at_first)
