"""Kubernetes Events on VMIs: what `kubectl describe vmi` shows of the proxies."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import structlog

from migproxy.kube.api import MERGE_PATCH, ApiError, ApiServer
from migproxy.vmi import VMI

log = structlog.get_logger(__name__)

COMPONENT: Final = "migproxy"
_KEPT: Final = 1000  # series; the oldest is forgotten, and begins anew if it comes back
_ATTEMPTS: Final = 5
_RETRY_SECONDS: Final = 5.0
_MESSAGE_BYTES: Final = 1000  # the API server takes 1024


@dataclass(slots=True)
class _Series:
    """The same thing said of the same VMI: one Event, however often.

    Attributes:
        count: How often, as the API server knows it; 0 before it knows the Event.
        pending: How often since.
        due: When it may be written again, by the event loop's clock.
    """

    vmi: VMI
    reason: str
    kind: str
    message: str
    first: datetime
    last: datetime
    count: int = 0
    pending: int = 0
    due: float = 0.0
    failures: int = 0


class EventRecorder:
    """Writes Events, one per VMI and reason, in the background: nobody waits for it, nothing fails with it.

    Args:
        api: The API server.
        node: This node's name, the Events' source host.
        interval: Seconds between two writes of the same Event; what comes between is counted.
    """

    def __init__(self, api: ApiServer, node: str, interval: float = 30.0) -> None:
        self._api = api
        self._node = node
        self._interval = interval
        self._series: OrderedDict[tuple[str, str], _Series] = OrderedDict()
        self._noted = asyncio.Event()
        self._denied = False

    def note(self, vmi: VMI, reason: str, message: str, *, warning: bool) -> None:
        """Has an Event written.

        Args:
            vmi: Whom it is about.
            reason: In CamelCase, for machines.
            message: For people.
            warning: Somebody must mend something.
        """
        now = datetime.now(UTC)
        key = (vmi.uid, reason)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(vmi, reason, "", "", now, now)
            while len(self._series) > _KEPT:
                self._series.popitem(last=False)
        series.kind = "Warning" if warning else "Normal"
        series.message = message.encode()[:_MESSAGE_BYTES].decode(errors="ignore")
        series.last = now
        series.pending += 1
        self._noted.set()

    @property
    def has_pending(self) -> bool:
        """Whether something that was noted is not written yet."""
        return any(series.pending for series in self._series.values())

    async def run(self) -> None:
        """Writes what is noted until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._noted.clear()
            waiting = [series for series in self._series.values() if series.pending]
            for series in [series for series in waiting if series.due <= loop.time()]:
                await self._write(series)
            waiting = [series for series in self._series.values() if series.pending]
            try:
                async with asyncio.timeout_at(min((series.due for series in waiting), default=None)):
                    await self._noted.wait()
            except TimeoutError:
                continue

    async def _write(self, series: _Series) -> None:
        counted = series.pending
        try:
            if series.count:
                await self._patch(series)
            else:
                await self._create(series)
        except ApiError as error:
            if error.status == 404 and series.count:  # Events are deleted after an hour
                series.count = 0
                return
            self._failed(series, error)
        else:
            series.count += counted
            series.pending -= counted
            series.failures = 0
            series.due = asyncio.get_running_loop().time() + self._interval

    def _failed(self, series: _Series, error: ApiError) -> None:
        series.failures += 1
        series.due = asyncio.get_running_loop().time() + max(_RETRY_SECONDS, error.retry_after or 0)
        if error.status == 403 and not self._denied:
            self._denied = True
            log.warning(
                "Kubernetes Events are not written",
                error=str(error),
                remedy='allow create and patch on events (apiGroup "") in migproxy\'s ClusterRole',
            )
        if (400 <= error.status < 500 and error.status != 429) or series.failures >= _ATTEMPTS:
            series.pending = series.failures = 0  # it cannot be written; the log has said it

    async def _create(self, series: _Series) -> None:
        path = f"/api/v1/namespaces/{series.vmi.namespace}/events"
        try:
            await self._api.request("POST", path, body=self._event(series))
        except ApiError as error:
            if error.status != 409:
                raise
            # An earlier life of this daemon wrote it: its count goes on.
            known = await self._api.request("PATCH", f"{path}/{self._name(series)}", None, {}, MERGE_PATCH)
            series.count = int(known.get("count") or 1)
            await self._patch(series)

    async def _patch(self, series: _Series) -> None:
        path = f"/api/v1/namespaces/{series.vmi.namespace}/events/{self._name(series)}"
        body = {
            "count": series.count + series.pending,
            "type": series.kind,
            "message": series.message,
            "lastTimestamp": _timestamp(series.last),
        }
        await self._api.request("PATCH", path, None, body, MERGE_PATCH)

    def _name(self, series: _Series) -> str:
        """The same for the same series, after a restart of the daemon too."""
        identity = f"{series.vmi.uid} {self._node} {series.reason}"
        return f"{series.vmi.name[:230]}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def _event(self, series: _Series) -> dict[str, object]:
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": self._name(series), "namespace": series.vmi.namespace},
            "involvedObject": {
                "apiVersion": "kubevirt.io/v1",
                "kind": "VirtualMachineInstance",
                "namespace": series.vmi.namespace,
                "name": series.vmi.name,
                "uid": series.vmi.uid,
            },
            "reason": series.reason,
            "message": series.message,
            "type": series.kind,
            "source": {"component": COMPONENT, "host": self._node},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._node,
            "firstTimestamp": _timestamp(series.first),
            "lastTimestamp": _timestamp(series.last),
            "count": series.pending,
        }


def _timestamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
