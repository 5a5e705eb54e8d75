"""Each clause of daemonset.yaml's admission policies has a row: an object, a write to it, and what becomes of that."""

import asyncio
import copy
import os
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import pytest

from migproxy.announcement import TARGET_ANNOTATION
from migproxy.inventory import BYPASSED, FAILED
from migproxy.inventory.kube import LISTENING
from migproxy.kube.events import COMPONENT
from tests.kube.apiserver import apply_merge_patch
from tests.kube.cluster import (
    MANIFESTS,
    MERGE_PATCH,
    NODES,
    VMIS,
    Cluster,
    Refused,
    begin,
    documents,
    resource_definition,
    vmi,
)

pytestmark = pytest.mark.tier("gate")

HERE, ADDRESS = NODES[1], "127.77.0.2"
THEIRS = {"1001": 0, "1002": 49152}
OURS_TEXT = f"1 first 2001:0,2002:49152 {ADDRESS}"
LABEL = {"metadata": {"labels": {"some": "label"}}}
NOTHING: dict[str, Any] = {}


def annotated(text: str | None = OURS_TEXT) -> dict[str, Any]:
    return {"metadata": {"annotations": {TARGET_ANNOTATION: text}}}


def state(**fields: Any) -> dict[str, Any]:
    return {"status": {"migrationState": fields}}


def published(ports: Any = THEIRS, **fields: Any) -> dict[str, Any]:
    return state(targetNodeAddress=ADDRESS, targetDirectMigrationNodePorts=ports, **fields)


def both(*patches: dict[str, Any]) -> dict[str, Any]:
    """One merge patch of several that do not remove anything."""
    result: dict[str, Any] = {}
    for patch in patches:
        for name, value in patch.items():
            result[name] = both(result[name], value) if name in result and isinstance(value, dict) else value
    return result


async def stored(kubernetes: Cluster, name: str, before: dict[str, Any]) -> None:
    """Creates a VMI that migrates, changed by a merge patch."""
    await kubernetes.request("POST", VMIS, apply_merge_patch(apply_merge_patch(vmi(name), begin("first")), before))


MIGPROXY, OTHER_NODE, SOMEBODY, UNBOUND = "migproxy", "migproxy on the other node", "somebody", "an unbound token"
PREFIXED = "prefixed-migproxy"
"""A ServiceAccount as kustomize's namePrefix makes it."""
ONLY = "only migproxy announces"
ELSEWHERE = "only for VMIs that migrate to the node of its token, and not after the start"


@dataclass(frozen=True)
class Write:
    """A write, and who makes it.

    Attributes:
        who: Makes it.
        patch: It, a merge patch.
        before: A merge patch of what the VMI is before.
        refusal: In the message of the one who refuses it; None where it is accepted.
    """

    who: str
    patch: dict[str, Any]
    before: dict[str, Any]
    refusal: str | None


LARGE = {"spec": {"domain": {f"field-{number}": {"of": ["a", "large", "VMI"]} for number in range(3000)}}}
UNTARGETED = {"metadata": {"labels": {"kubevirt.io/migrationTargetNodeName": None}}}
STARTED = state(startTimestamp="2026-08-01T12:00:00Z")

ADMISSION: dict[str, Write] = {
    # migproxy-announcements
    "somebody announces": Write(SOMEBODY, annotated(), NOTHING, ONLY),
    "somebody announces on a VMI without annotations": Write(
        SOMEBODY, annotated(), {"metadata": {"annotations": None}}, ONLY
    ),
    "somebody announces something else": Write(SOMEBODY, annotated("1 first 22:0 10.0.0.1"), annotated(), ONLY),
    "somebody empties it": Write(SOMEBODY, annotated(""), annotated(), ONLY),
    "somebody writes the same": Write(SOMEBODY, both(annotated(), LABEL), annotated(), None),
    "somebody writes another annotation": Write(
        SOMEBODY, {"metadata": {"annotations": {"other": "x"}}}, annotated(), None
    ),
    "somebody takes it away": Write(SOMEBODY, annotated(None), annotated(), None),
    "somebody takes it away where there is no status": Write(
        SOMEBODY, annotated(None), both(annotated(), {"status": None}), None
    ),
    "somebody takes it away where there is no migration": Write(
        SOMEBODY, annotated(None), both(annotated(), {"status": {"migrationState": None}}), None
    ),
    "somebody takes a published one away": Write(SOMEBODY, annotated(None), both(annotated(), published()), None),
    "somebody takes all annotations away": Write(
        SOMEBODY, {"metadata": {"annotations": None}}, both(annotated(), STARTED), None
    ),
    # migproxy
    "announces": Write(MIGPROXY, annotated(), NOTHING, None),
    "announces on a VMI without annotations": Write(MIGPROXY, annotated(), {"metadata": {"annotations": None}}, None),
    "announces on a large VMI": Write(MIGPROXY, annotated(), LARGE, None),
    "announces something else": Write(MIGPROXY, annotated("1 first 22:0 10.0.0.1"), annotated(), None),
    "announces from another node": Write(OTHER_NODE, annotated(), NOTHING, ELSEWHERE),
    "announces where nothing migrates": Write(MIGPROXY, annotated(), UNTARGETED, ELSEWHERE),
    "announces on a VMI without labels": Write(MIGPROXY, annotated(), {"metadata": {"labels": None}}, ELSEWHERE),
    "announces without a status": Write(MIGPROXY, annotated(), {"status": None}, ELSEWHERE),
    "announces without a migration": Write(MIGPROXY, annotated(), {"status": {"migrationState": None}}, ELSEWHERE),
    "announces after the start": Write(MIGPROXY, annotated(), STARTED, ELSEWHERE),
    "announces with an unbound token": Write(UNBOUND, annotated(), NOTHING, "names no node"),
    "takes away": Write(MIGPROXY, annotated(None), annotated(), None),
    "takes a published one away": Write(MIGPROXY, annotated(None), both(annotated(), published()), None),
    "takes away after the start": Write(MIGPROXY, annotated(None), both(annotated(), STARTED), None),
    "takes away from another node": Write(OTHER_NODE, annotated(None), annotated(), None),
    "takes away where nothing migrates": Write(
        MIGPROXY, annotated(None), both(annotated(), UNTARGETED, {"status": None}), None
    ),
    "takes away with an unbound token": Write(UNBOUND, annotated(None), annotated(), "names no node"),
    "announces under a prefix": Write(PREFIXED, annotated(), NOTHING, None),
    "adds a label under a prefix": Write(PREFIXED, LABEL, NOTHING, "no metadata"),
    "adds a label": Write(MIGPROXY, LABEL, NOTHING, "no metadata"),
    "changes a label": Write(MIGPROXY, {"metadata": {"labels": {"kubevirt.io/nodeName": "x"}}}, NOTHING, "no metadata"),
    "removes the labels": Write(MIGPROXY, {"metadata": {"labels": None}}, NOTHING, "no metadata"),
    "adds a finalizer": Write(MIGPROXY, {"metadata": {"finalizers": ["a/b"]}}, NOTHING, "no metadata"),
    "adds an annotation": Write(MIGPROXY, {"metadata": {"annotations": {"a": "b"}}}, NOTHING, "no annotation but"),
    "adds an annotation to none": Write(
        MIGPROXY, {"metadata": {"annotations": {"a": "b"}}}, {"metadata": {"annotations": None}}, "no annotation but"
    ),
    "changes an annotation": Write(
        MIGPROXY,
        {"metadata": {"annotations": {"kubevirt.io/latest-observed-api-version": "v2"}}},
        NOTHING,
        "no annotation but",
    ),
    "removes the annotations": Write(MIGPROXY, {"metadata": {"annotations": None}}, annotated(), "no annotation but"),
    "changes the spec": Write(MIGPROXY, {"spec": {"evictionStrategy": "None"}}, NOTHING, "no spec"),
    "removes the spec": Write(MIGPROXY, {"spec": None}, NOTHING, "no spec"),
    "adds a spec": Write(MIGPROXY, {"spec": {"evictionStrategy": "None"}}, {"spec": None}, "no spec"),
    "changes the status": Write(MIGPROXY, {"status": {"phase": "Failed"}}, NOTHING, "no status"),
    "publishes": Write(MIGPROXY, published(), NOTHING, "no status"),
    "removes the status": Write(MIGPROXY, {"status": None}, NOTHING, "no status"),
    "adds a status": Write(MIGPROXY, {"status": {"phase": "Failed"}}, {"status": None}, "no status"),
}


def event(**fields: Any) -> dict[str, Any]:
    """An Event as migproxy on node02 writes it, with other fields."""
    made = {
        "apiVersion": "v1",
        "kind": "Event",
        "involvedObject": {
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachineInstance",
            "namespace": "default",
            "name": "one",
        },
        "reason": FAILED,
        "message": "text",
        "type": "Warning",
        "source": {"component": COMPONENT, "host": HERE},
        "reportingComponent": COMPONENT,
        "reportingInstance": HERE,
        "count": 1,
    }
    return apply_merge_patch(made, fields)  # type: ignore[no-any-return]


OWN_NAME, SUBJECT, NO_OTHER = "in its own name and that of its token's node", "about VMIs alone", "changes no Events of"
MADE: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "migproxy": (MIGPROXY, event(), None),
    "a path": (MIGPROXY, event(reason=BYPASSED, type="Normal"), None),
    "listening": (MIGPROXY, event(reason=LISTENING, type="Normal"), None),
    "under a prefix": (PREFIXED, event(), None),
    "somebody": (SOMEBODY, event(reason="Killing", source={"component": "kubelet", "host": "x"}), None),
    "another node": (OTHER_NODE, event(), OWN_NAME),
    "another host": (MIGPROXY, event(source={"host": NODES[0]}), OWN_NAME),
    "another instance": (MIGPROXY, event(reportingInstance=NODES[0]), OWN_NAME),
    "another component": (MIGPROXY, event(source={"component": "kubelet"}), OWN_NAME),
    "another controller": (MIGPROXY, event(reportingComponent="kubelet"), OWN_NAME),
    "no source": (MIGPROXY, event(source=None), OWN_NAME),
    "no instance": (MIGPROXY, event(reportingInstance=None), OWN_NAME),
    "a pod": (MIGPROXY, event(involvedObject={"apiVersion": "v1", "kind": "Pod"}), SUBJECT),
    "a VMI of another group": (MIGPROXY, event(involvedObject={"apiVersion": "evil.io/v1"}), SUBJECT),
    "nothing": (MIGPROXY, event(involvedObject={"kind": None}), SUBJECT),
    "something else besides": (MIGPROXY, event(related={"kind": "Pod", "name": "x", "namespace": "default"}), SUBJECT),
    "another reason": (MIGPROXY, event(reason="Killing"), "of other reasons"),
    "an unbound token": (UNBOUND, event(), "names no node"),
}
CHANGED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None]] = {
    "its count": (MIGPROXY, event(), {"count": 2, "message": "other", "type": "Normal"}, None),
    "nothing": (MIGPROXY, event(), {}, None),
    "from another node": (OTHER_NODE, event(), {"count": 2}, OWN_NAME),
    "somebody's": (MIGPROXY, event(reason="Killing", source={"component": "kubelet", "host": HERE}), {}, OWN_NAME),
    "somebody's, taken over": (
        MIGPROXY,
        event(source={"component": "kubelet"}),
        {"source": {"component": COMPONENT}},
        NO_OTHER,
    ),
    "another node's, taken over": (
        MIGPROXY,
        event(source={"host": NODES[0]}, reportingInstance=NODES[0]),
        {"source": {"host": HERE}, "reportingInstance": HERE},
        NO_OTHER,
    ),
    "its subject": (MIGPROXY, event(), {"involvedObject": {"name": "two"}}, NO_OTHER),
    "its reason": (MIGPROXY, event(), {"reason": BYPASSED}, NO_OTHER),
}


async def tokens_of(kubernetes: Cluster) -> dict[str, str]:
    """A token of each of those who write."""
    tokens = {MIGPROXY: kubernetes.token(HERE), OTHER_NODE: kubernetes.token(NODES[0]), SOMEBODY: "admin"}
    await kubernetes.use_unbound_token(HERE)
    tokens[UNBOUND] = kubernetes.token(HERE)
    await kubernetes.use_renamed_account(HERE, PREFIXED)
    tokens[PREFIXED] = kubernetes.token(HERE)
    return tokens


async def refusal_of(request: Awaitable[Any]) -> str | None:
    """Why a request is refused; None where it is not."""
    try:
        await request
    except Refused as error:
        return str(error)
    return None


def is_wrong(refusal: str | None, expected: str | None) -> bool:
    return (refusal is None) != (expected is None) or (expected or "") not in (refusal or "")


async def place_of_events(kubernetes: Cluster) -> tuple[str, str]:
    """Where Events are written, and their apiVersion.

    The server of scripts/policy-server has custom resources alone: Events are one there, under the same policy.
    """
    if "MIGPROXY_POLICY_SERVER" not in os.environ:
        return "/api/v1/namespaces/default/events", "v1"
    await kubernetes.create(resource_definition("Event"))
    for document in copy.deepcopy(documents(MANIFESTS)):
        is_role, name = document["kind"] == "ClusterRole", document["metadata"]["name"]
        if is_role or (name == "migproxy-events" and document["kind"] == "ValidatingAdmissionPolicy"):
            rules = document["rules"] if is_role else document["spec"]["matchConstraints"]["resourceRules"]
            for rule in rules:
                rule["apiGroups"] = ["kubevirt.io"]
            document["metadata"]["name"] = "custom-events"
            await kubernetes.create(document)
        elif name == "migproxy-events":
            await kubernetes.create(
                {
                    **document,
                    "metadata": {"name": "custom-events"},
                    "spec": {**document["spec"], "policyName": "custom-events"},
                }
            )
        elif document["kind"] == "ClusterRoleBinding":
            subjects = [{**document["subjects"][0], "name": account} for account in ("migproxy", PREFIXED)]
            reference = {**document["roleRef"], "name": "custom-events"}
            await kubernetes.create(
                {**document, "metadata": {"name": "custom-events"}, "subjects": subjects, "roleRef": reference}
            )
    async with asyncio.timeout(60):
        while await refusal_of(kubernetes.request("GET", VMIS.replace("virtualmachineinstances", "events"))):
            await asyncio.sleep(0.2)
        probe = event(apiVersion="kubevirt.io/v1", metadata={"name": "probe"}, reason="Killing")
        token = kubernetes.token(NODES[0])
        where = VMIS.replace("virtualmachineinstances", "events") + "?dryRun=All"
        while not await refusal_of(kubernetes.request("POST", where, probe, token=token)):
            await asyncio.sleep(0.2)  # until the server follows the policy
    return VMIS.replace("virtualmachineinstances", "events"), "kubevirt.io/v1"


async def test_who_may_write_which_events(kubernetes: Cluster) -> None:
    tokens = await tokens_of(kubernetes)
    events, version = await place_of_events(kubernetes)
    wrong = {}
    for number, (row, (who, made, expected)) in enumerate(MADE.items()):
        body = {**made, "apiVersion": version, "metadata": {"name": f"made-{number}"}}
        refusal = await refusal_of(kubernetes.request("POST", events, body, token=tokens[who]))
        if is_wrong(refusal, expected):
            wrong[f"made: {row}"] = refusal
    for number, (row, (who, before, patch, expected)) in enumerate(CHANGED.items()):
        body = {**before, "apiVersion": version, "metadata": {"name": f"changed-{number}"}}
        await kubernetes.request("POST", events, body)
        path = f"{events}/changed-{number}"
        refusal = await refusal_of(kubernetes.request("PATCH", path, patch, MERGE_PATCH, token=tokens[who]))
        if is_wrong(refusal, expected):
            wrong[f"changed: {row}"] = refusal
    assert not wrong


async def test_who_may_write_what(kubernetes: Cluster) -> None:
    if kubernetes.double:
        kubernetes.double.has_virt_api = False  # it would set back what the policies are to refuse
    tokens = await tokens_of(kubernetes)
    wrong = {}
    for number, (row, write) in enumerate(ADMISSION.items()):
        await stored(kubernetes, f"vmi-{number}", write.before)
        path, token = f"{VMIS}/vmi-{number}", tokens[write.who]
        refusal = await refusal_of(kubernetes.request("PATCH", path, write.patch, MERGE_PATCH, token=token))
        if is_wrong(refusal, write.refusal):
            wrong[row] = refusal
    assert not wrong
