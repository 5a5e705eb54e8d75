"""Words to the service manager: sd_notify's protocol, descriptors included (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import MutableMapping, Sequence

SOCKET = "NOTIFY_SOCKET"
_WATCHDOG, _WATCHDOG_PID = "WATCHDOG_USEC", "WATCHDOG_PID"


class Notifier:
    """Sends datagrams to whoever started or guards this process: systemd, or `migproxy holder`.

    Attributes:
        path: The manager's socket; one that begins with @ is in the abstract namespace.
        watchdog: Seconds within which it wants to hear WATCHDOG=1 again and again; None where it does not.
    """

    def __init__(self, path: str, watchdog: float | None = None) -> None:
        self.path = path
        self.watchdog = watchdog
        self._socket: socket.socket | None = None

    @classmethod
    def take(cls, environment: MutableMapping[str, str] = os.environ) -> Notifier | None:
        """Takes what the manager said out of the environment, so that no child process speaks for this one.

        Args:
            environment: Holds NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, or does not.

        Returns:
            None where nobody wants to hear.
        """
        path = environment.pop(SOCKET, "")
        microseconds, pid = environment.pop(_WATCHDOG, ""), environment.pop(_WATCHDOG_PID, "")
        if not path:
            return None
        fed = microseconds.isdecimal() and pid in ("", str(os.getpid()))
        return cls(path, int(microseconds) / 1e6 if fed and int(microseconds) else None)

    def connect(self) -> socket.socket:
        """Connects to the manager, unless that is done.

        Returns:
            The socket, which stays this object's; not blocking.

        Raises:
            OSError: Nobody listens there.
        """
        if self._socket is None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                made.connect("\0" + self.path[1:] if self.path.startswith("@") else self.path)
            except OSError:
                made.close()
                raise
            self._socket = made
        return self._socket

    def send(self, text: str, fds: Sequence[int] = ()) -> None:
        """Sends one datagram and does not wait.

        Args:
            text: Lines of NAME=value.
            fds: Descriptors that go with it; they stay the caller's.

        Raises:
            BlockingIOError: The manager reads too slowly for it to be sent now.
            OSError: Nobody listens there (any more); after `close`, the next call connects anew.
        """
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self.connect().sendmsg([text.encode()], ancillary, socket.MSG_NOSIGNAL)

    def tell(self, **state: object) -> None:
        """Sends state, such as READY=1; whoever does not listen misses it.

        Args:
            state: By name; a value's line breaks become spaces.
        """
        try:
            self.send("\n".join(f"{name}={' '.join(str(value).splitlines())}" for name, value in state.items()))
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def close(self) -> None:
        """Closes the socket; the next call makes another one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
