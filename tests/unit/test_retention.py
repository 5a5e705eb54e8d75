"""What ended migrations leave, for how long, and that counting goes on where it left off."""

from __future__ import annotations

import pytest

from migproxy.portmap import Channel
from migproxy.relay import Progress, Traffic
from migproxy.retention import MOST, Ended, Retention

pytestmark = pytest.mark.tier("gate")


def ended(at: float) -> Ended:
    return Ended({"state": "ended"}, Progress(traffic={Channel.DIRECT: Traffic(connections=2)}), at=at)


def test_what_is_older_than_the_retention_goes() -> None:
    kept: Retention[str] = Retention(60)
    now = Ended({}, Progress()).at
    kept.add("old", ended(now - 61))
    kept.add("young", ended(now - 50))
    assert [key for key, _ in kept.items()] == ["young"]


def test_the_oldest_go_first_when_there_are_too_many() -> None:
    kept: Retention[int] = Retention(3600)
    now = Ended({}, Progress()).at
    for number in range(MOST + 10):
        kept.add(number, ended(now))
    assert [key for key, _ in kept.items()] == list(range(10, MOST + 10))


def test_a_migration_that_is_served_again_takes_its_counters_along() -> None:
    kept: Retention[str] = Retention(3600)
    kept.add("migration", ended(Ended({}, Progress()).at))
    taken = kept.take("migration")
    assert taken is not None
    assert taken.progress.traffic[Channel.DIRECT].connections == 2
    assert kept.take("migration") is None
    assert list(kept.items()) == []
