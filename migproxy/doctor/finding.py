"""What a check of `migproxy doctor` finds, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from migproxy.text import printable


class Level(StrEnum):
    """How bad a finding is; only FAIL keeps migrations from working."""

    OK = "ok"
    INFO = "info"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        level: How bad it is.
        finding: What was found.
        remedy: What to do; "" where there is nothing to do.
    """

    check: str
    level: Level
    finding: str
    remedy: str = ""


def render(findings: Sequence[Finding]) -> str:
    """The findings for people, and a last line that sums them up; no text in them controls the terminal."""
    width = max((len(one.check) for one in findings), default=0)
    lines = []
    for one in findings:
        lines.append(f"{one.level.upper():4}  {one.check:{width}}  {one.finding}")
        if one.remedy:
            lines.append(f"{'':4}  {'':{width}}  -> {one.remedy}")
    failed, warned = (sum(one.level is level for one in findings) for level in (Level.FAIL, Level.WARN))
    lines.append(f"{len(findings)} checks: {failed} failed, {warned} warnings")
    return "\n".join(printable(line) for line in lines)
