"""Why a connection was refused, or broke, for a reason of TLS."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a connection was refused, or broke: the values in logs, in the status and in metrics."""

    TIMEOUT = "handshake_timeout"
    DISPLACED = "handshake_displaced"
    CLOSED = "closed_in_handshake"
    NOT_TLS = "not_tls"
    VERSION = "wrong_version"
    CIPHER = "no_shared_cipher"
    HANDSHAKE = "handshake_failed"
    NO_CERTIFICATE = "no_certificate"
    SELF_SIGNED = "self_signed"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    WRONG_CA = "wrong_ca"
    INTERMEDIATE = "intermediate_ca"
    CA_AS_LEAF = "ca_as_leaf"
    WRONG_USAGE = "wrong_usage"
    WRONG_NAME = "wrong_name"
    BAD_CERTIFICATE = "bad_certificate"
    REFUSED_BY_PEER = "refused_by_peer"
    NO_CREDENTIALS = "no_credentials"
    NOT_OFFLOADED = "not_offloaded"
    TRUNCATED = "truncated"
    BAD_RECORD = "bad_record"
    KEY_UPDATE = "key_update"


class TLSError(OSError):
    """A connection that was refused, or that broke, for a reason of TLS.

    Attributes:
        reason: Which one.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Truncated(TLSError):
    """A stream that ended without a close_notify."""

    def __init__(self) -> None:
        super().__init__(Reason.TRUNCATED, "the peer ended the stream without a close_notify: it may be truncated")
