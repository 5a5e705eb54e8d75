"""End to end: real libvirt, QEMU and daemons, on two nodes inside scripts/sandbox; fresh machines, outside of it."""

import os

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    sandboxed, outside = "MIGPROXY_SANDBOX" in os.environ, item.get_closest_marker("outside")
    if not sandboxed and not outside:
        pytest.fail("these tests make networks and mounts: run them with `make e2e`, inside scripts/sandbox")
    if sandboxed and outside:
        pytest.fail(f"a sandbox has no network to download from: scripts/run-tests soak {item.path}")
