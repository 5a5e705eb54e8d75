"""A real relay, and whoever may speak with it: what it moves, refuses, keeps, gives back, and how it ends."""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from migproxy import output
from migproxy.fds import close_all
from migproxy.relay.process import Relay, RelayError
from migproxy.relay.protocol import (
    MOST_BYTES,
    VERSION,
    Drop,
    Ended,
    Ending,
    FromDaemon,
    FromRelay,
    Hello,
    Keep,
    Kept,
    Leave,
    Move,
    Note,
    Noted,
    Refused,
    Sync,
    Way,
    Welcome,
    encode,
)
from migproxy.tally import BROKEN, Tallies
from tests.relays import (
    DEADLINE,
    Heard,
    RelayProcess,
    Speaker,
    Wire,
    read,
    relay_process,
    relay_thread,
    until,
)

pytestmark = pytest.mark.tier("gate")

MIB = 1 << 20
RESET = b"\1\0\0\0\0\0\0\0"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "relay.sock")


@pytest.fixture
def relay(path: str) -> Iterator[Relay]:
    with relay_thread(path) as made:
        yield made


@pytest.fixture
def daemon(relay: Relay, path: str) -> Iterator[Speaker]:
    with Speaker(path) as made:
        made.greet()
        yield made


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire() as made:
        yield made


@pytest.fixture
def process(path: str) -> Iterator[RelayProcess]:
    with relay_process(path) as made:
        yield made


def refusals(messages: list[FromRelay]) -> list[str]:
    return [message.why for message in messages if isinstance(message, Refused)]


def end_of(speaker: Speaker) -> Ended:
    """The next end of a connection."""
    while True:
        message, _ = speaker.hear()
        if isinstance(message, Ended):
            return message


# Moving


def test_bytes_cross_both_ways_and_are_counted(daemon: Speaker, wire: Wire) -> None:
    daemon.move("one", wire)
    wire.check(5_000_000)
    for sock in (wire.launcher, wire.far):
        sock.shutdown(socket.SHUT_WR)
    assert end_of(daemon) == Ended("one")
    assert wire.moved == (5_000_000, 5_000_000)


def test_one_direction_ends_and_the_other_goes_on(daemon: Speaker, wire: Wire) -> None:
    daemon.move("one", wire)
    wire.far.sendall(b"last words")
    wire.far.shutdown(socket.SHUT_WR)
    assert read(wire.launcher) == b"last words"
    wire.launcher.sendall(b"answer")
    assert read(wire.far, 6) == b"answer"
    wire.launcher.shutdown(socket.SHUT_WR)
    assert read(wire.far) == b""
    assert end_of(daemon) == Ended("one")


def test_a_reset_is_told_with_its_number_and_the_launcher_sees_an_end(daemon: Speaker, wire: Wire) -> None:
    daemon.move("one", wire)
    wire.far.sendall(b"arrived")
    assert read(wire.launcher, 7) == b"arrived"
    wire.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    wire.far.close()
    end = end_of(daemon)
    assert (end.name, end.number, end.reason) == ("one", errno.ECONNRESET, "")
    assert end.error
    assert read(wire.launcher) == b""


def test_what_is_dropped_is_broken_and_shows_no_end_of_stream(daemon: Speaker, wire: Wire) -> None:
    daemon.move("one", wire)
    wire.check()
    daemon.say(Drop(("one",)))
    daemon.sync()
    with pytest.raises(ConnectionResetError):
        read(wire.far)
    assert read(wire.launcher) == b""


def test_bytes_that_a_dead_relay_had_in_its_pipe_come_first(daemon: Speaker, wire: Wire) -> None:
    os.write(wire.pipes[0].writer, b"in the pipe, ")
    wire.launcher.sendall(b"and behind it")
    daemon.move("one", wire)
    assert read(wire.far, 26) == b"in the pipe, and behind it"


# Refusing


def test_another_version_is_told_what_to_do(relay: Relay, path: str) -> None:
    with Speaker(path) as speaker:
        speaker.say(Hello(VERSION + 1, "9.9"))
        (why,) = refusals(speaker.rest())
    assert f"9.9) speaks version {VERSION + 1}" in why
    assert "restart the relay" in why


def test_a_second_daemon_is_refused_while_the_first_lives_and_welcome_then(
    daemon: Speaker, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        with Speaker(path) as second:
            second.say(Hello(VERSION, "second"))
            (why,) = refusals(second.rest())
            assert f"another daemon is here, process {os.getpid()}" in why
    output.lines.flush()
    assert capfd.readouterr().err.count("another daemon is here") == 1, "which is logged once, however often it tries"
    assert daemon.sync() == []
    daemon.close()
    with Speaker(path) as third:
        (welcome,) = third.greet()
        assert isinstance(welcome[0], Welcome)


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (encode(Sync(1)), "Hello comes first"),
        (encode(Note("name", "words")), "Hello comes first"),
        (b"rubbish", "not JSON"),
        (b"x" * (MOST_BYTES + 100), "are allowed"),
    ],
)
def test_a_stranger_who_does_not_greet_is_refused(daemon: Speaker, path: str, packet: bytes, why: str) -> None:
    with Speaker(path) as stranger:
        stranger.say_raw(packet)
        (refused,) = refusals(stranger.rest())
    assert why in refused
    assert daemon.sync() == []


def test_hello_comes_once_and_what_was_handed_over_stays(daemon: Speaker, path: str, wire: Wire) -> None:
    daemon.move("one", wire)
    daemon.say(Hello(VERSION, "again"))
    assert refusals(daemon.rest()) == ["Hello comes once"]
    wire.check()
    with Speaker(path) as again:
        heard = again.greet()
        assert [message for message, _ in heard[1:]] == [Kept("one", Way.SPLICED)]
        close_all(heard[1][1])


def test_many_strangers_who_say_nothing_keep_nobody_out(daemon: Speaker, path: str) -> None:
    daemon.close()
    with ExitStack() as stack:
        strangers = [stack.enter_context(Speaker(path)) for _ in range(20)]
        last = stack.enter_context(Speaker(path))
        assert isinstance(last.greet()[0][0], Welcome)
        assert strangers[0].rest() == []  # hung up


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_refused_even_where_the_socket_lets_it_in(relay: Relay, path: str) -> None:
    for folder in Path(path).parents:
        with suppress(OSError):
            folder.chmod(folder.stat().st_mode | 0o011)
    os.chmod(path, 0o666)
    program = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534);"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); print(s.recv(9999).decode())"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert "user 65534 is neither root nor this relay's" in done.stdout, done.stderr


def test_the_socket_is_for_its_user_alone(relay: Relay, path: str) -> None:
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (0, "the launcher's socket is no socket"),
        (1, "the other node's socket is no socket"),
        (2, "a pipe's end is of another kind"),
        (3, "a pipe's end is of another kind"),
        (4, "a pipe's end is of another kind"),
        (5, "a pipe's end is of another kind"),
        (6, "not a file of the right size"),
    ],
)
def test_a_descriptor_of_another_kind_is_refused_and_closed(daemon: Speaker, wire: Wire, part: int, why: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with open("/dev/null", "rb") as null:
        fds = list(wire.fds)
        fds[part] = null.fileno()
        daemon.say(Move("one", Way.SPLICED), *fds)
        (refused,) = daemon.sync()
    assert isinstance(refused, Refused)
    assert refused.name == "one"
    assert why in refused.why
    assert len(os.listdir("/proc/self/fd")) == before
    daemon.move("one", wire)
    wire.check()


@pytest.mark.parametrize(("one", "other"), [(0, 1), (2, 3), (4, 5)])
def test_descriptors_in_another_order_are_refused(daemon: Speaker, wire: Wire, one: int, other: int) -> None:
    fds = list(wire.fds)
    fds[one], fds[other] = fds[other], fds[one]
    daemon.say(Move("one", Way.SPLICED), *fds)
    assert "of another kind" in refusals(daemon.sync())[0]
    daemon.move("one", wire)
    wire.check()


def test_a_datagram_socket_is_refused(daemon: Speaker, wire: Wire) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        daemon.say(Move("one", Way.SPLICED), sock.fileno(), *wire.fds[1:])
        assert "of another kind" in refusals(daemon.sync())[0]


def test_memory_whose_size_can_change_is_refused(daemon: Speaker, wire: Wire) -> None:
    memory = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, os.fstat(wire.tallies.fd).st_size)
    daemon.say(Move("one", Way.SPLICED), *wire.fds[:6], memory)
    assert "its size can change" in refusals(daemon.sync())[0]
    os.close(memory)


@pytest.mark.parametrize("held", [b"", b"more than was ever counted"])
def test_tallies_that_no_pump_has_counted_are_refused_and_nothing_is_closed_twice(
    daemon: Speaker, wire: Wire, held: bytes
) -> None:
    wire.tallies.to_network.words[1] = 1  # filled: one byte
    os.write(wire.pipes[0].writer, held)
    before = len(os.listdir("/proc/self/fd"))
    daemon.move("one", wire)
    if held:
        assert "it cannot be moved" in refusals(daemon.sync())[0]
        assert len(os.listdir("/proc/self/fd")) == before
    else:
        assert daemon.sync() == []
    wire.launcher.sendall(b"x")  # its own descriptors still work
    wire.unix.getpeername()


@pytest.mark.parametrize("count", [0, 1, 6, 8, 16])
def test_a_wrong_number_of_descriptors_is_not_understood(daemon: Speaker, path: str, wire: Wire, count: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    daemon.say(Move("one", Way.SPLICED), *(wire.fds * 3)[:count])
    assert f"move came with {count} descriptors" in refusals(daemon.rest())[0]
    daemon.close()
    with Speaker(path) as again:
        assert len(again.greet()) == 1
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_name_has_one_connection_however_often_it_is_moved(daemon: Speaker, wire: Wire) -> None:
    daemon.move("one", wire)
    daemon.move("one", wire)
    daemon.say(Keep("one"), 0)
    assert refusals(daemon.sync()) == ["it is moved already"] * 2
    wire.check(3_000_000)
    for sock in (wire.launcher, wire.far):
        sock.shutdown(socket.SHUT_WR)
    assert end_of(daemon) == Ended("one")
    assert wire.moved == (3_000_000, 3_000_000)  # at the end: a pump counts a moment after it has delivered
    daemon.move("one", wire)  # it is still there until it is dropped
    assert refusals(daemon.sync()) == ["it is moved already"]


def test_what_is_kept_can_be_replaced_and_then_moved(daemon: Speaker, path: str, wire: Wire) -> None:
    before = len(os.listdir("/proc/self/fd"))
    daemon.say(Keep("one"), wire.unix.fileno())
    daemon.say(Keep("one"), wire.unix.fileno(), wire.tcp.fileno())
    daemon.sync()
    assert len(os.listdir("/proc/self/fd")) == before + 2
    daemon.move("one", wire)
    wire.check()
    daemon.close()
    with Speaker(path) as successor:
        _, (kept, fds) = successor.greet()
        assert (kept, len(fds)) == (Kept("one", Way.SPLICED), 7)
        close_all(fds)


def test_a_full_relay_says_so_and_goes_on(path: str) -> None:
    with relay_process(path, files=256) as process, ExitStack() as stack:
        daemon = stack.enter_context(Speaker(path))
        ((welcome, _),) = daemon.greet()
        assert isinstance(welcome, Welcome)
        wires = [stack.enter_context(Wire()) for _ in range(40)]
        for number, wire in enumerate(wires):
            daemon.move(str(number), wire)
        full = refusals(daemon.sync())
        fit = len(wires) - len(full)
        assert set(full) == {f"the relay is full ({welcome.limit} descriptors): raise its limit of open files"}
        assert 15 <= fit < 40
        assert process.descriptors() < 256 - 16, "there is room for what a message brings"
        for wire in wires[:fit]:
            wire.check(1000)
        daemon.say(Drop(("0",)))
        daemon.sync()

        def fits() -> bool:
            daemon.move("another", wires[-1])
            return not refusals(daemon.sync())

        until(fits, "room")


# A daemon that comes and goes


def test_a_successor_gets_everything(daemon: Speaker, path: str) -> None:
    with Wire() as moving, Wire() as clean, Wire() as broken, socket.create_server(("127.0.0.1", 0)) as listener:
        daemon.say(Keep("listener"), listener.fileno())
        daemon.say(Note("state", '{"é": "\\u0000"}'))
        daemon.say(Note("gone", "words"))
        for name, wire in (("moving", moving), ("clean", clean), ("broken", broken)):
            daemon.move(name, wire)
            wire.check(1000)
        daemon.say(Drop(("gone",)))
        daemon.sync()
        daemon.close()
        for sock in (clean.launcher, clean.far):  # while nobody listens
            sock.shutdown(socket.SHUT_WR)
        assert read(clean.launcher) == read(clean.far) == b""
        broken.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        broken.far.close()
        assert read(broken.launcher) == b""
        for _ in range(2):  # as often as a daemon comes
            found = greet_until(path, lambda found: ends_of(found).keys() >= {"clean", "broken"})
            messages = [message for message, _ in found]
            assert [one for one in messages if isinstance(one, Noted)] == [Noted("state", '{"é": "\\u0000"}')]
            kept = {one.name: (one.way, fds) for one, fds in found if isinstance(one, Kept)}
            assert {name: (way, len(fds)) for name, (way, fds) in kept.items()} == {
                "listener": (None, 1),
                "moving": (Way.SPLICED, 7),
                "clean": (Way.SPLICED, 1),
                "broken": (Way.SPLICED, 1),
            }
            ends = ends_of(found)
            assert (ends["clean"].number, ends["broken"].number) == (0, errno.ECONNRESET)
            tallies = Tallies(kept["broken"][1][0])
            assert (tallies.to_network.moved, tallies.to_launcher.moved) == (1000, 1000)
            assert tallies.to_launcher.end == BROKEN + errno.ECONNRESET
            for _, fds in found:
                close_all(fds)
            moving.check(1000)


def ends_of(found: list[tuple[FromRelay, list[int]]]) -> dict[str, Ended]:
    return {one.name: one for one, _ in found if isinstance(one, Ended)}


def greet_until(path: str, wanted: Callable[[list[Heard]], bool]) -> list[Heard]:
    """Greets as another daemon again and again, until it is told what is wanted."""
    while True:
        with Speaker(path) as speaker:
            found = speaker.greet()
        if wanted(found):
            return found
        for _, fds in found:
            close_all(fds)


def test_words_and_names_go_in_one_instant(daemon: Speaker, path: str, wire: Wire) -> None:
    daemon.say(Keep("one"), wire.unix.fileno())
    daemon.say(Note("state", "before"))
    daemon.say(Note("state", "after", ("one",)))
    daemon.sync()
    daemon.close()
    with Speaker(path) as successor:
        assert [message for message, _ in successor.greet()[1:]] == [Noted("state", "after")]


def test_a_connection_that_ends_while_everything_is_told_is_told_as_ended(daemon: Speaker, path: str) -> None:
    """The successor reads late: what it hears of a name before Synced(0) fits what comes with it."""
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire()) for _ in range(60)]
        for number, wire in enumerate(wires):
            daemon.move(str(number), wire)
            daemon.say(Note(f"note {number}", "w" * 20_000))
        daemon.sync()
        daemon.close()
        successor = stack.enter_context(Speaker(path))
        successor.say(Hello(VERSION, "late"))
        successor.socket.recv(0, socket.MSG_PEEK)  # it has begun, and cannot go on
        for wire in wires:
            for sock in (wire.launcher, wire.far):
                sock.shutdown(socket.SHUT_WR)
            assert read(wire.launcher) == read(wire.far) == b""
        with Speaker(path) as other:  # it has got on with everything else meanwhile
            other.say(Hello(VERSION, "other"))
            other.rest()
        found = successor._until(0)
        kept = {one.name: len(fds) for one, fds in found if isinstance(one, Kept)}
        ended = ends_of(found).keys()
        assert len(kept) == 60
        assert {name: 1 if name in ended else 7 for name in kept} == kept
        assert ended
        for _, fds in found:
            close_all(fds)


def test_the_last_words_of_a_daemon_that_died_with_something_unread_count(daemon: Speaker, path: str) -> None:
    """The kernel tells of such a death before it hands out what was said."""
    for attempt in range(20):
        with Wire() as wire:
            daemon.say(Sync(1))  # the answer is never read
            daemon.move(f"moved {attempt}", wire)
            daemon.say(Sync(2))
            daemon.say(Note("words", f"last of {attempt}"))
            daemon.close()
            wire.let_go()
            wire.check(1000)
            daemon = Speaker(path)
            found = daemon.greet()
            assert Noted("words", f"last of {attempt}") in [message for message, _ in found]
            for _, fds in found:
                close_all(fds)
    daemon.close()


def test_a_daemon_that_reads_nothing_harms_no_connection(
    daemon: Speaker, path: str, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migproxy.relay.process._MOST_UNSENT", 1000)
    daemon.move("one", wire)
    daemon.say(Note("words", "are kept"))
    with suppress(BrokenPipeError, ConnectionResetError):
        for number in range(1, 10_000):
            daemon.say(Sync(number))
    wire.check(1_000_000)
    with Speaker(path) as successor:
        found = successor.greet()
        assert [message for message, _ in found[1:]] == [Noted("words", "are kept"), Kept("one", Way.SPLICED)]
        close_all(found[2][1])
    wire.check(1_000_000)


def test_nothing_is_left_open(path: str) -> None:
    with relay_process(path) as process:
        with Speaker(path) as daemon:
            daemon.greet()
            before = process.descriptors()
            for number in range(50):
                with Wire() as wire:
                    name = str(number)
                    daemon.say(Keep(name), wire.unix.fileno())
                    daemon.move(name, wire)
                    wire.check(1000)
                    if number % 3 == 0:
                        wire.launcher.close()
                        wire.far.close()
                        assert end_of(daemon).name == name
                    elif number % 3 == 1:
                        wire.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                        wire.far.close()
                        assert end_of(daemon).number
                    daemon.say(Drop((name,)))
                    daemon.sync()  # else the wire may end first, and the relay says so
            until(lambda: process.descriptors() == before, "descriptors to be closed")
        until(lambda: process.descriptors() == before - 1, "the daemon's to be closed")


# Its own life


def test_told_to_end_it_goes_on_until_it_moves_nothing_and_nobody_needs_it(process: RelayProcess, path: str) -> None:
    with Speaker(path) as daemon, Wire() as wire:
        daemon.greet()
        daemon.move("one", wire)
        process.tell_to_end()
        assert daemon.hear()[0] == Ending()
        wire.check()
        for sock in (wire.launcher, wire.far):
            sock.shutdown(socket.SHUT_WR)
        assert end_of(daemon) == Ended("one")
        assert daemon.sync() == []  # it moves nothing, and the daemon has not let it go
        daemon.say(Leave())
        assert daemon.rest() == []
    assert process.ended() == 0
    assert not os.path.exists(path)


def test_told_to_end_it_goes_once_its_daemon_is_gone_and_the_next_one_hears_of_it(
    process: RelayProcess, path: str
) -> None:
    with Wire() as wire:
        with Speaker(path) as daemon:
            daemon.greet()
            daemon.move("one", wire)
            process.tell_to_end()
            assert daemon.hear()[0] == Ending()
        with Speaker(path) as successor:
            for _, fds in successor.greet():
                close_all(fds)
            assert successor.hear()[0] == Ending()
        wire.check()
        assert process.process.poll() is None
        wire.launcher.close()
        wire.far.close()
        assert process.ended() == 0


def test_while_it_ends_it_asks_its_manager_for_as_long_as_it_takes(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE)
        with relay_process(path) as process, Speaker(path) as daemon:
            assert manager.recv(100) == b"READY=1"
            daemon.greet()
            process.tell_to_end()
            assert daemon.hear()[0] == Ending()
            assert manager.recv(100) == b"EXTEND_TIMEOUT_USEC=30000000"


def test_leave_before_it_is_told_to_end_lets_it_go_at_once(process: RelayProcess, path: str) -> None:
    with Speaker(path) as daemon:
        daemon.greet()
        daemon.say(Leave())
        daemon.sync()
        process.tell_to_end()
        assert daemon.rest() == [Ending()]
    assert process.ended() == 0


def test_told_a_second_time_it_goes_at_once_and_the_next_relay_goes_on(process: RelayProcess, path: str) -> None:
    with Wire() as wire, ExitStack() as stack:
        daemon = stack.enter_context(Speaker(path))
        daemon.greet()
        daemon.move("one", wire)
        wire.check()
        wire.launcher.sendall(b"on its way")
        process.tell_to_end()
        assert daemon.hear()[0] == Ending()
        process.tell_to_end()
        assert daemon.rest() == []
        assert process.ended() == 0
        stack.enter_context(relay_process(path))
        again = stack.enter_context(Speaker(path))
        again.greet()
        again.move("one", wire)
        assert read(wire.far, 10) == b"on its way"
        wire.check()


def test_killed_it_is_replaced_in_the_middle_of_a_transfer_to_the_byte(path: str) -> None:
    there, back = (random.Random(seed).randbytes(30_000_000) for seed in (1, 2))
    with Wire() as wire:
        got: dict[str, bytes] = {}
        threads = [
            threading.Thread(target=wire.launcher.sendall, args=(there,)),
            threading.Thread(target=wire.far.sendall, args=(back,)),
            threading.Thread(target=lambda: got.update(there=read(wire.far, len(there)))),
            threading.Thread(target=lambda: got.update(back=read(wire.launcher, len(back)))),
        ]
        for thread in threads:
            thread.start()
        kills = 0
        while any(thread.is_alive() for thread in threads):
            with relay_process(path), Speaker(path) as daemon:
                daemon.greet()
                before = sum(wire.moved)
                daemon.move("one", wire)
                until(
                    lambda before=before: (
                        sum(wire.moved) - before > 5_000_000  # type: ignore[misc]
                        or not any(thread.is_alive() for thread in threads)
                    ),
                    "bytes",
                )
                kills += 1
        for thread in threads:
            thread.join()
        assert (got["there"], got["back"]) == (there, back)
        assert kills > 1
        with relay_process(path), Speaker(path) as daemon:  # what was moved last may not have been counted
            daemon.greet()
            daemon.move("one", wire)
            daemon.sync()
            assert wire.moved == (len(there), len(back))
            wire.launcher.close()
            wire.far.close()
            end_of(daemon)


def test_both_dead_nobody_takes_it_for_an_end_of_stream(path: str) -> None:
    with Wire() as wire, relay_process(path) as process:
        with Speaker(path) as daemon:
            daemon.greet()
            daemon.move("one", wire)
            wire.check()
        wire.let_go()
        process.kill()
        with pytest.raises(ConnectionResetError):
            read(wire.far)


def test_a_detached_one_ends_with_a_daemon_that_leaves_nothing(path: str) -> None:
    with relay_process(path, "--detached") as process:
        with Speaker(path) as daemon:
            daemon.greet()
            daemon.say(Keep("one"), 0)
            daemon.say(Drop(("one",)))
        assert process.ended() == 0
    assert not os.path.exists(path)


@pytest.mark.parametrize("moves", [True, False])
def test_a_detached_one_waits_for_the_next_daemon_as_long_as_it_has_something(
    path: str, monkeypatch: pytest.MonkeyPatch, *, moves: bool
) -> None:
    now = 1000.0
    monkeypatch.setattr("migproxy.relay.process.time.monotonic", lambda: now)
    relay = Relay(path, is_detached=True)
    try:
        assert not relay._is_over(), "its first daemon is on its way"
        now += 61
        assert relay._is_over(), "it has never come"
        relay._had_daemon = True
        assert relay._is_over()
        relay._alone_since = now
        if moves:
            assert relay._is_over(), "it has nothing"
        relay._notes["state"] = "words"
        assert not relay._is_over()
        now += 59
        assert not relay._is_over()
        now += 2
        assert relay._is_over()
    finally:
        relay._close()


def test_a_second_relay_says_that_one_is_there_and_leaves_it_alone(daemon: Speaker, path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RelayError, match="another relay is there"):
        Relay(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert daemon.sync() == []


def test_a_socket_that_a_dead_relay_left_is_replaced(path: str) -> None:
    with relay_process(path) as process:
        process.kill()
        assert os.path.exists(path)
    with relay_process(path), Speaker(path) as daemon:
        daemon.greet()


def test_a_place_where_no_socket_can_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RelayError, match=r"file/relay\.sock: "):
        Relay(str(tmp_path / "file" / "relay.sock"))
    with pytest.raises(RelayError, match="too long"):
        Relay(f"{tmp_path}/{'x' * 120}")


def test_of_relays_that_start_at_once_one_is_there(path: str) -> None:
    for _ in range(3):
        racing = [RelayProcess(path) for _ in range(4)]
        try:
            until(lambda: sum(one.process.poll() is None for one in racing) == 1, "all but one to give up")  # noqa: B023
            (left,) = (one for one in racing if one.process.poll() is None)
            left.wait_until_it_answers()
            assert {one.process.returncode for one in racing if one is not left} == {1}
            with Speaker(path) as daemon:
                ((welcome, _),) = daemon.greet()
                assert isinstance(welcome, Welcome)
                assert welcome.pid == left.pid
        finally:
            for one in racing:
                one.kill()


# Rubbish


class Fuzz:
    """Says rubbish of every kind to a relay, as strangers and as its daemon."""

    def __init__(self, path: str, seed: int) -> None:
        self._path = path
        self._chance = random.Random(seed)
        self._null = os.open("/dev/null", os.O_RDONLY)
        self._pipe = os.pipe()
        self._sock = socket.socketpair()

    def run(self, packets: int) -> None:
        while packets > 0:
            with Speaker(self._path) as speaker:
                speaker.socket.settimeout(None)
                speaker.socket.setblocking(False)
                with suppress(BrokenPipeError, ConnectionResetError):
                    if self._chance.random() < 0.9:
                        speaker.say(Hello(VERSION, "fuzz"))
                    for _ in range(self._chance.randrange(1, 200)):
                        packets -= 1
                        self._one(speaker)

    def _one(self, speaker: Speaker) -> None:
        chance = self._chance
        fds = [
            chance.choice([self._null, *self._pipe, self._sock[0].fileno(), self._sock[1].fileno()])
            for _ in range(chance.choice((0, 0, 0, 1, 2, 7, 16)))
        ]
        messages: list[FromDaemon] = [
            Keep("k" + str(chance.randrange(5))),
            Move("m" + str(chance.randrange(5)), chance.choice([*Way])),
            Note("n" + str(chance.randrange(5)), "w" * chance.randrange(100), ("k1",)),
            Drop(("k2", "m1", "n3", "unknown")),
            Sync(chance.randrange(9)),
        ]
        message = chance.choice(messages)
        packet = bytearray(encode(message))
        kind = chance.random()
        if kind < 0.02:
            del packet[chance.randrange(len(packet)) :]
        elif kind < 0.04:
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        elif kind < 0.05:
            packet = bytearray(chance.randbytes(chance.randrange(1, 300)))
        elif kind < 0.98:
            fds = fds[:2] if isinstance(message, Keep) and fds else (fds[:7] if isinstance(message, Move) else [])
        while True:
            try:
                speaker.say_raw(bytes(packet) or b" ", *fds)
            except BlockingIOError:
                with suppress(BlockingIOError, EOFError):
                    while True:
                        _, got = speaker.hear()
                        close_all(got)
            else:
                return

    def close(self) -> None:
        close_all([self._null, *self._pipe])
        for sock in self._sock:
            sock.close()


@pytest.mark.parametrize(
    "packets", [10_000, pytest.param(1_000_000, marks=[pytest.mark.tier("soak"), pytest.mark.patience(3600)])]
)
def test_rubbish_ends_nothing(path: str, packets: int) -> None:
    with relay_process(path) as process, Wire() as wire:
        with Speaker(path) as daemon:
            daemon.greet()
            before = process.descriptors()
            daemon.move("one", wire)
            daemon.sync()
        stop = threading.Event()

        def go_on() -> None:
            while not stop.is_set():
                wire.check(50_000)

        moving = threading.Thread(target=go_on)
        moving.start()
        fuzz = Fuzz(path, packets)
        try:
            fuzz.run(packets)
        finally:
            stop.set()
            moving.join()
            fuzz.close()
        assert process.process.poll() is None
        wire.check()
        found = greet_until(path, lambda _: True)
        kept = {one.name: fds for one, fds in found if isinstance(one, Kept)}
        assert len(kept["one"]) == 7
        for _, fds in found:
            close_all(fds)
        with Speaker(path) as daemon:
            for _, fds in daemon.greet():
                close_all(fds)
            daemon.say(Drop((*kept, *(f"n{number}" for number in range(5)))))
            daemon.sync()
            until(lambda: process.descriptors() == before, "descriptors to be closed")


# What it costs


def test_it_is_small(path: str) -> None:
    with relay_process(path) as process, Speaker(path) as daemon, ExitStack() as stack:
        daemon.greet()
        idle = process.resident()
        assert idle <= 30 * MIB, f"{idle / MIB:.1f} MiB"
        for number in range(100):
            wire = stack.enter_context(Wire())
            daemon.move(str(number), wire)
            wire.check(1000)
        busy = process.resident()
        assert busy <= 60 * MIB, f"{busy / MIB:.1f} MiB"
        for number in range(100):
            daemon.say(Drop((str(number),)))
        daemon.sync()


def test_it_imports_little(path: str) -> None:
    program = (
        "import sys, threading, signal, os; from migproxy.relay import process;"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start();"
        f"assert process.main([{path!r}]) == 0;"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    loaded = set(done.stdout.split())
    assert "migproxy.relay.process" in loaded, done.stderr
    heavy = ("pydantic", "aiohttp", "pyroute2", "kubernetes_asyncio", "asyncio", "ssl", "structlog", "cryptography")
    assert loaded.isdisjoint(heavy)


def test_it_ends_with_a_core_where_a_pump_hangs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next relay goes on with everything, instead of a connection that nobody moves."""
    aborted = threading.Event()
    monkeypatch.setattr("os.abort", aborted.set)
    monkeypatch.setattr("migproxy.relay.process._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("migproxy.liveness.PUMP_SECONDS", 0.1)
    free = threading.Event()
    monkeypatch.setattr("migproxy.splice.Splice._move", lambda _: free.wait())
    with relay_thread(path), Speaker(path) as daemon, Wire() as wire:
        daemon.greet()
        daemon.move("one", wire)
        daemon.sync()
        assert not aborted.wait(0.3), "it has nothing to do"
        wire.launcher.sendall(b"x")
        assert aborted.wait(DEADLINE)
        free.set()
