"""What all tests share."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import settings

from tests.clock import Clock, SimulatedLoop

# A loaded machine is no counterexample. (Where CI is set, hypothesis also takes the same examples each time.)
settings.register_profile("migproxy", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("migproxy")


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
