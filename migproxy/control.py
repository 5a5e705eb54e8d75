"""The control socket: the running daemon tells whoever connects to a unix socket its status, for `migproxy status`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from typing import Any

from migproxy.safefiles import bind

_SECONDS = 5.0  # that the daemon may take to answer


class ControlError(Exception):
    """The control socket cannot be made, or the daemon cannot be asked."""


@asynccontextmanager
async def serve(path: str, report: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
    """Answers on a unix socket, readable by its owner and group, while the context lasts: JSON, to the stream's end.

    Args:
        path: Where; its folder is made if need be, a socket that a dead daemon left is replaced.
        report: What to answer; called for each connection.

    Raises:
        ControlError: Another daemon answers there, or the socket cannot be made.
    """

    def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            writer.write(json.dumps(report()).encode())

    listener = socket.socket(socket.AF_UNIX)
    try:
        bind(listener, path, 0o660)
        server = await asyncio.start_unix_server(answer, sock=listener)
    except OSError as error:
        listener.close()
        raise ControlError(f"--control-socket {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        server.close()
        with suppress(FileNotFoundError):
            os.unlink(path)


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
            with connection.makefile("rb") as stream:
                answer: dict[str, Any] = json.load(stream)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ControlError(
            f"{path}: {why}: is `migproxy run` running, with that --control-socket, and may you read it?"
        ) from error
    return answer
