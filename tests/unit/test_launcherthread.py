"""A launcher's folders may never answer: only who looks into them waits, and not for long."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migproxy.launcher import RunDir, SocketNode
from migproxy.launcherthread import LauncherThread, NoAnswer
from migproxy.proxy import Proxy

pytestmark = pytest.mark.tier("gate")


@pytest.fixture
async def thread() -> AsyncIterator[LauncherThread]:
    made = LauncherThread("launcher of default/vm", 60)
    yield made
    made.close()


@pytest.fixture
def impatient(thread: LauncherThread) -> LauncherThread:
    thread._seconds = 0.05
    return thread


@pytest.fixture
def answer() -> Iterator[threading.Event]:
    """Lets what hangs go on."""
    event = threading.Event()
    yield event
    event.set()


async def carried_out(queue: "SimpleQueue[str]") -> str:
    return await asyncio.to_thread(queue.get, timeout=10)


async def test_calls_are_carried_out_in_order_and_elsewhere(thread: LauncherThread) -> None:
    told: list[int] = []
    await asyncio.gather(*(thread.run(lambda number=number: told.append(number)) for number in range(20)))  # type: ignore[misc]
    assert told == list(range(20))
    assert await thread.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 / 0)


async def test_what_hangs_is_an_error_that_names_the_launcher_and_the_remedy(
    impatient: LauncherThread, answer: threading.Event
) -> None:
    with pytest.raises(NoAnswer, match=r"launcher of default/vm: its folders have not answered.*end the pod"):
        await impatient.run(answer.wait)
    impatient._seconds = 0.001
    with pytest.raises(NoAnswer, match="not answered"):
        await impatient.run(lambda: "never")
    assert impatient._queue.empty(), "it is known to hang: nobody waits for it again"


async def test_what_was_asked_for_meanwhile_is_not_done_when_it_answers_again(
    impatient: LauncherThread, answer: threading.Event
) -> None:
    done: SimpleQueue[str] = SimpleQueue()
    waiting = [asyncio.create_task(impatient.run(call)) for call in (answer.wait, lambda: done.put("nobody waits"))]
    told = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in told] == [NoAnswer, NoAnswer]
    impatient.later(lambda: done.put("later"))
    impatient._seconds = 60
    answer.set()
    assert await carried_out(done) == "later"
    assert await impatient.run(lambda: "well again") == "well again"


@pytest.mark.parametrize("why", ["hung", "cancelled", "cancelled in the very moment of its end"])
async def test_what_nobody_waits_for_any_more_is_let_go_of(
    thread: LauncherThread, answer: threading.Event, why: str
) -> None:
    gone: SimpleQueue[str] = SimpleQueue()
    began = threading.Event()

    def opens() -> str:
        began.set()
        answer.wait()
        return "opened"

    if why == "hung":
        thread._seconds = 0.05
    task = asyncio.create_task(thread.run(opens, gone.put))
    if why == "hung":
        with pytest.raises(NoAnswer):
            await task
        answer.set()
    else:
        await asyncio.to_thread(began.wait)
        if why != "cancelled":
            answer.set()
            ended = threading.Event()
            thread.later(ended.set)
            ended.wait()  # blocks the loop: the result is there, and nobody has it yet
        task.cancel()
        answer.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await carried_out(gone) == "opened"


async def test_what_somebody_has_got_is_theirs(thread: LauncherThread) -> None:
    gone: SimpleQueue[str] = SimpleQueue()
    assert await thread.run(lambda: "opened", gone.put) == "opened"
    await thread.run(lambda: None)
    assert gone.empty()


async def test_its_end_waits_for_nothing_that_hangs(answer: threading.Event) -> None:
    before = threading.enumerate()  # of other tests, some may be about to end
    thread = LauncherThread("launcher of default/vm", 0.05)
    with pytest.raises(NoAnswer):
        await thread.run(answer.wait)
    thread.close()
    (hanging,) = [one for one in threading.enumerate() if one.name == "launcher" and one not in before]
    assert hanging.daemon, "the interpreter would wait for it"
    answer.set()
    await asyncio.to_thread(hanging.join, 10)
    assert not hanging.is_alive()


async def test_socket_that_was_found_is_let_go_of_where_it_hangs_before_the_connection(
    thread: LauncherThread, answer: threading.Event, tmp_path: Path
) -> None:
    found: list[SocketNode] = []

    def find() -> SocketNode:
        with RunDir(str(tmp_path), "") as run:
            found.append(run.find("x.sock"))
        return found[0]

    @asynccontextmanager
    async def stored(sock: socket.socket, _: object) -> AsyncIterator[socket.socket]:
        thread.later(answer.wait)
        thread._seconds = 0.05
        with sock:
            yield sock

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x.sock"))
        proxy = cast(Any, SimpleNamespace(thread=thread, stored=stored))
        with pytest.raises(NoAnswer):
            await Proxy.connect_launcher(proxy, find, cast(Any, None))
    thread._seconds = 60
    answer.set()
    while found[0].is_open:
        await asyncio.sleep(0.001)
