"""The daemon's HTTP: at full speed, across restarts, with TLS, and when its port is taken."""

import asyncio
import re
import signal
import statistics
import time
from pathlib import Path

import aiohttp
import pytest

from demo.lab import MIGPROXY, Lab, Node, until
from tests.observe.flow import flowing
from tests.unit.test_web import write_certificate

pytestmark = pytest.mark.tier("gate")

LATE = 2.0  # seconds; a loop that the pumps held up would not answer at all. The figures are printed.


@pytest.mark.tier("soak")
@pytest.mark.alone
async def test_every_path_answers_while_migrations_run_at_full_speed(lab: Lab) -> None:
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
            print(f"/{path} at full speed: median {statistics.median(times) * 1e3:.1f} ms")
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
        await until(lambda: len(source.sockets()) == 2, "the source's sockets")
        async with flowing(lab, 50_000_000) as again:
            await again.arrive(1_000_000)
        assert (await source.proxy.traffic(uid))["direct"].sent == flow.sent + again.sent
        series = [line.rpartition(" ")[0] for line in (await metrics(source)).splitlines() if not line.startswith("#")]
        assert len(set(series)) == len(series)


async def test_a_crash_amid_a_migration_takes_no_counter_back(lab: Lab) -> None:
    for node in lab.nodes:
        await node.proxy.start()
    source = lab.nodes[0]

    async def sent() -> dict[str, float]:
        """When the counters of bytes began, and the largest of them."""
        text = await metrics(source)
        names = ("migproxy_migration_bytes_created", "migproxy_migration_bytes_total")
        found = {name: re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE) for name in names}
        return {name: max(map(float, values)) for name, values in found.items() if values}

    async with lab.migration(*lab.nodes):
        async with flowing(lab, 50_000_000) as flow:
            await flow.arrive(10_000_000)
        first = await sent()
        assert first["migproxy_migration_bytes_total"] >= 10_000_000
        assert time.time() - 60 < first["migproxy_migration_bytes_created"] < time.time()
        await source.proxy.stop(signal.SIGKILL)
        await source.proxy.start()
        async with asyncio.timeout(30):
            while not (second := await sent()):
                await asyncio.sleep(0.05)
        assert second["migproxy_migration_bytes_created"] == first["migproxy_migration_bytes_created"]
        assert second["migproxy_migration_bytes_total"] >= first["migproxy_migration_bytes_total"]


async def test_https_is_spoken_where_a_certificate_is_given(lab: Lab, tmp_path: Path) -> None:
    node = lab.nodes[0]
    paths = write_certificate(tmp_path, "node01")
    await node.proxy.start("--http-tls-cert", paths["certificate"], "--http-tls-key", paths["key"])
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"https://{node.address}:9470/healthz", ssl=False) as answer,
    ):
        assert await answer.text() == "ok\n"


async def test_a_daemon_whose_port_is_taken_does_not_start_and_says_what_to_do(lab: Lab) -> None:
    node = lab.nodes[0]
    await node.proxy.start()
    again = [*node.proxy.arguments, "--control-socket", str(node.directory / "other.sock")]
    second = await asyncio.create_subprocess_exec(
        *node.prefix("net"), *MIGPROXY, *again, stderr=asyncio.subprocess.PIPE
    )
    _, error = await asyncio.wait_for(second.communicate(), 60)
    assert second.returncode == 1
    assert b"--http-listen :9470: Address already in use" in error
    assert b"ss -ltnp" in error


async def metrics(node: Node) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://{node.address}:9470/metrics") as answer:
        return await answer.text()
