"""The state file and the descriptors' names: whatever happens to the file, descriptors are never paired wrongly."""

import asyncio
import builtins
import json
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from migproxy import state as states
from migproxy import survival
from migproxy.fdstore import Store
from migproxy.liveness import Liveness
from migproxy.notify import Notifier
from migproxy.plan import Migration, Role
from migproxy.portmap import Channel
from migproxy.state import ChannelState, ProxyState, RelayState, State, StateError, UnknownVersion
from migproxy.takeover import StateKeeper

pytestmark = pytest.mark.tier("gate")

MIGRATIONS = [Migration("default", f"vm{number}", f"vmi-{number}", f"uid-{number}") for number in range(3)]


class Crash(BaseException):
    """The process was killed."""


def a_state(*, sent: int = 1, boot: str | None = None) -> State:
    """A state with three migrations, of which each has a relay that the holder need not have."""
    return State(
        boot=boot or states.boot_id(),
        proxies=tuple(
            ProxyState(
                namespace=one.namespace,
                name=one.name,
                vmi_uid=one.vmi_uid,
                migration_uid=one.migration_uid,
                role=Role.SOURCE,
                began=1.5,
                channels={"direct": ChannelState(connections=2, sent=sent, received=7)},
                relays={f"relay-{one.name}": RelayState(channel="direct", sent=sent)},
            )
            for one in MIGRATIONS
        ),
        ended=frozenset({"over"}),
    )


@pytest.mark.parametrize("turns", range(6))
async def test_what_keeps_the_file_ends_when_it_is_told_to_even_while_something_changes(
    tmp_path: Path, turns: int
) -> None:
    store = Store(None)
    keeper = StateKeeper(str(tmp_path / "state.json"), store, list, Liveness())
    keeping = asyncio.create_task(keeper.run())
    while not store.changed._waiters:
        await asyncio.sleep(0.001)
    store.changed.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    keeping.cancel()
    await asyncio.wait([keeping], timeout=5)
    assert keeping.cancelled()


# The file


class Machine:
    """The system calls of `state.save`, one of which the process does not survive.

    Args:
        last: Its number, from 0.
        done: How much of that call happens: nothing, all, or so many bytes of a write.
    """

    def __init__(self, last: int, done: int | bool) -> None:
        self.calls: list[str] = []
        self._last, self._done, self._dead = last, done, False

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            if self._dead:  # a dead process runs no `finally`
                raise Crash
            self.calls.append(name)
            if len(self.calls) - 1 < self._last:
                return call(*arguments, **options)
            self._dead = True
            if self._done is True:
                call(*arguments, **options)
            elif name == "write" and self._done:
                call(arguments[0], bytes(arguments[1])[: self._done])
            raise Crash

        return instead


CALLS = ("open", "write", "fsync", "fdatasync", "ftruncate", "close", "rename", "replace", "link", "unlink")


def save_and_crash(path: Path, state: State, last: int, done: int | bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Saves a state, and is killed at one of its system calls; returns those that were begun."""
    machine = Machine(last, done)
    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, machine.wrap(name, getattr(os, name)))
        patch.setattr(builtins, "open", lambda *_, **__: pytest.fail("a write that this test does not know"))
        with suppress(Crash):
            states.save(str(path), state)
    return machine.calls


def moments(path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int | bool]]:
    """Every moment at which the process may be killed: before, in and after each system call of a save."""
    calls = save_and_crash(path, state, 1000, True, monkeypatch)
    assert {"open", "write"} < set(calls)
    for number, name in enumerate(calls):
        yield number, False
        if name == "write":
            size = len(state.model_dump_json())
            yield from ((number, count) for count in (1, 2, size // 3, size // 2, size - 1))
        yield number, True


def test_a_save_that_is_killed_leaves_the_state_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before, after = tmp_path / "state.json", a_state(sent=1), a_state(sent=2)
    seen = set()
    for number, done in moments(tmp_path / "other.json", after, monkeypatch):
        states.save(str(path), before)
        save_and_crash(path, after, number, done, monkeypatch)
        found = states.load(str(path))
        assert found in (before, after), f"killed at call {number}, of which {done} was done"
        seen.add(found == after)
        states.save(str(path), after)  # whatever lies about does not disturb the next one
        assert states.load(str(path)) == after
    assert seen == {True, False}


def test_a_first_save_that_is_killed_leaves_nothing_or_the_new_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count, (number, done) in enumerate(moments(tmp_path / "other.json", a_state(), monkeypatch)):
        path = tmp_path / f"{count}.json"
        save_and_crash(path, a_state(), number, done, monkeypatch)
        assert states.load(str(path)) in (None, a_state())


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "state.json", a_state().model_dump_json().encode()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StateError, match=r"state\.json"):
            states.load(str(path))
    path.write_bytes(whole)
    assert states.load(str(path)) == a_state()


def test_garbage_is_refused_and_never_raises_anything_else(tmp_path: Path) -> None:
    path, whole, chance = tmp_path / "state.json", a_state().model_dump_json().encode(), random.Random(1)
    for _ in range(500):
        torn = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            torn[chance.randrange(len(torn))] = chance.randrange(256)
        path.write_bytes(torn)
        with suppress(StateError):
            found = states.load(str(path))
            assert found is None or isinstance(found, State)
    for text in (b"null", b"[]", b"{}", b'"state"', b"\0" * 100, b"[" * 100_000, b'{"version": 1}'):
        path.write_bytes(text)
        with pytest.raises(StateError, match=r"state\.json"):
            states.load(str(path))


@pytest.mark.parametrize(
    ("was", "becomes"),
    [('"role":"source"', '"role":"sourve"'), ('{"direct":', '{"dirext":'), ('"direct",', '"dirext",')],
)
def test_a_name_that_is_none_is_refused(tmp_path: Path, was: str, becomes: str) -> None:
    path, whole = tmp_path / "state.json", a_state().model_dump_json()
    assert was in whole
    path.write_text(whole.replace(was, becomes))
    with pytest.raises(StateError, match=r"none of .*, .*"):
        states.load(str(path))


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_version_is_refused_as_such(tmp_path: Path, version: int) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps({"version": version, "what": "nobody knows yet"}))
    with pytest.raises(UnknownVersion, match=f"version {version}"):
        states.load(str(path))


def test_a_file_that_an_earlier_release_wrote_means_what_it_meant(tmp_path: Path) -> None:
    """It is never to be changed: a daemon of any later release of this version takes over from 0.1.0."""
    path = tmp_path / "state.json"
    path.write_text(WRITTEN_BY_0_1_0.replace("BOOT", states.boot_id()))
    relay = RelayState(channel="direct", sent=3, received=4, wire_sent=5, wire_received=6, resumable=False)
    channel = ChannelState(
        connections=2,
        failures={"reset": 1},
        sent=7,
        received=8,
        spliced=(9, 10),
        modes={"spliced": 11},
        retransmits=12,
    )
    proxy = ProxyState(
        namespace="default",
        name="vm1",
        vmi_uid="vmi-1",
        migration_uid="uid-1",
        role="target",
        began=1.5,
        channels={"libvirt": channel},
        relays={"lease": relay},
    )
    assert states.load(str(path)) == State(boot=states.boot_id(), proxies=(proxy,), ended=frozenset({"over"}))
    name = survival.parse_name("migproxy1.connection.target.direct.0123456789abcdef.0000-0001")
    assert name == survival.Name(survival.Kind.CONNECTION, Role.TARGET, Channel.DIRECT, "0123456789abcdef", "0000-0001")
    assert survival.fingerprint(Migration("default", "vm1", "vmi-1", "uid-1")) == "402c2344ce16b4c68165a40cb1cab26b"


WRITTEN_BY_0_1_0 = (
    '{"version":1,"boot":"BOOT","proxies":[{"namespace":"default","name":"vm1","vmi_uid":"vmi-1",'
    '"migration_uid":"uid-1","role":"target","began":1.5,"channels":{"libvirt":{"connections":2,'
    '"failures":{"reset":1},"sent":7,"received":8,"spliced":[9,10],"modes":{"spliced":11},"retransmits":12}},'
    '"relays":{"lease":{"channel":"direct","sent":3,"received":4,"wire_sent":5,"wire_received":6,'
    '"resumable":false}}}],"ended":["over"]}'
)


def test_another_boots_state_and_none_are_none(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert states.load(str(path)) is None
    states.save(str(path), a_state(boot="another"))
    assert states.load(str(path)) is None


def test_a_folder_in_its_place_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=str(tmp_path)):
        states.load(str(tmp_path))


# Pairing


class Wires:
    """Relays as the holder has them, and which descriptors belong together."""

    def __init__(self) -> None:
        self.stored: dict[str, list[int]] = {}
        self.belongs: dict[str, list[int]] = {}
        self._peers: list[socket.socket] = []
        self._spare: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> "Wires":
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (*self._peers, self._listener):
            sock.close()
        for fd in self._spare:
            os.close(fd)

    def relay(self, migration: Migration, role: Role = Role.SOURCE, channel: Channel = Channel.DIRECT) -> str:
        """Adds a relay, with the end of each pipe that is stored; returns its name."""
        ours, theirs = socket.socketpair()
        near = socket.create_connection(self._listener.getsockname())
        far, _ = self._listener.accept()
        self._peers += [theirs, far]
        network, launcher = os.pipe(), os.pipe()
        self._spare += [network[1], launcher[0]]
        name = survival.connection_name(role, channel, migration)
        self._add(name, [ours.detach(), near.detach(), network[0], launcher[1]])
        return name

    def listener(self, migration: Migration, role: Role = Role.TARGET, channel: Channel = Channel.DIRECT) -> str:
        """Adds a listener; returns its name."""
        fd = socket.create_server(("127.0.0.1", 0)).detach()
        name = survival.listener_name(role, channel, migration, (0, os.fstat(fd).st_ino))
        self._add(name, [fd])
        return name

    def _add(self, name: str, fds: list[int]) -> None:
        self.stored[name] = fds
        self.belongs[name] = [os.fstat(fd).st_ino for fd in fds]


@pytest.fixture
def wires() -> Iterator[Wires]:
    with Wires() as made:
        yield made


def sort(wires: Wires, state: State | None) -> tuple[dict[survival.Key, survival.Estate], set[str]]:
    """Sorts what is stored; also returns the names that the store is told to remove."""
    heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with heard, tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/notify"
        heard.bind(path)
        heard.setblocking(False)
        store = Store(Notifier(path))
        estates = survival.sort(wires.stored, state, store)
        removed = set()
        with suppress(BlockingIOError):
            while message := heard.recv(4096).decode():
                first, name = message.splitlines()
                assert first == "FDSTOREREMOVE=1"
                removed.add(name.removeprefix("FDNAME="))
        store.close()
    return estates, removed


def assert_paired_by_names(wires: Wires, state: State | None) -> set[str]:
    """What comes back belongs together as its name says; returns the names that were removed."""
    estates, removed = sort(wires, state)
    found = {}
    for (migration, role), estate in estates.items():
        for connection in estate.connections:
            assert (connection.name.migration, connection.name.role) == (migration, role)
            assert connection.unix
            assert connection.tcp
            assert connection.pipes
            fds = [connection.unix.fileno(), connection.tcp.fileno(), *connection.pipes]
            found[str(connection.name)] = [os.fstat(fd).st_ino for fd in fds]
            connection.close()
        for listener in estate.listeners:
            found[str(listener.name)] = [os.fstat(listener.socket.fileno()).st_ino]
            listener.close()
    assert found == {name: fds for name, fds in wires.belongs.items() if name not in removed}
    return removed


@pytest.mark.parametrize("seed", range(10))
def test_descriptors_are_paired_by_their_names_in_whatever_order_they_come(wires: Wires, seed: int) -> None:
    chance = random.Random(seed)
    for migration in MIGRATIONS:
        wires.listener(migration)
        for channel in Channel:
            for role in Role:
                wires.relay(migration, role, channel)
                wires.relay(migration, role, channel)
    for fds in wires.stored.values():
        chance.shuffle(fds)
    names = list(wires.stored)
    chance.shuffle(names)
    wires.stored = {name: wires.stored[name] for name in names}
    assert assert_paired_by_names(wires, a_state()) == set()


def test_a_lost_torn_or_old_state_pairs_nothing_differently(tmp_path: Path) -> None:
    path, whole = tmp_path / "state.json", a_state().model_dump_json().encode()
    for length in (*range(0, len(whole), 41), len(whole)):
        path.write_bytes(whole[:length])
        try:
            state = states.load(str(path))
        except StateError:
            state = None
        with Wires() as wires:
            for migration in MIGRATIONS:
                wires.relay(migration)
                wires.listener(migration)
            assert assert_paired_by_names(wires, state) == set()


def test_relays_that_only_the_state_knows_make_no_connections(wires: Wires) -> None:
    estates, _ = sort(wires, a_state())
    assert [estate.connections for estate in estates.values()] == [[], [], []]


def test_relays_that_only_the_holder_has_are_taken(wires: Wires) -> None:
    stranger = Migration("default", "stranger", "vmi-9", "uid-9")
    wires.relay(stranger)
    assert assert_paired_by_names(wires, a_state()) == set()


def test_what_was_stored_twice_is_taken_once(wires: Wires) -> None:
    name = wires.relay(MIGRATIONS[0])
    wires.stored[name] += [os.dup(fd) for fd in wires.stored[name]]
    before = len(os.listdir("/proc/self/fd"))
    assert_paired_by_names(wires, None)
    assert len(os.listdir("/proc/self/fd")) == before - 8


def test_what_ended_and_strangers_are_closed_and_dropped(wires: Wires) -> None:
    over = wires.relay(MIGRATIONS[0])
    wires.relay(MIGRATIONS[1])
    wires.stored["stored"] = [os.open("/dev/null", os.O_RDONLY)]
    before = len(os.listdir("/proc/self/fd"))
    state = a_state().model_copy(update={"ended": frozenset({over})})
    assert assert_paired_by_names(wires, state) == {over, "stored"}
    assert len(os.listdir("/proc/self/fd")) == before - 4 - 4 - 1


def test_names_of_another_version_are_refused_and_nothing_is_closed(wires: Wires) -> None:
    name = wires.relay(MIGRATIONS[0])
    fds = wires.stored.pop(name)
    wires.stored[name.replace(f"migproxy{states.VERSION}.", f"migproxy{states.VERSION + 1}.", 1)] = fds
    with pytest.raises(UnknownVersion):
        sort(wires, None)
    for fd in fds:
        os.fstat(fd)
    survival.close(fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_what_an_ended_connection_has_yet_to_deliver_is_delivered() -> None:
    name = survival.connection_name(Role.SOURCE, Channel.DIRECT, Migration("default", "vm", "uid", "migration"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += near.send(bytes(1 << 16))
    near.shutdown(socket.SHUT_WR)
    survival.sort({name: [near.detach()]}, State(boot="this", ended=frozenset([name])), Store(None))
    with far:
        far.settimeout(20)
        received = 0
        while part := far.recv(1 << 20):
            received += len(part)
    assert received == sent
