"""The status page in a real browser, while a migration runs."""

import os
from pathlib import Path

import pytest

from demo.lab import Lab
from tests.observe.browser import Page, opened
from tests.observe.flow import flowing

pytestmark = pytest.mark.tier("gate")

RATE = 40_000_000  # bytes per second
MIB = 1 << 20

_SIZE = "document.querySelector('article [data-figure={}]')?.textContent"


@pytest.mark.tier("soak")
async def test_status_page_shows_a_migration_as_it_runs(lab: Lab) -> None:
    for node in lab.nodes:
        await node.proxy.start()
    url = f"http://{lab.nodes[0].address}:9470/"
    async with opened(url) as page:
        await page.look(width=1000, height=760)
        assert await page.eventually("document.getElementById('ready')?.textContent === 'ready'")
        assert "No migrations" in await page.evaluate("document.body.innerText")

        async with lab.migration(*lab.nodes, block=True), flowing(lab, RATE) as flow:
            await page.eventually("document.querySelectorAll('svg path.line').length === 1")
            first = await _sent(page)
            await flow.arrive(first + 100 * MIB)
            await page.eventually(f"({_shown('sent')}) > {first + 50 * MIB}")
            # A machine that stood still for a moment shows another rate.
            await page.eventually(f"({_shown('rate')}) > {RATE / 3} && ({_shown('rate')}) < {RATE * 3}")
            drawn = await page.evaluate("document.querySelector('svg path.line').getAttribute('d')")
            await page.eventually(f"document.querySelector('svg path.line').getAttribute('d') !== {drawn!r}")
            assert await page.eventually("document.querySelector('article .good')?.textContent === 'running'")
            await flow.arrive(flow.arrived + 8 * RATE)
            # The writer's pace is the limit: in words, and in the colour of the last seconds.
            await page.eventually("document.querySelector('article .verdict')?.textContent.includes('by the guest')")
            await page.eventually("document.querySelectorAll('.band .guest').length >= 5")
            await _keep_screenshots(page)
            await page.look(width=360, height=640)
            assert await page.evaluate("document.documentElement.scrollWidth") <= 360, "the page scrolls sideways"

        await page.eventually("document.querySelector('article .state')?.textContent === 'ended'")
        assert await _sent(page) == int(await page.evaluate(f"({_rounded(flow.sent)})"))
    assert page.complaints == []
    assert {request.removeprefix(url) for request in page.requests} == {"", "api/status"}, "all from the daemon"


async def _keep_screenshots(page: Page) -> None:
    """For the documentation, where MIGPROXY_SCREENSHOTS names a folder."""
    folder = os.environ.get("MIGPROXY_SCREENSHOTS")
    for name, dark in (("status-page", False), ("status-page-dark", True)):
        await page.look(width=1000, height=520, dark=dark)
        picture = await page.screenshot()
        assert picture.startswith(b"\x89PNG")
        if folder:
            Path(folder, f"{name}.png").write_bytes(picture)


def _shown(figure: str) -> str:
    """JavaScript for the bytes that a figure of the page says, to its precision."""
    return (
        "((text) => text ? parseFloat(text) * ({B: 1, KiB: 2**10, MiB: 2**20, GiB: 2**30})"
        f"[text.split(' ')[1].split('/')[0]] : 0)({_SIZE.format(figure)})"
    )


def _rounded(count: int) -> str:
    """JavaScript for a count as the page would show it."""
    return _shown("sent").replace(_SIZE.format("sent"), f"size({count})")


async def _sent(page: Page) -> int:
    return int(await page.evaluate(_shown("sent")))
