"""HTTP answers while migrations run at full speed, and counts go on across a daemon's changes of mind."""

import statistics
import time

import aiohttp

from demo.lab import Lab, until
from tests.observe.flow import flowing

LATE = 0.1  # seconds; alone it takes a few milliseconds, and this machine may be anybody's


async def test_every_path_answers_within_milliseconds_at_full_speed(lab: Lab) -> None:
    for node in lab.nodes:
        await node.proxy.start()
    async with (
        lab.migration(*lab.nodes),
        flowing(lab, None, connections=8) as flow,
        aiohttp.ClientSession() as session,
    ):
        await flow.arrive(500_000_000)
        for path in ("metrics", "api/status", "readyz", "healthz", ""):
            times = []
            for _ in range(20):
                began = time.perf_counter()
                async with session.get(f"http://{lab.nodes[0].address}:9470/{path}") as answer:
                    assert answer.status == 200
                    await answer.read()
                times.append(time.perf_counter() - began)
            assert statistics.median(times) < LATE, path


async def test_a_migration_that_is_served_again_goes_on_with_its_counters(lab: Lab) -> None:
    """Its VMI vanishes from the folder and comes back: no counter goes backwards, no series stands there twice."""
    for node in lab.nodes:
        await node.proxy.start()
    source = lab.nodes[0]
    async with lab.migration(*lab.nodes) as uid:
        async with flowing(lab, 50_000_000) as flow:
            await flow.arrive(10_000_000)
        vmi = lab.vmi.path.read_text()
        lab.vmi.path.unlink()
        await source.proxy.ended(uid)
        assert (await source.proxy.traffic(uid))["direct"].sent == flow.sent
        lab.vmi.path.write_text(vmi)
        await until(lambda: bool(source.sockets()), "the source's sockets")
        async with flowing(lab, 50_000_000) as again:
            await again.arrive(1_000_000)
        assert (await source.proxy.traffic(uid))["direct"].sent == flow.sent + again.sent
        async with aiohttp.ClientSession() as session, session.get(f"http://{source.address}:9470/metrics") as answer:
            series = [
                line.rpartition(" ")[0] for line in (await answer.text()).splitlines() if not line.startswith("#")
            ]
        assert len(set(series)) == len(series)
