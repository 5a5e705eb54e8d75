"""The relay's life: it takes connections from a daemon, moves their bytes, and gives everything back to the next one.

It needs no capability, no file but its socket, no network of its own, and nothing but Python's standard library.
"""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import os
import queue
import selectors
import signal
import socket
import stat
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from migproxy import __version__, output
from migproxy.capacity import memory_limit
from migproxy.fds import break_off, close_all, peer_of, post, raise_file_limit, reset_on_close
from migproxy.ktls import KernelReceive, KernelSend
from migproxy.liveness import Stalls, read
from migproxy.notify import Notifier
from migproxy.output import lines
from migproxy.relay.carrier import Carrier
from migproxy.relay.protocol import (
    MOST_BYTES,
    MOST_FDS,
    VERSION,
    Drop,
    Ended,
    Ending,
    FromDaemon,
    FromRelay,
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
    for_relay,
)
from migproxy.relay.workers import Workers
from migproxy.safefiles import bind, open_file
from migproxy.splice import Pipe, Splice, has_hung_up
from migproxy.tally import Tallies
from migproxy.tlserrors import TLSError

_SPARE = 64  # descriptors for itself, and for those that a message brings before they are counted
_BACKLOG = 64  # that wait to be accepted
_STRANGERS = 8  # that have connected and not said Hello; the oldest goes when there are more
_LOOK_SECONDS = 2.0  # between two looks at the pumps
_EXTENSION = 30.0  # seconds that systemd is asked to wait for the end, again and again while a daemon is there
_RETRY_SECONDS = 0.01  # while the kernel has too many descriptors of this user in flight (unix(7), ETOOMANYREFS)
_ABORT_SECONDS = 2.0  # to tell where each thread is
_LONELY_SECONDS = 60.0  # that a detached relay waits for the next daemon after the last one, and what it moved last
_MOST_UNSENT = 1 << 16  # messages: a daemon that lets so many wait is hanging
_MOVED_FDS = 8  # of a connection: what comes with Move, and another of the memory, which Python's mmap makes
_TUNNEL_FDS = 4  # of one in user-space TLS, which are a worker's as well
_PUMPS = {Way.SPLICED: (Splice, Splice), Way.KTLS: (KernelSend, KernelReceive)}
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_MOST_AT_ONCE = 64  # messages that are heard before others have their turn


class RelayError(Exception):
    """The relay cannot start; says why, and what to do."""


@dataclass(slots=True)
class _Entry:
    """What there is under a name; owns its descriptors.

    Attributes:
        fds: In the order in which they came; of a connection that has ended, the memory alone.
        way: How it is moved, None where it is only kept.
        carrier: Moves it in this process.
        is_away: A worker moves it.
        end: How it ended.
    """

    fds: list[int]
    way: Way | None = None
    carrier: Carrier | None = None
    is_away: bool = False
    end: Ended | None = None


@dataclass(eq=False, slots=True)
class _Client:
    """A process that has connected.

    Attributes:
        is_daemon: It has said Hello, and everything goes to it.
        unsent: What waits for it to be read: packets, and names that are yet to be told of.
    """

    socket: socket.socket
    pid: int
    is_daemon: bool = False
    unsent: deque[bytes | str] = field(default_factory=deque)


class Relay:
    """Owns its socket, and everything that was handed to it.

    Args:
        path: Of the socket; for this user and root alone.
        is_detached: Nobody but a daemon has started it: it ends when it has nothing to do, and no daemon comes.
        notifier: To whoever started it and waits for its end; None where nobody does.

    Raises:
        RelayError: Another relay has that path, or the socket cannot be made.
    """

    def __init__(self, path: str, *, is_detached: bool = False, notifier: Notifier | None = None) -> None:
        self._path = path
        self._is_detached = is_detached
        self._notifier = notifier
        self._lock, self._listener = _listen(path)
        self._limit = raise_file_limit() - _SPARE
        self._entries: dict[str, _Entry] = {}
        self._notes: dict[str, str] = {}
        self._count = 0
        self._running = 0  # carriers, also of what was dropped and is about to end
        self._daemon: _Client | None = None
        self._strangers: list[_Client] = []
        self._is_ending = self._may_leave = self._is_told_to_quit = False
        self._had_daemon = False
        self._refused = ""
        self._alone_since = time.monotonic()
        self._stalls = Stalls()
        self._ends: queue.SimpleQueue[tuple[str, _Entry, OSError | None]] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._wakes, self._wake = socket.socketpair()
        for sock in (self._wakes, self._wake):
            sock.setblocking(False)
        self._workers = Workers(
            self._selector, self._note_worker_end, lambda why: _log("error", "a worker is gone", error=why)
        )
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakes, selectors.EVENT_READ)

    @property
    def wakeup_fd(self) -> int:
        """A byte written there wakes `serve` (signal.set_wakeup_fd)."""
        return self._wake.fileno()

    def end(self) -> None:
        """Tells it to end when it is not needed any more, a second time: at once. The daemon has what it needs."""
        self._is_told_to_quit = self._is_ending
        self._is_ending = True
        self.rouse()

    def rouse(self) -> None:
        """Wakes `serve`, unless it has ended; from any thread."""
        with suppress(OSError):
            self._wake.send(b"\0")

    def serve(self) -> None:
        """Serves until it is told to end and is not needed any more."""
        told = False
        if self._notifier:
            self._notifier.tell(READY=1)
        next_look = time.monotonic() + _LOOK_SECONDS
        while not self._is_over():
            for key, _ in self._selector.select(self._patience(next_look)):
                self._serve(key.fileobj)
            self._note_ends()
            if self._is_ending and not told:
                told = True
                _log("info", "told to end", moving=self._moving)
                self._tell(Ending())
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_SECONDS
                self._look()
                if self._is_ending and self._daemon and self._notifier:  # which says how long (--drain-timeout)
                    self._notifier.tell(EXTEND_TIMEOUT_USEC=int(_EXTENSION * 1e6))
            if self._daemon and self._daemon.unsent:
                self._flush(self._daemon)
            if self._workers.is_behind:
                self._workers.flush()
        if self._running:
            _log("info", "stopped at once", moving=self._moving)
            # Nothing is closed here: the kernel tells the daemon, and lets another relay begin, when the last thread
            # of this process is gone, so that no connection has two pumps at any time.
            lines.flush()
            os._exit(0)
        for client in [*self._strangers, *([self._daemon] if self._daemon else [])]:
            self._let_go(client)
        self._close()
        _log("info", "stopped")

    def _close(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        self._drop([*self._entries])
        self._workers.close()
        self._selector.close()
        for sock in (self._listener, self._wakes, self._wake):
            sock.close()
        os.close(self._lock)

    def _patience(self, next_look: float) -> float:
        if self._workers.is_behind or (self._daemon and self._daemon.unsent):
            return _RETRY_SECONDS
        return max(0.0, next_look - time.monotonic())

    @property
    def _moving(self) -> int:
        return sum(entry.carrier is not None or entry.is_away for entry in self._entries.values())

    def _is_over(self) -> bool:
        if self._is_told_to_quit:
            return True
        if self._is_ending:
            return not self._running and (self._daemon is None or self._may_leave)
        if not (self._is_detached and self._daemon is None):
            return False
        is_used = bool(self._entries or self._notes) or not self._had_daemon
        return not (self._running or (is_used and time.monotonic() - self._alone_since < _LONELY_SECONDS))

    def _serve(self, fileobj: object) -> None:
        if fileobj is self._listener:
            self._accept()
        elif fileobj is self._wakes:
            with suppress(BlockingIOError):
                while self._wakes.recv(4096):
                    pass
        elif not self._workers.hear(fileobj):
            for client in [one for one in (self._daemon, *self._strangers) if one and one.socket is fileobj]:
                for _ in range(_MOST_AT_ONCE):
                    if not self._hear(client):
                        break

    # Whoever connects

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            _log("error", "cannot accept a daemon", error=error.strerror, remedy="raise the limit of open files")
            time.sleep(_RETRY_SECONDS)
            return
        sock.setblocking(False)
        pid, uid, _ = peer_of(sock)
        client = _Client(sock, pid)
        self._selector.register(sock, selectors.EVENT_READ)
        self._strangers.append(client)
        if uid not in (0, os.geteuid()):
            self._refuse(client, f"user {uid} is neither root nor this relay's: run the daemon as one of them")
        elif len(self._strangers) > _STRANGERS:
            self._let_go(self._strangers[0])

    def _refuse(self, client: _Client, why: str) -> None:
        if why != self._refused:  # else it tries again and again
            _log("error", "refused", pid=client.pid, error=why)
        self._refused = why
        with suppress(OSError):
            client.socket.send(encode(Refused(why)))
        self._let_go(client)

    def _let_go(self, client: _Client) -> None:
        self._selector.unregister(client.socket)
        client.socket.close()
        if client is self._daemon:
            self._daemon = None
            self._may_leave = False
            self._alone_since = time.monotonic()
            _log("info", "the daemon is gone", pid=client.pid, moving=self._moving)
        else:
            self._strangers.remove(client)

    def _hear(self, client: _Client) -> bool:
        """Takes a message, if there is one; returns whether there may be another."""
        try:
            packet, fds, flags, _ = socket.recv_fds(client.socket, MOST_BYTES + 1, MOST_FDS, _RECEIVE)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # which is told before the last words of who died with something unread
        except OSError:
            self._let_go(client)
            return False
        if not packet:
            close_all(fds)
            self._let_go(client)
            return False
        try:
            message = for_relay(packet, len(fds))
        except ProtocolError as error:
            close_all(fds)
            lost = "; the limit of open files is too low" if flags & socket.MSG_CTRUNC else ""
            self._refuse(client, f"that is not understood: {error}{lost}")
            return False
        if isinstance(message, Hello):
            return self._welcome(client, message)
        if client.is_daemon:
            self._do(message, fds)
            return client is self._daemon
        close_all(fds)
        self._refuse(client, "Hello comes first")
        return False

    def _welcome(self, client: _Client, hello: Hello) -> bool:
        if hello.version != VERSION:
            self._refuse(
                client,
                f"the daemon ({hello.program}) speaks version {hello.version}, and this relay ({__version__}) version "
                f"{VERSION}: restart the relay when no migration runs",
            )
            return False
        if client.is_daemon:
            self._refuse(client, "Hello comes once")
            return False
        before = self._daemon
        if before is not None:
            if not has_hung_up(before.socket):
                self._refuse(client, f"another daemon is here, process {before.pid}: end it, or use another socket")
                return False
            while self._daemon is before:  # its last words
                self._hear(before)
        self._strangers.remove(client)
        client.is_daemon = True
        self._daemon = client
        self._had_daemon = True
        self._refused = ""
        _log("info", "a daemon has come", pid=client.pid, program=hello.program, kept=len(self._entries))
        self._tell(Welcome(VERSION, __version__, os.getpid(), self._limit, memory_limit() or 0))
        for name, words in self._notes.items():
            self._tell(Noted(name, words))
        for name in self._entries:
            client.unsent.append(name)
        self._tell(Synced(0))
        if self._is_ending:
            self._tell(Ending())
        return client is self._daemon

    # What the daemon asks for

    def _do(self, message: FromDaemon, fds: list[int]) -> None:
        if isinstance(message, Keep):
            self._keep(message.name, fds)
        elif isinstance(message, Move):
            self._move(message, fds)
        elif isinstance(message, Note):
            self._notes[message.name] = message.words
            self._drop(message.drops)
        elif isinstance(message, Drop):
            self._drop(message.names)
        elif isinstance(message, Sync):
            self._tell(Synced(message.number))
        elif isinstance(message, Leave):
            self._may_leave = True

    def _keep(self, name: str, fds: list[int]) -> None:
        if self._takes(name, fds, len(fds)):
            self._entries[name] = _Entry(fds)
            self._count += len(fds)

    def _takes(self, name: str, fds: list[int], count: int) -> bool:
        """Makes room for what comes under a name, or closes it and says why not."""
        known = self._entries.get(name)
        if known and known.way:
            why = "it is moved already"
        else:
            self._drop((name,))
            if self._count + count <= self._limit:
                return True
            why = f"the relay is full ({self._limit} descriptors): raise its limit of open files"
        close_all(fds)
        self._tell(Refused(why, name))
        return False

    def _move(self, move: Move, fds: list[int]) -> None:
        count = _TUNNEL_FDS if move.way is Way.TLS else _MOVED_FDS
        if not self._takes(move.name, fds, count):
            return
        try:
            entry = self._give(move, fds) if move.way is Way.TLS else self._carry(move, fds)
        except (OSError, ValueError) as error:
            close_all(fds)
            self._tell(Refused(f"it cannot be moved: {error}", move.name))
            return
        self._entries[move.name] = entry
        self._count += count
        self._running += 1
        if entry.carrier:
            entry.carrier.start()

    def _give(self, move: Move, fds: list[int]) -> _Entry:
        for sock in connection(fds[:2]):
            reset_on_close(sock, yes=sock.family != socket.AF_UNIX)
            sock.detach()
        self._workers.move(move, fds)
        os.close(fds.pop())  # the keys are the worker's alone
        return _Entry(fds, move.way, is_away=True)

    def _note_worker_end(self, ended: Ended) -> None:
        self._running -= 1
        self._alone_since = time.monotonic()
        entry = self._entries.get(ended.name)
        if entry is None or not entry.is_away:  # dropped meanwhile
            return
        entry.is_away = False
        if ended.number:  # also where the worker has died
            unix, tcp = connection(entry.fds[:2])
            break_off(tcp, unix)
            unix.detach()
            tcp.detach()
        close_all(entry.fds[:-1])
        self._count -= _TUNNEL_FDS - 1
        entry.fds = entry.fds[-1:]
        entry.end = ended
        self._tell(ended)

    def _carry(self, move: Move, fds: list[int]) -> _Entry:
        unix, tcp = connection(fds)
        try:
            reset_on_close(tcp, yes=True)  # if both processes die, nobody may take that for an end of stream
            tallies = Tallies(fds[6])
            sends, receives = _PUMPS[move.way]
            pumps = (
                sends(unix, tcp, tallies.to_network, Pipe((fds[2], fds[3]))),
                receives(tcp, unix, tallies.to_launcher, Pipe((fds[4], fds[5]))),
            )
        except (OSError, ValueError):
            unix.detach()
            tcp.detach()
            raise
        entry = _Entry(fds, move.way)

        def on_end(error: OSError | None) -> None:
            self._ends.put((move.name, entry, error))
            self.rouse()

        entry.carrier = Carrier(unix, tcp, pumps, on_end)
        return entry

    def _note_ends(self) -> None:
        while not self._ends.empty():
            name, entry, error = self._ends.get()
            assert entry.carrier
            entry.carrier.close()
            self._running -= 1
            entry.fds, entry.carrier = entry.fds[6:], None
            self._count -= _MOVED_FDS - len(entry.fds)
            self._alone_since = time.monotonic()
            if self._entries.get(name) is not entry:  # dropped meanwhile
                self._count -= 1
                close_all(entry.fds)
                continue
            entry.end = Ended(name)
            if error:
                reason = str(error.reason) if isinstance(error, TLSError) else ""
                entry.end = Ended(name, error.errno or errno.EIO, error.strerror or str(error), reason)
            self._tell(entry.end)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            self._notes.pop(name, None)
            entry = self._entries.pop(name, None)
            if entry is None:
                continue
            if entry.carrier:
                entry.carrier.stop()  # `_note_ends` closes everything
            else:
                if entry.is_away:
                    self._workers.drop(name)
                self._count -= _TUNNEL_FDS if entry.is_away else len(entry.fds)
                close_all(entry.fds)

    # What the daemon is told

    def _tell(self, message: FromRelay) -> None:
        client = self._daemon
        if client is None:
            return
        if len(client.unsent) >= _MOST_UNSENT:
            _log("error", "the daemon reads nothing", pid=client.pid, remedy="restart it: its connections stay here")
            self._let_go(client)
            return
        client.unsent.append(encode(message))
        self._flush(client)

    def _flush(self, client: _Client) -> None:
        while client.unsent:
            waiting = client.unsent[0]
            fds: Sequence[int] = ()
            packet = waiting if isinstance(waiting, bytes) else b""
            entry = self._entries.get(waiting) if isinstance(waiting, str) else None
            if entry:
                packet, fds = encode(Kept(str(waiting), entry.way)), entry.fds
            try:
                if packet:
                    post(client.socket, packet, fds)
            except BlockingIOError:
                return
            except OSError:
                client.unsent.clear()
                with suppress(OSError):
                    client.socket.shutdown(socket.SHUT_RDWR)  # and `_hear` lets go of it, after its last words
                return
            client.unsent.popleft()
            if entry and entry.end:  # here, although it may have ended since Hello: the daemon has to know at once
                client.unsent.appendleft(encode(entry.end))

    # Whether it gets on

    def _look(self) -> None:
        """Ends a worker that hangs, and this process where a pump does: the next relay goes on with that."""
        self._workers.look()
        running = {
            pump: name
            for name, entry in self._entries.items()
            if entry.carrier
            for pump in entry.carrier.pumps
            if not pump.tally.end
        }
        wedged = self._stalls.note({pump: read(pump) for pump in running}, time.monotonic())
        if names := sorted(running[pump] for pump in running if pump in wedged):
            _log("critical", "a pump moves nothing, although it could: this relay ends", names=names)
            lines.flush()
            signal.setitimer(signal.ITIMER_REAL, _ABORT_SECONDS)  # nobody may read where each thread is
            os.abort()


def connection(fds: Sequence[int]) -> tuple[socket.socket, socket.socket]:
    """Makes the two sockets of what Move comes with, the launcher's first, and checks the ends of pipes, if any.

    Raises:
        ValueError: A descriptor is of another kind; all of them stay the caller's.
    """
    for fd, way in zip(fds[2:6], (os.O_RDONLY, os.O_WRONLY) * 2, strict=False):
        is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        if not is_pipe or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != way:
            raise ValueError("a pipe's end is of another kind")
    unix = _stream(fds[0], "launcher's socket", socket.AF_UNIX)
    try:
        # Beside virt-handler, the way to the other node may be virt-handler's own socket.
        return unix, _stream(fds[1], "other node's socket", socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    except ValueError:
        unix.detach()
        raise


def _stream(fd: int, what: str, *families: socket.AddressFamily) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ValueError(f"the {what} is no socket") from error
    if sock.family not in families or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise ValueError(f"the {what} is of another kind")
    return sock


def _listen(path: str) -> tuple[int, socket.socket]:
    """Makes the socket, under a lock that lasts as long as this process: no two relays have the same path."""
    listener, lock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), -1
    try:
        lock = open_file(f"{path}.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        bind(listener, path, 0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if lock >= 0:
            os.close(lock)
        why = "another relay is there; stop it, or give this one a socket of its own"
        told = why if isinstance(error, BlockingIOError) else error.strerror or error
        raise RelayError(f"{error.filename or path}: {told}") from error
    return lock, listener


def _log(level: str, event: str, **fields: object) -> None:
    lines.put(output.as_json(level, event, **fields))


def main(arguments: Sequence[str]) -> int:
    """Runs a relay until a signal ends it: `python -m migproxy.relay SOCKET [--detached]`."""
    output.begin()
    lines.describe_loss = output.describe_loss_as_json
    faulthandler.enable()
    path, *options = arguments
    try:
        relay = Relay(path, is_detached="--detached" in options, notifier=Notifier.take())
    except RelayError as error:
        _log("error", "cannot start", error=str(error))
        return 1
    signal.set_wakeup_fd(relay.wakeup_fd, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: relay.end())
    _log("info", "relaying", socket=path, pid=os.getpid())
    relay.serve()
    return 0
