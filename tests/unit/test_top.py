"""One picture of `migproxy top`."""

from __future__ import annotations

from typing import Any

import pytest

from migproxy.top import Style, picture
from tests.unit.test_metrics import channel, migration, report

pytestmark = pytest.mark.tier("gate")

PLAIN = Style(colour=False, unicode=False, cursor=False)
COLOUR = Style(colour=True, unicode=True, cursor=True)


def running(name: str, sent: int, total: int, age: float) -> dict[str, Any]:
    return migration(
        name=name,
        migration_uid=f"m-{name}",
        age_seconds=age,
        bytes_sent_per_second=sent,
        bytes_received_per_second=0,
        history=[0, sent // 2, sent],
        last_error=None,
        channels=[channel("direct", bytes_sent=total, bytes_received=0)],
    )


def seen(*migrations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**report(*migrations), "address": "10.1.1.1", **changes}


THREE = [
    running("slow", 1 << 20, 3 << 30, 10),
    running("fast", 1 << 30, 1 << 20, 30),
    running("middle", 1 << 25, 0, 20),
]


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("rate", ["fast", "middle", "slow"]),
        ("total", ["slow", "fast", "middle"]),
        ("age", ["slow", "middle", "fast"]),
        ("name", ["fast", "middle", "slow"]),
    ],
)
def test_migrations_are_sorted(sort: str, order: list[str]) -> None:
    lines = picture(seen(*THREE), 80, None, sort, PLAIN)
    rows = [line.split()[0].removeprefix("default/") for line in lines if line.startswith("default/")]
    assert rows == order


@pytest.mark.parametrize("style", [PLAIN, Style(colour=False, unicode=True, cursor=True)])
def test_every_line_fits_80_columns_without_colour(style: Style) -> None:
    long = running("a-name-as-long-as-kubernetes-lets-it-be-" + "x" * 20, 1 << 40, 1 << 50, 99999)
    long["error"] = "an error that says " + "very " * 40 + "much"
    lines = picture(seen(long, *THREE), 80, None, "rate", style)
    assert max(len(line) for line in lines) <= 80
    assert not any("\x1b" in line for line in lines)
    assert all(line.isascii() for line in lines) or style.unicode


def test_what_does_not_fit_the_terminal_is_counted() -> None:
    lines = picture(seen(*THREE), 80, 9, "rate", PLAIN)
    assert len(lines) <= 9
    assert "... and 2 more" in lines


def test_a_running_migration_says_what_limits_it() -> None:
    lines = picture(seen(THREE[0]), 80, None, "rate", PLAIN)
    assert "  limited 90 % by the network, 10 % by the guest" in lines


def test_names_and_errors_cannot_control_the_terminal() -> None:
    evil = running("\x1b[2Jevil\r\n\u202e", 1, 1, 1)
    evil["error"] = "\x1b]0;title\x07"
    for style in (PLAIN, COLOUR):
        text = "".join(picture(seen(evil), 80, None, "rate", style))
        for control in ("\x1b[2J", "\x1b]", "\x07", "\r", "\n", "\u202e"):
            assert control not in text


def test_a_node_that_is_not_ready_says_why() -> None:
    lines = picture(seen(ready=False, problems={"address": "interface migration0 is down"}), 80, None, "rate", PLAIN)
    assert "NOT READY" in lines[0]
    assert "  address: interface migration0 is down" in lines
