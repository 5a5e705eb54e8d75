"""What a start loads: a library that nobody uses yet would make each start of a daemon longer, and so each crash.

`benchmarks.start` has the figures.
"""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migproxy.devcerts import make

pytestmark = pytest.mark.tier("gate")

UNUSED = (
    "aiohttp",
    "http.server",
    "kubernetes_asyncio",
    "prometheus_client.exposition",
    "pyroute2.conntrack",
    "pyroute2.iproute",
    "pyroute2.ndb",
    "rich.console",
    "yaml",
)


@contextmanager
def ready_daemon(folder: Path, *options: str) -> Iterator[Path]:
    """A daemon that has said that it is ready; its log, in which Python tells what it imports too."""
    vmis, log = folder / "vmis", folder / "log"
    vmis.mkdir()
    command = [sys.executable, "-X", "importtime", "-m", "migproxy", "run", "--migration-address", "127.0.0.1"]
    command += ["--vmi-dir", str(vmis), "--control-socket", str(folder / "control"), "--log-format", "json", *options]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, log.open("wb") as errors:
        manager.bind(str(folder / "notify"))
        manager.settimeout(60)
        environment = os.environ | {"NOTIFY_SOCKET": str(folder / "notify")}
        with subprocess.Popen(command, stderr=errors, env=environment) as daemon:
            try:
                while b"READY=1" not in manager.recv(4096):
                    pass
                yield log
            finally:
                daemon.kill()


def loaded(log: Path) -> set[str]:
    """Those of UNUSED that have been imported."""
    modules = [line.rpartition("|")[2].strip() for line in log.read_text().splitlines() if "|" in line]
    assert "migproxy.daemon" in modules
    return {name for name in UNUSED if any(f"{module}.".startswith(f"{name}.") for module in modules)}


def test_a_daemon_is_ready_without_what_it_does_not_use_and_answers_http_all_the_same(tmp_path: Path) -> None:
    make(str(tmp_path / "certs"), 1)
    with ready_daemon(tmp_path, "--tls-dir", str(tmp_path / "certs"), "--http-listen", "127.0.0.1:0") as log:
        assert loaded(log) == set()
        (serving,) = [json.loads(line) for line in log.read_text().splitlines() if '"serving HTTP"' in line]
        with urllib.request.urlopen(f"{serving['url']}metrics", timeout=60) as answer:
            assert "migproxy_node_ready 1.0" in answer.read().decode()
        assert "prometheus_client.exposition" in loaded(log)


def test_a_library_of_which_a_part_is_loaded_can_be_imported_as_a_whole() -> None:
    program = (
        "import migproxy.logs, migproxy.measure, migproxy.netif, rich.console;"
        "from prometheus_client import Counter, start_http_server;"
        "from pyroute2 import NDB; from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg;"
        "assert Counter is migproxy.measure.Counter and ifaddrmsg is migproxy.netif.ifaddrmsg"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
