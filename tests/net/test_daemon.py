"""The life of the daemon: starting, refusing to start, draining, ending, and answering `migproxy status`."""

import asyncio
import ctypes
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from demo.lab import MIGPROXY, background, until
from migproxy.portmap import Channel
from tests.net.nodes import Nodes, assert_carries, assert_ends, assert_logged, connect, receive, send

pytestmark = pytest.mark.tier("gate")


def migproxy(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        [*MIGPROXY, *arguments], capture_output=True, text=True, timeout=30, env={**os.environ, **environment}
    )


# Refusing to start


def test_daemon_refuses_to_relay_unprotected_unless_told_to(tmp_path: Path) -> None:
    refused = migproxy("run", "--vmi-dir", str(tmp_path))
    assert refused.returncode == 1
    assert "--disable-tls" in refused.stderr
    assert "mTLS is the default" in refused.stderr


def test_wrong_options_are_all_named_with_where_they_came_from(tmp_path: Path) -> None:
    config = tmp_path / "migproxy.toml"
    config.write_text('vmi-dir = "/somewhere"\npeer-timeout = 0\nmigration-address = "nonsense"\n')
    refused = migproxy("run", "--config", str(config), "--port-range", "9-1", MIGPROXY_DIAL_TIMEOUT="soon")
    assert refused.returncode == 2
    for words in (
        r"--port-range: '9-1': ports go from 1 to 65535",
        r"MIGPROXY_DIAL_TIMEOUT: 'soon': .*number",
        rf"{config}: peer-timeout: 0: .*greater than or equal to 1",
        rf"{config}: migration-address: 'nonsense': .*IP",
    ):
        assert re.search(words, refused.stderr, re.IGNORECASE), words


def test_missing_folder_of_vmis_is_named(tmp_path: Path) -> None:
    control = tmp_path / "control.sock"
    refused = migproxy("run", "--disable-tls", "--vmi-dir", "/nonesuch", "--control-socket", str(control))
    assert refused.returncode == 1
    assert "/nonesuch: No such file or directory" in refused.stderr
    assert not control.exists()


async def test_second_daemon_on_a_control_socket_is_refused_and_the_first_goes_on(nodes: Nodes) -> None:
    await nodes.start()
    async with nodes.undisturbed():
        refused = migproxy(
            *("run", "--disable-tls", "--vmi-dir", str(nodes.vmi_dir)), "--control-socket", str(nodes.source.control)
        )
        assert refused.returncode == 1
        assert f"{nodes.source.control}: another migproxy answers there" in refused.stderr
        assert f"(it is process {nodes.source.pid}: ps -fp {nodes.source.pid})" in refused.stderr
        assert nodes.source.status()["ready"]


async def test_control_socket_of_a_dead_daemon_is_replaced_and_not_open_to_others(nodes: Nodes) -> None:
    await nodes.source.start()
    await nodes.source.stop(signal.SIGKILL)
    assert nodes.source.control.is_socket()

    await nodes.source.start()

    assert nodes.source.control.stat().st_mode & 0o007 == 0
    assert await nodes.source.stop() == 0
    assert not nodes.source.control.exists()


def test_control_socket_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "control.sock"
    file.write_text("precious")
    refused = migproxy("run", "--disable-tls", "--vmi-dir", str(tmp_path), "--control-socket", str(file))
    assert refused.returncode == 1
    assert str(file) in refused.stderr
    assert file.read_text() == "precious"


# Options


async def test_options_come_from_flag_environment_and_file_in_that_order(nodes: Nodes) -> None:
    config = nodes.directory / "migproxy.toml"
    config.write_text('port-range = "48000-48009"\nmax-connections = 7\nlog-level = "warning"\n')
    environment = {"MIGPROXY_CONFIG": str(config), "MIGPROXY_PORT_RANGE": "48010-48019", "MIGPROXY_LOG_LEVEL": "error"}
    await nodes.source.start()
    await nodes.target.start("--log-level", "info", env=environment)
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    assert set(vm.published().values()) <= set(range(48010, 48020))
    assert nodes.target.logged("started")


# Ending


async def test_sighup_reads_the_configuration_again_and_a_wrong_one_changes_nothing(nodes: Nodes) -> None:
    config, source = nodes.directory / "options.toml", nodes.source
    config.write_text("dial-timeout = 5\n")
    await nodes.start(source=("--config", str(config)))
    async with nodes.undisturbed():
        config.write_text('dial-timeout = -1\nport-range = "9-8"\nlog-level = "debug"\n')
        source.signal(signal.SIGHUP)
        await assert_logged(source, "configuration is wrong: the old one stays in force", "dial-timeout", "port-range")
        config.write_text('dial-timeout = 0.5\nnode-name = "other"\nretention = 1\n')
        source.signal(signal.SIGHUP)
        read = await assert_logged(source, "configuration read again")
        assert read["changed"] == ["--dial-timeout", "--retention"], "the node's name is the command line's"
    lonely = nodes.migration("lonely", block=False)
    lonely.begin()
    await lonely.served()
    await nodes.target.stop()
    with connect(lonely.source_path(Channel.DIRECT)):
        await assert_logged(source, "connection failed", "tried for 0.5 s")


async def test_idle_daemon_ends_at_once(nodes: Nodes) -> None:
    await nodes.source.start("--drain-timeout", "600")
    nodes.source.signal(signal.SIGTERM)
    assert await nodes.source.ended(20) == 0


async def test_daemon_with_a_prepared_migration_ends_at_once(nodes: Nodes) -> None:
    drain = ("--drain-timeout", "600")
    await nodes.start(source=drain, target=drain)
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    await until(lambda: vm.report(nodes.target)["state"] == vm.report(nodes.source)["state"] == "prepared", "calm")
    for node in nodes.both:
        node.signal(signal.SIGINT)
        assert await node.ended(20) == 0
    assert os.listdir(vm.folder(nodes.source)) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_drain_waits_for_running_migrations_and_takes_no_new_one(nodes: Nodes, number: signal.Signals) -> None:
    drain = ("--drain-timeout", "600")
    await nodes.start(source=drain, target=drain)
    vm, late = nodes.migration(), nodes.migration("late")
    vm.begin()
    await vm.served()
    vm.start()
    await until(lambda: vm.report(nodes.source)["state"] == vm.report(nodes.target)["state"] == "running", "the start")

    async with vm.connection() as (near, far):
        for node in nodes.both:
            node.signal(number)
            if number is signal.SIGTERM:  # a pod that is deleted, or systemctl stop
                node.relay.signal(number)
            await until(lambda node=node: node.status()["draining"], "the drain")  # type: ignore[misc]
            assert not node.status()["ready"]
            await assert_logged(node, "waiting for a running migration", vm.migration_uid)
        late.begin()
        with vm.edit():
            pass  # the daemons read this after the other one
        await assert_carries(near, far)
        async with vm.connection(Channel.LIBVIRT) as wire:
            await assert_carries(*wire)
        assert late.published() == {}
        assert {late.report(node).get("state") for node in nodes.both} <= {None, "waiting"}, "neither serves it"
        vm.end()
        await assert_ends(near)
    for node in nodes.both:
        assert await node.ended(20) == 0
    assert os.listdir(vm.folder(nodes.source)) == []
    assert late.published() == {}


async def test_drain_timeout_ends_what_still_runs(nodes: Nodes) -> None:
    await nodes.source.start("--drain-timeout", "0.5")
    await nodes.target.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    vm.start()
    async with vm.connection() as (near, far):
        nodes.source.signal(signal.SIGINT)
        await assert_ends(near)
        await assert_ends(far)
        assert await nodes.source.ended(20) == 0
    await assert_logged(nodes.source, "migrations still run: ended now", level="warning")


async def test_second_signal_ends_what_still_runs_at_once(nodes: Nodes) -> None:
    await nodes.source.start("--drain-timeout", "600")
    await nodes.target.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    vm.start()
    async with vm.connection() as (near, far):
        nodes.source.signal(signal.SIGINT)
        await assert_logged(nodes.source, "waiting for a running migration")
        await assert_carries(near, far)
        nodes.source.signal(signal.SIGINT)
        assert await nodes.source.ended(20) == 0
        await assert_ends(near)


# Logs


async def test_log_tells_each_listener_connection_and_end_with_its_migration(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration(block=False)
    vm.begin()
    await vm.served()
    await until(lambda: not any(map(vm.connections, nodes.both)), "the connections to be over")
    vm.end()
    await vm.gone()
    for node, role in zip(nodes.both, ("source", "target"), strict=True):
        identity = {"namespace": "default", "name": "vm", "migration_uid": vm.migration_uid, "role": role}
        for channel in ("libvirt", "direct"):
            for event in ("listening", "connection opened", "connection closed"):
                assert len(node.logged(event, channel=channel, **identity)) == 1
            (closed,) = node.logged("connection closed", channel=channel)
            assert (closed["sent"], closed["received"]) == (64, 64)
            assert 0 <= closed["seconds"] < 10
        (ended,) = node.logged("proxy ended", **identity)
        assert (ended["sent"], ended["received"], ended["connections"], ended["failed"]) == (128, 128, 2, 0)


# `migproxy status`


async def test_status_shows_each_migrations_channels_peers_and_bytes(nodes: Nodes) -> None:
    await nodes.start()
    vm = nodes.migration()
    vm.begin()
    await vm.served()
    vm.start()
    async with vm.connection() as (near, far):
        await assert_carries(near, far)
        await until(lambda: vm.report(nodes.source)["state"] == "running", "the start")
        shown = migproxy("status", "--control-socket", str(nodes.source.control))
        json = migproxy("status", "--json", "--control-socket", str(nodes.source.control))
    assert shown.returncode == json.returncode == 0
    assert "node node01, migration address 127.0.0.1, ready" in shown.stdout
    assert re.search(rf"default/vm {vm.migration_uid[:8]} +source +running", shown.stdout)
    port = vm.published()[Channel.DIRECT]
    assert re.search(rf"direct +1 +2 +0 +128 B +128 B .*-> 127\.0\.0\.2:{port}", shown.stdout)
    assert f'"migration_uid": "{vm.migration_uid}"' in json.stdout


def test_status_without_a_daemon_says_so(tmp_path: Path) -> None:
    asked = migproxy("status", "--control-socket", str(tmp_path / "nobody.sock"))
    assert asked.returncode == 1
    assert f"{tmp_path}/nobody.sock: No such file or directory" in asked.stderr
    assert asked.stdout == ""


async def test_clients_that_say_nothing_do_not_keep_the_daemon_from_answering_or_ending(nodes: Nodes) -> None:
    await nodes.source.start()
    with connect(nodes.source.control), connect(nodes.source.control):
        await until(lambda: nodes.source.status()["ready"], "readiness")
        nodes.source.signal(signal.SIGTERM)
        assert await nodes.source.ended(20) == 0


async def test_daemon_that_cannot_start_leaves_no_control_socket(nodes: Nodes) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(nodes.source.control))
        other.listen()
        await nodes.source.spawn()
        assert await nodes.source.ended(30) == 1
    assert "another migproxy answers there" in nodes.source.log.read_text()
    nodes.source.log.unlink()


SPLICE = {"x86_64": "275", "aarch64": "76"}  # its number as a system call


def splicing(pid: int) -> set[int]:
    """The threads of a process that wait in splice(2)."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it may end meanwhile
            if (task / "syscall").read_text().split()[0] == SPLICE[os.uname().machine]:
                found.add(int(task.name))
    return found


@contextmanager
def stopped(pid: int, threads: set[int]) -> Iterator[None]:
    """These threads of a process stand still while the context lasts, and no other (ptrace(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    seize, interrupt, detach, any_clone = 0x4206, 0x4207, 17, 0x40000000  # linux/ptrace.h, linux/wait.h
    for thread in threads:
        for request in (seize, interrupt):
            assert libc.ptrace(request, thread, None, None) == 0, (
                f"{thread} of {pid}: {os.strerror(ctypes.get_errno())}"
            )
        os.waitpid(thread, any_clone)
    try:
        yield
    finally:
        for thread in threads:
            libc.ptrace(detach, thread, None, None)


@pytest.mark.tier("soak")  # for ten seconds of real time; tests/unit/test_liveness.py has the decisions
async def test_pump_that_is_wedged_starves_the_watchdog_until_it_gets_on(nodes: Nodes) -> None:
    said: list[str] = []

    async def listen() -> None:
        while True:
            said.extend((await asyncio.get_running_loop().sock_recv(manager, 4096)).decode().splitlines())

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(nodes.directory / "manager.sock"))
        manager.setblocking(False)
        async with background(listen()):
            await nodes.source.start(env={"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "4000000"})
            await nodes.target.start()
            vm = nodes.migration(block=False)
            vm.begin()
            await vm.served()
            async with vm.connection() as (near, far):
                await assert_carries(near, far)
                await until(lambda: len(splicing(nodes.source.pid)) == 2, "the two pumps to wait for more")
                with stopped(nodes.source.pid, splicing(nodes.source.pid)):
                    await send(near, b"wedged")
                    await until(
                        lambda: any(one.startswith("STATUS=hangs: ") for one in said), "the manager to hear", 30
                    )
                    (problem,) = {one for one in said if one.startswith("STATUS=hangs: ")}
                    assert "migration default/vm" in problem
                    assert "channel direct" in problem
                    told = said.index(problem)
                    await until(
                        lambda: len(said) > told + 2, "what it says besides"
                    )  # that it is ready, again and again
                    assert "WATCHDOG=1" not in said[told:]
                assert await receive(far, 6) == b"wedged"
                await until(lambda: "WATCHDOG=1" in said[told:], "the watchdog to be fed again")
                await assert_carries(near, far)
