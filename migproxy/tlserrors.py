"""Why a connection was refused, or broke, for a reason of TLS."""

from __future__ import annotations

from enum import IntEnum, StrEnum


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
    OTHER_MIGRATION = "other_migration"
    BAD_CERTIFICATE = "bad_certificate"
    REFUSED_BY_PEER = "refused_by_peer"
    NO_CREDENTIALS = "no_credentials"
    NOT_OFFLOADED = "not_offloaded"
    TRUNCATED = "truncated"
    BAD_RECORD = "bad_record"
    KEY_UPDATE = "key_update"


class Alert(IntEnum):
    """What one end tells the other of its end (RFC 8446, 6)."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    HANDSHAKE_FAILURE = 40
    BAD_CERTIFICATE = 42
    UNSUPPORTED_CERTIFICATE = 43
    CERTIFICATE_REVOKED = 44
    CERTIFICATE_EXPIRED = 45
    CERTIFICATE_UNKNOWN = 46
    ILLEGAL_PARAMETER = 47
    UNKNOWN_CA = 48
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    DECRYPT_ERROR = 51
    PROTOCOL_VERSION = 70
    INSUFFICIENT_SECURITY = 71
    INTERNAL_ERROR = 80
    USER_CANCELED = 90
    NO_RENEGOTIATION = 100
    UNRECOGNIZED_NAME = 112
    CERTIFICATE_REQUIRED = 116


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


class RefusedByPeer(TLSError):
    """The peer has ended the connection with an alert.

    Args:
        alert: Its number.
    """

    def __init__(self, alert: int) -> None:
        name = f" ({Alert(alert).name.lower()})" if alert in set(Alert) else ""
        super().__init__(Reason.REFUSED_BY_PEER, f"the peer ended the connection with TLS alert {alert}{name}")
