"""What the double makes of a whole object, as a real API server does, and of a VMI, as KubeVirt's webhooks do."""

from typing import Any

import pytest

from tests.kube.cluster import MERGE_PATCH, VMIS, Cluster, Refused, begin, vmi
from tests.virt_handler import published

pytestmark = pytest.mark.tier("gate")

ONE = f"{VMIS}/one"
PORTS = {"1001": 0, "1002": 49152}


async def migrating(kubernetes: Cluster) -> Any:
    """A VMI that is about to migrate."""
    await kubernetes.request("POST", VMIS, vmi("one"), token=await kubernetes.kubevirt_token("kubevirt-controller"))
    return await kubernetes.request("GET", ONE)


async def test_whole_object_is_written_where_it_was_made_of_the_latest(kubernetes: Cluster) -> None:
    await migrating(kubernetes)
    before = await kubernetes.request("PATCH", ONE, begin("first"), MERGE_PATCH)
    after = await kubernetes.request("PUT", ONE, published(before, "10.1.1.2", PORTS))
    assert after["status"]["migrationState"]["targetDirectMigrationNodePorts"] == PORTS
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert await kubernetes.request("PUT", ONE, after) == after, "nothing has changed, not even the version"
    with pytest.raises(Refused, match=r": 409: .*modified"):
        await kubernetes.request("PUT", ONE, before)
    assert await kubernetes.request("GET", ONE) == after


@pytest.mark.parametrize(
    ("path", "change", "code"),
    [
        pytest.param(ONE, {"metadata": {"resourceVersion": None}}, 422, id="no-version"),
        pytest.param(ONE, {"metadata": {"uid": "another"}}, 409, id="another-uid"),
        pytest.param(ONE, {"metadata": {"name": "two"}}, 400, id="another-name"),
        pytest.param(ONE, {"metadata": {"namespace": "other"}}, 400, id="another-namespace"),
        pytest.param(ONE, {"kind": "VirtualMachine"}, 422, id="another-kind"),
        pytest.param(ONE, {"apiVersion": "kubevirt.io/v2"}, 400, id="another-version"),
        pytest.param(f"{ONE}/status", {}, 404, id="status"),
        pytest.param(f"{VMIS}/two", {"metadata": {"name": "two"}}, 404, id="missing"),
    ],
)
async def test_whole_object_is_refused(kubernetes: Cluster, path: str, change: Any, code: int) -> None:
    before = await migrating(kubernetes)
    after = {**before, **change, "metadata": {**before["metadata"], **change.get("metadata", {})}}
    with pytest.raises(Refused, match=f": {code}: "):
        await kubernetes.request("PUT", path, after)
    assert await kubernetes.request("GET", ONE) == before


async def kubevirts(kubernetes: Cluster) -> tuple[Any, dict[str, str]]:
    """A VMI that is about to migrate, and the tokens of two who may write it."""
    if kubernetes.double is None:
        pytest.skip("a real API server has no virt-api here")
    await migrating(kubernetes)
    tokens = {
        "kubevirt-handler": await kubernetes.kubevirt_token("kubevirt-handler"),
        "anybody": await kubernetes.kubevirt_token("anybody"),
    }
    controller = await kubernetes.kubevirt_token("kubevirt-synchronization-controller")
    return await kubernetes.request("PATCH", ONE, begin("first"), MERGE_PATCH, token=controller), tokens


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
@pytest.mark.parametrize(("who", "is_written"), [("kubevirt-handler", True), ("anybody", False)])
async def test_kubevirts_webhook_sets_a_status_back_that_is_not_written_by_kubevirt(
    kubernetes: Cluster, method: str, who: str, is_written: bool
) -> None:
    before, tokens = await kubevirts(kubernetes)
    after = published(before, "10.1.1.2", PORTS)
    after["metadata"]["annotations"]["somebodys"] = "annotation"
    kind = MERGE_PATCH if method == "PATCH" else "application/json"
    answer = await kubernetes.request(method, ONE, after, kind, token=tokens[who])
    assert answer["metadata"]["annotations"]["somebodys"] == "annotation"
    assert answer["status"] == (after if is_written else before)["status"]
    assert await kubernetes.request("GET", ONE) == answer


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"spec": {"evictionStrategy": "None"}}, id="spec"),
        pytest.param({"metadata": {"labels": {"kubevirt.io/migrationTargetNodeName": None}}}, id="label"),
    ],
)
async def test_kubevirts_webhook_refuses_what_only_kubevirt_may_change(kubernetes: Cluster, body: Any) -> None:
    before, tokens = await kubevirts(kubernetes)
    with pytest.raises(Refused, match=r": 422: .*virtualmachineinstances-update-validator"):
        await kubernetes.request("PATCH", ONE, body, MERGE_PATCH, token=tokens["anybody"])
    assert await kubernetes.request("GET", ONE) == before
    await kubernetes.request("PATCH", ONE, body, MERGE_PATCH, token=tokens["kubevirt-handler"])
    await kubernetes.request(
        "PATCH", ONE, {"metadata": {"labels": {"anybodys": "label"}}}, MERGE_PATCH, token=tokens["anybody"]
    )
