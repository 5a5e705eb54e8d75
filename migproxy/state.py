"""What a daemon knows of its migrations that descriptors do not tell: words that the relay keeps for the next daemon.

Which descriptors belong together stands in their names (`survival`), never here: words that are lost cost counters, and
pair nothing wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from migproxy.bottleneck import By
from migproxy.portmap import Channel


class StateError(Exception):
    """Words that cannot be used; says why."""


def _one_of(*known: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in known:
            raise ValueError(f"{text!r} is none of {', '.join(known)}")
        return text

    return check


Label = Annotated[str, AfterValidator(_one_of(*(channel.label for channel in Channel)))]
Side = Annotated[str, AfterValidator(_one_of("source", "target"))]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class ChannelState(_Record):
    """What the connections of a channel that are over have moved, and how they ended."""

    connections: int = 0
    failures: dict[str, int] = {}
    sent: int = 0
    received: int = 0
    spliced: tuple[int, int] = (0, 0)
    modes: dict[str, int] = {}
    retransmits: int = 0
    segments: int = 0


class ProxyState(_Record):
    """One side of one migration.

    Attributes:
        began: When it was first made (`time.time`).
        opened, closed: See `traffic.Progress`.
        channels: By label.
        paths: See `traffic.Progress`; the path, and the reason if there is one.
        limited: See `traffic.Progress`.
    """

    namespace: str
    name: str
    vmi_uid: str
    migration_uid: str
    role: Side
    began: float
    opened: float | None = None
    closed: float | None = None
    channels: dict[Label, ChannelState] = {}
    paths: list[tuple[str, str, int]] = []
    limited: dict[By, float] = {}


def read(words: str) -> ProxyState:
    """Reads what `ProxyState.model_dump_json` made.

    Raises:
        StateError: It is of another version, or damaged.
    """
    try:
        return ProxyState.model_validate_json(words)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise StateError(f"{where + ': ' if where else ''}{problem['msg']}") from error
