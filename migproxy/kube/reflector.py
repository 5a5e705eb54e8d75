"""A list of objects that follows the API server: list, then watch, through whatever happens to the connection."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from migproxy.kube.api import ApiError, ApiServer, Expired, Silent

log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pace:
    """How a reflector behaves in time.

    Attributes:
        page: Objects per request of a list.
        watch: Seconds, between which and twice of which the server is asked to end a watch.
        silence: Seconds without a byte after which a watch counts as hanging; the API server sends a bookmark
            about once a minute, so that this is not the rule.
        first_retry, last_retry: Seconds to wait after a failure, doubled from the one to the other, less up to
            half of it by chance, so that the nodes of a cluster do not come all at once.
        healthy: Seconds that a watch has to last for the failures before it to be forgotten.
    """

    page: int = 250
    watch: float = 240.0
    silence: float = 90.0
    first_retry: float = 0.2
    last_retry: float = 15.0
    healthy: float = 5.0


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """All the objects there are: what is not among them is gone."""

    objects: Mapping[str, T]


@dataclass(frozen=True, slots=True)
class Changed(Generic[T]):
    """An object has changed, appeared, or (None) gone."""

    uid: str
    object: T | None


class Reflector(Generic[T]):
    """Follows the objects of one resource that match a selector.

    Attributes:
        problem: What keeps it from following them now; None when it does, or only reconnects.
        heard: When the API server last sent something, a bookmark included (`time.time`).
        lists: Times that the objects were listed.
        breaks: Times that an attempt to list or to watch failed, or a watch broke.

    Args:
        api: The API server.
        path: Of the resource, from the root.
        selector: labelSelector or fieldSelector to its value.
        read: What is kept of an object.
        pace: How it behaves in time.
    """

    def __init__(
        self,
        api: ApiServer,
        path: str,
        selector: Mapping[str, str],
        read: Callable[[Mapping[str, Any]], T],
        pace: Pace,
    ) -> None:
        self.problem: str | None = None
        self._api = api
        self._path = path
        self._selector = selector
        self._read = read
        self._pace = pace
        self._version: str | None = None
        self._failures = 0
        self._has_expired = False
        self._is_doubtful = False
        self._watching_since: float | None = None
        self.heard: float | None = None
        self.lists = 0
        self.breaks = 0

    async def changes(self) -> AsyncGenerator[Listed[T] | Changed[T], None]:
        """Yields the list, then each change, for ever; a new list wherever changes may have been missed."""
        while True:
            try:
                if self._version is None:
                    objects, self._version = await self._list()
                    yield Listed(objects)
                async with aclosing(self._watch(self._version)) as watch:
                    async for change in watch:
                        yield change
                if not self._was_healthy():
                    raise ApiError(0, "watches are ended as soon as they begin")
                self._forget_failures()
            except ApiError as error:
                if error.status not in (0, 429, 503):  # the watch itself was refused: its version may be why
                    self._version = None
                await self._pause(error)

    async def _list(self) -> tuple[dict[str, T], str]:
        objects: dict[str, T] = {}
        query = {**self._selector, "limit": str(self._pace.page)}
        while True:
            page = await self._api.request("GET", self._path, query)
            try:
                for item in page.get("items") or ():
                    objects[item["metadata"]["uid"]] = self._read(item)
                version, token = page["metadata"]["resourceVersion"], page["metadata"].get("continue")
            except (KeyError, TypeError, AttributeError) as error:
                raise ApiError(0, f"the answer is no list of objects: {error!r}") from error
            if not token:
                self.heard, self.lists = time.time(), self.lists + 1
                return objects, version
            query["continue"] = token

    async def _watch(self, version: str) -> AsyncGenerator[Changed[T], None]:
        query = {
            **self._selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(round(self._pace.watch * random.uniform(1, 2))),  # noqa: S311 - no secret
        }
        self._watching_since = None
        async with aclosing(self._api.lines(self._path, query, self._pace.silence)) as lines:
            async for line in lines:
                if self._watching_since is None:
                    self._watching_since = asyncio.get_running_loop().time()
                self.heard = time.time()
                if line.strip():
                    self._is_doubtful = False
                if not self._is_doubtful:
                    self._end_problem()
                if line.strip() and (change := self._change(line)):
                    yield change

    def _change(self, line: bytes) -> Changed[T] | None:
        try:
            event = json.loads(line)
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                code, told = item.get("code", 0), f"{item.get('code')}: {item.get('message')}"
                raise Expired(410, told) if code == 410 else ApiError(code, told)
            version = item["metadata"]["resourceVersion"]
            change = None
            if kind != "BOOKMARK":
                uid = item["metadata"]["uid"]
                change = Changed(uid, None if kind == "DELETED" else self._read(item))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ApiError(0, f"the watch told something that is no event: {error!r}") from error
        self._version = version
        return change

    def _was_healthy(self) -> bool:
        since = self._watching_since
        return since is not None and asyncio.get_running_loop().time() - since >= self._pace.healthy

    def _forget_failures(self) -> None:
        self._failures, self._has_expired = 0, False

    async def _pause(self, error: ApiError) -> None:
        """Waits before the next attempt, but not after the first failure, a watch that was merely cut.

        Nor after the first 410, though others failed before it: the server is back, and everything is to be listed.
        """
        if self._was_healthy():
            self._forget_failures()
        self._failures += 1
        is_first = self._failures == 1 or (isinstance(error, Expired) and not self._has_expired)
        self._has_expired |= isinstance(error, Expired)
        is_silent = isinstance(error, Silent)
        # A server that accepts watches and tells nothing does not answer for being up.
        self._is_doubtful = is_silent and self._watching_since is not None
        self._watching_since = None
        self.breaks += 1
        waits = not is_first or bool(error.retry_after)
        if waits or is_silent:
            if self.problem is None:
                log.warning("cannot follow the API server, retrying", url=self._api.host + self._path, error=str(error))
            self.problem = str(error)
        if waits:
            wait = min(self._pace.first_retry * 2 ** min(self._failures - 2, 30), self._pace.last_retry)
            wait *= random.uniform(0.5, 1)  # noqa: S311 - no secret
            await asyncio.sleep(max(wait, min(error.retry_after or 0, self._pace.last_retry)))

    def _end_problem(self) -> None:
        if self.problem is not None:
            log.info("following the API server again", url=self._api.host + self._path)
        self.problem = None
