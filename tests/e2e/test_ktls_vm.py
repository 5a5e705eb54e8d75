"""Kernel TLS, in a virtual machine with a kernel that has it: what is offloaded, what is spliced, what it costs.

The machine is emulated by software and counts instructions (QEMU's -icount): its CPU time is the same in every run.
Its root is this machine's, read-only.
"""

from typing import Any

import pytest

from tests.e2e.ktls_guest import MODES, Mode
from tests.e2e.machine import run_guest

pytestmark = [pytest.mark.tier("soak"), pytest.mark.alone]

CONNECTIONS = 8
GIB = 1 << 30


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What the virtual machine found, by mode."""
    found = run_guest("tests.e2e.ktls_guest", "-icount shift=0,sleep=on")
    by_mode = {result["mode"]: result for result in found}
    assert by_mode.keys() == {mode.name for mode in MODES}
    return by_mode


def instructions_per_gib(result: dict[str, Any]) -> float:
    """Of both daemons together, in billions: what the large transfer took more than the small one."""
    (small, large), (some, more) = result["bytes"], result["cpu_seconds"]
    return float((more - some) / (large - small) * GIB)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_streams_cross_in_the_kernel_where_it_is_to_encrypt(results: dict[str, dict[str, Any]], mode: Mode) -> None:
    """The streams are hashed in the machine; the kernel counts its own, and the channels what never left it."""
    result = results[mode.name]
    ends = [mode.source == "on", mode.target == "on"]
    for counter in ("TlsTxSw", "TlsRxSw"):
        assert result["total"][counter] >= sum(ends) * CONNECTIONS
        assert bool(result["total"][counter]) == any(ends)
    assert result["total"]["TlsDecryptError"] == 0
    assert [report["ktls"] for report in result["tls"]] == ["on" if end else "off" for end in ends]
    assert all(report["errors"] == {} for report in result["tls"])
    for channels, securities, end in zip(result["channels"], result["security"], ends, strict=True):
        (security,) = securities
        assert security.startswith(f"TLSv{mode.version} ")
        assert ("CHACHA20" in security) == bool(mode.ciphers)
        for channel in channels:
            for way in ("sent", "received"):
                assert channel[f"bytes_spliced_{way}"] == (channel[f"bytes_{way}"] if end else 0)


def test_kernel_tls_takes_fewer_instructions(results: dict[str, dict[str, Any]]) -> None:
    kernel_tls, user_space = (instructions_per_gib(results[mode]) for mode in ("kernel", "user space"))
    print(f"billions of instructions per GiB: kernel TLS {kernel_tls:.1f}, user space {user_space:.1f}")
    assert kernel_tls < user_space
