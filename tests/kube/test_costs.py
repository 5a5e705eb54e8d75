"""What an idle daemon costs a node: the figures that do not depend on how busy the machine is."""

import asyncio
import time
from pathlib import Path

import pytest

from benchmarks.kube import VMI_BYTES, Daemon
from tests.kube.cluster import VMIS, cluster, vmi

pytestmark = pytest.mark.tier("soak")

IDLE_SECONDS = 10


async def test_idle_daemon_with_1000_vmis_is_small(tmp_path: Path) -> None:
    async with cluster(tmp_path, separate=True) as kubernetes:
        uids = {}
        for number in range(1000):
            made = await kubernetes.request("POST", VMIS, vmi(f"vmi-{number}", padding=VMI_BYTES))
            uids[f"vmi-{number}"] = made["metadata"]["uid"]
        daemon = Daemon(kubernetes, tmp_path, uids)
        try:
            await daemon.start()
            began, used = time.monotonic(), daemon.cpu()
            await asyncio.sleep(IDLE_SECONDS)  # what is measured
            assert (daemon.cpu() - used) / (time.monotonic() - began) < 0.01
            assert daemon.memory() < 130
        finally:
            await daemon.stop()
