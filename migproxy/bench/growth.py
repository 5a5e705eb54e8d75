"""What more of something costs: migrations, connections, VMIs; and whether they share fairly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from migproxy.bench.contestants import Migproxy, vmi
from migproxy.bench.measure import Flow, equal_share, idle, listening, probe, stream
from migproxy.bench.meter import Usage, usage
from migproxy.bench.stage import Network, Stage, until
from migproxy.control import ask

Row = tuple[str, float, str]
MIB = 1 << 20
_CHUNK = 128 << 10
_STREAMS = 8
_OPEN = 100
_SECONDS = 2.0
_LONG = 6.0  # hundreds of connections take seconds until their buffers are full


def measure(stage: Stage, network: Network, *, migrations: int) -> Iterator[Row]:
    """Measures how the daemons grow, and yields what was found, one node's half of what both use.

    Args:
        stage: Where.
        network: Between which nodes.
        migrations: How many at once.
    """
    with Migproxy(stage, network) as daemons:
        probe(stage, daemons)
        yield from _idle(stage, daemons)
        yield from _more(daemons, migrations)
    with Migproxy(stage, network) as daemons:
        probe(stage, daemons)
        yield from _slow_reader(stage, daemons)
        yield from _busy(stage, daemons)
        yield from _cluster(daemons)
    with Migproxy(stage, network, migrations=_STREAMS) as daemons:
        probe(stage, daemons)
        yield from _fairness(stage, daemons)
    with Migproxy(stage, network, migrations=migrations) as daemons:
        probe(stage, daemons)
        flow = stream(stage, daemons, connections=_STREAMS, seconds=_LONG, chunk=_CHUNK)
        name = f"{migrations} migrations x {_STREAMS} connections at once"
        yield f"{name}: rate", flow.rate / 1e9, "GB/s"
        yield f"{name}: RSS", flow.used.rss / 2 / MIB, "MiB of a daemon"
        yield f"{name}: threads", flow.used.threads / 2, "of a daemon"
        yield f"{name}: the slowest migration", equal_share(_by(flow, _STREAMS)), "of its equal share"


def _by(flow: Flow, size: int) -> list[int]:
    """What arrived in the second half, by groups of connections."""
    return [sum(flow.within[start : start + size]) for start in range(0, len(flow.within), size)]


def _idle(stage: Stage, daemons: Migproxy) -> Iterator[Row]:
    fresh = usage(daemons.pids)
    time.sleep(2)  # in which the threads of the connections before it go
    before = {part: usage(pids) for part, pids in daemons.parts.items()}
    held = idle(stage, daemons, _OPEN)
    at_first = sum(before.values(), Usage())
    until(lambda: usage(daemons.pids).threads <= at_first.threads, f"the threads of {_OPEN} connections to go")
    for part in daemons.parts:
        yield f"RSS of an idle {part}", before[part].rss / 2 / MIB, "MiB"
    yield "CPU of an idle daemon and its relay", (at_first.cpu - fresh.cpu) / 4 * 1e3, "ms each second"
    for part in daemons.parts:
        yield f"RSS of a {part} with {_OPEN} connections", held[part].rss / 2 / MIB, "MiB"
    yield from _each("open connection", at_first, sum(held.values(), Usage()), _OPEN)


def _each(what: str, before: Usage, after: Usage, count: int) -> Iterator[Row]:
    for name, start, end, unit in (
        ("RSS", before.rss, after.rss, "KiB"),
        ("threads", before.threads, after.threads, ""),
        ("descriptors", before.files, after.files, ""),
    ):
        yield f"{name} for each {what}", (end - start) / 2 / count / (1024 if unit else 1), unit


def _slow_reader(stage: Stage, daemons: Migproxy) -> Iterator[Row]:
    """One reader that hardly reads must neither slow the others down nor fill the daemons' memory."""
    without = stream(stage, daemons, connections=_STREAMS, seconds=_SECONDS, chunk=_CHUNK)
    beside = stream(stage, daemons, connections=_STREAMS + 1, seconds=_SECONDS, chunk=_CHUNK, slow=1)
    yield f"{_STREAMS} fast readers alone", sum(without.within) / (_SECONDS / 2) / 1e9, "GB/s"
    yield f"{_STREAMS} fast readers beside a slow one", sum(beside.within[1:]) / (_SECONDS / 2) / 1e9, "GB/s"
    yield "the slow reader meanwhile", beside.within[0] / (_SECONDS / 2) / 1e6, "MB/s"
    yield "RSS for the slow reader", (beside.used.rss - without.used.rss) / 2 / MIB, "MiB of a daemon"


def _busy(stage: Stage, daemons: Migproxy) -> Iterator[Row]:
    """Streams at full speed must not keep a new migration waiting."""
    with ThreadPoolExecutor(1) as aside:
        streaming = aside.submit(stream, stage, daemons, connections=_STREAMS, seconds=_SECONDS, chunk=_CHUNK)
        until(lambda: _open(daemons) == _STREAMS, f"{_STREAMS} connections")
        taken = [listening(daemons, f"busy{number}")[1] for number in range(3)]
        streaming.result()
    name = f"VMI event to both listening, beside {_STREAMS} streams at full speed"
    yield name, statistics.median(taken) * 1e3, "ms"


def _cluster(daemons: Migproxy) -> Iterator[Row]:
    """A thousand VMIs of which none migrates."""
    before, now = usage(daemons.pids), time.monotonic()
    cluster = {"kind": "List", "items": [vmi(f"still{number}", migrating=False) for number in range(1000)]}
    path = daemons.write("cluster.json", cluster)
    until(lambda: all(known > 1000 for known in _known(daemons)), "1000 VMIs to be known", 60, 0.02)
    read = time.monotonic() - now
    after = usage(daemons.pids)
    yield "RSS for a thousand VMIs", (after.rss - before.rss) / 2 / MIB, "MiB"
    yield "CPU to read a thousand VMIs", (after.cpu - before.cpu) / 2 * 1e3, "ms of a daemon"
    yield "until both daemons know a thousand VMIs", read * 1e3, "ms"
    yield "VMI event to both listening, beside a thousand", listening(daemons, "beside")[1] * 1e3, "ms"
    path.unlink()
    until(lambda: all(known <= 1 for known in _known(daemons)), "1000 VMIs to be forgotten", 60, 0.02)


def _open(daemons: Migproxy) -> int:
    """Connections that the source has open now."""
    migrations = ask(daemons.controls[1])["migrations"]
    return sum(channel["connections_open"] for one in migrations for channel in one.get("channels", ()))


def _known(daemons: Migproxy) -> list[int]:
    return [int(ask(path)["vmis"]) for path in daemons.controls]


def _more(daemons: Migproxy, count: int) -> Iterator[Row]:
    """Migrations that are prepared and wait."""
    before, now = usage(daemons.pids), time.monotonic()
    for number in range(count):
        daemons.add(f"more{number}")
    until(lambda: all(Path(path).is_socket() for path in daemons.sources), f"{count} migrations", 60)
    taken = time.monotonic() - now
    time.sleep(0.5)  # the last of them is still being logged
    after = usage(daemons.pids)
    time.sleep(1)
    spent = usage(daemons.pids).cpu - after.cpu
    yield f"{count} migrations at once: until all listen", taken * 1e3, "ms"
    yield from _each("idle migration", before, after, count)
    yield f"CPU of a daemon with {count} idle migrations", spent / 2 * 1e3, "ms each second"


def _fairness(stage: Stage, daemons: Migproxy) -> Iterator[Row]:
    flow = stream(stage, daemons, connections=1, seconds=_SECONDS, chunk=_CHUNK)
    yield f"{_STREAMS} migrations: the slowest", equal_share(_by(flow, 1)), "of its equal share"
    daemons.sources[:1] *= _STREAMS
    daemons.targets[:1] *= _STREAMS
    flow = stream(stage, daemons, connections=1, seconds=_SECONDS, chunk=_CHUNK)
    amounts = [sum(flow.within[:_STREAMS]), *flow.within[_STREAMS:]]
    name = f"{_STREAMS} migrations, one with {_STREAMS} connections: the slowest"
    yield name, equal_share(amounts), "of its equal share (uneven)"
