"""A real Prometheus follows migrations: its database says what the daemons moved."""

import asyncio
import subprocess
import time

import aiohttp
import pytest

from demo import guest as vm
from demo.guest import Guest
from demo.lab import Lab, Node, run
from tests.observe.conftest import WATCHER
from tests.observe.flow import flowing
from tests.observe.prometheus import Labels, Prometheus, scraping

pytestmark = pytest.mark.tier("gate")

RETENTION = 20  # seconds
BYTES = "migproxy_migration_bytes_total"
Counts = dict[tuple[str, ...], float]


@pytest.mark.tier("soak")
async def test_database_has_exactly_the_bytes_of_a_stream_and_lets_go_of_them(lab: Lab) -> None:
    await start(lab)
    async with scraping(lab.nodes) as prometheus:
        began = time.time()
        async with lab.migration(*lab.nodes) as uid, flowing(lab, 50_000_000) as flow:
            await flow.arrive(100_000_000)
            for node in lab.nodes:
                await promtool_accepts(node)
            await prometheus.eventually("migproxy:migration_bytes:rate1m > 1e6", 2)
            (rtt,) = await prometheus.eventually('migproxy_migration_tcp_rtt_seconds{role="source"} > 0', 1)
            assert rtt[0]["channel"] == "direct"
        counts = await final_counts(prometheus, uid)
        assert counts[("source", "direct", "sent")] == flow.sent == flow.arrived
        assert counts[("target", "direct", "received")] == flow.sent
        modes = await prometheus.query('migproxy_migration_mode_bytes_total{channel="direct"}')
        assert {(one["mode"], value) for one, value in modes} == {("spliced", flow.sent)}
        await nothing_went_backwards(prometheus, began)
        await prometheus.eventually("up == 1", 2)
        # Gone from both daemons, and so from what Prometheus answers about now.
        await prometheus.eventually(f'{{migration_uid="{uid}"}}', 0, RETENTION + 120)


@pytest.mark.tier("soak")
@pytest.mark.alone
async def test_database_has_the_bytes_of_a_libvirt_migration_as_both_nodes_counted_them() -> None:
    vm.check()
    async with Lab(tls=False) as lab:  # a parallel migration: its counters are what is looked at here
        await run("ip", "address", "add", f"{WATCHER}/24", "dev", "migration")
        await start(lab)
        source, target = lab.nodes
        async with scraping(lab.nodes) as prometheus, Guest.boot(lab, source, disk=False) as guest:
            began = time.time()
            move = await guest.migrate(source, target, parallel=2)
            counts = await final_counts(prometheus, move.uid)
            for node, role in ((source, "source"), (target, "target")):
                for channel, traffic in (await node.proxy.traffic(move.uid)).items():
                    assert counts[(role, channel, "sent")] == traffic.sent
                    assert counts[(role, channel, "received")] == traffic.received
            for channel in ("libvirt", "direct"):
                assert counts[("source", channel, "sent")] == counts[("target", channel, "received")] > 0
                assert counts[("source", channel, "received")] == counts[("target", channel, "sent")]
            assert counts[("source", "direct", "sent")] == pytest.approx(move.job["memory_processed"], rel=0.05)
            await nothing_went_backwards(prometheus, began)
            await prometheus.eventually(f'{{migration_uid="{move.uid}"}}', 0, RETENTION + 120)


async def start(lab: Lab) -> None:
    for node in lab.nodes:
        await node.proxy.start("--retention", str(RETENTION))


async def promtool_accepts(node: Node) -> None:
    """Both of the formats: promtool reads the text format, and its library reads OpenMetrics as Prometheus does."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{node.address}:9470/metrics") as answer:
            text = await answer.read()
        async with session.get(
            f"http://{node.address}:9470/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"}
        ) as answer:
            assert answer.content_type == "application/openmetrics-text"
            openmetrics = await answer.text()
    assert openmetrics.endswith("# EOF\n")
    assert f"{BYTES.removesuffix('_total')}_created{{" in openmetrics
    checked = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


async def final_counts(prometheus: Prometheus, uid: str) -> Counts:
    """What the database has once a scrape of each node has seen the migration's end."""
    await prometheus.eventually(f'migproxy_migration_running{{migration_uid="{uid}"}} == 0', 2)
    return {key(labels): value for labels, value in await prometheus.query(f'{BYTES}{{migration_uid="{uid}"}}')}


def key(labels: Labels) -> tuple[str, ...]:
    return (labels["role"], labels["channel"], labels["direction"])


async def nothing_went_backwards(prometheus: Prometheus, began: float) -> None:
    rates = await prometheus.history(f"rate({BYTES}[5s])", began, time.time())
    assert rates
    assert min(rates) >= 0
    assert max(rates) > 0
    assert set(await prometheus.history(f"resets({BYTES}[5m])", began, time.time())) == {0.0}
    assert len(set(await prometheus.history("migproxy_migration_bytes_created", began, time.time()))) == 2
