"""What a file of VMIs holds, and what can be wrong with it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from migproxy.text import excerpt
from migproxy.vmi import VMI


class SyntaxFlaw(ValueError):
    """The text is not YAML, or it is cut off.

    Args:
        reason: what the parser says, without the position.
        line: where, from 1; None where the parser does not tell.
    """

    def __init__(self, reason: str, line: int | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


class NothingInIt(SyntaxFlaw):
    """The text holds no document at all, as the file of a writer that failed; an empty List is one."""

    def __init__(self) -> None:
        super().__init__("the file is empty", None)


class EditError(ValueError):
    """The address and ports cannot be put into the text; the message says why."""


@dataclass(frozen=True, slots=True)
class Revision:
    """Which state of an object a document has: decimal numbers of any length that grow, or empty where it has none.

    Args:
        version: metadata.resourceVersion; the API server's grows with each change.
        generation: metadata.generation, which grows with each change of the spec.
    """

    version: str = ""
    generation: str = ""

    def newer_than(self, other: "Revision") -> str | None:
        """Why this is a newer state of the same object than another one; None where nothing says so."""
        for name, mine, others in (
            ("resourceVersion", self.version, other.version),
            ("generation", self.generation, other.generation),
        ):
            if mine and others and _size(mine) != _size(others):
                is_newer = _size(mine) > _size(others)
                return f"its {name} {excerpt(mine)} is higher than {excerpt(others)}" if is_newer else None
        return None


def newest(revisions: Iterable[Revision]) -> int:
    """Which of several states of one object counts: the first of those that no later one is newer than."""
    found = list(revisions)
    best = 0
    for number, revision in enumerate(found):
        if revision.newer_than(found[best]):
            best = number
    return best


def _size(digits: str) -> tuple[int, str]:
    """Orders decimal numbers that may be longer than Python's int() takes."""
    significant = digits.lstrip("0")
    return len(significant), significant


@dataclass(frozen=True, slots=True)
class Entry:
    """A VMI, the line that it begins on, from 1, and which of its states it is."""

    vmi: VMI
    line: int
    revision: Revision = Revision()


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong with one document or VMI, and the line that it begins on (None: the whole file)."""

    reason: str
    line: int | None


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds.

    Args:
        entries: the VMIs in force, in the file's order; of one that is flawed now, its last good state.
        flaws: what is wrong now.
        ignored: objects of other kinds: the line and the kind.
        is_line_ended: the last line has a line break. YAML printers write one: a file that loses it is cut off.
    """

    entries: tuple[Entry, ...] = ()
    flaws: tuple[Flaw, ...] = ()
    ignored: tuple[tuple[int, str], ...] = ()
    is_line_ended: bool = field(default=False, compare=False)


EMPTY: Final = Contents()
