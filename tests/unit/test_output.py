"""What becomes of lines and of what a command prints where the standard descriptors are closed, full, stuck or gone."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from migproxy.output import Descriptor, Lines

pytestmark = pytest.mark.tier("gate")

COMMANDS = {
    "help": ["--help"],
    "uri": ["uri", "FILE"],
    "doctor": ["doctor", "--json"],
    "top": ["top", "--control-socket", "SOCKET"],
    "status": ["status", "--control-socket", "SOCKET"],
}


class Sink:
    """Where lines go: it takes them, refuses them, or does not come back, as it is told.

    Attributes:
        error: What it raises; None to take lines.
        stuck: While it is set, a line waits.
    """

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.error: OSError | None = None
        self._free = threading.Event()
        self._free.set()
        self.is_waited_for = threading.Event()

    def stick(self) -> None:
        self._free.clear()

    def release(self) -> None:
        self._free.set()

    def write(self, several: Sequence[bytes]) -> None:
        if not self._free.is_set():
            self.is_waited_for.set()
        self._free.wait()
        if self.error:
            raise self.error
        self.written += several


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.release()


@pytest.fixture
def lines(sink: Sink) -> Lines:
    return Lines(sink.write, lambda lost: b"lost %d\n" % lost)


def test_lines_are_written_in_their_order(lines: Lines, sink: Sink) -> None:
    wanted = [b"%d\n" % number for number in range(1000)]
    for line in wanted:
        lines.put(line)
    lines.flush()
    assert sink.written == wanted
    assert (lines.lost, lines.problem) == (0, None)


def test_a_burst_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    wanted = [b"%06d %s\n" % (number, b"x" * 100) for number in range(10_000)]
    with path.open("wb") as file:
        lines = Lines(Descriptor(file.fileno()), lambda lost: b"")
        for line in wanted:
            lines.put(line)
        lines.flush()
    assert lines.lost == 0
    assert path.read_bytes().splitlines(keepends=True) == wanted


def test_lines_that_fail_are_counted_and_told_of_once(lines: Lines, sink: Sink) -> None:
    sink.error = OSError(28, "No space left on device")
    for _ in range(3):
        lines.put(b"x\n")
    lines.flush()
    assert (lines.lost, lines.problem) == (3, "No space left on device")
    sink.error = None
    lines.put(b"one\n")
    lines.put(b"two\n")
    lines.flush()
    assert sink.written == [b"one\n", b"two\n", b"lost 3\n"] or sink.written == [b"one\n", b"lost 3\n", b"two\n"]
    assert (lines.lost, lines.problem) == (3, None)


def test_the_news_of_a_loss_is_not_lost(lines: Lines, sink: Sink) -> None:
    sink.error = OSError(28, "No space left on device")
    lines.put(b"x\n")
    lines.flush()

    def take_one(several: Sequence[bytes]) -> None:
        sink.written.extend(several)
        lines.write = sink.write  # which still fails

    lines.write = take_one
    lines.put(b"one\n")
    lines.flush()
    assert sink.written == [b"one\n"]
    sink.error = None
    lines.put(b"two\n")
    lines.flush()
    assert sink.written == [b"one\n", b"two\n", b"lost 1\n"]


def test_nobody_waits_for_a_reader_that_does_not_read(lines: Lines, sink: Sink) -> None:
    sink.stick()
    lines.put(b"first\n")
    assert sink.is_waited_for.wait(10)
    for _ in range(100):
        lines.put(b"x" * (1 << 16) + b"\n")
    assert 0 < lines.lost < 100
    lines.flush()  # which gives up
    assert sink.written == []
    taken, lost = 100 - lines.lost, lines.lost
    sink.release()
    while len(sink.written) < taken + 2:
        lines.flush()
    assert sink.written[0] == b"first\n"
    assert sink.written[-1] == b"lost %d\n" % lost


def test_lines_come_from_many_threads_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        lines = Lines(Descriptor(file.fileno()), lambda lost: b"")

        def put() -> None:
            for _ in range(100):
                lines.put(b"x" * 100 + b"\n")

        threads = [threading.Thread(target=put) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines.flush()
    assert path.read_bytes() == (b"x" * 100 + b"\n") * 400


def test_a_line_that_was_cut_off_gets_its_end() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    write = Descriptor(writer)
    thread = threading.Thread(target=write, args=([b"x" * (1 << 17) + b"\n"],))
    thread.start()
    got = b""
    while len(got) <= 1 << 17:  # which waits for room, though the descriptor does not
        got += os.read(reader, 1 << 16)
    thread.join()
    assert got == b"x" * (1 << 17) + b"\n"
    os.close(writer)
    os.close(reader)


def test_a_line_that_did_not_fit_is_ended_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    written = b""
    room = 3

    def put(_: int, data: memoryview) -> int:
        nonlocal written, room
        if not room:
            raise OSError(28, "No space left on device")
        part = bytes(data[:room])
        written, room = written + part, room - len(part)
        return len(part)

    monkeypatch.setattr(os, "write", put)
    write = Descriptor(99)
    with pytest.raises(OSError, match="No space"):
        write([b"hello\n"])
    with pytest.raises(OSError, match="No space"):
        write([b"world\n"])
    room = 100
    write([b"again\n", b"more\n"])
    assert written == b"hel\nagain\nmore\n"


# Commands


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def gone() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def run(
    arguments: list[str], tmp_path: Path, close: int | None = None, **descriptors: int
) -> "subprocess.Popen[bytes]":
    (tmp_path / "vmi.yaml").write_text(
        "{kind: VirtualMachineInstance, apiVersion: kubevirt.io/v1, metadata: {name: vm, uid: abc}, status: {}}"
    )
    places = {"FILE": str(tmp_path / "vmi.yaml"), "SOCKET": str(tmp_path / "control.sock")}
    command = [sys.executable, "-m", "migproxy", *(places.get(one, one) for one in arguments)]
    kept = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **descriptors}
    return subprocess.Popen(command, preexec_fn=None if close is None else lambda: os.close(close), **kept)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("name", "make"), [("help", full), ("uri", gone), ("doctor", full)])
def test_output_that_cannot_be_written_is_one_line_and_a_status(
    name: str, make: Callable[[], int], tmp_path: Path
) -> None:
    descriptor = make()
    process = run(COMMANDS[name], tmp_path, stdout=descriptor)
    os.close(descriptor)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    assert complaint.decode().startswith("migproxy: cannot write to standard output: ")
    assert complaint.count(b"\n") == 1


@pytest.mark.parametrize(
    ("name", "closed"), [("uri", 0), ("top", 0), ("uri", 1), ("doctor", 1), ("help", 2), ("status", 2)]
)
def test_a_descriptor_that_is_closed_is_no_crash(name: str, closed: int, tmp_path: Path) -> None:
    process = run(COMMANDS[name], tmp_path, close=closed)
    said, complaint = process.communicate(timeout=60)
    assert b"Traceback" not in said + complaint
    assert complaint.count(b"\n") <= 1
    if closed == 1:
        assert process.returncode == 1
    if name in ("help", "uri") and closed != 1:
        assert process.returncode == 0
        assert said


@pytest.mark.parametrize("make", [full, gone])
def test_an_error_that_cannot_be_told_is_still_the_status(make: Callable[[], int], tmp_path: Path) -> None:
    descriptor = make()
    process = run(COMMANDS["status"], tmp_path, stderr=descriptor)
    os.close(descriptor)
    process.communicate(timeout=60)
    assert process.returncode == 1


def test_an_error_that_nobody_reads_ends_the_command_all_the_same(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(1 << 12))
    os.set_blocking(writer, True)
    process = run(COMMANDS["status"], tmp_path, stderr=writer)
    os.close(writer)
    try:
        process.communicate(timeout=60)
    finally:
        os.close(reader)
    assert process.returncode == 1
