"""What ended migrations leave, for how long, and that counting goes on where it left off."""

from __future__ import annotations

import pytest

from migproxy.portmap import Channel
from migproxy.retention import MOST, MOST_OF_ONE, Ended, Retention
from migproxy.traffic import Progress, Traffic

pytestmark = pytest.mark.tier("gate")


def ended() -> Ended:
    return Ended({"state": "ended"}, Progress(traffic={Channel.DIRECT: Traffic(connections=2)}))


def test_what_is_older_than_the_retention_goes() -> None:
    now = 0.0
    kept: Retention[str] = Retention(60, str, lambda: now)
    kept.add("old", ended())
    now = 10
    kept.add("young", ended())
    now = 60
    assert [key for key, _ in kept.items()] == ["old", "young"]
    now = 61
    assert [key for key, _ in kept.items()] == ["young"]


def test_the_oldest_go_first_when_there_are_too_many() -> None:
    kept: Retention[int] = Retention(3600, str)
    for number in range(MOST + 10):
        kept.add(number, ended())
    assert [key for key, _ in kept.items()] == list(range(10, MOST + 10))
    assert kept.dropped == 10


def test_one_vmi_takes_no_other_ones_place() -> None:
    kept: Retention[tuple[str, int]] = Retention(3600, lambda key: key[0])
    kept.add(("other", 0), ended())
    for number in range(400):
        kept.add(("churning", number), ended())
    assert [key for key, _ in kept.items()] == [
        ("other", 0),
        *(("churning", n) for n in range(400 - MOST_OF_ONE, 400)),
    ]
    assert kept.dropped == 400 - MOST_OF_ONE


def test_a_migration_that_is_served_again_takes_its_counters_along() -> None:
    kept: Retention[str] = Retention(3600, str)
    kept.add("migration", ended())
    taken = kept.take("migration")
    assert taken is not None
    assert taken.progress.traffic[Channel.DIRECT].connections == 2
    assert kept.take("migration") is None
    assert list(kept.items()) == []
