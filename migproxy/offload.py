"""Kernel TLS by our own keys (Documentation/networking/tls.rst).

`python -m migproxy.offload` asks for it once, whereupon the kernel loads its module if it may, and says whether it can
be had.
"""

from __future__ import annotations

import socket
import struct

from migproxy.relay.records import Cipher, Keys
from migproxy.tlserrors import Reason, TLSError

_SOL_TLS = 282
_TLS_TX, _TLS_RX = 1, 2
_CRYPTO_INFO = struct.Struct("HH")  # tls_crypto_info, linux/tls.h
_TCP_ULP = 31  # linux/tcp.h
_CIPHERS = {Cipher.AES_128_GCM: 51, Cipher.AES_256_GCM: 52, Cipher.CHACHA20: 54}  # linux/tls.h

REMEDY = "modprobe tls (or CAP_NET_ADMIN, with which the kernel loads it by itself), on a kernel with CONFIG_TLS"
"""For whoever has none."""


def install(tcp: socket.socket, sealing: Keys, opening: Keys) -> bool:
    """Gives a connection's keys to the kernel, which encrypts and decrypts from then on.

    Returns:
        Whether it has them; if not, nothing has changed.

    Raises:
        TLSError: It has one direction's alone: the connection is of no use any more.
    """
    try:
        tcp.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
        # Receiving first: what takes that takes sending too, and without either the socket is as it was.
        tcp.setsockopt(_SOL_TLS, _TLS_RX, _crypto_info(opening))
    except OSError:
        return False
    try:
        tcp.setsockopt(_SOL_TLS, _TLS_TX, _crypto_info(sealing))
    except OSError as error:
        raise TLSError(Reason.NOT_OFFLOADED, f"the kernel decrypts, and does not encrypt: {error.strerror}") from error
    return True


def _crypto_info(keys: Keys) -> bytes:
    sequence = keys.sequence.to_bytes(8, "big")
    head = _CRYPTO_INFO.pack(keys.version, _CIPHERS[keys.cipher])
    if keys.cipher is Cipher.CHACHA20:
        return head + bytes(keys.iv + keys.key) + sequence
    # In TLS 1.2 the number of a record is the explicit part of its nonce (RFC 5288, 3).
    explicit = keys.iv[4:] or sequence
    return head + bytes(explicit + keys.key + keys.iv[:4]) + sequence


def problem() -> str | None:
    """Tries whether the kernel takes keys; why it does not, None where it does."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as tcp:
        try:
            tcp.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
        except OSError as error:
            return f"the kernel has no TLS ({error.strerror})"
        try:
            for direction in (_TLS_RX, _TLS_TX):
                keys = Keys.of_secret(Cipher.AES_128_GCM, bytes(32))
                tcp.setsockopt(_SOL_TLS, direction, _crypto_info(keys))
        except OSError as error:
            return f"the kernel does not take the keys of TLS 1.3 ({error.strerror})"
    return None


def offloaded(tcp: socket.socket) -> tuple[bool, bool]:
    """Asks the kernel whether it encrypts what that socket sends, and decrypts what it receives."""
    return _has_keys(tcp, _TLS_TX), _has_keys(tcp, _TLS_RX)


def _has_keys(tcp: socket.socket, direction: int) -> bool:
    try:
        # The head of the kernel's struct, version and cipher; EBUSY where that direction has no keys, ENOPROTOOPT
        # where the socket is not TLS's at all.
        tcp.getsockopt(_SOL_TLS, direction, _CRYPTO_INFO.size)
    except OSError:
        return False
    return True


def main() -> None:
    """Tells whether kernel TLS can be had, and what would help."""
    why = problem()
    print(f"no kernel TLS: {why}: {REMEDY}" if why else "kernel TLS can be had")  # noqa: T201


if __name__ == "__main__":
    main()
