"""Where targets listen, announced on their VMIs, for the sources' migproxies to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from migproxy.announcement import TARGET_ANNOTATION, Announcement
from migproxy.inventory import PublishError
from migproxy.kube.api import JSON_PATCH, MERGE_PATCH, ApiError, ApiServer
from migproxy.vmi import VMI, InvalidVMI, parse

_ANNOTATIONS: Final = "/metadata/annotations"
_ANNOTATION: Final = f"{_ANNOTATIONS}/{TARGET_ANNOTATION.replace('~', '~0').replace('/', '~1')}"
_MIGRATION: Final = "/status/migrationState"
_REFUSAL: Final = "migproxy changes no annotation but migproxy.io/target"
"""Message of daemonset.yaml's policy `migproxy`: it is in force for this account."""


class Announcements:
    """Writes one annotation of VMIs, and nothing else.

    Every patch tests that the VMI still has what the decision was made on. Before the first announcement, the API
    server must refuse this account another change: under a name that the admission policy does not know, a stolen
    token could change any VMI.

    Args:
        api: The API server.
    """

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        self._is_guarded = False

    async def announce(self, vmi: VMI, announcement: Announcement) -> None:
        """Announces where this node listens for the VMI's migration, instead of what is announced there now.

        Args:
            vmi: As the inventory told it; its migration has not started.
            announcement: What to announce.

        Raises:
            PublishError: It could not be, or nobody knows whether it was; the VMI may not be what it was thought to be.
        """
        patch = [*_tests(vmi), {"op": "add", "path": _ANNOTATION, "value": str(announcement)}]
        # Beside a change, a VMI without any annotation refuses: nothing can be added to what is not there.
        first = {"op": "add", "path": _ANNOTATIONS, "value": {TARGET_ANNOTATION: str(announcement)}}
        alone = {"op": "test", "path": _ANNOTATIONS, "value": None}
        try:
            await self._check_guard(vmi)
            try:
                await self._patch(vmi, patch)
            except ApiError as error:
                if not error.is_conflict:
                    raise
                await self._patch(vmi, [*_tests(vmi, annotated=False), alone, first])
        except ApiError as error:
            who = f"VMI {vmi.namespace}/{vmi.name}"
            if error.is_conflict:
                raise PublishError(f"{who}: it changed while this node was about to announce: {error}") from error
            raise PublishError(f"{who}: cannot announce: {_remedied(error)}") from error

    async def withdraw(self, vmi: VMI, is_void: Callable[[VMI], bool]) -> VMI | None:
        """Removes what is announced on a VMI as it stands in the API server, whatever the inventory has told of it.

        Args:
            vmi: Which.
            is_void: Asked about the VMI as it stands there, where something is announced: whether that is to go.

        Returns:
            The VMI as it stands there then; None where it is gone.

        Raises:
            PublishError: It could not be removed, or changed in that very moment: try again.
        """
        try:
            now = parse(await self._api.request("GET", _path(vmi)))
            if now.uid != vmi.uid:
                return None
            if now.announced is None or not is_void(now):
                return now
            await self._patch(now, [*_tests(now), {"op": "remove", "path": _ANNOTATION}])
        except (ApiError, InvalidVMI) as error:
            if isinstance(error, ApiError) and error.status == 404:
                return None
            raise PublishError(
                f"VMI {vmi.namespace}/{vmi.name}: cannot withdraw what is announced: {_remedied(error)}"
            ) from error
        return replace(now, announced=None)

    async def _check_guard(self, vmi: VMI) -> None:
        """Tries once, without effect (dryRun), to change what the admission policy lets no migproxy change.

        Raises:
            PublishError: It is allowed.
            ApiError: There is no saying.
        """
        if self._is_guarded:
            return
        forbidden = {"metadata": {"annotations": {"migproxy.io/must-be-refused": ""}}}
        try:
            await self._api.request("PATCH", _path(vmi), {"dryRun": "All"}, forbidden, MERGE_PATCH)
        except ApiError as error:
            if error.status != 403 or _REFUSAL not in str(error):
                raise
            self._is_guarded = True
            return
        raise PublishError(
            f"VMI {vmi.namespace}/{vmi.name}: not announced: this account may change any annotation of any VMI, "
            "so no policy of daemonset.yaml is in force for it: apply daemonset.yaml again, with a ServiceAccount "
            "whose name has migproxy in it"
        )

    async def _patch(self, vmi: VMI, patch: list[dict[str, Any]]) -> None:
        await self._api.request("PATCH", _path(vmi), None, patch, JSON_PATCH)


def _path(vmi: VMI) -> str:
    return f"/apis/kubevirt.io/v1/namespaces/{vmi.namespace}/virtualmachineinstances/{vmi.name}"


def _tests(vmi: VMI, *, annotated: bool = True) -> list[dict[str, Any]]:
    """What must still be so when the patch is applied; a test for null holds where the field is absent too."""
    values: dict[str, Any] = {"/metadata/uid": vmi.uid}
    if vmi.migration:
        values[f"{_MIGRATION}/migrationUid"] = vmi.migration.migration_uid
        if vmi.migration.start is None:
            values[f"{_MIGRATION}/startTimestamp"] = None
    if annotated:
        values[_ANNOTATION] = vmi.announced
    return [{"op": "test", "path": path, "value": value} for path, value in values.items()]


def _remedied(error: Exception) -> str:
    if isinstance(error, ApiError) and error.status == 403:
        return f"{error} (apply daemonset.yaml again: its ClusterRole and policy allow it)"
    return str(error)
