"""What becomes of a connection that a dead daemon left, from what the holder has of it."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from migproxy import survival
from migproxy.fdstore import Lease, Store
from migproxy.plan import Role
from migproxy.portmap import Channel
from migproxy.state import RelayState
from migproxy.survival import Connection, Fate, Kind, Name

pytestmark = pytest.mark.tier("gate")

UNIX, TCP, TO_NETWORK, TO_LAUNCHER = "unix", "tcp", "to_network", "to_launcher"
PIPES = {TO_NETWORK, TO_LAUNCHER}
BOTH = {UNIX, TCP}


class Left:
    """Makes connections as they are found."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def connection(self, role: Role, parts: set[str], *, relayed: bool) -> Connection:
        """A connection of which the holder has these parts.

        Args:
            relayed: whether its accepted socket is blocking, as it is from the first byte on.
        """
        made = Connection(Name(Kind.CONNECTION, role, Channel.DIRECT, "migration", "serial"), Lease(""))
        for part in BOTH & parts:
            family = socket.AF_UNIX if part == UNIX else socket.AF_INET
            sock = self._stack.enter_context(socket.socket(family))
            sock.setblocking(relayed)
            setattr(made, part, sock)
        for part in PIPES & parts:
            reader, writer = os.pipe()
            self._stack.callback(os.close, reader)
            self._stack.callback(os.close, writer)
            setattr(made, part, writer if part == TO_LAUNCHER else reader)
        return made


@pytest.fixture
def left() -> Iterator[Left]:
    with ExitStack() as stack:
        yield Left(stack)


@pytest.mark.parametrize(
    ("role", "parts", "relayed", "encrypts", "fate"),
    [
        (Role.SOURCE, BOTH | PIPES, True, False, Fate.RELAY),
        (Role.TARGET, BOTH | PIPES, True, True, Fate.RELAY),
        (Role.SOURCE, BOTH | PIPES, False, False, Fate.RELAY),
        # Nothing was relayed: the rest can be done anew.
        (Role.SOURCE, {UNIX}, False, False, Fate.SET_UP),
        (Role.SOURCE, {UNIX}, False, True, Fate.SET_UP),
        (Role.SOURCE, BOTH, False, True, Fate.SET_UP),
        (Role.TARGET, {TCP}, False, False, Fate.SET_UP),
        (Role.TARGET, BOTH, False, False, Fate.SET_UP),
        # A handshake that was begun cannot be gone on with, and the source dials anew.
        (Role.TARGET, {TCP}, False, True, Fate.ABANDON),
        (Role.TARGET, BOTH, False, True, Fate.ABANDON),
        # What KubeVirt wants is not known yet: then, it is decided.
        (Role.SOURCE, {UNIX}, False, None, Fate.SET_UP),
        (Role.TARGET, {TCP}, False, None, Fate.SET_UP),
        (Role.TARGET, BOTH | PIPES, True, None, Fate.RELAY),
        # Bytes may be in a pipe that nobody has.
        (Role.SOURCE, BOTH, True, False, Fate.LOSE),
        (Role.TARGET, BOTH, True, False, Fate.LOSE),
        (Role.SOURCE, BOTH | {TO_NETWORK}, True, False, Fate.LOSE),
        (Role.SOURCE, BOTH | {TO_LAUNCHER}, False, False, Fate.LOSE),
        (Role.SOURCE, {TCP} | PIPES, True, False, Fate.LOSE),
        (Role.TARGET, {UNIX} | PIPES, True, False, Fate.LOSE),
        (Role.SOURCE, {TCP}, False, False, Fate.LOSE),
    ],
)
def test_the_fate_of_what_is_left(
    left: Left, role: Role, parts: set[str], relayed: bool, encrypts: bool | None, fate: Fate
) -> None:
    assert left.connection(role, parts, relayed=relayed).fate(None, encrypts=encrypts) is fate


def test_what_cannot_be_resumed_is_lost_whatever_the_holder_has(left: Left) -> None:
    whole = left.connection(Role.SOURCE, BOTH | PIPES, relayed=True)
    assert whole.fate(RelayState(channel="direct"), encrypts=False) is Fate.RELAY
    assert whole.fate(RelayState(channel="direct", resumable=False), encrypts=False) is Fate.LOSE


def test_two_different_pipes_of_a_kind_are_never_chosen_from(left: Left) -> None:
    name = Name(Kind.CONNECTION, Role.SOURCE, Channel.DIRECT, "migration", "serial")
    (reader, writer), (other, rest) = os.pipe(), os.pipe()
    lease = Lease("", None, [reader, other])
    made = survival._connection(name, [reader, other], lease)
    assert made.is_ambiguous
    assert made.fate(None, encrypts=False) is Fate.LOSE
    assert lease.fds == [reader]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(other)
    made.close()
    os.close(writer)
    os.close(rest)


def test_a_listener_that_was_shut_down_is_not_taken_over() -> None:
    name = str(Name(Kind.LISTENER, Role.TARGET, Channel.DIRECT, "migration", "1-2"))
    with socket.create_server(("127.0.0.1", 0)) as alive, socket.create_server(("127.0.0.1", 0)) as dead:
        dead.shutdown(socket.SHUT_RDWR)
        for listener, taken in ((alive, 1), (dead, 0)):
            (estate,) = survival.sort({name: [os.dup(listener.fileno())]}, None, Store(None)).values()
            assert len(estate.listeners) == taken
            for one in estate.listeners:
                one.close()
