"""Channels of a live migration, the port map in a VMI's status, socket names, and libvirt remote URLs.

Pure: nothing here opens a file or a socket.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import Self, TypeAlias
from urllib.parse import quote, unquote

from migproxy.text import excerpt

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# Relative to the launcher's /var/run (KubeVirt).
MIGRATION_PROXY_DIR = "kubevirt/migrationproxy"
LIBVIRT_SOCKET = "libvirt/virtqemud-sock"
LAUNCHER_RUN_DIR = "/var/run"

# libvirt connects to /var/run/kubevirt/migrationproxy/KEY-49153-source.sock, and the kernel's sun_path ends
# at 107 bytes: a longer key could never work. A Kubernetes UID has 36 characters.
MAX_KEY_LENGTH = 56


class PortMapError(ValueError):
    """A port map that cannot be used; the message says which entry and why."""


class AddressError(ValueError):
    """An address in a VMI's status that cannot be dialled."""


class ProxyKeyError(ValueError):
    """A proxy key that cannot be part of a socket's file name."""


class LibvirtURIError(ValueError):
    """A libvirt remote URL that does not parse, or has a part that cannot be printed."""


class Channel(IntEnum):
    """What a connection of a migration carries; the values are those of KubeVirt's port map."""

    LIBVIRT = 0
    DIRECT = 49152
    BLOCK = 49153

    @property
    def label(self) -> str:
        """The name in logs, metrics and tables: libvirt, direct or block."""
        return self.name.lower()


def channels_for(block: bool) -> tuple[Channel, ...]:
    """The channels of a migration: two, and the third only where disks are copied (block migration)."""
    return (Channel.LIBVIRT, Channel.DIRECT, Channel.BLOCK) if block else (Channel.LIBVIRT, Channel.DIRECT)


@dataclass(frozen=True, slots=True)
class PortMap(Mapping[Channel, int]):
    """TCP ports by channel, hashable. Make one with `of` or `parse_port_map`.

    Args:
        ports: (channel, port) pairs, sorted by channel.
    """

    ports: tuple[tuple[Channel, int], ...]

    @classmethod
    def of(cls, ports: Mapping[Channel, int]) -> Self:
        """A port map with these ports (1-65535)."""
        return cls(tuple(sorted(ports.items())))

    def __getitem__(self, channel: Channel) -> int:
        for known, port in self.ports:
            if known == channel:
                return port
        raise KeyError(channel)

    def __iter__(self) -> Iterator[Channel]:
        return (channel for channel, _ in self.ports)

    def __len__(self) -> int:
        return len(self.ports)

    def published(self) -> dict[str, int]:
        """What a target publishes, {"32899": 0, ...}: ports as strings, channels as numbers (KubeVirt)."""
        return {str(port): int(channel) for channel, port in self.ports}


def parse_port_map(raw: object) -> PortMap:
    """Read targetDirectMigrationNodePorts as a VMI's status holds it: {port: channel}.

    Entries of unknown channels, which a newer KubeVirt may have, are skipped; `unknown_channels` tells them.

    Args:
        raw: a mapping of port (decimal string, or an integer as YAML loaders make it) to channel number.

    Raises:
        PortMapError: the map is unusable; nothing of it is guessed.
    """
    if not isinstance(raw, Mapping):
        raise PortMapError(f"the port map is {excerpt(raw)}, not a mapping of ports to channels")
    if not raw:
        raise PortMapError("the port map is empty")
    ports: dict[Channel, int] = {}
    for port, channel in (_parse_entry(key, value) for key, value in raw.items() if not _is_unknown(value)):
        if channel in ports:
            raise PortMapError(f"the {channel.label} channel has two ports, {ports[channel]} and {port}")
        if port in ports.values():
            raise PortMapError(f"port {port} is given twice")
        ports[channel] = port
    if not ports:
        known = ", ".join(f"{channel.value} ({channel.label})" for channel in Channel)
        raise PortMapError(f"the port map has only unknown channels, {unknown_channels(raw)}; known are {known}")
    return PortMap.of(ports)


def unknown_channels(raw: object) -> str | None:
    """The first channel numbers of a port map that are not known here, for people; None where there are none."""
    values = raw.values() if isinstance(raw, Mapping) else ()
    return ", ".join(excerpt(value) for value in islice(filter(_is_unknown, values), 5)) or None


def salvage_port_map(raw: object) -> PortMap | None:
    """The entries of a damaged port map that are right and contradict no other; None where there are none."""
    entries = []
    for key, value in raw.items() if isinstance(raw, Mapping) else ():
        if _is_unknown(value):
            continue
        try:
            entries.append(_parse_entry(key, value))
        except PortMapError:
            continue
    ports = Counter(port for port, _ in entries)
    channels = Counter(channel for _, channel in entries)
    sound = {channel: port for port, channel in entries if ports[port] == channels[channel] == 1}
    return PortMap.of(sound) if sound else None


def _parse_entry(key: object, value: object) -> tuple[int, Channel]:
    digits = str(key) if type(key) is int and 0 <= key < 1_000_000 else key
    if not isinstance(digits, str) or not re.fullmatch(r"0|[1-9][0-9]*", digits):
        raise PortMapError(f"the port map's key {excerpt(key)} is not a decimal port number")
    if len(digits) > 5 or not 1 <= int(digits) <= 65535:
        raise PortMapError(f"port {excerpt(key)} is outside 1-65535")
    if isinstance(value, bool) or not isinstance(value, int):
        raise PortMapError(f"port {digits} has the channel {excerpt(value)}, which is not an integer")
    return int(digits), Channel(value)


def _is_unknown(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value not in set(Channel)


def parse_address(text: str) -> IPAddress:
    """Read the address of a migration's target; an IPv6 address may stand in brackets.

    Loopback addresses pass: who may migrate there is the plan's to say.

    Raises:
        AddressError: see `read_address`; or an address that no target has: unspecified, multicast, broadcast,
            reserved, or IPv4 link-local.
    """
    bracketed = text.startswith("[") and text.endswith("]")
    address = read_address(text[1:-1] if bracketed and ":" in text else text)
    if address.version == 4 and address.is_link_local:
        raise AddressError(f"{address} is link-local, which no migration target is")
    # Reserved by IPv4 is 240.0.0.0/4, which some clusters use.
    is_reserved = (
        any(address in network for network in _NOBODY)
        if address.version == 4
        else address.is_reserved and not address.is_loopback
    )
    if address.is_multicast or is_reserved:
        raise AddressError(f"{address} is not the address of a node")
    return address


def read_address(text: str) -> IPAddress:
    """Read an IP address as people write it.

    An IPv4-mapped IPv6 address is read as the IPv4 address that the kernel takes it for. A link-local IPv6 address
    has a zone, the interface that it is on; by its name, since each node numbers its interfaces its own way.

    Raises:
        AddressError: a host name, anything else that is no address, a zone missing or where there is none.
    """
    try:
        address: IPAddress = ipaddress.ip_address(text)
    except ValueError:
        remedy = next((f": {remedy}" for mistake, remedy in _MISTAKES if mistake.fullmatch(text)), "")
        raise AddressError(f"{excerpt(text)} is not an IP address{remedy}") from None
    zone = getattr(address, "scope_id", None)
    if zone and not (address.is_link_local and _ZONE.fullmatch(zone)):
        raise AddressError(f"{excerpt(text)} has a zone: only an interface's name, at a link-local address, may be one")
    address = unmapped(address)
    if address.version == 6 and address.is_link_local and not zone:
        raise AddressError(f"{address} is link-local: give the interface that it is on, such as {address}%migration0")
    return address


def is_address(text: str | None, address: IPAddress) -> bool:
    """Whether a text in a VMI's status means an address, however it is written."""
    try:
        return text is not None and parse_address(text) == address
    except AddressError:
        return False


def unmapped(address: IPAddress) -> IPAddress:
    """The IPv4 address that an IPv4-mapped IPv6 address stands for (RFC 4291, 2.5.5.2); any other, as it is."""
    return getattr(address, "ipv4_mapped", None) or address


def check_key(key: str) -> str:
    """Return the key, having made sure that it is one harmless component of a path.

    Keys and pod UIDs come out of a VMI's status: none may name a path elsewhere.

    Raises:
        ProxyKeyError: characters that no Kubernetes UID has, "." or "..", or too long for a socket's path.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", key) or key in (".", ".."):
        raise ProxyKeyError(f"{excerpt(key)} is not a UID: only letters, digits, '-', '.' and '_' may be in it")
    if len(key) > MAX_KEY_LENGTH:
        raise ProxyKeyError(
            f"{excerpt(key)} has {len(key)} characters; more than {MAX_KEY_LENGTH} do not fit a socket's path"
        )
    return key


def source_socket_name(key: str, channel: Channel) -> str:
    """The file name of a channel's socket in MIGRATION_PROXY_DIR: KEY-source.sock, KEY-49152-source.sock.

    Raises:
        ProxyKeyError: see `check_key`.
    """
    number = "" if channel is Channel.LIBVIRT else f"-{channel.value}"
    return f"{check_key(key)}{number}-source.sock"


def target_socket_path(key: str, channel: Channel, libvirt_socket: str = LIBVIRT_SOCKET) -> str:
    """What the target dials for a channel, relative to the launcher's /var/run.

    libvirt's own socket for the libvirt channel; QEMU creates the others under the names that the source's
    URIs carry.

    Raises:
        ProxyKeyError: see `check_key`.
    """
    if channel is Channel.LIBVIRT:
        return libvirt_socket
    return f"{MIGRATION_PROXY_DIR}/{source_socket_name(key, channel)}"


_ZONE = re.compile(r"(?![0-9]+$)[A-Za-z0-9._-]{1,15}")  # what the kernel allows, and people use, of IFNAMSIZ
_MISTAKES = tuple(
    (re.compile(mistake), remedy)
    for mistake, remedy in (
        (r"\s.*|.*\s", "write it without spaces"),
        (r"[0-9.]+", "it has four numbers from 0 to 255, without leading zeros, which some take for octal"),
        (r"\[[0-9.]+\]", "brackets stand around an IPv6 address alone"),
        (r"[0-9.]+:[0-9]+|\[.*\]:[0-9]+", "write it without a port"),
        (r".*,.*", "give one of them"),
        (r"[0-9A-Fa-f.:]+/[0-9]+", "write it without the length of its network's prefix"),
        (r"[A-Za-z0-9.-]+", "names are not looked up, give the address that it stands for"),
    )
)
_NOBODY = (ipaddress.IPv4Network("0.0.0.0/8"), ipaddress.IPv4Network("255.255.255.255"))  # RFC 6890, 2.2.2
_NO_URI_CHARACTER = re.compile(r"[^A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]")
_DRIVER = re.compile(r"[A-Za-z][A-Za-z0-9.-]*")
_AUTHORITY = re.compile(r"(?:(?P<user>.*)@)?(?P<host>\[.*\]|[^:\[]*)(?::(?P<port>.*))?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class LibvirtURI:
    """A libvirt remote URL: driver[+transport]://[user@][host][:port]/[path][?extraparameters].

    `str` prints it with everything escaped that needs it; `parse_libvirt_uri` reads that back unchanged.
    A migration URI (unix:///path, tcp://host) has the same form.

    Args:
        driver: qemu, xen, test, ...
        transport: unix, ssh, tls, ...
        user, host: None where the URL has none. An IPv6 host stands without brackets, with its %zone if any.
        port: 1-65535.
        path: empty, or with its leading slash.
        params: (name, value) in their order; names may repeat.

    Raises:
        LibvirtURIError: a part that no URL can have.
    """

    driver: str
    transport: str | None = None
    user: str | None = None
    host: str | None = None
    port: int | None = None
    path: str = "/"
    params: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for part in (self.driver, self.transport):
            if part is not None and not _DRIVER.fullmatch(part):
                raise LibvirtURIError(f"{part!r} is not the name of a libvirt driver or transport")
        if self.user == "" or self.host == "":
            raise LibvirtURIError("an empty user or host: leave it out")
        if self.host is not None and ":" in self.host and not _is_ipv6(self.host):
            raise LibvirtURIError(f"the host {self.host!r} is neither a name nor an IPv6 address")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise LibvirtURIError(f"port {self.port} is outside 1-65535")
        if self.path and not self.path.startswith("/"):
            raise LibvirtURIError(f"the path {self.path!r} does not begin with '/'")
        if any(not name for name, _ in self.params):
            raise LibvirtURIError("a parameter without a name")
        texts = (self.user, self.host, self.path, *(text for param in self.params for text in param))
        if any(text is not None and "\0" in text for text in texts):
            raise LibvirtURIError("a NUL character")

    def __str__(self) -> str:
        scheme = f"{self.driver}+{self.transport}" if self.transport else self.driver
        user = f"{_escape(self.user)}@" if self.user else ""
        host = _escape(self.host or "", safe=":")
        if ":" in host:
            host = f"[{host}]"
        port = f":{self.port}" if self.port else ""
        path = _escape(self.path, safe="/:@")
        params = "&".join(f"{_escape(name)}={_escape(value, safe='/:@')}" for name, value in self.params)
        return f"{scheme}://{user}{host}{port}{path}{'?' if params else ''}{params}"


def parse_libvirt_uri(text: str) -> LibvirtURI:
    """Read any libvirt remote URL, the parameters as libvirt's virURIParse does.

    That is: a name alone has the value "", "=value" and empty sections are dropped, and ';' separates only
    where no '&' follows.

    Raises:
        LibvirtURIError: what is wrong, and in which URL.
    """
    try:
        return _parse_libvirt_uri(text)
    except LibvirtURIError as error:
        raise LibvirtURIError(f"libvirt URL {text!r}: {error}") from None


def _parse_libvirt_uri(text: str) -> LibvirtURI:
    if stray := _NO_URI_CHARACTER.search(text):
        raise LibvirtURIError(f"{stray[0]!r} must be percent-escaped")
    scheme, found, rest = text.partition("://")
    if not found:
        raise LibvirtURIError("no '://' after the driver, as in qemu:///system")
    if "#" in rest:
        raise LibvirtURIError("'#' must be written %23")
    driver, plus, transport = scheme.partition("+")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    user, host, port = _parse_authority(authority)
    return LibvirtURI(
        driver=driver,
        transport=transport if plus else None,
        user=user,
        host=host,
        port=port,
        path=_unescape(slash + path),
        params=tuple(_parse_params(query)),
    )


def _parse_authority(authority: str) -> tuple[str | None, str | None, int | None]:
    match = _AUTHORITY.fullmatch(authority)
    if not match:
        raise LibvirtURIError(f"{authority!r} is not [user@][host][:port] (an IPv6 host stands in brackets)")
    user, host, port = match["user"], match["host"], match["port"]
    if host.startswith("["):
        # RFC 6874 has %25 before the zone; a bare % is what everybody types, and libxml2 takes it.
        host = _BAD_ESCAPE.sub("%25", host[1:-1])
        if not _is_ipv6(_unescape(host)):
            raise LibvirtURIError(f"{host!r} in brackets is not an IPv6 address")
    if port and not re.fullmatch(r"[0-9]{1,5}", port):
        raise LibvirtURIError(f"{port!r} is not a port (an IPv6 address stands in brackets)")
    return (
        _unescape(user) if user else None,
        _unescape(host) if host else None,
        int(port) if port else None,
    )


def _parse_params(query: str) -> Iterator[tuple[str, str]]:
    while query:
        section, _, query = query.partition("&" if "&" in query else ";")
        name, _, value = section.partition("=")
        if name:
            yield _unescape(name), _unescape(value)


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _unescape(text: str) -> str:
    if _BAD_ESCAPE.search(text):
        raise LibvirtURIError(f"in {text!r} a '%' is not followed by two hexadecimal digits")
    # A path is bytes to the kernel: what is no UTF-8 survives the way there and back.
    return unquote(text, errors="surrogateescape")


def _escape(text: str, safe: str = "") -> str:
    return quote(text, safe=safe, errors="surrogateescape")


@dataclass(frozen=True, slots=True)
class MigrationURIs:
    """The three URIs with which a source launcher migrates.

    Args:
        destination: libvirt on the target, through the libvirt channel's socket.
        migration: the memory, through the direct channel's.
        disks: the disks, through the block channel's.
    """

    destination: str
    migration: str
    disks: str


def migration_uris(run_dir: str, key: str, *, session: bool) -> MigrationURIs:
    """Build the URIs that reach the target through the source proxy's sockets.

    Args:
        run_dir: the launcher's run directory as the launcher sees it, absolute (LAUNCHER_RUN_DIR in a pod).
        key: the proxy's key.
        session: connect to qemu:///session (a non-root launcher) instead of qemu:///system.

    Raises:
        ProxyKeyError: see `check_key`.
        LibvirtURIError: run_dir is not absolute.
    """

    def socket(channel: Channel) -> str:
        return f"{run_dir.rstrip('/')}/{MIGRATION_PROXY_DIR}/{source_socket_name(key, channel)}"

    def memory_or_disks(channel: Channel) -> str:
        return str(LibvirtURI("unix", path=socket(channel)))

    destination = LibvirtURI(
        "qemu",
        "unix",
        path="/session" if session else "/system",
        params=(("socket", socket(Channel.LIBVIRT)),),
    )
    return MigrationURIs(str(destination), memory_or_disks(Channel.DIRECT), memory_or_disks(Channel.BLOCK))


def virsh_command(
    uris: MigrationURIs, domain: str, *, connect: str, parallel: int = 0, copy_storage: bool = False
) -> list[str]:
    """The command that migrates a domain by hand, as an argument vector.

    Args:
        uris: see `migration_uris`.
        domain: libvirt's name for the guest; NAMESPACE_NAME in KubeVirt.
        connect: the URI of the source's own libvirt.
        parallel: the number of multifd connections; 0 for one ordinary stream.
        copy_storage: copy the disks too, over the block channel.
    """
    command = ["virsh", "-c", connect, "migrate", "--live", "--p2p"]
    if parallel:
        command += ["--parallel", "--parallel-connections", str(parallel)]
    if copy_storage:
        command += ["--copy-storage-all", "--disks-uri", uris.disks]
    return [*command, domain, uris.destination, uris.migration]
