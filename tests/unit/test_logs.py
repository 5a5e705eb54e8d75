"""Where log lines go, and what the journal is told."""

import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from migproxy import logs, output

pytestmark = pytest.mark.tier("gate")


def decode(data: bytes) -> dict[str, str]:
    """Reads an entry as journald does (systemd's JOURNAL_NATIVE_PROTOCOL)."""
    entry = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", rest[:8])
            value, data = rest[8 : 8 + size], rest[8 + size :]
            assert data[:1] == b"\n"
            data = data[1:]
        else:
            data = rest
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name), name
        entry[name.decode()] = value.decode()
    return entry


@given(st.dictionaries(st.text(min_size=1), st.text() | st.integers()))
def test_whatever_is_logged_arrives_as_the_fields_it_was(event: dict[str, object]) -> None:
    entry = logs.journal_entry({"event": "hello", "level": "info", **event})
    assert decode(logs.encode(entry)) == {key: value.encode(errors="replace").decode() for key, value in entry.items()}


def test_fields_have_the_names_that_people_ask_for() -> None:
    event = {
        "event": "connection closed",
        "level": "warning",
        "namespace": "default",
        "name": "vm",
        "migration_uid": "u1",
    }
    entry = logs.journal_entry({**event, "role": "source", "channel": "direct", "timestamp": "now"})
    assert entry == {
        "MESSAGE": "connection closed namespace=default name=vm migration_uid=u1 role=source channel=direct",
        "EVENT": "connection closed",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "migproxy",
        "NAMESPACE": "default",
        "VMI": "vm",
        "MIGRATION_UID": "u1",
        "ROLE": "source",
        "CHANNEL": "direct",
    }


def test_an_option_cannot_take_the_place_of_a_line_s_own_fields() -> None:
    entry = logs.journal_entry({"event": "hello", "level": "error", "priority": "0", "message": "other"})
    assert (entry["PRIORITY"], entry["MESSAGE"].split()[0]) == ("3", "hello")


def test_the_journal_is_recognised_by_the_descriptor_that_leads_there(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        status = os.fstat(file.fileno())
        there = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert logs.leads_to_journal(there, file.fileno())
        assert not logs.leads_to_journal({"JOURNAL_STREAM": "1:2"}, file.fileno()), "somebody redirected it"
        assert not logs.leads_to_journal({}, file.fileno())


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where the journal's lines arrive."""
    monkeypatch.setattr(logs, "JOURNAL", str(tmp_path / "journal"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(logs.JOURNAL)
        sock.settimeout(10)
        yield sock


@pytest.fixture
def configured() -> Iterator[None]:
    """Restores how this process logs."""
    before, lines = structlog.get_config(), output.lines
    write, describe_loss = lines.write, lines.describe_loss
    structlog.reset_defaults()
    yield
    lines.flush()
    lines.write, lines.describe_loss = write, describe_loss
    structlog.configure(**before)
    logs._journal().close()
    logs._journal.cache_clear()


def said(capfd: pytest.CaptureFixture[str]) -> str:
    """What standard error was told."""
    output.lines.flush()
    return capfd.readouterr().err


def test_a_line_that_no_datagram_holds_is_sent_as_a_file(journal: socket.socket, configured: None) -> None:
    logs.configure("journald", "info")
    structlog.get_logger().info("large", what="x" * (1 << 22))
    data, ancillary, _, _ = journal.recvmsg(1 << 16, socket.CMSG_SPACE(4))
    assert data == b""
    (memory,) = struct.unpack("i", ancillary[0][2])
    with open(memory, "rb") as file:
        file.seek(0)
        assert decode(file.read())["WHAT"] == "x" * (1 << 22)


def test_a_journal_that_is_gone_is_told_what_it_missed(
    journal: socket.socket, configured: None, tmp_path: Path
) -> None:
    logs.configure("journald", "info")
    log = structlog.get_logger()
    Path(logs.JOURNAL).rename(tmp_path / "away")
    log.info("one")
    log.info("two")
    output.lines.flush()
    (tmp_path / "away").rename(logs.JOURNAL)
    log.info("three")
    entry = decode(journal.recv(1 << 16))
    assert entry["EVENT"] == "three"
    entry = decode(journal.recv(1 << 16))
    assert (entry["EVENT"], entry["LINES"], entry["PRIORITY"]) == ("log lines were lost", "2", "4")


def test_loggers_follow_a_change(journal: socket.socket, configured: None, capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    log = structlog.get_logger()
    bound = log.bind(name="vm")
    log.debug("unheard")
    logs.configure("journald", "debug")
    bound.debug("heard")
    assert decode(journal.recv(1 << 16))["VMI"] == "vm"
    assert "heard" not in said(capfd)


def test_an_exception_is_told_whole(journal: socket.socket, configured: None) -> None:
    logs.configure("journald", "info")
    try:
        raise ValueError("why")
    except ValueError:
        structlog.get_logger().error("failed", exc_info=True)
    entry = decode(journal.recv(1 << 16))
    assert entry["EXCEPTION"].startswith("Traceback")
    assert entry["EXCEPTION"].endswith("ValueError: why")


@pytest.mark.parametrize("style", ["console", "json"])
def test_nothing_that_others_wrote_controls_the_terminal(
    style: logs.Style, configured: None, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;title\x07\x9b2J\u202e\x7f\ud800\r\nready"
    logs.configure(style, "info")
    log = structlog.get_logger()
    log.error("failed", error=evil, path=Path(evil), several=[evil])
    try:
        raise ValueError(evil)
    except ValueError:
        log.error("failed", exc_info=True)
    lines = said(capfd).split("\n")
    assert all(line.isprintable() for line in lines)
    assert len([line for line in lines if "title" in line]) >= 2
    if style == "console":
        assert "ready" not in lines[:2], "no line of its own"


def test_the_journal_s_message_controls_no_terminal() -> None:
    entry = logs.journal_entry({"event": "hello", "level": "info", "error": "\x1b[2J\u202e\x9b"})
    assert entry["MESSAGE"].isprintable()
    assert entry["ERROR"] == "\x1b[2J\u202e\x9b", "a field is for programs"


def test_an_exception_tells_no_values_of_variables(configured: None, capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    key = "a private key"
    try:
        raise ValueError(len(key))
    except ValueError:
        structlog.get_logger().error("a defect", exc_info=True)
    told = said(capfd)
    assert "ValueError" in told
    assert key not in told


def test_what_libraries_log_is_a_line_like_any_other(configured: None, capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    library = logging.getLogger("some.library")
    logs.hear_libraries()
    try:
        library.info("chatter")
        library.warning("%d things are %s", 2, "odd")
        try:
            raise ValueError("why")
        except ValueError:
            library.exception("failed")
    finally:
        del logging.getLogger().handlers[-1]
    odd, failed = (json.loads(line) for line in said(capfd).splitlines())
    assert (odd["event"], odd["level"], odd["library"]) == ("2 things are odd", "warning", "some.library")
    assert (failed["event"], failed["level"]) == ("failed", "error")
    assert failed["exception"][0]["exc_value"] == "why"


def test_nobody_waits_for_a_journal_that_does_not_keep_up(journal: socket.socket, configured: None) -> None:
    logs.configure("journald", "info")
    log, lost = structlog.get_logger(), output.lines.lost
    while output.lines.lost == lost:
        log.info("one of many", what="x" * 10_000)
    lost = output.lines.lost - lost
    journal.settimeout(10)
    entry = decode(journal.recv(1 << 16))
    while entry["EVENT"] != "log lines were lost":
        entry = decode(journal.recv(1 << 16))
    assert entry["LINES"] == str(lost)


def test_what_is_printed_does_not_go_to_the_journal_as_an_entry(tmp_path: Path) -> None:
    """Which would take it for nothing: it goes to standard error, which systemd connects to the journal, too."""
    program = (
        "import sys; from migproxy import logs, output; output.begin(); logs.JOURNAL = sys.argv[1];"
        "logs.configure('journald', 'info'); print('cannot start', file=sys.stderr)"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        command = [sys.executable, "-c", program, str(tmp_path / "journal")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stderr == "cannot start\n"
        with pytest.raises(BlockingIOError):
            journal.recv(1, socket.MSG_DONTWAIT)


def test_a_library_s_mistake_in_a_format_is_its_own(configured: None, capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    record = logging.LogRecord("some.library", logging.WARNING, __file__, 1, "%d", ("no number",), None)
    logs._Foreign(logging.WARNING).handle(record)
    assert "no number" in said(capfd)
