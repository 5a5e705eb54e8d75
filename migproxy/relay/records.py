"""The TLS record layer after a handshake: bytes to records and back, by keys that the handshake agreed on. Pure.

TLS 1.3 (RFC 8446) and TLS 1.2 (RFC 5246) with AES-GCM (RFC 5288) and ChaCha20-Poly1305 (RFC 7905). Each direction is
an object of its own; the two meet where a peer asks for new keys (`Opener.is_asked`).
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from migproxy.tlserrors import Reason, TLSError, Truncated

RECORD: Final = 1 << 14
"""Bytes of data that a record holds at most (RFC 8446, 5.1)."""

SLOT: Final = RECORD + 1
"""Bytes from one record's data to the next one's where they are sealed from: TLS 1.3 puts a byte behind them."""

MOST_ADDED: Final = 5 + 8 + 16
"""Bytes that a record adds to its data at most: its header, an explicit nonce, the tag."""

MOST_SEALED: Final = SLOT + MOST_ADDED
"""Bytes of the longest record that is taken: so much has to be kept until it is whole."""

RENEWED: Final = 1 << 24
"""Records after which AES-GCM takes other keys; about as many are safe (RFC 8446, 5.5)."""

_HEADER = struct.Struct("!BHH")
_LEGACY = 0x0303
_TAG = 16
_EXPLICIT = 8  # bytes of AES-GCM's nonce in a record of TLS 1.2 (RFC 5288, 3)
_CHANGE, _ALERT, _HANDSHAKE, _DATA = 20, 21, 22, 23
_HELLO_REQUEST, _CLIENT_HELLO, _TICKET, _KEY_UPDATE = 0, 1, 4, 24
_WARNING, _FATAL = 1, 2
_MOST_USELESS = 32  # records without data, one after the other: as many as OpenSSL takes
_MOST_MESSAGE = 1 << 17  # bytes of a handshake message: a ticket's most


class Version(IntEnum):
    """Of TLS, as a record has it."""

    TLS_1_2 = 0x0303
    TLS_1_3 = 0x0304


class Cipher(StrEnum):
    """How records are encrypted."""

    AES_128_GCM = "AES-128-GCM"
    AES_256_GCM = "AES-256-GCM"
    CHACHA20 = "CHACHA20-POLY1305"

    @property
    def key_length(self) -> int:
        """Bytes of a key."""
        return 16 if self is Cipher.AES_128_GCM else 32

    @property
    def hash(self) -> str:
        """The hash of its suite of TLS 1.3 (RFC 8446, B.4)."""
        return "sha384" if self is Cipher.AES_256_GCM else "sha256"


class Alert(IntEnum):
    """What one end tells the other of its end (RFC 8446, 6)."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    PROTOCOL_VERSION = 70
    USER_CANCELED = 90
    NO_RENEGOTIATION = 100


class RecordError(TLSError):
    """A record that ends the connection.

    Attributes:
        alert: What the peer is to be told.
    """

    def __init__(self, alert: Alert, message: str) -> None:
        super().__init__(Reason.BAD_RECORD, message)
        self.alert = alert


@dataclass(slots=True, repr=False)
class Keys:
    """What one direction is encrypted with; the arrays are wiped when they are not needed any more.

    Attributes:
        key: See `Cipher.key_length`.
        iv: 12 bytes; 4 for AES-GCM in TLS 1.2, where each record has the rest.
        sequence: The number of the next record.
        secret: The traffic secret, of which the next keys are made; empty in TLS 1.2.
    """

    version: Version
    cipher: Cipher
    key: bytearray
    iv: bytearray
    sequence: int = 0
    secret: bytearray = field(default_factory=bytearray)

    @classmethod
    def of_secret(cls, cipher: Cipher, secret: bytes | bytearray, sequence: int = 0) -> Keys:
        """Makes TLS 1.3's (RFC 8446, 7.3)."""
        key = _expand(cipher, secret, b"key", cipher.key_length)
        return cls(Version.TLS_1_3, cipher, key, _expand(cipher, secret, b"iv", 12), sequence, bytearray(secret))

    def next(self) -> Keys:
        """Makes those that come after these (RFC 8446, 7.2), which are wiped."""
        secret = _expand(self.cipher, self.secret, b"traffic upd", len(self.secret))
        made = Keys.of_secret(self.cipher, secret)
        _wipe(secret)
        self.wipe()
        return made

    def wipe(self) -> None:
        """Overwrites them."""
        for part in (self.key, self.iv, self.secret):
            _wipe(part)


def _wipe(part: bytearray) -> None:
    part[:] = bytes(len(part))


def _expand(cipher: Cipher, secret: bytes | bytearray, label: bytes, length: int) -> bytearray:
    """HKDF-Expand-Label (RFC 8446, 7.1) with no context; never longer than one block of the hash."""
    label = b"tls13 " + label
    info = struct.pack("!HB", length, len(label)) + label + b"\0\1"
    return bytearray(hmac.digest(bytes(secret), info, cipher.hash)[:length])


class _Direction:
    """What sealing and opening share: the cipher, and the number of the next record.

    Args:
        keys: Owned from now on.
    """

    def __init__(self, keys: Keys) -> None:
        self._use(keys)

    def _use(self, keys: Keys) -> None:
        self._keys = keys
        self._aead = ChaCha20Poly1305(keys.key) if keys.cipher is Cipher.CHACHA20 else AESGCM(keys.key)
        self._is_1_3 = keys.version is Version.TLS_1_3
        self._explicit = 0 if self._is_1_3 or keys.cipher is Cipher.CHACHA20 else _EXPLICIT
        self._iv = int.from_bytes(keys.iv.ljust(12, b"\0"), "big")
        self._sequence = self._first = keys.sequence
        _wipe(keys.key)

    @property
    def is_worn(self) -> bool:
        """Whether it is time for other keys."""
        used = self._sequence - self._first
        return self._is_1_3 and self._keys.cipher is not Cipher.CHACHA20 and used >= RENEWED

    def _renew(self) -> None:
        self._use(self._keys.next())

    def close(self) -> None:
        """Forgets the keys."""
        self._keys.wipe()
        del self._aead


class Sealer(_Direction):
    """Makes records of what one end sends."""

    def seal(self, plain: memoryview, count: int, wire: memoryview) -> int:
        """Seals data.

        Args:
            plain: Holds the data, RECORD bytes at the beginning of each SLOT; the byte behind each is overwritten.
            count: How much there is.
            wire: Where to; MOST_ADDED more for each record, and for one more.

        Returns:
            Bytes of `wire` that are to be sent.
        """
        done = slot = 0
        if self.is_worn:
            done = self._seal(_HANDSHAKE, _update(asks=False), wire, 0)
            self._renew()
        while count:
            size = min(count, RECORD)
            done += self._seal(_DATA, plain[slot : slot + size + 1], wire, done)
            slot += SLOT
            count -= size
        return done

    def _seal(self, kind: int, body: memoryview, wire: memoryview, at: int) -> int:
        """Seals one record, whose body has a byte to spare at its end; returns its length."""
        sequence, explicit = self._sequence, self._explicit
        nonce = (self._iv ^ sequence).to_bytes(12, "big")
        start = at + _HEADER.size + explicit
        if self._is_1_3:
            body[-1] = kind
            aad = _HEADER.pack(_DATA, _LEGACY, len(body) + _TAG)
            wire[at : at + _HEADER.size] = aad
        else:
            body = body[:-1]
            number = sequence.to_bytes(8, "big")
            aad = number + _HEADER.pack(kind, _LEGACY, len(body))
            wire[at:start] = _HEADER.pack(kind, _LEGACY, explicit + len(body) + _TAG) + number[:explicit]
        end = start + len(body) + _TAG
        self._aead.encrypt_into(nonce, body, aad, wire[start:end])
        self._sequence = sequence + 1
        return end - at

    def _record(self, kind: int, body: memoryview) -> bytes:
        wire = memoryview(bytearray(len(body) + MOST_ADDED))
        return bytes(wire[: self._seal(kind, body, wire, 0)])

    def alert(self, alert: Alert) -> bytes:
        """Makes the record that tells the peer of the end."""
        level = _WARNING if alert in (Alert.CLOSE_NOTIFY, Alert.NO_RENEGOTIATION) else _FATAL
        return self._record(_ALERT, memoryview(bytearray((level, alert, 0))))

    def update(self, *, asks: bool) -> bytes:
        """Makes the record after which other keys are used, in TLS 1.3.

        Args:
            asks: Asks the peer to do the same.
        """
        record = self._record(_HANDSHAKE, _update(asks=asks))
        self._renew()
        return record


def _update(*, asks: bool) -> memoryview:
    return memoryview(bytearray((_KEY_UPDATE, 0, 0, 1, asks, 0)))


class Opener(_Direction):
    """Takes records apart that the peer sent.

    Args:
        keys: Owned from now on.
        is_client: This end is TLS's client, which a server may send tickets.

    Attributes:
        ended: The peer has said that nothing follows.
        is_asked: The peer has asked for other keys (`Sealer.update`); the owner takes it back.
    """

    def __init__(self, keys: Keys, *, is_client: bool) -> None:
        super().__init__(keys)
        self.ended = self.is_asked = False
        self._is_client = is_client
        self._useless = 0
        self._message = bytearray()
        self._failure: TLSError | None = None

    def open(self, wire: memoryview, plain: memoryview) -> tuple[int, int]:
        """Opens the whole records at the beginning of what has arrived, as far as there is room.

        Args:
            wire: What has arrived and was not taken yet; a buffer that takes MOST_SEALED is long enough.
            plain: Where to; SLOT bytes at least.

        Returns:
            Bytes of `wire` that were taken, and of `plain` that were filled: data, each byte's record authentic.

        Raises:
            RecordError: The next record ends the connection; every one before it has been opened.
            TLSError: The peer has ended the connection with an alert.
        """
        taken = filled = 0
        while not (self.ended or self._failure) and len(plain) - filled >= SLOT:
            try:
                arrived = len(wire) - taken
                if arrived < _HEADER.size or arrived < (length := self._length(wire, taken)):
                    break
                kind, size = self._open(wire[taken : taken + length], plain[filled:])
                taken += length
                if kind == _DATA and size and not self._message:
                    filled += size
                    self._useless = 0
                else:
                    self._heed(kind, bytes(plain[filled : filled + size]))
            except TLSError as error:
                self._failure = error
        if self._failure and not filled:
            raise self._failure
        return taken, filled

    def end_of_stream(self) -> None:
        """To be called when nothing follows in the stream below.

        Raises:
            Truncated: The peer had not said so, or a record is cut off.
        """
        if not self.ended:
            raise Truncated

    def _length(self, wire: memoryview, at: int) -> int:
        """The length of a record with its header, of which the header has arrived."""
        kind, version, length = _HEADER.unpack_from(wire, at)
        if self._is_1_3:
            if kind != _DATA:
                raise RecordError(Alert.UNEXPECTED_MESSAGE, f"a record of type {kind} that is not encrypted")
            most = SLOT + _TAG
        else:
            if version != _LEGACY:
                raise RecordError(Alert.PROTOCOL_VERSION, f"a record of version {version:#06x}")
            most = RECORD + self._explicit + _TAG
        if length > most:
            raise RecordError(Alert.RECORD_OVERFLOW, f"a record of {length} bytes")
        if length < self._explicit + _TAG:
            raise RecordError(Alert.BAD_RECORD_MAC, f"a record of {length} bytes, too short to be authentic")
        return _HEADER.size + int(length)

    def _open(self, record: memoryview, plain: memoryview) -> tuple[int, int]:
        """Decrypts a whole record; returns its type, and how much it holds."""
        kind, sequence = record[0], self._sequence
        start = _HEADER.size + self._explicit
        size = len(record) - start - _TAG
        if self._is_1_3:
            nonce, aad = self._iv ^ sequence, bytes(record[: _HEADER.size])
        else:
            nonce = self._iv ^ (int.from_bytes(record[_HEADER.size : start], "big") if self._explicit else sequence)
            aad = sequence.to_bytes(8, "big") + _HEADER.pack(kind, _LEGACY, size)
        try:
            self._aead.decrypt_into(nonce.to_bytes(12, "big"), record[start:], aad, plain[:size])
        except InvalidTag as error:
            raise RecordError(Alert.BAD_RECORD_MAC, "a record does not decrypt: the stream was altered") from error
        self._sequence = sequence + 1
        return self._inner(plain, size) if self._is_1_3 else (kind, size)

    @staticmethod
    def _inner(plain: memoryview, size: int) -> tuple[int, int]:
        """The type that TLS 1.3 hides at the end of a record, before its padding (RFC 8446, 5.4)."""
        if size and plain[size - 1]:
            return plain[size - 1], size - 1
        size = len(bytes(plain[:size]).rstrip(b"\0"))
        if not size:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, "a record of padding alone")
        return plain[size - 1], size - 1

    def _heed(self, kind: int, body: bytes) -> None:
        """Does what a record without data says."""
        self._useless += 1
        if self._useless > _MOST_USELESS:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, "records without end that hold no data")
        if self._message and kind != _HANDSHAKE:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, "a handshake message that is interrupted")
        if kind == _ALERT:
            self._heed_alert(body)
        elif kind == _HANDSHAKE and body:
            self._message += body
            while message := self._next_message():
                self._heed_message(*message)
        elif kind != _DATA:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, f"a record of type {kind} with {len(body)} bytes")

    def _heed_alert(self, body: bytes) -> None:
        if len(body) != 2:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, f"an alert of {len(body)} bytes")
        level, number = body
        if number == Alert.CLOSE_NOTIFY:
            self.ended = True
        elif number != Alert.USER_CANCELED and (self._is_1_3 or level != _WARNING):
            raise TLSError(Reason.REFUSED_BY_PEER, f"the peer ended the connection with TLS alert {number}")

    def _next_message(self) -> tuple[int, bytes] | None:
        """Takes the next handshake message, if it is whole (RFC 8446, 4)."""
        if len(self._message) < 4:
            return None
        end = 4 + int.from_bytes(self._message[1:4], "big")
        if end > _MOST_MESSAGE:
            raise RecordError(Alert.ILLEGAL_PARAMETER, f"a handshake message of {end} bytes")
        if len(self._message) < end:
            return None
        kind, body = self._message[0], bytes(self._message[4:end])
        del self._message[:end]
        return kind, body

    def _heed_message(self, kind: int, body: bytes) -> None:
        if not self._is_1_3 and kind == (_HELLO_REQUEST if self._is_client else _CLIENT_HELLO):
            raise RecordError(Alert.NO_RENEGOTIATION, "the peer wants another handshake, which is not allowed")
        if self._is_1_3 and kind == _TICKET and self._is_client:
            return  # for a resumption, which nobody does
        if not self._is_1_3 or kind != _KEY_UPDATE:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, f"a handshake message of type {kind}")
        if len(body) != 1:
            raise RecordError(Alert.DECODE_ERROR, f"a KeyUpdate of {len(body)} bytes")
        if body[0] > 1:
            raise RecordError(Alert.ILLEGAL_PARAMETER, f"a KeyUpdate that asks for {body[0]}")
        if self._message:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, "a KeyUpdate that is not the last in its record")
        self.is_asked = self.is_asked or bool(body[0])
        self._renew()
