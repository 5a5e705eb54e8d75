"""Chooses what protects this daemon's connections, from its options."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import structlog

from migproxy.safefiles import write_file
from migproxy.settings import KUBEVIRT_VERSIONS, Settings
from migproxy.tls import (
    UNKNOWN,
    Meeting,
    MutualTLS,
    Plaintext,
    Security,
    SecurityError,
    TLSOptions,
    parse_ciphers,
)
from migproxy.tlserrors import Reason, TLSError
from migproxy.transport import Transport
from migproxy.verify import Peers

if TYPE_CHECKING:
    from migproxy.kube.cluster import ClusterSettings

__all__ = ["ClusterSecurity", "OptionsSecurity", "SecurityError", "security"]

log = structlog.get_logger(__name__)

_WAIT_SECONDS = 10.0


def security(settings: Settings) -> Security:
    """Returns what protects this daemon's connections.

    Raises:
        SecurityError: mTLS cannot be had as it was asked for; says why, and what to do.
    """
    if settings.disable_tls:
        return Plaintext()
    server, client = settings.certificate_files()
    notice = settings.tls_expiry_warning
    return MutualTLS(
        TLSOptions(
            server=server,
            client=client,
            sources=Peers(settings.tls_client_names, settings.tls_externally_managed),
            targets=Peers(settings.tls_server_names, settings.tls_externally_managed),
            min_version=settings.tls_min_version,
            ciphers=settings.tls_ciphers,
            handshake_timeout=settings.handshake_timeout,
            ktls=settings.ktls,
            expiry_notice=None if notice is None else timedelta(hours=notice),
        )
    )


class OptionsSecurity:
    """Protects connections as the options say; other ones apply to connections from then on.

    Attributes:
        errors: See Security.
        problem: Why connections are not protected as they should be, None when they are.

    Args:
        settings: The options.

    Raises:
        SecurityError: mTLS cannot be had as it was asked for.
    """

    def __init__(self, settings: Settings) -> None:
        self.errors: Counter[Reason] = Counter()
        self.problem: str | None = None
        self._settings = settings
        self._current: Security | None = None
        self._changed = asyncio.Event()
        self.reconfigure(settings)

    def reconfigure(self, settings: Settings) -> None:
        """Follows other options.

        Raises:
            SecurityError: mTLS cannot be had as they ask for it; nothing has changed.
        """
        self._use(security(settings))
        self._settings = settings

    def _use(self, current: Security) -> None:
        current.errors = self.errors
        self._current = current
        self._changed.set()

    @property
    def encrypts(self) -> bool | None:
        """See Security."""
        return self._current is None or self._current.encrypts

    async def settled(self) -> None:
        """See Security: it is."""

    async def secure(
        self, tcp: socket.socket, *, server: bool, meeting: Meeting = UNKNOWN, commit: Callable[[], None] | None = None
    ) -> Transport:
        if self._current is None:
            raise TLSError(Reason.NO_CREDENTIALS, str(self.problem))
        return await self._current.secure(tcp, server=server, meeting=meeting, commit=commit)

    def report(self) -> dict[str, Any]:
        errors = {str(reason): count for reason, count in self.errors.items()}
        current = self._current.report() if self._current else {"mode": "none yet", "errors": errors}
        return current | {"problem": self.problem}

    async def watch(self) -> None:
        while True:
            self._changed.clear()
            watching = asyncio.create_task(self._current.watch()) if self._current else None
            try:
                await self._changed.wait()
            finally:
                if watching:
                    watching.cancel()
                    with suppress(asyncio.CancelledError):
                        await watching


class ClusterSecurity(OptionsSecurity):
    """Protects connections as the cluster's KubeVirt is configured; each option that is given beats KubeVirt's setting.

    Connections wait for KubeVirt's settings, which a daemon that has just started knows in a moment. Where nobody tells
    them for ten seconds, the options decide. What they do not suffice for (the CA is known from the cluster alone) has
    no connections: never plaintext, unless KubeVirt or an option asks for it. Connections that are open when a setting
    changes go on as they are.
    """

    _cluster: ClusterSettings | None = None

    def __init__(self, settings: Settings) -> None:
        self._settled = asyncio.Event()
        asyncio.get_running_loop().call_later(_WAIT_SECONDS, self._settled.set)
        super().__init__(settings)

    @property
    def encrypts(self) -> bool | None:
        """See Security."""
        return super().encrypts if self._settled.is_set() else None

    async def settled(self) -> None:
        """See Security."""
        await self._settled.wait()

    def reconfigure(self, settings: Settings) -> None:
        if self._cluster is not None:
            self._use(security(self._merged(settings, self._cluster)))
            self.problem = None
        else:
            try:
                super().reconfigure(settings)
            except SecurityError as error:
                self.problem = f"KubeVirt's settings are not known yet, and the options alone do not suffice: {error}"
            else:
                if settings.is_beside:  # whose proxy knows them, and serves until this daemon does
                    self.problem = "KubeVirt's settings are not known yet"
        self._settings = settings

    def apply(self, cluster: ClusterSettings) -> None:
        """Follows the cluster's settings, for connections from now on.

        Args:
            cluster: KubeVirt's settings, whenever they change.
        """
        self._cluster = cluster
        try:
            self._use(security(self._merged(self._settings, cluster)))
        except (SecurityError, OSError) as error:
            self.problem = f"KubeVirt's settings cannot be followed: {error}"
            log.error("KubeVirt's settings cannot be followed, the last good ones stay in use", error=str(error))
        else:
            self.problem = None
        self._settled.set()

    def _merged(self, settings: Settings, cluster: ClusterSettings) -> Settings:
        from migproxy.kube.cluster import Overrides, merge  # slow to import, and only needed with a cluster

        given = settings.model_fields_set
        merged = merge(
            cluster,
            Overrides(
                disable_tls=settings.disable_tls if "disable_tls" in given else None,
                min_tls=settings.tls_min_version if "tls_min_version" in given else None,
                ciphers=settings.tls_ciphers if "tls_ciphers" in given else None,
            ),
        )
        if merged.disable_tls != cluster.disable_tls:
            log.warning(
                "TLS is another than KubeVirt's",
                disable_tls=merged.disable_tls,
                kubevirt=cluster.disable_tls,
                remedy="every proxy of the cluster must agree: set migrations.disableTLS in the KubeVirt resource, or "
                "leave --disable-tls away",
            )
        changes: dict[str, Any] = {"disable_tls": merged.disable_tls, "tls_ciphers": merged.ciphers}
        if merged.min_tls:
            version = KUBEVIRT_VERSIONS.get(merged.min_tls, merged.min_tls)
            if version not in KUBEVIRT_VERSIONS.values():
                log.warning(
                    "KubeVirt's minTLSVersion is unknown, 1.2 is used", unknown=version, known=list(KUBEVIRT_VERSIONS)
                )
                version = "1.2"
            changes["tls_min_version"] = version
        if "tls_ciphers" not in given:
            min_version = changes.get("tls_min_version", settings.tls_min_version)
            changes["tls_ciphers"] = _usable(merged.ciphers, min_version)
        if merged.ca_bundle and not given & {"tls_ca", "tls_dir"}:
            changes["tls_ca"] = _keep(merged.ca_bundle, settings.cluster_ca)
        return settings.model_copy(update=changes)


def _usable(ciphers: tuple[str, ...], min_version: str) -> tuple[str, ...]:
    """KubeVirt's cipher suites less those that are never used; none, for the built-in ones, if too few are left."""
    suites = parse_ciphers(ciphers)
    left_out = suites.old + suites.unknown
    if ciphers and not suites.older and min_version == "1.2":
        log.warning("KubeVirt's ciphers have none of TLS 1.2 to use, the built-in list is used", left_out=ciphers)
        return ()
    if left_out:
        log.warning("KubeVirt's ciphers are used without those that are old or unknown", left_out=left_out)
    return tuple(name for name in ciphers if name not in left_out)


def _keep(bundle: str, path: str) -> str:
    """Puts KubeVirt's CA bundle into a file, where `migproxy doctor` finds it."""
    try:
        write_file(path, bundle)
    except OSError as error:
        raise SecurityError(f"cannot keep KubeVirt's CA in {path}: {error.strerror or error}") from error
    return path
