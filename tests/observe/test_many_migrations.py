"""Thousands of migrations come and go: what is exported, and the daemon's memory, are then as before."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from demo.lab import end
from migproxy.portmap import MIGRATION_PROXY_DIR, Channel, source_socket_name
from migproxy.retention import MOST

pytestmark = pytest.mark.tier("gate")

ADDRESS = "127.0.0.1"
URL = f"http://{ADDRESS}:9470"
BATCH = 100
WARM_UP, ALL = 400, 2000
GROWTH = 8 << 20  # bytes of memory that may come and stay: an allocator gives back what it can, not what it should


class Daemon:
    """A source node's daemon with a folder of VMIs, all of which migrate to a target that reads and closes."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession, port: int) -> None:
        self.folder, self.session, self.port = folder, session, port

    async def metrics(self) -> str:
        async with self.session.get(f"{URL}/metrics") as answer:
            return await answer.text()

    async def states(self) -> list[str]:
        async with self.session.get(f"{URL}/api/status") as answer:
            return [one["state"] for one in (await answer.json())["migrations"]]

    async def until(self, state: str, count: int) -> None:
        async with asyncio.timeout(120):
            while (await self.states()).count(state) != count:
                await asyncio.sleep(0.1)

    async def migrate(self, begin: int, end: int) -> None:
        """Begins and ends so many migrations, each with a connection that carries a few bytes."""
        names = [f"vmi-{number}" for number in range(begin, end)]
        for name in names:
            (self.folder / name / "kubevirt").mkdir(parents=True)
        self.write([vmi(name, self.port) for name in names])
        await self.until("prepared", len(names))
        for name in names:
            sockets = os.open(self.folder / name / MIGRATION_PROXY_DIR, os.O_PATH)
            reader, writer = await asyncio.open_unix_connection(
                f"/proc/self/fd/{sockets}/{source_socket_name(name, Channel.DIRECT)}"
            )
            os.close(sockets)
            writer.write(b"memory")
            writer.write_eof()
            assert await reader.read() == b"taken"
            writer.close()
        self.write([vmi(name, self.port, done=True) for name in names])
        await self.until("prepared", 0)
        await self.until("running", 0)

    def write(self, vmis: list[dict[str, Any]]) -> None:
        new = self.folder / "new"
        new.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": vmis}))
        new.rename(self.folder / "vmis.json")


def vmi(name: str, port: int, *, done: bool = False) -> dict[str, Any]:
    state: dict[str, Any] = {
        "migrationUid": f"migration-of-{name}",
        "sourceNode": "node01",
        "targetNode": "node02",
        "targetNodeAddress": ADDRESS,
        "targetDirectMigrationNodePorts": {str(port): int(Channel.DIRECT)},
    }
    if done:
        state |= {"completed": True, "endTimestamp": "2026-01-01T00:00:00Z"}
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {"namespace": "default", "name": name, "uid": name, "labels": {"kubevirt.io/nodeName": "node01"}},
        "status": {"phase": "Running", "nodeName": "node01", "migrationTransport": "Unix", "migrationState": state},
    }


@asynccontextmanager
async def daemon(folder: Path, retention: float) -> AsyncIterator[Daemon]:
    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.write(b"taken")
        writer.close()

    (folder / "vmis.json").write_text("[]")
    command = [sys.executable, "-m", "migproxy", "run", "--node-name", "node01", "--disable-tls"]
    command += ["--vmi-dir", f"{folder}/vmis.json", "--launcher-run-dir", f"{folder}/{{name}}"]
    command += ["--migration-address", ADDRESS, "--control-socket", f"{folder}/control.sock"]
    command += ["--retention", str(retention), "--log-level", "warning"]
    target = await asyncio.start_server(take, ADDRESS, 0)
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with aiohttp.ClientSession() as session:
            made = Daemon(folder, session, target.sockets[0].getsockname()[1])
            await ready(session, process)
            yield made
    finally:
        await end(process, signal.SIGTERM)
        target.close()
        await target.wait_closed()


async def ready(session: aiohttp.ClientSession, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(60):
        while True:
            assert process.returncode is None
            try:
                async with session.get(f"{URL}/healthz"):
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.1)


def series(exposition: str) -> int:
    return sum("migration_uid=" in line for line in exposition.splitlines())


def memory(exposition: str) -> float:
    found = re.search(r"^process_resident_memory_bytes (\S+)$", exposition, re.MULTILINE)
    assert found
    return float(found[1])


@pytest.mark.tier("soak")
async def test_2000_migrations_leave_no_series_and_no_memory(tmp_path: Path) -> None:
    async with daemon(tmp_path, retention=1) as node:
        for begin in range(0, WARM_UP, BATCH):
            await node.migrate(begin, begin + BATCH)
        await node.until("ended", 0)
        before = await node.metrics()
        for begin in range(WARM_UP, ALL, BATCH):
            await node.migrate(begin, begin + BATCH)
        await node.until("ended", 0)
        after = await node.metrics()
    assert series(before) == series(after) == 0
    assert f'migproxy_migration_duration_seconds_count{{role="source"}} {ALL}.0' in after, "each was served and counted"
    assert len(after) == pytest.approx(len(before), rel=0.02), "only figures have grown"
    assert memory(after) - memory(before) < GROWTH


async def test_series_are_bounded_while_ended_migrations_are_kept(tmp_path: Path) -> None:
    async with daemon(tmp_path, retention=3600) as node:
        await node.migrate(0, MOST)
        full = series(await node.metrics())
        await node.migrate(MOST, MOST + BATCH)
        exposition = await node.metrics()
        assert series(exposition) == full
        kept = {int(number) for number in re.findall(r'name="vmi-(\d+)"', exposition)}
        assert len(kept) == MOST
        assert kept >= set(range(MOST, MOST + BATCH)), "the oldest have gone, of which all ended at once"
