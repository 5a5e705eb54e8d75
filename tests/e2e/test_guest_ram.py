"""At the switch-over the guest's whole RAM is on the target what it was on the source, page by page.

A lost page shows here at once; the guest itself may crash of it later, or never.
"""

import asyncio
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from demo import guest as vm
from demo.guest import Guest, job_statistics
from demo.lab import Lab, LabError, Node, background
from tests.e2e.test_libvirt_migration import assert_heartbeat_goes_on
from tests.e2e.unbreakable import metronome

pytestmark = [pytest.mark.tier("soak"), pytest.mark.alone]

BEAT = 0.3  # seconds
PAGE = 4096
# A guest that may stand still for a millisecond only is migrated in four iterations or more. In fewer, QEMU before
# 9.0 loses nothing (see demo/guest.py), and so would not show that this test can fail.
DOWNTIME = "1"
ITERATIONS = 4


@pytest.mark.parametrize(
    ("killed", "rounds"), [pytest.param(False, 8, id="undisturbed"), pytest.param(True, 4, id="killed")]
)
@pytest.mark.parametrize("parallel", [pytest.param(0, id="copy-storage-all"), pytest.param(4, id="parallel")])
async def test_whole_ram_arrives(parallel: int, killed: bool, rounds: int) -> None:
    vm.check()
    async with Lab(tls=False) as lab:
        source, target = lab.nodes
        proxies = [node.proxy for node in lab.nodes]
        for proxy in proxies:
            await proxy.start()
        async with Guest.boot(lab, source, disk=not parallel) as guest:
            at_first = guest.hashes[0]
            for _ in range(rounds):
                await source.virsh("migrate-setmaxdowntime", vm.DOMAIN, DOWNTIME)
                struck: list[float] = []
                beating = metronome(proxies, BEAT, struck) if killed else nullcontext()
                async with background(stand_still(source)):
                    move = await guest.migrate(source, target, "--suspend", parallel=parallel, during=beating)
                iterations = move.job["memory_iteration"]
                print(f"{iterations} iterations in {move.seconds:.1f} s, {len(struck)} kills of each daemon")
                assert iterations >= ITERATIONS
                assert bool(struck) is killed
                assert_same_ram(source.images / "ram", target.images / "ram")
                await target.virsh("resume", vm.DOMAIN)
                await assert_heartbeat_goes_on(guest, *await guest.handover(source, target))
                source, target = target, source
            assert (await guest.fresh_hashes()).memory == at_first.memory


async def stand_still(source: Node) -> None:
    """Suspends the guest after so many iterations: it writes faster than killed daemons relay."""
    while True:
        with suppress(LabError):  # the migration has not begun, or the guest has left
            if (await job_statistics(source)).get("memory_iteration", 0) >= ITERATIONS:
                await source.virsh("suspend", vm.DOMAIN)
                return
        await asyncio.sleep(0.1)


def assert_same_ram(source: Path, target: Path) -> None:
    sent, arrived = source.read_bytes(), target.read_bytes()
    assert len(sent) == len(arrived)
    if sent != arrived:
        starts = range(0, len(sent), PAGE)
        lost = [f"{at:#x}" for at in starts if sent[at : at + PAGE] != arrived[at : at + PAGE]]
        pytest.fail(f"{len(lost)} of {len(starts)} pages of the target's RAM are not the source's: {' '.join(lost)}")
