"""Words that a daemon leaves for the next one: read as they were written, and refused with a reason where damaged."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from migproxy import state
from migproxy.state import ChannelState, ProxyState, StateError

pytestmark = pytest.mark.tier("gate")

STATE = ProxyState(
    namespace="default",
    name="vm1",
    vmi_uid="vmi-1",
    migration_uid="uid-1",
    role="target",
    began=1.5,
    channels={
        "libvirt": ChannelState(
            connections=2,
            failures={"reset": 1},
            sent=7,
            received=8,
            spliced=(9, 10),
            modes={"spliced": 11},
            retransmits=12,
            local=1,
            local_sent=13,
            local_received=14,
        )
    },
)


def test_words_are_read_as_they_were_written() -> None:
    assert state.read(STATE.model_dump_json()) == STATE


def test_what_a_later_release_adds_is_not_looked_at() -> None:
    assert state.read(STATE.model_dump_json().replace('"began"', '"mood":"good","began"')) == STATE


def test_words_cut_off_anywhere_are_refused() -> None:
    whole = STATE.model_dump_json()
    for length in range(len(whole)):
        with pytest.raises(StateError):
            state.read(whole[:length])


@pytest.mark.parametrize(
    ("was", "becomes", "why"),
    [
        ('"role":"target"', '"role":"targed"', "role: .*none of source, target"),
        ('{"libvirt":', '{"libvird":', "none of .*libvirt"),
        ('"began":1.5', '"began":"noon"', "began: "),
        ('"sent":7', '"sent":"x"', "channels.libvirt.sent: "),
    ],
)
def test_what_is_wrong_is_named(was: str, becomes: str, why: str) -> None:
    whole = STATE.model_dump_json()
    assert was in whole
    with pytest.raises(StateError, match=why):
        state.read(whole.replace(was, becomes))


def test_garbage_raises_nothing_else() -> None:
    whole, chance = STATE.model_dump_json(), random.Random(1)
    for _ in range(500):
        torn = list(whole)
        for _ in range(chance.randint(1, 8)):
            torn[chance.randrange(len(torn))] = chr(chance.randrange(256))
        with suppress(StateError):
            state.read("".join(torn))
    for text in ("null", "[]", "{}", '"state"', "\0" * 100, "[" * 100_000):
        with pytest.raises(StateError):
            state.read(text)
