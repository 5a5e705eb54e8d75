"""`migproxy top`: the migrations of this node, live in a terminal."""

from __future__ import annotations

import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from migproxy.status import duration, milliseconds, size
from migproxy.text import printable_values

Report = Mapping[str, Any]

SORTS = {"r": "rate", "t": "total", "a": "age", "n": "name"}
"""Keys, and what each sorts by."""

_HEADINGS = ("MIGRATION", "ROLE", "STATE", "AGE", "RATE", "TOTAL")
_WIDTHS = (0, 6, 9, 6, 12, 10)  # the first takes what is left
_BAR = 14
_BARS, _ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
_BOLD, _DIM, _RED, _GREEN, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[0m"
_ENTER, _LEAVE, _HOME, _CLEAR_LINE, _CLEAR_BELOW = (
    "\x1b[?1049h\x1b[?25l",
    "\x1b[?25h\x1b[?1049l",
    "\x1b[H",
    "\x1b[K",
    "\x1b[J",
)


@dataclass(frozen=True, slots=True)
class Style:
    """What the terminal can show.

    Attributes:
        colour: Whether colours and weights may be used (NO_COLOR and TERM=dumb forbid it).
        unicode: Whether block characters may be.
        cursor: Whether the picture can be drawn over the last one.
    """

    colour: bool
    unicode: bool
    cursor: bool

    @classmethod
    def detect(cls) -> Style:
        """Finds out by the environment."""
        dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")
        return cls(
            colour=sys.stdout.isatty() and not dumb and not os.environ.get("NO_COLOR"),
            unicode=(sys.stdout.encoding or "").lower().replace("-", "") == "utf8",
            cursor=not dumb,
        )

    def paint(self, code: str, text: str) -> str:
        """Text in a colour or weight, or plain."""
        return f"{code}{text}{_PLAIN}" if self.colour and text else text


def run(ask: Callable[[], Report], interval: float, sort: str) -> None:
    """Draws until the user quits; one picture where the output is no terminal.

    Args:
        ask: Gets the daemon's report.
        interval: Seconds between two pictures.
        sort: One of `SORTS`' values.

    Raises:
        control.ControlError: The daemon does not answer (any more).
    """
    style = Style.detect()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        columns = shutil.get_terminal_size((100, 0)).columns
        print("\n".join(picture(ask(), columns, None, sort, style)))  # noqa: T201 - the command's output
        return
    with _screen(style) as draw:
        while True:
            columns, lines = shutil.get_terminal_size()
            draw(picture(ask(), columns, lines, sort, style))
            key = _key(interval)
            if key in ("q", "Q", "\x1b", "\x04"):
                return
            sort = SORTS.get(key, sort)


@contextmanager
def _screen(style: Style) -> Iterator[Callable[[Sequence[str]], None]]:
    """The terminal without echo and line editing; as it was before, afterwards."""
    out, stdin = sys.stdout, sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def draw(lines: Sequence[str]) -> None:
        if style.cursor:
            out.write(_HOME + "".join(f"{line}{_CLEAR_LINE}\r\n" for line in lines[:-1]) + lines[-1])
            out.write(_CLEAR_LINE + _CLEAR_BELOW)
        else:
            out.write("\n".join(lines) + "\n\n")
        out.flush()

    try:
        tty.setcbreak(stdin)
        if style.cursor:
            out.write(_ENTER)
        yield draw
    except KeyboardInterrupt:
        pass
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        if style.cursor:
            out.write(_LEAVE)
            out.flush()


def _key(seconds: float) -> str:
    """The key that is pressed within so many seconds; "" for none."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0]:
            return os.read(sys.stdin.fileno(), 1).decode(errors="replace") or "\x04"
    return ""


def picture(report: Report, columns: int, lines: int | None, sort: str, style: Style) -> list[str]:
    """One picture of the report; no text in it controls the terminal.

    Args:
        report: As `Node.report` makes it.
        columns, lines: The terminal's size; None lines for as many as it takes.
        sort: One of `SORTS`' values.
        style: What the terminal can show.
    """
    report = printable_values(report)
    width = max(columns, 72)
    migrations = sorted(report["migrations"], key=_order(sort))
    head = [*_node(report, migrations, style), "", style.paint(_BOLD, _row(_HEADINGS, width))]
    keys = f"sorted by {sort}; keys: " + ", ".join(f"{key} {name}" for key, name in SORTS.items()) + ", q quit"
    body: list[str] = []
    most = max((_rate(one) for one in migrations), default=0.0)
    shown = 0
    for one in migrations:
        block = _migration(one, most, width, style)
        if lines is not None and len(head) + len(body) + len(block) + 2 > lines:
            break
        body += block
        shown += 1
    if hidden := len(migrations) - shown:
        body.append(style.paint(_DIM, f"... and {hidden} more"))
    if not migrations:
        body.append("no migrations")
    return [line if style.colour else line.rstrip() for line in [*head, *body, style.paint(_DIM, keys)]]


def _node(report: Report, migrations: Sequence[Report], style: Style) -> list[str]:
    state = "draining" if report["draining"] else "ready" if report["ready"] else "NOT READY"
    total = sum(_rate(one) for one in migrations)
    counts = ", ".join(
        f"{count} {name}"
        for name in ("running", "prepared", "preparing", "waiting", "bypassed", "error", "ended")
        if (count := sum(one["state"] == name for one in migrations))
    )
    title = f"migproxy {report['node']}  {report['address'] or 'no address'}  "
    line = style.paint(_BOLD, title) + style.paint(_GREEN if report["ready"] else _RED, state)
    problems = [style.paint(_RED, f"  {name}: {why}") for name, why in report["problems"].items()]
    return [f"{line}  {size(total)}/s", *problems, counts or "idle"]


def _migration(one: Report, most: float, width: int, style: Style) -> list[str]:
    channels = one.get("channels") or []
    total = sum(channel["bytes_sent"] + channel["bytes_received"] for channel in channels)
    cells = (
        f"{one['namespace']}/{one['name']}",
        one["role"],
        one["state"],
        duration(one.get("age_seconds")),
        f"{size(_rate(one))}/s" if one["state"] != "ended" and channels else "",
        size(total) if channels else "",
    )
    colour = {"running": _GREEN, "error": _RED, "ended": _DIM}.get(one["state"], "")
    block = [style.paint(colour, _row(cells, width)) if colour else _row(cells, width)]
    if one.get("history") and one["state"] == "running":
        block.append(_bars(one, most, width, style))
        if verdict := one.get("limited", {}).get("now", {}).get("verdict"):  # an older daemon's has none
            block.append(f"  limited {verdict}"[:width])
    if why := one.get("error") or (one.get("last_error") if one["state"] != "ended" else None):
        block.append(style.paint(_RED, f"  {why}"[:width]))
    return block


def _bars(one: Report, most: float, width: int, style: Style) -> str:
    """The rate beside the fastest one's, its last minute, and TCP's view."""
    channels = one["channels"]
    rtts = [channel["tcp"]["rtt_seconds"] for channel in channels if channel["tcp"]]
    facts = [
        f"{sum(channel['connections_open'] for channel in channels)} open",
        f"{sum(channel['retransmits'] for channel in channels)} retransmits",
        *([f"RTT {milliseconds(max(rtts))}"] if rtts else []),
    ]
    tail = ", ".join(facts)
    levels = _BARS if style.unicode else _ASCII_BARS
    full, empty = ("█", "░") if style.unicode else ("#", ".")
    room = min(60, max(10, width - _BAR - len(tail) - 6))
    history = one["history"][-room:]
    peak = max(*history, 1)
    spark = "".join(levels[min(len(levels) - 1, -(-rate * (len(levels) - 1) // peak))] for rate in history)
    filled = round(_BAR * _rate(one) / most) if most else 0
    return f"  {full * filled}{empty * (_BAR - filled)}  {spark.ljust(room)}  {tail}"


def _row(cells: Sequence[str], width: int) -> str:
    widths = (width - sum(_WIDTHS) - len(_WIDTHS) + 1, *_WIDTHS[1:])
    first = cells[0] if len(cells[0]) <= widths[0] else "<" + cells[0][1 - widths[0] :]
    texts = [first.ljust(widths[0]), *(cells[at].ljust(widths[at]) for at in (1, 2))]
    return " ".join([*texts, *(cells[at].rjust(widths[at]) for at in range(3, len(cells)))])


def _rate(one: Report) -> float:
    if one["state"] == "ended":
        return 0.0
    return float(one.get("bytes_sent_per_second", 0) + one.get("bytes_received_per_second", 0))


def _order(sort: str) -> Callable[[Report], Any]:
    def total(one: Report) -> int:
        return sum(channel["bytes_sent"] + channel["bytes_received"] for channel in one.get("channels") or [])

    def name(one: Report) -> tuple[str, ...]:
        return (one["namespace"], one["name"], one["migration_uid"], one["role"])

    first: Mapping[str, Callable[[Report], float]] = {
        "rate": lambda one: -_rate(one),
        "total": lambda one: -total(one),
        "age": lambda one: one.get("age_seconds") or 0.0,
        "name": lambda one: 0.0,
    }
    return lambda one: (sort != "name" and one["state"] == "ended", first[sort](one), name(one))
