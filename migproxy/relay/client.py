"""The daemon's end of the relay: hands connections over, and starts or awaits another relay where one dies."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog

from migproxy import __version__
from migproxy.capacity import Limits
from migproxy.fds import close_all, duplicate, peer_of, post
from migproxy.pauses import doubling
from migproxy.relay.protocol import (
    MOST_BYTES,
    MOST_FDS,
    MOST_NAMES,
    VERSION,
    Drop,
    Ended,
    Ending,
    FromDaemon,
    Hello,
    Keep,
    Kept,
    Leave,
    Move,
    Note,
    Noted,
    ProtocolError,
    Refused,
    Sync,
    Synced,
    Way,
    Welcome,
    encode,
    for_daemon,
)
from migproxy.relay.records import wipe

log = structlog.get_logger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.1  # seconds between two attempts to reach the relay
_NOTED_AFTER = 1.0  # seconds without a relay after which it is trouble
_PATIENCE = 1.0  # seconds that a new connection waits until the relay has its descriptors
_BEAT_SECONDS = 2.0  # between two questions whether the relay gets on
_HANG_SECONDS = 10.0  # without an answer
_RETRY_SECONDS = 0.01  # while the kernel has too many descriptors of this user in flight (unix(7), ETOOMANYREFS)
_NOTE_SECONDS = 0.01  # that what is noted may be late
_MOST_OVER = MOST_NAMES - 1  # names that are dropped with words, and the words' own when those are dropped
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC)
_MOST_UNSENT = 4096  # messages that wait for a relay which takes none


@dataclass(frozen=True, slots=True)
class Left:
    """What the relay has under a name; its descriptors are the owner's, who closes them.

    Attributes:
        fds: As they were handed over.
        way: How it is moved; None where it is only kept.
        end: How it has ended, if it has; then `fds` is the memory that it was counted in.
    """

    fds: list[int]
    way: Way | None = None
    end: Ended | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that the relay has.

    Attributes:
        kept: By name.
        notes: Words by name.
    """

    kept: dict[str, Left] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Lease:
    """One name at the relay, and the descriptors under it; they stay their owner's.

    Attributes:
        name: Unique.
        fds: What is under it; empty where nothing is.
        way: How it is moved, None where it is only kept.
        ended: Set to how it ended, of one that is moved.
        keys: Of user-space TLS, until they are handed over; then nobody here has them.
    """

    name: str
    _client: RelayClient
    fds: tuple[int, ...] = ()
    way: Way | None = None
    ended: asyncio.Future[Ended] | None = None
    keys: bytearray = field(default_factory=bytearray, repr=False)
    _keep: bytes = field(init=False)

    def __post_init__(self) -> None:
        # Before there is anything to keep: a connection that was accepted and is not with the relay yet dies with us.
        self._keep = encode(Keep(self.name))

    @property
    def packet(self) -> bytes:
        """The message that hands it over."""
        return encode(Move(self.name, self.way)) if self.way else self._keep

    def keep(self, *fds: int) -> None:
        """Has the relay keep these, and nothing else, under the name; never waits and never fails."""
        self.fds = fds
        self._client.hand_over(self)

    def move(self, way: Way, *fds: int) -> asyncio.Future[Ended]:
        """Has the relay move a connection (see `protocol.Move`); returns what tells of its end."""
        self.fds, self.way = fds, way
        self.ended = asyncio.get_running_loop().create_future()
        self._client.hand_over(self)
        return self.ended

    def drop(self) -> None:
        """Has the relay forget everything under the name; what it moves is broken."""
        self._client.drop(self)


@dataclass(slots=True)
class _Note:
    """Words for the next daemon.

    Attributes:
        words: Makes them.
        told: What the relay was told last.
        over: Names to drop with the next ones.
        is_due: They may have changed since.
    """

    words: Callable[[], str]
    told: str | None = None
    over: list[str] = field(default_factory=list)
    is_due: bool = False


class RelayClient:
    """Speaks with the relay; where one dies, hands everything to the next.

    Attributes:
        problem: Why migrations are not relayed, or not protected, as they should be; None while all is well.
        ending: Set while a relay that was told to end is still there.
        replaced: Set when another relay is there, until it is told to end.

    Args:
        path: Of the relay's socket.
        starts: Start a relay where none answers.
    """

    def __init__(self, path: str, *, starts: bool = False) -> None:
        self.problem: str | None = "the relay has not answered yet"
        self.ending, self.replaced = asyncio.Event(), asyncio.Event()
        self._path = path
        self._starts = starts
        self._socket: socket.socket | None = None
        self._welcome: Welcome | None = None
        self._told = Contents()
        self._all_told: asyncio.Future[None] | None = None
        self._lost = asyncio.Event()
        self._leases: dict[str, Lease] = {}
        self._notes: dict[str, _Note] = {}
        self._noting: asyncio.TimerHandle | None = None
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._sent = asyncio.Event()
        self._syncs: dict[int, asyncio.Event] = {}
        self._number = 0
        self._relays = 0
        self._refused: str | None = None
        self._well_until: float | None = None  # the last time that it was; None before the first
        self._started: subprocess.Popen[bytes] | None = None

    # Names

    def lease(self, name: str, *fds: int) -> Lease:
        """Makes a name, and has the relay keep descriptors under it; without any, nothing is kept yet."""
        made = Lease(name, self)
        if fds:
            made.keep(*fds)
        return made

    def adopt(self, name: str, left: Left) -> Lease:
        """Makes a lease of what the relay has already, as `open` gave it."""
        made = self._leases[name] = Lease(name, self, tuple(left.fds), left.way)
        if left.way:
            made.ended = asyncio.get_running_loop().create_future()
            if left.end:
                made.ended.set_result(left.end)
        return made

    def hand_over(self, lease: Lease) -> None:
        """See `Lease.keep` and `Lease.move`."""
        self._leases[lease.name] = lease
        if self._is_ready and lease.keys:
            self._hand_over_keys(lease)
        elif self._is_ready:
            self._send(lease.packet, lease.fds)

    def _hand_over_keys(self, lease: Lease) -> None:
        """Hands a connection over with its keys in a pipe: the relay has the reader, and reads nothing of it."""
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            self._lose(f"keys cannot be handed over: {error.strerror}: raise the limit of open files")
            return
        try:
            os.write(writer, lease.keys)
            self._send(lease.packet, (*lease.fds, reader))
        finally:
            close_all((reader, writer))
            wipe(lease.keys)

    def drop(self, *leases: Lease) -> None:
        """See `Lease.drop`."""
        names = self._forget(leases)
        if self._is_ready:
            for start in range(0, len(names), MOST_NAMES):
                self._say(Drop(names[start : start + MOST_NAMES]))

    def note(self, name: str, words: Callable[[], str], *over: Lease, at_once: bool = False) -> None:
        """Has the relay keep words for the next daemon, and drops names in the same instant.

        After the first ones not at once, so that many connections need one message: what has ended is with the relay
        until then, and the next daemon counts it.

        Args:
            words: Makes them, as late as possible.
            over: What they tell of.
            at_once: They tell of something that the relay does not know.
        """
        note = self._notes.setdefault(name, _Note(words))
        note.words = words
        note.over += self._forget(over)
        note.is_due = True
        if at_once or note.told is None or len(note.over) >= _MOST_OVER:
            self._write_notes()
        elif self._noting is None:
            self._noting = asyncio.get_running_loop().call_later(_NOTE_SECONDS, self._write_notes)

    def adopt_note(self, name: str, words: str) -> None:
        """Takes over words that the relay has already, as `open` gave them."""
        self._notes[name] = _Note(lambda: words, words)

    def forget_note(self, name: str) -> None:
        """Has the relay forget words, and what is dropped with them."""
        note = self._notes.pop(name, None)
        if note and self._is_ready:
            self._say(Drop((*note.over, name)))

    def _write_notes(self) -> None:
        if self._noting:
            self._noting.cancel()
            self._noting = None
        if not self._is_ready:
            return  # the next relay is told everything
        for name, note in self._notes.items():
            if note.is_due:
                words, over = note.words(), tuple(note.over)
                note.is_due = False
                if over or words != note.told:
                    note.told, note.over = words, []
                    self._say(Note(name, words, over))

    def _forget(self, leases: Sequence[Lease]) -> tuple[str, ...]:
        known = [lease for lease in leases if self._leases.get(lease.name) is lease]
        for lease in known:
            del self._leases[lease.name]
        return tuple(lease.name for lease in known if lease.fds)

    # Sending

    @property
    def _is_ready(self) -> bool:
        """Whether the relay takes messages; what changes otherwise, it is told of when it does."""
        return self._socket is not None and self._all_told is None

    def _say(self, message: FromDaemon) -> None:
        self._send(encode(message))

    def _send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        if self._socket is None:  # lost by the message before: the next relay is told everything
            return
        if not self._unsent:
            try:
                post(self._socket, packet, fds)
            except BlockingIOError:
                pass
            except OSError as error:
                self._lose(error.strerror or str(error))
                return
            else:
                return
        if len(self._unsent) >= _MOST_UNSENT:
            self._lose("it takes no messages")
            return
        try:
            # Duplicates: the owner may close its own before they are sent.
            self._unsent.append((packet, duplicate(fds)))
        except OSError as error:
            self._lose(f"descriptors cannot be handed over: {error.strerror}: raise the limit of open files")
            return
        self._sent.clear()
        self._write_on()

    def _write_on(self) -> None:
        # A timer: a socket with too many descriptors in flight counts as writable all the same.
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._flush)

    def _flush(self) -> None:
        self._retry = None
        try:
            while self._unsent and self._socket:
                packet, fds = self._unsent[0]
                post(self._socket, packet, fds)
                self._unsent.popleft()
                close_all(fds)
        except BlockingIOError:
            self._write_on()
            return
        except OSError as error:
            self._lose(error.strerror or str(error))
        self._sent.set()

    async def handed_over(self) -> None:
        """Waits until the relay has been sent everything, for a moment at most: then it goes on without protection."""
        if self._unsent:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    while self._unsent:
                        await self._sent.wait()

    async def settle(self, seconds: float) -> bool:
        """Waits until the relay has done everything that it was told; returns whether it has."""
        self._write_notes()
        self._number += 1
        number, answered = self._number, asyncio.Event()
        self._syncs[number] = answered
        try:
            async with asyncio.timeout(seconds):
                while self._is_ready:
                    self._say(Sync(number))
                    lost = asyncio.create_task(self._lost.wait())
                    answer = asyncio.create_task(answered.wait())
                    try:
                        await asyncio.wait([lost, answer], return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        lost.cancel()
                        answer.cancel()
                    if answered.is_set():
                        return True
        except TimeoutError:
            pass
        finally:
            del self._syncs[number]
        return False

    def release(self) -> None:
        """Lets a relay that was told to end do so as soon as it moves nothing: this daemon stays."""
        if self._is_ready:
            self._say(Leave())

    # The relay's life

    async def open(self) -> Contents:
        """Returns what an earlier daemon left, once there is a relay that has told everything.

        Descriptors are the caller's; every name is to be adopted, or dropped (`adopt`).
        """
        await self._reach()
        told, self._told = self._told, Contents()
        self._all_told = None
        return told

    async def run(self) -> None:
        """Sees to it that there is a relay that has everything, until cancelled."""
        beating = asyncio.create_task(self._beat())
        try:
            while True:
                await self._lost.wait()
                await self._reach()
                self._reconcile()
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _reach(self) -> None:
        """Connects to a relay and hears what it has; starts one if that is wanted, and tries for ever."""
        loop = asyncio.get_running_loop()
        began, pauses, last = loop.time(), doubling(_FIRST_PAUSE, _LONGEST_PAUSE), ""
        while True:
            try:
                await self._connect()
                break
            except OSError as error:
                why = f"no relay answers at {self._path}: {error.strerror or error}"
                if self._starts and isinstance(error, ConnectionRefusedError | FileNotFoundError):
                    self._start()
                elif not self._starts:
                    why += "; start it (systemctl start migproxy, or the pod's container relay)"
            except ProtocolError as error:
                why = f"the relay at {self._path} refuses: {error}"
            if loop.time() - began > _NOTED_AFTER and why != last:
                last = why
                log.error("migrations are not relayed", error=why)
            self.problem = why
            await asyncio.sleep(next(pauses))
        self.ending.clear()
        self.replaced.set()
        self.problem = None
        self._relays += 1
        assert self._welcome
        log.info("relay", socket=self._path, pid=self._welcome.pid, version=self._welcome.program)

    def _start(self) -> None:
        if self._started and self._started.poll() is None:
            return  # it is on its way
        command = [sys.executable, "-m", "migproxy.relay", self._path, "--detached"]
        try:
            # It outlives this process, which takes no notice of its end; its log goes where this one's goes.
            self._started = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            log.error("no relay can be started", error=error.strerror)
        else:
            log.info("starting a relay, which stays when this daemon ends", socket=self._path)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._path)
            self._check_peer(sock)
        except OSError:
            sock.close()
            raise
        self._lost.clear()
        self._socket, self._refused, self._welcome = sock, None, None
        self._told, self._all_told = Contents(), loop.create_future()
        loop.add_reader(sock, self._read)
        self._say(Hello(VERSION, __version__))
        try:
            async with asyncio.timeout(_HANG_SECONDS):
                await self._all_told
        except TimeoutError:
            self._lose("it does not answer")
            raise OSError(errno.ETIMEDOUT, "it does not tell what it has") from None
        if self._socket is not sock:
            raise OSError(errno.ECONNRESET, "it has ended")
        if self._welcome is None:
            self._lose("it has not said who it is")
            raise ProtocolError("it is none: it has not said who it is")

    def _check_peer(self, sock: socket.socket) -> None:
        """A relay of this daemon's own is its user's; who manages another one has chosen its user, and the folder."""
        _, uid, _ = peer_of(sock)
        if self._starts and uid not in (0, os.geteuid()):
            why = f"user {uid} listens there: end that process and remove its socket, or give another --relay-socket"
            raise PermissionError(errno.EACCES, why)

    def _read(self) -> None:
        while self._socket:
            try:
                packet, fds, _, _ = socket.recv_fds(self._socket, MOST_BYTES + 1, MOST_FDS, _RECEIVE)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it has died with something unread; what it said before is yet to be read
            except OSError as error:
                self._lose(error.strerror or str(error))
                return
            if not packet:
                self._lose(self._refused or "it has ended")
                return
            try:
                message = for_daemon(packet, len(fds))
            except ProtocolError as error:
                close_all(fds)
                self._lose(f"it says what is not understood: {error}")
                return
            self._hear(message, fds)

    def _hear(self, message: object, fds: list[int]) -> None:
        if isinstance(message, Welcome):
            self._welcome = message
        elif isinstance(message, Noted):
            self._told.notes[message.name] = message.words
        elif isinstance(message, Kept):
            self._told.kept[message.name] = Left(fds, message.way)
        elif isinstance(message, Ended):
            self._note_end(message)
        elif isinstance(message, Synced):
            if message.number == 0 and self._all_told and not self._all_told.done():
                self._all_told.set_result(None)
            elif answered := self._syncs.get(message.number):
                answered.set()
        elif isinstance(message, Refused):
            self._note_refusal(message)
        elif isinstance(message, Ending):
            log.info("the relay was told to end")
            self.ending.set()
            self.replaced.clear()

    def _note_end(self, message: Ended) -> None:
        if left := self._told.kept.get(message.name):
            self._told.kept[message.name] = Left(left.fds, left.way, message)
        lease = self._leases.get(message.name)
        if lease and lease.ended and not lease.ended.done():
            lease.ended.set_result(message)

    def _note_refusal(self, message: Refused) -> None:
        if not message.name:
            self._refused = message.why
            return
        log.error("the relay does not take a connection or listener", name=message.name, error=message.why)
        self.problem = message.why
        if lease := self._leases.get(message.name):
            lease.fds = ()
            if lease.ended and not lease.ended.done():
                lease.ended.set_result(Ended(message.name, errno.ENOBUFS, message.why))

    def _lose(self, why: str) -> None:
        if self._socket is None:
            return
        self.close()
        if self._all_told and not self._all_told.done():
            self._all_told.set_exception(ProtocolError(why) if self._refused else OSError(errno.ECONNRESET, why))
            return
        log.warning("the relay is gone: connections go on with the next one", error=why, connections=self._moving)
        self.problem = f"the relay is gone: {why}"
        self._well_until = asyncio.get_running_loop().time()
        self._lost.set()

    @property
    def lasting_problem(self) -> str | None:
        """`problem`, where it has lasted for longer than the next relay takes to be there."""
        if self.problem is None or self._well_until is None:
            return None
        return self.problem if asyncio.get_running_loop().time() - self._well_until > _NOTED_AFTER else None

    @property
    def is_idle(self) -> bool:
        """Whether the relay is nobody's but the daemons', and moves nothing: nothing is lost if it ends."""
        return self._starts and not self._moving

    @property
    def _moving(self) -> int:
        return sum(lease.way is not None for lease in self._leases.values())

    def _reconcile(self) -> None:
        """Makes what the relay has equal to what it should have: another one has nothing, the same one everything."""
        told, self._told = self._told, Contents()
        self._all_told = None
        for name, left in told.kept.items():
            lease = self._leases.get(name)
            close_all(left.fds)
            if lease is None:
                self._say(Drop((name,)))
            elif left.end:
                self._note_end(left.end)
        for name in told.notes.keys() - self._notes.keys():
            self._say(Drop((name,)))
        for note in self._notes.values():
            note.told, note.over, note.is_due = None, [], True
        self._write_notes()
        for lease in [*self._leases.values()]:
            known = told.kept.get(lease.name)
            if not lease.fds or (known and known.way) or (lease.ended and lease.ended.done()):
                continue
            if lease.way is Way.TLS and not lease.keys:
                self._note_end(Ended(lease.name, errno.EOWNERDEAD, "the relay that had its keys has died"))
            else:
                self.hand_over(lease)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            if not self._is_ready:
                continue
            if await self.settle(_HANG_SECONDS):
                if self._is_ready and self.problem and not self._lost.is_set():
                    self.problem = None
                    log.info("migrations are relayed again")
            elif self._is_ready:
                self.problem = "the relay does not answer: see what holds it up, or end it (SIGKILL will do)"
                log.error("migrations are not protected", error=self.problem)

    @property
    def limits(self) -> Limits | None:
        """What the relay may have; None as long as it has not said."""
        return Limits(self._welcome.limit, self._welcome.memory or None) if self._welcome else None

    @property
    def is_beside(self) -> bool:
        """Whether the relay was started by a daemon, and so shares its cgroup."""
        return self._starts

    @property
    def pid(self) -> int | None:
        """The relay's process; None while there is none."""
        return self._welcome.pid if self._welcome and self._socket else None

    def report(self) -> dict[str, Any]:
        """What `migproxy status` shows of it, as plain values."""
        return {
            "socket": self._path,
            "pid": self.pid,
            "version": self._welcome.program if self._welcome else None,
            "connections": self._moving,
            "descriptors": sum(len(lease.fds) for lease in self._leases.values()),
            "limit": self._welcome.limit if self._welcome else None,
            "replaced": max(0, self._relays - 1),
            "problem": self.problem,
        }

    def close(self) -> None:
        """Ends the connection; the relay keeps what it has."""
        for timer in filter(None, (self._retry, self._noting)):
            timer.cancel()
        self._retry = self._noting = None
        if self._socket:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        for _, fds in self._unsent:
            close_all(fds)
        self._unsent.clear()
        self._sent.set()
        for left in self._told.kept.values():
            close_all(left.fds)
        self._told = Contents()
