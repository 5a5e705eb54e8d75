"""The failsafe: beside virt-handler, gives back what a dead daemon has left in its way, as if there had been no daemon.

It is a process of its own, as a daemon that was killed can do nothing any more; and it acts whether another one follows
or not, because both ways lead to a working path, and only one of them needs somebody. A daemon that does follow goes
into the path again. What runs already, or is published, is left to that one: nobody else can serve it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from datetime import UTC, datetime

import structlog
import uvloop

from migproxy.inventory import BYPASSED, PublishError
from migproxy.inventory.announcements import Announcements
from migproxy.inventory.kube import KubeInventory
from migproxy.kube.api import ApiServer, ConfigurationError
from migproxy.launcher import LauncherError, Launchers
from migproxy.lifeline import Lifeline, LifelineError
from migproxy.plan import is_forsaken, sources_not_begun
from migproxy.proxy import ProxyError
from migproxy.settings import Settings
from migproxy.shared import mend
from migproxy.vmi import VMI

log = structlog.get_logger(__name__)

_PATIENCE = 1.0  # seconds that the daemon may be dead: where it is started anew at once, there is less to do
_FIRST_PAUSE = 0.25  # seconds between two looks at the daemon; between two attempts doubled up to the last
_LAST_PAUSE = 2.0
_HANG_SECONDS = 10
"""After which this process ends by SIGALRM while a pod's file system hangs: a daemon would wait for its lock."""
_END_SECONDS = 10.0  # that what is left may take to be given back, once this process is told to end


class FailsafeError(Exception):
    """The failsafe cannot start."""


def run(settings: Settings) -> None:
    """Runs the failsafe until SIGTERM or SIGINT, and then until the daemon has ended too, and nothing of it is left.

    Args:
        settings: The daemon's own options.

    Raises:
        FailsafeError: It cannot start; says why.
    """
    uvloop.run(_run(settings))


async def _run(settings: Settings) -> None:
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    try:
        daemon, own = Lifeline(settings.daemon_lock), Lifeline(settings.failsafe_lock)
        async with own.held(), ApiServer(settings.kubeconfig, settings.context) as api:
            log.info("watching over the daemon", lock=settings.daemon_lock, node=settings.node_name)
            launchers = Launchers(settings.launcher_run_dir, settings.pods_dir)
            await Failsafe(daemon, settings.node_name, launchers, settings.owner_of_sockets, api).run(ending)
    except (LifelineError, ConfigurationError) as error:
        raise FailsafeError(str(error)) from error
    log.info("stopped")


class Failsafe:
    """Watches the daemon of one node.

    Args:
        daemon: Held by the daemon while it lives.
        node: The node's name.
        launchers: Those of the node.
        owner: Of the sources' sockets, see `SocketFolder`.
        api: The API server.
    """

    def __init__(
        self, daemon: Lifeline, node: str, launchers: Launchers, owner: tuple[int, int] | None, api: ApiServer
    ) -> None:
        self._daemon = daemon
        self._node = node
        self._launchers = launchers
        self._owner = owner
        self._api = api
        self._announcements = Announcements(api)
        self._left: dict[str, VMI] = {}  # those that have not been looked after since they were told of, by UID
        self._is_told = False
        self._problems: dict[str, str] = {}  # by the VMI's UID

    async def run(self, ending: asyncio.Event) -> None:
        """Gives back what a dead daemon has left, each time that one dies.

        Args:
            ending: Set when this is to end; it does once the daemon is dead as well, and nothing of it is left.
        """
        while True:
            await self._death()
            log.info("the daemon does not run: looking for what one has left in virt-handler's way")
            if await self._give_back(ending):
                return
            log.info("the daemon runs again, and goes into the path by itself")

    async def _death(self) -> None:
        alive = time.monotonic()
        while time.monotonic() - alive < _PATIENCE:
            if self._daemon.is_held:
                alive = time.monotonic()
            await asyncio.sleep(_FIRST_PAUSE)

    async def _give_back(self, ending: asyncio.Event) -> bool:
        """Gives everything back until the daemon lives again; returns whether this process is done."""
        inventory = KubeInventory(self._api, self._node)
        self._left, self._is_told = {}, False
        following = asyncio.create_task(self._follow(inventory))
        pause, deadline = _FIRST_PAUSE, float("inf")
        try:
            while not self._daemon.is_held:
                if following.done():
                    following.result()
                for vmi in list(self._left.values()):
                    if await self._give_back_of(vmi, inventory) and self._left.get(vmi.uid) is vmi:
                        del self._left[vmi.uid]
                if ending.is_set():
                    deadline = min(deadline, time.monotonic() + _END_SECONDS)
                    if (self._is_told and not self._left) or time.monotonic() > deadline:
                        return True
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE) if self._left else _FIRST_PAUSE
            return False
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _follow(self, inventory: KubeInventory) -> None:
        async for changes in inventory.changes():
            for uid, vmi in changes.items():
                self._left.pop(uid, None)
                if vmi is not None:
                    self._left[uid] = vmi
            self._is_told = True

    async def _give_back_of(self, vmi: VMI, inventory: KubeInventory) -> bool:
        """Gives back what stands in the way of one VMI's migration; returns whether nothing does any more."""
        try:
            if names := self._mend(vmi):
                log.warning("virt-handler's sockets are back", namespace=vmi.namespace, name=vmi.name, names=names)
                self._note(vmi, "source", inventory)
            if is_forsaken(vmi, self._node):
                now = await self._announcements.withdraw(vmi, lambda now: is_forsaken(now, self._node))
                if now is None or now.announced is None:
                    log.warning("nothing is announced any more", namespace=vmi.namespace, name=vmi.name)
                    self._note(vmi, "target", inventory)
        except (LauncherError, ProxyError, PublishError) as error:
            if self._problems.get(vmi.uid) != str(error):
                log.error("cannot give back, trying again", namespace=vmi.namespace, name=vmi.name, error=str(error))
            self._problems[vmi.uid] = str(error)
            return False
        self._problems.pop(vmi.uid, None)
        return True

    def _mend(self, vmi: VMI) -> list[str]:
        with self._daemon.taken() as is_dead:
            if not is_dead:
                return []
            signal.alarm(_HANG_SECONDS)
            try:
                sources = sources_not_begun(vmi, self._node, datetime.now(UTC))
                return [name for one in sources for name in mend(self._launchers, one, self._owner)]
            finally:
                signal.alarm(0)

    def _note(self, vmi: VMI, role: str, inventory: KubeInventory) -> None:
        message = f"migration {role} on {self._node}: left to virt-handler, as migproxy's daemon does not run"
        inventory.note(vmi, BYPASSED, message, warning=True)
