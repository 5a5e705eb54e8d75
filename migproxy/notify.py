"""Words to the service manager: sd_notify's protocol (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

SOCKET = "NOTIFY_SOCKET"
_WATCHDOG, _WATCHDOG_PID = "WATCHDOG_USEC", "WATCHDOG_PID"


class Notifier:
    """Sends datagrams to whoever started this process, and may guard it: systemd.

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

    def _connect(self) -> socket.socket:
        if self._socket is None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                made.connect("\0" + self.path[1:] if self.path.startswith("@") else self.path)
            except OSError:
                made.close()
                raise
            self._socket = made
        return self._socket

    def tell(self, **state: object) -> None:
        """Sends state, such as READY=1; whoever does not listen misses it.

        Args:
            state: By name; a value's line breaks become spaces.
        """
        text = "\n".join(f"{name}={' '.join(str(value).splitlines())}" for name, value in state.items())
        try:
            self._connect().send(text.encode(), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def close(self) -> None:
        """Closes the socket; the next call makes another one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
