"""One connection that is moved: its two sockets, and the two pumps between them."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock

from migproxy import tcpinfo
from migproxy.fds import break_off, reset_on_close
from migproxy.splice import Pump
from migproxy.threads import Threads
from migproxy.tlserrors import Reason, TLSError

_LOOK_SECONDS = 0.01

_threads = Threads(linger=1.0)

Ended = Callable[[OSError | None], None]


class Carrier:
    """Moves a connection between a launcher's unix socket and the other node; owns both sockets and both pumps.

    Each direction has a thread that blocks in the kernel and holds Python's lock for microseconds at a time.
    (Non-blocking splices on readiness measured 7 % slower, and would share one thread.)

    Args:
        pumps: Of what the launcher sends, and of what it receives.
        on_end: Is called once, by a thread, when nothing is moved any more, and both peers have been told: with what
            broke the connection, None where both directions have ended. A TCP peer is told of an error by a reset,
            never by an end of stream that would pass for a complete one.
    """

    def __init__(self, unix: socket.socket, tcp: socket.socket, pumps: tuple[Pump, Pump], on_end: Ended) -> None:
        self.pumps = pumps
        self._unix = unix
        self._tcp = tcp
        self._send, self._receive = pumps
        self._on_end = on_end
        self._stopped = False
        self._first_error: OSError | None = None
        self._running = 2
        self._lock = Lock()

    def start(self) -> None:
        """Begins, and does not wait."""
        for sock in (self._unix, self._tcp):
            sock.setblocking(True)
        for pump in self.pumps:
            try:
                _threads.start(lambda pump=pump: self._work(pump))  # type: ignore[misc]
            except RuntimeError as error:  # no more threads to be had
                self._first_error = OSError(errno.EAGAIN, str(error))
                self.stop()
                self._done()

    def _work(self, pump: Pump) -> None:
        pump.run()
        self._first_error = self._first_error or pump.error
        self._done()

    def _done(self) -> None:
        with self._lock:
            self._running -= 1
            if self._running:
                return
        error = self._cause()
        try:
            if error and not self._stopped and self._send.error is None:
                self._flush()
        finally:
            if error or self._stopped:
                break_off(self._tcp, self._unix)
            else:
                with suppress(OSError):
                    reset_on_close(self._tcp, yes=False)
            self._on_end(error)

    def _cause(self) -> OSError | None:
        """The error to report: a peer's own word says more than the reset that follows it and may be noticed first."""
        heard = self._receive.error
        said = isinstance(heard, TLSError) and heard.reason is Reason.REFUSED_BY_PEER
        return heard if said else self._first_error

    def stop(self) -> None:
        """Ends both directions at once; the TCP peer sees a reset."""
        self._stopped = True
        break_off(self._tcp, self._unix)

    def _flush(self) -> None:
        """Waits until TCP has delivered what the launcher wrote before it went away: a reset would discard it.

        However long the other launcher takes to read it; where its node is gone, the daemon or the kernel ends it.
        """
        while not self._stopped and tcpinfo.unsent(self._tcp) and not tcpinfo.is_over(self._tcp):
            time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Closes the sockets and the pumps, after the end."""
        for closing in (self._tcp, self._unix, *self.pumps):
            closing.close()
        # An error's traceback holds whoever holds the error, and the memory in which a pump counts.
        self._first_error = self._send.error = self._receive.error = None
