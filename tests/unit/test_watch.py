"""One inotify instance serves everybody in the daemon, and nobody disturbs anybody else."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from migproxy.watch import QUEUE_LIMIT, Event, Mask, Subscription, Watcher

pytestmark = pytest.mark.tier("gate")

MAX_QUEUED_EVENTS = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


def on_both_loops(test: Callable[[Watcher, Path], Awaitable[None]]) -> Callable[..., None]:
    """Run a test with a running watcher, on uvloop (the daemon's) and on asyncio's own loop."""

    @pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
    def run(loop_factory: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> None:
        async def body() -> None:
            async with Watcher() as watcher:
                await test(watcher, tmp_path)

        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(body())

    return run


async def next_event(subscription: Subscription) -> Event:
    return await asyncio.wait_for(anext(subscription), 10)


async def has_ended(subscription: Subscription) -> bool:
    try:
        await next_event(subscription)
    except StopAsyncIteration:
        return True
    return False


def kernel_watches() -> int:
    """How many inotify watches this process has."""
    count = 0
    for name in os.listdir("/proc/self/fdinfo"):
        try:
            count += Path("/proc/self/fdinfo", name).read_text().count("inotify wd:")
        except FileNotFoundError:  # of the listing itself
            continue
    return count


@on_both_loops
async def test_tells_what_happens_to_the_entries_of_a_folder(watcher: Watcher, tmp_path: Path) -> None:
    with watcher.watch(str(tmp_path), Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.DELETE) as events:
        (tmp_path / "é").write_text("x")
        (tmp_path / "é").rename(tmp_path / "b")
        (tmp_path / "b").unlink()
        assert await next_event(events) == Event(Mask.CLOSE_WRITE, "é")
        assert await next_event(events) == Event(Mask.MOVED_TO, "b")
        assert await next_event(events) == Event(Mask.DELETE, "b")


@on_both_loops
async def test_a_file_itself_can_be_watched(watcher: Watcher, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with watcher.watch(str(file), Mask.CLOSE_WRITE) as events:
        file.write_text("x")
        assert await next_event(events) == Event(Mask.CLOSE_WRITE, None)


@on_both_loops
async def test_subscribers_to_one_folder_each_get_their_own_mask(watcher: Watcher, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with (
            watcher.watch(str(tmp_path), Mask.CREATE) as created,
            watcher.watch(f"/proc/self/fd/{descriptor}", Mask.DELETE) as deleted,
        ):
            assert kernel_watches() == 1
            (tmp_path / "a").touch()
            (tmp_path / "a").unlink()
            (tmp_path / "b").touch()
            assert await next_event(created) == Event(Mask.CREATE, "a")
            assert await next_event(created) == Event(Mask.CREATE, "b")
            assert await next_event(deleted) == Event(Mask.DELETE, "a")
    finally:
        os.close(descriptor)


@on_both_loops
async def test_a_subscriber_that_leaves_does_not_end_the_others(watcher: Watcher, tmp_path: Path) -> None:
    with watcher.watch(str(tmp_path), Mask.CREATE) as staying:
        with watcher.watch(str(tmp_path), Mask.CREATE | Mask.DELETE) as leaving:
            pass
        assert await has_ended(leaving)
        (tmp_path / "a").touch()
        assert await next_event(staying) == Event(Mask.CREATE, "a")
    assert kernel_watches() == 0


@on_both_loops
async def test_a_folder_can_be_watched_again_at_once(watcher: Watcher, tmp_path: Path) -> None:
    for _ in range(3):
        with watcher.watch(str(tmp_path), Mask.CREATE) as events:
            (tmp_path / "a").touch()
            assert await next_event(events) == Event(Mask.CREATE, "a")
            (tmp_path / "a").unlink()


@on_both_loops
async def test_the_end_of_a_folder_is_told_and_ends_the_iteration(watcher: Watcher, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with watcher.watch(str(folder), Mask.CREATE) as one, watcher.watch(str(folder), Mask.DELETE) as other:
        folder.rmdir()
        for events in (one, other):
            event = await next_event(events)
            assert event.gone
            assert not event.overflow
            assert await has_ended(events)
        folder.mkdir()
        with watcher.watch(str(folder), Mask.CREATE) as again:
            (folder / "a").touch()
            assert await next_event(again) == Event(Mask.CREATE, "a")


@on_both_loops
async def test_a_slow_subscriber_gets_one_overflow_instead_of_a_flood(watcher: Watcher, tmp_path: Path) -> None:
    with watcher.watch(str(tmp_path), Mask.CREATE) as slow, watcher.watch(str(tmp_path), Mask.DELETE) as prompt:
        for number in range(QUEUE_LIMIT + 1):
            (tmp_path / str(number)).touch()
        (tmp_path / "0").unlink()
        assert await next_event(prompt) == Event(Mask.DELETE, "0")  # all before it is delivered
        assert (await next_event(slow)).overflow
        (tmp_path / "later").touch()
        assert await next_event(slow) == Event(Mask.CREATE, "later")


@on_both_loops
async def test_an_overflow_of_the_kernels_queue_reaches_everybody(watcher: Watcher, tmp_path: Path) -> None:
    busy, quiet = tmp_path / "busy", tmp_path / "quiet"
    busy.mkdir()
    quiet.mkdir()
    with watcher.watch(str(busy), Mask.CREATE | Mask.DELETE), watcher.watch(str(quiet), Mask.CREATE) as events:
        for _ in range(MAX_QUEUED_EVENTS // 2 + 1):  # without a chance for the reader
            (busy / "a").touch()
            (busy / "a").unlink()
        assert (await next_event(events)).overflow
        (quiet / "b").touch()
        assert await next_event(events) == Event(Mask.CREATE, "b")


@on_both_loops
async def test_what_is_missing_is_named(watcher: Watcher, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        watcher.watch(str(tmp_path / "no-such-folder"), Mask.CREATE)


async def test_the_end_of_the_watcher_ends_iterations_and_leaves_nothing(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with Watcher() as watcher:
        events = watcher.watch(str(tmp_path), Mask.CREATE)
        waiting = asyncio.create_task(has_ended(events))
        await asyncio.sleep(0)
    assert await asyncio.wait_for(waiting, 10)
    events.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(RuntimeError):
        watcher.watch(str(tmp_path), Mask.CREATE)
