"""What several unit tests look at."""

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict


@pytest.fixture
def logs() -> Iterator[list[EventDict]]:
    """The events that are logged during the test."""
    with capture_logs() as logs:
        yield logs
