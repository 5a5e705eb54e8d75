"""What counts as hanging, and what the service manager hears of it."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from migproxy.health import Activity
from migproxy.liveness import DISK_SECONDS, PUMP_SECONDS, Liveness, Reading, Stalls, read
from migproxy.notify import Notifier
from migproxy.service import Service, status_text
from migproxy.splice import Pipe, Pump, Splice
from migproxy.tally import Tally

pytestmark = pytest.mark.tier("gate")

MIB = 1 << 20


class Idle(Pump):
    """A pump that nobody runs."""

    def _move(self) -> None:
        raise AssertionError


@pytest.fixture
def ends() -> Iterator[list[socket.socket]]:
    """Two connections: the launcher's end, a pump's source, a pump's target, the reader's end."""
    with ExitStack() as stack:
        yield [stack.enter_context(end) for pair in (socket.socketpair(), socket.socketpair()) for end in pair]


@pytest.mark.parametrize(
    ("readings", "wedged"),
    [
        pytest.param([(0, 5, True), (PUMP_SECONDS, 5, True)], True, id="could move all the time and moved nothing"),
        pytest.param([(0, 5, True), (PUMP_SECONDS - 1, 5, True)], False, id="not for long enough"),
        pytest.param([(0, 5, True), (9, 6, True), (PUMP_SECONDS, 6, True)], False, id="moved in between"),
        pytest.param([(0, 5, True), (5, 5, False), (PUMP_SECONDS, 5, True)], False, id="had nothing to do in between"),
        pytest.param([(0, 5, False), (600, 5, False)], False, id="idle, or its reader is slow"),
        pytest.param(
            [(0, 5, True), (9, 6, True), (9 + PUMP_SECONDS, 6, True)], True, id="moved once, and then no more"
        ),
        pytest.param([(0, 5, True), (PUMP_SECONDS, 5, True), (60, 6, True)], False, id="goes on after all"),
    ],
)
def test_a_pump_is_wedged(readings: list[tuple[float, int, bool]], *, wedged: bool) -> None:
    stalls = Stalls()
    found: set[object] = set()
    for now, moved, can_move in readings:
        found = stalls.note({"pump": Reading(moved, can_move)}, now)
    assert found == ({"pump"} if wedged else set())


def test_a_pump_that_has_ended_is_forgotten() -> None:
    stalls = Stalls()
    stalls.note({"pump": Reading(5, True)}, 0)
    stalls.note({}, 1)
    assert stalls.note({"pump": Reading(5, True)}, PUMP_SECONDS) == set()


def test_what_a_pump_can_move(ends: list[socket.socket]) -> None:
    near, source, target, far = ends
    pump = Idle(source, target, Tally())
    assert not read(pump).can_move, "nothing has arrived"
    near.send(b"x")
    assert read(pump).can_move
    target.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            target.send(bytes(MIB))
    assert not read(pump).can_move, "its reader takes nothing"
    far.close()
    assert read(pump).can_move, "it has an error to notice"


def test_bytes_in_the_pipe_are_to_be_moved_too(ends: list[socket.socket]) -> None:
    pump = Splice(ends[1], ends[2], Tally(), Pipe())
    assert not read(pump).can_move
    os.write(pump.pipe.writer, b"x")
    assert read(pump).can_move
    pump.close()


def test_a_disk_that_hangs_starves_the_watchdog_and_is_named(manager: socket.socket) -> None:
    now = 1000.0
    hanging = Liveness(lambda: now)
    notifier = Notifier(str(manager.getsockname()), watchdog=20)
    service = Service(notifier, hanging, lambda: Activity(1, 0, 0.0))
    try:
        with hanging.writing("/run/migproxy/kubevirt-ca.crt"):
            service.look()
            assert "WATCHDOG=1" in heard(manager)
            now += DISK_SECONDS
            service.look()
            (problem,) = hanging.problems
            assert problem.startswith("the disk hangs: /run/migproxy/kubevirt-ca.crt ")
            said = heard(manager)
            assert not [line for line in said if line.startswith("WATCHDOG")]
            assert f"STATUS=hangs: {problem}" in said
        service.look()
        assert hanging.problems == []
        assert "WATCHDOG=1" in heard(manager)
    finally:
        notifier.close()


@pytest.mark.parametrize(
    ("activity", "text"),
    [
        (Activity(0, 0, 0.0), "no migration is running"),
        (Activity(1, 0, 0.0), "1 migration running, 0 B/s"),
        (Activity(3, 2, 1.5 * 1024**3), "3 migrations running, 1.5 GiB/s, 2 prepared"),
        (Activity(1, 0, 1024.0, draining=True), "1 migration running, 1.0 KiB/s, draining: no new one is taken"),
        (Activity(0, 0, 0.0, problem="address: none"), "no migration is running, not ready: address: none"),
    ],
)
def test_the_status_text(activity: Activity, text: str) -> None:
    assert status_text(activity) == text


@pytest.mark.parametrize("draining", [True, False])  # or waiting for what cannot be handed over
def test_a_daemon_that_ends_asks_for_as_long_as_it_takes(manager: socket.socket, draining: bool) -> None:
    notifier = Notifier(str(manager.getsockname()))
    service = Service(notifier, Liveness(), lambda: Activity(1, 0, 0.0, draining=draining))
    service.stopping()
    assert heard(manager) == ["STOPPING=1"]
    service.look()
    notifier.close()
    (asked,) = (line for line in heard(manager) if line.startswith("EXTEND_TIMEOUT_USEC="))
    assert int(asked.partition("=")[2]) > 2_000_000


def test_readiness_is_said_until_the_end_so_that_a_busy_manager_hears_it(manager: socket.socket) -> None:
    notifier = Notifier(str(manager.getsockname()))
    service = Service(notifier, Liveness(), lambda: Activity(0, 0, 0.0))
    service.look()
    assert "READY=1" not in heard(manager)
    service.ready()
    assert heard(manager) == ["READY=1"]
    service.look()
    assert "READY=1" in heard(manager)
    service.stopping()
    assert heard(manager) == ["STOPPING=1"]
    service.look()
    assert "READY=1" not in heard(manager)
    notifier.close()


@pytest.fixture
def manager(tmp_path: os.PathLike[str]) -> Iterator[socket.socket]:
    """What hears a Notifier."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{tmp_path}/notify")
        sock.settimeout(10)
        yield sock


def heard(manager: socket.socket) -> list[str]:
    return manager.recv(1 << 16).decode().splitlines()
