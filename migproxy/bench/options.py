"""The command line's words as a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from migproxy.bench.command import NAMES, PAGES, Plan
from migproxy.bench.contestants import Templates
from migproxy.bench.results import CUBIC, SYSTEM
from migproxy.bench.stage import LOOPBACK, VETH, BenchError

_QUICK: Mapping[str, Any] = {
    "rounds": 3,
    "seconds": 0.2,
    "connections": (1, 8),
    "sizes": (PAGES,),
    "networks": (VETH,),
    "migrations": 20,
}
_CHOICES = {"networks": (VETH, LOOPBACK), "congestion": (CUBIC, SYSTEM), "contestants": NAMES}
_BOUNDS = {"connections": (1, 1024, 1), "sizes": (512, 4 << 20, 512)}  # least, most, multiple of


def make_plan(
    *,
    quick: bool,
    numbers: Mapping[str, float | None],
    lists: Mapping[str, str | None],
    commands: tuple[Sequence[str], Sequence[str]],
    files: Mapping[str, str | None],
) -> Plan:
    """Makes the plan; what is None keeps its default.

    Args:
        quick: Whether the defaults are those of a short run.
        numbers, lists, files: Fields of the plan; lists as words joined by commas.
        commands: NAME=COMMAND of the sources and of the targets.

    Raises:
        BenchError: A word is wrong; says which, and what there is.
    """
    chosen = dict(_QUICK) if quick else {}
    chosen |= files
    chosen |= {name: value for name, value in numbers.items() if value is not None}
    chosen |= {name: _list(name, text) for name, text in lists.items() if text is not None}
    return Plan(**chosen, custom=_custom(*commands))


def _list(name: str, text: str) -> tuple[Any, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise BenchError(f"--{name}: names nothing")
    if name in _CHOICES:
        for word in words:
            if word not in _CHOICES[name]:
                raise BenchError(f"{word!r} is none of the {name}: there are {', '.join(_CHOICES[name])}")
        return tuple(words)
    least, most, multiple = _BOUNDS[name]
    for word in words:
        if not word.isdecimal() or not least <= int(word) <= most or int(word) % multiple:
            raise BenchError(f"{word!r} is none of the {name}: numbers from {least} to {most}, in steps of {multiple}")
    return tuple(int(word) for word in words)


def _custom(sources: Sequence[str], targets: Sequence[str]) -> dict[str, Templates]:
    pairs: list[dict[str, str]] = [{}, {}]
    for found, words in zip(pairs, (sources, targets), strict=True):
        for word in words:
            name, equals, template = word.partition("=")
            if not equals or not name or name in NAMES:
                raise BenchError(f"{word!r}: NAME=COMMAND is expected, with a name that is not taken")
            found[name] = template
    if pairs[0].keys() != pairs[1].keys():
        odd = ", ".join(sorted(pairs[0].keys() ^ pairs[1].keys()))
        raise BenchError(f"{odd}: --source-command and --target-command belong together, with the same NAME")
    return {name: Templates(source, pairs[1][name]) for name, source in pairs[0].items()}
