"""VMIs that somebody hostile wrote, from the document to every output: they harm nobody but themselves.

A seeded mutator puts into the fields that are read what does not belong there. A failure names the number that
makes the same document again.
"""

from __future__ import annotations

import copy
import io
import json
import random
import resource
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

import pytest
import structlog

from migproxy import logs, rows
from migproxy.inventory.contents import EMPTY, SyntaxFlaw
from migproxy.inventory.document import read
from migproxy.measure import Measures
from migproxy.metrics import Exporter, render
from migproxy.plan import Migration, Plan, Readiness, Role, make_plan
from migproxy.portmap import IPAddress
from migproxy.retention import MOST, Ended, Retention
from migproxy.status import render as render_status
from migproxy.tls import Plaintext
from migproxy.top import Style, picture
from migproxy.traffic import Progress
from migproxy.vmi import VMI, InvalidVMI, parse
from migproxy.watch import Watcher
from tests.unit.test_health import Watched, node
from tests.unit.test_metrics import channel

NODE, OTHER = "node01", "node02"
OWN: IPAddress = ip_address("10.1.1.1")
NOW = datetime(2026, 8, 1, 12, tzinfo=UTC)
BATCH = 1000
LONGEST = 1000  # characters of an error

NASTY = [
    "\x1b]0;t\x07",
    "\x1b[2J",
    "\x9b",
    "\x7f",
    "\0",
    "\n",
    "\u202e",
    "\u2028",
    "\ud800",
    "\U000e0001",
    "é",
    "/",
    "..",
    "%",
    '"',
]
ADDRESSES = [
    "127.0.0.1",
    "::1",
    "::ffff:127.0.0.1",
    "169.254.169.254",
    "fe80::1",
    "fe80::1%\x1b[2J",
    "0.0.0.0",
    "224.0.0.1",
]
TIMES = [
    "0000-01-01T00:00:00Z",
    "9999-12-31T23:59:59-23:59",
    "0001-01-01T00:00:00+23:59",
    "2026-08-01T23:59:60Z",
    "noon",
]
VALUES: list[Any] = [None, True, 0, -1, 2**63, 10**400, 1.5, float("inf"), "", [], {}, [[]], {"": {}}, {"\x1b": "\x9b"}]


def sound(role: Role) -> dict[str, Any]:
    """A VMI that migrates from this node, or to it, with all that is read."""
    here, there = (NODE, OTHER) if role is Role.SOURCE else (OTHER, NODE)
    side = {"virtualMachineInstanceUID": "side", "syncAddress": "", "nodeAddress": "10.1.1.3"}
    return {
        "kind": "VirtualMachineInstance",
        "metadata": {
            "namespace": "default",
            "name": "vm",
            "uid": "u-1",
            "labels": {"kubevirt.io/migrationTargetNodeName": there},
            "annotations": {
                "migproxy.io/target": f"1 m-1 32899:0,42691:49152 {OWN}",
                "kubevirt.io/create-migration-target": "false",
            },
            "deletionTimestamp": None,
        },
        "status": {
            "nodeName": here,
            "phase": "Running",
            "activePods": {"pod-a": here, "pod-b": there},
            "migrationTransport": "Unix",
            "migrationMethod": "BlockMigration",
            "migratedVolumes": [],
            "migrationState": {
                "migrationUid": "m-1",
                "sourceNode": here,
                "targetNodeAddress": str(OWN),
                "targetDirectMigrationNodePorts": {"32899": 0, "42691": 49152, "39497": 49153},
                "startTimestamp": None,
                "endTimestamp": None,
                "completed": False,
                "failed": False,
                "sourceState": {**side, "directMigrationNodePorts": {"1": 0}},
                "targetState": {**side, "directMigrationNodePorts": {"1": 0}},
            },
        },
    }


def places(value: dict[str, Any], way: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to everything in a document."""
    for name, inner in value.items():
        yield (*way, name)
        if isinstance(inner, dict):
            yield from places(inner, (*way, name))


SOUND = {role: sound(role) for role in Role}
TEXTS = {role: json.dumps(document) for role, document in SOUND.items()}
PLACES = {role: list(places(SOUND[role])) for role in Role}


def hostile_value(chance: random.Random, depth: int = 0) -> Any:
    """Something that does not belong there, or just might."""
    kind = chance.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return copy.deepcopy(chance.choice(VALUES))
    if kind == 1:
        return chance.choice(ADDRESSES)
    if kind == 2:
        return chance.choice(TIMES)
    if kind == 3:
        return "".join(chance.choice([*NASTY, "a", "m-1", NODE]) for _ in range(chance.randrange(8)))
    if kind == 4:
        return chance.choice(NASTY) + "M" * chance.choice([10, 130, 1100, 5000])
    if kind == 5:
        return chance.choice([NODE, OTHER, "true", "1 m-1 22:0 127.0.0.1", "2 \x1b[2J", "Unix", "Failed"])
    if kind == 6:
        return [hostile_value(chance, depth + 1) for _ in range(chance.choice([1, 2, 3]))]
    if kind == 7:
        return {str(chance.choice([22, 70000, "x", "\x1b", 32899])): chance.choice([0, 49152, 7, "0", 10**30])}
    if chance.random() < 0.3:
        return {f"{chance.choice(NASTY)}{n}": copy.deepcopy(chance.choice(VALUES)) for n in range(70)}
    return {str(hostile_value(chance, 3)): hostile_value(chance, depth + 1)}


def hostile(number: int) -> dict[str, Any]:
    """The document of that number."""
    chance = random.Random(number)
    role = chance.choice(list(Role))
    document: dict[str, Any] = json.loads(TEXTS[role])
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        *way, name = chance.choice(PLACES[role])
        mapping: Any = document
        for step in way:
            mapping = mapping.get(step) if isinstance(mapping, dict) else None
        if isinstance(mapping, dict):
            key = name if chance.random() < 0.9 else str(hostile_value(chance))
            mapping[key] = hostile_value(chance)
    if chance.random() < 0.3 and isinstance(state := document.get("status"), dict):
        migration = state.get("migrationState")
        if isinstance(migration, dict):  # churn
            migration["migrationUid"] = f"m-{number}"
    return document


class Fuzz:
    """Leads documents through everything, and keeps what a node keeps.

    Args:
        watcher: For the node.
        log: Where the console log goes.
    """

    def __init__(self, watcher: Watcher, log: io.StringIO) -> None:
        self._flaws: dict[str, str] = {}
        self._log = log
        self._ended: Retention[tuple[Migration, Role]] = Retention(300, lambda key: key[0].vmi_uid)
        self.good = self.bad = 0

        class Inventory(Watched):
            flaws: Mapping[str, str] = self._flaws

        self._node = node(Inventory(), Plaintext(), watcher)
        self._checks = self._node.checks

    def lead(self, number: int) -> list[dict[str, Any]]:
        """Leads a document as far as it goes; returns the rows of its migrations."""
        document = hostile(number)
        raw = "".join(random.Random(number).sample(NASTY, 5))
        vmi, told = self._parse(document, from_file=number % 50 == 0)
        for text in told:
            assert text.isprintable()
            assert len(text) <= LONGEST
            self._flaws[f"/vmis/{NASTY[number % len(NASTY)]}.yaml:{number % 10}"] = text
            structlog.get_logger().error("VMI cannot be read", error=text, raw=raw)
        self.bad += bool(told)
        if vmi is None:
            return []
        self.good += 1
        plans = [make_plan([vmi], NODE, own, NOW, known) for own, known in (([OWN], None), ((), Readiness(OWN)))]
        found = [row for plan in plans for row in self._rows(plan)]
        for row in found:
            row["last_error"] = raw  # as of a launcher's socket
            structlog.get_logger().error("migration cannot be served", error=row["error"], name=row["name"])
        return found

    def _parse(self, document: dict[str, Any], *, from_file: bool) -> tuple[VMI | None, list[str]]:
        if not from_file:  # as the watch has it
            try:
                return parse(document), []
            except InvalidVMI as error:
                return None, [str(error)]
        try:
            contents = read(json.dumps(document), EMPTY)
        except SyntaxFlaw as flaw:
            return None, [flaw.reason]
        told = [flaw.reason for flaw in contents.flaws] + [kind for _, kind in contents.ignored]
        return (contents.entries[0].vmi if contents.entries else None), told

    def _rows(self, plan: Plan) -> Iterator[dict[str, Any]]:
        for held in plan.held:
            assert len(held.reason) <= LONGEST
            yield {**rows.identity(held.migration, held.role), "state": "error", "error": held.reason}
        for bypassed in plan.bypassed:
            yield rows.bypass(bypassed)
        for source in plan.sources:
            yield self._row(source.migration, source.role, source.address)
        for target in plan.targets:
            yield self._row(target.migration, target.role, target.published_address)

    def _row(self, migration: Migration, role: Role, address: IPAddress | None) -> dict[str, Any]:
        assert not (address and address.is_loopback)
        row = {**rows.identity(migration, role), "state": "prepared", "error": None, "last_error": None, "began": 1.0}
        row |= {"peer": str(address), "channels": [channel("direct")]}
        self._ended.add((migration, role), Ended(row | {"state": "ended"}, Progress()))
        return row

    def show(self, found: list[dict[str, Any]]) -> None:
        """Shows rows in every way there is."""
        assert self._node.checks == self._checks, "no VMI makes the node unready"
        kept = [ended.report for _, ended in self._ended.items()]
        assert len(kept) <= MOST
        report = {**self._node.report(), "migrations": found + kept}
        assert len(json.dumps(report["flaws"])) < 30 * LONGEST
        lines = render_status(report).split("\n")
        lines += picture(report, 100, None, "rate", Style(colour=False, unicode=True, cursor=False))
        lines += render(Exporter(lambda: report, Measures()).scrape(), "")[0].decode().split("\n")
        lines += json.dumps(report).split("\n")
        lines += self._log.getvalue().split("\n")
        self._log.seek(0)
        self._log.truncate()
        assert [line for line in lines if not line.isprintable()] == []


async def fuzz(numbers: range, monkeypatch: pytest.MonkeyPatch) -> Fuzz:
    """Leads the documents of these numbers through everything."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    before = structlog.get_config()
    structlog.reset_defaults()
    logs.configure("console", "info")
    assert isinstance(sys.stderr, io.StringIO)
    try:
        async with Watcher() as watcher:
            made = Fuzz(watcher, sys.stderr)
            found: list[dict[str, Any]] = []
            for number in numbers:
                try:
                    found += made.lead(number)
                except Exception as error:
                    raise AssertionError(f"document {number}") from error
                if number % BATCH == BATCH - 1:
                    made.show(found)
                    found = []
    finally:
        structlog.configure(**before)
    return made


@pytest.mark.tier("gate")
async def test_a_few_thousand_hostile_vmis_harm_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    made = await fuzz(range(3000), monkeypatch)
    assert min(made.good, made.bad) > 300, "both ways are gone"


@pytest.mark.tier("soak")
@pytest.mark.patience(3600)
async def test_a_million_hostile_vmis_harm_nobody_and_leave_nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    await fuzz(range(20_000), monkeypatch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await fuzz(range(20_000, 1_000_000), monkeypatch)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10, "KiB"
