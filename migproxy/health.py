"""What parts of the daemon can tell of themselves; a watch's health is optional, and exported only where it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class WatchHealth:
    """How an inventory's watch of its source does.

    Attributes:
        source: "files" or "kubernetes".
        last_event: When it last heard from its source (`time.time`); None before that. A Kubernetes watch hears
            bookmarks at least each minute or so; a folder is silent while nobody writes to it.
        reconnects: Times that a broken watch was begun anew; None where there is no connection.
        relists: Times that the whole state was read anew; None where that means nothing.
    """

    source: str
    last_event: float | None
    reconnects: int | None = None
    relists: int | None = None


@runtime_checkable
class WatchReporter(Protocol):
    """An inventory that knows how its watch does."""

    @property
    def health(self) -> WatchHealth: ...


@dataclass(frozen=True, slots=True)
class Activity:
    """What a node does now.

    Attributes:
        running: Migrations that have begun.
        prepared: Those that have not.
        rate: Bytes per second of all of them, both ways.
        draining: Whether no new one is taken any more.
        problem: What keeps the node from being ready, None when it is.
    """

    running: int
    prepared: int
    rate: float
    draining: bool = False
    problem: str | None = None
