"""Connections that the kernel encrypts survive a storm of SIGKILLs as plain ones do, and stay encrypted by it."""

import pytest

from tests.e2e.machine import run_guest
from tests.e2e.unbreakable import seed

pytestmark = [pytest.mark.tier("soak"), pytest.mark.alone]


def test_kernel_tls_comes_through_a_storm() -> None:
    [result] = run_guest("tests.e2e.unbreakable_guest", variables={"STORM_SEED": str(seed())})
    assert result["kills"] >= 16
    # Two daemons, four connections: each has two ends, and both directions of each end are the kernel's.
    for seen in result["offloaded"]:
        assert seen == {"TlsCurrTxSw": 8, "TlsCurrRxSw": 8}
    assert result["counters"]["TlsDecryptError"] == 0
    for channels in result["channels"]:
        for channel in channels:
            assert channel["bytes_spliced_sent"] == channel["bytes_sent"]
            assert channel["bytes_spliced_received"] == channel["bytes_received"]
    assert result["moved"] == sum(each["sent"] + each["received"] for each in result["expected"].values())
