"""The TLS record layer after a handshake: bytes to records and back, by keys that the handshake agreed on. Pure.

TLS 1.3 (RFC 8446) and TLS 1.2 (RFC 5246) with AES-GCM (RFC 5288) and ChaCha20-Poly1305 (RFC 7905). Each direction is
an object of its own; the two meet where a peer asks for new keys (`Opener.is_asked`).
"""

from __future__ import annotations

import hmac
import math
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from migproxy.tlserrors import Alert, Reason, RefusedByPeer, TLSError, Truncated

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

HEADER: Final = 5
"""Bytes of a record before what it holds: type, version, length."""

_HEADER = struct.Struct("!BHH")
_LEGACY = 0x0303
_TAG = 16
_EXPLICIT = 8  # bytes of AES-GCM's nonce in a record of TLS 1.2 (RFC 5288, 3)
_CHANGE, _ALERT, _HANDSHAKE, _DATA = 20, 21, 22, 23
_HELLO_REQUEST, _CLIENT_HELLO, _TICKET, _KEY_UPDATE = 0, 1, 4, 24
_WARNING, _FATAL = 1, 2
_FULL = _HEADER.pack(_DATA, _LEGACY, SLOT + _TAG)  # the header of TLS 1.3's record of as much data as there can be
_FULL_SIZE: Final = HEADER + SLOT + _TAG
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


_CIPHERS = tuple(Cipher)
_PACKED = struct.Struct("!HBQ")  # version, cipher, number of the next record
MOST_KEYS: Final = 512
"""Bytes of what `pack` writes: two cipher suites' keys of any kind have room there."""


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

    def copy(self) -> Keys:
        """Makes the same ones again, for a while: whoever gets them wipes them."""
        parts = (bytearray(self.key), bytearray(self.iv))
        return Keys(self.version, self.cipher, *parts, self.sequence, bytearray(self.secret))

    def next(self) -> Keys:
        """Makes those that come after these (RFC 8446, 7.2), which are wiped."""
        secret = _expand(self.cipher, self.secret, b"traffic upd", len(self.secret))
        made = Keys.of_secret(self.cipher, secret)
        wipe(secret)
        self.wipe()
        return made

    def wipe(self) -> None:
        """Overwrites them."""
        for part in (self.key, self.iv, self.secret):
            wipe(part)


def wipe(part: bytearray) -> None:
    """Overwrites what nobody is to find there any more, and empties it."""
    part[:] = bytes(len(part))
    part.clear()


def _expand(cipher: Cipher, secret: bytes | bytearray, label: bytes, length: int) -> bytearray:
    """HKDF-Expand-Label (RFC 8446, 7.1) with no context; never longer than one block of the hash."""
    label = b"tls13 " + label
    info = struct.pack("!HB", length, len(label)) + label + b"\0\1"
    return bytearray(hmac.digest(secret, info, cipher.hash)[:length])


class _Direction:
    """What sealing and opening share: the cipher, and the number of the next record.

    Args:
        keys: Owned from now on.
        renews: The peer can follow when keys change. Kernel TLS cannot before Linux 6.14.
    """

    def __init__(self, keys: Keys, *, renews: bool = True) -> None:
        self._renews = renews
        self._use(keys)

    def _use(self, keys: Keys) -> None:
        self._keys = keys
        self._aead = ChaCha20Poly1305(keys.key) if keys.cipher is Cipher.CHACHA20 else AESGCM(keys.key)
        self._is_1_3 = keys.version is Version.TLS_1_3
        self._explicit = 0 if self._is_1_3 or keys.cipher is Cipher.CHACHA20 else _EXPLICIT
        self._iv = int.from_bytes(keys.iv.ljust(12, b"\0"), "big")
        self._sequence = keys.sequence
        wears = self._renews and self._is_1_3 and keys.cipher is not Cipher.CHACHA20
        self._worn_at = keys.sequence + RENEWED if wears else math.inf
        wipe(keys.key)

    @property
    def is_worn(self) -> bool:
        """Whether it is time for other keys."""
        return self._sequence >= self._worn_at

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
        if self._is_1_3 and count >= RECORD:
            full = count // RECORD
            self._seal_full(plain, full, wire, done)
            done += full * _FULL_SIZE
            slot += full * SLOT
            count -= full * RECORD
        while count:
            size = min(count, RECORD)
            done += self._seal(_DATA, plain[slot : slot + size + 1], wire, done)
            slot += SLOT
            count -= size
        return done

    def _seal_full(self, plain: memoryview, records: int, wire: memoryview, at: int) -> None:
        """Does what `_seal` does, where nearly all bytes are: with full records of data, in TLS 1.3."""
        encrypt, iv, sequence = self._aead.encrypt_into, self._iv, self._sequence
        for slot in range(0, records * SLOT, SLOT):
            plain[slot + RECORD] = _DATA
            wire[at : at + HEADER] = _FULL
            nonce = (iv ^ sequence).to_bytes(12, "big")
            encrypt(nonce, plain[slot : slot + SLOT], _FULL, wire[at + HEADER : at + _FULL_SIZE])
            at += _FULL_SIZE
            sequence += 1
        self._sequence = sequence

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

    def data(self, data: bytes) -> bytes:
        """Makes the record of a few bytes of data."""
        return self._record(_DATA, memoryview(bytearray(data + b"\0")))

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
        renews: See `Sealer`.

    Attributes:
        ended: The peer has said that nothing follows.
        failure: What the next record ends the connection with, also where `open` has just given what came before it.
        is_asked: The peer has asked for other keys (`Sealer.update`); the owner takes it back.
    """

    def __init__(self, keys: Keys, *, is_client: bool, renews: bool = True) -> None:
        super().__init__(keys, renews=renews)
        self.ended = self.is_asked = False
        self._is_client = is_client
        self._useless = 0
        self._message = bytearray()
        self.failure: TLSError | None = None

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
        while not (self.ended or self.failure) and len(plain) - filled >= SLOT:
            if self._is_1_3 and (full := self._open_full(wire[taken:], plain[filled:])):
                taken += full * _FULL_SIZE
                filled += full * RECORD
                continue
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
                self.failure = error
        if self.failure and not filled:
            raise self.failure
        return taken, filled

    def _open_full(self, wire: memoryview, plain: memoryview) -> int:
        """Opens full records of data in TLS 1.3, where nearly all bytes are, and returns how many it has opened.

        Whatever else comes, it leaves as it is.
        """
        if self._message:
            return 0
        decrypt, iv, first = self._aead.decrypt_into, self._iv, self._sequence
        sequence, at, filled = first, 0, 0
        end, room = len(wire) - _FULL_SIZE, len(plain) - SLOT
        with suppress(InvalidTag):
            while at <= end and filled <= room and wire[at : at + HEADER] == _FULL:
                nonce = (iv ^ sequence).to_bytes(12, "big")
                decrypt(nonce, wire[at + HEADER : at + _FULL_SIZE], _FULL, plain[filled : filled + SLOT])
                if plain[filled + RECORD] != _DATA:
                    break
                at += _FULL_SIZE
                filled += RECORD
                sequence += 1
        self._sequence = sequence
        if sequence > first:
            self._useless = 0
        return sequence - first

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
            raise RefusedByPeer(number)

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


def pack(sealing: Keys, opening: Keys, *, is_client: bool, renews: bool, preface: bytes = b"") -> bytearray:
    """Writes down what `Sealer` and `Opener` of a connection take, for the process that is to move it.

    Args:
        preface: What is sent before anything else, a few bytes.
    """
    packed = bytearray(MOST_KEYS)  # at once: what grows leaves copies behind
    packed[:2], at = bytes((is_client, renews)), 2
    for keys in (sealing, opening):
        _PACKED.pack_into(packed, at, keys.version, _CIPHERS.index(keys.cipher), keys.sequence)
        at += _PACKED.size
        for part in (keys.key, keys.iv, keys.secret):
            packed[at] = len(part)
            packed[at + 1 : at + 1 + len(part)] = part
            at += 1 + len(part)
    packed[at] = len(preface)
    packed[at + 1 : at + 1 + len(preface)] = preface
    return packed


def unpack(packed: memoryview) -> tuple[Sealer, Opener, bytes]:
    """Reads what `pack` wrote.

    Raises:
        ValueError: It is something else; says not what.
    """
    try:
        is_client, renews, at = packed[0], packed[1], 2
        both = []
        for _ in range(2):
            version, cipher, sequence = _PACKED.unpack_from(packed, at)
            at += _PACKED.size
            parts = []
            for _ in range(3):
                end = at + 1 + packed[at]
                parts.append(bytearray(packed[at + 1 : end]))
                at = end
            both.append(Keys(Version(version), _CIPHERS[cipher], parts[0], parts[1], sequence, parts[2]))
        sealing, opening = both
        sealer = Sealer(sealing, renews=bool(renews))
        opener = Opener(opening, is_client=bool(is_client), renews=bool(renews))
        return sealer, opener, bytes(packed[at + 1 : at + 1 + packed[at]])
    except (ValueError, IndexError, struct.error):
        raise ValueError("no keys of a connection") from None
