"""The annotation that announces where a target listens."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migproxy.announcement import Announcement, parse_announcement
from migproxy.portmap import Channel, PortMap

pytestmark = pytest.mark.tier("gate")

PORTS = st.dictionaries(st.sampled_from(Channel), st.integers(1, 65535), min_size=1).filter(
    lambda ports: len(set(ports.values())) == len(ports)
)


def test_it_is_what_the_admission_policy_reads() -> None:
    ports = PortMap.of({Channel.LIBVIRT: 32899, Channel.DIRECT: 42691})
    assert str(Announcement("uid", ports, ip_address("10.1.1.2"))) == "uid 32899:0,42691:49152 10.1.1.2"


@given(PORTS, st.ip_addresses().filter(lambda address: not (address.is_unspecified or address.is_multicast)))
def test_it_is_read_as_it_was_written(ports: dict[Channel, int], address: object) -> None:
    announcement = Announcement("some-uid", PortMap.of(ports), ip_address(str(address)))
    assert parse_announcement(str(announcement)) == announcement


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", " ", "uid", "uid 1:0", "uid 1:0 10.1.1.2 more", " 1:0 10.1.1.2", "uid 1:0 host"),
        *(
            "uid 1 10.1.1.2",
            "uid 1:0, 10.1.1.2",
            "uid 1:7 10.1.1.2",
            "uid 1:0,2:7 10.1.1.2",
            "uid 0:0 10.1.1.2",
            "uid 1:0:0 10.1.1.2",
        ),
        *("uid 1:0,2:0 10.1.1.2", "uid 1:0,1:49152 10.1.1.2", "uid 1:x 10.1.1.2", "uid 1:0 0.0.0.0"),
    ],
)
def test_nothing_is_guessed(text: str | None) -> None:
    assert parse_announcement(text) is None
