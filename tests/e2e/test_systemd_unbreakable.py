"""Migrations go on whatever happens to daemon or relay under a real systemd, with the units as shipped."""

import random
from collections.abc import Awaitable, Callable

import pytest

from demo.lab import Lab, until
from tests.e2e.services import PATIENCE, RELAY, Service, carries, connected, laboratory
from tests.e2e.unbreakable import MIB, Storm, Streams, Tide, carried, seed

pytestmark = [pytest.mark.tier("soak"), pytest.mark.root]

KILLS = 200  # of both daemons together
TOTAL = 4096 * MIB
ROUNDS = 10
RESTARTS = 5  # of each daemon
RELAY_KILLS = 20  # of each relay


async def carry(lab: Lab, total: int, during: Callable[[Streams, Tide], Awaitable[None]]) -> None:
    """Carries hashed streams through a migration, and asserts that both daemons counted them to the byte."""
    source, target = lab.nodes
    async with lab.migration(source, target, block=True) as uid:
        tide = Tide()
        streams = Streams(source, target, lab.vmi.read()["metadata"]["uid"], total, tide)
        async with carried(streams):
            await during(streams, tide)
            print(f"{streams.moved / total:.0%} of the bytes moved meanwhile")
            tide.end()
        await streams.assert_counted(uid)


async def settled(streams: Streams) -> None:
    """Waits until what was let on has arrived."""
    streams.calm()
    await until(lambda: streams.are_settled, f"what is due: {streams}", PATIENCE)


async def test_streams_come_through_a_storm() -> None:
    async with laboratory() as (lab, services):
        before = [service.descriptors() for service in services]
        relays = [service.relay for service in services]
        storm = Storm(services, seed(), 1.0)

        async def strike(streams: Streams, tide: Tide) -> None:
            def killing(chance: random.Random) -> None:
                streams.shake(chance)
                tide.rise(min(1.0, (storm.kills + 1) / KILLS))

            for number in range(ROUNDS):
                await storm.blow(round((number + 1) * KILLS / ROUNDS / 2) - storm.kills // 2, killing)
                await settled(streams)

        await carry(lab, TOTAL, strike)
        assert storm.kills == sum(int(service.machine.show("NRestarts")) for service in services) == KILLS
        assert [service.relay for service in services] == relays
        for service, at_first in zip(services, before, strict=True):
            await until(no_more(service, at_first), f"{at_first} descriptors in the daemon", PATIENCE)


def no_more(service: Service, than: int) -> Callable[[], bool]:
    """Whether a daemon has no more descriptors than that."""
    return lambda: service.descriptors() <= than


async def test_the_relays_are_killed_and_the_next_ones_go_on() -> None:
    async with laboratory() as (lab, services):

        async def kill(streams: Streams, tide: Tide) -> None:
            for number in range(1, RELAY_KILLS + 1):
                tide.rise(number / (RELAY_KILLS + 1))
                for service in services:
                    await service.kill(RELAY)
                await settled(streams)

        await carry(lab, 256 * MIB, kill)
        for service in services:
            assert service.machine.show("NRestarts", RELAY) == str(RELAY_KILLS)
            assert service.machine.show("NRestarts") == "0", "the daemon took no notice"


async def test_a_restart_leaves_everything_to_the_relay() -> None:
    async with laboratory() as (lab, services):
        relays = [service.relay for service in services]

        async def restart(streams: Streams, tide: Tide) -> None:
            for number in range(1, RESTARTS + 1):
                tide.rise(number / (RESTARTS + 1))
                for service in services:
                    await service.systemctl("restart")
                    await service.ready()
                await settled(streams)

        await carry(lab, 256 * MIB, restart)
        assert [service.relay for service in services] == relays
        for service in services:
            assert len(service.machine.journal("EVENT=left to the relay")) == RESTARTS
            assert service.machine.show("NRestarts") == "0", "systemd saw no crash"


async def test_a_stop_drains() -> None:
    async with laboratory() as (lab, services), connected(lab) as ends:
        for service in services:
            await service.stop_in_order()
            await service.shows("StatusText", "1 migration running, 0 B/s, draining: no new one is taken")
        await carries(ends)
        await services[0].kill(RELAY)
        await carries(ends)
        lab.vmi.end(failed=False)
        for service in services:
            for unit in ("migproxy", RELAY):
                await service.shows("ActiveState", "inactive", unit)
                assert service.machine.show("Result", unit) == "success"
        for service in services:
            await service.start()


async def test_a_hanging_daemon_is_replaced_and_its_connections_go_on() -> None:
    async with laboratory() as (lab, services), connected(lab) as ends:
        for service in services:
            await service.systemctl("kill", "--signal", "STOP")
        await carries(ends)
        for service in services:
            await service.shows("NRestarts", "1")
            await service.ready()
            assert "Failed with result 'watchdog'" in service.machine.run("journalctl", "--unit", "migproxy")
        await carries(ends)
