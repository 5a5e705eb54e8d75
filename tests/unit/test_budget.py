"""Each migration's share of a node's connections: a greedy one leaves as much as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migproxy.budget import RESERVE, Budget, Share, admits
from migproxy.capacity import Capacity, Limits, capacity, memory_limit
from migproxy.plan import Role
from migproxy.portmap import Channel
from migproxy.proxy import Proxy

pytestmark = pytest.mark.tier("gate")

GIB, MIB = 1 << 30, 1 << 20
BUFFERS = 10 * MIB  # Linux's defaults: 6 MiB to receive, 4 to send


def greedy(room: int, migrations: int) -> list[int]:
    """What each of some migrations gets that take whatever they may, in turns."""
    held = [0] * migrations
    going = True
    while going:
        going = False
        for index in range(migrations):
            rest = [count for other, count in enumerate(held) if other != index and count]
            if admits(room, held[index], rest):
                held[index] += 1
                going = True
    return held


@pytest.mark.parametrize(
    "held", [[58], [39, 38], [29, 29, 29], [17, 17, 17, 16, 16, 16], [16] * 9], ids=lambda held: str(len(held))
)
def test_a_greedy_migration_leaves_as_much_as_it_takes_beyond_its_reserve(held: list[int]) -> None:
    found = greedy(100, len(held))
    assert found == held
    assert max(found) - RESERVE <= max(0, 100 - sum(found))


@given(st.integers(0, 1000), st.lists(st.integers(1, 500), max_size=20), st.integers(0, RESERVE - 1))
def test_whatever_the_others_have_a_migration_gets_its_reserve(room: int, others: list[int], mine: int) -> None:
    assert admits(room, mine, others)


@pytest.mark.parametrize(
    ("daemon", "relay", "together", "connections", "limit"),
    [
        (Limits(65536), Limits(65472), False, 6138, "65472 open files of the relay"),
        (Limits(65536, GIB), Limits(65536, GIB), False, 76, "1024 MiB of memory of the daemon"),
        (Limits(65536, 8 * GIB), Limits(65536, 128 * MIB), False, 32, "128 MiB of memory of the relay"),
        (Limits(65536, GIB), Limits(65536, GIB), True, 58, "1024 MiB of memory"),
        (Limits(80, GIB), Limits(65536, GIB), False, 7, "80 open files of the daemon"),
    ],
)
def test_the_tightest_limit_of_both_processes_counts(
    daemon: Limits, relay: Limits, together: bool, connections: int, limit: str
) -> None:
    found = capacity(daemon, relay, BUFFERS, together=together)
    assert found.connections == connections
    assert limit in found.limit
    assert "raise" in found.remedy


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/", {"memory.max": "1073741824\n"}, GIB),
        (
            "0::/system.slice/migproxy.service",
            {"system.slice/memory.max": "512", "system.slice/a/memory.max": "5"},
            512,
        ),
        ("0::/kubepods/pod1/container", {"memory.max": "max\n"}, None),
        ("0::/a/b", {"a/memory.max": "300", "a/b/memory.max": "max"}, 300),
        ("9:memory:/docker/1\n0::/", {"memory/memory.limit_in_bytes": "7"}, 7),
        ("3:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("2:cpu:/\n", {"memory.max": "7"}, None),
    ],
)
def test_memory_is_limited_by_the_cgroup_and_all_above_it(
    tmp_path: Path, cgroup: str, files: dict[str, str], limit: int | None
) -> None:
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{name}": t for name, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit(tmp_path) == limit


def test_without_cgroups_memory_is_not_limited(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None


def full(room: int) -> Callable[[], Capacity]:
    return lambda: Capacity(room, "80 open files of the relay", "raise them")


async def test_who_waits_for_room_is_woken_when_another_migration_ends_a_connection() -> None:
    budget = Budget(full(20))
    one, other = budget.share(), budget.share()
    with ExitStack() as mine, ExitStack() as theirs:
        for _ in range(RESERVE):
            mine.enter_context(one.take(Channel.DIRECT))
        theirs.enter_context(other.take(Channel.BLOCK))
        found = one.full(Channel.LIBVIRT, 128)
        assert found
        assert found.limit == "node"
        assert "17 are open, 16 of them this migration's" in found.why
        assert found.remedy == "raise them"
        assert other.full(Channel.BLOCK, 128) is None
        waiting = asyncio.create_task(_room(one))
        await asyncio.sleep(0)
        assert not waiting.done()
        theirs.close()
        async with asyncio.timeout(10):
            await waiting
        assert budget.report() | {"limit": "", "remedy": ""} == {
            "connections": RESERVE,
            "capacity": 20,
            "limit": "",
            "remedy": "",
        }


async def test_who_waits_for_room_looks_again_when_told_to() -> None:
    rooms = [20]
    budget = Budget(lambda: full(rooms[0])())
    one = budget.share()
    with ExitStack() as mine:
        for _ in range(RESERVE + 2):
            mine.enter_context(one.take(Channel.DIRECT))
        waiting = asyncio.create_task(_room(one))
        await asyncio.sleep(0)
        rooms[0] = 200
        budget.look_again()
        async with asyncio.timeout(10):
            await waiting


async def _room(share: Share) -> None:
    while share.full(Channel.LIBVIRT, 128):
        await share.change()


async def test_a_channel_has_a_limit_of_its_own() -> None:
    share = Budget(full(1000)).share()
    with share.take(Channel.DIRECT):
        found = share.full(Channel.DIRECT, 1)
        assert found
        assert (found.limit, found.event) == ("channel", "connections wait: the channel is full")
        assert share.full(Channel.BLOCK, 1) is None
    assert share.full(Channel.DIRECT, 1) is None


async def test_a_source_sets_up_four_connections_of_a_channel_at_a_time() -> None:
    """So that those of other channels and migrations have their turn meanwhile."""
    share = Budget(full(1000)).share()
    around = SimpleNamespace(max_connections=128)
    proxy = cast(Any, SimpleNamespace(share=share, waits={}, role=Role.SOURCE, around=around))
    with ExitStack() as begun:
        for _ in range(3):
            begun.enter_context(share.begin(Channel.DIRECT))
        await Proxy._room(proxy, Channel.DIRECT)
        with share.begin(Channel.DIRECT):
            waiting = asyncio.create_task(Proxy._room(proxy, Channel.DIRECT))
            await asyncio.sleep(0)
            assert not waiting.done()
            await Proxy._room(proxy, Channel.LIBVIRT)
        async with asyncio.timeout(10):
            await waiting
