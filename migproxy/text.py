"""What others wrote, in our own words: excerpts for errors, and text that no terminal takes for a command. Pure."""

import reprlib
from typing import Any, Final

MAX_EXCERPT: Final = 200

_excerpts = reprlib.Repr()
_excerpts.maxstring, _excerpts.maxlevel = 60, 2


def excerpt(value: object) -> str:
    """A value that somebody else wrote, for an error: short, and printable, as repr has it."""
    try:
        return _excerpts.repr(value)[:MAX_EXCERPT]
    except ValueError:  # an integer beyond Python's limit of 4300 digits
        return "a huge number"


def printable(text: str, keep: str = "") -> str:
    r"""Text for a terminal: control, format and bidirectional characters become escapes such as \x1b.

    Args:
        text: From anywhere.
        keep: Control characters that stay, such as line breaks.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else _escape(one) for one in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def printable_values(value: Any) -> Any:
    """A JSON value whose strings, keys included, are all `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(key)): printable_values(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_values(one) for one in value]
    return value
