"""A folder of VMIs whose looks, readings and watches fail: nothing ends by an error, and its end is noticed at once."""

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from structlog.typing import EventDict

from migproxy.inventory import files
from migproxy.inventory.files import FileInventory
from migproxy.watch import Mask, Watcher, WatchError
from tests.clock import Clock, eventually
from tests.faults import INOTIFY, Faults, injected
from tests.unit.test_inventory_files import replace_file, text

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

SECONDS = 2.0
"""From an error's end until what has changed meanwhile is served."""

CASES = [
    *(("listdir", number) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)),
    *(("open", number) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES)),
    *(("read", number) for number in (errno.ENOMEM, errno.EIO, errno.ESTALE)),
    *(("stat", number) for number in (errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EACCES)),
    *(("lstat", number) for number in (errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EACCES)),
    *(("readlink", number) for number in (errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EACCES)),
    *(("inotify_add_watch", number) for number in (errno.ENOSPC, errno.ENOMEM, errno.EACCES, errno.ENOENT)),
    *(("inotify_read", number) for number in (errno.ENOMEM, errno.EIO)),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "vmis"
    folder.mkdir()
    return folder


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Faults]:
    faults = Faults(tmp_path / "faults")
    with injected(faults):
        yield faults


@contextlib.asynccontextmanager
async def followed(folder: Path) -> AsyncIterator[tuple[FileInventory, dict[str, str | None]]]:
    """An inventory, and what it has told so far: phases of VMIs by name, None for one that is gone."""
    told: dict[str, str | None] = {}
    began = asyncio.Event()

    async def follow() -> None:
        async for batch in inventory.changes():
            began.set()
            told.update({uid.removeprefix("uid-"): vmi.phase if vmi else None for uid, vmi in batch.items()})

    async with Watcher() as watcher:
        inventory = FileInventory(str(folder), watcher)
        following = asyncio.create_task(follow())
        await began.wait()
        try:
            yield inventory, told
        finally:
            following.cancel()
            await asyncio.wait([following])


@pytest.mark.parametrize(("call", "number"), CASES, ids=lambda value: errno.errorcode.get(value, value))
async def test_an_error_ends_nothing_and_what_changes_meanwhile_is_served_after_it(
    folder: Path, faults: Faults, logs: list[EventDict], clock: Clock, call: str, number: int
) -> None:
    for name in "ab":
        (folder / f"{name}.yaml").write_text(text(name))
    second = folder.with_name("second")
    shutil.copytree(folder, second)
    async with followed(folder) as (inventory, told):
        with faults.failing(call, number, INOTIFY if call == "inotify_read" else folder):
            folder.rename(folder.with_name("away"))  # so that everything is looked at, read and watched anew
            second.rename(folder)
            await eventually(lambda: os.strerror(number) in str(inventory.problems), "the problem", 1)
            replace_file(folder / "a.yaml", text("a", phase="Failed"))
            replace_file(folder / "c.yaml", text("c"))
            await asyncio.sleep(20)
            assert inventory.problems
            assert None not in told.values()
        ended = clock()
        await eventually(lambda: told == {"a": "Failed", "b": "Running", "c": "Running"}, f"{told}")
        await eventually(lambda: not inventory.problems, f"the end of {inventory.problems}")
        assert clock() - ended <= SECONDS
        replace_file(folder / "b.yaml", text("b", phase="Succeeded"))
        await eventually(lambda: told["b"] == "Succeeded", "a change after all that", 0.1)
    errors = [(log.get("path"), log.get("problem")) for log in logs if log["log_level"] == "error"]
    assert errors
    assert len(errors) == len(set(errors)), "an error that stays is not logged again"


async def test_what_fails_is_tried_again_with_growing_pauses_of_a_second_at_most(
    folder: Path, faults: Faults, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []
    look = files._look

    def noted(path: str) -> files._Look:
        tries.append(clock())
        return look(path)

    async with followed(folder) as (inventory, _):
        monkeypatch.setattr(files, "_look", noted)
        with faults.failing("listdir", errno.EMFILE, folder):
            replace_file(folder / "a.yaml", text("a"))
            await eventually(lambda: bool(inventory.problems), "the problem")
            await asyncio.sleep(5)
    pauses = [later - earlier for earlier, later in pairwise(sorted(set(tries)))]
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, *[1.0] * (len(pauses) - 5)])
    assert len(pauses) >= 8


async def test_a_look_at_one_file_that_fails_hides_no_change_of_it(folder: Path, faults: Faults, clock: Clock) -> None:
    (folder / "a.yaml").write_text(text("a"))
    (folder / "b.yaml").write_text(text("b"))
    async with followed(folder) as (inventory, told):
        with faults.failing("stat", errno.EIO, folder / "a.yaml"):
            replace_file(folder / "a.yaml", text("a", phase="Failed"))
            replace_file(folder / "b.yaml", text("b", phase="Failed"))
            await asyncio.sleep(10)
            assert told == {"a": "Running", "b": "Failed"}
            assert list(inventory.problems) == [str(folder / "a.yaml")]
        ended = clock()
        await eventually(lambda: told == {"a": "Failed", "b": "Failed"}, "the change")
        assert clock() - ended <= SECONDS


async def test_a_linked_file_that_is_missing_for_a_moment_is_followed_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "a"
    real.write_text(text("a"))
    (folder / "a.yaml").symlink_to(real)
    async with followed(folder) as (_, told):
        real.rename(real.with_name("a~"))
        await asyncio.sleep(files.MISSING_SECONDS / 2)
        real.write_text(text("a", phase="Failed"))
        await eventually(lambda: told == {"a": "Failed"}, "the change")
        real.unlink()
        await eventually(lambda: told == {"a": None}, "its end")
        real.write_text(text("a"))
        await eventually(lambda: told == {"a": "Running"}, "its return")


async def test_what_inotify_cannot_be_asked_for_is_an_overflow_to_everybody_and_read_later(
    tmp_path: Path, faults: Faults, clock: Clock, logs: list[EventDict]
) -> None:
    async with Watcher() as watcher:
        with watcher.watch(str(tmp_path), Mask.CREATE) as one, watcher.watch(str(tmp_path), Mask.DELETE) as other:
            with faults.failing("inotify_read", errno.EIO, INOTIFY):
                (tmp_path / "a").touch()
                assert (await anext(one)).overflow
                assert (await anext(other)).overflow
                assert "Input/output error" in str(watcher.problem)
                await asyncio.sleep(10)
            ended = clock()
            (tmp_path / "a").unlink()
            events = [await anext(other)]
            while events[-1].overflow:
                events.append(await anext(other))
            assert Mask.DELETE in events[-1].mask
            assert watcher.problem is None
            assert clock() - ended <= SECONDS
    assert [log["event"] for log in logs] == ["inotify cannot be read", "inotify is read again"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_a_start_without_inotify_says_what_to_do(faults: Faults, number: int) -> None:
    with faults.failing("inotify_init1", number, INOTIFY), pytest.raises(WatchError) as caught:
        await Watcher().__aenter__()
    assert os.strerror(number) in str(caught.value)
    assert "fs.inotify.max_user_instances" in str(caught.value)
