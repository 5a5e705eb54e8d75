"""Kernel TLS, in a virtual machine with a kernel that has it: what is offloaded, what is spliced, what it costs.

The machine is emulated by software and counts instructions (QEMU's -icount): its CPU time is the same in every run.
Its root is this machine's, read-only.
"""

from typing import Any

import pytest

from tests.e2e.machine import run_guest

pytestmark = [pytest.mark.tier("soak"), pytest.mark.alone]

CONNECTIONS = 8
GIB = 1 << 30


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What the virtual machine found, by mode: "on", "off", and "auto" with TLS 1.3 alone."""
    found = run_guest("tests.e2e.ktls_guest", "-icount shift=0,sleep=on")
    assert len(found) == 3
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


def test_kernel_tls_takes_fewer_instructions(results: dict[str, dict[str, Any]]) -> None:
    """How many fewer is a matter of how OpenSSL and the kernel encrypt: OpenSSL 3.5 needs fewer than 3.0."""
    kernel_tls, user_space = (instructions_per_gib(results[mode]) for mode in ("on", "off"))
    print(f"billions of instructions per GiB: kernel TLS {kernel_tls:.1f}, user space {user_space:.1f}")
    assert kernel_tls < user_space
