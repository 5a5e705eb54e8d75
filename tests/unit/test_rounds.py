"""Taking turns: whoever asks for much does not make the others wait for all of it."""

from __future__ import annotations

import asyncio

import pytest

from migproxy.rounds import Permits, Rounds

pytestmark = pytest.mark.tier("gate")


def test_each_has_one_turn_in_a_round_whatever_one_asks_for() -> None:
    rounds: Rounds[str] = Rounds()
    for number in range(100):
        rounds.put(f"greedy {number}", "greedy")
    rounds.put("modest 0", "modest")
    rounds.put("modest 1", "modest")
    assert [rounds.pop() for _ in range(5)] == ["greedy 0", "modest 0", "greedy 1", "modest 1", "greedy 2"]


def test_many_addresses_of_one_migration_share_its_turn() -> None:
    rounds: Rounds[str] = Rounds()
    for number in range(240):
        rounds.put(f"flood {number}", "attacked", number)
    rounds.put("real", "attacked", "peer")
    rounds.put("first", "other", "peer")
    rounds.put("second", "other", "peer")
    assert [rounds.pop() for _ in range(4)] == ["flood 0", "first", "flood 1", "second"]
    assert [rounds.pop() for _ in range(239)][-1] == "real"
    assert not rounds


async def test_a_permit_goes_to_whoever_has_had_fewest_and_none_is_lost() -> None:
    permits, order = Permits(1), []
    gate = asyncio.Event()

    async def work(name: str, whose: str) -> None:
        async with permits.permit(whose):
            await gate.wait()
            order.append(name)

    tasks = [asyncio.create_task(work(f"greedy {number}", "greedy")) for number in range(4)]
    tasks.append(asyncio.create_task(work("modest", "modest")))
    await asyncio.sleep(0)
    tasks[1].cancel()  # one that waits
    gate.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks, return_exceptions=True)
        async with permits.permit("greedy"):
            pass
    assert order == ["greedy 0", "modest", "greedy 2", "greedy 3"]


async def test_a_permit_that_is_granted_to_somebody_who_gives_up_in_that_instant_goes_on() -> None:
    permits = Permits(1)
    async with permits.permit("first"):
        second = asyncio.create_task(_take(permits))
        await asyncio.sleep(0)
    second.cancel()  # it has been granted, and has not run since
    await asyncio.gather(second, return_exceptions=True)
    async with asyncio.timeout(10), permits.permit("third"):
        pass


async def _take(permits: Permits) -> None:
    async with permits.permit("second"):
        raise AssertionError("it was cancelled")
