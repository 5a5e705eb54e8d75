"""The TLS handshake between two nodes: OpenSSL's, record by record and in memory; its keys are ours afterwards.

pyOpenSSL brings an OpenSSL of its own, the same on every distribution. Nothing is read that belongs to the data after
the handshake, so that whoever gets the keys, the kernel included, begins at the right byte.
"""

from __future__ import annotations

import ctypes
import hmac
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakValueDictionary

from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from migproxy.relay.records import HEADER, MOST_SEALED, Cipher, Keys, Sealer, Version, wipe
from migproxy.tlserrors import Alert, Reason, RefusedByPeer, TLSError

_TYPES: Final = {20, 21, 22, 23}
_ALERT: Final = 21
_RENEWS: Final = b"migproxy-renews-keys"
_KEEPS: Final = b"migproxy-keeps-keys"
_ANSWERED, _NO_ANSWER = 0, 3  # SSL_TLSEXT_ERR_OK and _NOACK, openssl/tls1.h

_REFUSALS: Final = {
    Reason.EXPIRED: Alert.CERTIFICATE_EXPIRED,
    Reason.SELF_SIGNED: Alert.UNKNOWN_CA,
    Reason.WRONG_CA: Alert.UNKNOWN_CA,
    Reason.INTERMEDIATE: Alert.UNKNOWN_CA,
    Reason.WRONG_USAGE: Alert.UNSUPPORTED_CERTIFICATE,
    Reason.WRONG_NAME: Alert.ACCESS_DENIED,
    Reason.OTHER_MIGRATION: Alert.UNRECOGNIZED_NAME,
}
"""Of the peer's certificate; the others are BAD_CERTIFICATE."""

_UNVERIFIED: Final = {  # openssl/x509_vfy.h
    2: Reason.WRONG_CA,  # a CA of the chain is missing
    7: Reason.WRONG_CA,  # not signed by the CA of that name
    9: Reason.NOT_YET_VALID,
    10: Reason.EXPIRED,
    18: Reason.SELF_SIGNED,
    19: Reason.WRONG_CA,  # 19 to 21: the CA is not in the bundle
    20: Reason.WRONG_CA,
    21: Reason.WRONG_CA,
    24: Reason.WRONG_CA,  # the issuer has no key
    26: Reason.WRONG_USAGE,
    79: Reason.WRONG_CA,  # the issuer is no CA
}
"""By the error of OpenSSL's verification; the others are BAD_CERTIFICATE."""

_FAILURES: Final = {
    "unsupported protocol": Reason.VERSION,
    "no shared cipher": Reason.CIPHER,
    "peer did not return a certificate": Reason.NO_CERTIFICATE,
}
"""By OpenSSL's words."""


@dataclass(frozen=True, slots=True)
class Secured:
    """What a handshake came to.

    Attributes:
        version, suite: For people.
        who: The peer.
        sealing, opening: The keys of what this end sends, and of what it receives.
        renews: The peer can follow when keys change.
        is_migproxy: The peer is a target of ours, which takes a name of ours by ALPN; of a source, nobody asks.
    """

    version: str
    suite: str
    who: str
    sealing: Keys
    opening: Keys
    renews: bool
    is_migproxy: bool = False


class Handshake:
    """One end of a handshake: bytes in, bytes out.

    Args:
        context: Of its role; see `prepare`.
        server: This end is the server (the target).
        check: Looks at the peer's certificate (DER), whose chain and dates are good, and returns who it is; raises
            TLSError where the peer is refused.
        follows: This end can follow when the peer changes keys. Two ends of ours tell each other, by ALPN (RFC 7301):
            the client by the order of what it offers, the server by what it takes of that. Any other peer can.
        name: The server name that a client sends (RFC 6066, 3); None for none.
        admits: Looks at the name that a client has sent, None where it has not; raises TLSError to refuse it.

    Attributes:
        wanted: How many bytes `take` is to be given next.
        result: What it came to, once it is over.
    """

    def __init__(
        self,
        context: SSL.Context,
        *,
        server: bool,
        check: Callable[[bytes], str],
        follows: bool = True,
        name: str | None = None,
        admits: Callable[[str | None], None] | None = None,
    ) -> None:
        self.wanted = HEADER
        self.result: Secured | None = None
        self._server, self._check, self._admits = server, check, admits
        self._record = bytearray()
        self._secrets: dict[str, bytearray] = {}
        self._who = ""
        self._renews = True
        self._ours = _RENEWS if follows else _KEEPS
        self._tls = SSL.Connection(context)
        _shaking[int(ffi.cast("uintptr_t", self._tls._ssl))] = self
        if server:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()
            if name:
                self._tls.set_tlsext_host_name(name.encode())
            self._tls.set_alpn_protos([_RENEWS, _KEEPS] if follows else [_KEEPS, _RENEWS])

    def begin(self) -> bytes:
        """Begins; returns what is to be sent."""
        return b"" if self._server else self._advance()

    def take(self, data: bytes) -> bytes:
        """Goes on with what has arrived, `wanted` bytes or fewer.

        Returns:
            What is to be sent.

        Raises:
            Refused: The handshake failed; it has what is to be sent before the connection is closed.
        """
        self._record += data
        self.wanted -= len(data)
        if self.wanted:
            return b""
        if len(self._record) == HEADER:
            self.wanted = self._length()
            if self.wanted:
                return b""
        self._tls.bio_write(bytes(self._record))
        self._record.clear()
        self.wanted = HEADER
        return self._advance()

    def _length(self) -> int:
        kind, major, length = self._record[0], self._record[1], int.from_bytes(self._record[3:5], "big")
        if kind not in _TYPES or major != 3 or not 0 < length <= MOST_SEALED:
            raise Refused(TLSError(Reason.NOT_TLS, "the TLS handshake failed: the peer does not speak TLS"))
        return length

    def _advance(self) -> bytes:
        is_over = True
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            is_over = False
        except SSL.Error as error:
            if number := lib.SSL_get_verify_result(self._tls._ssl):
                words = ffi.string(lib.X509_verify_cert_error_string(number)).decode()
                reason = _UNVERIFIED.get(number, Reason.BAD_CERTIFICATE)
                raise self._refusal(TLSError(reason, f"the peer's certificate is refused: {words}")) from error
            raise Refused(_explain(error), self._sent()) from error
        if not self._who:
            self._look_at_peer()
        sent = self._sent()
        if is_over:
            if not self._who:  # OpenSSL demands a certificate: this is never reached, and would let anybody in
                raise Refused(TLSError(Reason.NO_CERTIFICATE, "the peer has shown no certificate"))
            self.result = self._finish(sent)
        return sent

    def _look_at_peer(self) -> None:
        """Checks the peer's certificate, once it is there, and before another byte is sent."""
        try:
            certificate = self._tls.get_peer_certificate(as_cryptography=True)
            if certificate:
                who = self._check(certificate.public_bytes(Encoding.DER))
                if self._admits:
                    sent = self._tls.get_servername()
                    self._admits(sent.decode(errors="replace") if sent else None)
                self._who = who
        except TLSError as error:
            raise self._refusal(error) from error
        except ValueError as error:  # which OpenSSL takes
            unreadable = TLSError(Reason.BAD_CERTIFICATE, f"the peer's certificate cannot be read: {error}")
            raise self._refusal(unreadable) from error

    def _sent(self) -> bytes:
        sent = bytearray()
        with suppress(SSL.WantReadError):
            while True:
                sent += self._tls.bio_read(1 << 16)
        return bytes(sent)

    # What OpenSSL tells

    def note_secret(self, line: bytes) -> None:
        """Takes a line of the key log (draft-ietf-tls-keylogfile)."""
        label, _, secret = line.split()
        self._secrets[label.decode()] = bytearray.fromhex(secret.decode())

    def choose(self, offered: bytes) -> int:
        """Answers a client's ALPN: where in what it offers the name is that this end takes; negative for none."""
        self._renews = not offered.startswith(_named(_KEEPS))
        return offered.find(_named(self._ours))

    def _refusal(self, error: TLSError) -> Refused:
        """Tells the peer why, by the keys that it reads with now.

        OpenSSL does not know of our reasons; and its client sends alerts of TLS 1.3 in plaintext, which Go refuses.
        """
        alert = _REFUSALS.get(error.reason, Alert.BAD_CERTIFICATE)
        side = "SERVER_TRAFFIC_SECRET_0" if self._server else "CLIENT_HANDSHAKE_TRAFFIC_SECRET"
        if secret := self._secrets.get(side):  # TLS 1.3
            return Refused(error, Sealer(Keys.of_secret(self._cipher, secret)).alert(alert))
        return Refused(error, bytes((_ALERT, 3, 3, 0, 2, 2, alert)))

    # The keys

    @property
    def _cipher(self) -> Cipher:
        name = self._tls.get_cipher_name() or ""
        if "CHACHA20" in name:
            return Cipher.CHACHA20
        return Cipher.AES_128_GCM if "128" in name else Cipher.AES_256_GCM

    def _finish(self, last: bytes) -> Secured:
        suite, version = self._tls.get_cipher_name() or "", self._tls.get_protocol_version_name()
        sides = ("SERVER", "CLIENT") if self._server else ("CLIENT", "SERVER")
        if version == "TLSv1.3":
            # After its Finished, a server sends tickets by the keys of the data.
            counts = (_records(last) if self._server else 0, 0)
            sealing, opening = (
                Keys.of_secret(self._cipher, self._secrets[f"{side}_TRAFFIC_SECRET_0"], count)
                for side, count in zip(sides, counts, strict=True)
            )
        else:
            sealing, opening = self._keys_1_2(suite)
        for secret in self._secrets.values():
            wipe(secret)
        taken = b"" if self._server else self._tls.get_alpn_proto_negotiated()
        if not self._server:
            self._renews = taken != _KEEPS
        return Secured(version, suite, self._who, sealing, opening, self._renews, bool(taken))

    def _keys_1_2(self, suite: str) -> tuple[Keys, Keys]:
        cipher = self._cipher
        size, fixed = cipher.key_length, 12 if cipher is Cipher.CHACHA20 else 4
        master, client, server = self._tls.master_key(), self._tls.client_random(), self._tls.server_random()
        assert master
        assert client
        assert server
        hash_name = "sha384" if suite.endswith("SHA384") else "sha256"
        block = _expand(master, b"key expansion" + server + client, 2 * (size + fixed), hash_name)

        def keys(side: int) -> Keys:
            iv = block[2 * size + side * fixed :][:fixed]
            return Keys(Version.TLS_1_2, cipher, block[side * size :][:size], iv, 1)  # 0 was Finished

        return (keys(1), keys(0)) if self._server else (keys(0), keys(1))


class Refused(Exception):
    """A handshake that failed.

    Attributes:
        error: Why.
        last: What is to be sent before the connection is closed.
    """

    def __init__(self, error: TLSError, last: bytes = b"") -> None:
        super().__init__(str(error))
        self.error, self.last = error, last


def _records(wire: bytes) -> int:
    count = at = 0
    while at < len(wire):
        at += HEADER + int.from_bytes(wire[at + 3 : at + HEADER], "big")
        count += 1
    return count


def _expand(secret: bytes, seed: bytes, length: int, hash_name: str) -> bytearray:
    """TLS 1.2's pseudorandom function (RFC 5246, 5)."""
    made, step = bytearray(), seed
    while len(made) < length:
        step = hmac.digest(secret, step, hash_name)
        made += hmac.digest(secret, step + seed, hash_name)
    return made[:length]


_shaking: Final[WeakValueDictionary[int, Handshake]] = WeakValueDictionary()
"""By the address of OpenSSL's SSL."""


def _on_secret(tls: int, line: bytes) -> None:
    _shaking[tls].note_secret(line)


def _on_offer(tls: int, name: Any, name_length: Any, offered: int, length: int, _: None) -> int:
    names = ctypes.string_at(offered, length)
    at = _shaking[tls].choose(names)
    if at < 0:
        return _NO_ANSWER
    name[0], name_length[0] = offered + at + 1, names[at]
    return _ANSWERED


# pyOpenSSL's callbacks are cffi's, whose code is written into memory: MemoryDenyWriteExecute= forbids that, which
# systemd/migproxy.service has. What ctypes gives OpenSSL to call is there already (libffi 3.4's static trampolines).
_SECRET = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)(_on_secret)
_OFFER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_ubyte),
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_void_p,
)(_on_offer)


def prepare(context: SSL.Context) -> None:
    """Makes a context demand and verify the peer's certificate, and tell its handshakes what they have to know."""
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    lib.SSL_CTX_set_keylog_callback(context._context, _pointer("void (*)(const SSL *, const char *)", _SECRET))
    kind = "int (*)(SSL *, const unsigned char **, unsigned char *, const unsigned char *, unsigned int, void *)"
    lib.SSL_CTX_set_alpn_select_cb(context._context, _pointer(kind, _OFFER), ffi.NULL)


def _pointer(kind: str, callback: Any) -> Any:
    return ffi.cast(kind, ctypes.cast(callback, ctypes.c_void_p).value)


def _named(name: bytes) -> bytes:
    return bytes((len(name),)) + name


def _explain(error: SSL.Error) -> TLSError:
    """Why OpenSSL gave a handshake up."""
    words = [text for _, _, text in error.args[0]] if error.args and isinstance(error.args[0], list) else []
    why = words[0] if words else str(error) or "it ended"
    alert = why.rpartition("alert ")[2].upper().replace(" ", "_")
    if alert in Alert.__members__:
        return RefusedByPeer(Alert[alert])
    return TLSError(_FAILURES.get(why, Reason.HANDSHAKE), f"the TLS handshake failed: {why}")
