"""What a pump counts, and how the next one goes on where it was killed: to the byte, at whatever step."""

from __future__ import annotations

import errno
import fcntl
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migproxy.splice import Pipe, Splice
from migproxy.tally import BROKEN, CLEAN, FILLED, MOVED, RUNNING, Tallies, Tally

pytestmark = pytest.mark.tier("gate")


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.lists(st.integers(1, 1 << 20), max_size=4)), max_size=6))
def test_a_pump_killed_between_any_two_steps_is_gone_on_with_to_the_byte(rounds: list[tuple[int, list[int]]]) -> None:
    """Plays the steps of `Splice._move`: fill, count, move a part, count, and recovers after each."""
    words, filled, moved = [0, 0], 0, 0

    def kill() -> None:
        tally = Tally()
        tally.words[FILLED], tally.words[MOVED] = words
        tally.recover(filled - moved)
        assert (tally.words[FILLED], tally.words[MOVED]) == (filled, moved)

    kill()
    for size, parts in rounds:
        filled += size
        kill()
        words[0] = filled
        kill()
        while moved < filled:
            moved += min(parts.pop() if parts else size, filled - moved)
            kill()
            words[1] = moved
            kill()


def test_tallies_that_no_pump_has_counted_are_refused() -> None:
    tally = Tally()
    tally.words[FILLED] = 1
    with pytest.raises(ValueError, match="Q"):
        tally.recover(2)


def test_both_directions_are_read_where_another_has_mapped_them() -> None:
    made = Tallies()
    other = Tallies(os.dup(made.fd))
    made.to_network.moved, made.to_launcher.moved, made.to_launcher.end = 5, 1 << 63, BROKEN + 7
    assert (other.to_network.moved, other.to_launcher.moved) == (5, 1 << 63)
    assert (other.to_network.end, other.to_launcher.end) == (RUNNING, BROKEN + 7)
    made.close()
    other.close()
    assert other.to_network.moved == 5


@pytest.mark.parametrize(
    ("size", "seals", "why"),
    [
        (64, 0, "its size can change"),
        (64, fcntl.F_SEAL_SHRINK, "its size can change"),
        (64, fcntl.F_SEAL_GROW, "its size can change"),
        (63, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, "not a file of the right size"),
        (4096, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, "not a file of the right size"),
        (0, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, "not a file of the right size"),
    ],
)
def test_memory_that_could_end_this_process_is_refused(size: int, seals: int, why: str) -> None:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(ValueError, match=why):
        Tallies(fd)
    os.close(fd)


@pytest.mark.parametrize("number", [0, errno.ECONNRESET, errno.EBADMSG])
def test_a_pump_goes_on_with_the_error_that_an_earlier_one_found_and_moves_nothing(number: int) -> None:
    tally = Tally()
    tally.end = BROKEN + number
    (near, source), (target, far) = socket.socketpair(), socket.socketpair()
    pump = Splice(source, target, tally, Pipe())
    near.sendall(b"x")
    pump.run()
    assert pump.error
    assert pump.error.errno == (number or errno.EIO)
    assert tally.end == BROKEN + (number or errno.EIO)
    assert far.recv(1) == b""
    assert tally.moved == 0
    pump.close()
    for sock in (near, source, target, far):
        sock.close()


def test_a_pump_that_was_killed_after_its_end_ends_again() -> None:
    tally = Tally()
    (near, source), (target, far) = socket.socketpair(), socket.socketpair()
    near.sendall(b"all")
    near.close()
    for _ in range(2):
        pump = Splice(source, target, tally, Pipe())
        pump.run()
        pump.close()
        assert (pump.error, tally.end, tally.moved) == (None, CLEAN, 3)
    assert far.recv(9) == b"all"
    assert far.recv(9) == b""
    for sock in (source, target, far):
        sock.close()
