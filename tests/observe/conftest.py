"""Seen from outside: daemons on two nodes, watched by Prometheus, a browser, a terminal; inside scripts/sandbox."""

import os
import shutil
from collections.abc import AsyncIterator

import pytest

from demo.lab import Lab, run

TOOLS = ("prometheus", "promtool", "chromium", "tmux")
WATCHER = "10.1.1.254"


@pytest.fixture(scope="session", autouse=True)
def sandbox() -> None:
    if "MIGPROXY_SANDBOX" not in os.environ:
        pytest.exit("these tests make networks and mounts: run them with `make observe`, in scripts/sandbox", 1)
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} missing: run scripts/system-packages observability as root")


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    """Two nodes without libvirt and TLS, whose HTTP can be reached from here; their daemons are not started yet."""
    async with Lab(libvirt=False, tls=False) as made:
        await run("ip", "address", "add", f"{WATCHER}/24", "dev", "migration")
        yield made
