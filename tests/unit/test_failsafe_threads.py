"""The failsafe looks after a VMI in one thread, however often the VMI changes."""

import asyncio
import threading
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from migproxy import failsafe
from migproxy.failsafe import Failsafe
from migproxy.launcher import Launchers
from migproxy.lifeline import Lifeline
from migproxy.vmi import parse

pytestmark = pytest.mark.tier("gate")

VMI: dict[str, Any] = {
    "metadata": {"namespace": "default", "name": "vm", "uid": "uid"},
    "status": {"nodeName": "here", "migrationState": {"migrationUid": "first", "sourceNode": "here"}},
}


async def test_vmi_that_changes_meanwhile_is_looked_after_by_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once would take virt-handler's socket for the one that is kept, and remove it."""
    going, at_once, began, free = [0], [], threading.Event(), threading.Event()

    def mend(*_: object) -> list[str]:
        going[0] += 1
        at_once.append(going[0])
        began.set()
        free.wait(10)
        going[0] -= 1
        return []

    monkeypatch.setattr(failsafe, "mend", mend)
    with closing(Lifeline(str(tmp_path / "lock"))) as daemon:
        guard = Failsafe(daemon, "here", Launchers("/nowhere", "/"), None, cast(Any, None))
        first = asyncio.create_task(guard._look_after(parse(VMI)))
        await asyncio.to_thread(began.wait)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.create_task(guard._look_after(parse(VMI)))
        await asyncio.sleep(0.05)  # time enough for a second thread, if there were one
        free.set()
        await second
    assert at_once == [1, 1]


async def test_vmi_that_does_not_migrate_from_here_takes_no_thread(tmp_path: Path) -> None:
    elsewhere = VMI | {"status": {"nodeName": "there"}}
    with closing(Lifeline(str(tmp_path / "lock"))) as daemon:
        guard = Failsafe(daemon, "here", Launchers("/nowhere", "/"), None, cast(Any, None))
        await guard._look_after(parse(elsewhere))
        assert not guard._threads
