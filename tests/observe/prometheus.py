"""Debian's Prometheus, scraping the daemons each second."""

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from demo.lab import Node, end

RULES = Path(__file__).parents[2] / "deploy/prometheus/rules.yaml"
_ADDRESS = "127.0.0.1:9090"

_CONFIGURATION = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: migproxy
    honor_labels: true
    static_configs:
{targets}
"""
_TARGET = "      - {{targets: ['{node.address}:9470'], labels: {{node: {node.name}}}}}"

Labels = Mapping[str, str]


class Prometheus:
    """Its database, by way of its HTTP interface."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def query(self, expression: str) -> list[tuple[Labels, float]]:
        """An expression's value now, series by series."""
        found = await self._get("query", query=expression)
        return [(one["metric"], float(one["value"][1])) for one in found["result"]]

    async def history(self, expression: str, begin: float, end: float) -> list[float]:
        """All the values that an expression had, second by second, of all its series together."""
        found = await self._get("query_range", query=expression, start=str(begin), end=str(end), step="1")
        return [float(value) for one in found["result"] for _, value in one["values"]]

    async def eventually(self, expression: str, count: int, seconds: float = 60) -> list[tuple[Labels, float]]:
        """Waits until an expression has so many series."""
        async with asyncio.timeout(seconds):
            while len(found := await self.query(expression)) != count:
                await asyncio.sleep(0.3)
        return found

    async def _get(self, what: str, **parameters: str) -> Any:
        async with self._session.get(f"http://{_ADDRESS}/api/v1/{what}", params=parameters) as answer:
            body = await answer.json()
        assert body["status"] == "success", body
        return body["data"]


@asynccontextmanager
async def scraping(nodes: Sequence[Node]) -> AsyncIterator[Prometheus]:
    """Runs Prometheus while the context lasts; the shipped rules are loaded."""
    with tempfile.TemporaryDirectory() as made:
        configuration = Path(made, "prometheus.yml")
        targets = "\n".join(_TARGET.format(node=node) for node in nodes)
        configuration.write_text(_CONFIGURATION.format(rules=RULES, targets=targets))
        with Path(made, "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *("prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={made}/data"),
                f"--web.listen-address={_ADDRESS}",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            async with aiohttp.ClientSession() as session:
                await _until_ready(session, process, Path(made, "log"))
                yield Prometheus(session)
        finally:
            await end(process, signal.SIGTERM)


async def _until_ready(session: aiohttp.ClientSession, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(60):
        while True:
            assert process.returncode is None, log.read_text()
            try:
                async with session.get(f"http://{_ADDRESS}/-/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.2)
