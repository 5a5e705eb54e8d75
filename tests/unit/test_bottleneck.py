"""The verdict, from plain figures."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migproxy.bottleneck import By, Limits, Receiving, Sending, add, describe, receiving, sending, together

pytestmark = pytest.mark.tier("gate")

MIB = 1 << 20
START = Sending(
    at=0.0,
    backlog=0,
    busy=0.0,
    window_limited=0.0,
    buffer_limited=0.0,
    unsent=0,
    is_shut=False,
    cpu=0.0,
)
END = replace(START, at=1.0)


def limits(**seconds: float) -> Limits:
    return {by: seconds.get(by, 0.0) for by in (By.GUEST, By.SOURCE, By.NETWORK, By.TARGET)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, limits(guest=1), id="nothing happens"),
        pytest.param({"busy": 0.3}, limits(guest=1), id="what there is goes out at once"),
        pytest.param({"backlog": MIB, "cpu": 0.02}, limits(guest=0.98, source=0.02), id="between two steps of a pump"),
        pytest.param({"backlog": MIB, "cpu": 1.0}, limits(source=1), id="the relay waits for a CPU"),
        pytest.param({"backlog": MIB, "cpu": 1.0, "busy": 0.4}, limits(source=1), id="and TCP has hardly anything"),
        pytest.param({"busy": 1.0, "unsent": MIB}, limits(network=1), id="the network takes no more"),
        pytest.param({"busy": 1.0, "unsent": MIB, "cpu": 1.0}, limits(network=1), id="whatever the CPU does"),
        pytest.param({"busy": 1.0, "window_limited": 1.0, "unsent": MIB}, limits(network=1), id="a deep queue"),
        pytest.param(
            {"busy": 1.0, "window_limited": 0.7, "unsent": MIB, "is_shut": True}, limits(target=1), id="a reader"
        ),
        pytest.param({"busy": 1.0, "buffer_limited": 1.0}, limits(network=1), id="all that TCP may keep is on its way"),
        pytest.param(
            {"busy": 1.0, "buffer_limited": 0.8, "backlog": MIB, "cpu": 0.1},
            limits(source=0.1, network=0.9),
            id="and the launcher waits",
        ),
        pytest.param({"busy": 1.0, "backlog": MIB, "cpu": 0.1}, limits(source=0.1, network=0.9), id="at times"),
        pytest.param({"busy": 0.5, "unsent": MIB}, limits(guest=0.5, network=0.5), id="by turns"),
    ],
)
def test_what_a_source_sees(changes: dict[str, float], expected: Limits) -> None:
    states = {name: value for name, value in changes.items() if name in ("backlog", "unsent")}
    before = replace(START, **states)  # type: ignore[arg-type]
    after = replace(END, **changes)  # type: ignore[arg-type]
    assert sending(before, after) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arrived", "unread", "expected"),
    [(0, 0, 0.0), (MIB, 0, 0.0), (4096, 4096, 0.0), (MIB, 200_000, 1.0)],
)
def test_what_a_target_sees(arrived: int, unread: int, expected: float) -> None:
    seen = receiving(Receiving(0.0, arrived, unread), Receiving(1.0, arrived, unread))
    assert seen == {By.TARGET: expected, By.UPSTREAM: 1 - expected}


figures = st.floats(0, 100, allow_subnormal=False)
counts = st.integers(0, 1 << 40)
samples = st.builds(Sending, figures, counts, figures, figures, figures, counts, st.booleans(), figures)


@given(samples, samples)
def test_the_shares_are_all_of_the_time_and_no_more(before: Sending, after: Sending) -> None:
    shares = sending(before, after)
    assert sum(shares.values()) == pytest.approx(max(after.at - before.at, 0.0))
    assert min(shares.values()) >= -1e-9


@given(st.lists(st.tuples(samples, samples), min_size=1, max_size=5))
def test_so_are_those_of_several_connections(pairs: list[tuple[Sending, Sending]]) -> None:
    each = [sending(before, after) for before, after in pairs]
    shares = together(each)
    assert sum(shares.values()) == pytest.approx(max(sum(one.values()) for one in each))
    assert min(shares.values()) >= -1e-9


def test_a_connection_that_waits_for_its_turn_is_no_excuse() -> None:
    assert together([limits(guest=1), limits(guest=0.1, network=0.9)]) == pytest.approx(limits(guest=0.1, network=0.9))
    assert together([limits(guest=1), limits(guest=1)]) == limits(guest=1)
    target = {By.TARGET: 0.5, By.UPSTREAM: 0.5}
    assert together([target, {By.TARGET: 0.0, By.UPSTREAM: 1.0}]) == target


def test_times_add_up() -> None:
    assert add() == {}
    assert add(limits(guest=1), limits(guest=2, target=1)) == limits(guest=3, target=1)


def test_the_verdict_is_a_sentence() -> None:
    assert describe({}) == describe(limits()) == ""
    assert describe(limits(network=81, target=12, guest=4, source=3), loss=0.003) == (
        "81 % by the network (loss 0.3 %), 12 % by the target"
    )
    assert describe(limits(source=1), encrypts=True) == "100 % by this node's CPU (TLS in user space)"
    assert describe(limits(source=1), encrypts=False, loss=0.5) == "100 % by this node's CPU"
    assert describe({By.TARGET: 1.0, By.UPSTREAM: 3.0}) == "75 % by what comes before this node, 25 % by the target"
