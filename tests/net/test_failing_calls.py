"""A daemon whose calls into the kernel fail for a while: no migration ends, and all is well soon after it."""

import asyncio
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from demo.lab import MIGPROXY, until
from tests.faults import INOTIFY, Faults
from tests.net.nodes import Nodes, assert_logged

pytestmark = pytest.mark.tier("gate")
SOAK = pytest.mark.tier("soak")

SECONDS = 5.0
"""From an error's end until all is well: two, and what a busy machine takes; tests/unit states it exactly."""


@pytest.fixture
def faults(nodes: Nodes) -> Faults:
    return Faults(nodes.directory / "faults")


def with_faults(nodes: Nodes) -> Sequence[str]:
    return sys.executable, "-m", "tests.faults", str(nodes.directory / "faults")


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("listdir", errno.EMFILE),
        pytest.param("stat", errno.ESTALE, marks=SOAK),
        pytest.param("open", errno.EIO, marks=SOAK),
        ("inotify_add_watch", errno.ENOSPC),
        ("inotify_read", errno.EIO),
    ],
)
async def test_the_folder_of_vmis_fails_and_what_began_meanwhile_is_served_after_it(
    nodes: Nodes, faults: Faults, call: str, number: int
) -> None:
    await asyncio.gather(nodes.source.start(prefix=with_faults(nodes)), nodes.target.start())
    late = nodes.migration("late")
    async with nodes.undisturbed():
        with faults.failing(call, number, INOTIFY if call == "inotify_read" else nodes.vmi_dir):
            nodes.vmi_dir.rename(nodes.directory / "away")  # so that it is looked at and watched anew
            (nodes.directory / "away").rename(nodes.vmi_dir)
            late.begin()
            await until(lambda: os.strerror(number) in str(nodes.source.status()["problems"]), "the problem", 10)
            assert not nodes.source.status()["ready"]
            await until(lambda: bool(late.published()), "the target to publish", 10)
        await until(lambda: late.is_served() and nodes.source.status()["ready"], "all to be well", SECONDS)


async def test_descriptors_run_out_and_what_began_meanwhile_is_served_after_it(nodes: Nodes) -> None:
    await nodes.start()
    late = nodes.migration("late")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with nodes.undisturbed():
        before = resource.prlimit(
            nodes.source.pid, resource.RLIMIT_NOFILE, (1, hard)
        )  # fewer, and poll(2) would fail too
        try:
            late.begin()
            await assert_logged(nodes.source, "problem with VMI files", "Too many open files")
            await until(lambda: bool(late.published()), "the target to publish", 10)
        finally:
            resource.prlimit(nodes.source.pid, resource.RLIMIT_NOFILE, before)
        await until(late.is_served, "the late one to be served", SECONDS)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("inotify_add_watch", errno.ENOSPC),
        pytest.param("inotify_add_watch", errno.EMFILE, marks=SOAK),
        pytest.param("inotify_read", errno.EIO, marks=SOAK),
        ("openat2", errno.EMFILE),
        pytest.param("openat2", errno.EIO, marks=SOAK),
    ],
)
async def test_a_launchers_folder_fails_and_its_sockets_are_put_back_after_it(
    nodes: Nodes, faults: Faults, call: str, number: int
) -> None:
    await asyncio.gather(nodes.source.start(prefix=with_faults(nodes)), nodes.target.start())
    migration = nodes.migration()
    async with nodes.undisturbed():
        migration.begin()
        await migration.served()
        folder = migration.folder(nodes.source)
        with faults.failing(call, number, INOTIFY if call == "inotify_read" else folder.parent.parent):
            for path in folder.iterdir():
                path.unlink()
            await asyncio.sleep(3)  # it lasts for some tries
        await until(lambda: all(migration.source_path(one).is_socket() for one in migration.channels), "them", SECONDS)
        await migration.served()
    lines = map(json.loads, nodes.source.log.read_text().splitlines())
    errors = [(line["event"], line.get("error")) for line in lines if line["level"] == "error"]
    assert len(errors) == len(set(errors)), "an error that stays is not logged again"


def test_a_start_without_inotify_says_what_to_do(tmp_path: Path) -> None:
    faults = Faults(tmp_path / "faults")
    command = (sys.executable, "-m", "tests.faults", str(tmp_path / "faults"), *MIGPROXY)
    options = ("--disable-tls", "--vmi-dir", str(tmp_path), "--control-socket", str(tmp_path / "control.sock"))
    with faults.failing("inotify_init1", errno.EMFILE, INOTIFY):
        refused = subprocess.run([*command, "run", *options], capture_output=True, text=True, timeout=30)
    assert refused.returncode == 1
    assert "no folder can be watched (inotify_init1): Too many open files: raise the limit of open" in refused.stderr
    assert "Traceback" not in refused.stderr
