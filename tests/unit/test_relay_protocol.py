"""What daemon and relay say to each other: what one encodes the other reads, and rubbish is refused with a reason."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migproxy.relay import protocol
from migproxy.relay.protocol import (
    MOST_BYTES,
    MOST_FDS,
    MOST_NAMES,
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
    ProtocolError,
    Refused,
    Sync,
    Synced,
    Way,
    Welcome,
    encode,
    for_daemon,
    for_relay,
)

pytestmark = pytest.mark.tier("gate")

NUMBERS = st.integers(0, (1 << 63) - 1)
TEXTS = st.text(st.characters(), max_size=200)  # surrogates too
NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=200)
VALUES = {
    "int": NUMBERS,
    "str": TEXTS,
    "tuple[str, ...]": st.lists(NAMES, max_size=5).map(tuple),
    "Way": st.sampled_from(Way),
    "Way | None": st.none() | st.sampled_from(Way),
}
FROM_DAEMON: dict[type[FromDaemon], int] = {Hello: 0, Keep: 2, Move: 7, Note: 0, Drop: 0, Sync: 0, Leave: 0}
FROM_RELAY: dict[type[FromRelay], int] = {Welcome: 0, Refused: 0, Kept: 7, Noted: 0, Synced: 0, Ended: 0, Ending: 0}
"""How many descriptors come with each."""


def messages(kind: type[Any]) -> st.SearchStrategy[Any]:
    values = {one.name: NAMES if one.name in ("name", "program") else VALUES[str(one.type)] for one in fields(kind)}
    return st.builds(kind, **values)


@given(st.one_of([messages(kind) for kind in FROM_DAEMON]))
def test_what_a_daemon_says_arrives(message: FromDaemon) -> None:
    is_tunnel = isinstance(message, Move) and message.way is Way.TLS
    assert for_relay(encode(message), 4 if is_tunnel else FROM_DAEMON[type(message)]) == message


@given(st.one_of([messages(kind) for kind in FROM_RELAY]))
def test_what_a_relay_says_arrives(message: FromRelay) -> None:
    assert for_daemon(encode(message), FROM_RELAY[type(message)]) == message


def test_every_message_is_known_to_these_tests() -> None:
    assert set(protocol._TO_RELAY.values()) == FROM_DAEMON.keys()
    assert set(protocol._TO_DAEMON.values()) == FROM_RELAY.keys()


@pytest.mark.parametrize("kind", [*FROM_DAEMON, *FROM_RELAY])
def test_a_message_has_a_direction(kind: type[Any]) -> None:
    """And none has both: whoever speaks with itself is told so."""
    label = kind.__name__.lower()
    packet = json.dumps({"is": label, **dict.fromkeys([one.name for one in fields(kind)])}).encode()
    other = for_daemon if kind in FROM_DAEMON else for_relay
    with pytest.raises(ProtocolError, match="nobody here knows"):
        other(packet, 0)


@pytest.mark.parametrize(
    ("message", "allowed"),
    [
        (Keep("n"), {1, 2}),
        (Move("n", Way.KTLS), {7}),
        (Move("n", Way.SPLICED), {7}),
        (Move("n", Way.TLS), {4}),
        (Kept("n"), set(range(1, 8))),
        (Hello(1, "p"), {0}),
        (Note("n", "w"), {0}),
        (Drop(("n",)), {0}),
        (Sync(1), {0}),
        (Leave(), {0}),
        (Welcome(1, "p", 2, 3), {0}),
        (Refused("w"), {0}),
        (Noted("n", "w"), {0}),
        (Synced(0), {0}),
        (Ended("n"), {0}),
        (Ending(), {0}),
    ],
)
def test_descriptors_that_do_not_belong_to_a_message_are_refused(message: Any, allowed: set[int]) -> None:
    read = for_relay if type(message) in FROM_DAEMON else for_daemon
    for count in range(MOST_FDS + 1):
        if count in allowed:
            assert read(encode(message), count) == message
        else:
            with pytest.raises(ProtocolError, match=f"came with {count} descriptors"):
                read(encode(message), count)


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b'{"is":"sync","number":' + b"9" * 5000 + b"}", "not JSON"),
        (b"null", "no JSON object"),
        (b"[]", "no JSON object"),
        (b'"hello"', "no JSON object"),
        (b"{}", "nobody here knows"),
        (b'{"is":null}', "nobody here knows"),
        (b'{"is":["sync"],"number":1}', "nobody here knows"),
        (b'{"is":"Sync","number":1}', "nobody here knows"),
        (b'{"is":"sync"}', "sync lacks a field"),
        (b'{"is":"hello","version":1}', "hello lacks a field"),
        (b'{"is":"sync","number":"1"}', "number is no number"),
        (b'{"is":"sync","number":true}', "number is no number"),
        (b'{"is":"sync","number":1.0}', "number is no number"),
        (b'{"is":"sync","number":NaN}', "number is no number"),
        (b'{"is":"sync","number":-1}', "number is no number"),
        (b'{"is":"sync","number":9223372036854775808}', "number is no number"),
        (b'{"is":"sync","number":null}', "number is no number"),
        (b'{"is":"hello","version":1,"program":2}', "program is no text"),
        (b'{"is":"hello","version":1,"program":"a\\nb"}', "program is no name"),
        (b'{"is":"hello","version":1,"program":"' + b"x" * 201 + b'"}', "program is no name"),
        (b'{"is":"note","name":"","words":[]}', "words is no text"),
        (b'{"is":"note","name":"a\\u0000b","words":""}', "name is no name"),
        (b'{"is":"note","name":"\\ud800","words":""}', "name is no name"),
        (b'{"is":"note","name":"' + b"x" * 201 + b'","words":""}', "name is no name"),
        (b'{"is":"note","name":"n","words":"","drops":"abc"}', "drops is no list"),
        (b'{"is":"note","name":"n","words":"","drops":{"a":1}}', "drops is no list"),
        (b'{"is":"note","name":"n","words":"' + "é".encode() * 30_000 + b'"}', "words is no text of a reasonable"),
        (b'{"is":"drop","names":null}', "names is no list"),
        (b'{"is":"drop","names":[1]}', "name is no text"),
        (b'{"is":"drop","names":["a\\tb"]}', "name is no name"),
        (
            b'{"is":"drop","names":[' + b",".join([b'"n"'] * (MOST_NAMES + 1)) + b"]}",
            "names is no list of a reasonable",
        ),
    ],
)
def test_rubbish_is_refused(packet: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        for_relay(packet, 0)


@pytest.mark.parametrize("way", ["null", "1", '"copied"', "[]", '["spliced"]', "{}", '""'])
def test_a_way_that_nobody_knows_is_refused(way: str) -> None:
    with pytest.raises(ProtocolError, match="no way to move a connection"):
        for_relay(f'{{"is":"move","name":"n","way":{way}}}'.encode(), 7)
    if way != "null":
        with pytest.raises(ProtocolError, match="no way to move a connection"):
            for_daemon(f'{{"is":"kept","name":"n","way":{way}}}'.encode(), 7)


@given(st.binary(max_size=300), st.integers(0, MOST_FDS))
def test_bytes_are_a_message_or_are_refused(packet: bytes, fds: int) -> None:
    for read in (for_relay, for_daemon):
        with pytest.raises(ProtocolError, match=r"."):
            read(packet, fds)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["spliced", "n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_json_in_a_field_is_read_or_refused(data: st.DataObject) -> None:
    everything: list[type[Any]] = [*FROM_DAEMON, *FROM_RELAY]
    kind = data.draw(st.sampled_from(everything))
    read, fds = (for_relay, FROM_DAEMON[kind]) if kind in FROM_DAEMON else (for_daemon, FROM_RELAY[kind])
    values = {one.name: data.draw(JSON) for one in fields(kind)}
    with suppress(ProtocolError):
        message = read(json.dumps({"is": kind.__name__.lower(), **values}).encode(), fds)
        assert read(encode(message), fds) == message


def test_what_a_later_version_adds_is_not_looked_at() -> None:
    assert for_relay(b'{"is":"sync","number":3,"why":{"deep":[1]},"is_urgent":true}', 0) == Sync(3)
    assert for_daemon(b'{"is":"ending","by":"systemd"}', 0) == Ending()


def test_what_may_be_left_out_has_a_value() -> None:
    assert for_relay(b'{"is":"note","name":"n","words":"w"}', 0) == Note("n", "w", ())
    assert for_daemon(b'{"is":"kept","name":"n"}', 1) == Kept("n", None)
    assert for_daemon(b'{"is":"ended","name":"n"}', 0) == Ended("n", 0, "", "")


def test_a_packet_that_is_too_long_is_refused_by_both() -> None:
    packet = b'{"is":"leave"}'
    assert for_relay(packet.ljust(MOST_BYTES), 0) == Leave()
    with pytest.raises(ProtocolError, match=f"{MOST_BYTES} are allowed"):
        for_relay(packet.ljust(MOST_BYTES + 1), 0)
    with pytest.raises(ProtocolError, match=f"{MOST_BYTES} are allowed"):
        encode(Drop(("é" * 200,) * MOST_NAMES))


@pytest.mark.parametrize(
    "message",
    [
        Note("n", "w" * MOST_BYTES),
        Note("n", '"' * (MOST_BYTES // 4)),
        Noted("n", "é" * (MOST_BYTES // 11)),
        Note("n" * 201, "w"),
        Note("n", "w", ("n",) * (MOST_NAMES + 1)),
        Drop(("a\n",)),
        Sync(-1),
    ],
)
def test_what_nobody_would_take_is_not_sent(message: Any) -> None:
    """Else the other side would hang up, be told the same again, and hang up again."""
    with pytest.raises(ProtocolError, match="no "):
        encode(message)
