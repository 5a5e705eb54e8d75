"""Each clause of deploy/beside-virt-handler's policies has a row: a VMI, a write to it, and what becomes of that."""

from dataclasses import dataclass
from typing import Any

import pytest

from migproxy.announcement import TARGET_ANNOTATION
from tests.kube.apiserver import apply_merge_patch
from tests.kube.cluster import MERGE_PATCH, NODES, VMIS, Cluster, Refused, begin, vmi
from tests.kube.test_beside_target import ADDRESS, HERE, OURS, THEIRS, beside

pytestmark = pytest.mark.tier("gate")

__all__ = ["beside"]

OURS_TEXT = f"first 2001:0,2002:49152 {ADDRESS}"
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


MUTATION: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "announced and published": (annotated(), published(), OURS),
    "all in one write": (annotated(), published(THEIRS, sourceNode="node09"), OURS),
    "other ports than before": (
        both(annotated(), published()),
        published({"1001": None, "1002": None, "1003": 0, "1004": 49152}),
        OURS,
    ),
    "migration asked for and published in one write": (
        both(annotated(), {"status": {"migrationState": None}}),
        published(migrationUid="first"),
        OURS,
    ),
    "no annotations": ({"metadata": {"annotations": None}}, published(), THEIRS),
    "other annotations": (NOTHING, published(), THEIRS),
    "announcement of four words": (annotated(f"{OURS_TEXT} more"), published(), THEIRS),
    "announcement of two words": (annotated("first 2001:0,2002:49152"), published(), THEIRS),
    "announcement without ports": (annotated(f"first  {ADDRESS}"), published(), THEIRS),
    "announcement with a name for a port": (annotated(f"first a:0,b:49152 {ADDRESS}"), published(), THEIRS),
    "announcement with a number no integer holds": (
        annotated(f"first 2001:0,2002:99999999999999999999 {ADDRESS}"),
        published(),
        THEIRS,
    ),
    "no ports in the write": (annotated(), state(targetNodeAddress=ADDRESS), None),
    "no address in the write": (annotated(), state(targetDirectMigrationNodePorts=THEIRS), THEIRS),
    "no channels in the write": (annotated(), published({}), {}),
    "started": (annotated(), published(startTimestamp="2026-08-01T12:00:00Z"), THEIRS),
    "ports as before": (both(annotated(), published()), LABEL, THEIRS),
    "no migration": (both(annotated(), {"status": {"migrationState": None}}), LABEL, None),
    "no status": (both(annotated(), {"status": None}), LABEL, None),
    "no status before": (both(annotated(), {"status": None}), published(migrationUid="first"), THEIRS),
    "another migration": (annotated(f"second 2001:0,2002:49152 {ADDRESS}"), published(), THEIRS),
    "no migration's UID": (both(annotated(), state(migrationUid=None)), published(), THEIRS),
    "another address": (annotated("first 2001:0,2002:49152 127.77.0.9"), published(), THEIRS),
    "a channel too few": (annotated(f"first 2001:0 {ADDRESS}"), published(), THEIRS),
    "a channel too many": (annotated(f"first 2001:0,2002:49152,2003:49153 {ADDRESS}"), published(), THEIRS),
    "another channel": (annotated(f"first 2001:0,2002:49153 {ADDRESS}"), published(), THEIRS),
    "a channel twice": (annotated(f"first 2001:0,2002:0 {ADDRESS}"), published(), THEIRS),
    "a port twice": (annotated(f"first 2001:0,2001:49152 {ADDRESS}"), published(), THEIRS),
}


async def test_what_becomes_of_published_ports(beside: Cluster) -> None:
    wrong = {}
    for number, (row, (before, write, expected)) in enumerate(MUTATION.items()):
        await stored(beside, f"vmi-{number}", before)
        after = await beside.request("PATCH", f"{VMIS}/vmi-{number}", write, MERGE_PATCH)
        found = after.get("status", {}).get("migrationState", {}).get("targetDirectMigrationNodePorts")
        if found != expected:
            wrong[row] = found
    assert not wrong


SIDE: dict[str, tuple[Any, Any]] = {
    "with ports": (
        {"pod": "x", "directMigrationNodePorts": {**THEIRS}},
        {"pod": "x", "directMigrationNodePorts": {**OURS}},
    ),
    "without ports": ({"pod": "x"}, {"pod": "x"}),
    "empty": ({}, {}),
}


async def test_what_becomes_of_target_state(beside: Cluster) -> None:
    wrong = {}
    for number, (row, (side, expected)) in enumerate(SIDE.items()):
        await stored(beside, f"vmi-{number}", annotated())
        after = await beside.request("PATCH", f"{VMIS}/vmi-{number}", published(targetState=side), MERGE_PATCH)
        found = after["status"]["migrationState"]
        if (found["targetDirectMigrationNodePorts"], found["targetState"]) != (OURS, expected):
            wrong[row] = found
    assert not wrong


MIGPROXY, OTHER_NODE, SOMEBODY, UNBOUND = "migproxy", "migproxy on the other node", "somebody", "an unbound token"
ONLY, AWAY = "only migproxy announces", "only migproxy takes that away"
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
ENDED = published(endTimestamp="2026-08-01T12:00:00Z")
STARTED = state(startTimestamp="2026-08-01T12:00:00Z")

ADMISSION: dict[str, Write] = {
    # guard.yaml
    "somebody announces": Write(SOMEBODY, annotated(), NOTHING, ONLY),
    "somebody announces on a VMI without annotations": Write(
        SOMEBODY, annotated(), {"metadata": {"annotations": None}}, ONLY
    ),
    "somebody announces something else": Write(SOMEBODY, annotated("first 22:0 10.0.0.1"), annotated(), ONLY),
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
    "somebody takes a published one away": Write(SOMEBODY, annotated(None), both(annotated(), published()), AWAY),
    "somebody takes a published one away with all annotations": Write(
        SOMEBODY, {"metadata": {"annotations": None}}, both(annotated(), published()), AWAY
    ),
    "somebody takes one away that has ended": Write(SOMEBODY, annotated(None), both(annotated(), ENDED), None),
    # rules.yaml
    "announces": Write(MIGPROXY, annotated(), NOTHING, None),
    "announces on a VMI without annotations": Write(MIGPROXY, annotated(), {"metadata": {"annotations": None}}, None),
    "announces on a large VMI": Write(MIGPROXY, annotated(), LARGE, None),
    "announces something else": Write(MIGPROXY, annotated("first 22:0 10.0.0.1"), annotated(), None),
    "announces from another node": Write(OTHER_NODE, annotated(), NOTHING, ELSEWHERE),
    "announces where nothing migrates": Write(MIGPROXY, annotated(), UNTARGETED, ELSEWHERE),
    "announces on a VMI without labels": Write(MIGPROXY, annotated(), {"metadata": {"labels": None}}, ELSEWHERE),
    "announces without a status": Write(MIGPROXY, annotated(), {"status": None}, ELSEWHERE),
    "announces without a migration": Write(MIGPROXY, annotated(), {"status": {"migrationState": None}}, ELSEWHERE),
    "announces after the start": Write(MIGPROXY, annotated(), STARTED, ELSEWHERE),
    "announces with an unbound token": Write(UNBOUND, annotated(), NOTHING, "expression"),
    "takes away": Write(MIGPROXY, annotated(None), annotated(), None),
    "takes a published one away": Write(MIGPROXY, annotated(None), both(annotated(), published()), None),
    "takes away after the start": Write(MIGPROXY, annotated(None), both(annotated(), STARTED), None),
    "takes away from another node": Write(OTHER_NODE, annotated(None), annotated(), None),
    "takes away where nothing migrates": Write(
        MIGPROXY, annotated(None), both(annotated(), UNTARGETED, {"status": None}), None
    ),
    "takes away with an unbound token": Write(UNBOUND, annotated(None), annotated(), None),
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


async def test_who_may_write_what(beside: Cluster) -> None:
    tokens = {MIGPROXY: beside.token(HERE), OTHER_NODE: beside.token(NODES[0]), SOMEBODY: "admin"}
    await beside.use_unbound_token(HERE)
    tokens[UNBOUND] = beside.token(HERE)
    wrong = {}
    for number, (row, write) in enumerate(ADMISSION.items()):
        await stored(beside, f"vmi-{number}", write.before)
        refusal = None
        try:
            path = f"{VMIS}/vmi-{number}"
            await beside.request("PATCH", path, write.patch, MERGE_PATCH, token=tokens[write.who])
        except Refused as error:
            refusal = str(error)
        if (refusal is None) != (write.refusal is None) or (write.refusal or "") not in (refusal or ""):
            wrong[row] = refusal
    assert not wrong
