"""Tests that need namespaces and privileges: only inside scripts/sandbox, never on the machine itself."""

import os
from collections.abc import AsyncIterator

import pytest

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
