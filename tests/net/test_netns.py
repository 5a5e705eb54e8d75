"""Sockets in another process's network namespace, and following that process from one namespace to the next."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from migproxy.lifeline import Lifeline
from migproxy.netif import AddressWatcher
from migproxy.netns import NamespaceError, network_namespace
from migproxy.settings import Settings
from migproxy.sockets import TCPOptions, listen_tcp
from tests.net.test_netif import Follower
from tests.unit.test_doctor import api_server

pytestmark = pytest.mark.tier("gate")

NAME = "stand-in"
_CALLED = """
import ctypes, signal, sys
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)
print(flush=True)
signal.pause()
"""


def names_of_processes() -> set[str]:
    """Of all that this machine runs."""
    names = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it may end meanwhile
                names.add((entry / "comm").read_text().strip())
    return names


@contextmanager
def process(
    *addresses: str, name: str = NAME, unshare: tuple[str, ...] = ("--net",), pod_ip: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of that name in namespaces of its own, with these addresses on migration0."""
    environment = {**os.environ, **({"MY_POD_IP": pod_ip} if pod_ip else {})}
    command = ["unshare", *unshare, sys.executable, "-c", _CALLED, name]
    made = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    try:
        assert made.stdout
        made.stdout.readline()
        enter = ["nsenter", "-t", str(made.pid), "--net", "ip"]
        subprocess.run([*enter, "link", "set", "lo", "up"], check=True)
        if addresses:
            subprocess.run([*enter, "link", "add", "migration0", "up", "type", "veth", "peer", "peer0"], check=True)
            subprocess.run([*enter, "link", "set", "peer0", "up"], check=True)
        for address in addresses:
            subprocess.run([*enter, "address", "add", address, "dev", "migration0"], check=True)
        yield made
    finally:
        made.send_signal(signal.SIGKILL)
        made.wait()
        assert made.stdout
        made.stdout.close()


def test_listeners_are_in_the_processs_namespace_and_this_one_stays_where_it_was() -> None:
    before = os.stat("/proc/thread-self/ns/net").st_ino
    with process("10.7.0.1/24") as other:
        namespace = network_namespace(f"process:{NAME}")
        namespace.enter()
        with closing(listen_tcp(ip_address("10.7.0.1"), 0, TCPOptions(namespace=namespace))) as listener:
            shown = subprocess.run(
                ["nsenter", "-t", str(other.pid), "--net", "ss", "-Hltn"], check=True, capture_output=True, text=True
            )
            assert f"10.7.0.1:{listener.getsockname()[1]}" in shown.stdout
            with closing(namespace.make_socket(socket.AF_INET, socket.SOCK_STREAM)) as near:
                near.connect(listener.getsockname())
        assert os.stat("/proc/thread-self/ns/net").st_ino == before
        with pytest.raises(OSError, match="Cannot assign requested address"):
            listen_tcp(ip_address("10.7.0.1"), 0, TCPOptions())


def test_namespace_may_be_named_by_its_path() -> None:
    with process("10.7.0.1/24") as other:
        namespace = network_namespace(f"/proc/{other.pid}/ns/net")
        namespace.enter()
        listen_tcp(ip_address("10.7.0.1"), 0, TCPOptions(namespace=namespace)).close()
        assert not namespace.has_moved()
    assert namespace.has_moved()


async def test_address_follows_the_process_into_its_next_namespace() -> None:
    follower = Follower(AddressWatcher("migration0", namespace=network_namespace(f"process:{NAME}")))
    await follower.until(problem=f"no process called {NAME}")
    with process("10.7.0.1/24"):
        first = await follower.until("10.7.0.1")
    await follower.until("10.7.0.1", problem=f"no process called {NAME}")
    with process("10.7.0.1/24"):
        second = await follower.until("10.7.0.1")
        assert second.namespace != first.namespace
    await follower.states.aclose()


async def test_without_a_migration_interface_it_is_the_processs_pod_ip() -> None:
    with process(pod_ip="127.0.0.7"):
        namespace = network_namespace(f"process:{NAME}")
        follower = Follower(AddressWatcher("migration0", pod_ip=ip_address("192.0.2.1"), namespace=namespace))
        await follower.until("127.0.0.7")
        await follower.states.aclose()


def test_process_in_a_pods_own_process_namespace_is_not_trusted() -> None:
    with process("10.7.0.1/24", unshare=("--net", "--pid", "--fork", "--kill-child")):
        assert NAME in names_of_processes()
        with pytest.raises(NamespaceError, match=f"no process called {NAME}"):
            network_namespace(f"process:{NAME}").enter()


def test_process_that_ends_while_it_is_looked_at_is_no_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    stat = os.stat

    def ends_then(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(f"{other.pid}/ns/net"):
            looked.append(path)
            if len(looked) > 1:
                raise FileNotFoundError(path)
        return stat(path, **options)

    with process("10.7.0.1/24") as other:
        monkeypatch.setattr("os.stat", ends_then)
        namespace = network_namespace(f"process:{NAME}")
        namespace.enter()
        assert namespace.has_moved()


def test_two_processes_in_two_namespaces_are_told() -> None:
    with process("10.7.0.1/24"), process("10.7.0.2/24"), pytest.raises(NamespaceError, match="several processes"):
        network_namespace(f"process:{NAME}").enter()


def test_before_it_is_found_no_socket_is_made_anywhere() -> None:
    with pytest.raises(NamespaceError, match="not been found yet"):
        network_namespace("/nowhere").make_socket(socket.AF_INET, socket.SOCK_STREAM)
    with pytest.raises(NamespaceError, match="No such file"):
        network_namespace("/nowhere").enter()


def doctor(*options: str) -> dict[str, tuple[str, str]]:
    """What `migproxy doctor` finds, level and words by what it looked at."""
    command = [sys.executable, "-m", "migproxy", "doctor", "--json", "--disable-tls", *options]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    findings = json.loads(shown.stdout)["findings"]
    return {one["check"]: (one["level"], one["finding"]) for one in findings}


def test_doctor_looks_at_the_migration_network_of_the_other_namespace() -> None:
    with process("10.7.0.1/24"):
        found = doctor("--netns", f"process:{NAME}", "--port-range", "40000-40009")
    assert found["network namespace"] == ("ok", f"process:{NAME}")
    assert found["migration address"] == ("ok", "10.7.0.1 (interface migration0)")
    assert found["port range"][0] == "ok"
    assert doctor()["migration address"][0] == "fail"


def test_doctor_says_that_there_is_no_such_process() -> None:
    level, words = doctor("--netns", "process:nobody")["network namespace"]
    assert level == "fail"
    assert "no process called nobody" in words


def test_doctor_beside_virt_handler_looks_for_the_failsafe(tmp_path: Path) -> None:
    control = str(tmp_path / "control.sock")
    beside = ("--beside-virt-handler", "--control-socket", control)
    assert doctor(*beside)["failsafe"][0] == "warn"
    assert not list(tmp_path.iterdir()), "looking changes nothing"
    with closing(Lifeline(Settings(control_socket=control).failsafe_lock)) as failsafe, failsafe.taken():
        assert doctor(*beside)["failsafe"][0] == "ok"


def test_doctor_asks_the_api_server_from_where_the_daemon_does(tmp_path: Path) -> None:
    with process("10.7.0.1/24"), api_server(tmp_path) as config:
        found = doctor("--netns", f"process:{NAME}", "--kubeconfig", config)
    assert found["API server"][0] == "ok"
    assert found["migration address"][0] == "ok"
