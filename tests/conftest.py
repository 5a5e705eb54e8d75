"""What all tests share: tiers, slices, sandboxes that each test leaves as it found them, and the record of a run.

The gate is what everybody runs: `make test`, and CI. The soak is all the rest: `make soak`, or a slice of it.
"""

import asyncio
import faulthandler
import os
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import record, tidy
from tests.clock import Clock, SimulatedLoop
from tests.missing import is_root

# A loaded machine is no counterexample. (Where CI is set, hypothesis also takes the same examples each time.)
settings.register_profile("migproxy", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("migproxy")

TIERS = ("gate", "soak")
_PATIENCE = {"gate": 300.0, "soak": 1800.0}  # seconds that a test may take, unless its marker `patience` says more
_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("migproxy")
    group.addoption("--tier", choices=(*TIERS, "all"), default="all", help="run the tests of this tier only")
    group.addoption("--slice", metavar="K/N", default="1/1", help="run the K-th of N parts of what is selected")
    group.addoption("--record", metavar="FILE", help="add to this file, as JSON lines, how each test ended")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.dup(2)  # pytest captures what tests write there
    if path := config.getoption("--record"):
        config.pluginmanager.register(record.Recorder(Path(path)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted, (part, parts) = config.getoption("--tier"), _parse_slice(config.getoption("--slice"))
    chosen: list[pytest.Item] = []
    for item in items:
        tier = tier_of(item)
        if wanted in (tier, "all") and zlib.crc32(item.nodeid.encode()) % parts == part - 1:
            chosen.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def tier_of(item: pytest.Item) -> str:
    """The tier that a test says it is of: by the nearest marker `tier`.

    Raises:
        pytest.UsageError: it says none, or one that is not known.
    """
    marker = item.get_closest_marker("tier")
    if marker is None or marker.args not in {(tier,) for tier in TIERS}:
        raise pytest.UsageError(f'{item.nodeid}: mark it with @pytest.mark.tier("gate") or @pytest.mark.tier("soak")')
    return str(marker.args[0])


def _parse_slice(text: str) -> tuple[int, int]:
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--slice {text}: K/N is wanted, with K from 1 to N, such as 2/4")
    return part, parts


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and not is_root():
        pytest.skip("left out: only the machine's root may give files to others, mount cgroups, and remount")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Ends a process whose test hangs, and so its sandbox; pytest-xdist starts the next test in a new one."""
    marker = item.get_closest_marker("patience")
    seconds = float(marker.args[0]) if marker else _PATIENCE[tier_of(item)]
    timer = threading.Timer(seconds, _give_up, (item, seconds))
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()
        timer.join()


def _give_up(item: pytest.Item, seconds: float) -> None:
    stderr = item.config.stash[_STDERR]
    os.write(stderr, f"\n{item.nodeid} hangs: it took {seconds:g} s\n".encode())
    faulthandler.dump_traceback(stderr)
    os._exit(1)


@pytest.fixture(autouse=True)
def leaves_its_sandbox_tidy() -> Iterator[None]:
    """Fails a test that leaves processes, interfaces or mounts in its sandbox, and takes them away for the next one."""
    if not tidy.is_sandbox():
        yield
        return
    before = tidy.look()
    yield
    if left := tidy.clean(before):
        pytest.fail(f"left in the sandbox: {left}", pytrace=False)


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Which event loop a test runs on."""
    simulated = item.get_closest_marker("simulated_time")
    return {"loop": SimulatedLoop if simulated else asyncio.new_event_loop}


@pytest.fixture
async def clock() -> Clock:
    """Tells the simulated time, to the microsecond."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, SimulatedLoop):
        pytest.skip("what runs in another process keeps real time")
    return lambda: round(loop.time(), 6)
