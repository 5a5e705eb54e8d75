"""`migproxy top` in a real terminal (tmux), while a migration runs."""

import asyncio
import re
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from demo.lab import Lab, Node, run
from tests.observe.flow import flowing

pytestmark = pytest.mark.tier("gate")

RATE = 30_000_000  # bytes per second
ESCAPE = "\x1b"


class Terminal:
    """A terminal of 80 columns in which a command runs."""

    def __init__(self, socket: str) -> None:
        self._tmux = ("tmux", "-L", socket, "-f", "/dev/null")

    async def start(self, command: str) -> None:
        await run(*self._tmux, "new-session", "-d", "-x", "80", "-y", "24", f"{command}; echo it has ended; sleep 60")

    async def picture(self, *, escapes: bool = False) -> str:
        return await run(*self._tmux, "capture-pane", "-p", *(["-e"] if escapes else []))

    async def shows(self, pattern: str) -> str:
        """Waits until the picture matches, and returns it."""
        picture = ""
        try:
            async with asyncio.timeout(60):
                while not re.search(pattern, picture := await self.picture()):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pytest.fail(f"no {pattern!r} in:\n{picture}")
        return picture

    async def press(self, key: str) -> None:
        await run(*self._tmux, "send-keys", key)

    async def close(self) -> None:
        await run(*self._tmux, "kill-server")


@asynccontextmanager
async def top(node: Node, environment: str) -> AsyncIterator[Terminal]:
    terminal = Terminal(f"top-{node.name}")
    command = (sys.executable, "-m", "migproxy", "top", "--control-socket", str(node.proxy.control))
    await terminal.start(f"env {environment} {shlex.join(command)}")
    try:
        yield terminal
    finally:
        await terminal.close()


@pytest.mark.parametrize(
    ("environment", "bar", "coloured"),
    [
        pytest.param("LANG=C.UTF-8 PYTHONUTF8=1", "█", True, id="colour"),
        pytest.param("LANG=C.UTF-8 PYTHONUTF8=1 NO_COLOR=1", "█", False, id="no-color", marks=pytest.mark.tier("soak")),
        pytest.param("TERM=dumb PYTHONIOENCODING=ascii", "#", False, id="dumb-ascii", marks=pytest.mark.tier("soak")),
    ],
)
async def test_top_shows_a_running_migration_at_80_columns(
    lab: Lab, environment: str, bar: str, coloured: bool
) -> None:
    for node in lab.nodes:
        await node.proxy.start()
    source = lab.nodes[0]
    async with top(source, environment) as terminal:
        await terminal.shows("no migrations")
        async with lab.migration(*lab.nodes), flowing(lab, RATE) as flow:
            await flow.arrive(3 * RATE)
            more_than_rate = r"\b(?:[3-9]\d|\d{3,4})\.\d MiB"  # an older picture may stand there for a moment
            shown = rf"vmi-migratable +source +running.*\d MiB/s.*?{more_than_rate}(.*\n)+? +{bar}{{14}}.*RTT \d"
            async with asyncio.timeout(60):  # a machine that stood still for a moment shows another rate
                rate = 0.0
                while not RATE / 3 < rate * 2**20 < RATE * 3:
                    picture = await terminal.shows(shown)
                    rows = [line for line in picture.splitlines() if "running" in line and "vmi-migratable" in line]
                    row = rows[-1]  # a terminal without cursor control shows one picture after the other
                    rate, total = map(float, re.findall(r"([\d.]+) MiB", row))
            assert (ESCAPE in await terminal.picture(escapes=True)) is coloured
            assert total * 2**20 > RATE
            assert "default/vmi-migratable" in row
            await terminal.press("n")
            await terminal.shows("sorted by name")
        await terminal.shows("ended")
        await terminal.press("q")
        await terminal.shows("it has ended")


async def test_without_a_terminal_one_picture_is_printed(lab: Lab) -> None:
    node = lab.nodes[0]
    await node.proxy.start()
    picture = await run(sys.executable, "-m", "migproxy", "top", "--control-socket", str(node.proxy.control))
    assert "migproxy node01" in picture
    assert ESCAPE not in picture
