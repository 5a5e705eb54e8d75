"""Structured logs: for people on a terminal, fields for the journal, JSON for everything else."""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import re
import socket
import struct
import sys
import traceback
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal, TextIO

from migproxy.imports import without
from migproxy.output import STDERR, Write, lines, to_stderr
from migproxy.text import printable

with without("rich"):  # which structlog loads for its own tracebacks
    import structlog
    from structlog.tracebacks import ExceptionDictTransformer

Style = Literal["auto", "console", "json", "journald"]
Event = MutableMapping[str, Any]

JOURNAL = "/run/systemd/journal/socket"

_LEVELS = {name.lower(): level for name, level in logging.getLevelNamesMapping().items()}
_PRIORITIES = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
_OWN_NAMES = {"name": "VMI"}  # NAME alone would be anybody's
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def configure(style: Style, level: str) -> None:
    """Sets how this process logs, to standard error or to the journal; again at any time, for every logger there is.

    Args:
        style: "console", "json" (one object a line), "journald" (fields, see `journal_entry`), or "auto": the journal
            where standard error leads there, else console on a terminal.
        level: The least severity that is logged.
    """
    _output.least = _LEVELS[level.lower()]
    _output.renderers, lines.write = _choose(style)
    lines.describe_loss = _describe_loss
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                _output.filter,
                structlog.processors.add_log_level,
                _stamp,
                _output.render,
            ],
            logger_factory=lambda *_: _output,
            cache_logger_on_first_use=True,
        )


class _Output:
    """Where lines go now: loggers keep what they were made with, and this they all ask."""

    def __init__(self) -> None:
        self.least = logging.INFO
        self.renderers: list[structlog.typing.Processor] = []

    def filter(self, _: object, method: str, event: Event) -> Event:
        if _LEVELS.get(method, logging.ERROR) < self.least:
            raise structlog.DropEvent
        return event

    def render(self, logger: object, method: str, event: Event) -> Any:
        rendered: Any = event
        for renderer in self.renderers:
            rendered = renderer(logger, method, rendered)
        return rendered if isinstance(rendered, bytes) else f"{rendered}\n".encode(errors="backslashreplace")

    def msg(self, line: bytes) -> None:
        lines.put(line)

    debug = info = warning = error = critical = exception = msg


_stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
_output = _Output()


def _describe_loss(lost: int) -> bytes:
    event: Event = {"event": "log lines were lost", "lines": lost, "level": "warning"}
    line: bytes = _output.render(None, "warning", _stamp(None, "warning", event))
    return line


def report() -> dict[str, Any]:
    """What became of this process's lines: how many were lost, and why the last one was, if lines still are."""
    return {"lines_lost": lines.lost, "problem": lines.problem}


def hear_libraries() -> None:
    """Has what libraries log by Python's own module be lines of this log, from warnings on."""
    logging.getLogger().addHandler(_Foreign(logging.WARNING))


class _Foreign(logging.Handler):
    """Hands on what libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        log = structlog.get_logger(record.name)
        method = log.warning if record.levelno < logging.ERROR else log.error
        try:
            method(record.getMessage(), library=record.name, **({"exc_info": error} if error else {}))
        except Exception:  # noqa: BLE001 - a library's mistake in a format; as logging's own handlers do
            self.handleError(record)


def _choose(style: Style) -> tuple[list[structlog.typing.Processor], Write]:
    is_terminal = os.isatty(STDERR)
    if style == "journald" or (style == "auto" and leads_to_journal(os.environ, STDERR)):
        return [_as_entry], _journal().write
    # Tracebacks come without local variables: a key might be among them.
    if style == "console" or (style == "auto" and is_terminal):
        console = structlog.dev.ConsoleRenderer(colors=is_terminal, exception_formatter=_print_traceback)
        return [_as_printable, console], to_stderr()
    tracebacks = ExceptionDictTransformer(show_locals=False)
    return [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()], to_stderr()


def _as_printable(_: object, _method: str, event: Event) -> Event:
    """Names, errors and paths come from others: nothing in them reaches the terminal as a control."""
    return {key: _shown(value) if key != "exc_info" else value for key, value in event.items()}


def _shown(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float)) else printable(str(value))


def _print_traceback(out: TextIO, error: structlog.typing.ExcInfo) -> None:
    out.write("\n" + printable("".join(traceback.format_exception(*error)).rstrip(), keep="\n"))


def leads_to_journal(environment: Mapping[str, str], descriptor: int) -> bool:
    """Whether the service manager has connected a descriptor to the journal (systemd.exec(5), JOURNAL_STREAM).

    Args:
        environment: JOURNAL_STREAM in it is DEVICE:INODE.
        descriptor: Such as that of standard error.
    """
    status = os.fstat(descriptor)
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def journal_entry(event: Mapping[str, Any]) -> dict[str, str]:
    """A line's fields by the journal's names: namespace -> NAMESPACE, the VMI's name -> VMI.

    Args:
        event: As structlog has it. MESSAGE says all of it, since that is what journalctl shows.
    """
    fields = {key: str(value) for key, value in event.items() if key not in ("event", "level", "timestamp", "exc_info")}
    error = event.get("exc_info")
    if isinstance(error, BaseException):
        fields["exception"] = "".join(traceback.format_exception(error)).rstrip()
    told = "".join(f" {key}={value!r}" if " " in value else f" {key}={value}" for key, value in fields.items())
    return {_field_name(key): value for key, value in fields.items()} | {
        "MESSAGE": printable(f"{event.get('event', '')}{told}", keep="\n"),
        "PRIORITY": str(_PRIORITIES.get(str(event.get("level")), 5)),
        "SYSLOG_IDENTIFIER": "migproxy",
        "EVENT": str(event.get("event", "")),
    }


def _field_name(key: str) -> str:
    return _OWN_NAMES.get(key) or re.sub(r"[^A-Z0-9_]", "_", key.upper()).lstrip("_0123456789")[:64] or "FIELD"


def encode(entry: Mapping[str, str]) -> bytes:
    """An entry as the journal's native protocol has it: a value with a line break comes after its length.

    Args:
        entry: By the journal's names.
    """
    parts = []
    for name, text in entry.items():
        value = text.encode(errors="replace")
        framed = b"\n" + struct.pack("<Q", len(value)) if b"\n" in value else b"="
        parts.append(name.encode() + framed + value + b"\n")
    return b"".join(parts)


def _as_entry(_: object, method: str, event: Event) -> bytes:
    error = event.get("exc_info")
    if error is True or (method == "exception" and error is None):
        event["exc_info"] = sys.exc_info()[1]
    return encode(journal_entry(event))


class _Journal:
    """The journal's socket."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def write(self, entries: Sequence[bytes]) -> None:
        """Sends entries, and waits for a journal that is slow.

        Raises:
            OSError: It does not take one.
        """
        for entry in entries:
            self._send(entry)

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.sendto(entry, JOURNAL)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_aside(entry)

    def close(self) -> None:
        self._socket.close()

    def _send_aside(self, data: bytes) -> None:
        """Sends what no datagram holds, as a sealed file in memory."""
        memory = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(data)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", memory))]
            self._socket.sendmsg([], rights, 0, JOURNAL)
        finally:
            os.close(memory)


@functools.cache
def _journal() -> _Journal:
    return _Journal()
