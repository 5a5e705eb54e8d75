"""The API server and the gate before it, for each test anew."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.kube.cluster import Cluster, cluster
from tests.kube.gate import Gate, gate


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]] | None:
    """Nobody waits for an API server in another process on simulated time."""
    has_other = os.environ.keys() & {"KUBEBUILDER_ASSETS", "MIGPROXY_POLICY_SERVER"}
    return {"loop": asyncio.new_event_loop} if has_other else None


@pytest.fixture
async def kubernetes(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """A cluster with migproxy's objects in it; an indirect parameter is a dictionary of options for `cluster`."""
    async with cluster(tmp_path, **getattr(request, "param", {})) as made:
        yield made


@pytest.fixture
async def door(kubernetes: Cluster) -> AsyncIterator[Gate]:
    """The gate that migproxy's requests to the cluster pass."""
    async with gate(kubernetes.url, kubernetes.tls) as made:
        yield made
