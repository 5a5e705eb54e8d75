"""The daemon's options: each is a flag, an environment variable and a key of the configuration file.

They are declared once, here; the command line is made from the declaration, and values from all three places
are checked by it in the same way.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from migproxy.launcher import Launchers
from migproxy.pki import (
    CA_DIR,
    CLIENT_DIR,
    CLIENT_NAMES,
    OLDER_CLIENT_DIR,
    OLDER_CLIENT_NAME,
    SERVER_DIR,
    SERVER_NAMES,
    Files,
    locate,
)
from migproxy.portmap import IPAddress, parse_address, read_address
from migproxy.safefiles import read_regular
from migproxy.text import printable

KUBEVIRT_VERSIONS: Mapping[str, Literal["1.2", "1.3"]] = {
    "VersionTLS10": "1.2",
    "VersionTLS11": "1.2",
    "VersionTLS12": "1.2",
    "VersionTLS13": "1.3",
}
"""KubeVirt's names of the oldest TLS version, and what is spoken for them: nothing older than 1.2 ever is."""

_LONGEST_CONFIG = 1 << 20  # bytes
_KUBEVIRT_OWNER = (107, 107)  # the qemu user and group of KubeVirt's launcher images


class SettingsError(Exception):
    """Options are wrong; the message names each of them, where it was given, and why."""


def _pair(separator: str, text: object) -> object:
    if not isinstance(text, str):
        return text
    match = re.fullmatch(rf"(\d+){separator}(\d+)", text, re.ASCII)
    if match is None:
        raise ValueError(f"two numbers joined by {separator!r} are expected")
    return int(match[1]), int(match[2])


def _names(value: object) -> object:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _version(value: object) -> object:
    return KUBEVIRT_VERSIONS.get(value, value) if isinstance(value, str) else value


def _address(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("an IP address in quotes is expected")
    return parse_address(value)


def _port_range(value: object) -> object:
    pair = _pair("-", value)
    if isinstance(pair, tuple) and not 1 <= pair[0] <= pair[1] <= 65535:
        raise ValueError("ports go from 1 to 65535, the lower one first")
    return pair


def parse_listen(text: str) -> tuple[str, int] | None:
    """Where to serve HTTP: the address ("" for all) and port (0: the kernel's choice), None for nowhere.

    Raises:
        ValueError: `text` is neither [ADDRESS]:PORT nor "off".
    """
    if text == "off":
        return None
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535 or (":" in bare and host == bare):
        raise ValueError("[ADDRESS]:PORT (an IPv6 ADDRESS in brackets), :PORT, or off is expected")
    return str(read_address(bare)) if bare else "", int(port)


class Settings(BaseModel):
    """What `migproxy run` is told. Each field's description is the option's help text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node_name: str = Field(
        default_factory=lambda: os.uname().nodename,
        min_length=1,
        description="This node's name, as the VMIs' status and labels have it. Default: the host name.",
    )
    vmi_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder (or single file) of VMIs in YAML or JSON, as `kubectl get vmis -A -o yaml` prints them, "
        "instead of a cluster. Read again whenever it changes; the target's address and ports are written into it.",
    )
    kubeconfig: str | None = Field(
        None,
        min_length=1,
        description="kubeconfig of the cluster whose API server tells the VMIs. Default: the pod's service account.",
    )
    context: str | None = Field(None, min_length=1, description="The kubeconfig's context. Default: its current one.")
    kubevirt_namespace: str = Field(
        "kubevirt",
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        description="Namespace in which KubeVirt is installed, whose settings and CA are followed.",
    )
    migration_interface: str = Field(
        "migration0", min_length=1, description="Interface whose first global-unicast address is the migration address."
    )
    migration_address: Annotated[IPAddress | None, BeforeValidator(_address)] = Field(
        None, description="The migration address itself, instead of an interface's."
    )
    pod_ip: Annotated[IPAddress | None, BeforeValidator(_address)] = Field(
        None,
        description="The migration address where the interface does not exist. Also read from MY_POD_IP.",
        json_schema_extra={"env": "MY_POD_IP"},
    )
    publish_status: bool = Field(
        False,
        description="In a cluster: publish in the VMIs' status where targets listen, instead of virt-handler, whose "
        "migration proxy must be switched off or patched away, as an account that KubeVirt lets write it. Without it, "
        "migproxy runs beside virt-handler, which goes on publishing.",
    )
    port_range: Annotated[tuple[int, int] | None, BeforeValidator(_port_range)] = Field(
        None, description="LOW-HIGH: ports that targets listen on. Default: the kernel's choice."
    )
    launcher_run_dir: str = Field(
        "/proc/{pid}/root/var/run",
        description="Where a launcher's /var/run is, seen from here; may use {pid} (found by the launcher's command "
        "socket), {uid}, {namespace} and {name} (the VMI's).",
    )
    pods_dir: str = Field("/var/lib/kubelet/pods", description="The kubelet's pods folder, to find {pid}.")
    libvirt_socket: str = Field(
        "libvirt/virtqemud-sock",
        pattern=r"^[^/].*$",
        description="The target libvirt's socket, below the launcher's /var/run (libvirt/libvirt-sock for libvirtd).",
    )
    socket_owner: Annotated[tuple[int, int] | None, BeforeValidator(lambda value: _pair(":", value))] = Field(
        None,
        description="UID:GID that the source's socket files are given, which QEMU and libvirt run as. "
        "Default: 107:107 (KubeVirt's qemu) under Kubernetes, otherwise the owner of the launcher's kubevirt folder.",
    )
    congestion_control: str = Field(
        "cubic",
        pattern=r"^[a-z0-9_]+$",
        description="TCP congestion control of the migration's connections; `system` leaves the system's default.",
    )
    peer_timeout: float = Field(
        180.0,
        ge=1,
        le=900,
        description="Seconds without an answer of the other node's kernel after which a connection counts as broken. A "
        "launcher there that reads slowly, or not at all, breaks none.",
    )
    dial_timeout: float = Field(
        10.0, gt=0, le=600, description="Seconds to try to connect the other leg: the target node, or QEMU's socket."
    )
    max_connections: int = Field(
        128,
        ge=1,
        le=65536,
        description="Open connections per channel of a migration; further ones wait. QEMU opens nine for memory "
        "(KubeVirt's multifd) and one for each disk. A node that is full has fewer: see docs/observability.md.",
    )
    drain_timeout: float = Field(
        600.0, ge=0, description="Seconds that SIGTERM waits for running migrations. A second SIGTERM ends them."
    )
    disable_tls: bool = Field(
        False,
        description="Relay in plaintext: whoever is on the migration network can read and alter the guests' memory.",
    )
    tls_dir: str | None = Field(
        None,
        description="Folder of ca.crt and, for both roles or in folders `server` and `client` for each, tls.crt and "
        "tls.key, as `migproxy certs` makes it.",
    )
    tls_cert: str | None = Field(None, description="Certificate for both roles, PEM; with --tls-key.")
    tls_key: str | None = Field(None, description="Key of --tls-cert, PEM.")
    tls_server_dir: str | None = Field(
        None, description=f"Folder of tls.crt and tls.key for the target's role. Default: {SERVER_DIR}, virt-handler's."
    )
    tls_client_dir: str | None = Field(
        None,
        description=f"Folder of tls.crt and tls.key for the source's role. Default: {CLIENT_DIR}, virt-handler's, or "
        f"{OLDER_CLIENT_DIR}, an older one's, where the first does not exist.",
    )
    tls_ca: str | None = Field(
        None,
        description="CA bundle that the other nodes' certificates are verified by, PEM; or a folder with ca.crt or "
        f"ca-bundle. Default: {CA_DIR}, where the ConfigMap kubevirt-ca is to be mounted.",
    )
    tls_client_names: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        CLIENT_NAMES,
        description="Common names of the sources that a target accepts, separated by commas. Add "
        f"{OLDER_CLIENT_NAME} only where KubeVirt is so old that its sources have that name.",
    )
    tls_server_names: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        SERVER_NAMES, description="Common names of the targets that a source accepts, separated by commas."
    )
    tls_externally_managed: bool = Field(
        False,
        description="The cluster's own PKI issues the certificates: accept intermediates, do not check common names.",
    )
    tls_min_version: Annotated[Literal["1.2", "1.3"], BeforeValidator(_version)] = Field(
        "1.2",
        description="Oldest version of TLS: 1.2 or 1.3 (or KubeVirt's names; VersionTLS10 and VersionTLS11 mean 1.2).",
    )
    tls_ciphers: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (),
        description="Cipher suites of TLS 1.2 and 1.3, best first, separated by commas, by OpenSSL's names or "
        "KubeVirt's (tlsConfiguration.ciphers). Default: ECDHE with AES-GCM or ChaCha20; where none of 1.3 is named, "
        "all of them.",
    )
    handshake_timeout: float = Field(10.0, gt=0, le=600, description="Seconds for a TLS handshake.")
    max_handshakes: int = Field(
        256,
        ge=1,
        le=65536,
        description="Unfinished TLS handshakes per channel of a migration; beyond it, one is given up whose peer has "
        "said nothing, the oldest first, of the newcomer's own address where that has a quarter of all.",
    )
    ktls: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Kernel TLS, which encrypts without a copy: `auto` where the kernel can, `on` to refuse to start "
        "where it cannot, `off`.",
    )
    tls_expiry_warning: float | None = Field(
        None,
        ge=0,
        description="Hours before a certificate's end to warn. Default: the last third of its life, two weeks at most.",
    )
    control_socket: str = Field(
        "/run/migproxy/control.sock",
        max_length=107,
        description="Unix socket on which the daemon answers `migproxy status`.",
    )
    relay_socket: str | None = Field(
        None,
        min_length=1,
        max_length=107,
        description="Unix socket of `migproxy relay`, which moves the bytes. Default: beside the control socket.",
    )
    relay_externally_managed: bool = Field(
        False, description="Never start a relay: systemd or Kubernetes does. Without it, one is started and stays."
    )
    http_listen: str = Field(
        ":9470",
        description="[ADDRESS]:PORT on which metrics, health and the status page are served over HTTP; without an "
        "ADDRESS on all of them, IPv4 and IPv6. `off` for none.",
    )
    http_tls_cert: str | None = Field(
        None, min_length=1, description="PEM file of the certificate (and its chain) that makes it HTTPS."
    )
    http_tls_key: str | None = Field(None, min_length=1, description="PEM file of that certificate's key.")
    retention: float = Field(
        300.0,
        ge=0,
        le=86400,
        description="Seconds that an ended migration is still shown and exported, to be scraped.",
    )
    log_format: Literal["auto", "console", "json", "journald"] = Field(
        "auto",
        description="`console`, `json`, `journald` (fields, to systemd's journal), or `auto`: the journal where "
        "standard error leads there, console on a terminal, else json.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )

    @field_validator("http_listen")
    @classmethod
    def _listen_address(cls, value: str) -> str:
        parse_listen(value)
        return value

    @model_validator(mode="after")
    def _whole_pair(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both, or a folder of both")
        if (self.http_tls_cert is None) != (self.http_tls_key is None):
            raise ValueError("--http-tls-cert and --http-tls-key are given together, or neither")
        if self.publish_status and self.vmi_dir is not None:
            raise ValueError("--publish-status is about a cluster: with --vmi-dir, the status is always published")
        return self

    @field_validator("kubeconfig")
    @classmethod
    def _one_inventory(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("vmi_dir") is not None:
            raise ValueError("--vmi-dir is given too: VMIs come from the one or from the other")
        return value

    @field_validator("context")
    @classmethod
    def _context_of_a_kubeconfig(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("kubeconfig") is None:
            raise ValueError("there is no --kubeconfig that could have a context")
        return value

    @field_validator("launcher_run_dir")
    @classmethod
    def _known_placeholders(cls, value: str) -> str:
        Launchers(pattern=value, pods="/")
        return value

    @property
    def is_beside(self) -> bool:
        """Whether virt-handler publishes, and this daemon announces."""
        return self.vmi_dir is None and not self.publish_status

    @property
    def relay_path(self) -> str:
        """The relay's socket: by default beside the control socket."""
        return self.relay_socket or os.path.splitext(self.control_socket)[0] + ".relay.sock"

    @property
    def cluster_ca(self) -> str:
        """Where the CA bundle is kept that the API server has: beside the control socket."""
        return os.path.join(os.path.dirname(self.control_socket) or ".", "kubevirt-ca.crt")

    @property
    def daemon_lock(self) -> str:
        """What the daemon locks while it lives, beside virt-handler: beside the control socket."""
        return os.path.splitext(self.control_socket)[0] + ".daemon.lock"

    @property
    def failsafe_lock(self) -> str:
        """What the failsafe locks while it lives: beside the control socket."""
        return os.path.splitext(self.control_socket)[0] + ".failsafe.lock"

    @property
    def owner_of_sockets(self) -> tuple[int, int] | None:
        """User and group of the sources' sockets, None for the owner of the launcher's folder."""
        return self.socket_owner or (_KUBEVIRT_OWNER if self.vmi_dir is None else None)

    def certificate_files(self, ca: str | None = None) -> tuple[Files, Files]:
        """The files of the target's role and of the source's.

        Args:
            ca: The CA bundle, instead of `tls_ca`.
        """
        return locate(
            server=self.tls_server_dir,
            client=self.tls_client_dir,
            pair=(self.tls_cert, self.tls_key) if self.tls_cert and self.tls_key else None,
            folder=self.tls_dir,
            ca=ca or self.tls_ca,
        )


RELOADED = frozenset(
    {
        *("port_range", "congestion_control", "peer_timeout", "dial_timeout", "max_connections", "drain_timeout"),
        *("disable_tls", "tls_dir", "tls_cert", "tls_key", "tls_server_dir", "tls_client_dir", "tls_ca"),
        *("tls_client_names", "tls_server_names", "tls_externally_managed", "tls_min_version", "tls_ciphers"),
        *("handshake_timeout", "max_handshakes", "ktls", "tls_expiry_warning"),
        *("retention", "log_format", "log_level"),
    }
)
"""The fields that a running daemon changes when it reads its configuration again; the others need a restart."""


def option(field: str) -> str:
    """The flag of a field: port_range -> --port-range."""
    return "--" + key(field)


def key(field: str) -> str:
    """A field's name in the configuration file: port_range -> port-range."""
    return field.replace("_", "-")


def variables(field: str) -> list[str]:
    """The environment variables of a field, the first one preferred."""
    extra = Settings.model_fields[field].json_schema_extra
    also = [str(extra["env"])] if isinstance(extra, dict) else []
    return [f"MIGPROXY_{field.upper()}", *also]


def load(given: Mapping[str, Any], origins: Mapping[str, str], config: str | None) -> Settings:
    """Merges and checks the options.

    Args:
        given: Values from the command line and the environment, by field; they win over the file's.
        origins: Where each of those was given, for messages.
        config: Path of a TOML file with the flags' names (without dashes in front) as keys, or None.

    Raises:
        SettingsError: A value is wrong, an option is unknown, or the file cannot be read.
    """
    values, where = _read(config) if config else ({}, {})
    values |= given
    where |= origins
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [_explain(dict(problem), where) for problem in error.errors()]
        raise SettingsError("\n".join(lines)) from error


def _read(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        table = tomllib.loads(read_regular(path, _LONGEST_CONFIG).decode())
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"--config {path}: not TOML in UTF-8: {error}") from error
    unknown = sorted(set(table) - {key(field) for field in Settings.model_fields})
    if unknown:
        raise SettingsError(
            "\n".join(
                f"{path}: {printable(name)}: there is no such option; see `migproxy run --help`" for name in unknown
            )
        )
    values = {name.replace("-", "_"): value for name, value in table.items()}
    return values, {field: f"{path}: {key(field)}" for field in values}


def _explain(problem: dict[str, Any], where: Mapping[str, str]) -> str:
    if not problem["loc"]:  # about several options: names them itself
        return str(problem["msg"].removeprefix("Value error, "))
    field = str(problem["loc"][0])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where.get(field, option(field))}: {problem['input']!r}: {message}"
