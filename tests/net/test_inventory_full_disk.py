"""Disks that do not play along: a clear error, files untouched, nothing left behind; another one is noticed."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest

from migproxy.inventory import PublishError
from migproxy.inventory.files import FileInventory
from migproxy.portmap import Channel, PortMap
from migproxy.vmi import VMI
from migproxy.watch import Watcher

pytestmark = pytest.mark.tier("gate")

ADDRESS = ip_address("10.1.1.1")
PORTS = PortMap.of({Channel.LIBVIRT: 32899, Channel.DIRECT: 42691})
DOCUMENT = """\
apiVersion: kubevirt.io/v1
kind: VirtualMachineInstance
metadata: {name: vm, namespace: default, uid: u}
status:
  migrationState:
    migrationUid: m
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KiB of its own, with a VMI in it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True, timeout=30)
    (folder / "a.yaml").write_text(DOCUMENT + "# padding\n" * 2000)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


@asynccontextmanager
async def inventory_of(path: Path) -> AsyncIterator[tuple[FileInventory, VMI]]:
    async with Watcher() as watcher:
        inventory = FileInventory(str(path), watcher)
        changes = inventory.changes()
        vmi = (await anext(changes))["u"]
        assert vmi
        yield inventory, vmi
        await changes.aclose()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


async def test_a_full_disk_is_named_and_once_there_is_space_it_works(disk: Path) -> None:
    before = (disk / "a.yaml").read_text()
    async with inventory_of(disk) as (inventory, vmi):
        fill(disk / "ballast")
        with pytest.raises(PublishError) as caught:
            await inventory.publish(vmi, ADDRESS, PORTS)
        assert str(caught.value) == (
            f"VMI default/vm (migration m): cannot publish in {disk}/a.yaml: No space left on device (free some space)"
        )
        assert sorted(os.listdir(disk)) == ["a.yaml", "ballast"]
        assert (disk / "a.yaml").read_text() == before
        (disk / "ballast").unlink()
        await inventory.publish(vmi, ADDRESS, PORTS)
        assert "targetNodeAddress: 10.1.1.1" in (disk / "a.yaml").read_text()


@pytest.mark.root
async def test_a_read_only_disk_is_named(disk: Path) -> None:
    async with inventory_of(disk) as (inventory, vmi):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=30)
        with pytest.raises(PublishError, match=r"Read-only file system \(use a writable folder"):
            await inventory.publish(vmi, ADDRESS, PORTS)


async def test_a_file_that_is_itself_a_mount_cannot_be_replaced(disk: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "vmi.yaml"
    mounted.touch()
    subprocess.run(["mount", "--bind", str(disk / "a.yaml"), str(mounted)], check=True, timeout=30)
    try:
        async with inventory_of(mounted) as (inventory, vmi):
            with pytest.raises(PublishError, match=r"busy \(mount its folder instead of the file alone\)"):
                await inventory.publish(vmi, ADDRESS, PORTS)
        assert sorted(os.listdir(tmp_path)) == ["disk", "vmi.yaml"]
    finally:
        subprocess.run(["umount", str(mounted)], check=True, timeout=30)


async def test_an_unmounted_folder_is_looked_at_anew(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True, timeout=30)
    (folder / "a.yaml").write_text(DOCUMENT)
    async with Watcher() as watcher:
        changes = FileInventory(str(folder), watcher).changes()
        assert set(await anext(changes)) == {"u"}
        subprocess.run(["umount", str(folder)], check=True, timeout=30)
        assert await asyncio.wait_for(anext(changes), 10) == {"u": None}  # below the mount point: an empty folder
        await changes.aclose()


async def test_what_is_mounted_over_the_folder_is_noticed_though_inotify_tells_nothing(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path, uid in ((folder, "u"), (other, "o")):
        path.mkdir()
        (path / "a.yaml").write_text(DOCUMENT.replace("uid: u", f"uid: {uid}"))
    async with Watcher() as watcher:
        changes = FileInventory(str(folder), watcher).changes()
        assert set(await anext(changes)) == {"u"}
        for uid, command in (("o", ["mount", "--bind", str(other), str(folder)]), ("u", ["umount", str(folder)])):
            following = asyncio.ensure_future(anext(changes))
            subprocess.run(command, check=True, timeout=30)
            batch = await asyncio.wait_for(following, 5)
            assert {known for known, vmi in batch.items() if vmi} == {uid}
        await changes.aclose()
