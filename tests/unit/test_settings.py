"""The daemon's options: three places, one check, and messages that say where a wrong one came from."""

import os
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from migproxy.settings import SettingsError, load, variables

pytestmark = pytest.mark.tier("gate")

GIVEN = {"vmi_dir": "/vmis"}


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "migproxy.toml"
    config.write_text('port-range = "1000-1009"\ndial-timeout = 3\ndisable-tls = true\n')
    settings = load(GIVEN | {"port_range": "2000-2009"}, {}, str(config))
    assert settings.port_range == (2000, 2009)
    assert settings.dial_timeout == 3
    assert settings.disable_tls


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("port_range", "1000", "two numbers joined by '-'"),
        ("port_range", "0-9", "from 1 to 65535"),
        ("port_range", "10-9", "the lower one first"),
        ("port_range", "1000-65536", "from 1 to 65535"),
        ("socket_owner", "qemu", "two numbers joined by ':'"),
        ("migration_address", "host", "names are not looked up"),
        ("migration_address", "0.0.0.0", "is not the address of a node"),
        ("migration_address", "fe80::1", "give the interface that it is on, such as fe80::1%migration0"),
        ("migration_address", 167837953, "an IP address in quotes is expected"),
        ("pod_ip", "fe80::1%2", "only an interface's name"),
        ("pod_ip", "10.1.1.1/24", "without the length of its network's prefix"),
        ("http_listen", "[fe80::1]:9470", "give the interface that it is on"),
        ("launcher_run_dir", "/proc/{pod}/root", "unknown placeholders"),
        ("launcher_run_dir", "run", "not an absolute path"),
        ("libvirt_socket", "/run/libvirt-sock", "pattern"),
        ("congestion_control", "../cubic", "pattern"),
        ("peer_timeout", "0", "greater than or equal to 1"),
        ("dial_timeout", "-1", "greater than 0"),
        ("max_connections", "0", "greater than or equal to 1"),
        ("control_socket", "/" + "x" * 107, "at most 107"),
        ("log_format", "xml", "'auto', 'console', 'json' or 'journald'"),
        ("node_name", "", "at least 1 character"),
        ("tls_min_version", "1.1", "'1.2' or '1.3'"),
        ("ktls", "yes", "'auto', 'on' or 'off'"),
        ("handshake_timeout", "0", "greater than 0"),
    ],
)
def test_wrong_value_is_named_with_its_origin_and_the_reason(field: str, value: object, why: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load(GIVEN | {field: value}, {field: "MIGPROXY_SOMETHING"}, None)
    assert str(raised.value).startswith(f"MIGPROXY_SOMETHING: {value!r}: ")
    assert why in str(raised.value)


def test_a_certificate_without_its_key_is_told() -> None:
    with pytest.raises(SettingsError, match="--tls-cert and --tls-key belong together"):
        load(GIVEN | {"tls_cert": "/tls.crt"}, {}, None)


def test_in_a_cluster_virt_handler_publishes_unless_it_is_asked_otherwise() -> None:
    assert load({}, {}, None).is_beside
    assert not load({"publish_status": True}, {}, None).is_beside
    assert not load({"vmi_dir": "/vmis"}, {}, None).is_beside
    with pytest.raises(SettingsError, match="--publish-status is about a cluster"):
        load({"vmi_dir": "/vmis", "publish_status": True}, {}, None)


def test_kubevirts_names_of_tls_versions_and_lists_of_names_are_understood() -> None:
    settings = load(GIVEN | {"tls_min_version": "VersionTLS13", "tls_client_names": "one, two"}, {}, None)
    assert settings.tls_min_version == "1.3"
    assert settings.tls_client_names == ("one", "two")


@pytest.mark.parametrize("name", ["VersionTLS10", "VersionTLS11", "VersionTLS12"])
def test_kubevirts_older_tls_versions_mean_1_2(name: str) -> None:
    assert load(GIVEN | {"tls_min_version": name}, {}, None).tls_min_version == "1.2"


def test_every_wrong_option_is_told() -> None:
    with pytest.raises(SettingsError) as raised:
        load({"port_range": "x", "dial_timeout": "y", "ktls": "z"}, {"port_range": "--port-range"}, None)
    assert len(str(raised.value).splitlines()) == 3


def test_unknown_key_in_the_file_is_told(tmp_path: Path) -> None:
    config = tmp_path / "migproxy.toml"
    config.write_text('vmi-dir = "/vmis"\nport_range = "1-2"\n')
    with pytest.raises(SettingsError, match=r"migproxy\.toml: port_range: there is no such option"):
        load({}, {}, str(config))


@pytest.mark.parametrize("text", ["vmi-dir = \n", "[[["])
def test_file_that_is_no_toml_is_told_with_the_line(tmp_path: Path, text: str) -> None:
    config = tmp_path / "migproxy.toml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=r"--config .*migproxy\.toml: .*line 1"):
        load({}, {}, str(config))


def test_missing_file_is_told() -> None:
    with pytest.raises(SettingsError, match=r"--config /nonesuch: .*No such file"):
        load(GIVEN, {}, "/nonesuch")


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Path.mkdir, "it is no regular file: give one"),
        (fifo, "it is no regular file: give one"),  # nobody waits for its writer
        (lambda path: path.symlink_to("/dev/zero"), "it is no regular file: give one"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.write_bytes(b'node-name = "\xe9"\n'), "not TOML in UTF-8: .* byte 0xe9 in position 13"),
        (lambda path: path.write_bytes(b"#" * (1 << 20) + b"\n"), "it has more than 1048576 bytes"),
        (lambda path: path.write_text("a = " + "[" * 100_000), "not TOML in UTF-8"),
        (lambda path: path.write_text("a = 1" + "0" * 5000), "not TOML in UTF-8"),
        (lambda path: path.write_text('"\\n\\u001b[2J" = 1'), r"\\n\\x1b\[2J: there is no such option"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], why: str
) -> None:
    config = tmp_path / "migproxy.toml"
    make(config)
    with pytest.raises(SettingsError, match=rf"{config}: {why}") as raised:
        load({}, {}, str(config))
    assert len(str(raised.value).splitlines()) == 1


def test_a_file_may_be_a_link_as_kubernetes_makes_them(tmp_path: Path) -> None:
    (tmp_path / "data").write_text('vmi-dir = "/vmis"\n')
    (tmp_path / "migproxy.toml").symlink_to("data")
    assert load({}, {}, str(tmp_path / "migproxy.toml")).vmi_dir == "/vmis"


def test_an_address_counts_as_what_the_kernel_takes_it_for() -> None:
    settings = load(GIVEN | {"migration_address": "::ffff:10.1.1.1", "pod_ip": "fe80::1%migration0"}, {}, None)
    assert settings.migration_address == ip_address("10.1.1.1")
    assert settings.pod_ip == ip_address("fe80::1%migration0")


def test_pod_ip_has_kubernetes_usual_variable_too() -> None:
    assert variables("pod_ip") == ["MIGPROXY_POD_IP", "MY_POD_IP"]
