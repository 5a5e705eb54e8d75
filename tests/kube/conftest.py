"""The API server and the gate before it, for each test anew."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kube.cluster import Cluster, cluster
from tests.kube.gate import Gate, gate


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
