"""`migproxy doctor` on real, broken networks: interfaces and the path between two nodes."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from demo.lab import Lab, Node, end, run

pytestmark = pytest.mark.tier("gate")

DOCTOR = (sys.executable, "-m", "migproxy", "doctor", "--launcher-run-dir", "/run")
PLAINTEXT = ("--disable-tls",)


async def examine(node: Node, *options: str, tls: Sequence[str] = PLAINTEXT) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the findings by check."""
    process = await asyncio.create_subprocess_exec(
        *node.prefix("net"), *DOCTOR, *tls, "--json", "--seconds", "0.5", *options, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode is not None
    return process.returncode, {one["check"]: one for one in json.loads(out)["findings"]}


@asynccontextmanager
async def serving(node: Node, tls: Sequence[str] = PLAINTEXT) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *node.prefix("net"), *DOCTOR, *tls, "--serve", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        assert node.address in line.decode()
        yield
    finally:
        assert await end(process, signal.SIGTERM) == 0


async def test_a_good_path_is_measured_through_two_daemons(lab: Lab) -> None:
    here, there = lab.nodes
    async with serving(there):
        for _ in range(3):  # a machine that stood still for a moment has a long round trip
            status, found = await examine(here, "--peer", there.address)
            if found["round trip"]["level"] == "ok":
                break
    assert status == 0
    for check in ("peer reachable", "path MTU", "round trip", "clock"):
        assert found[check]["level"] == "ok", found[check]
    assert "two migproxies (spliced" in found["throughput"]["finding"]


@pytest.mark.tier("soak")
async def test_the_path_is_measured_as_it_is_protected_and_a_peer_with_another_ca_is_found(
    lab: Lab, tmp_path: Path
) -> None:
    here, there = lab.nodes
    for name in ("ours", "another"):
        await run(sys.executable, "-m", "migproxy", "certs", str(tmp_path / name))
    ours, another = (("--tls-dir", str(tmp_path / name)) for name in ("ours", "another"))
    async with serving(there, ours):
        status, found = await examine(here, "--peer", there.address, tls=ours)
        assert status == 0, found
        assert "user-space" in found["throughput"]["finding"] or "ktls" in found["throughput"]["finding"]
        assert {found[f"{role} chain"]["level"] for role in ("server", "client")} == {"ok"}

        status, found = await examine(here, "--peer", there.address, tls=another)
        assert status == 1
        assert "the same CA" in found["peer"]["remedy"]


@pytest.mark.tier("soak")
async def test_a_path_that_drops_large_packets_is_found_and_so_is_a_slow_one(lab: Lab) -> None:
    here, there = lab.nodes
    await run("ip", "link", "set", here.name, "mtu", "1300")
    slow = ("rate", "80mbit", "burst", "64kb", "latency", "50ms")
    await run("tc", "qdisc", "add", "dev", there.name, "root", "tbf", *slow)
    async with serving(there):
        status, found = await examine(here, "--peer", there.address)
    assert status == 1
    assert found["path MTU"]["level"] == "fail"
    assert found["path MTU"]["finding"].startswith("130")
    assert "same MTU everywhere" in found["path MTU"]["remedy"]
    assert found["throughput"]["level"] == "warn"
    assert "ethtool" in found["throughput"]["remedy"]


async def test_a_peer_that_is_not_there(lab: Lab) -> None:
    status, found = await examine(lab.nodes[0], "--peer", "10.1.1.99")
    assert status == 1
    assert found["peer reachable"]["level"] == "fail"
    assert "firewalls" in found["peer reachable"]["remedy"]


async def test_a_peer_that_no_route_leads_to(lab: Lab) -> None:
    status, found = await examine(lab.nodes[0], "--peer", "10.5.5.5")
    assert status == 1
    assert found["route"]["level"] == "fail"
    assert f"no route from {lab.nodes[0].address} (interface migration0) to 10.5.5.5" in found["route"]["finding"]
    assert "peer reachable" not in found

    status, found = await examine(lab.nodes[0], "--peer", "node02")
    assert status == 1
    assert "names are not looked up" in found["peer"]["finding"]


async def test_an_interface_without_carrier_or_with_a_small_mtu(lab: Lab) -> None:
    node = lab.nodes[0]
    await run(*node.prefix("net"), "ip", "link", "set", "migration0", "mtu", "1400")
    await run("ip", "link", "set", node.name, "down")
    status, found = await examine(node)
    assert status == 1
    assert (found["carrier"]["level"], found["MTU"]["level"]) == ("fail", "warn")
    assert "ip link set migration0 up" in found["carrier"]["remedy"]
    assert "mtu 1500" in found["MTU"]["remedy"]


async def test_a_node_without_the_interface(lab: Lab) -> None:
    node = lab.nodes[0]
    await run(*node.prefix("net"), "ip", "link", "delete", "migration0")
    status, found = await examine(node)
    assert status == 1
    assert found["migration address"]["level"] == "fail"
    assert "create it" in found["migration address"]["remedy"]
    assert "carrier" not in found
