"""A model of a migration beside virt-handler: every order of everybody's steps, with kills at each.

The decisions are the daemons' own (`make_plan`), so are their requests (`Announcements`), and the API server is the
double with daemonset.yaml's policies in force. Each state is visited once, until there is no new one. A daemon's steps
are as small as they can be told apart: it hears of the VMI, it acts on what it knows by then, it is killed and started
anew. What becomes of a connection is what tests/kube/test_beside_paths.py shows of real ones.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from ipaddress import ip_address
from typing import Any

import pytest
import yaml

from migproxy import vmi as instances
from migproxy.announcement import TARGET_ANNOTATION, Announcement
from migproxy.inventory import PublishError
from migproxy.inventory.announcements import Announcements
from migproxy.kube.api import ApiError
from migproxy.plan import Plan, Readiness, make_plan
from migproxy.portmap import Channel, PortMap
from tests.kube.apiserver import ApiDouble, Object, Refusal, Target, User, apply_json_patch, apply_merge_patch
from tests.kube.cluster import MANIFESTS, NODES, begin, end, start, vmi
from tests.virt_handler import published

pytestmark = pytest.mark.tier("gate")

SOURCE, TARGET = NODES
ADDRESS = ip_address("10.1.1.2")
STEPS = (
    *("publish", "listen", "start", "end", "strip"),
    *("target_hears", "target_acts", "target_is_killed", "target_is_started"),
    *("source_hears", "source_acts", "source_is_killed", "source_is_started", "failsafe"),
)

VMI = Target("kubevirt.io", "v1", "virtualmachineinstances", "default", "one", "")
SOMEBODY = User("somebody", ())


@dataclass(frozen=True)
class Daemon:
    """One of ours.

    Attributes:
        alive: Whether it runs.
        known: The VMI as it has heard of it, in JSON; None before.
        lives: How many there have been on the node.
    """

    alive: bool = True
    known: str | None = None
    lives: int = 1


@dataclass(frozen=True)
class World:
    """Everything that there is.

    Attributes:
        vmi: As the API server has it, in JSON.
        source, target: The two nodes' daemons.
        theirs: virt-handler's socket stands at the source's path, or is kept behind ours.
        ours: Ours stands there.
        listens: Where the target's relay listens, whether a daemon accepts there or not.
        stripped: Whether somebody has taken the announcement away.
    """

    vmi: str
    source: Daemon = Daemon()
    target: Daemon = Daemon()
    theirs: bool = False
    ours: bool = False
    listens: PortMap | None = None
    stripped: bool = False

    @property
    def document(self) -> Object:
        return loaded(self.vmi)

    @property
    def state(self) -> Object:
        return dict(self.document["status"]["migrationState"])

    @property
    def announced(self) -> str | None:
        found = self.document["metadata"]["annotations"].get(TARGET_ANNOTATION)
        return str(found) if found else None

    @property
    def path(self) -> str:
        """Where a connection goes that the launcher makes now."""
        if not self.theirs:
            return "nowhere yet"
        if not self.ours:
            return "virt-handler"
        if not self.source.alive:
            return "a dead daemon's queue"
        plan = plan_of(self.source.known, SOURCE)
        ports = plan.sources[0].ports if plan and plan.sources else None
        serves = self.target.alive and self.listens and self.target.known
        return "migproxy" if ports and serves and ports == self.listens else "virt-handler"


@cache
def loaded(text: str) -> Object:
    """A VMI that was written as JSON; not to be changed."""
    return dict(json.loads(text))


@cache
def parsed(text: str) -> instances.VMI:
    return instances.parse(loaded(text))


@cache
def plan_of(known: str | None, node: str) -> Plan | None:
    return make_plan([parsed(known)], node, (), datetime.now(UTC), Readiness(ADDRESS)) if known else None


class Server:
    """The double, whose one VMI is whatever a world says."""

    def __init__(self) -> None:
        self.double = ApiDouble()
        self._answers: dict[tuple[str, str, str], Object | Refusal] = {}
        for document in yaml.safe_load_all(MANIFESTS.read_text()):
            if document["kind"].startswith("Validating"):
                plural = document["kind"].lower().replace("policy", "policies").replace("policiesb", "policyb") + "s"
                plural = plural.removesuffix("s") if plural.endswith("policiess") else plural
                where = Target("admissionregistration.k8s.io", "v1", plural, "", document["metadata"]["name"], "")
                run(self.double._write(where, None, document))

    def patch(self, user: User, document: Object, patch: list[Object] | Object) -> Object:
        """What the API server makes of a patch.

        Raises:
            Refusal: It refuses it.
        """
        asked = (user.name + (user.node or ""), dump(document), json.dumps(patch))
        if asked not in self._answers:
            try:
                if isinstance(patch, list):
                    after = apply_json_patch(document, patch)
                else:
                    after = apply_merge_patch(document, patch)
                self.double._admit(user, VMI, document, after)
                self._answers[asked] = after
            except Refusal as refusal:
                self._answers[asked] = refusal
        answer = self._answers[asked]
        if isinstance(answer, Refusal):
            raise answer
        return answer


def run(coroutine: Any) -> Any:
    """Runs what never waits."""
    try:
        coroutine.send(None)
    except StopIteration as result:
        return result.value
    raise AssertionError("it waits")


class Connection:
    """A daemon's connection to the server, for one request on one world."""

    def __init__(self, server: Server, document: Object, node: str) -> None:
        self.document = document
        self._server, self._user = server, User("system:serviceaccount:kubevirt:migproxy", (), node)

    async def request(
        self, _method: str, _path: str, _query: Any = None, body: Any = None, _content_type: str = ""
    ) -> Any:
        if body is None:
            return self.document
        try:
            self.document = self._server.patch(self._user, self.document, body)
        except Refusal as refusal:
            raise ApiError(refusal.code, str(refusal)) from refusal
        return self.document


class Model:
    """The steps that are possible, and what must hold."""

    def __init__(self) -> None:
        self.server = Server()
        self.outcomes: set[tuple[str, bool]] = set()
        self.visited: set[World] = set()

    def explore(self, first: World) -> None:
        """Takes every step from a world, and from what comes of it."""
        pending = [first]
        while pending:
            world = pending.pop()
            if world in self.visited:
                continue
            self.visited.add(world)
            self._check(world)
            steps: list[World | None] = [getattr(self, name)(world) for name in STEPS]
            pending += [after for after in steps if after is not None and after != world]

    # KubeVirt

    def publish(self, world: World) -> World | None:
        if "targetNodeAddress" in world.state or "endTimestamp" in world.state:
            return None
        written = published(world.document, str(ADDRESS), {"1000": 0, "1001": 49152})
        return replace(world, vmi=dump(written))

    def listen(self, world: World) -> World | None:
        """virt-handler removes what is at the path, ours too, and listens there."""
        if "targetNodeAddress" not in world.state or "startTimestamp" in world.state or "endTimestamp" in world.state:
            return None
        return replace(world, theirs=True, ours=False) if not world.theirs else None

    def start(self, world: World) -> World | None:
        if not world.theirs or "startTimestamp" in world.state:
            return None
        self.outcomes.add((world.path, world.stripped))
        return replace(world, vmi=dump(merge(world.document, start())))

    def end(self, world: World) -> World | None:
        if "endTimestamp" in world.state or "startTimestamp" not in world.state:
            return None
        return replace(world, vmi=dump(merge(world.document, end())), theirs=False, ours=False)

    def strip(self, world: World) -> World | None:
        """Somebody takes the announcement away, once."""
        if world.stripped or world.announced is None:
            return None
        path = f"/metadata/annotations/{TARGET_ANNOTATION.replace('/', '~1')}"
        after = self.server.patch(SOMEBODY, world.document, [{"op": "remove", "path": path}])
        return replace(world, vmi=dump(after), stripped=True)

    # The target's node

    def target_hears(self, world: World) -> World | None:
        return replace(world, target=replace(world.target, known=world.vmi)) if world.target.alive else None

    def target_is_killed(self, world: World) -> World | None:
        """Its relay keeps the listeners."""
        return replace(world, target=Daemon(alive=False)) if world.target.alive and world.target.lives == 1 else None

    def target_is_started(self, world: World) -> World | None:
        return None if world.target.alive else replace(world, target=Daemon(lives=2))

    def target_acts(self, world: World) -> World | None:
        """Makes its listeners as the plan has them, then announces or withdraws."""
        plan = plan_of(world.target.known, TARGET) if world.target.alive else None
        if plan is None:
            return None
        item = next(iter(plan.targets), None)
        started_without = any(one.role == "target" for one in plan.bypassed) and world.listens is not None
        if item:
            ports = item.published or world.listens or PortMap.of({Channel.LIBVIRT: 2000, Channel.DIRECT: 2001})
            world = replace(world, listens=ports)
        elif not plan.held and not started_without:
            world = replace(world, listens=None)
        known = parsed(str(world.target.known))
        connection = Connection(self.server, world.document, TARGET)
        announcements = Announcements(connection)  # type: ignore[arg-type]
        try:
            if item and item.announce and world.listens:
                announcement = Announcement(item.migration.migration_uid, world.listens, ADDRESS)
                if known.announced != str(announcement):
                    run(announcements.announce(known, announcement))
            elif plan.stale:
                run(announcements.withdraw(known, lambda now: bool(stale(now, TARGET))))
        except PublishError:
            pass
        after = replace(world, vmi=dump(connection.document))
        assert after.document["status"] == world.document["status"], "what virt-handler publishes has been changed"
        return after

    # The source's node

    def source_hears(self, world: World) -> World | None:
        return replace(world, source=replace(world.source, known=world.vmi)) if world.source.alive else None

    def source_is_killed(self, world: World) -> World | None:
        return replace(world, source=Daemon(alive=False)) if world.source.alive and world.source.lives == 1 else None

    def source_is_started(self, world: World) -> World | None:
        return None if world.source.alive else replace(world, source=Daemon(lives=2))

    def source_acts(self, world: World) -> World | None:
        plan = plan_of(world.source.known, SOURCE) if world.source.alive else None
        if plan is None:
            return None
        if plan.sources and plan.sources[0].beside:
            enters = not plan.sources[0].beside.stays_out
            return replace(world, ours=world.theirs and (world.ours or enters))
        return replace(world, ours=False)

    def failsafe(self, world: World) -> World | None:
        """What it does when the source's daemon is dead."""
        return None if world.source.alive else replace(world, ours=False)

    # What must hold

    def _check(self, world: World) -> None:
        if world.path == "a dead daemon's queue":
            after = self.failsafe(world)
            assert after
            assert after.path == "virt-handler"
            return
        assert world.path in ("migproxy", "virt-handler", "nowhere yet")
        is_open = not {"startTimestamp", "endTimestamp"} & world.state.keys()
        if is_open and world.source.alive and world.target.alive:
            settled = self._settle(world, "publish", "listen")
            assert settled.path == "migproxy", f"both are in time, and it goes elsewhere: {settled}"
        if "startTimestamp" in world.state and world.path == "migproxy" and world.announced:
            assert self._settle(world).path == "migproxy", f"what runs goes on elsewhere: {world}"
        if "endTimestamp" in world.state:
            settled = self._settle(world)
            if world.target.alive:
                assert (settled.listens, settled.announced) == (None, None)
            if world.source.alive:
                assert not settled.ours

    def _settle(self, world: World, *more: str) -> World:
        """Everybody who is there does what is due."""
        for _ in range(3):
            for name in (*more, "target_hears", "target_acts", "source_hears", "source_acts"):
                world = getattr(self, name)(world) or world
        return world


def stale(now: instances.VMI, node: str) -> tuple[str, ...]:
    return make_plan([now], node, (), datetime.now(UTC), Readiness(ADDRESS)).stale


def merge(document: Object, patch: Mapping[str, Any]) -> Object:
    result = copy.deepcopy(document)
    for name, value in patch.items():
        if isinstance(value, Mapping):
            result[name] = merge(result.get(name, {}), value)
        elif value is None:
            result.pop(name, None)
        else:
            result[name] = "2026-08-01T12:00:00Z" if name.endswith("Timestamp") else value
    return result


def dump(document: Object) -> str:
    return json.dumps(document, sort_keys=True)


def test_every_order_of_steps_leaves_a_path_that_works() -> None:
    document = merge(vmi("one"), begin("first"))
    document["metadata"] |= {"uid": "uid-of-one", "resourceVersion": "1"}
    model = Model()
    model.explore(World(dump(document)))
    paths = {path for path, _ in model.outcomes}
    assert paths == {"migproxy", "virt-handler", "a dead daemon's queue"}
    assert len(model.visited) > 1000
