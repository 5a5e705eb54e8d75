"""What a dead daemon left at the relay: paired by names, whatever else is lost, and what becomes of each connection."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from migproxy import survival
from migproxy.plan import Migration, Role
from migproxy.portmap import Channel
from migproxy.relay.client import Contents, Lease, Left, RelayClient
from migproxy.relay.protocol import Way
from migproxy.state import ProxyState
from migproxy.survival import Fate, Kind, LeftConnection, Name
from tests.relays import Wire

pytestmark = pytest.mark.tier("gate")

MIGRATIONS = [Migration("default", f"vm{number}", f"vmi-{number}", f"uid-{number}") for number in range(3)]
NAME = Name(Kind.CONNECTION, Role.SOURCE, Channel.DIRECT, "migration", "serial")


@pytest.fixture
def relay() -> Iterator[RelayClient]:
    """One that is not there: what is dropped is forgotten."""
    made = RelayClient("/nonexistent")
    yield made
    made.close()


@pytest.fixture
def wires() -> Iterator[list[Wire]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Wire()) for _ in range(12)]


def words(migration: Migration, role: Role = Role.SOURCE) -> str:
    return ProxyState(
        namespace=migration.namespace,
        name=migration.name,
        vmi_uid=migration.vmi_uid,
        migration_uid=migration.migration_uid,
        role=role,
        began=1.5,
    ).model_dump_json()


@pytest.mark.parametrize(
    ("role", "dialled", "encrypts", "fate"),
    [
        (Role.SOURCE, False, False, Fate.SET_UP),
        (Role.SOURCE, False, True, Fate.SET_UP),
        (Role.SOURCE, True, True, Fate.SET_UP),
        (Role.SOURCE, False, None, Fate.SET_UP),
        (Role.TARGET, False, False, Fate.SET_UP),
        (Role.TARGET, True, False, Fate.SET_UP),
        # What KubeVirt wants is not known yet: then, it is decided.
        (Role.TARGET, False, None, Fate.SET_UP),
        (Role.TARGET, True, None, Fate.SET_UP),
        # A handshake that was begun cannot be gone on with.
        (Role.TARGET, False, True, Fate.ABANDON),
        (Role.TARGET, True, True, Fate.ABANDON),
    ],
)
def test_the_fate_of_what_was_being_set_up(
    relay: RelayClient, role: Role, *, dialled: bool, encrypts: bool | None, fate: Fate
) -> None:
    with Wire() as wire:
        accepted, other = (wire.unix, wire.tcp) if role is Role.SOURCE else (wire.tcp, wire.unix)
        name = Name(Kind.CONNECTION, role, Channel.DIRECT, "migration", "serial")
        left = LeftConnection(name, Lease(str(name), relay), accepted, other if dialled else None)
        assert left.fate(encrypts=encrypts, announced=False) is fate


@pytest.mark.parametrize(
    ("encrypts", "connected", "fate"),
    [
        # The source has not said its last word, or nobody knows: it goes another way, or is told that this one is cut.
        (False, None, Fate.ABANDON),
        (True, None, Fate.ABANDON),
        (None, None, Fate.SET_UP),
        # The launcher is dialled behind the source's last word, and nothing is read beyond that.
        (False, True, Fate.RELAY),
        (False, False, Fate.ABANDON),
        (True, True, Fate.ABANDON),
    ],
)
def test_the_fate_of_what_came_to_an_announced_target(
    relay: RelayClient, *, encrypts: bool | None, connected: bool | None, fate: Fate
) -> None:
    name = Name(Kind.CONNECTION, Role.TARGET, Channel.DIRECT, "migration", "serial")
    with Wire() as wire, socket.socket(socket.AF_UNIX) as unconnected:
        dialled = None if connected is None else wire.unix if connected else unconnected
        left = LeftConnection(name, Lease(str(name), relay), wire.tcp, dialled)
        assert left.fate(encrypts=encrypts, announced=True) is fate


def test_an_encrypted_connection_that_was_ready_is_relayed(relay: RelayClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survival, "offloaded", lambda _: (True, True))
    name = Name(Kind.CONNECTION, Role.TARGET, Channel.DIRECT, "migration", "serial")
    with Wire() as wire, socket.socket(socket.AF_UNIX) as unconnected:
        for encrypts in (True, None):
            left = LeftConnection(name, Lease("", relay), wire.tcp, wire.unix)
            assert left.fate(encrypts=encrypts, announced=False) is Fate.RELAY
        assert (
            LeftConnection(name, Lease("", relay), wire.tcp, unconnected).fate(encrypts=True, announced=False)
            is Fate.ABANDON
        )
        assert LeftConnection(name, Lease("", relay), wire.tcp).fate(encrypts=True, announced=False) is Fate.ABANDON


@pytest.mark.parametrize("seed", range(5))
async def test_what_belongs_together_is_found_by_names_in_whatever_order_it_comes(
    relay: RelayClient, wires: list[Wire], seed: int
) -> None:
    kept: dict[str, Left] = {}
    belongs: dict[str, list[int]] = {}
    spare = iter(wires)
    for migration in MIGRATIONS:
        for role in Role:
            moved = survival.connection_name(role, Channel.DIRECT, migration)
            begun = survival.connection_name(role, Channel.LIBVIRT, migration)
            wire = next(spare)
            kept[moved] = Left([os.dup(fd) for fd in wire.fds], Way.SPLICED)
            kept[begun] = Left([os.dup(fd) for fd in next(spare).fds[:2]])
            belongs |= {name: [os.fstat(fd).st_ino for fd in kept[name].fds] for name in (moved, begun)}
    names = list(kept)
    random.Random(seed).shuffle(names)
    notes = {survival.state_name(Role.SOURCE, one): words(one) for one in MIGRATIONS[:2]}
    found = survival.sort(Contents({name: kept[name] for name in names}, notes), relay)
    again: dict[str, list[int]] = {}
    for (migration_key, role), one in found.items():
        assert (one.state is not None) == (
            role is Role.SOURCE and migration_key in {survival.fingerprint(known) for known in MIGRATIONS[:2]}
        )
        for relayed in one.relayed:
            assert (relayed.name.migration, relayed.name.role) == (migration_key, role)
            again[str(relayed.name)] = [os.fstat(fd).st_ino for fd in relayed.left.fds]
            for fd in relayed.left.fds:
                os.close(fd)
        for connection in one.connections:
            assert (connection.name.migration, connection.name.role) == (migration_key, role)
            assert connection.dialled
            legs = (connection.accepted, connection.dialled)
            again[str(connection.name)] = [os.fstat(leg.fileno()).st_ino for leg in legs]
            connection.close()
    assert again == belongs


async def test_connections_come_back_in_the_order_in_which_they_began(relay: RelayClient, wires: list[Wire]) -> None:
    names = [survival.connection_name(Role.SOURCE, Channel.DIRECT, MIGRATIONS[0]) for _ in wires]
    kept = {name: Left([os.dup(wire.unix.fileno())]) for name, wire in zip(names, wires, strict=True)}
    (found,) = survival.sort(Contents(dict(reversed(kept.items()))), relay).values()
    assert [str(one.name) for one in found.connections] == names
    for one in found.connections:
        one.close()


async def test_what_is_of_no_use_is_closed_and_dropped(relay: RelayClient) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = {
        "migproxy0.connection.source.direct.x.y": Left([os.dup(0)]),
        "a stranger's": Left([os.dup(0), os.dup(1)]),
    }
    damaged = survival.state_name(Role.SOURCE, MIGRATIONS[0])
    assert survival.sort(Contents(kept, {"words": "of a stranger", damaged: "{"}), relay) == {}
    assert len(os.listdir("/proc/self/fd")) == before
    assert (relay._leases, relay._notes) == ({}, {})


async def test_a_listener_that_was_shut_down_is_not_taken_over(relay: RelayClient) -> None:
    name = survival.listener_name(Role.TARGET, Channel.DIRECT, MIGRATIONS[0], (0x1F, 0xABC))
    with socket.create_server(("127.0.0.1", 0)) as alive, socket.create_server(("127.0.0.1", 0)) as dead:
        dead.shutdown(socket.SHUT_RDWR)
        for listener, taken in ((alive, 1), (dead, 0)):
            (found,) = survival.sort(Contents({name: Left([os.dup(listener.fileno())])}), relay).values()
            assert [one.identity for one in found.listeners] == [(0x1F, 0xABC)] * taken
            for one in found.listeners:
                one.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "migproxy1",
        "migproxy1.state.source.x",
        "migproxy1.connection.source.dirext.x.y",
        "migproxy1.a.source.direct.x.y",
    ],
)
def test_a_name_that_is_none(text: str) -> None:
    assert survival.parse_name(text) is None


def test_a_name_is_read_as_it_was_written() -> None:
    assert survival.parse_name(str(NAME)) == NAME
