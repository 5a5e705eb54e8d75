"""A flood of log lines is told in a few."""

import asyncio

import pytest

from migproxy.limit import Limit
from tests.clock import Clock

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]


async def test_the_first_lines_of_a_kind_are_written_and_the_others_counted(clock: Clock) -> None:
    told: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
    limit: Limit[str] = Limit(lambda kind, count: told.put_nowait((kind, count)))
    assert [limit.admits("garbage") for _ in range(8)] == [True] * 5 + [False] * 3
    assert limit.admits("expired")
    assert await told.get() == ("garbage", 3)
    assert clock() == 10
    assert limit.admits("garbage")
    limit.close()
    assert told.empty()
