"""The record of a run: how each test ended, as JSON lines; and the tables made of it.

python -m tests.record FILE...                  prints the slowest tests, and a line for each module
python -m tests.record --keep FOLDER FILE...    writes that into a dated file there, with what it was run on
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

_SLOWEST = 20


class Recorder:
    """A pytest plugin that writes down each test's end.

    Args:
        path: The file, which is appended to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "PYTEST_XDIST_WORKER" in os.environ:  # its controller gets the same report
            return
        seconds = self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "teardown" or report.outcome != "passed":
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 3)}
            with self._path.open("a") as file:
                print(json.dumps(line), file=file)


@dataclass(slots=True)
class Module:
    """How the tests of a module ended."""

    tests: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    seconds: float = 0.0


def read(paths: Iterable[Path]) -> dict[str, dict[str, object]]:
    """How each test ended, by its ID; of several ends of one (its call failed, and its teardown passed) the worst."""
    found: dict[str, dict[str, object]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            end = json.loads(line)
            known = found.get(end["test"], {"outcome": "passed"})
            worst = next(
                which for which in ("failed", "skipped", "passed") if which in (known["outcome"], end["outcome"])
            )
            found[end["test"]] = end | {"outcome": worst}
    return found


def tables(ends: dict[str, dict[str, object]]) -> str:
    """The slowest tests, and a line for each module, in Markdown."""
    modules: dict[str, Module] = {}
    for test, end in ends.items():
        module = modules.setdefault(test.partition("::")[0], Module())
        module.tests.add(test)
        module.seconds += float(str(end["seconds"]))
        if end["outcome"] == "failed":
            module.failed.add(test)
        if end["outcome"] == "skipped":
            module.skipped.add(test)
    slowest = sorted(ends, key=lambda test: -float(str(ends[test]["seconds"])))[:_SLOWEST]
    lines = ["| the slowest tests | seconds |", "|---|---:|"]
    lines += [f"| {test} | {float(str(ends[test]['seconds'])):.1f} |" for test in slowest]
    lines += ["", "| module | tests | failed | skipped | seconds |", "|---|---:|---:|---:|---:|"]
    total = Module()
    for name, module in sorted(modules.items()):
        lines.append(_row(name, module))
        total.tests |= module.tests
        total.failed |= module.failed
        total.skipped |= module.skipped
        total.seconds += module.seconds
    lines += [_row("all", total), "", *(f"FAILED {test}" for test in sorted(total.failed))]
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, module: Module) -> str:
    return f"| {name} | {len(module.tests)} | {len(module.failed)} | {len(module.skipped)} | {module.seconds:.1f} |"


def machine() -> str:
    """What the tests ran on, and what they tested."""
    head = subprocess.run(["git", "log", "-1", "--format=%h"], check=True, capture_output=True, text=True).stdout
    release = platform.freedesktop_os_release()["PRETTY_NAME"]
    python = platform.python_version()
    return f"Commit {head.strip()}, {release}, Linux {platform.release()}, Python {python}, {os.cpu_count()} CPUs."


def main() -> None:
    """Prints the tables, or keeps them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    text = tables(read(options.files))
    if options.keep:
        day = f"{datetime.now(UTC):%Y-%m-%d}"
        options.keep.mkdir(parents=True, exist_ok=True)
        kept = options.keep / f"{day}.md"
        kept.write_text(f"# The soak of {day}\n\n{machine()}\n\n{text}")
        print(f"kept in {kept}")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
