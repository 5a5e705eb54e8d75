"""The benchmark's arithmetic and its words: plans, medians, promises, the chart."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from migproxy.bench.chart import svg
from migproxy.bench.command import Plan
from migproxy.bench.contestants import Templates
from migproxy.bench.measure import equal_share
from migproxy.bench.options import make_plan
from migproxy.bench.results import PING, SETUP, STREAM, SYSTEM, Cell, Results, targets
from migproxy.bench.stage import BenchError

pytestmark = pytest.mark.tier("gate")

SIZE = 128 << 10
ONE = Cell(STREAM, "veth", connections=1, chunk=SIZE)


def plan(
    lists: dict[str, str | None] | None = None,
    commands: tuple[list[str], list[str]] = ([], []),
    *,
    quick: bool = False,
    **numbers: float,
) -> Plan:
    return make_plan(quick=quick, numbers=numbers, lists=lists or {}, commands=commands, files={})


def measured(**rates: float) -> Results:
    """One cell in which each contestant has had one round, at so many bytes per second and CPU seconds per GiB."""
    results = Results({})
    for name, rate in rates.items():
        add(results, ONE, name, rate)
    return results


def add(results: Results, cell: Cell, name: str, rate: float) -> None:
    results.add(cell, name, {"rate": rate, "cpu_per_gib": 1 / rate, "switches_per_gib": 10, "rss": 1 << 20})


def verdicts(results: Results) -> dict[str, bool]:
    return {target.what: target.holds for target in targets(results)}


def test_every_dimension_of_the_plan_is_measured_and_none_is_crossed_with_all_others() -> None:
    cells = list(Plan().cells())
    assert {cell.connections for cell in cells if cell.kind == STREAM} == {1, 2, 8, 32}
    assert {cell.chunk for cell in cells if cell.kind == STREAM} == {SIZE, 32 << 10, 1 << 20}
    assert {(cell.network, cell.congestion) for cell in cells if cell.kind == STREAM} == {
        ("veth", "cubic"),
        ("veth", "system"),
        ("loopback", "cubic"),
    }
    assert {cell.kind for cell in cells} == {STREAM, PING, SETUP, "listen"}
    assert len(cells) == len(set(cells)) < 20


def test_what_is_given_replaces_what_quick_or_the_default_says() -> None:
    chosen = plan({"connections": "4, 16", "contestants": "limit,migproxy"}, quick=True, rounds=7)
    assert (chosen.rounds, chosen.connections, chosen.contestants) == (7, (4, 16), ("limit", "migproxy"))
    assert chosen.seconds < Plan().seconds


@pytest.mark.parametrize(
    ("lists", "commands", "told"),
    [
        ({"networks": "wifi"}, ([], []), "'wifi' is none of the networks: there are veth, loopback"),
        ({"contestants": "limit,netcat"}, ([], []), "'netcat' is none of the contestants: there are limit"),
        ({"connections": "0"}, ([], []), "numbers from 1 to 1024"),
        ({"sizes": "1000"}, ([], []), "in steps of 512"),
        ({"connections": ","}, ([], []), "names nothing"),
        ({}, (["mine=a {source}"], []), "mine: --source-command and --target-command belong together"),
        ({}, (["a {source}"], ["a {target}"]), "NAME=COMMAND is expected"),
        ({}, (["limit=a"], ["limit=b"]), "a name that is not taken"),
    ],
)
def test_a_wrong_word_is_named_with_what_there_is(
    lists: dict[str, str | None], commands: tuple[list[str], list[str]], told: str
) -> None:
    with pytest.raises(BenchError, match=told.replace("{", r"\{")):
        plan(lists, commands)


def test_a_further_contestant_is_a_pair_of_commands_of_one_name() -> None:
    chosen = plan(commands=(["mine=relay {source} {address} {port}"], ["mine=relay -x=y {port} {target}"]))
    assert chosen.custom == {"mine": Templates("relay {source} {address} {port}", "relay -x=y {port} {target}")}


@pytest.mark.parametrize(
    ("rates", "kept"),
    [
        ({"limit": 100.0, "migproxy": 95.0, "socat": 60.0, "nginx": 30.0}, (True, True, True, True)),
        ({"limit": 100.0, "migproxy": 94.0, "socat": 60.0, "nginx": 30.0}, (False, True, True, True)),
        ({"limit": 100.0, "migproxy": 90.0, "socat": 60.0, "nginx": 30.0}, (False, False, True, True)),
        ({"limit": 100.0, "migproxy": 100.0, "socat": 72.0, "nginx": 30.0}, (True, True, False, False)),
        ({"limit": 100.0, "migproxy": 100.0, "socat": 30.0, "nginx": 71.0}, (True, True, True, False)),
    ],
)
def test_promises_are_checked_against_the_limit_and_against_the_best_peer(
    rates: dict[str, float], kept: tuple[bool, ...]
) -> None:
    assert tuple(verdicts(measured(**rates)).values()) == kept


def test_with_the_systems_congestion_control_twice_the_best_peer_is_promised() -> None:
    system = Cell(STREAM, "veth", SYSTEM, 1, SIZE)
    results = Results({})
    for name, rate in {"limit": 100.0, "migproxy": 99.0, "socat": 50.0}.items():
        add(results, system, name, rate)
    assert list(verdicts(results).values()) == [False]


def test_what_the_limit_has_beside_the_peers_is_told_with_what_is_promised() -> None:
    results = measured(limit=100.0, migproxy=99.0, socat=90.0, nginx=50.0)
    told = {target.what.partition(": ")[2]: target.limit for target in targets(results) if target.limit is not None}
    assert told == {
        "rate against the best peer's": pytest.approx(100 / 90),
        "CPU per GiB against the cheapest peer's": pytest.approx(90 / 100),
    }
    assert "the limit's" in results.tables()


def test_growth_is_checked_too() -> None:
    results = Results({})
    results.growth += [
        ("RSS of an idle daemon", 81.0, "MiB"),
        ("RSS of a relay with 100 connections", 59.0, "MiB"),
        ("8 migrations: the slowest", 0.5, "of its equal share"),
    ]
    assert list(verdicts(results).values()) == [False, True, True]


def test_the_median_of_the_rounds_counts_and_the_spread_is_shown() -> None:
    results = Results({})
    for rate in (1e9, 5e9, 2e9):
        add(results, ONE, "limit", rate)
    assert results.median(ONE, "limit", "rate") == 2e9
    assert "1.00-5.00" in results.tables()
    (entry,) = json.loads(json.dumps(results.as_json()))["measurements"]
    assert (entry["rounds"]["rate"], entry["median"]["rate"], entry["connections"]) == ([1e9, 5e9, 2e9], 2e9, 1)


def test_a_ratio_is_that_of_the_same_round_which_noise_hits_alike() -> None:
    results = Results({})
    for speed in (1.0, 0.2, 0.5):
        add(results, ONE, "limit", 100 * speed)
        add(results, ONE, "migproxy", 99 * speed)
    assert results.ratio(ONE, "migproxy", "limit", "rate") == pytest.approx(0.99)


def test_who_is_left_out_and_who_failed_is_said() -> None:
    results = measured(limit=1e9)
    results.left_out["nginx"] = "not installed"
    results.failures["socat"] = "a byte was lost"
    assert "nginx is left out: not installed" in results.tables()
    assert "socat FAILED: a byte was lost" in results.tables()


def test_the_chart_has_a_bar_for_each_contestant_and_is_well_formed() -> None:
    root = ET.fromstring(svg(measured(limit=4e9, migproxy=4e9, **{"<socat>": 1e9})))
    words = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"limit", "migproxy", "<socat>", "4.00", "1.00"} <= words
    widths = [float(bar.attrib["width"]) for bar in root.iter("{http://www.w3.org/2000/svg}rect") if "x" in bar.attrib]
    assert widths[0] == widths[1] == 4 * widths[2]


def test_an_equal_share_is_one_and_starvation_is_nought() -> None:
    assert (equal_share([5, 5, 5]), equal_share([0, 9]), equal_share([1, 3])) == (1.0, 0.0, 0.5)
