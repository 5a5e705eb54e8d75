"""Port maps, keys and socket names, addresses, libvirt URLs: KubeVirt's and libvirt's own conventions."""

import ipaddress
import shlex
import string
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migproxy.portmap import (
    MAX_KEY_LENGTH,
    AddressError,
    Channel,
    LibvirtURI,
    LibvirtURIError,
    PortMap,
    PortMapError,
    ProxyKeyError,
    channels_for,
    check_key,
    migration_uris,
    parse_address,
    parse_libvirt_uri,
    parse_port_map,
    salvage_port_map,
    source_socket_name,
    target_socket_path,
    unknown_channels,
    virsh_command,
)

pytestmark = pytest.mark.tier("gate")

UID = "6f1e9dcb-7d2f-4f0c-9a52-0d8e3f0b9c11"
SEED = {"32899": 0, "39497": 49153, "42691": 49152}
ALL = PortMap.of({Channel.LIBVIRT: 32899, Channel.DIRECT: 42691, Channel.BLOCK: 39497})

port_maps = st.dictionaries(st.sampled_from(Channel), st.integers(1, 65535), min_size=1).filter(
    lambda ports: len(set(ports.values())) == len(ports)
)


# --- the port map


def test_a_port_map_is_read_as_kubevirt_writes_it() -> None:
    assert parse_port_map(SEED) == ALL


def test_ports_may_be_numbers_as_yaml_loaders_make_them() -> None:
    assert parse_port_map({32899: 0, "42691": 49152}) == PortMap.of({Channel.LIBVIRT: 32899, Channel.DIRECT: 42691})


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (None, "None, not a mapping"),
        ([32899], "not a mapping"),
        ("32899:0", "not a mapping"),
        ({}, "the port map is empty"),
        ({"http": 0}, "key 'http' is not a decimal port number"),
        ({"+1": 0}, "not a decimal port number"),
        ({" 1": 0}, "not a decimal port number"),
        ({"1_0": 0}, "not a decimal port number"),
        ({"1\n": 0}, "not a decimal port number"),
        ({"080": 0}, "not a decimal port number"),
        ({"0x50": 0}, "not a decimal port number"),
        ({"٣٢٨٩٩": 0}, "not a decimal port number"),
        ({"": 0}, "not a decimal port number"),
        ({-1: 0}, "not a decimal port number"),
        ({1.0: 0}, "not a decimal port number"),
        ({True: 0}, "True is not a decimal port number"),
        ({None: 0}, "not a decimal port number"),
        ({1 << 20000: 0}, "a huge number is not a decimal port number"),
        ({"0": 0}, "port '0' is outside 1-65535"),
        ({0: 0}, "port 0 is outside 1-65535"),
        ({"65536": 0}, "port '65536' is outside 1-65535"),
        ({"9" * 5000: 0}, "is outside 1-65535"),
        ({"32899": 7}, "only unknown channels, 7; known are 0 (libvirt), 49152 (direct), 49153 (block)"),
        ({"32899": -1, "32900": 8}, "only unknown channels, -1, 8"),
        ({"32899": 1 << 20000}, "only unknown channels, a huge number"),
        ({"32899": "0"}, "channel '0', which is not an integer"),
        ({"32899": True}, "channel True, which is not an integer"),
        ({"32899": 0.0}, "channel 0.0, which is not an integer"),
        ({"32899": None}, "channel None, which is not an integer"),
        ({"32899": 0, "32900": 0}, "the libvirt channel has two ports, 32899 and 32900"),
        ({"32899": 0, 32899: 49152}, "port 32899 is given twice"),
    ],
)
def test_an_unusable_port_map_says_what_is_wrong(raw: object, complaint: str) -> None:
    with pytest.raises(PortMapError) as error:
        parse_port_map(raw)
    assert complaint in str(error.value)


def test_a_hostile_entry_does_not_fill_the_log() -> None:
    with pytest.raises(PortMapError) as error:
        parse_port_map({"x" * 100_000: list(range(100_000))})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("read", [parse_port_map, salvage_port_map])
def test_unknown_channels_do_not_keep_the_known_ones_from_being_served(
    read: Callable[[object], PortMap | None],
) -> None:
    raw = SEED | {"40000": 49154, "http": 7, "32899 ": -1}
    assert read(raw) == ALL
    assert unknown_channels(raw) == "49154, 7, -1"


def test_what_is_no_channel_number_is_no_unknown_channel() -> None:
    assert unknown_channels(SEED | {"1": "7", "2": True, "3": 7.0, "4": None}) is None
    assert unknown_channels(None) is None


def test_many_unknown_channels_do_not_fill_the_log() -> None:
    assert len(unknown_channels({str(port): 10**4000 + port for port in range(1, 60_000)}) or "") < 300


@given(port_maps)
def test_what_a_target_publishes_is_read_back_the_same(ports: dict[Channel, int]) -> None:
    assert parse_port_map(PortMap.of(ports).published()) == PortMap.of(ports)


def test_published_ports_are_strings_and_channels_numbers() -> None:
    assert ALL.published() == SEED
    assert all(type(channel) is int for channel in ALL.published().values())


def test_a_port_map_is_a_mapping_sorted_by_channel_and_hashable() -> None:
    assert list(ALL) == [Channel.LIBVIRT, Channel.DIRECT, Channel.BLOCK]
    assert ALL[Channel.DIRECT] == 42691
    assert dict(ALL.items()) == {Channel.LIBVIRT: 32899, Channel.DIRECT: 42691, Channel.BLOCK: 39497}
    assert len({ALL, parse_port_map(SEED)}) == 1
    small = PortMap.of({Channel.LIBVIRT: 1})
    assert Channel.BLOCK not in small
    assert small.get(Channel.BLOCK) is None
    assert len(small) == 1
    with pytest.raises(KeyError):
        small[Channel.BLOCK]


@pytest.mark.parametrize(
    ("raw", "sound"),
    [
        (SEED, dict(ALL)),
        ({"32899": 0, "70000": 49152, "42691": 7}, {Channel.LIBVIRT: 32899}),
        ({"32899": 0, "1": 49152, "2": 49152}, {Channel.LIBVIRT: 32899}),
        ({"32899": 0, "1": 49152, 1: 49153}, {Channel.LIBVIRT: 32899}),
    ],
)
def test_of_a_damaged_map_only_undisputed_entries_are_kept(raw: object, sound: Mapping[Channel, int]) -> None:
    assert salvage_port_map(raw) == PortMap.of(sound)


@pytest.mark.parametrize("raw", [None, [], {}, "x", {"x": 0}, {"1": 0, 1: 0}])
def test_of_a_map_with_nothing_sound_nothing_is_kept(raw: object) -> None:
    assert salvage_port_map(raw) is None


def test_the_block_channel_exists_only_for_block_migration() -> None:
    assert channels_for(block=False) == (Channel.LIBVIRT, Channel.DIRECT)
    assert channels_for(block=True) == (Channel.LIBVIRT, Channel.DIRECT, Channel.BLOCK)
    assert [channel.label for channel in Channel] == ["libvirt", "direct", "block"]


# --- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.1.1.1", ipaddress.IPv4Address("10.1.1.1")),
        ("fd00::1", ipaddress.IPv6Address("fd00::1")),
        ("[fd00::1]", ipaddress.IPv6Address("fd00::1")),
        ("::ffff:10.1.1.1", ipaddress.IPv4Address("10.1.1.1")),
        ("fe80::1%migration0", ipaddress.IPv6Address("fe80::1%migration0")),
        ("127.0.0.2", ipaddress.IPv4Address("127.0.0.2")),
        ("::1", ipaddress.IPv6Address("::1")),
        ("240.1.1.1", ipaddress.IPv4Address("240.1.1.1")),
    ],
)
def test_a_target_address_may_be_ipv6_with_or_without_brackets(text: str, address: object) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["node02", "node02.example.org", "", " 10.1.1.1", "10.1.1", "010.1.1.1", "[10.1.1.1]", "[fd00::1", "fd00::1]",
     "10.1.1.1:80", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "0.1.2.3", "255.255.255.255", "169.254.169.254", "fe80::1",
     "::ffff:169.254.169.254", "::ffff:0.0.0.0", "::127.0.0.1", "64:ff9b::7f00:1", "fd00::1%migration0", "::1%lo",
     "fe80::1%\x1b[2J", "fe80::1%" + "x" * 100_000],
)  # fmt: skip
def test_what_is_no_address_of_a_node_is_refused(text: str) -> None:
    with pytest.raises(AddressError) as refused:
        parse_address(text)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("node02.example.org", "names are not looked up, give the address that it stands for"),
        ("cafe", "names are not looked up"),
        (" 10.1.1.1", "write it without spaces"),
        ("10.1.1.1\n", "write it without spaces"),
        ("010.1.1.1", "four numbers from 0 to 255, without leading zeros"),
        ("10.1.1.256", "four numbers from 0 to 255"),
        ("10.1.1", "four numbers from 0 to 255"),
        ("[10.1.1.1]", "brackets stand around an IPv6 address alone"),
        ("10.1.1.1:80", "write it without a port"),
        ("[fd00::1]:80", "write it without a port"),
        ("10.1.1.1,fd00::1", "give one of them"),  # a pod's status.podIPs
        ("10.1.1.1/24", "write it without the length of its network's prefix"),
        ("fe80::1", "give the interface that it is on, such as fe80::1%migration0"),
        ("fe80::1%2", "only an interface's name"),  # whose number is another on each node
    ],
)
def test_a_mistake_that_people_make_is_told_with_its_remedy(text: str, remedy: str) -> None:
    with pytest.raises(AddressError, match=remedy):
        parse_address(text)


# --- keys and socket names


def test_source_sockets_are_named_as_kubevirt_names_them() -> None:
    assert [source_socket_name(UID, channel) for channel in Channel] == [
        f"{UID}-source.sock",
        f"{UID}-49152-source.sock",
        f"{UID}-49153-source.sock",
    ]


def test_a_target_dials_libvirts_socket_and_qemus_under_the_names_the_source_uses() -> None:
    assert [target_socket_path(UID, channel) for channel in Channel] == [
        "libvirt/virtqemud-sock",
        f"kubevirt/migrationproxy/{UID}-49152-source.sock",
        f"kubevirt/migrationproxy/{UID}-49153-source.sock",
    ]
    assert target_socket_path(UID, Channel.LIBVIRT, "libvirt/libvirt-sock") == "libvirt/libvirt-sock"


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../x", "a/b", "/etc", "a\0b", "a b", "a\n", "é", "a" * (MAX_KEY_LENGTH + 1)]
)
def test_a_key_never_names_a_path_elsewhere(key: str) -> None:
    for channel in (Channel.DIRECT, Channel.BLOCK):
        with pytest.raises(ProxyKeyError):
            target_socket_path(key, channel)
    with pytest.raises(ProxyKeyError):
        source_socket_name(key, Channel.LIBVIRT)


def test_the_longest_key_fits_the_path_that_libvirt_dials() -> None:
    name = source_socket_name(check_key("a" * MAX_KEY_LENGTH), Channel.BLOCK)
    assert len(f"/var/run/kubevirt/migrationproxy/{name}") == 107


# --- libvirt URLs


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("qemu:///system", LibvirtURI("qemu", path="/system")),
        ("test:///default", LibvirtURI("test", path="/default")),
        ("xen://host/", LibvirtURI("xen", host="host")),
        ("esx://host", LibvirtURI("esx", host="host", path="")),
        ("qemu+ssh://root@example.com:2222/system", LibvirtURI("qemu", "ssh", "root", "example.com", 2222, "/system")),
        ("qemu+tls://[fd00::1]:16514/system", LibvirtURI("qemu", "tls", None, "fd00::1", 16514, "/system")),
        ("qemu+tcp://[fe80::1%25eth0]/system", LibvirtURI("qemu", "tcp", None, "fe80::1%eth0", None, "/system")),
        ("qemu+tcp://[fe80::1%eth0]/system", LibvirtURI("qemu", "tcp", None, "fe80::1%eth0", None, "/system")),
        ("qemu+tcp://host:/system", LibvirtURI("qemu", "tcp", host="host", path="/system")),
        ("qemu+ssh://a%40b@host/system", LibvirtURI("qemu", "ssh", "a@b", "host", None, "/system")),
        ("unix:///run/a%20b%3f.sock", LibvirtURI("unix", path="/run/a b?.sock")),
        ("test:///tmp/%ff.xml", LibvirtURI("test", path="/tmp/\udcff.xml")),
        (
            "qemu+unix:///session?socket=/var/run/libvirt/virtqemud-sock",
            LibvirtURI("qemu", "unix", path="/session", params=(("socket", "/var/run/libvirt/virtqemud-sock"),)),
        ),
    ],
)  # fmt: skip
def test_libvirt_urls_are_read(text: str, uri: LibvirtURI) -> None:
    assert parse_libvirt_uri(text) == uri
    assert parse_libvirt_uri(str(uri)) == uri


@pytest.mark.parametrize(
    ("query", "params"),
    [
        ("", ()),
        ("no_verify=1&keyfile=a%26b", (("no_verify", "1"), ("keyfile", "a&b"))),
        ("a=1;b=2", (("a", "1"), ("b", "2"))),
        ("a=1;b=2&c=3", (("a", "1;b=2"), ("c", "3"))),
        ("a=1&b=2;c=3", (("a", "1"), ("b", "2"), ("c", "3"))),
        ("a=1&a=2", (("a", "1"), ("a", "2"))),
        ("a&b=", (("a", ""), ("b", ""))),
        ("=1&&;a=b=c", (("a", "b=c"),)),
        ("command=/opt/a+b", (("command", "/opt/a+b"),)),
    ],
)
def test_parameters_are_read_as_libvirt_reads_them(query: str, params: tuple[tuple[str, str], ...]) -> None:
    assert parse_libvirt_uri(f"qemu:///system?{query}").params == params


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no '://'"),
        ("qemu:/system", "no '://'"),
        ("://host/", "'' is not the name of a libvirt driver"),
        ("qemu+://host/", "'' is not the name of a libvirt driver or transport"),
        ("qemu+a+b://host/", "'a+b' is not the name"),
        ("1qemu:///system", "'1qemu' is not the name"),
        ("qemu://host:port/system", "'port' is not a port"),
        ("qemu://host:0/system", "port 0 is outside 1-65535"),
        ("qemu://host:65536/system", "port 65536 is outside 1-65535"),
        ("qemu://host:123456/system", "'123456' is not a port"),
        ("qemu://fd00::1/system", "an IPv6 address stands in brackets"),
        ("qemu://[fd00::1/system", "an IPv6 host stands in brackets"),
        ("qemu://[fd00::1]x/system", "an IPv6 host stands in brackets"),
        ("qemu://[host]/system", "'host' in brackets is not an IPv6 address"),
        ("qemu://a%3Ab/system", "'a:b' is neither a name nor an IPv6 address"),
        ("qemu:///sys tem", "' ' must be percent-escaped"),
        ("qemu:///sys\n", "must be percent-escaped"),
        ("qemu:///é", "'é' must be percent-escaped"),
        ("qemu:///system#top", "'#' must be written %23"),
        ("qemu:///100%", "a '%' is not followed by two hexadecimal digits"),
        ("qemu:///system?a=%zz", "a '%' is not followed by two hexadecimal digits"),
        ("qemu:///a%00b", "a NUL character"),
    ],
)
def test_an_unreadable_url_says_what_is_wrong_and_in_which_url(text: str, complaint: str) -> None:
    with pytest.raises(LibvirtURIError) as error:
        parse_libvirt_uri(text)
    assert complaint in str(error.value)
    assert repr(text) in str(error.value)


def test_parts_that_no_url_can_have_are_refused() -> None:
    with pytest.raises(LibvirtURIError, match="leave it out"):
        LibvirtURI("qemu", user="")
    with pytest.raises(LibvirtURIError, match="leave it out"):
        LibvirtURI("qemu", host="")
    with pytest.raises(LibvirtURIError, match="does not begin with '/'"):
        LibvirtURI("unix", path="run/x.sock")
    with pytest.raises(LibvirtURIError, match="without a name"):
        LibvirtURI("qemu", params=(("", "x"),))


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
names = st.from_regex(r"[A-Za-z][A-Za-z0-9.-]*", fullmatch=True)
hosts = st.one_of(
    texts.filter(lambda text: text and ":" not in text),
    st.ip_addresses(v=6).map(str),
    st.tuples(st.ip_addresses(v=6), st.text(string.ascii_letters + string.digits + "@.-_", min_size=1)).map(
        lambda host: f"{host[0]}%{host[1]}"
    ),
)
uris = st.builds(
    LibvirtURI,
    driver=names,
    transport=st.none() | names,
    user=st.none() | texts.filter(bool),
    host=st.none() | hosts,
    port=st.none() | st.integers(1, 65535),
    path=st.just("") | texts.map(lambda text: f"/{text}"),
    params=st.lists(st.tuples(texts.filter(bool), texts)).map(tuple),
)


@given(uris)
def test_a_printed_url_is_read_back_the_same(uri: LibvirtURI) -> None:
    assert parse_libvirt_uri(str(uri)) == uri


@given(st.text() | st.text("qemu+:/@[]?&;=%#1a").map(lambda text: f"qemu://{text}"))
def test_any_text_is_read_or_refused_with_the_one_error(text: str) -> None:
    try:
        uri = parse_libvirt_uri(text)
    except LibvirtURIError:
        return
    assert parse_libvirt_uri(str(uri)) == uri


# --- the migration by hand


def test_the_source_launchers_uris_lead_through_the_three_sockets() -> None:
    uris = migration_uris("/var/run", UID, session=False)
    folder = "/var/run/kubevirt/migrationproxy"
    assert uris.destination == f"qemu+unix:///system?socket={folder}/{UID}-source.sock"
    assert uris.migration == f"unix://{folder}/{UID}-49152-source.sock"
    assert uris.disks == f"unix://{folder}/{UID}-49153-source.sock"


def test_a_non_root_launcher_has_libvirts_session_daemon() -> None:
    assert migration_uris("/var/run", UID, session=True).destination.startswith("qemu+unix:///session?socket=/var/run/")


def test_a_run_dir_with_odd_characters_survives_in_the_uris() -> None:
    uris = migration_uris("/tmp/a b&c/", UID, session=False)
    assert parse_libvirt_uri(uris.destination).params == (
        ("socket", f"/tmp/a b&c/kubevirt/migrationproxy/{UID}-source.sock"),
    )
    assert parse_libvirt_uri(uris.migration).path == f"/tmp/a b&c/kubevirt/migrationproxy/{UID}-49152-source.sock"


def test_uris_are_refused_for_a_relative_run_dir_or_a_hostile_key() -> None:
    with pytest.raises(LibvirtURIError, match="does not begin with '/'"):
        migration_uris("run", UID, session=False)
    with pytest.raises(ProxyKeyError):
        migration_uris("/var/run", "../x", session=False)


def test_the_virsh_command_is_what_a_user_types() -> None:
    uris = migration_uris("/run", UID, session=False)
    folder = "/run/kubevirt/migrationproxy"
    plain = virsh_command(uris, "default_vmi-migratable", connect="qemu:///system")
    assert shlex.join(plain) == (
        "virsh -c qemu:///system migrate --live --p2p default_vmi-migratable "
        f"'qemu+unix:///system?socket={folder}/{UID}-source.sock' unix://{folder}/{UID}-49152-source.sock"
    )
    full = virsh_command(uris, "vm", connect="qemu:///session", parallel=4, copy_storage=True)
    assert full[4:] == [
        "--live", "--p2p", "--parallel", "--parallel-connections", "4", "--copy-storage-all",
        "--disks-uri", uris.disks, "vm", uris.destination, uris.migration,
    ]  # fmt: skip
