"""End to end: real libvirt, QEMU and daemons, on two nodes inside scripts/sandbox."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _in_sandbox() -> None:
    if "MIGPROXY_SANDBOX" not in os.environ:
        pytest.fail("these tests make networks and mounts: run them with `make e2e`, inside scripts/sandbox")
