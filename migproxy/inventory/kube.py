"""VMIs from the API server: watched as virt-handler watches them, published to by guarded JSON patches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from migproxy.health import WatchHealth
from migproxy.inventory import FAILED, PublishError
from migproxy.kube.api import JSON_PATCH, ApiError, ApiServer
from migproxy.kube.events import EventRecorder
from migproxy.kube.reflector import Listed, Pace, Reflector
from migproxy.limit import Limit
from migproxy.portmap import IPAddress, PortMap
from migproxy.vmi import TARGET_NODE_LABEL, VMI, InvalidVMI, parse

log = structlog.get_logger(__name__)

NODE_LABEL: Final = "kubevirt.io/nodeName"
LISTENING: Final = "MigrationProxyListening"
RESOURCE: Final = "/apis/kubevirt.io/v1/virtualmachineinstances"
PUBLISH_ATTEMPTS: Final = 5
LEAVING_SECONDS: Final = 0.5
"""How long a VMI must have been in neither watch to be gone."""

_LABELS: Final = (NODE_LABEL, TARGET_NODE_LABEL)
_IDENTITY: Final = ("namespace", "name", "uid")
_MIGRATION: Final = "/status/migrationState"
SIDE_FIELDS: Final = {
    "targetNodeAddress": "nodeAddress",
    "targetDirectMigrationNodePorts": "directMigrationNodePorts",
}
_SET_BACK: Final = (
    "the API server took the patch and kept the status as it was: virt-api's mutating webhook for VMIs sets it back "
    "for all accounts but KubeVirt's own (run as its ServiceAccount kubevirt-handler, or without --publish-status)"
)
_VERBS: Final = {"get": "get", "list": "list and watch", "patch": "patch"}


@dataclass(frozen=True, slots=True)
class _Seen:
    """A VMI as the API server has it.

    Attributes:
        vmi: None where it cannot be read.
        identity: Of one that cannot be read: a VMI with nothing but its name and UID, where at least these can.
        problem: Why it cannot.
        version: Its resourceVersion.
        migration: status.migrationState as it stands there.
    """

    vmi: VMI | None
    identity: VMI | None
    problem: str | None
    version: str
    migration: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Published:
    """What was written, until the watch tells of it."""

    migration_uid: str | None
    values: Mapping[str, Any]
    version: str


class KubeInventory:
    """An `Inventory` of the VMIs that run on a node, and of those that migrate to it.

    Args:
        api: The API server.
        node: This node's name.
        pace: How the VMIs are followed.
    """

    def __init__(self, api: ApiServer, node: str, pace: Pace | None = None) -> None:
        self._api = api
        self._recorder = EventRecorder(api, node)
        self._reflectors = [
            Reflector(api, RESOURCE, {"labelSelector": f"{label} in ({node})"}, _read, pace or Pace())
            for label in _LABELS
        ]
        self._streams: list[dict[str, _Seen] | None] = [None for _ in self._reflectors]
        self._told: dict[str, VMI] = {}
        self._flaws: dict[str, str] = {}
        self._flaw_lines: Limit[str] = Limit(
            lambda uid, count: log.error("VMI cannot be read, in further ways", uid=uid, count=count)
        )
        self._published: dict[str, _Published] = {}
        self._untold: set[str] = set()
        self._leaving: dict[str, float] = {}
        self._news = asyncio.Event()

    @property
    def health(self) -> WatchHealth:
        """How the watches do: the one that was silent for longest, and the breaks and lists of all."""
        heard = [reflector.heard for reflector in self._reflectors if reflector.heard is not None]
        return WatchHealth(
            "kubernetes",
            min(heard) if len(heard) == len(self._reflectors) else None,
            reconnects=sum(reflector.breaks for reflector in self._reflectors),
            relists=sum(max(0, reflector.lists - 1) for reflector in self._reflectors),
        )

    @property
    def problems(self) -> Mapping[str, str]:
        """What keeps VMIs from being followed now: a URL to what it is."""
        return {
            f"{self._api.host}{RESOURCE} ({label})": _remedied(reflector.problem, "list")
            for label, reflector in zip(_LABELS, self._reflectors, strict=True)
            if reflector.problem
        }

    @property
    def flaws(self) -> Mapping[str, str]:
        """What is wrong now with VMIs, by their UIDs."""
        return self._flaws

    def may_hide(self, uid: str) -> bool:
        """See `Inventory.may_hide`."""
        return bool(self.problems) or uid in self._flaws

    async def changes(self) -> AsyncGenerator[Mapping[str, VMI | None], None]:
        """See `Inventory.changes`. What arrives while a batch is dealt with is one batch, of each VMI's last state."""
        tasks = [asyncio.create_task(self._follow(number)) for number in range(len(self._reflectors))]
        tasks.append(asyncio.create_task(self._recorder.run()))
        synchronised = False
        try:
            while True:
                await self._wait(tasks)
                if any(stream is None for stream in self._streams):
                    continue
                batch = self._batch()
                if batch or not synchronised:
                    synchronised = True
                    yield batch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self, tasks: list[asyncio.Task[None]]) -> None:
        news = asyncio.create_task(self._news.wait())
        try:
            done, _ = await asyncio.wait([news, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {news}:
                await task  # they do not end but by a defect of ours: its exception is raised here
        finally:
            news.cancel()
        self._news.clear()

    async def _follow(self, number: int) -> None:
        async with aclosing(self._reflectors[number].changes()) as changes:
            async for change in changes:
                stream = self._streams[number] or {}
                if isinstance(change, Listed):
                    self._untold |= stream.keys() | change.objects.keys()
                    self._published.clear()  # a list is as new as anything that was written before it
                    stream = dict(change.objects)
                else:
                    self._untold.add(change.uid)
                    if change.object is None:
                        stream.pop(change.uid, None)
                    else:
                        stream[change.uid] = change.object
                    self._confirm(change.uid, change.object)
                self._streams[number] = stream
                self._news.set()

    def _confirm(self, uid: str, seen: _Seen | None) -> None:
        published = self._published.get(uid)
        if published and (seen is None or _age(seen.version) >= _age(published.version)):
            del self._published[uid]

    def _current(self, uid: str) -> _Seen | None:
        """The newest of what the streams have of a VMI."""
        found = [stream[uid] for stream in self._streams if stream and uid in stream]
        return max(found, key=lambda seen: _age(seen.version), default=None)

    def _batch(self) -> dict[str, VMI | None]:
        batch: dict[str, VMI | None] = {}
        loop, waiting = asyncio.get_running_loop(), set[str]()
        for uid in self._untold:
            seen, told = self._current(uid), self._told.get(uid)
            self._note_validity(uid, seen)
            if seen is None and told is not None:
                # The watches tell in no common order: it may be on its way from the one to the other.
                if loop.time() < self._leaving.setdefault(uid, loop.time() + LEAVING_SECONDS):
                    waiting.add(uid)
                    continue
                batch[uid] = None
                del self._told[uid]
            elif seen is not None and seen.vmi is not None and seen.vmi != told:
                batch[uid] = self._told[uid] = seen.vmi
            self._leaving.pop(uid, None)
        self._untold = waiting
        if waiting:
            loop.call_at(min(self._leaving[uid] for uid in waiting), self._news.set)
        return batch

    def _note_validity(self, uid: str, seen: _Seen | None) -> None:
        if seen is not None and seen.problem is not None:
            if self._flaws.get(uid) != seen.problem:
                if self._flaw_lines.admits(uid):
                    log.error("VMI cannot be read, its last good state stays in force", uid=uid, error=seen.problem)
                if seen.identity:
                    message = f"this VMI cannot be read, its last good state stays in force: {seen.problem}"
                    self.note(seen.identity, FAILED, message, warning=True)
            self._flaws[uid] = seen.problem
        elif self._flaws.pop(uid, None) is not None:
            log.info("VMI can be read again", uid=uid)

    async def publish(self, vmi: VMI, address: IPAddress, ports: PortMap) -> None:
        """See `Inventory.publish`: a JSON patch of the fields that are ours, which fails if they have changed."""
        values = {"targetNodeAddress": str(address), "targetDirectMigrationNodePorts": ports.published()}
        migration_uid = vmi.migration.migration_uid if vmi.migration else None
        known = self._published.get(vmi.uid)
        if known and (known.migration_uid, known.values) == (migration_uid, values):
            return
        seen, refusal = self._current(vmi.uid), ""
        for _ in range(PUBLISH_ATTEMPTS):
            if seen is None:
                seen = await self._fetch(vmi)
            patch = _patch(vmi, seen, values)
            if not patch:
                return
            try:
                answer = await self._request("PATCH", vmi, patch)
            except ApiError as error:
                if not error.is_conflict:
                    raise PublishError(f"{_who(vmi)}: {_remedied(str(error), 'patch')}") from error
                seen, refusal = None, str(error)
                continue
            wanted, stands = _fields(_read(answer), values)
            if wanted != stands:
                raise PublishError(f"{_who(vmi)}: {_SET_BACK}")
            self._published[vmi.uid] = _Published(migration_uid, values, answer["metadata"]["resourceVersion"])
            self._confirm(vmi.uid, self._current(vmi.uid))  # the watch may have told of it before the answer came
            listed = ", ".join(f"{port} ({channel.label})" for channel, port in ports.items())
            self.note(vmi, LISTENING, f"migration target proxy listens at {address}, ports {listed}")
            return
        raise PublishError(f"{_who(vmi)}: the API server refuses to publish where it listens: {refusal}")

    async def _fetch(self, vmi: VMI) -> _Seen:
        try:
            return _read(await self._request("GET", vmi))
        except ApiError as error:
            raise PublishError(f"{_who(vmi)}: {_remedied(str(error), 'get')}") from error

    async def _request(self, method: str, vmi: VMI, body: Any = None) -> Any:
        path = f"/apis/kubevirt.io/v1/namespaces/{vmi.namespace}/virtualmachineinstances/{vmi.name}"
        return await self._api.request(method, path, None, body, JSON_PATCH if body else "application/json")

    @property
    def has_notes(self) -> bool:
        """Whether something that was noted is not written yet."""
        return self._recorder.has_pending

    def note(self, vmi: VMI, reason: str, message: str, *, warning: bool = False) -> None:
        """See `Inventory.note`: a Kubernetes Event on the VMI."""
        self._recorder.note(vmi, reason, message, warning=warning)


def _read(document: Mapping[str, Any]) -> _Seen:
    status = document.get("status")
    migration = status.get("migrationState") if isinstance(status, Mapping) else None
    vmi = identity = problem = None
    try:
        vmi = parse(document)
    except InvalidVMI as error:
        problem = str(error)
        with suppress(InvalidVMI):
            identity = parse({"metadata": {name: document["metadata"].get(name) for name in _IDENTITY}})
    version = document["metadata"]["resourceVersion"]
    return _Seen(vmi, identity, problem, version, migration if isinstance(migration, Mapping) else {})


def _age(version: str) -> int:
    """Orders versions of one object: the API server's are numbers that grow."""
    return int(version) if version.isdecimal() else 0


def _patch(vmi: VMI, seen: _Seen, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Makes the JSON patch that publishes the values; empty where they stand already.

    Args:
        vmi: The VMI that the caller has in mind.
        seen: As the API server has it.
        values: The fields of status.migrationState and their values.

    Raises:
        PublishError: What the API server has is not what the caller had in mind.
    """
    now = seen.vmi
    if now is None:
        raise PublishError(f"{_who(vmi)}: {seen.problem}")
    if now.uid != vmi.uid or now.migration is None or vmi.migration is None:
        raise PublishError(f"{_who(vmi)}: it was deleted, or its migration taken away, meanwhile")
    if now.migration.migration_uid != vmi.migration.migration_uid or now.is_done():
        raise PublishError(f"{_who(vmi)}: the migration has ended meanwhile")
    wanted, stands = _fields(seen, values)
    if wanted == stands:
        return []
    if now.is_running(datetime.now(UTC)):
        raise PublishError(f"{_who(vmi)}: the migration has started meanwhile: nothing is published any more")
    if _ours(now) != _ours(vmi):
        raise PublishError(f"{_who(vmi)}: somebody has published {_ours(now)[:2]} for it meanwhile")
    guards = {
        "/metadata/uid": vmi.uid,
        f"{_MIGRATION}/migrationUid": seen.migration.get("migrationUid"),
        f"{_MIGRATION}/startTimestamp": seen.migration.get("startTimestamp"),
        f"{_MIGRATION}/endTimestamp": seen.migration.get("endTimestamp"),
        **stands,
    }
    # A test for null holds where the field is absent too, as the API server's JSON patch library has it.
    tests = [{"op": "test", "path": path, "value": value} for path, value in guards.items()]
    return tests + [
        {"op": "add", "path": path, "value": value} for path, value in wanted.items() if stands[path] != value
    ]


def _fields(seen: _Seen, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """By their paths, what is to stand in the fields that a target publishes, and what stands there."""
    wanted = {f"{_MIGRATION}/{field}": value for field, value in values.items()}
    stands = {f"{_MIGRATION}/{field}": seen.migration.get(field) for field in values}
    side = seen.migration.get("targetState")
    if isinstance(side, Mapping):
        for field, value in values.items():
            there = SIDE_FIELDS[field]
            wanted[f"{_MIGRATION}/targetState/{there}"] = value
            stands[f"{_MIGRATION}/targetState/{there}"] = side.get(there)
    return wanted, stands


def _ours(vmi: VMI) -> tuple[object, ...]:
    """What stands in the fields that a target publishes."""
    migration = vmi.migration
    if migration is None:
        return ()
    side = migration.target_state
    fields = (migration.target_node_address, migration.target_ports)
    return (*fields, side.node_address, side.ports) if side else fields


def _who(vmi: VMI) -> str:
    uid = vmi.migration.migration_uid if vmi.migration else None
    return f"VMI {vmi.namespace}/{vmi.name}" + (f" (migration {uid})" if uid else "")


def _remedied(problem: str, verb: str) -> str:
    """Adds what to do about the refusals that somebody can do something about."""
    if problem.startswith("401"):
        return f"{problem} (the token is not accepted: check the ServiceAccount or the kubeconfig)"
    if problem.startswith("403") and "ValidatingAdmissionPolicy" not in problem:
        rule = f'{_VERBS[verb]} on virtualmachineinstances (apiGroup "kubevirt.io")'
        return f"{problem} (allow {rule} in the ClusterRole migproxy: apply daemonset.yaml again)"
    if problem.startswith("404") and verb == "list":
        return f"{problem} (the cluster has no VirtualMachineInstances: install KubeVirt)"
    return problem
