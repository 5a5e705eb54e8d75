"""Tests that need namespaces and privileges: only inside scripts/sandbox, never on the machine itself."""

import os
from collections.abc import AsyncIterator

import pytest

from demo.lab import run
from tests.net.nodes import Nodes, make_nodes


@pytest.fixture(autouse=True, scope="session")
def sandbox() -> None:
    if not os.environ.get("MIGPROXY_SANDBOX"):
        pytest.exit("tests/net change interfaces and mounts: run: make net", returncode=1)


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    """Two nodes on loopback addresses, whose daemons are not started yet."""
    async with make_nodes() as made:
        yield made


@pytest.fixture
async def interfaces() -> AsyncIterator[Nodes]:
    """Two running nodes whose migration addresses are 10.9.0.1 on mig1 and 10.9.0.2 on mig2."""
    await run("ip", "link", "add", "mig1", "type", "veth", "peer", "mig2")
    try:
        for number in (1, 2):
            await run("ip", "address", "add", f"10.9.0.{number}/24", "dev", f"mig{number}")
            await run("ip", "link", "set", f"mig{number}", "up")
        async with make_nodes("10.9.0.1", "10.9.0.2", by_interface=True) as nodes:
            await nodes.start()
            yield nodes
    finally:
        await run("ip", "link", "delete", "mig1")
