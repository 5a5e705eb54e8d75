"""Thousands of changes while everything fails that can: what runs at the end is what the plan says, told once."""

import asyncio
import itertools
import os
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from migproxy.plan import SourceProxy, TargetProxy, make_plan
from migproxy.portmap import source_socket_name
from migproxy.vmi import TARGET_NODE_LABEL, parse
from tests.clock import eventually
from tests.kube.cluster import MERGE_PATCH, VMIS, Cluster, begin, end, start, vmi
from tests.kube.gate import Gate, gate
from tests.kube.world import PACE, LocalNode

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

SEEDS = [int(seed) for seed in os.environ.get("MIGPROXY_CHAOS_SEEDS", "1,2").split(",")]
MOST_VMIS = 40
ADDRESSES = {"node01": "127.77.0.1", "node02": "127.77.0.2"}


class Virtualisation:
    """Plays KubeVirt: makes, migrates and deletes VMIs at random, as it would, and sometimes as nobody should."""

    def __init__(self, kubernetes: Cluster, nodes: list[LocalNode], chance: random.Random) -> None:
        self.changes = 0
        self._kubernetes = kubernetes
        self._nodes = nodes
        self._chance = chance
        self._numbers = itertools.count(1)
        self._migrations: dict[str, str] = {}
        """VMI to the stage of its migration: "", begun, started."""
        self._homes: dict[str, str] = {}

    async def change(self) -> None:
        self.changes += 1
        names = sorted(self._migrations)
        if len(names) < 5 or (len(names) < MOST_VMIS and self._chance.random() < 0.1):
            await self._boot()
            return
        name = self._chance.choice(names)
        stage = self._migrations[name]
        action = self._chance.random()
        if action < 0.03:
            del self._migrations[name]
            await self._kubernetes.request("DELETE", f"{VMIS}/{name}")
        elif action < 0.35:
            await self._patch(name, {"metadata": {"annotations": {"changed": str(self.changes)}}})
        elif stage == "":
            await self._begin(name)
        elif stage == "begun" and action < 0.6:
            await self._start(name)
        elif stage == "begun" and action < 0.65:
            await self._patch(name, {"status": {"migrationState": {"targetNodeAddress": "192.0.2.1"}}})
        else:
            await self._end(name, failed=self._chance.random() < 0.3)

    async def _boot(self) -> None:
        name = f"vmi-{next(self._numbers)}"
        home = self._chance.choice(list(ADDRESSES))
        document = await self._kubernetes.request("POST", VMIS, vmi(name, node=home))
        for node in self._nodes:
            node.boot_launcher(document["metadata"]["uid"])
        self._migrations[name], self._homes[name] = "", home

    async def _begin(self, name: str) -> None:
        self._migrations[name] = "begun"
        old = await self._kubernetes.request("GET", f"{VMIS}/{name}")
        fields = dict.fromkeys(old["status"].get("migrationState") or ())
        patch = begin(f"migration-{next(self._numbers)}", *self._ends(name))
        patch["status"]["migrationState"] = fields | patch["status"]["migrationState"]
        await self._patch(name, patch)

    async def _start(self, name: str) -> None:
        """Mostly after the target has published, as virt-controller does."""
        state = (await self._kubernetes.request("GET", f"{VMIS}/{name}"))["status"]["migrationState"]
        if "targetDirectMigrationNodePorts" in state or self._chance.random() < 0.05:
            self._migrations[name] = "started"
            await self._patch(name, start())

    async def _end(self, name: str, *, failed: bool) -> None:
        source, target = self._ends(name)
        self._migrations[name] = ""
        self._homes[name] = source if failed else target
        await self._patch(name, end(source, target, failed=failed))

    def _ends(self, name: str) -> tuple[str, str]:
        home = self._homes[name]
        (other,) = set(ADDRESSES) - {home}
        return home, other

    async def _patch(self, name: str, patch: dict[str, Any]) -> None:
        await self._kubernetes.request("PATCH", f"{VMIS}/{name}", patch, MERGE_PATCH)


class Trouble:
    """Makes the way to the API server fail, each time in another way."""

    def __init__(self, kubernetes: Cluster, doors: list[Gate], chance: random.Random) -> None:
        self.seen: Counter[str] = Counter()
        self._kubernetes = kubernetes
        self._doors = doors
        self._chance = chance
        kinds = ["cut", "stall", "expire", "401", "410", "429", "500", "503", "away", "conflict", "compact"]
        chance.shuffle(kinds)
        self._kinds = itertools.cycle(kinds)

    async def make(self) -> None:
        door = self._chance.choice(self._doors)
        kind = next(self._kinds)
        self.seen[kind] += 1
        double = self._kubernetes.double
        if kind == "cut":
            door.cut()
        elif kind == "stall":
            door.stall()
        elif kind == "expire":
            await door.expire()
        elif kind.isdecimal():
            left = iter(range(self._chance.randrange(1, 12)))
            door.refuse = lambda request: int(kind) if next(left, None) is not None else None
            door.cut()
        elif kind == "away":
            await door.close()
            await asyncio.sleep(self._chance.uniform(0, 0.2))
            await door.open()
        elif double and kind == "conflict":
            double.faults.conflicts = 2
        elif double and kind == "compact":
            double.faults.gone_as_event = self._chance.random() < 0.5
            double.compact()
            door.cut()

    async def end(self) -> None:
        for door in self._doors:
            door.refuse = lambda request: None
        if self._kubernetes.double:
            self._kubernetes.double.faults.conflicts = 0


@pytest.fixture
async def doors(kubernetes: Cluster) -> AsyncIterator[list[Gate]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(gate(kubernetes.url, kubernetes.tls)) for _ in ADDRESSES]


@pytest.mark.parametrize(
    ("seed", "changes", "troubles"),
    [(0, 400, 0.05), *(pytest.param(seed, 1500, 0.02, marks=pytest.mark.tier("soak")) for seed in SEEDS)],
)
async def test_final_state_is_what_the_plan_says(
    kubernetes: Cluster, doors: list[Gate], tmp_path: Path, seed: int, changes: int, troubles: float
) -> None:
    print(f"seed {seed}: repeat with MIGPROXY_CHAOS_SEEDS={seed}")
    chance = random.Random(seed)
    nodes = [LocalNode(name, address, tmp_path) for name, address in ADDRESSES.items()]
    await kubernetes.use_handlers_token()
    if (
        kubernetes.double
    ):  # a watch to which nothing happens tells its bookmarks, before its silence counts as a failure
        kubernetes.double.faults.bookmark_seconds = PACE.silence / 2
    async with AsyncExitStack() as stack:
        for node, door in zip(nodes, doors, strict=True):
            kubeconfig = kubernetes.kubeconfig(tmp_path, node.name, door.url)
            await stack.enter_async_context(node.run(kubeconfig))
        kubevirt, trouble = Virtualisation(kubernetes, nodes, chance), Trouble(kubernetes, doors, chance)
        for _ in range(changes):
            # A conflict that is meant for migproxy may hit this test instead.
            await retried(kubevirt, trouble)
            if chance.random() < troubles:
                await trouble.make()
            await asyncio.sleep(chance.uniform(0, 0.01))
        await trouble.end()
        assert len(trouble.seen) == 11, trouble.seen
        for node in nodes:
            await assert_runs_as_planned(kubernetes, node)
        assert_nothing_was_published_twice(doors, at_least=changes // 30)
        assert_every_event_was_written_once(doors)
    for node in nodes:
        assert node.socket_files() == set()
        assert node.tcp_ports() == set()


async def retried(kubevirt: Virtualisation, trouble: Trouble) -> None:
    double = kubevirt._kubernetes.double
    kept = 0
    if double:
        kept, double.faults.conflicts = double.faults.conflicts, 0
    await kubevirt.change()
    if double:
        double.faults.conflicts = kept


async def assert_runs_as_planned(kubernetes: Cluster, node: LocalNode) -> None:
    async def difference() -> list[str]:
        items = (await kubernetes.request("GET", VMIS))["items"]
        mine = [
            item
            for item in items
            if node.name in (item["metadata"]["labels"].get(key) for key in ("kubevirt.io/nodeName", TARGET_NODE_LABEL))
        ]
        plan = make_plan([parse(item) for item in mine], node.name, [node.address], datetime.now(UTC))
        served = {
            (one["vmi_uid"], one["migration_uid"], one["role"]): one
            for one in node.migrations()
            if one["state"] in ("prepared", "running")
        }
        proxies: list[SourceProxy | TargetProxy] = [*plan.sources, *plan.targets]
        planned = {(p.migration.vmi_uid, p.migration.migration_uid, p.role): p for p in proxies}
        ports = {port for target in plan.targets for port in (target.published or {}).values()}
        unpublished = [
            target.migration for target in plan.targets if set(target.published or ()) < set(target.channels)
        ]
        # What was there when a migration came to be held goes on, in case it is only misunderstood.
        held = {(one.migration.vmi_uid, one.migration.migration_uid, one.role) for one in plan.held}
        for one in node.migrations():
            if (one["vmi_uid"], one["migration_uid"], one["role"]) in held and one["role"] == "target":
                ports |= {int(channel["listening"].rpartition(":")[2]) for channel in one.get("channels", ())}
        files = {f"{p.migration.vmi_uid}/{source_socket_name(p.key, c)}" for p in plan.sources for c in p.ports}
        return [
            f"{what}: planned {wanted}, there is {found}"
            for what, wanted, found in (
                ("VMIs", len(mine), node.node.report()["vmis"]),
                ("proxies", set(planned), set(served)),
                ("unpublished", [], unpublished),
                ("ports", ports, node.tcp_ports()),
                ("sockets", files, node.socket_files()),
                ("problems", {}, node.node.problems),
            )
            if wanted != found
        ]

    deadline = asyncio.get_running_loop().time() + 60
    while differences := await difference():
        assert asyncio.get_running_loop().time() < deadline, "\n".join([node.name, *differences])
        await asyncio.sleep(0.1)


def assert_nothing_was_published_twice(doors: list[Gate], at_least: int) -> None:
    published: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in itertools.chain.from_iterable(door.passed for door in doors):
        if one.method == "PATCH" and "virtualmachineinstances" in one.path and one.status == 200:
            tests = {step["path"]: step["value"] for step in one.body if step["op"] == "test"}
            values = {step["path"]: step["value"] for step in one.body if step["op"] == "add"}
            published[tests["/metadata/uid"], tests["/status/migrationState/migrationUid"]].append(str(values))
    assert len(published) >= at_least
    assert {key: values for key, values in published.items() if len(values) != len(set(values))} == {}


def assert_every_event_was_written_once(doors: list[Gate]) -> None:
    created: Counter[str] = Counter()
    counts: Counter[tuple[str, int]] = Counter()
    for one in itertools.chain.from_iterable(door.passed for door in doors):
        if one.path.endswith("/events") and one.status == 201:
            created[one.body["metadata"]["name"]] += 1
        elif "/events/" in one.path and one.status == 200 and "count" in one.body:
            counts[one.path, one.body["count"]] += 1
    assert created
    assert max(created.values()) == 1
    assert max(counts.values(), default=1) == 1


async def test_burst_of_changes_is_one_reconcile_of_the_last_state(kubernetes: Cluster, tmp_path: Path) -> None:
    node = LocalNode("node01", ADDRESSES["node01"], tmp_path)
    async with node.run(kubernetes.kubeconfig(tmp_path, "node01")):
        made = await kubernetes.request("POST", VMIS, vmi("one"))
        node.boot_launcher(made["metadata"]["uid"])
        await kubernetes.request("PATCH", f"{VMIS}/one", begin("first"), MERGE_PATCH)
        for number in range(1, 200):
            state = {"targetNodeAddress": "127.77.0.2", "targetDirectMigrationNodePorts": {str(number): 0}}
            await kubernetes.request("PATCH", f"{VMIS}/one", {"status": {"migrationState": state}}, MERGE_PATCH)
            clear = {"status": {"migrationState": {"targetDirectMigrationNodePorts": {str(number): None}}}}
            await kubernetes.request("PATCH", f"{VMIS}/one", clear, MERGE_PATCH)
        last = {"status": {"migrationState": {"targetDirectMigrationNodePorts": {"4242": 0}}}}
        await kubernetes.request("PATCH", f"{VMIS}/one", last, MERGE_PATCH)
        await eventually(lambda: "4242" in str(node.migration("one").get("channels")), "the last state")
        assert node.migration("one")["state"] == "prepared"
