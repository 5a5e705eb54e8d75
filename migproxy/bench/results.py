"""What was measured: medians with their spread, the targets, the tables, the JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from migproxy.bench.contestants import DIRECT, GO_MTLS, LIMIT, MIGPROXY, MTLS

STREAM, PING, SETUP, LISTEN = "stream", "round trip", "set-up", "listen"
CUBIC, SYSTEM = "cubic", "system"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of the dimensions, in which the contestants take turns.

    Attributes:
        kind: What is measured.
        network: "veth" or "loopback".
        congestion: "cubic" for everybody, or "system": what each chooses by itself.
        connections: Streams at once; of set-up, connections being set up at once.
        chunk: Bytes of each write.
    """

    kind: str
    network: str
    congestion: str = CUBIC
    connections: int = 1
    chunk: int = 0

    def __str__(self) -> str:
        about = [self.kind, self.network, f"{self.congestion} congestion control"]
        if self.kind in (STREAM, SETUP):
            about.append(f"{self.connections} connection{'s' if self.connections > 1 else ''}")
        if self.chunk:
            about.append(f"writes of {self.chunk >> 10} KiB")
        return ", ".join(about)


_COLUMNS = {
    STREAM: (
        ("GB/s", "rate", 1e-9, 2),
        ("CPU s/GiB", "cpu_per_gib", 1, 3),
        ("switches/GiB", "switches_per_gib", 1, 0),
        ("RSS MiB", "rss", 1 / (1 << 20), 0),
    ),
    PING: (("p50 us", "p50", 1e6, 1), ("p99 us", "p99", 1e6, 1)),
    SETUP: (("connections/s", "rate", 1, 0), ("CPU ms each", "cpu_each", 1e3, 2)),
    LISTEN: (("published ms", "published", 1e3, 1), ("both listening ms", "listening", 1e3, 1)),
}
"""Of each kind: heading, metric, factor to the heading's unit, decimals."""

_MAIN = {STREAM: "rate", PING: "p50", SETUP: "rate", LISTEN: "listening"}


@dataclass(slots=True)
class Results:
    """Every value of every round.

    Attributes:
        about: The machine, the versions, the options.
        values: By cell and contestant, by metric: one value a round.
        left_out: By contestant, what it lacks here.
        failures: By contestant, in what it failed.
        growth: What `growth.measure` found, as rows of (what, value, unit).
    """

    about: dict[str, Any]
    values: dict[Cell, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    growth: list[tuple[str, float, str]] = field(default_factory=list)

    def add(self, cell: Cell, contestant: str, metrics: Mapping[str, float]) -> None:
        """Adds one round's values."""
        series = self.values.setdefault(cell, {}).setdefault(contestant, {})
        for metric, value in metrics.items():
            series.setdefault(metric, []).append(value)

    def median(self, cell: Cell, contestant: str, metric: str) -> float | None:
        """The median of the rounds, None where it was not measured."""
        rounds = self.values.get(cell, {}).get(contestant, {}).get(metric)
        return statistics.median(rounds) if rounds else None

    def ratio(self, cell: Cell, contestant: str, other: str, metric: str) -> float | None:
        """The median of the rounds' ratios: what slowed a round down slowed both, who were measured seconds apart."""
        contestants = self.values.get(cell, {})
        mine, theirs = (contestants.get(name, {}).get(metric, []) for name in (contestant, other))
        ratios = [one / another for one, another in zip(mine, theirs, strict=False) if another]
        return statistics.median(ratios) if ratios else None

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            **self.about,
            "left out": self.left_out,
            "failures": self.failures,
            "measurements": [
                {
                    "kind": cell.kind,
                    "network": cell.network,
                    "congestion": cell.congestion,
                    "connections": cell.connections,
                    "chunk": cell.chunk,
                    "contestant": contestant,
                    "rounds": metrics,
                    "median": {metric: statistics.median(rounds) for metric, rounds in metrics.items()},
                }
                for cell, contestants in self.values.items()
                for contestant, metrics in contestants.items()
            ],
            "growth": [{"what": what, "value": value, "unit": unit} for what, value, unit in self.growth],
            "targets": [
                {
                    "target": target.what,
                    "wanted": target.wanted,
                    "measured": target.measured,
                    "limit": target.limit,
                    "holds": target.holds,
                }
                for target in targets(self)
            ],
        }

    def tables(self) -> str:
        """Everything, for people: a table for each cell, then growth, then the targets."""
        blocks = [self._cell(cell) for cell in self.values]
        if self.growth:
            grown = [(what, f"{value:,.{0 if value >= 100 else 2}f}", unit) for what, value, unit in self.growth]
            blocks.append("growth\n" + table(grown, {1}))
        checked = list(targets(self))
        if checked:
            kept = [
                (
                    t.what,
                    t.wanted,
                    f"{t.measured:.2f}",
                    "" if t.limit is None else f"{t.limit:.2f}",
                    "yes" if t.holds else "NO",
                )
                for t in checked
            ]
            blocks.append("targets\n" + table([("", "wanted", "measured", "the limit's", "holds"), *kept], {1, 2, 3}))
        blocks += [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        blocks += [f"{name} FAILED: {why}" for name, why in self.failures.items()]
        return "\n\n".join(blocks)

    def _cell(self, cell: Cell) -> str:
        columns = [column for column in _COLUMNS[cell.kind] if self._has(cell, column[1])]
        rows = [("", *(heading for heading, *_ in columns), "spread", "of the limit")]
        for contestant, metrics in self.values[cell].items():
            cells = [
                "" if contestant == DIRECT and metric != _MAIN[cell.kind] else f"{middle * factor:,.{decimals}f}"
                for _, metric, factor, decimals in columns
                if (middle := statistics.median(metrics[metric])) is not None
            ]
            main = metrics[_MAIN[cell.kind]]
            factor, decimals = next((f, d) for _, metric, f, d in columns if metric == _MAIN[cell.kind])
            spread = f"{min(main) * factor:,.{decimals}f}-{max(main) * factor:,.{decimals}f}"
            of_limit = self.ratio(cell, contestant, LIMIT, _MAIN[cell.kind])
            rows.append((contestant, *cells, spread, f"{of_limit:.2f}" if of_limit is not None else ""))
        return f"{cell}\n{table(rows, set(range(1, len(rows[0]))))}"

    def _has(self, cell: Cell, metric: str) -> bool:
        return any(metric in metrics for metrics in self.values[cell].values())


def table(rows: Sequence[tuple[str, ...]], right: set[int]) -> str:
    """Columns as wide as need be; those in `right` aligned there."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


@dataclass(frozen=True, slots=True)
class Target:
    """A promise, and whether this run kept it.

    Attributes:
        what: In words.
        wanted: The bound, in words.
        measured: What is bounded.
        holds: Whether it is within.
        limit: What the limit has where migproxy has `measured`: no relay that splices has more.
    """

    what: str
    wanted: str
    measured: float
    holds: bool
    limit: float | None = None


_MTLS_RATE = {1: 1.6, 8: 1.4, 32: 1.3}
"""What mTLS in user space carries at least of what KubeVirt's kind of relay does, by connections."""

_MOST = {
    "RSS of an idle daemon": 80,
    "RSS of a daemon with 100 connections": 80,
    "RSS of an idle relay": 30,
    "RSS of a relay with 100 connections": 60,
    "VMI event to both listening, beside 8 streams at full speed": 10,
}
"""What `growth.measure` may find at most, in the unit that it gives."""


def targets(results: Results) -> Iterator[Target]:
    """Checks the promises that the measured cells allow to check."""
    for cell in results.values:
        if cell.kind == STREAM:
            yield from _stream(results, cell)
        elif cell.kind == PING:
            for metric, most in (("p50", 1.1), ("p99", 1.25)):
                ratio = results.ratio(cell, MIGPROXY, LIMIT, metric)
                yield from _most(f"round trip {metric}, {cell.network}, against the limit", ratio, most)
                ratio = results.ratio(cell, MTLS, GO_MTLS, metric)
                yield from _most(f"round trip {metric}, {cell.network}, mTLS, against Go's", ratio, 1)
        elif cell.kind == SETUP:
            rate = results.median(cell, MIGPROXY, "rate")
            yield from _least(f"connections per second, {cell.network}", rate, 1000)
            rate = results.median(cell, MTLS, "rate")
            yield from _least(f"connections per second, {cell.network}, mTLS", rate, 500)
    for what, value, unit in results.growth:
        if what in _MOST:
            yield from _most(f"{what}, {unit}", value, _MOST[what])
        elif unit == "of its equal share":
            yield from _least(what, value, 0.5)


def _stream(results: Results, cell: Cell) -> Iterator[Target]:
    name = f"{cell.network}, {cell.connections} x {cell.chunk >> 10} KiB"
    others = [one for one in results.values[cell] if not one.startswith(MIGPROXY) and one not in (LIMIT, DIRECT)]
    if cell.congestion == SYSTEM:
        best, limit = _best(results, cell, MIGPROXY, others), _best(results, cell, LIMIT, others)
        yield from _least(f"{name}: rate against the best peer's, system congestion", best, 2, limit)
        return
    yield from _least(f"{name}: rate against the limit", results.ratio(cell, MIGPROXY, LIMIT, "rate"), 0.95)
    if cell.connections == 1:
        ratio = results.ratio(cell, MIGPROXY, LIMIT, "cpu_per_gib")
        yield from _most(f"{name}: CPU per GiB against the limit", ratio, 1.1)
    best, limit = _best(results, cell, MIGPROXY, others), _best(results, cell, LIMIT, others)
    yield from _least(f"{name}: rate against the best peer's", best, 1.4, limit)
    cost, limit = _cheapest(results, cell, MIGPROXY, others), _cheapest(results, cell, LIMIT, others)
    yield from _most(f"{name}: CPU per GiB against the cheapest peer's", cost, 0.7, limit)
    if cell.connections in _MTLS_RATE:
        ratio = results.ratio(cell, MTLS, GO_MTLS, "rate")
        yield from _least(f"{name}: mTLS, rate against Go's", ratio, _MTLS_RATE[cell.connections])
    ratio = results.ratio(cell, MTLS, GO_MTLS, "cpu_per_gib")
    yield from _most(f"{name}: mTLS, CPU per GiB against Go's", ratio, 0.75)
    if cell.connections == max(_MTLS_RATE):
        one = Cell(STREAM, cell.network, cell.congestion, 1, cell.chunk)
        many, single = results.median(cell, MTLS, "rate"), results.median(one, MTLS, "rate")
        share = many / single if many and single else None
        yield from _least(f"{name}: mTLS, rate against its own with 1", share, 0.75)


def _best(results: Results, cell: Cell, mine: str, others: Iterable[str]) -> float | None:
    """One's rate over that of the best of the others."""
    return min(_ratios(results, cell, mine, others, "rate"), default=None)


def _cheapest(results: Results, cell: Cell, mine: str, others: Iterable[str]) -> float | None:
    """One's CPU per GiB over that of the cheapest of the others."""
    return max(_ratios(results, cell, mine, others, "cpu_per_gib"), default=None)


def _ratios(results: Results, cell: Cell, mine: str, others: Iterable[str], metric: str) -> list[float]:
    return [ratio for one in others if (ratio := results.ratio(cell, mine, one, metric)) is not None]


def _least(what: str, value: float | None, bound: float, limit: float | None = None) -> Iterator[Target]:
    if value is not None:
        yield Target(what, f"at least {bound:g}", value, value >= bound, limit)


def _most(what: str, value: float | None, bound: float, limit: float | None = None) -> Iterator[Target]:
    if value is not None:
        yield Target(what, f"at most {bound:g}", value, value <= bound, limit)
