"""One measurement of one contestant: a stream, round trips, connection set-up, the way from a VMI event to sockets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migproxy.bench.contestants import Contestant, Migproxy
from migproxy.bench.meter import Usage, usage
from migproxy.bench.stage import BenchError, Process, Stage, until

GIB = 1 << 30
_PATIENCE = 60.0  # seconds, for what takes milliseconds on a machine that is not overloaded
RPC = 64  # bytes; libvirt's RPC and QEMU's control messages are small


@dataclass(frozen=True, slots=True)
class Flow:
    """What crossed a contestant's relays, and what they used for it.

    Attributes:
        seconds: From the first write to the last byte's arrival.
        bytes: By connection, in all.
        within: By connection, what arrived in the second half of the writers' time, when all buffers were full.
        used: Of the relays, from the first write to the last byte's arrival; rss, threads and files as they were then.
    """

    seconds: float
    bytes: list[int]
    within: list[int]
    used: Usage

    @property
    def rate(self) -> float:
        """Bytes per second, all connections."""
        return sum(self.bytes) / self.seconds

    @property
    def gib(self) -> float:
        return sum(self.bytes) / GIB


@contextmanager
def _open(
    stage: Stage, contestant: Contestant, connections: int, seconds: float, chunk: int, slow: int
) -> Iterator[tuple[Process, Process]]:
    log = stage.folder / "traffic.log"
    log.unlink(missing_ok=True)
    reading = [stage.traffic, "read", str(connections), str(slow), str(seconds), *contestant.targets]
    writing = [stage.traffic, "write", str(connections), str(seconds), str(chunk), *contestant.sources]
    reader = Process(reading, log)
    try:
        reader.line(_PATIENCE)
        writer = Process(writing, log)
        try:
            writer.line(_PATIENCE, reader)
            yield reader, writer
        finally:
            writer.close()
    finally:
        reader.close()


def stream(
    stage: Stage, contestant: Contestant, *, connections: int, seconds: float, chunk: int, slow: int = 0
) -> Flow:
    """Moves bytes one way for a while, as QEMU moves memory.

    Args:
        stage: Where.
        contestant: Which relays.
        connections: How many for each of the contestant's migrations.
        seconds: How long the writers write.
        chunk: Bytes of each write; 512 or a multiple.
        slow: How many of the readers, the first ones, take 64 KiB each 20 ms for as long.

    Raises:
        BenchError: A byte was lost or altered, or a relay failed.
    """
    with _open(stage, contestant, connections, seconds, chunk, slow) as (reader, writer):
        before = usage(contestant.pids)
        writer.say("go")
        sent = json.loads(writer.line(seconds + _PATIENCE, reader))
        received = json.loads(reader.line(_PATIENCE, writer))
        after = usage(contestant.pids)
        contestant.check()
        writer.finish()
        reader.finish()
    if sent["bytes"] != received["bytes"]:
        raise BenchError(f"{contestant.name}: what arrived is not what was sent: {sent} {received}")
    used = Usage(after.cpu - before.cpu, after.switches - before.switches, after.rss, after.threads, after.files)
    return Flow(received["ended"] - sent["began"], received["bytes"], received["within"], used)


def idle(stage: Stage, migproxy: Migproxy, connections: int) -> dict[str, Usage]:
    """Opens connections that carry nothing, and returns what daemons and relays hold then (see `Migproxy.parts`)."""
    with _open(stage, migproxy, connections, 0, RPC * 8, 0) as (reader, writer):
        used = {part: usage(pids) for part, pids in migproxy.parts.items()}
        writer.finish()
        reader.finish()
    return used


@contextmanager
def _echo(stage: Stage, contestant: Contestant) -> Iterator[None]:
    echo = Process([stage.traffic, "echo", contestant.targets[0]], stage.folder / "echo.log")
    try:
        echo.line(_PATIENCE)
        yield
        echo.finish()
    finally:
        echo.close()


def _ask(stage: Stage, *words: str) -> dict[str, Any]:
    log = stage.folder / "traffic.log"
    log.unlink(missing_ok=True)
    process = Process([stage.traffic, *words], log)
    try:
        answer: dict[str, Any] = json.loads(process.line(_PATIENCE))
        process.finish()
    finally:
        process.close()
    return answer


def probe(stage: Stage, contestant: Contestant) -> None:
    """Waits until a message comes back through the relays.

    Raises:
        BenchError: None does.
    """
    deadline = time.monotonic() + 10
    with _echo(stage, contestant):
        while True:
            try:
                _ask(stage, "ping", "1", str(RPC), contestant.sources[0])
            except BenchError as error:
                contestant.check()
                if time.monotonic() > deadline:
                    raise BenchError(f"{contestant.name} relays nothing: {error}") from error
                time.sleep(0.1)
            else:
                return


def round_trip(stage: Stage, contestant: Contestant, *, count: int) -> tuple[float, float]:
    """Returns the median and the 99th percentile, in seconds, of messages of 64 bytes there and back."""
    with _echo(stage, contestant):
        answer = _ask(stage, "ping", str(count), str(RPC), contestant.sources[0])
    contestant.check()
    return answer["p50"], answer["p99"]


def setup(stage: Stage, contestant: Contestant, *, seconds: float, parallel: int) -> tuple[float, float]:
    """Opens and closes connections, with a message there and back on each, several at a time.

    Returns:
        Connections per second, and the relays' seconds of CPU time for each.
    """
    with _echo(stage, contestant):
        before = usage(contestant.pids).cpu
        answer = _ask(stage, "setup", str(seconds), str(parallel), contestant.sources[0])
        cpu = usage(contestant.pids).cpu - before
    contestant.check()
    count = max(answer["connections"], 1)
    return count / answer["seconds"], cpu / count


def listening(migproxy: Migproxy, uid: str) -> tuple[float, float]:
    """Lets a VMI migrate, and takes the time from its file's appearance.

    Returns:
        Seconds until the target listened and had published its ports, and until the source listened too.
    """
    began = time.monotonic()
    path = migproxy.add(uid)
    source = Path(migproxy.sources[-1])
    until(lambda: "targetNodeAddress" in path.read_text(), f"{uid} to be published", _PATIENCE, 0.0002)
    published = time.monotonic() - began
    until(source.is_socket, f"{source}", _PATIENCE, 0.0002)
    both = time.monotonic() - began
    path.unlink()
    del migproxy.sources[-1], migproxy.targets[-1]
    until(lambda: not source.exists(), f"{source} to be removed", _PATIENCE)
    return published, both


def equal_share(amounts: Sequence[int]) -> float:
    """The least amount in equal shares of them all: 1 is perfectly fair, 0 is starvation."""
    return min(amounts) * len(amounts) / max(sum(amounts), 1)
