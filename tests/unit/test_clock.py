"""Time in the product comes from the event loop, and can be simulated."""

import ast
import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import migproxy
from tests.clock import Clock, eventually

pytestmark = [pytest.mark.tier("gate"), pytest.mark.simulated_time]

REAL = ("monotonic", "monotonic_ns", "perf_counter", "sleep", "time")
TOOLS = ("bench", "doctor", "top")
RELAY = ("relay.carrier", "relay.process", "relay.worker", "relay.workers")
"""Processes without asyncio's loop, and threads."""

REASONS = {
    "connection.Connection.__init__": "a duration that is measured",
    "connection.RelayedConnection._look_at_window": "a duration that is measured",
    "connection.RelayedConnection._receive_sample": "a duration that is measured",
    "connection.RelayedConnection._send_sample": "a duration that is measured",
    "failsafe._Acting.begin": "runs in a thread",
    "failsafe._Acting._watch": "a signal of the kernel's",
    "inventory.files._locked": "runs in a thread",
    "inventory.files.FileInventory._refresh": "a time of day, for people",
    "kube.reflector.Reflector._list": "a time of day, for people",
    "kube.reflector.Reflector._watch": "a time of day, for people",
    "liveness.Liveness.__init__": "the clock that it has without another",
    "node.Node.forget": "a duration that is measured",
    "proxy.Proxy.__init__": "a rate that is measured",
    "proxy.Proxy._begin": "a time of day, for people",
    "proxy.Proxy._reach": "a duration that is measured",
    "proxy.Proxy._relay": "a duration that is measured",
    "proxy.Proxy._secure": "a duration that is measured",
    "proxy.Proxy.close": "a duration that is measured",
    "proxy.Proxy.rate": "a rate that is measured",
    "proxy.Proxy.sample": "a rate that is measured",
    "retention.Retention.__init__": "the clock that it has without another",
    "traffic.Progress": "a time of day, for people",
    "rows.summary": "a duration that is measured",
    "rows.traffic": "a duration that is measured",
}
"""Where the daemon asks for another time than its event loop's, and why it may."""


def uses(tree: ast.AST, name: str) -> Iterator[str]:
    """The functions and classes in which real time is asked for, by their full names."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="time"), attr=attribute) if attribute in REAL:
                yield name
            case ast.ImportFrom(module="time"):
                yield name
            case ast.FunctionDef(name=inner) | ast.AsyncFunctionDef(name=inner) | ast.ClassDef(name=inner):
                yield from uses(node, f"{name}.{inner}")
                continue
        yield from uses(node, name)


def test_the_daemons_patience_is_the_event_loops() -> None:
    found = set()
    root = Path(migproxy.__file__).parent
    for path in root.rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        if module.split(".")[0] not in TOOLS and module not in RELAY:
            found |= set(uses(ast.parse(path.read_text()), module))
    assert found == REASONS.keys()


async def test_a_day_is_over_at_once_and_is_exact(clock: Clock) -> None:
    assert clock() == 0
    await asyncio.gather(asyncio.sleep(86400), asyncio.sleep(0.25))
    assert clock() == 86400


async def test_a_time_out_is_exact(clock: Clock) -> None:
    async def tick() -> None:
        while True:
            await asyncio.sleep(0.3)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(tick(), 10)
    assert clock() == 10


async def test_pauses_add_up_and_whoever_waits_until_a_moment_gets_there(clock: Clock) -> None:
    loop = asyncio.get_running_loop()
    for number in range(1, 101):
        due = loop.time() + 0.01 / number
        woken = asyncio.Event()
        while loop.time() < due:
            woken.clear()
            loop.call_at(due, woken.set)
            await woken.wait()
        await asyncio.sleep(0.02 - 0.01 / number)
    assert clock() == 2


async def test_time_stands_still_while_an_executor_works(clock: Clock) -> None:
    async with asyncio.timeout(1e-3):
        await asyncio.to_thread(time.sleep, 0.05)
    assert clock() == 0


async def test_time_stands_still_while_another_thread_works() -> None:
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        loop.call_soon_threadsafe(done.set)

    thread = threading.Thread(target=work)
    thread.start()
    async with asyncio.timeout(1e-3):
        await done.wait()
    thread.join()


async def test_time_stands_still_while_bytes_are_on_their_way() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1 << 20))
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server, asyncio.timeout(1e-3):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(bytes(1 << 20))
        assert len(await reader.read(-1)) == 1 << 20
        writer.close()
        await writer.wait_closed()


async def test_time_stands_still_while_threads_hand_bytes_on() -> None:
    ends = [end for _ in range(20) for end in socket.socketpair()]

    def relay(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(1024):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=relay, args=pair) for pair in zip(ends[1:-1:2], ends[2:-1:2], strict=True)]
    for thread in threads:
        thread.start()
    for end in (ends[0], ends[-1]):
        end.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(1e-3):
        for _ in range(200):
            await loop.sock_sendall(ends[0], b"x")
            assert await loop.sock_recv(ends[-1], 10) == b"x"
    ends[0].close()
    assert await loop.sock_recv(ends[-1], 10) == b""
    for thread in threads:
        thread.join()
    for end in ends:
        end.close()


async def test_a_condition_is_met_without_time_going_by(clock: Clock) -> None:
    found: list[float] = []
    asyncio.get_running_loop().call_later(5, found.append, 1)
    await eventually(lambda: bool(found), "the timer")
    assert clock() == 5
    with pytest.raises(AssertionError, match="waited 30 s in vain for a wonder"):
        await eventually(lambda: False, "a wonder")
    assert clock() == 35


@pytest.fixture
async def slept(clock: Clock) -> float:
    await asyncio.sleep(60)
    return clock()


async def test_fixtures_run_on_the_same_clock(slept: float, clock: Clock) -> None:
    assert slept == clock() == 60
