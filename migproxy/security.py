"""Chooses what protects this daemon's connections, from its options."""

from __future__ import annotations

from datetime import timedelta

from migproxy.pki import locate
from migproxy.settings import Settings
from migproxy.tls import MutualTLS, Plaintext, Security, SecurityError, TLSOptions
from migproxy.verify import Peers

__all__ = ["SecurityError", "security"]


def security(settings: Settings) -> Security:
    """Returns what protects this daemon's connections.

    Raises:
        SecurityError: mTLS cannot be had as it was asked for; says why, and what to do.
    """
    if settings.disable_tls:
        return Plaintext()
    pair = (settings.tls_cert, settings.tls_key) if settings.tls_cert and settings.tls_key else None
    server, client = locate(
        server=settings.tls_server_dir,
        client=settings.tls_client_dir,
        pair=pair,
        folder=settings.tls_dir,
        ca=settings.tls_ca,
    )
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
