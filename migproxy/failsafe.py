"""The failsafe: beside virt-handler, gives back what a dead daemon has left in its way, as if there had been no daemon.

It is a process of its own, as a daemon that was killed can do nothing any more; and it acts whether another one follows
or not, because both ways lead to a working path, and only one of them needs somebody. A daemon that does follow goes
into the path of what has not started again. What is announced needs nobody: a source that finds it dead goes by
virt-handler.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime

import structlog
import uvloop

from migproxy.inventory import BYPASSED
from migproxy.inventory.kube import KubeInventory
from migproxy.kube.api import ApiServer, ConfigurationError
from migproxy.launcher import LauncherError, Launchers
from migproxy.launcherthread import LauncherThread
from migproxy.lifeline import HANG_SECONDS, Lifeline, LifelineError
from migproxy.pauses import doubling
from migproxy.plan import SourceProxy, sources_on
from migproxy.proxy import ProxyError
from migproxy.settings import Settings
from migproxy.shared import mend
from migproxy.vmi import VMI

log = structlog.get_logger(__name__)

_PATIENCE = 1.0  # seconds that the daemon may be dead: where it is started anew at once, there is less to do
_LOOK_SECONDS = 0.25  # between two looks at the daemon
_FIRST_RETRY, _LAST_RETRY = 0.25, 2.0  # seconds
_END_SECONDS = 10.0  # that what is left may take to be given back, once this process is told to end
_START_SECONDS = 1.0  # that another failsafe may take to end


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
        with closing(Lifeline(settings.failsafe_lock)) as own, closing(Lifeline(settings.daemon_lock)) as daemon:
            if not await own.take(_START_SECONDS):
                raise FailsafeError(f"another failsafe watches over the daemon of {settings.control_socket}")
            async with ApiServer(settings.kubeconfig, settings.context) as api:
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
        self._acting = _Acting(daemon)
        self._node = node
        self._launchers = launchers
        self._owner = owner
        self._api = api
        self._inventory: KubeInventory
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by the VMI's UID
        # Likewise, and kept: what was asked for before ends before what is asked for next.
        self._threads: dict[str, LauncherThread] = {}
        self._is_told = False

    async def run(self, ending: asyncio.Event) -> None:
        """Gives back what a dead daemon has left, each time that one dies.

        Args:
            ending: Set when this is to end; it does once the daemon is dead as well, and nothing of it is left.
        """
        while True:
            life = await self._death()
            log.info("the daemon does not run: looking for what one has left in virt-handler's way")
            self._inventory, self._tasks, self._is_told = KubeInventory(self._api, self._node), {}, False
            following = asyncio.create_task(self._follow(self._inventory))
            try:
                if await self._clear(life, following, ending):
                    return
            finally:
                for task in (following, *self._tasks.values()):
                    task.cancel()
                await asyncio.gather(following, *self._tasks.values(), return_exceptions=True)
                for thread in self._threads.values():
                    thread.close()
                self._threads.clear()
            log.info("a daemon has been started: it goes into the path by itself")

    async def _death(self) -> bytes:
        """Waits until the daemon has been dead for a while; returns which one."""
        loop = asyncio.get_running_loop()
        alive = loop.time()
        while loop.time() - alive < _PATIENCE:
            if self._daemon.is_held:
                alive = loop.time()
            await asyncio.sleep(_LOOK_SECONDS)
        return self._daemon.life

    async def _clear(self, life: bytes, following: asyncio.Task[None], ending: asyncio.Event) -> bool:
        """Waits until there has been another daemon, or this process is done: returns whether it is."""
        loop, deadline = asyncio.get_running_loop(), float("inf")
        while not self._daemon.is_held and self._daemon.life == life:
            if following.done():
                following.result()
            if ending.is_set():
                deadline = min(deadline, loop.time() + _END_SECONDS)
                if self._is_done or loop.time() > deadline:
                    return True
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    @property
    def _is_done(self) -> bool:
        is_clear = self._is_told and all(task.done() for task in self._tasks.values())
        return is_clear and not self._inventory.has_notes

    async def _follow(self, inventory: KubeInventory) -> None:
        """Looks after each VMI, and again whenever it has changed; none waits for another."""
        async for changes in inventory.changes():
            for uid, vmi in changes.items():
                if task := self._tasks.pop(uid, None):
                    task.cancel()
                if vmi is not None:
                    self._tasks[uid] = asyncio.create_task(self._look_after(vmi))
                elif thread := self._threads.pop(uid, None):
                    thread.close()
            self._is_told = True

    async def _look_after(self, vmi: VMI) -> None:
        """Gives back what stands in a VMI's folder, however often that must be tried."""
        sources = sources_on(vmi, self._node, datetime.now(UTC))
        if not sources:
            return
        pauses, last = doubling(_FIRST_RETRY, _LAST_RETRY), ""
        if vmi.uid not in self._threads:
            self._threads[vmi.uid] = LauncherThread(f"launcher of {vmi.namespace}/{vmi.name}", HANG_SECONDS * 2)
        loop = asyncio.get_running_loop()

        def tell_later(names: list[str]) -> None:
            loop.call_soon_threadsafe(self._tell, vmi, names)

        while True:
            try:
                self._tell(vmi, await self._threads[vmi.uid].run(lambda: self._give_sockets_back(sources), tell_later))
                return
            except Exception as error:
                is_known = isinstance(error, (LauncherError, ProxyError))
                about = {"namespace": vmi.namespace, "name": vmi.name, "error": str(error)}
                if str(error) != last:
                    log.error("cannot give back, trying again", **about, exc_info=not is_known)
                last = str(error)
            await asyncio.sleep(next(pauses))

    def _tell(self, vmi: VMI, names: list[str]) -> None:
        if names:
            log.warning("virt-handler's sockets are back", namespace=vmi.namespace, name=vmi.name, names=names)
            message = f"migration source on {self._node}: left to virt-handler, as migproxy's daemon does not run"
            self._inventory.note(vmi, BYPASSED, message, warning=True)

    def _give_sockets_back(self, sources: Iterable[SourceProxy]) -> list[str]:
        """In a thread of the VMI's: who is kept waiting by one pod's file system is that pod's VMI alone."""
        with self._acting.begin() as is_dead:
            return [name for source in sources if is_dead for name in mend(self._launchers, source, self._owner)]


class _Acting:
    """Holds the daemon's lock while anything is done in its stead, by whichever thread.

    What hangs ends this process, and with it the lock: no call goes on beside the next daemon's.
    """

    def __init__(self, daemon: Lifeline) -> None:
        self._daemon = daemon
        self._began: list[float] = []  # by time.monotonic
        self._mutex = threading.Lock()
        self._lock = ExitStack()

    @contextmanager
    def begin(self) -> Iterator[bool]:
        """Acts within the context; tells whether the daemon is dead."""
        began = time.monotonic()
        with self._mutex:
            is_dead = bool(self._began) or self._lock.enter_context(self._daemon.taken())
            if is_dead:
                self._began.append(began)
            self._watch()
        try:
            yield is_dead
        finally:
            if is_dead:
                with self._mutex:
                    self._began.remove(began)
                    self._watch()

    def _watch(self) -> None:
        """Has a signal end this process HANG_SECONDS after the oldest of what goes on has begun."""
        if self._began:
            signal.alarm(max(1, math.ceil(self._began[0] + HANG_SECONDS - time.monotonic())))
        else:
            signal.alarm(0)
            self._lock.close()
