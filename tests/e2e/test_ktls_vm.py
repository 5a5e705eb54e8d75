"""Kernel TLS, in a virtual machine with a kernel that has it: what is offloaded, what is spliced, what it costs.

The machine is emulated by software and counts instructions (QEMU's -icount): its CPU time is the same in every run.
Its root is this machine's, read-only.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE = 900.0
CONNECTIONS = 8
GIB = 1 << 30


def kernel() -> Path:
    """The newest installed kernel with a module for TLS."""
    for image in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        release = image.name.partition("-")[2]
        if list(Path(f"/lib/modules/{release}/kernel/net/tls").glob("tls.ko*")):
            return image
    pytest.skip("no kernel with TLS in /boot: apt-get install linux-image-amd64 (scripts/system-packages lab does)")


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What the virtual machine found, by mode: "on", "off", and "auto" with TLS 1.3 alone."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no qemu-system-x86_64: scripts/system-packages lab installs it")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    vng = shutil.which("vng", path=path)
    assert vng, "virtme-ng is among the locked packages: run make venv"
    command = [vng, "--disable-kvm", "--run", str(kernel()), "--memory", "1G", "--cpus", "1", "--cwd", str(ROOT)]
    command += ["--qemu-opts=-icount shift=0,sleep=on", "--", f"{sys.executable} -m tests.e2e.ktls_guest"]
    text = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": path},
        timeout=DEADLINE,
        text=True,
        errors="replace",
        check=False,
    ).stdout
    found = [json.loads(line.partition("RESULT")[2]) for line in text.splitlines() if "RESULT" in line]
    assert len(found) == 3, text[-5000:]
    return {result["mode"]["ktls"]: result for result in found}


def spliced(result: dict[str, Any], way: str) -> list[float]:
    """The share of the bytes of one direction that never left the kernel, by daemon and channel."""
    return [
        channel[f"bytes_spliced_{way}"] / channel[f"bytes_{way}"]
        for channels in result["channels"]
        for channel in channels
    ]


def instructions_per_gib(result: dict[str, Any]) -> float:
    """Of both daemons together, in billions: what the large transfer took more than the small one."""
    (small, large), (some, more) = result["bytes"], result["cpu_seconds"]
    return float((more - some) / (large - small) * GIB)


def test_both_directions_go_to_the_kernel_and_are_spliced(results: dict[str, dict[str, Any]]) -> None:
    result = results["on"]
    for counter in ("TlsCurrTxSw", "TlsCurrRxSw"):
        assert result["open"][counter] > 0
    for counter in ("TlsTxSw", "TlsRxSw"):  # both ends of each connection, and those that tried it out
        assert result["total"][counter] >= 2 * 2 * CONNECTIONS
    assert result["total"]["TlsDecryptError"] == 0
    assert {report["ktls"] for report in result["tls"]} == {"on"}
    assert set(spliced(result, "sent") + spliced(result, "received")) == {1.0}
    assert all(report["errors"] == {} for report in result["tls"])


def test_off_leaves_the_kernel_alone(results: dict[str, dict[str, Any]]) -> None:
    result = results["off"]
    assert set(result["total"].values()) == {0}
    assert set(spliced(result, "sent") + spliced(result, "received")) == {0.0}


def test_a_direction_that_is_not_offloaded_runs_in_user_space(results: dict[str, dict[str, Any]]) -> None:
    result = results["auto"]
    receives = result["total"]["TlsRxSw"] > 0  # OpenSSL 3.2 and newer
    assert result["total"]["TlsTxSw"] >= 2 * 2 * CONNECTIONS
    assert set(spliced(result, "sent")) == {1.0}
    assert set(spliced(result, "received")) == {1.0 if receives else 0.0}
    assert all(report["errors"] == {} for report in result["tls"])


def test_kernel_tls_takes_at_most_half_the_instructions(results: dict[str, dict[str, Any]]) -> None:
    kernel_tls, user_space = (instructions_per_gib(results[mode]) for mode in ("on", "off"))
    print(f"billions of instructions per GiB: kernel TLS {kernel_tls:.1f}, user space {user_space:.1f}")
    assert kernel_tls <= user_space / 2
