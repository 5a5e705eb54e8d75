"""What parts of the daemon can tell of their own health; each is optional, and exported only where it is told."""

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
