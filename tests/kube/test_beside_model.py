"""A model of a target beside virt-handler: every order of the steps of the two.

The decisions are the daemon's own (`make_plan`), so are its requests (`Announcements`), and the API server is the
double with deploy/beside-virt-handler's policies in force. Each state is visited once, until there is no new one. The
daemon's steps are as small as they can be told apart: it hears of the VMI, it looks at its namespace, it acts on what
it knows by then, it is killed and started anew.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from ipaddress import ip_address
from typing import Any

import pytest
import yaml

from migproxy import vmi as instances
from migproxy.announcement import TARGET_ANNOTATION, Announcement, parse_announcement
from migproxy.inventory import PublishError
from migproxy.inventory.announcements import Announcements
from migproxy.kube.api import ApiError
from migproxy.plan import Beside, Migration, Plan, TargetProxy, is_forsaken, make_plan
from migproxy.portmap import Channel, IPAddress, PortMap
from tests.kube.apiserver import ApiDouble, Object, Refusal, Target, User, apply_json_patch
from tests.kube.cluster import BESIDE, MANIFESTS, begin, end, start, vmi
from tests.virt_handler import published

pytestmark = pytest.mark.tier("gate")

HERE = "node02"
ADDRESSES = ("10.1.1.2", "10.1.1.3")
DEPTH = 40  # the last new state comes long before
STEPS = ["listen", "publish", "move", "begin", "hear", "look", "act", "kill", "revive", "retreat", "strip"]

VMI = Target("kubevirt.io", "v1", "virtualmachineinstances", "default", "one", "")
MIGRATION = Migration("default", "one", "uid-of-one", "first")
VIRT_HANDLER = User("system:serviceaccount:kubevirt:kubevirt-handler", ())
SOMEBODY = User("somebody", ())
MIGPROXY = User("system:serviceaccount:kubevirt:migproxy", (), HERE)


@dataclass(frozen=True)
class World:
    """Everything that there is.

    Attributes:
        vmi: As the API server has it, in JSON.
        moves: How often virt-handler has been started anew in another namespace, at another address.
        theirs: virt-handler's ports, None before it listens.
        alive: Whether a daemon of ours runs.
        known: The VMI as that one has heard of it, in JSON; None before.
        address: virt-handler's address as that one knows it.
        ours: Where that one listens: how often virt-handler had moved by then, and the ports.
        lives: How many daemons of ours there have been.
        stripped: Whether somebody else has taken the announcement away.
    """

    vmi: str
    moves: int = 0
    theirs: tuple[int, int] | None = None
    alive: bool = True
    known: str | None = None
    address: str | None = None
    ours: tuple[int, PortMap] | None = None
    lives: int = 1
    stripped: bool = False

    @property
    def document(self) -> Object:
        return loaded(self.vmi)

    @property
    def state(self) -> Object:
        return dict(self.document["status"]["migrationState"])

    @property
    def their_address(self) -> str:
        return ADDRESSES[self.moves]

    @property
    def published(self) -> dict[str, int] | None:
        ports = self.state.get("targetDirectMigrationNodePorts")
        return dict(ports) if ports else None

    @property
    def leads_to(self) -> str:
        """Whose listeners the status leads to: "us", "virt-handler", or "nobody"."""
        if self.state.get("targetNodeAddress") != self.their_address or self.published is None:
            return "nobody"
        if self.theirs and self.published == as_published(self.theirs):
            return "virt-handler"
        if self.alive and self.ours and self.ours[0] == self.moves and self.published == self.ours[1].published():
            return "us"
        return "nobody"


@cache
def loaded(text: str) -> Object:
    """A VMI that was written as JSON; not to be changed."""
    return dict(json.loads(text))


@cache
def parsed(text: str) -> instances.VMI:
    return instances.parse(loaded(text))


def as_published(ports: tuple[int, int]) -> dict[str, int]:
    return {str(ports[0]): 0, str(ports[1]): 49152}


class Server:
    """The double, whose one VMI is whatever a world says; stands in for the daemon's connection to it, too."""

    def __init__(self, *, policy: bool, guard: bool) -> None:
        self.double = ApiDouble()
        self._answers: dict[tuple[str, str, str], Object | Refusal] = {}
        documents = [
            *(yaml.safe_load_all((BESIDE / "guard.yaml").read_text()) if guard else ()),
            *(yaml.safe_load_all((BESIDE / "policy.yaml").read_text()) if policy else ()),
            *(one for one in yaml.safe_load_all(MANIFESTS.read_text()) if one["kind"].startswith("Validating")),
        ]
        for document in documents:
            plural = document["kind"].lower().replace("policy", "policies").replace("policiesbinding", "policybindings")
            if document["metadata"]["name"] == "migproxy" and "spec" in document and "validations" in document["spec"]:
                document["spec"] |= yaml.safe_load((BESIDE / "rules.yaml").read_text())["spec"]
            where = Target("admissionregistration.k8s.io", "v1", plural, "", document["metadata"]["name"], "")
            self.run(self.double._write(where, None, document))

    @staticmethod
    def run(coroutine: Any) -> Any:
        """Runs what never waits."""
        try:
            coroutine.send(None)
        except StopIteration as result:
            return result.value
        raise AssertionError("it waits")

    def patch(self, user: User, document: Object, patch: list[Object]) -> Object:
        """What the API server makes of a patch.

        Raises:
            Refusal: It refuses it.
        """
        return self._answer(user, document, json.dumps(patch), lambda: apply_json_patch(document, patch))

    def put(self, user: User, document: Object, after: Object) -> Object:
        """What the API server makes of a whole object.

        Raises:
            Refusal: It refuses it.
        """
        return self._answer(user, document, dump(after), lambda: after)

    def _answer(self, user: User, document: Object, body: str, wanted: Callable[[], Object]) -> Object:
        asked = (user.name, dump(document), body)
        if asked not in self._answers:
            try:
                after = self.double._mutate(user, VMI, document, wanted())
                self.double._admit(user, VMI, document, after)
                self._answers[asked] = after
            except Refusal as refusal:
                self._answers[asked] = refusal
        answer = self._answers[asked]
        if isinstance(answer, Refusal):
            raise answer
        return answer


class Connection:
    """The daemon's connection to the server, for one request on one world."""

    def __init__(self, server: Server, document: Object) -> None:
        self.document = document
        self._server = server

    async def request(
        self, _method: str, _path: str, _query: Any = None, body: Any = None, _content_type: str = ""
    ) -> Any:
        if body is None:
            return self.document
        try:
            self.document = self._server.patch(MIGPROXY, self.document, body)
        except Refusal as refusal:
            raise ApiError(refusal.code, str(refusal)) from refusal
        return self.document


class Model:
    """The steps that are possible, and what must hold."""

    def __init__(self, *, policy: bool, guard: bool = True) -> None:
        self.server = Server(policy=policy, guard=guard)
        self.policy = policy
        self.outcomes: set[str] = set()
        self._visited: dict[World, int] = {}
        self._settled: set[World] = set()

    def explore(self, world: World, depth: int) -> None:
        """Takes every step from a world, and from what comes of it."""
        if self._visited.get(world, -1) >= depth:
            return
        self._visited[world] = depth
        if world not in self._settled:
            self._settled.add(world)
            (self._check_settled if world.alive else self._check_left_alone)(world)
        if depth:
            for name in STEPS:
                after = getattr(self, name)(world)
                if after is not None and after != world:
                    self.explore(after, depth - 1)

    @property
    def states(self) -> int:
        """How many it has visited."""
        return len(self._visited)

    # virt-handler, and the source

    def listen(self, world: World) -> World | None:
        port = 1000 + 100 * world.moves
        return replace(world, theirs=(port, port + 1)) if world.theirs is None else None

    def publish(self, world: World) -> World | None:
        state = world.state
        if world.theirs is None or "startTimestamp" in state or state.get("targetNodeAddress") == world.their_address:
            return None
        written = published(world.document, world.their_address, as_published(world.theirs))
        after = replace(world, vmi=dump(self.server.put(VIRT_HANDLER, world.document, written)))
        announced = parse_announcement(world.document["metadata"]["annotations"].get("migproxy.io/target"))
        in_time = announced is not None and str(announced.address) == world.their_address and self.policy
        assert after.published == (announced.ports.published() if in_time and announced else as_published(world.theirs))
        return after

    def move(self, world: World) -> World | None:
        if world.moves + 1 == len(ADDRESSES) or "startTimestamp" in world.state:
            return None
        return replace(world, moves=world.moves + 1, theirs=None)

    def begin(self, world: World) -> World | None:
        if world.leads_to == "nobody" or "startTimestamp" in world.state:
            return None
        self.outcomes.add(world.leads_to)
        return replace(world, vmi=dump(merge(world.document, start())))

    def strip(self, world: World) -> World | None:
        """Somebody takes the announcement away, once, where the guard lets them."""
        if world.stripped or announced(world) is None:
            return None
        path = f"/metadata/annotations/{TARGET_ANNOTATION.replace('/', '~1')}"
        try:
            after = self.server.patch(SOMEBODY, world.document, [{"op": "remove", "path": path}])
        except Refusal:
            return None
        return replace(world, vmi=dump(after), stripped=True)

    # Us

    def hear(self, world: World) -> World | None:
        return replace(world, known=world.vmi) if world.alive else None

    def look(self, world: World) -> World | None:
        return replace(world, address=world.their_address) if world.alive else None

    def kill(self, world: World) -> World | None:
        return replace(world, alive=False, known=None, address=None, ours=None) if world.lives == 1 else None

    def revive(self, world: World) -> World | None:
        return None if world.alive else replace(world, alive=True, lives=world.lives + 1)

    def retreat(self, world: World) -> World | None:
        """What the failsafe does when the daemon is dead."""
        known = parsed(world.vmi)
        if world.alive or not is_forsaken(known, HERE):
            return None
        connection = Connection(self.server, world.document)
        announcements = Announcements(connection)  # type: ignore[arg-type]
        self.server.run(announcements.withdraw(known, lambda now: is_forsaken(now, HERE)))
        return replace(world, vmi=dump(connection.document))

    def act(self, world: World) -> World | None:
        """Makes its listeners as the plan has them, then announces or withdraws."""
        if not world.alive or world.known is None:
            return None
        known = parsed(world.known)
        address = ip_address(world.address) if world.address else None
        plan = self._plan(world, known, address)
        item = next(iter(plan.targets), None)
        world = replace(world, ours=self._listeners(world, item) if item or not plan.held else world.ours)
        connection = Connection(self.server, world.document)
        announcements = Announcements(connection)  # type: ignore[arg-type]
        try:
            if item and item.announce and world.ours and address:
                announcement = Announcement(item.migration.migration_uid, world.ours[1], address)
                if known.announced != str(announcement):
                    self.server.run(announcements.announce(known, announcement))
            elif plan.stale:
                self.server.run(announcements.withdraw(known, lambda now: bool(self._plan(world, now, address).stale)))
        except PublishError:
            pass
        after = replace(world, vmi=dump(connection.document))
        assert after.published == world.published, "an announcement has changed what is published"
        return after

    @staticmethod
    def _plan(world: World, known: instances.VMI, address: IPAddress | None) -> Plan:
        serving = {}
        if world.ours:
            place, ports = world.ours
            serving[MIGRATION] = Announcement(MIGRATION.migration_uid, ports, ip_address(ADDRESSES[place]))
        return make_plan([known], HERE, (), datetime.now(UTC), Beside(address, serving=serving))

    @staticmethod
    def _listeners(world: World, item: TargetProxy | None) -> tuple[int, PortMap] | None:
        """Where it listens from now on: at the address that it has looked at last."""
        if item is None:
            return None
        if item.running and world.ours:
            return world.ours
        place = ADDRESSES.index(world.address) if world.address else world.moves
        if item.published is not None:
            return place, item.published
        if world.ours and world.ours[0] == place:
            return world.ours
        port = 2000 + 100 * place + 10 * world.lives
        return place, PortMap.of({Channel.LIBVIRT: port, Channel.DIRECT: port + 1})

    # What must hold

    def _check_settled(self, world: World) -> None:
        """Once everybody has done what is due, the status leads to a listener."""
        for _ in range(4):
            for name in ("listen", "publish", "look", "hear", "act"):
                world = getattr(self, name)(world) or world
        if "startTimestamp" not in world.state:
            assert world.leads_to in ("us", "virt-handler"), world
        if world.leads_to != "us":
            assert world.ours is None, f"listens, and nothing leads there: {world}"
            assert announced(world) is None, f"announces, and nothing leads there: {world}"
        ended = replace(world, vmi=dump(merge(world.document, end())))
        for name in ("hear", "act", "hear", "act"):
            ended = getattr(self, name)(ended) or ended
        assert (ended.ours, announced(ended)) == (None, None)

    def _check_left_alone(self, world: World) -> None:
        """Though no daemon follows: all but what is published already is as if there had never been one."""
        for _ in range(2):
            for name in ("retreat", "listen", "publish"):
                world = getattr(self, name)(world) or world
        text = parse_announcement(announced(world))
        if text is not None:
            assert world.published == text.ports.published(), f"announces, and nobody listens: {world}"
            self.outcomes.add("left behind")
        elif "startTimestamp" not in world.state:
            assert world.leads_to == "virt-handler", world


def announced(world: World) -> str | None:
    text = world.document["metadata"]["annotations"].get("migproxy.io/target")
    return str(text) if text else None


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


def first_world() -> World:
    document = merge(vmi("one"), begin("first"))
    document["metadata"] |= {"uid": "uid-of-one", "resourceVersion": "1"}
    return World(dump(document))


def test_every_order_of_steps_leads_to_a_listener() -> None:
    model = Model(policy=True)
    model.explore(first_world(), DEPTH)
    assert model.outcomes == {"us", "virt-handler", "left behind"}
    assert model.states > 500


def test_what_is_published_stays_served_though_somebody_takes_the_announcement_away_without_the_guard() -> None:
    model = Model(policy=True, guard=False)
    model.explore(
        replace(first_world(), lives=2), DEPTH
    )  # the successor of one that is killed could not know its ports
    assert model.outcomes == {"us", "virt-handler"}


@pytest.mark.tier("soak")
def test_without_the_policy_every_order_leads_to_virt_handler() -> None:
    model = Model(policy=False)
    model.explore(first_world(), DEPTH)
    assert model.outcomes == {"virt-handler"}
