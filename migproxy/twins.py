"""Two daemons of one node: the second one waits for the end of the first, and says for whom.

They would put their socket files over one another's, publish in turns, and two of different nodes in one folder would
relay to each other. The kernel tells that the first one has ended, however it does: nothing holds up whoever is started
after that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, nullcontext
from dataclasses import dataclass

import structlog

from migproxy.launcher import Launchers
from migproxy.lifeline import Lifeline, LifelineError, living
from migproxy.settings import Settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """What one daemon alone may serve.

    Attributes:
        what: For people.
        remedy: Where two are right to serve something.
        lock: What is locked for it.
        is_folder: See `Lifeline`.
    """

    what: str
    remedy: str
    lock: str
    is_folder: bool = False


def claims(settings: Settings) -> Iterator[Claim]:
    """What a daemon claims for itself: the launchers' folder, and its node's name where VMIs are published in files."""
    vmis = os.path.realpath(settings.vmi_dir) if settings.vmi_dir else None
    published = vmis if vmis is None or os.path.isdir(vmis) else os.path.dirname(vmis)
    folder = Launchers(settings.launcher_run_dir, settings.pods_dir).folder
    if folder and os.path.realpath(folder) != published:  # whoever publishes locks that for a moment
        remedy = "give each its own launchers (--launcher-run-dir, --pods-dir)"
        yield Claim(f"the launchers in {folder}", remedy, folder, is_folder=True)
    if vmis and published:
        # Hidden, so that nobody takes it for a VMI's; a digest, since a node's name may be longer than a file's.
        file = "" if published == vmis else os.path.basename(vmis)
        digest = hashlib.sha256(f"{settings.node_name}\0{file}".encode()).hexdigest()[:16]
        remedy = "give each host a name of its own (--node-name)"
        lock = os.path.join(published, f".migproxy-{digest}.lock")
        yield Claim(f"the node {settings.node_name} of {settings.vmi_dir}", remedy, lock)


@asynccontextmanager
async def alone(settings: Settings, tell: Callable[[str | None], None]) -> AsyncIterator[None]:
    """Serves alone while the context lasts; where another daemon serves the same, its end is waited for first.

    What cannot be locked keeps nobody from serving: a missing or read-only folder, a file system without locks.

    Args:
        settings: The daemon's options.
        tell: Is told for whom it waits and what to do, and None when it goes on.
    """
    with ExitStack() as locks:
        for claim in claims(settings):
            await _take(claim, settings, locks, tell)
        tell(None)
        yield


async def _take(claim: Claim, settings: Settings, locks: ExitStack, tell: Callable[[str | None], None]) -> None:
    def waits(holder: str) -> None:
        tell(f"waits for {holder}, which serves {claim.what}: end one of the two, or {claim.remedy}")

    try:
        lifeline = locks.enter_context(closing(Lifeline(claim.lock, is_folder=claim.is_folder)))
        if not await lifeline.take(0):
            # This daemon's failsafe would give back what the other one has in place.
            async with living(settings.daemon_lock) if settings.is_beside else nullcontext():
                await lifeline.wait(waits)
    except (LifelineError, OSError) as error:
        why = error.__cause__ or error
        log.warning(
            "a second daemon that serves the same would not be noticed",
            what=claim.what,
            lock=claim.lock,
            error=getattr(why, "strerror", None) or str(why),
        )
