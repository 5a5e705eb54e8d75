"""The control socket: the running daemon answers HTTP with JSON on a unix socket, for `migproxy status`."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from migproxy.sockets import make_way

STATUS = "/status"
_SECONDS = 5.0  # that the daemon may take to answer


class ControlError(Exception):
    """The control socket cannot be made, or the daemon cannot be asked."""


@asynccontextmanager
async def serve(path: str, report: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Answers on a unix socket, readable by its owner and group, while the context lasts.

    Args:
        path: Where; its folder is made if need be, a socket that a dead daemon left is replaced.
        report: What to answer; called for each request.

    Raises:
        ControlError: Another daemon answers there, or the socket cannot be made.
    """
    from aiohttp import web  # slow to import, and only the daemon needs it

    async def status(_: web.Request) -> web.Response:
        return web.json_response(report())

    app = web.Application()
    app.router.add_get(STATUS, status)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            make_way(path, socket.SOCK_STREAM, "migproxy")
            await web.UnixSite(runner, path).start()
        except OSError as error:
            raise ControlError(f"--control-socket {path}: {error.strerror}") from error
        try:
            os.chmod(path, 0o660)
            yield
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
    finally:
        await runner.cleanup()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(path: str) -> dict[str, Any]:
    """Asks the daemon for its status.

    Args:
        path: Its control socket.

    Raises:
        ControlError: Nobody answers there.
    """
    connection = _UnixConnection(path)
    try:
        connection.request("GET", STATUS)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ControlError(
            f"{path}: {why}: is `migproxy run` running, with that --control-socket, and may you read it?"
        ) from error
    finally:
        connection.close()
    return answer
