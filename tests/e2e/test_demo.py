"""`make demo`: it ends well, it leaves nothing, and it says so when it is interrupted."""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from demo.lab import end, until

pytestmark = pytest.mark.tier("gate")

STREAMS = (sys.executable, "-m", "demo", "--loopback", "--gib", "0.25")


@pytest.fixture(autouse=True)
async def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """No process and no file of a demonstration outlives it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = running()
    yield
    await until(lambda: running() <= before, "the end of its processes")
    assert not list(tmp_path.iterdir())


@pytest.mark.alone
async def test_virtual_machine_goes_there_and_back() -> None:
    said = await finish(await start(sys.executable, "-m", "demo"), 0)
    assert "hashes of memory and disk" in said
    assert "Both daemons counted the same bytes" in said


async def test_streams_take_its_place_without_namespaces() -> None:
    for _ in range(2):
        said = await finish(await start(*STREAMS), 0)
        assert "because without namespaces" in said
        assert "Both daemons counted the same bytes" in said


async def test_streams_take_its_place_without_qemu(tmp_path_factory: pytest.TempPathFactory) -> None:
    programs = tmp_path_factory.mktemp("programs")
    for name in ("ip", "mount", "nsenter", "sh", "sleep", "unshare"):
        (programs / name).symlink_to(shutil.which(name) or pytest.fail(f"there is no {name}"))
    demo = await start(sys.executable, "-m", "demo", "--gib", "0.25", env={**os.environ, "PATH": str(programs)})
    said = await finish(demo, 0)
    assert "because not installed: qemu-system-x86_64" in said
    assert "run scripts/system-packages demo as root" in said


async def test_streams_take_its_place_without_iproute2() -> None:
    hide = 'mount --bind /dev/null "$(realpath "$(command -v ip)")" && exec "$@"'
    demo = await start("unshare", "--mount", "sh", "-c", hide, "sh", "scripts/demo", "--gib", "0.25")
    said = await finish(demo, 0)
    assert "the package iproute2" in said
    assert "Both daemons counted the same bytes" in said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_interrupted_demo_takes_everything_down(signum: signal.Signals) -> None:
    process = await start(*STREAMS[:-1], "64")
    await heard(process, "publishes")
    process.send_signal(signum)
    assert "Interrupted" in await finish(process, 130)


@pytest.mark.alone
async def test_killed_demo_leaves_nothing() -> None:
    before = running()
    process = await start("scripts/sandbox", sys.executable, "-m", "demo")
    await heard(process, "virsh create")
    assert await end(process, signal.SIGKILL) == -signal.SIGKILL
    await until(lambda: running() <= before, "the end of the demonstration's processes")


async def start(*command: str, env: dict[str, str] | None = None) -> asyncio.subprocess.Process:
    # A shell starts what is to run in the background with SIGINT ignored, and the demonstration would inherit that.
    command = ("/usr/bin/env", "--default-signal=INT", *command)
    return await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=env
    )


async def heard(process: asyncio.subprocess.Process, words: str) -> None:
    assert process.stdout
    async with asyncio.timeout(60):
        async for line in process.stdout:
            if words in line.decode():
                return
    pytest.fail(f"it ended without saying {words!r}")


async def finish(process: asyncio.subprocess.Process, status: int) -> str:
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 180)
    finally:
        if process.returncode is None:
            await end(process, signal.SIGKILL)
    assert process.returncode == status, out.decode()
    return out.decode()


def running() -> set[str]:
    """The processes that there are, by ID and command line; those that have ended have none."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path("/proc", pid, "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if command:
            found.add(f"{pid} {command}")
    return found
