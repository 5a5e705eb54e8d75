"""The annotation that announces where a target listens, and the name of a migration."""

import re
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migproxy.announcement import Announcement, AnnouncementError, parse_announcement, server_name
from migproxy.portmap import Channel, PortMap

pytestmark = pytest.mark.tier("gate")

PORTS = st.dictionaries(st.sampled_from(Channel), st.integers(1, 65535), min_size=1).filter(
    lambda ports: len(set(ports.values())) == len(ports)
)


def test_it_is_what_other_versions_find() -> None:
    ports = PortMap.of({Channel.LIBVIRT: 32899, Channel.DIRECT: 42691})
    assert str(Announcement("uid", ports, ip_address("10.1.1.2"))) == "1 uid 32899:0,42691:49152 10.1.1.2"


@given(PORTS, st.ip_addresses(network="10.0.0.0/8") | st.ip_addresses(network="fd00::/8"))
def test_it_is_read_as_it_was_written(ports: dict[Channel, int], address: object) -> None:
    announcement = Announcement("some-uid", PortMap.of(ports), ip_address(str(address)))
    assert parse_announcement(str(announcement)) == announcement


@pytest.mark.parametrize(
    "text",
    [
        *("1", "1 ", "1 uid", "1 uid 1:0", "1 uid 1:0 10.1.1.2 more", "1  1:0 10.1.1.2", "1 uid 1:0 host"),
        *("1 uid 1 10.1.1.2", "1 uid 1:0, 10.1.1.2", "1 uid 0:0 10.1.1.2", "1 uid 1:0:0 10.1.1.2"),
        *("1 uid 1:0,2:0 10.1.1.2", "1 uid 1:0,1:49152 10.1.1.2", "1 uid 1:x 10.1.1.2", "1 uid 1:0 0.0.0.0"),
    ],
)
def test_nothing_is_guessed(text: str) -> None:
    with pytest.raises(AnnouncementError, match="malformed") as refused:
        parse_announcement(text)
    assert not refused.value.is_version


@pytest.mark.parametrize("text", ["", " ", "2 uid 1:0 10.1.1.2", "uid 1:0 10.1.1.2", "11 uid 1:0 10.1.1.2"])
def test_another_version_is_told_from_nonsense(text: str) -> None:
    with pytest.raises(AnnouncementError, match="another version") as refused:
        parse_announcement(text)
    assert refused.value.is_version


UIDS = ("4a0bd4a2-3c4c-4d5e-8f6a-0b1c2d3e4f50", "0e1d2c3b-4a59-6877-8695-a4b3c2d1e0ff")


def test_a_migrations_name_has_the_uids_that_kubernetes_makes() -> None:
    assert server_name(*UIDS) == f"{UIDS[0]}.{UIDS[1]}.migration.migproxy.io"


@given(st.text(max_size=300), st.text(max_size=300))
def test_a_migrations_name_is_a_valid_one_and_its_own(vmi_uid: str, migration_uid: str) -> None:
    name = server_name(vmi_uid, migration_uid)
    assert len(name) <= 253
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", label) for label in name.split("."))
    assert name not in (server_name(f"{vmi_uid}x", migration_uid), server_name(vmi_uid, f"{migration_uid}x"))
    assert (server_name(migration_uid, vmi_uid) == name) == (vmi_uid == migration_uid)
