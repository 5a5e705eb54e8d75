"""`migproxy bench` with everything real, and short: judged by what no busy machine changes.

Bytes arrive unaltered, or the benchmark fails; what a relay does for each GiB is counted, not timed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migproxy.bench.contestants import MIGPROXY, Migproxy
from migproxy.bench.measure import Flow, probe, stream
from migproxy.bench.stage import VETH, Stage, until

pytestmark = pytest.mark.tier("gate")

SECONDS = 600

# Of both relays together. The limit's, on an idle machine and on an overloaded one: 8,000 to 16,000 switches, 18,500
# calls. A relay that wakes up for each packet of 64 KiB has 33,000 and 65,000; one that copies has twice the calls.
MOST_SWITCHES = 30_000
MOST_CALLS = 30_000

LOSES_A_BLOCK = """
import socket, sys, threading
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()

def pump(source, target, losing):
    while data := source.recv(4096):
        if losing and len(data) == 4096:
            data, losing = data[512:], False
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)

while True:
    near, _ = listener.accept()
    try:
        far = socket.create_connection((sys.argv[2], int(sys.argv[3])))
    except OSError:
        near.close()
        continue
    threading.Thread(target=pump, args=(near, far, True), daemon=True).start()
    threading.Thread(target=pump, args=(far, near, False), daemon=True).start()
"""


async def bench(*options: str, path: str = os.environ["PATH"]) -> tuple[int, str]:
    """Runs it as a user does, in a sandbox of its own making; returns its exit status and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "MIGPROXY_SANDBOX"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "migproxy", "bench", *options),
        env=environment | {"PATH": path},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    print(out.decode())
    return process.returncode, out.decode()


def medians(results: dict[str, Any], kind: str, contestant: str = MIGPROXY) -> list[dict[str, float]]:
    return [
        found["median"]
        for found in results["measurements"]
        if (found["kind"], found["contestant"]) == (kind, contestant)
    ]


@pytest.mark.tier("soak")
@pytest.mark.alone
async def test_a_short_run_moves_every_byte_with_few_wake_ups_and_little_memory(tmp_path: Path) -> None:
    table, chart = tmp_path / "results.json", tmp_path / "chart.svg"
    options = ["--quick", "--rounds", "1", "--growth", "5", "--json", str(table), "--chart", str(chart)]
    status, _ = await bench(*options)
    results = json.loads(table.read_text())
    assert (status, results["failures"]) == (0, {})
    assert {"limit", MIGPROXY, "socat", "haproxy", "nginx"} <= {one["contestant"] for one in results["measurements"]}
    assert chart.read_text().startswith("<svg")
    streams = medians(results, "stream")
    assert len(streams) == 4
    for one in streams:
        assert one["switches_per_gib"] < MOST_SWITCHES
    for kind in ("round trip", "set-up", "listen"):
        assert medians(results, kind), kind
    growth = {row["what"]: row["value"] for row in results["growth"]}
    for what in ("an idle daemon", "a daemon with 100 connections"):
        assert growth[f"RSS of {what}"] < 80
    assert growth["RSS of an idle relay"] < 30
    assert growth["RSS of a relay with 100 connections"] < 60
    assert growth["threads for each open connection"] == 2
    assert growth["descriptors for each open connection"] == 16  # daemon and relay hold the same eight
    assert growth["RSS for the slow reader"] < 8


async def test_a_relay_that_loses_a_block_is_found_out_and_the_others_go_on(tmp_path: Path) -> None:
    program, table = tmp_path / "loses.py", tmp_path / "results.json"
    program.write_text(LOSES_A_BLOCK)
    status, printed = await bench(
        *("--rounds", "2", "--seconds", "0.1", "--connections", "1", "--size", "131072", "--network", "veth"),
        *("--congestion", "cubic", "--growth", "0", "--contestants", "limit", "--json", str(table)),
        *("--source-command", f"loses={sys.executable} {program} {{source}} {{address}} {{port}}"),
        *("--target-command", "loses=socat TCP-LISTEN:{port},bind={address},fork,reuseaddr UNIX-CONNECT:{target}"),
    )
    results = json.loads(table.read_text())
    assert status == 3
    assert "loses FAILED: stream, veth" in printed
    assert "has the stamp" in printed
    assert len(results["measurements"][0]["rounds"]["rate"]) == 2


async def test_without_namespaces_it_runs_over_loopback_and_says_so(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cc", "as", "ld"):
        found = shutil.which(tool)
        assert found, f"{tool} is not installed: scripts/system-packages bench"
        (tools / tool).symlink_to(found)
    options = ["--quick", "--rounds", "1", "--growth", "0", "--contestants", "limit,migproxy"]
    status, printed = await bench(*options, path=str(tools))
    assert status == 0
    assert "no namespaces (unshare (util-linux) or ip (iproute2) is not installed)" in printed
    assert "stream, loopback, system congestion control, 8 connections" in printed


async def test_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    status, printed = await bench("--quick", path=str(tmp_path))
    assert status == 1
    assert "there is no C compiler: install gcc" in printed


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage(sandboxed=True) as made:
        yield made


@pytest.mark.tier("soak")
@pytest.mark.alone
@pytest.mark.parametrize("connections", [1, 8])
def test_system_calls_for_each_gibibyte_are_the_limits(stage: Stage, tmp_path: Path, connections: int) -> None:
    """Two splices for hundreds of KiB in each relay, and hardly a call besides."""
    with Migproxy(stage, stage.networks[VETH]) as daemons:
        probe(stage, daemons)
        flow, calls = traced(stage, daemons, connections, tmp_path / "calls")
    print(f"{connections} connections, {flow.gib:.2f} GiB: {calls}")
    assert calls["splice"] / flow.gib < MOST_CALLS
    waiting = calls.pop("futex", 0)  # for Python's lock: another thread of the daemon had it
    assert sum(calls.values()) - calls["splice"] < 0.02 * calls["splice"] + 250 * connections
    assert waiting < (0.05 if connections == 1 else 20) * calls["splice"] + 250


def traced(stage: Stage, daemons: Migproxy, connections: int, log: Path) -> tuple[Flow, dict[str, int]]:
    """Streams for a second with both daemons' system calls counted."""
    assert shutil.which("strace"), "strace is not installed: scripts/system-packages bench"
    attach = [word for pid in daemons.pids for word in ("-p", str(pid))]
    with subprocess.Popen(["strace", "-q", "-q", "-f", "-c", "-U", "calls,name", "-o", str(log), *attach]) as tracer:
        try:
            until(lambda: all(_is_traced(pid) for pid in daemons.pids), "strace to attach")
            flow = stream(stage, daemons, connections=connections, seconds=1, chunk=128 << 10)
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(30)
    rows = [line.split() for line in log.read_text().splitlines()]
    return flow, {row[1]: int(row[0]) for row in rows if len(row) == 2 and row[0].isdecimal() and row[1] != "total"}


def _is_traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line for line in status.splitlines() if line.startswith("TracerPid")).split()[1] != "0"
