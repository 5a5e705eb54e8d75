"""A test double of the API server: the real protocol over HTTP, with its data in memory.

Lists with paging, resourceVersions and label and field selectors; watches with bookmarks, timeouts and 410 in both
forms; whole objects, JSON and merge patches, with conflicts and no-op writes; Events like any object; bearer tokens
bound to a pod, RBAC and ValidatingAdmissionPolicies, all read from the objects themselves. Any resource may be
created. Custom resources can be left to Kubernetes' own server for them (policyserver/), with the admission of every
write; the double then authenticates and authorizes, as kube-aggregator does. An update of a VMI passes what virt-api's
webhooks do.
"""

import argparse
import asyncio
import base64
import copy
import datetime as dt
import ipaddress
import json
import re
import secrets
import signal
import ssl
import uuid
from bisect import bisect_right
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import celpy
import lark
from aiohttp import web
from celpy import InterpretedRunner, celtypes
from celpy.adapter import json_to_cel
from celpy.evaluation import CELEvalError, Evaluator
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID
from multidict import CIMultiDict
from yarl import URL

Object = dict[str, Any]
Key = tuple[str, str]
"""Namespace ("" where there is none) and name."""

ADMIN_TOKEN = "admin"
ADMISSION = "admissionregistration.k8s.io"
CUSTOM = ("apiextensions.k8s.io", "kubevirt.io")
"""The groups that a server of custom resources has."""
KUBEVIRT_ACCOUNTS = [
    f"system:serviceaccount:kubevirt:kubevirt-{name}"
    for name in ("apiserver", "controller", "handler", "synchronization-controller")
]
"""Who may write a VMI's status."""

KINDS = {
    "serviceaccounts": "ServiceAccount",
    "clusterroles": "ClusterRole",
    "clusterrolebindings": "ClusterRoleBinding",
    "roles": "Role",
    "rolebindings": "RoleBinding",
    "validatingadmissionpolicies": "ValidatingAdmissionPolicy",
    "validatingadmissionpolicybindings": "ValidatingAdmissionPolicyBinding",
    "daemonsets": "DaemonSet",
    "services": "Service",
    "customresourcedefinitions": "CustomResourceDefinition",
    "namespaces": "Namespace",
    "nodes": "Node",
    "pods": "Pod",
}

_RESERVED_LABELS = [
    f"kubevirt.io/{name}"
    for name in (
        "created-by",
        "migrationJobUID",
        "nodeName",
        "migrationTargetNodeName",
        "schedulable",
        "install-strategy",
    )
]
_MATCH_DEFAULTS: Object = {"matchPolicy": "Equivalent", "namespaceSelector": {}, "objectSelector": {}}


class Refusal(Exception):
    """A request is answered with an error."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }

    @property
    def code(self) -> int:
        return int(self.status["code"])  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True, slots=True)
class User:
    """Who asks.

    Args:
        node: of the pod that the token is bound to.
    """

    name: str
    groups: tuple[str, ...]
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is about, by its path."""

    group: str
    version: str
    resource: str
    namespace: str
    name: str
    subresource: str

    @property
    def store(self) -> str:
        return f"{self.group}/{self.resource}"

    @property
    def full_resource(self) -> str:
        return f"{self.resource}.{self.group}" if self.group else self.resource


@dataclass(frozen=True, slots=True)
class Change:
    """A write, in the history that watches read."""

    version: int
    store: str
    before: Object | None
    after: Object | None


@dataclass(slots=True)
class Faults:
    """What the double does on request.

    Args:
        gone_as_event: 410 is told as an ERROR event of an accepted watch, not as an HTTP status.
        bookmark_seconds: between two bookmarks.
        conflicts: how many of the next writes are refused with 409.
    """

    gone_as_event: bool = False
    bookmark_seconds: float = 60.0
    conflicts: int = 0


@dataclass(slots=True)
class ApiDouble:
    """The server's state; `application` makes it answer HTTP.

    Args:
        custom: URL of a server that has the custom resources in the double's place.
        has_virt_api: An update of a VMI passes KubeVirt's webhooks.
    """

    custom: str = ""
    has_virt_api: bool = True
    faults: Faults = field(default_factory=Faults)
    users: dict[str, User] = field(default_factory=lambda: {ADMIN_TOKEN: User("admin", ("system:masters",))})
    _stores: dict[str, dict[Key, Object]] = field(default_factory=dict)
    _version: int = 1000
    _oldest: int = 1000
    _history: list[Change] = field(default_factory=list)
    _snapshots: dict[str, list[Object]] = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _session: aiohttp.ClientSession = field(init=False)

    def application(self) -> web.Application:
        """The HTTP server's application."""
        application = web.Application(client_max_size=1 << 26)
        application.cleanup_ctx.append(self._connect)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_route("*", "/{path:.*}", self._handle)
        return application

    def compact(self) -> None:
        """Forgets the history: watches from before now, and unfinished lists, get 410."""
        self._oldest = self._version
        self._history.clear()
        self._snapshots.clear()

    async def _connect(self, _: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(ssl=False, limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as self._session:
            yield

    async def _readyz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            user = self._authenticate(request)
            if request.path == f"/apis/{ADMISSION}/v1":  # which every user may ask for (system:discovery)
                return web.json_response({"kind": "APIResourceList", "resources": self._admission_resources()})
            if self.custom and request.path.startswith("/openapi/"):
                return await self._forward(request, user)
            target = _target(request.path)
            watch = request.query.get("watch") in ("true", "1")
            self._authorize(user, _verb(request.method, target, watch), target, request)
            if self.custom and target.group in CUSTOM:
                return await self._forward(request, user)
            if request.method == "GET" and not target.name:
                return await (self._watch(request, target) if watch else self._list(request, target))
            body = await request.json() if request.can_read_body else None
            answer, status = await self._single(request, user, target, body)
            return web.json_response(answer, status=status)
        except Refusal as refusal:
            return web.json_response(refusal.status, status=refusal.code)

    async def _forward(self, request: web.Request, user: User) -> web.StreamResponse:
        """Leaves a request to the server of custom resources, with who asks as kube-aggregator tells it."""
        headers = CIMultiDict({"X-Remote-User": user.name, "Accept": request.headers.get("Accept", "*/*")})
        for group in user.groups:
            headers.add("X-Remote-Group", group)
        if user.node:
            headers.add("X-Remote-Extra-Authentication.kubernetes.io%2Fnode-name", user.node)
        if "Content-Type" in request.headers:
            headers.add("Content-Type", request.headers["Content-Type"])
        url, body = URL(self.custom + request.raw_path, encoded=True), await request.read()
        try:
            async with self._session.request(request.method, url, data=body, headers=headers) as answer:
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                return response
        except aiohttp.ClientConnectorError as error:
            raise Refusal(503, "ServiceUnavailable", f"error trying to reach service: {error}") from error

    async def _single(self, request: web.Request, user: User, target: Target, body: Any) -> tuple[Object, int]:
        if request.method == "POST" and target.subresource == "token":
            return self._issue_token(target, body), 201
        is_dry = request.query.get("dryRun") == "All"
        if request.method == "POST":
            return await self._create(user, target, body, is_dry=is_dry), 201
        if target.subresource:  # not even a status: VMIs have no such subresource
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        before = self._get(target)
        if request.method == "GET":
            return before, 200
        if request.method == "DELETE":
            await self._write(target, before, None)
            return before, 200
        if request.method == "PUT":
            after = _whole(target, before, body)
        elif request.content_type == "application/json-patch+json":
            after = apply_json_patch(before, body)
        elif request.content_type == "application/merge-patch+json":
            after = apply_merge_patch(before, body)
        else:
            raise Refusal(415, "UnsupportedMediaType", f"{request.content_type} is not supported")
        return await self._update(user, target, before, after, is_dry=is_dry), 200

    def _authenticate(self, request: web.Request) -> User:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.users:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        return self.users[token]

    # Access

    def _authorize(self, user: User, verb: str, target: Target, request: web.Request) -> None:
        if "system:masters" in user.groups:
            return
        name = target.name
        if verb in ("list", "watch"):  # with a single name selected, a rule with resourceNames holds (RBAC)
            selected = re.fullmatch(r"metadata\.name=(.+)", request.query.get("fieldSelector", ""))
            name = selected[1] if selected else ""
        if not any(_allows(rule, verb, target, name) for rule in self._rules(user, target.namespace)):
            where = f'in the namespace "{target.namespace}"' if target.namespace else "at the cluster scope"
            raise Refusal(
                403,
                "Forbidden",
                f'{target.full_resource} is forbidden: User "{user.name}" cannot {verb} resource "{target.resource}" '
                f'in API group "{target.group}" {where}',
            )

    def _rules(self, user: User, namespace: str) -> list[Object]:
        rbac = "rbac.authorization.k8s.io"
        bindings = list(self._stores.get(f"{rbac}/clusterrolebindings", {}).values())
        bindings += [
            binding
            for (where, _), binding in self._stores.get(f"{rbac}/rolebindings", {}).items()
            if namespace and where == namespace
        ]
        rules: list[Object] = []
        for binding in bindings:
            if any(user.name == _subject_name(subject) for subject in binding.get("subjects") or ()):
                reference = binding["roleRef"]
                where = binding["metadata"].get("namespace", "") if reference["kind"] == "Role" else ""
                role = self._stores.get(f"{rbac}/{reference['kind'].lower()}s", {}).get((where, reference["name"]), {})
                rules += role.get("rules") or ()
        return rules

    def _issue_token(self, target: Target, body: Object) -> Object:
        bound = body["spec"].get("boundObjectRef")
        node = None
        if bound:
            pod = self._stores["/pods"][target.namespace, bound["name"]]
            if pod["metadata"]["uid"] != bound.get("uid", pod["metadata"]["uid"]):
                raise Refusal(409, "Conflict", "the UID in the bound object reference does not match the UID in record")
            node = pod["spec"].get("nodeName")
        token = secrets.token_urlsafe(16)
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{target.namespace}", "system:authenticated")
        self.users[token] = User(f"system:serviceaccount:{target.namespace}:{target.name}", groups, node)
        return {**body, "status": {"token": token, "expirationTimestamp": _now()}}

    def _admission_resources(self) -> list[Object]:
        names = ["validatingadmissionpolicies", "validatingadmissionpolicybindings"]
        return [{"name": name, "namespaced": False} for name in names]

    def _policies_for(self, target: Target, operation: str) -> list[tuple[Object, str]]:
        """The policies that are about such a request, each with the name of its binding."""
        policies = self._stores.get(f"{ADMISSION}/validatingadmissionpolicies", {})
        bindings = self._stores.get(f"{ADMISSION}/validatingadmissionpolicybindings", {})
        bound = {one["spec"]["policyName"]: one["metadata"]["name"] for one in bindings.values()}
        return [
            (policy, bound[name])
            for (_, name), policy in policies.items()
            if name in bound
            and any(_matches(rule, target, operation) for rule in policy["spec"]["matchConstraints"]["resourceRules"])
        ]

    def _admit(self, user: User, target: Target, before: Object | None, after: Object) -> None:
        for policy, binding in self._policies_for(target, "UPDATE" if before else "CREATE"):
            self._evaluate(policy, user, target, before, after, binding)

    def _values(self, policy: Object, user: User, before: Object | None, after: Object) -> dict[str, Any] | None:
        """What a policy's expressions are about; None where it does not apply."""
        # Without anything in it, the field is missing (seen with Kubernetes 1.36).
        extra = {"extra": {"authentication.kubernetes.io/node-name": [user.node]}} if user.node else {}
        request = {"userInfo": {"username": user.name, "groups": list(user.groups), **extra}}
        variables = celtypes.MapType()
        plain = {"object": after, "oldObject": before, "request": request}
        values = {"variables": variables, **{name: json_to_cel(value) for name, value in plain.items()}}
        for condition in policy["spec"].get("matchConditions") or ():
            if not _expression(condition["expression"])(values):
                return None
        for variable in policy["spec"].get("variables") or ():
            with suppress(Refusal):  # it fails where it is used
                value = json_to_cel(_expression(variable["expression"])(values))
                variables[celtypes.StringType(variable["name"])] = value
        return values

    def _evaluate(
        self, policy: Object, user: User, target: Target, before: Object | None, after: Object, binding: str
    ) -> None:
        """Evaluates a policy; an expression that fails counts as failurePolicy Fail has it."""
        values = self._values(policy, user, before, after)
        for validation in policy["spec"]["validations"] if values else ():
            assert values
            reason, told = validation.get("reason", "Invalid"), validation.get("message")
            try:
                if _expression(validation["expression"])(values) is True:
                    continue
            except Refusal as refusal:
                reason, told = "Invalid", f"expression '{validation['expression']}' resulted in error: {refusal}"
            raise Refusal(
                {"Forbidden": 403, "Invalid": 422}[reason],
                reason,
                f'{target.full_resource} "{after["metadata"]["name"]}" is forbidden: '
                f"ValidatingAdmissionPolicy '{policy['metadata']['name']}' with binding '{binding}' denied "
                f"request: {told}",
            )

    # Reading

    def _get(self, target: Target) -> Object:
        found = self._stores.get(target.store, {}).get((target.namespace, target.name))
        if found is None:
            raise Refusal(404, "NotFound", f'{target.full_resource} "{target.name}" not found')
        return found

    async def _list(self, request: web.Request, target: Target) -> web.Response:
        limit = int(request.query.get("limit", "0"))
        token = request.query.get("continue")
        if token:
            if token not in self._snapshots:
                raise Refusal(410, "Expired", "The provided continue parameter is too old")
            found = self._snapshots.pop(token)
            version = int(base64.b64decode(token).decode().split()[0])
        else:
            stored = self._stores.get(target.store, {})
            found = [stored[key] for key in sorted(stored) if _selected(stored[key], request.query, target.namespace)]
            version = self._version
        page, rest = (found[:limit], found[limit:]) if limit else (found, [])
        metadata: Object = {"resourceVersion": str(version)}
        if rest:
            metadata["continue"] = base64.b64encode(f"{version} {secrets.token_hex(8)}".encode()).decode()
            metadata["remainingItemCount"] = len(rest)
            self._snapshots[metadata["continue"]] = rest
        api_version = f"{target.group}/{target.version}" if target.group else target.version
        kind = f"{KINDS.get(target.resource, '')}List"
        return web.json_response({"kind": kind, "apiVersion": api_version, "metadata": metadata, "items": page})

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        asked = int(request.query.get("resourceVersion") or self._version)
        gone = Refusal(410, "Expired", f"too old resource version: {asked} ({self._oldest})")
        if asked < self._oldest and not self.faults.gone_as_event:
            raise gone
        if asked > self._version:
            raise Refusal(504, "Timeout", f"Too large resource version: {asked}, current: {self._version}")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if asked < self._oldest:
            await _send(response, {"type": "ERROR", "object": gone.status})
            return response
        with suppress(TimeoutError, ConnectionResetError):
            async with asyncio.timeout(float(request.query.get("timeoutSeconds", "1800"))):
                await self._stream(request, target, response, asked)
        return response

    async def _stream(self, request: web.Request, target: Target, response: web.StreamResponse, version: int) -> None:
        bookmarks = request.query.get("allowWatchBookmarks") == "true"
        while True:
            if version < self._oldest and self._version > version:
                status = Refusal(410, "Expired", f"too old resource version: {version} ({self._oldest})").status
                await _send(response, {"type": "ERROR", "object": status})
                return
            news = self._history[bisect_right(self._history, version, key=lambda change: change.version) :]
            version = self._version
            for change in news:
                if change.store == target.store and (event := _event(change, request.query, target.namespace)):
                    await _send(response, event)
            try:
                async with asyncio.timeout(self.faults.bookmark_seconds), self._changed:
                    while self._version <= version:
                        await self._changed.wait()
            except TimeoutError:
                if bookmarks:
                    bookmark = {"metadata": {"resourceVersion": str(version)}}
                    await _send(response, {"type": "BOOKMARK", "object": bookmark})

    # Writing

    async def _create(self, user: User, target: Target, body: Object, *, is_dry: bool) -> Object:
        metadata = dict(body.get("metadata") or {})
        name, namespace = metadata["name"], "" if target.resource == "namespaces" else target.namespace
        if (namespace, name) in self._stores.get(target.store, {}):
            raise Refusal(409, "AlreadyExists", f'{target.full_resource} "{name}" already exists')
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now(), "generation": 1}
        if namespace:
            metadata["namespace"] = namespace
        created = {**body, "metadata": metadata}
        if target.group == ADMISSION and "matchConstraints" in body["spec"]:
            constraints = {**_MATCH_DEFAULTS, **body["spec"]["matchConstraints"]}
            constraints["resourceRules"] = [{"scope": "*", **rule} for rule in constraints["resourceRules"]]
            created["spec"] = {"failurePolicy": "Fail", **body["spec"], "matchConstraints": constraints}
        whole = Target(target.group, target.version, target.resource, namespace, name, "")
        self._admit(user, whole, None, created)
        return created if is_dry else await self._write(whole, None, created)

    async def _update(self, user: User, target: Target, before: Object, after: Object, *, is_dry: bool) -> Object:
        metadata = after["metadata"]
        if self.faults.conflicts > 0:
            self.faults.conflicts -= 1
            raise Refusal(409, "Conflict", f"Operation cannot be fulfilled on {target.full_resource}: modified")
        if (
            metadata.get("resourceVersion", before["metadata"]["resourceVersion"])
            != (before["metadata"]["resourceVersion"])
            or metadata.get("uid", before["metadata"]["uid"]) != (before["metadata"]["uid"])
        ):
            raise Refusal(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {target.full_resource} "{target.name}": the object has been '
                "modified; please apply your changes to the latest version and try again",
            )
        if self.has_virt_api and target.resource == "virtualmachineinstances":
            after = _virt_api(user, before, after)
        self._admit(user, target, before, after)
        if after == before or is_dry:
            return after
        return await self._write(target, before, after)

    async def _write(self, target: Target, before: Object | None, after: Object | None) -> Object:
        self._version += 1
        store = self._stores.setdefault(target.store, {})
        if after is None:
            del store[target.namespace, target.name]
        else:
            after = copy.deepcopy(after)
            after["metadata"]["resourceVersion"] = str(self._version)
            store[target.namespace, target.name] = after
        self._history.append(Change(self._version, target.store, before, after))
        async with self._changed:
            self._changed.notify_all()
        return after or {}


class _Evaluator(Evaluator):
    """The library's own, but has(e.f) fails where e does: the library takes f for absent then."""

    def sub_evaluator(self, ast: Any) -> Evaluator:
        return _Evaluator(ast, activation=self.activation)

    def macro_has_eval(self, exprlist: Any) -> Any:
        selection = next(tree for tree in exprlist.iter_subtrees_topdown() if tree.data == "member_dot")
        operand = self.visit(selection.children[0])
        return operand if isinstance(operand, CELEvalError) else super().macro_has_eval(exprlist)


class _Runner(InterpretedRunner):
    def evaluate(self, context: Any) -> Any:
        return _Evaluator(ast=self.ast, activation=self.new_activation()).evaluate(context)


_OPERATORS = {"conditionalor", "conditionaland", "relation", "addition", "multiplication", "unary", "member"}


class _Expression:
    """A compiled CEL expression."""

    _environment = celpy.Environment(runner_class=_Runner)

    def __init__(self, text: str) -> None:
        tree = _flat(self._environment.compile(text))
        self._program = self._environment.program(tree)

    def __call__(self, values: Mapping[str, Any]) -> Any:
        try:
            result = self._program.evaluate(dict(values))
        except CELEvalError as error:
            raise Refusal(422, "Invalid", f"expression failed: {error}") from error
        return bool(result) if isinstance(result, celpy.celtypes.BoolType) else result


def _flat(tree: Any) -> Any:
    """A syntax tree without what only stands for its one child, half of the time that the library takes."""
    children = [_flat(child) if isinstance(child, lark.Tree) else child for child in tree.children]
    if tree.data in _OPERATORS and len(children) == 1 and isinstance(children[0], lark.Tree):
        return children[0]
    return lark.Tree(tree.data, children, tree.meta)


@cache
def _expression(text: str) -> _Expression:
    return _Expression(text)


async def _send(response: web.StreamResponse, event: Object) -> None:
    await response.write(json.dumps(event).encode() + b"\n")


def _target(path: str) -> Target:
    parts = path.strip("/").split("/")
    if parts[0] == "api":
        group, version, rest = "", parts[1], parts[2:]
    elif parts[0] == "apis" and len(parts) >= 4:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        raise Refusal(404, "NotFound", "the server could not find the requested resource")
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    rest += ["", ""]
    return Target(group, version, rest[0], namespace, rest[1], rest[2])


def _whole(target: Target, before: Object, body: Object) -> Object:
    """What a PUT makes of an object; the server keeps what is its own.

    Raises:
        Refusal: It is not that object, or a custom resource does not tell the version that it was made of.
    """
    metadata, stored = body.get("metadata") or {}, before["metadata"]
    named = (metadata.get("namespace", target.namespace), metadata.get("name"))
    if named != (target.namespace, target.name):
        raise Refusal(400, "BadRequest", f"the object is {named}, the URL names {(target.namespace, target.name)}")
    if body.get("apiVersion") != before["apiVersion"]:
        raise Refusal(
            400, "BadRequest", f"the object is of {body.get('apiVersion')}, the URL of {before['apiVersion']}"
        )
    if body.get("kind") != before["kind"]:
        told = f"kind: Invalid value: {body.get('kind')!r}: must be {before['kind']}"
        raise Refusal(422, "Invalid", f'{target.full_resource} "{target.name}" is invalid: {told}')
    if target.group in CUSTOM and not metadata.get("resourceVersion"):
        told = "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update"
        raise Refusal(422, "Invalid", f'{target.full_resource} "{target.name}" is invalid: {told}')
    given = {"uid": stored["uid"], "resourceVersion": stored["resourceVersion"], **metadata}
    kept = {name: stored[name] for name in ("creationTimestamp", "generation")}
    return {**body, "metadata": {**given, **kept}}


def _virt_api(user: User, before: Object, after: Object) -> Object:
    """What KubeVirt's webhooks make of an update of a VMI: of its status too, which is no subresource.

    The administrator stands for KubeVirt's components in the tests.

    Raises:
        Refusal: It changes what only KubeVirt may change.
    """
    if user.name in (*KUBEVIRT_ACCOUNTS, "admin"):
        return after
    labels = [
        {name: value for name, value in (one["metadata"].get("labels") or {}).items() if name in _RESERVED_LABELS}
        for one in (before, after)
    ]
    told = ""
    if after.get("spec") != before.get("spec"):
        told = "update of VMI object is restricted"
    elif labels[0] != labels[1]:
        told = "modification of the following reserved kubevirt.io/ labels on a VMI object is prohibited"
    if told:
        webhook = "virtualmachineinstances-update-validator.kubevirt.io"
        raise Refusal(422, "Invalid", f'admission webhook "{webhook}" denied the request: {told}')
    kept = {"status": before["status"]} if "status" in before else {}
    return {**{name: value for name, value in after.items() if name != "status"}, **kept}


def _verb(method: str, target: Target, watch: bool) -> str:
    if method == "GET" and not target.name:
        return "watch" if watch else "list"
    return {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[method]


def _allows(rule: Object, verb: str, target: Target, name: str) -> bool:
    resource = f"{target.resource}/{target.subresource}" if target.subresource else target.resource
    names = rule.get("resourceNames")
    return (
        verb in rule["verbs"]
        and target.group in rule.get("apiGroups", ())
        and resource in rule.get("resources", ())
        and (not names or name in names)
    )


def _matches(rule: Object, target: Target, operation: str) -> bool:
    return (
        operation in rule["operations"]
        and target.group in rule["apiGroups"]
        and bool({"*", target.version} & set(rule["apiVersions"]))
        and target.resource in rule["resources"]
    )


def _subject_name(subject: Object) -> str:
    if subject["kind"] == "ServiceAccount":
        return f"system:serviceaccount:{subject['namespace']}:{subject['name']}"
    return str(subject["name"])


def _selected(item: Object | None, query: Mapping[str, str], namespace: str) -> bool:
    if item is None or (namespace and item["metadata"].get("namespace") != namespace):
        return False
    labels = item["metadata"].get("labels") or {}
    for clause in re.findall(r"(?:[^,(]|\([^)]*\))+", query.get("labelSelector", "")):
        clause = clause.strip()
        if match := re.fullmatch(r"(\S+) (in|notin) \(([^)]*)\)", clause):
            listed = labels.get(match[1]) in [value.strip() for value in match[3].split(",")]
            if listed is (match[2] == "notin"):
                return False
        elif match := re.fullmatch(r"([^=!]+)(==?|!=)(.*)", clause):
            if (labels.get(match[1]) == match[3]) is (match[2] == "!="):
                return False
        elif (clause.lstrip("!") in labels) is clause.startswith("!"):
            return False
    for clause in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = clause.partition("=")
        if path not in ("metadata.name", "metadata.namespace"):
            raise Refusal(400, "BadRequest", f"field label not supported: {path}")
        if item["metadata"].get(path.removeprefix("metadata.")) != value:
            return False
    return True


def _event(change: Change, query: Mapping[str, str], namespace: str) -> Object | None:
    before, after = _selected(change.before, query, namespace), _selected(change.after, query, namespace)
    if after:
        return {"type": "MODIFIED" if before else "ADDED", "object": change.after}
    if not before or change.before is None:
        return None
    last = copy.deepcopy(change.before)
    last["metadata"]["resourceVersion"] = str(change.version)
    return {"type": "DELETED", "object": last}


def apply_json_patch(document: Object, patch: list[Object]) -> Object:
    """RFC 6902 as the API server has it: a test for null holds for what is absent; a failed test is 422."""
    result = copy.deepcopy(document)
    for operation in patch:
        path = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        parent: Any = result
        for part in path[:-1]:
            if not isinstance(parent, dict) or part not in parent:
                raise Refusal(422, "Invalid", "the server rejected our request due to an error in our request")
            parent = parent[part]
        if operation["op"] == "test":
            if parent.get(path[-1]) != operation["value"]:
                raise Refusal(422, "Invalid", "the server rejected our request due to an error in our request")
        elif operation["op"] == "add" or (operation["op"] == "replace" and path[-1] in parent):
            parent[path[-1]] = operation["value"]
        elif operation["op"] == "remove" and path[-1] in parent:
            del parent[path[-1]]
        else:
            raise Refusal(422, "Invalid", "the server rejected our request due to an error in our request")
    return result


def apply_merge_patch(document: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(document) if isinstance(document, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = apply_merge_patch(result.get(name), value)
    return result


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def certificate(folder: Path, *, expired: bool = False, ca: tuple[Path, Path] | None = None) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key.

    Args:
        folder: To be made for them.
        expired: It was good until yesterday.
        ca: Who signs it, without the identifier of the signer's key; by default it signs itself.
    """
    key = signer = ec.generate_private_key(ec.SECP256R1())
    name = issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
    if ca:
        issuer = x509.load_pem_x509_certificate(ca[0].read_bytes()).subject
        loaded = load_pem_private_key(ca[1].read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer = loaded
    now = dt.datetime.now(dt.UTC)
    day = dt.timedelta(days=1)
    end = now - day if expired else now + day
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = x509.KeyUsage(True, False, False, False, False, True, False, False, False)
    made = (
        x509.CertificateBuilder(issuer, name, key.public_key(), x509.random_serial_number(), now - 2 * day, end)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .add_extension(usage, True)
        .add_extension(identifier, False)
        .sign(signer, hashes.SHA256())
    )
    folder.mkdir()
    (folder / "tls.crt").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "tls.crt", folder / "tls.key"


def server_tls(crt: Path, key: Path) -> ssl.SSLContext:
    """What a server with that certificate and key needs."""
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.load_cert_chain(crt, key)
    return made


@asynccontextmanager
async def serve(
    double: ApiDouble, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Answers HTTP, or HTTPS with a context, while the context lasts, and yields the URL."""
    runner = web.AppRunner(double.application(), access_log=None, shutdown_timeout=0, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=tls)
        await site.start()
        assert site._server
        number = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        yield f"{'https' if tls else 'http'}://{host}:{number}"
    finally:
        await runner.cleanup()


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    done = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, done.set)
    double = ApiDouble()
    async with serve(double, options.host, options.port) as url:
        print(url, flush=True)
        await done.wait()


if __name__ == "__main__":
    asyncio.run(_main())
