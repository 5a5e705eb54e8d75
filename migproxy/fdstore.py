"""Descriptors that outlive the daemon: handed to systemd's descriptor store, or to a holder of our own.

An open file lives as long as any process has a descriptor of it. What is stored here is therefore not closed by the
death of this process, nor by close(2) alone: whoever closes it for good releases its lease, too.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from migproxy.notify import Notifier
from migproxy.sockets import identity

log = structlog.get_logger(__name__)

_MESSAGE = 4096
_MOST_FDS = 253  # in one message (SCM_MAX_FD, unix(7))
_FIRST_FD = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_PATIENCE = 1.0  # seconds that a new connection waits until the holder has its descriptors
_RETURN_SECONDS = 10.0  # that the holder may take to give everything back
_CHECK_SECONDS = 2.0
_MOST_WAITING = 256  # messages that wait for a holder which takes none; each may keep four descriptors


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why nothing is protected, and what to do."""

    what: str
    remedy: str


_SLOW = _Problem("the holder is slow: it does not answer", "see what holds it up, or start it again")

_NO_STORE = _Problem(
    "the service manager keeps no descriptors",
    "set FileDescriptorStoreMax= in the unit, before systemd 254 Environment=FDSTORE= of the same number too; or "
    "name a migproxy holder in NOTIFY_SOCKET",
)


@dataclass(frozen=True, slots=True)
class _Message:
    """What waits to be sent; owns its descriptors.

    Attributes:
        removes: The name that it removes from the store; empty for any other message.
    """

    text: str
    fds: tuple[int, ...]
    removes: str

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@dataclass(eq=False, slots=True)
class Lease:
    """One name in the store, and the descriptors under it; they stay their owner's, who closes them after `release`.

    Attributes:
        name: Unique; at most 255 printable characters without a colon (sd_notify(3), FDNAME).
        fds: What is stored under it.
    """

    name: str
    _store: Store | None = None
    fds: list[int] = field(default_factory=list)

    def add(self, *fds: int) -> None:
        """Hands descriptors over; never waits (see `Store.handed_over`) and never fails."""
        if self._store:
            self._store.hand_over(self, fds)
            self.fds.extend(fds)

    def forget(self, fd: int) -> None:
        """Takes one descriptor back; the others stay stored."""
        if self._store:
            self.fds.remove(fd)
            self._store.replace(self, self.fds)

    def release(self, *, keep_record: bool = True) -> None:
        """Lets go of everything under the name; what the holder has of it is closed soon after.

        Args:
            keep_record: Not before the state file knows the end (see `Store.remove_released`); False where it has
                nothing to know.
        """
        store, self._store = self._store, None
        if store:
            store.release(self, keep_record=keep_record)


class Store:
    """The client of the holder; without one it accepts everything and keeps nothing.

    What cannot be sent now waits in a queue of its own, for a moment. A holder that takes nothing for longer, or is
    gone, is "behind": the queue is dropped, nothing more is sent, and once it answers again it is given whatever it
    lacks.

    Attributes:
        problem: Why descriptors are not protected now, None while they are.
        changed: Set whenever names come or go.
    """

    def __init__(self, notifier: Notifier | None) -> None:
        self.changed = asyncio.Event()
        self.problem: str | None = None if notifier else "there is no holder: NOTIFY_SOCKET is not set"
        self._notifier = notifier
        self._limit: int | None = None
        self._is_systemd = False
        self._is_behind = False
        self._must_look = False
        self._has_orphans = False
        self._leases: dict[str, Lease] = {}
        self._stored: set[str] = set()  # names that the holder may have
        self._released: list[str] = []
        self._unsent: deque[_Message] = deque()
        self._sent = asyncio.Event()
        self._writing: int | None = None
        self._count = 0

    def __bool__(self) -> bool:
        return self._notifier is not None

    def lease(self, name: str, *fds: int) -> Lease:
        """Makes a name, and hands descriptors over under it."""
        made = Lease(name, self or None)
        if self:
            self._leases[name] = made
            self.changed.set()
            made.add(*fds)
        return made

    def renew(self, name: str, fds: Sequence[int]) -> Lease:
        """Makes a lease of what the store has already, as `take_back` gave it."""
        made = Lease(name, self or None, list(fds))
        self._leases[name] = made
        self._stored.add(name)
        self._count += len(fds)
        return made

    def hand_over(self, lease: Lease, fds: Sequence[int]) -> None:
        """See `Lease.add`."""
        self._count += len(fds)
        if self._is_full:
            self._report_full()
        self._store(lease.name, fds)

    def replace(self, lease: Lease, fds: Sequence[int]) -> None:
        """See `Lease.forget`."""
        self._count -= 1
        self._remove(lease.name)
        self._store(lease.name, fds)

    def release(self, lease: Lease, *, keep_record: bool) -> None:
        """See `Lease.release`."""
        self._leases.pop(lease.name, None)
        self.changed.set()
        self._count -= len(lease.fds)
        if keep_record:
            self._released.append(lease.name)
        else:
            self._remove(lease.name)

    @property
    def released(self) -> list[str]:
        """Names whose end the state file does not know for sure yet."""
        return list(self._released)

    def remove_released(self, names: Sequence[str]) -> None:
        """Removes names from the store whose end is on record."""
        for name in names:
            self._released.remove(name)
            self._remove(name)

    def _store(self, name: str, fds: Sequence[int]) -> None:
        if not self._is_behind:
            self._stored.add(name)
            # Without FDPOLL=0, systemd drops a descriptor whose peer has hung up.
            self._send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", tuple(fds))

    def _remove(self, name: str) -> None:
        if not self._is_behind:
            self._stored.discard(name)
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}", removes=name)

    def _send(self, text: str, fds: tuple[int, ...] = (), removes: str = "") -> None:
        try:
            self._post(text, fds, removes)
        except OSError as error:
            self._lost(error)

    def _post(self, text: str, fds: tuple[int, ...] = (), removes: str = "") -> None:
        """Sends, now or as soon as the holder takes it, in order.

        Args:
            removes: See _Message.

        Raises:
            OSError: The holder is gone.
        """
        if self._notifier is None:
            return
        if not self._unsent:
            try:
                self._notifier.send(text, fds)
            except BlockingIOError:
                pass
            else:
                return
        if len(self._unsent) >= _MOST_WAITING:
            self._drop_unsent(removes)
            self._trouble(_SLOW)
            return
        try:
            # Duplicates: the owner may close its own before they are sent.
            self._unsent.append(_Message(text, _duplicate(fds), removes))
        except OSError as error:
            self._drop_unsent(removes)
            what = f"descriptors cannot be handed over ({error.strerror})"
            self._trouble(_Problem(what, "raise the limit of open files"))
            return
        self._sent.clear()
        if self._writing is None:
            self._writing = self._notifier.connect().fileno()
            asyncio.get_running_loop().add_writer(self._writing, self._flush)

    def _flush(self) -> None:
        assert self._notifier is not None
        try:
            while self._unsent:
                message = self._unsent[0]
                self._notifier.send(message.text, message.fds)
                self._unsent.popleft().close()
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(error)
        self._stop_writing()

    def _drop_unsent(self, removes: str = "") -> None:
        """Gives up what waits, and a message that was to wait too: the holder is behind from now on."""
        self._is_behind = True
        self._stored.update(filter(None, (removes, *(message.removes for message in self._unsent))))
        while self._unsent:
            self._unsent.popleft().close()
        self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing is not None:
            asyncio.get_running_loop().remove_writer(self._writing)
            self._writing = None
        self._sent.set()

    def _lost(self, error: OSError) -> None:
        self._drop_unsent()
        if self._notifier is not None:
            self._notifier.close()  # only now: the event loop has let go of its descriptor
        gone = _Problem(f"the holder is gone ({error.strerror})", "start it again: everything is handed to it anew")
        self._trouble(gone, replaces=True)

    def _trouble(self, problem: _Problem, *, replaces: bool = False) -> None:
        if self.problem is None or (replaces and self.problem != problem.what):
            log.error("migrations would not survive a crash", error=problem.what, remedy=problem.remedy)
            self.problem = problem.what

    async def handed_over(self) -> None:
        """Waits until the holder has been sent everything, for a moment at most: then it is without protection."""
        if self._unsent and self.problem is None:
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._drained()
            except TimeoutError:
                self._trouble(_SLOW)

    async def _drained(self) -> None:
        while self._unsent:
            await self._sent.wait()

    async def watch(self) -> None:
        """Looks after the holder, until cancelled."""
        while self._notifier is not None:
            await asyncio.sleep(_CHECK_SECONDS)
            await self._check()

    async def _check(self) -> None:
        """Asks whether everything sent has arrived, and hands over what the holder lacks."""
        try:
            if not await self._barrier(_CHECK_SECONDS):
                self._trouble(_SLOW)
            elif self._is_behind or self._must_look:
                await self._catch_up()
            elif self._is_full:
                self._report_full()
            elif self.problem and not self._has_orphans:
                self.problem = None
                log.info("migrations are protected again", names=len(self._leases))
        except OSError as error:
            self._lost(error)

    async def _catch_up(self) -> None:
        """Makes what the holder has equal to what it should have; it may be another one, with another limit."""
        self._must_look = False
        held = {} if self._is_systemd else {name: _close(fds) for name, fds in (await self._ask_back() or {}).items()}
        if self._must_look:  # it has not told all
            return
        self._has_orphans = bool(held.keys() - self._leases.keys() - self._stored)
        self._is_behind = False
        for name in self._stored - self._leases.keys() - set(self._released):
            self._remove(name)
        for lease in list(self._leases.values()):
            if held.get(lease.name) != {identity(fd) for fd in lease.fds}:
                self._remove(lease.name)
                self._store(lease.name, lease.fds)

    def _report_full(self) -> None:
        what = f"the holder is full: it keeps {self._limit} descriptors"
        remedy = "raise its limit (FileDescriptorStoreMax= and FDSTORE= in systemd, --limit of migproxy holder)"
        self._trouble(_Problem(what, remedy), replaces=True)

    @property
    def _is_full(self) -> bool:
        return self._limit is not None and self._count > self._limit

    async def _barrier(self, seconds: float) -> bool:
        """Returns whether the holder has done all that it was sent, within that time; raises OSError if it is gone."""
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop = asyncio.get_running_loop()
        answered = asyncio.Event()
        loop.add_reader(ours, answered.set)
        try:
            async with asyncio.timeout(seconds):
                try:
                    await self._drained()
                    self._post("BARRIER=1", (theirs,))
                finally:
                    os.close(theirs)
                await answered.wait()
        except TimeoutError:
            return False
        else:
            return True
        finally:
            loop.remove_reader(ours)
            os.close(ours)

    async def settle(self, seconds: float) -> bool:
        """Waits until the holder has done everything that it was told; returns whether it has."""
        if self._notifier is None or self._is_behind:
            return False
        try:
            return await self._barrier(seconds) and not self._is_behind
        except OSError:
            return False

    async def take_back(self, environment: MutableMapping[str, str] = os.environ) -> dict[str, list[int]]:
        """Takes what an earlier daemon stored: from the environment (systemd), and from a holder that is asked.

        Args:
            environment: LISTEN_FDS, LISTEN_FDNAMES and LISTEN_PID are taken out of it, FDSTORE is read.

        Returns:
            Descriptors by name; the caller owns them, and the store has them still.
        """
        taken = _passed(environment)
        if self._notifier is not None:
            with suppress(OSError):  # from the start, so that an idle daemon has as many descriptors before as after
                self._notifier.connect()
        if (limit := environment.get("FDSTORE", "")).isdecimal():
            self._limit, self._is_systemd = int(limit), True  # which has passed on all that it has
        elif self._notifier is not None:
            try:
                returned = await self._ask_back()
            except OSError as error:
                self._lost(error)
                return taken
            if returned is None:
                self._trouble(_NO_STORE)
                self._notifier.close()
                self._notifier = None
            for name, fds in (returned or {}).items():
                taken.setdefault(name, []).extend(fds)
        return taken

    async def _ask_back(self) -> dict[str, list[int]] | None:
        """Returns everything that the holder has, None where it is a manager without a store.

        Raises:
            OSError: It is gone.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            try:
                async with asyncio.timeout(_RETURN_SECONDS):
                    with theirs:
                        self._post("FDRETURN=1", (theirs.fileno(),))
                    await self._drained()
            except TimeoutError:
                self._report_slow_return()
                return {}
            return await asyncio.to_thread(self._receive_back, ours)

    def _receive_back(self, ours: socket.socket) -> dict[str, list[int]] | None:
        taken: dict[str, list[int]] = {}
        heard = False
        deadline = time.monotonic() + _RETURN_SECONDS
        try:
            while (left := deadline - time.monotonic()) > 0:
                ours.settimeout(left)
                message, fds, _, _ = socket.recv_fds(ours, _MESSAGE, _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
                if not message:
                    if not heard:  # a manager that does not know the word closes the socket at once
                        return None
                    break
                heard = True
                word, _, value = message.decode().partition("=")
                if word == "FDRETURN":
                    return taken
                if word == "FDSTORE" and value.isdecimal():
                    self._limit = int(value)
                elif word == "FDNAME":
                    taken.setdefault(value, []).extend(fds)
        except OSError:
            pass
        self._report_slow_return()
        return taken

    def _report_slow_return(self) -> None:
        self._must_look = True
        self._trouble(
            _Problem(
                "the holder is slow: it did not give back all that it has",
                "see what holds it up, then restart this daemon (SIGKILL will do): what the holder has goes on then",
            )
        )

    def report(self) -> dict[str, Any]:
        """What `migproxy status` shows of it, as plain values."""
        return {
            "holder": self._notifier.path if self._notifier else None,
            "descriptors": self._count,
            "limit": self._limit,
            "problem": self.problem,
        }

    def close(self) -> None:
        """Drops what could not be sent, and the socket; see `settle`."""
        self._drop_unsent()
        if self._notifier is not None:
            self._notifier.close()


def _close(fds: Iterable[int]) -> set[tuple[int, int, int]]:
    """Closes duplicates of what this process has itself; returns what they were."""
    identities = set()
    for fd in fds:
        identities.add(identity(fd))
        os.close(fd)
    return identities


def _duplicate(fds: Sequence[int]) -> tuple[int, ...]:
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return tuple(made)


def _passed(environment: MutableMapping[str, str]) -> dict[str, list[int]]:
    """What systemd passed on at the start of this process (sd_listen_fds(3))."""
    pid, count, names = (environment.pop(f"LISTEN_{what}", "") for what in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    taken: dict[str, list[int]] = {}
    for offset, name in zip(range(int(count)), names.split(":"), strict=False):
        fd = _FIRST_FD + offset
        os.set_inheritable(fd, False)
        taken.setdefault(name, []).append(fd)
    return taken
