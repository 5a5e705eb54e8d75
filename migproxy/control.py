"""The control socket: the running daemon's status over HTTP on a unix socket, for `migproxy status` and curl."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from migproxy import httpd
from migproxy.fds import peer_of
from migproxy.safefiles import bind
from migproxy.sockets import BACKLOG

_SECONDS = 5.0  # that the daemon may take to answer


class ControlError(Exception):
    """The control socket cannot be made, or the daemon cannot be asked."""


@asynccontextmanager
async def serve(path: str, report: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Answers `GET /status` on a unix socket, for its owner and group, while the context lasts.

    Args:
        path: Where; its folder is made if need be, a socket that a dead daemon left is replaced.
        report: What to answer; called for each request.

    Raises:
        ControlError: Another daemon answers there, or the socket cannot be made.
    """

    async def status(_: httpd.Request) -> httpd.Answer:
        return httpd.json_answer(report())

    with socket.socket(socket.AF_UNIX) as listener:
        try:
            bind(listener, path, 0o660)
            listener.listen(BACKLOG)
        except OSError as error:
            whose = _listener(path) if error.errno == errno.EADDRINUSE else ""
            raise ControlError(f"--control-socket {path}: {error.strerror or error}{whose}") from error
        try:
            async with httpd.serve(listener, {"/status": status}, lambda *_: None):
                yield
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _listener(path: str) -> str:
    """Who listens on a socket, for people."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        probe.connect(path)
        if pid := peer_of(probe)[0]:
            return f" (it is process {pid}: ps -fp {pid})"
    return ""


def ask(path: str) -> dict[str, Any]:
    """Asks the daemon for its status.

    Args:
        path: Its control socket.

    Raises:
        ControlError: Nobody answers there.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(path)
            connection.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with connection.makefile("rb") as stream:
                head, _, body = stream.read().partition(b"\r\n\r\n")
        if head.split(b" ")[1:2] != [b"200"]:
            raise ValueError(f"it answers {head[:80]!r}")
        answer: dict[str, Any] = json.loads(body)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ControlError(
            f"{path}: {why}: is `migproxy run` running, with that --control-socket, and may you read it?"
        ) from error
    return answer
