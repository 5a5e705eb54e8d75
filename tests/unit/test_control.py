"""The control socket: what a daemon answers there, and to whom."""

import asyncio
import http.client
import json
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from migproxy import control

pytestmark = pytest.mark.tier("gate")

REPORT = {"node": "node01", "migrations": [{"name": "größe"}]}


class Connection(http.client.HTTPConnection):
    """Python's own HTTP, on a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


def get(path: Path, target: str) -> tuple[int, str | None, Any]:
    connection = Connection(path)
    connection.request("GET", target)
    answer = connection.getresponse()
    return answer.status, answer.getheader("Content-Type"), answer.read()


async def test_the_status_is_had_by_http_and_by_ask(tmp_path: Path) -> None:
    path = tmp_path / "run" / "control.sock"
    async with control.serve(str(path), lambda: REPORT):
        assert path.stat().st_mode & 0o777 == 0o660
        status, kind, body = await asyncio.to_thread(get, path, "/status")
        assert (status, kind, json.loads(body)) == (200, "application/json", REPORT)
        assert (await asyncio.to_thread(get, path, "/other"))[0] == 404
        assert await asyncio.to_thread(control.ask, str(path)) == REPORT
    assert not path.exists()


async def test_silent_clients_keep_nobody_from_the_status(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with control.serve(str(path), lambda: REPORT):
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
                await asyncio.sleep(0)
            assert await asyncio.to_thread(control.ask, str(path)) == REPORT


def test_who_answers_something_else_is_no_daemon(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 Internal Server Error\r\n\r\n{}")
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_unix_server(answer, path):
            await asyncio.to_thread(control.ask, str(path))

    with pytest.raises(control.ControlError, match=r"500 Internal Server Error.*is `migproxy run` running"):
        asyncio.run(ask())
