"""VMIs reach the inventory completely, once, and in their last state, whatever happens to the connection."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from migproxy.inventory import FAILED
from migproxy.inventory.kube import KubeInventory
from migproxy.kube.api import ApiServer
from migproxy.kube.reflector import Reflector
from tests.clock import Clock, eventually
from tests.kube.apiserver import ApiDouble
from tests.kube.cluster import MERGE_PATCH, VMIS, Cluster, begin, vmi
from tests.kube.gate import Gate
from tests.kube.world import PACE, Listener, listening

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]


def double_of(kubernetes: Cluster) -> ApiDouble:
    """The double, for what a real server does not do on request."""
    if kubernetes.double is None:
        pytest.skip("a real API server does not shorten its history or send bookmarks on request")
    return kubernetes.double


def is_watch(request: web.Request) -> bool:
    return "watch" in request.query


async def rename_pod(kubernetes: Cluster, name: str, pod: str) -> None:
    """A change that the inventory must tell of."""
    await kubernetes.request("PATCH", f"{VMIS}/{name}", {"status": {"activePods": {pod: "node01"}}}, MERGE_PATCH)


async def change_during_gap(kubernetes: Cluster) -> None:
    await rename_pod(kubernetes, "changes", "other")
    await kubernetes.request("DELETE", f"{VMIS}/vanishes")
    await kubernetes.request("POST", VMIS, vmi("appears"))


async def assert_difference_is_told(listener: Listener) -> None:
    await eventually(lambda: listener.names == {"stays", "changes", "appears"}, "what happened during the gap")
    await eventually(lambda: "other" in pods(listener, "changes"), "the change during the gap")
    stays = listener.named("stays")
    assert stays
    assert all(stays.uid not in batch for batch in listener.batches[1:])


def pods(listener: Listener, name: str = "one") -> set[str]:
    found = listener.named(name)
    return set(found.active_pods) if found else set()


def target_label(listener: Listener) -> str | None:
    found = listener.named("one")
    return found.target_node_label if found else "the VMI is gone"


async def test_first_batch_is_the_whole_state_of_this_node(kubernetes: Cluster, tmp_path: Path) -> None:
    for number in range(20):  # three pages
        await kubernetes.request("POST", VMIS, vmi(f"here-{number}", node="node01"))
        await kubernetes.request("POST", VMIS, vmi(f"there-{number}", node="node02"))
    arriving = vmi("arriving", node="node02")
    arriving["metadata"]["labels"]["kubevirt.io/migrationTargetNodeName"] = "node01"
    await kubernetes.request("POST", VMIS, arriving)
    async with listening(kubernetes, tmp_path) as listener:
        assert {found.name for found in listener.batches[0].values() if found} == {
            "arriving",
            *(f"here-{number}" for number in range(20)),
        }


async def test_cluster_without_vmis_is_synchronised(kubernetes: Cluster, tmp_path: Path) -> None:
    async with listening(kubernetes, tmp_path) as listener:
        assert listener.batches == [{}]
        assert listener.inventory.problems == {}


async def test_changes_are_told_as_they_happen(kubernetes: Cluster, door: Gate, tmp_path: Path) -> None:
    async with listening(kubernetes, tmp_path, door.url) as listener:
        await kubernetes.request("POST", VMIS, vmi("one"))
        await eventually(lambda: listener.names == {"one"}, "the new VMI")
        await rename_pod(kubernetes, "one", "other")
        await eventually(lambda: "other" in pods(listener), "its change")
        await kubernetes.request("DELETE", f"{VMIS}/one")
        await eventually(lambda: listener.names == set(), "its end")
        assert door.lists == 2


@pytest.mark.parametrize("slow", ["kubevirt.io/nodeName", "kubevirt.io/migrationTargetNodeName"])
async def test_vmi_that_is_in_both_streams_ends_when_it_left_both(
    kubernetes: Cluster, door: Gate, tmp_path: Path, slow: str
) -> None:
    door.slow = slow

    async def label(name: str, node: str | None) -> None:
        labels = {"metadata": {"labels": {f"kubevirt.io/{name}": node}}}
        await kubernetes.request("PATCH", f"{VMIS}/one", labels, MERGE_PATCH)

    async with listening(kubernetes, tmp_path, door.url) as listener:
        await kubernetes.request("POST", VMIS, vmi("one", node="node02"))
        await kubernetes.request("PATCH", f"{VMIS}/one", begin("first", "node02", "node01"), MERGE_PATCH)
        await eventually(lambda: listener.names == {"one"}, "the VMI that arrives")
        await label("nodeName", "node01")
        await label("migrationTargetNodeName", None)
        await eventually(lambda: target_label(listener) is None, "the label's end")
        assert all(None not in batch.values() for batch in listener.batches)
        await label("nodeName", "node02")
        await eventually(lambda: listener.names == set(), "its end")


async def test_cut_watch_is_resumed_without_a_new_list(kubernetes: Cluster, door: Gate, tmp_path: Path) -> None:
    await kubernetes.request("POST", VMIS, vmi("one"))
    async with listening(kubernetes, tmp_path, door.url) as listener:
        await eventually(lambda: door.watches == 2, "the watches")
        for number in range(5):
            door.cut()
            pod = f"pod-{number}"
            await rename_pod(kubernetes, "one", pod)  # nobody watches at this moment
            await eventually(lambda pod=pod: pod in pods(listener), "the change during the gap")  # type: ignore[misc]
        assert door.lists == 2
        assert len(listener.batches) <= 6


async def test_watch_that_the_server_ends_is_begun_again(kubernetes: Cluster, door: Gate, tmp_path: Path) -> None:
    await kubernetes.request("POST", VMIS, vmi("one"))
    pace = replace(PACE, watch=0.6, healthy=0.1, silence=30)  # the server is asked for a second
    async with listening(kubernetes, tmp_path, door.url, pace=pace) as listener:
        await eventually(lambda: door.watches >= 6, "new watches")
        await rename_pod(kubernetes, "one", "other")
        await eventually(lambda: "other" in pods(listener), "the change")
        assert door.lists == 2
        assert listener.inventory.problems == {}


async def test_silent_connection_is_noticed(kubernetes: Cluster, door: Gate, tmp_path: Path, clock: Clock) -> None:
    await kubernetes.request("POST", VMIS, vmi("one"))
    async with listening(kubernetes, tmp_path, door.url) as listener:
        await eventually(lambda: door.watches == 2, "the watches")
        door.stall()
        await rename_pod(kubernetes, "one", "other")
        await eventually(lambda: "other" in pods(listener), "the change, by a new connection")
        assert clock() == PACE.silence
        assert door.lists == 2


async def test_gone_as_a_status_lists_anew_and_tells_the_difference(
    kubernetes: Cluster, door: Gate, tmp_path: Path
) -> None:
    for name in ("stays", "changes", "vanishes"):
        await kubernetes.request("POST", VMIS, vmi(name))
    async with listening(kubernetes, tmp_path, door.url) as listener:
        door.refuse = lambda request: 410 if is_watch(request) else None
        door.cut()
        await change_during_gap(kubernetes)
        door.refuse = lambda request: None
        await assert_difference_is_told(listener)


async def test_gone_as_an_event_lists_anew_and_tells_the_difference(
    kubernetes: Cluster, door: Gate, tmp_path: Path
) -> None:
    for name in ("stays", "changes", "vanishes"):
        await kubernetes.request("POST", VMIS, vmi(name))
    async with listening(kubernetes, tmp_path, door.url, pace=replace(PACE, silence=60.0)) as listener:
        await eventually(lambda: door.watches == 2, "the watches")
        door.stall()
        await change_during_gap(kubernetes)
        await door.expire()
        await assert_difference_is_told(listener)
        assert door.lists == 4


async def test_server_that_forgot_the_history_is_listed_anew(kubernetes: Cluster, door: Gate, tmp_path: Path) -> None:
    double = double_of(kubernetes)
    for as_event in (False, True):
        double.faults.gone_as_event = as_event
        for name in ("stays", "changes", "vanishes"):
            await kubernetes.request("POST", VMIS, vmi(name))
        async with listening(kubernetes, tmp_path, door.url) as listener:
            await eventually(lambda: door.watches >= 2, "the watches")
            door.refuse = lambda request: 503
            door.cut()
            await change_during_gap(kubernetes)
            double.compact()
            door.refuse = lambda request: None
            await assert_difference_is_told(listener)
        for name in ("stays", "changes", "appears"):
            await kubernetes.request("DELETE", f"{VMIS}/{name}")


async def test_bookmarks_keep_a_silent_watch_resumable(kubernetes: Cluster, door: Gate, tmp_path: Path) -> None:
    double = double_of(kubernetes)
    double.faults.bookmark_seconds = 0.05
    await kubernetes.request("POST", VMIS, vmi("elsewhere", node="node02"))
    async with listening(kubernetes, tmp_path, door.url) as listener:
        for number in range(30):  # none of this node's business, but the version goes on
            await rename_pod(kubernetes, "elsewhere", f"pod-{number}")
        told = {str(double._version)}
        await eventually(lambda: {one._version for one in listener.inventory._reflectors} == told, "the bookmarks")
        double.compact()
        before = door.watches
        door.cut()
        await eventually(lambda: door.watches == before + 2, "the watches again")
        assert door.lists == 2


async def test_list_whose_token_expires_is_begun_again(kubernetes: Cluster, door: Gate, tmp_path: Path) -> None:
    for number in range(20):
        await kubernetes.request("POST", VMIS, vmi(f"here-{number}"))
    expired: list[str] = []

    def expire_once(request: web.Request) -> int | None:
        if "continue" in request.query and len(expired) < 2:
            expired.append(request.query["continue"])
            return 410
        return None

    door.refuse = expire_once
    async with listening(kubernetes, tmp_path, door.url) as listener:
        assert len(expired) == 2
        assert len(listener.names) == 20


async def test_server_that_is_away_keeps_everything_and_is_followed_again(
    kubernetes: Cluster, door: Gate, tmp_path: Path
) -> None:
    await kubernetes.request("POST", VMIS, vmi("one"))
    async with listening(kubernetes, tmp_path, door.url) as listener:
        await eventually(lambda: door.watches == 2, "the watches")
        await door.close()
        await eventually(lambda: len(listener.inventory.problems) == 2, "the problems")
        assert listener.names == {"one"}
        await kubernetes.request("DELETE", f"{VMIS}/one")
        await kubernetes.request("POST", VMIS, vmi("two"))
        await door.open()
        await eventually(lambda: listener.names == {"two"}, "what happened meanwhile")
        await eventually(lambda: listener.inventory.problems == {}, "the end of the problems")


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_errors_are_waited_out(
    kubernetes: Cluster, door: Gate, tmp_path: Path, clock: Clock, status: int
) -> None:
    refusals: list[float] = []

    def refuse(request: web.Request) -> int | None:
        if "migrationTargetNodeName" not in request.query.get("labelSelector", ""):
            return None  # one of the two streams is enough, and can be timed
        refusals.append(clock())
        return status if len(refusals) <= 6 else None

    door.refuse = refuse
    await kubernetes.request("POST", VMIS, vmi("one"))
    async with listening(kubernetes, tmp_path, door.url) as listener:
        assert listener.names == {"one"}
    gaps = [later - earlier for earlier, later in pairwise(refusals[:7])]
    if status == 429:  # with Retry-After, of which the pace of these tests leaves so much
        assert gaps == pytest.approx([PACE.last_retry] * 6)
    else:  # less up to half of it by chance
        longest = [0, *(min(PACE.first_retry * 2**number, PACE.last_retry) for number in range(5))]
        assert all(most / 2 <= gap <= most for gap, most in zip(gaps, longest, strict=True)), gaps


async def test_first_410_after_an_outage_is_answered_by_a_list_at_once_and_later_ones_are_waited_out(
    kubernetes: Cluster, door: Gate, tmp_path: Path, clock: Clock
) -> None:
    answers: list[int] = []
    expired: list[float] = []
    pauses: list[float] = []

    def refuse(request: web.Request) -> int | None:
        if "migrationTargetNodeName" not in request.query.get("labelSelector", ""):
            return None
        if not is_watch(request):
            pauses.extend(clock() - at for at in expired[len(pauses) :])
            return None
        status = answers.pop(0) if answers else None
        if status == 410:
            expired.append(clock())
        return status

    door.refuse = refuse
    async with listening(kubernetes, tmp_path, door.url):
        await eventually(lambda: door.watches == 2, "the watches")
        answers += [503] * 8 + [410] * 3
        door.cut()
        await eventually(lambda: len(pauses) == 3, "the lists")
    first, *later = pauses
    assert first == pytest.approx(0, abs=0.001)
    assert all(PACE.last_retry / 2 <= pause <= PACE.last_retry + 0.001 for pause in later), later


async def test_list_that_is_not_answered_in_time_is_a_problem_at_once(
    kubernetes: Cluster, door: Gate, tmp_path: Path, clock: Clock
) -> None:
    door.hold = lambda request: True
    async with ApiServer(str(kubernetes.kubeconfig(tmp_path, "node01", door.url))) as api:
        listener = Listener(KubeInventory(api, "node01", PACE))
        task = asyncio.create_task(listener.run())
        await eventually(lambda: len(listener.inventory.problems) == 2, "the problems", 100)
        assert clock() == pytest.approx(30, abs=1)
        assert "no answer in time" in str(listener.inventory.problems)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_silent_watch_is_a_problem_until_something_is_told(
    kubernetes: Cluster, door: Gate, tmp_path: Path, clock: Clock
) -> None:
    await kubernetes.request("POST", VMIS, vmi("one"))
    await kubernetes.request("PATCH", f"{VMIS}/one", begin("first", "node02", "node01"), MERGE_PATCH)
    async with listening(kubernetes, tmp_path, door.url) as listener:
        await eventually(lambda: door.watches == 2, "the watches")
        began = clock()
        await eventually(lambda: len(listener.inventory.problems) == 2, "the problems")
        assert clock() - began == pytest.approx(PACE.silence, abs=0.01)
        await eventually(lambda: door.watches == 4, "new watches, which are accepted")
        assert len(listener.inventory.problems) == 2
        await rename_pod(kubernetes, "one", "other")
        await eventually(lambda: listener.inventory.problems == {}, "the end of the problems")


async def test_refused_token_is_said_and_read_again(kubernetes: Cluster, door: Gate, tmp_path: Path) -> None:
    await kubernetes.request("POST", VMIS, vmi("one"))
    refuse: list[int | None] = [None]
    door.refuse = lambda request: refuse[0]
    async with listening(kubernetes, tmp_path, door.url) as listener:
        refuse[0] = 401
        door.cut()
        await eventually(
            lambda: str(listener.inventory.problems).count("the token is not accepted") == 2, "the problem"
        )
        refuse[0] = None
        await kubernetes.request("DELETE", f"{VMIS}/one")
        await eventually(lambda: listener.names == set(), "what happened meanwhile")


async def test_missing_permission_is_named(kubernetes: Cluster, tmp_path: Path) -> None:
    role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/migproxy"
    await kubernetes.request("PATCH", role, {"rules": []}, MERGE_PATCH)
    async with ApiServer(str(kubernetes.kubeconfig(tmp_path, "node01"))) as api:
        listener = Listener(KubeInventory(api, "node01", PACE))
        task = asyncio.create_task(listener.run())
        await eventually(lambda: len(listener.inventory.problems) == 2, "the problems")
        for problem in listener.inventory.problems.values():
            assert "list and watch on virtualmachineinstances" in problem
            assert "ClusterRole migproxy" in problem
        assert not listener.batches
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.simulated_time
async def test_an_event_that_python_s_parser_cannot_nest_is_a_problem_and_ends_nothing() -> None:
    class Api:
        host = "https://api"

        async def request(self, *_: Any) -> Any:
            return {"items": [], "metadata": {"resourceVersion": "1"}}

        async def lines(self, *_: Any) -> AsyncIterator[bytes]:
            yield b""
            yield b'{"type": "MODIFIED", "object": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"

    reflector: Reflector[Any] = Reflector(cast(ApiServer, Api()), "/vmis", {}, dict, PACE)
    async with aclosing(reflector.changes()) as changes:
        await anext(changes)
        following = asyncio.ensure_future(anext(changes))
        await eventually(lambda: reflector.problem is not None, "the problem")
        assert "recursion" in str(reflector.problem)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_vmi_that_cannot_be_read_keeps_its_last_good_state(kubernetes: Cluster, tmp_path: Path) -> None:
    await kubernetes.request("POST", VMIS, vmi("one"))
    async with listening(kubernetes, tmp_path) as listener:
        await kubernetes.request("PATCH", f"{VMIS}/one", {"status": {"phase": 3}}, MERGE_PATCH)
        await eventually(lambda: bool(listener.inventory.flaws), "the flaw")
        (flaw,) = listener.inventory.flaws.values()
        assert "default/one" in flaw
        assert [listener.inventory.may_hide(uid) for uid in (*listener.inventory.flaws, "another")] == [True, False]
        assert not listener.inventory.problems, "it says nothing of the node"
        told: list[str] = []
        async with asyncio.timeout(30):
            while not told:
                found = await kubernetes.request("GET", "/api/v1/namespaces/default/events")
                told = [item["message"] for item in found["items"] if item["reason"] == FAILED]
        assert flaw in told[0]
        assert listener.names == {"one"}
        await kubernetes.request("PATCH", f"{VMIS}/one", {"status": {"phase": "Running"}}, MERGE_PATCH)
        await eventually(lambda: not listener.inventory.flaws, "the end of the flaw")
        assert len(listener.batches) == 1


async def test_health_tells_of_breaks_of_lists_and_of_the_last_word(
    kubernetes: Cluster, door: Gate, tmp_path: Path
) -> None:
    await kubernetes.request("POST", VMIS, vmi("one"))
    began = time.time()
    async with listening(kubernetes, tmp_path, door.url) as listener:
        await eventually(lambda: door.watches == 2, "the watches")
        first = listener.inventory.health
        assert (first.source, first.reconnects, first.relists) == ("kubernetes", 0, 0)
        assert began <= (first.last_event or 0) <= time.time()
        door.cut()
        await rename_pod(kubernetes, "one", "other")
        await eventually(lambda: "other" in pods(listener), "the change during the gap")
        await eventually(lambda: (listener.inventory.health.reconnects or 0) >= 2, "both breaks")
        assert listener.inventory.health.relists == 0
        assert (listener.inventory.health.last_event or 0) >= (first.last_event or 0)
