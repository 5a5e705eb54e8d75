"""What a daemon claims for itself, and what becomes of a second one where that cannot be claimed."""

import asyncio
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from migproxy.lifeline import Lifeline, is_locked
from migproxy.settings import Settings
from migproxy.twins import alone, claims
from tests.clock import Clock

pytestmark = pytest.mark.tier("gate")

UNNOTICED = "a second daemon that serves the same would not be noticed"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a daemon beside virt-handler, whose launchers are in one folder."""
    return Settings(launcher_run_dir=str(tmp_path), control_socket=str(tmp_path / "control.sock"))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Lifeline]:
    """Of another daemon in that folder, which does not live yet."""
    with closing(Lifeline(str(tmp_path), is_folder=True)) as made:
        yield made


@pytest.mark.parametrize(
    ("pattern", "folder"),
    [
        ("/run", ["/run"]),
        ("/proc/{pid}/root/var/run", ["/pods"]),
        ("/run/{namespace}/{name}", []),
    ],
)
def test_launchers_are_one_daemons_where_one_folder_has_them_all(pattern: str, folder: list[str]) -> None:
    claimed = claims(Settings(launcher_run_dir=pattern, pods_dir="/pods"))
    assert [(claim.lock, claim.is_folder) for claim in claimed] == [(path, True) for path in folder]


def test_a_nodes_name_is_one_daemons_in_each_place_of_vmis(tmp_path: Path) -> None:
    vmis = [tmp_path / "vmis", tmp_path / "vmis/a.yaml", tmp_path / "vmis/b.yaml"]
    vmis[0].mkdir()
    for file in vmis[1:]:
        file.touch()

    def lock(place: Path, node: str = "n" * 253) -> str:
        (claim,) = claims(Settings(launcher_run_dir="/{name}", vmi_dir=str(place), node_name=node))
        assert os.path.dirname(claim.lock) == str(vmis[0])
        assert os.path.basename(claim.lock).startswith(".migproxy-")
        return claim.lock

    (tmp_path / "link").symlink_to(vmis[0])
    assert lock(vmis[0]) == lock(tmp_path / "link")
    assert len({*map(lock, vmis), lock(vmis[0], "other")}) == 4


@pytest.mark.parametrize("place", ["", "vm.yaml"])
def test_folder_that_is_locked_to_publish_is_left_to_that(tmp_path: Path, place: str) -> None:
    (tmp_path / "vm.yaml").touch()
    (claim,) = claims(Settings(launcher_run_dir=str(tmp_path), vmi_dir=str(tmp_path / place)))
    assert not claim.is_folder


async def test_while_it_waits_its_failsafe_gives_nothing_of_the_other_daemons_back(
    settings: Settings, other: Lifeline
) -> None:
    told, goes_on = asyncio.Queue[str | None](), asyncio.Event()

    async def serve() -> None:
        async with alone(settings, told.put_nowait):
            goes_on.set()

    with other.taken():
        serving = asyncio.create_task(serve())
        async with asyncio.timeout(20):
            assert "end one of the two" in (await told.get() or "")
        assert is_locked(settings.daemon_lock)
        assert not goes_on.is_set()
    async with asyncio.timeout(20):
        assert await told.get() is None
        await serving
    assert goes_on.is_set()
    assert not is_locked(settings.daemon_lock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
async def test_file_system_without_locks_keeps_nobody_from_serving(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(fd: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    told = list[str | None]()
    with capture_logs() as lines:
        async with alone(settings, told.append):
            assert told == [None]
    (line,) = lines
    assert (line["event"], line["error"]) == (UNNOTICED, os.strerror(number))


async def test_folder_that_cannot_be_written_keeps_nobody_from_serving() -> None:
    with capture_logs() as lines:
        async with alone(Settings(launcher_run_dir="/{name}", vmi_dir="/proc"), print):
            pass
    assert [line["event"] for line in lines] == [UNNOTICED]


@pytest.mark.simulated_time
async def test_who_finds_nobody_waits_for_nothing(settings: Settings, clock: Clock) -> None:
    before = clock()
    async with alone(settings, print):
        with closing(Lifeline(settings.launcher_run_dir, is_folder=True)) as next_one:
            assert next_one.is_held
    assert clock() == before
