"""The pauses between tries of what may work later."""

from collections.abc import Iterator

__all__ = ["doubling"]


def doubling(first: float, last: float) -> Iterator[float]:
    """Yields pauses without end, each twice as long as the one before, up to the longest.

    Args:
        first: The first pause, in seconds.
        last: The longest, in seconds.
    """
    pause = first
    while True:
        yield pause
        pause = min(2 * pause, last)
