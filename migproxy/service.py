"""What the service manager hears: that the daemon is ready, what it does, and that it gets on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from migproxy.health import Activity
from migproxy.liveness import Liveness
from migproxy.notify import Notifier
from migproxy.status import size

log = structlog.get_logger(__name__)

_PERIOD = 2.0  # seconds between two looks; shorter where the watchdog is
_EXTENSION = 30.0  # seconds that the manager is asked to wait for the end, again and again while migrations run


def status_text(activity: Activity) -> str:
    """What `systemctl status` shows.

    Args:
        activity: What the node does now.
    """
    count = activity.running
    parts = [f"{count} migration{'' if count == 1 else 's'} running" if count else "no migration is running"]
    if count:
        parts.append(f"{size(activity.rate)}/s")
    if activity.prepared:
        parts.append(f"{activity.prepared} prepared")
    if activity.draining:
        parts.append("draining: no new one is taken")
    elif activity.problem:
        parts.append(f"not ready: {activity.problem}")
    return ", ".join(parts)


class Service:
    """This process as its manager sees it: systemd, or nobody.

    Args:
        notifier: To the manager; None where there is none.
        liveness: Decides whether the watchdog is fed.
        activity: What the node does now.
    """

    def __init__(
        self,
        notifier: Notifier | None,
        liveness: Liveness,
        activity: Callable[[], Activity],
    ) -> None:
        self._notifier = notifier
        self._liveness = liveness
        self._activity = activity
        self._told = ""
        self._known: set[str] = set()
        self._is_ready = False
        self._is_stopping = False

    def ready(self) -> None:
        """Says that the daemon serves migrations: for the first time, or after `reloading`.

        `look` says it again and again, since a manager that is busy misses it, and would end the daemon.
        """
        self._is_ready = True
        self._tell(READY=1)

    def reloading(self) -> None:
        """Says that the configuration is being read again; `ready` ends it."""
        self._tell(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    def stopping(self) -> None:
        """Says that the daemon is about to end, as soon as what runs allows it."""
        self._is_stopping = True
        self._tell(STOPPING=1)

    async def run(self) -> None:
        """Looks after the process until cancelled, and feeds the watchdog while all is well."""
        watchdog = self._notifier.watchdog if self._notifier else None
        period = min(_PERIOD, watchdog / 4) if watchdog else _PERIOD
        while True:
            self.look()
            await asyncio.sleep(period)

    def look(self) -> None:
        """Looks once, and says what there is to say."""
        problems = self._liveness.check()
        for problem in set(problems) - self._known:
            log.error("this daemon hangs: its watchdog is not fed", problem=problem)
        self._known = set(problems)
        activity = self._activity()
        text = f"hangs: {'; '.join(problems)}" if problems else status_text(activity)
        state: dict[str, object] = {} if problems else {"WATCHDOG": 1}
        if self._is_ready and not self._is_stopping:
            state["READY"] = 1
        if self._is_stopping:
            state["EXTEND_TIMEOUT_USEC"] = int(_EXTENSION * 1e6)
        if text != self._told:
            state["STATUS"] = self._told = text
        if state:
            self._tell(**state)

    def _tell(self, **state: object) -> None:
        if self._notifier:
            self._notifier.tell(**state)
