"""Each clause of daemonset.yaml's admission policies has a row: a VMI, a write to it, and what becomes of that."""

from dataclasses import dataclass
from typing import Any

import pytest

from migproxy.announcement import TARGET_ANNOTATION
from tests.kube.apiserver import apply_merge_patch
from tests.kube.cluster import MERGE_PATCH, NODES, VMIS, Cluster, Refused, begin, vmi

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


async def test_who_may_write_what(kubernetes: Cluster) -> None:
    if kubernetes.double:
        kubernetes.double.has_virt_api = False  # it would set back what the policies are to refuse
    tokens = {MIGPROXY: kubernetes.token(HERE), OTHER_NODE: kubernetes.token(NODES[0]), SOMEBODY: "admin"}
    await kubernetes.use_unbound_token(HERE)
    tokens[UNBOUND] = kubernetes.token(HERE)
    wrong = {}
    for number, (row, write) in enumerate(ADMISSION.items()):
        await stored(kubernetes, f"vmi-{number}", write.before)
        refusal = None
        try:
            path = f"{VMIS}/vmi-{number}"
            await kubernetes.request("PATCH", path, write.patch, MERGE_PATCH, token=tokens[write.who])
        except Refused as error:
            refusal = str(error)
        if (refusal is None) != (write.refusal is None) or (write.refusal or "") not in (refusal or ""):
            wrong[row] = refusal
    assert not wrong
