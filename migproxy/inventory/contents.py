"""What a file of VMIs holds, and what can be wrong with it."""

from dataclasses import dataclass
from typing import Final

from migproxy.vmi import VMI


class SyntaxFlaw(ValueError):
    """The text is not YAML.

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
class Entry:
    """A VMI and the line that it begins on, from 1."""

    vmi: VMI
    line: int


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
    """

    entries: tuple[Entry, ...] = ()
    flaws: tuple[Flaw, ...] = ()
    ignored: tuple[tuple[int, str], ...] = ()


EMPTY: Final = Contents()
