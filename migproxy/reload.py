"""The configuration, read again while the daemon runs: what can change then does, for what comes after."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import structlog

from migproxy import logs
from migproxy.node import Node
from migproxy.proxy import Surroundings
from migproxy.security import OptionsSecurity, SecurityError
from migproxy.settings import RELOADED, Settings, SettingsError, option
from migproxy.sockets import TCPOptions
from migproxy.target import PortRange

log = structlog.get_logger(__name__)

_PROTECTION = {
    field for field in RELOADED if field.startswith("tls_") or field in ("disable_tls", "ktls", "handshake_timeout")
}


class Limits(TypedDict):
    """The fields of Surroundings that come from the options alone."""

    tcp: TCPOptions
    peer_timeout: float
    dial_timeout: float
    max_connections: int
    max_handshakes: int


def limits(settings: Settings) -> Limits:
    """What the options say of how connections are made."""
    return Limits(
        tcp=TCPOptions(settings.congestion_control),
        peer_timeout=settings.peer_timeout,
        dial_timeout=settings.dial_timeout,
        max_connections=settings.max_connections,
        max_handshakes=settings.max_handshakes,
    )


def port_range(settings: Settings) -> PortRange:
    """The ports that the options give to targets."""
    return PortRange(*(settings.port_range or (0, 0)))


def changed(old: Settings, new: Settings) -> tuple[set[str], set[str]]:
    """Compares two configurations.

    Returns:
        The fields that differ: those that a running daemon changes, and those that need a restart.
    """
    fields = {field for field in Settings.model_fields if getattr(old, field) != getattr(new, field)}
    # KubeVirt's own settings count where an option is not given, so that it matters whether a default was.
    fields |= old.model_fields_set ^ new.model_fields_set
    return fields & RELOADED, fields - RELOADED


def merge(old: Settings, new: Settings) -> Settings:
    """The configuration that is in force when a running daemon has read a new one."""
    sources = {field: new if field in RELOADED else old for field in Settings.model_fields}
    given = {field for field, source in sources.items() if field in source.model_fields_set}
    return Settings.model_construct(given, **{field: getattr(source, field) for field, source in sources.items()})


class Reloader:
    """Owns the configuration that is in force.

    Attributes:
        settings: That configuration.

    Args:
        read: Reads it again; raises SettingsError where it is wrong.
        node, around, protection: What it is told to.
    """

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings],
        node: Node,
        around: Surroundings,
        protection: OptionsSecurity,
    ) -> None:
        self.settings = settings
        self._read = read
        self._node = node
        self._around = around
        self._protection = protection

    def reload(self) -> None:
        """Reads the configuration again and follows it, for connections and migrations from now on.

        A wrong one changes nothing; what needs a restart is said, and stays.
        """
        try:
            wanted = self._read()
            now, later = changed(self.settings, wanted)
            new = merge(self.settings, wanted)
            if now & _PROTECTION:
                self._protection.reconfigure(new)
        except (SettingsError, SecurityError, OSError) as error:
            log.error("configuration is wrong: the old one stays in force", error=str(error))
            return
        self.settings = new
        for name, value in limits(new).items():
            setattr(self._around, name, value)
        if now & {"port_range", "retention"}:
            self._node.reconfigure(port_range(new), new.retention)
        logs.configure(new.log_format, new.log_level)
        log.info("configuration read again", changed=sorted(map(option, now)))
        if later:
            log.warning(
                "options have changed that need a restart",
                options=sorted(map(option, later)),
                remedy="restart the daemon: under systemd, systemctl restart costs no running migration",
            )
