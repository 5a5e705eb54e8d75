"""The whole benchmark: who takes part, in which cells, in which order; and what is left behind of it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from migproxy import __version__
from migproxy.bench import growth, measure
from migproxy.bench.chart import svg
from migproxy.bench.contestants import (
    DIRECT,
    GO,
    GO_MTLS,
    KTLS,
    LIMIT,
    MIGPROXY,
    MTLS,
    Commands,
    Contestant,
    Direct,
    Migproxy,
    Templates,
    daemons,
    go_peer,
    missing,
    peers,
)
from migproxy.bench.results import CUBIC, LISTEN, PING, SETUP, STREAM, SYSTEM, Cell, Results
from migproxy.bench.stage import LOOPBACK, VETH, BenchError, Network, Stage, enter_sandbox
from migproxy.safefiles import write_file
from migproxy.settings import Settings

Say = Callable[[str], None]

_OURS = (MIGPROXY, MTLS, KTLS) if "tls_dir" in Settings.model_fields else (MIGPROXY,)
NAMES = (LIMIT, *_OURS, GO, GO_MTLS, "socat", "haproxy", "nginx", DIRECT)
PAGES = 128 << 10  # bytes of QEMU's multifd packets of pages
_PORT = 7100
_SETUPS = 16  # at once


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    Attributes:
        rounds: How often the contestants take turns.
        seconds: How long each stream lasts.
        connections: Streams at once.
        sizes: Bytes of each write; the first one is used where another dimension varies.
        networks: "veth", "loopback"; the first one is measured in full.
        congestion: "cubic", "system"; likewise.
        contestants: Their names.
        custom: Further ones.
        migrations: How many of them at once `growth` takes; 0 leaves growth out.
        json, chart: Files to write.
    """

    rounds: int = 7
    seconds: float = 0.4
    connections: tuple[int, ...] = (1, 2, 8, 32)
    sizes: tuple[int, ...] = (PAGES, 32 << 10, 1 << 20)
    networks: tuple[str, ...] = (VETH, LOOPBACK)
    congestion: tuple[str, ...] = (CUBIC, SYSTEM)
    contestants: tuple[str, ...] = NAMES
    custom: Mapping[str, Templates] = field(default_factory=dict)
    migrations: int = 100
    json: str | None = None
    chart: str | None = None

    def cells(self) -> Iterator[Cell]:
        """The combinations: one dimension varies at a time, or a run would take an hour."""
        network, congestion, size = self.networks[0], self.congestion[0], self.sizes[0]
        few, many = self.connections[0], max((c for c in self.connections if c <= 8), default=self.connections[0])
        for connections in self.connections:
            yield Cell(STREAM, network, congestion, connections, size)
        for other in self.congestion[1:]:
            yield from (Cell(STREAM, network, other, connections, size) for connections in sorted({few, many}))
        for other in self.networks[1:]:
            yield from (Cell(STREAM, other, congestion, connections, size) for connections in sorted({few, many}))
        for other_size in self.sizes[1:]:
            yield Cell(STREAM, network, congestion, few, other_size)
        yield from (Cell(PING, each, congestion) for each in self.networks)
        yield Cell(SETUP, network, congestion, _SETUPS)
        if MIGPROXY in self.contestants:
            yield Cell(LISTEN, network, congestion)


def run(plan: Plan, say: Say) -> bool:
    """Measures, says how it goes, prints the tables and writes the files.

    Args:
        plan: What to measure.
        say: Told each line of output.

    Returns:
        Whether every contestant took part in all of it.

    Raises:
        BenchError: There is no compiler, nothing to measure, or migproxy or the limit does not work.
    """
    why = enter_sandbox()
    with Stage(sandboxed=why is None) as stage:
        if why:
            say(f"no namespaces ({why}): over loopback only, with the system's congestion control")
            plan = _without_namespaces(plan)
        results = Results(_about(plan, stage))
        _measure(plan, stage, results, say)
        if plan.migrations:
            say("growth ...")
            network = stage.networks[plan.networks[0]]
            results.growth.extend(growth.measure(stage, network, migrations=plan.migrations))
    results.about["load after"] = os.getloadavg()[0]
    say(f"\n{results.tables()}")
    if plan.json:
        _write(plan.json, json.dumps(results.as_json(), indent=1) + "\n", say)
    if plan.chart:
        _write(plan.chart, svg(results), say)
    return not results.failures


def _write(path: str, text: str, say: Say) -> None:
    try:
        write_file(path, text)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror or error}") from error
    say(f"written: {path}")


def _without_namespaces(plan: Plan) -> Plan:
    return replace(plan, networks=(LOOPBACK,), congestion=(SYSTEM,))


def _measure(plan: Plan, stage: Stage, results: Results, say: Say) -> None:
    cells = list(plan.cells())
    with ExitStack() as stack:
        lists = {
            name: _enter(plan, stage, stage.networks[name], results, stack, say)
            for name in {cell.network: None for cell in cells}
        }
        for number in range(plan.rounds):
            say(f"round {number + 1} of {plan.rounds} ...")
            for cell in cells:
                if stage.sandboxed:
                    stage.use_congestion(None if cell.congestion == SYSTEM else cell.congestion)
                for contestant in lists[cell.network]:
                    if contestant.name not in results.failures and _takes_part(contestant, cell):
                        _turn(plan, stage, results, cell, contestant, number)


def _takes_part(contestant: Contestant, cell: Cell) -> bool:
    """Between the generator's two ends alone there is no network, and only migproxy knows of VMIs."""
    if cell.kind == LISTEN:
        return contestant.name == MIGPROXY
    return contestant.name != DIRECT or cell.congestion == CUBIC


def _turn(plan: Plan, stage: Stage, results: Results, cell: Cell, contestant: Contestant, number: int) -> None:
    try:
        results.add(cell, contestant.name, _metrics(plan, stage, cell, contestant, number))
    except BenchError as error:
        if contestant.name in (LIMIT, MIGPROXY):
            raise
        results.failures[contestant.name] = f"{cell}: {error}"


def _metrics(plan: Plan, stage: Stage, cell: Cell, contestant: Contestant, number: int) -> dict[str, float]:
    if cell.kind == STREAM:
        flow = measure.stream(stage, contestant, connections=cell.connections, seconds=plan.seconds, chunk=cell.chunk)
        return {
            "rate": flow.rate,
            "cpu_per_gib": flow.used.cpu / flow.gib,
            "switches_per_gib": flow.used.switches / flow.gib,
            "rss": flow.used.rss,
        }
    if cell.kind == PING:
        p50, p99 = measure.round_trip(stage, contestant, count=round(5000 * plan.seconds))
        return {"p50": p50, "p99": p99}
    if cell.kind == SETUP:
        rate, cpu = measure.setup(stage, contestant, seconds=plan.seconds, parallel=cell.connections)
        return {"rate": rate, "cpu_each": cpu}
    assert isinstance(contestant, Migproxy)
    published, both = measure.listening(contestant, f"new{number}")
    return {"published": published, "listening": both}


def _enter(
    plan: Plan, stage: Stage, network: Network, results: Results, stack: ExitStack, say: Say
) -> list[Contestant]:
    """Starts who takes part, and finds out whether they relay anything."""
    entered: list[Contestant] = []
    for contestant in _contestants(plan, stage, network, results):
        try:
            stack.enter_context(contestant)
            measure.probe(stage, contestant)
        except BenchError as error:
            if contestant.name in (LIMIT, MIGPROXY):
                raise
            if contestant.name == KTLS:  # the daemon's last words say what the kernel lacks
                results.left_out[KTLS] = str(error).splitlines()[-1].strip()
            else:
                results.failures[contestant.name] = str(error)
        else:
            entered.append(contestant)
    say(f"{network.name}: {', '.join(contestant.name for contestant in entered)}")
    if not entered:
        raise BenchError("there is nobody to measure: name other --contestants")
    return entered


def _contestants(plan: Plan, stage: Stage, network: Network, results: Results) -> Iterator[Contestant]:
    templates, ours = peers(stage) | dict(plan.custom), daemons(stage)
    port = _PORT if network.name == VETH else _PORT + 100
    for number, name in enumerate([*plan.contestants, *plan.custom]):
        if name == DIRECT:
            yield Direct(stage)
        elif name in ours:
            yield Migproxy(stage, network, name=name, options=ours[name])
        elif package := missing(name):
            results.left_out[name] = f"not installed: apt-get install {package}"
        elif name in (GO, GO_MTLS):
            yield Commands(name, go_peer(stage, mtls=name == GO_MTLS), stage, network, port + number)
        else:
            yield Commands(name, templates[name], stage, network, port + number)


def _about(plan: Plan, stage: Stage) -> dict[str, object]:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ":")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "migproxy": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": model.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "congestion control": stage.default_congestion,
        "versions": {name: _version(command) for name, command in _VERSIONS.items() if shutil.which(command[0])},
        "load before": os.getloadavg()[0],
        "plan": {name: value for name, value in asdict(plan).items() if name not in ("custom", "json", "chart")},
    }


_VERSIONS = {"socat": ("socat", "-V"), "haproxy": ("haproxy", "-v"), "nginx": ("nginx", "-v"), "go": ("go", "version")}


def _version(command: tuple[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return next((line for line in (done.stdout + done.stderr).splitlines() if "version" in line), "")
