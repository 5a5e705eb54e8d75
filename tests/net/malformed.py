"""Sends malformed handshakes to a port: python malformed.py ADDRESS PORT COUNT SEED."""

import random
import socket
import ssl
import sys
from contextlib import suppress

AT_ONCE = 100


def hello() -> bytes:
    """What a real client begins with."""
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def malform(good: bytes, chance: random.Random) -> bytes:
    """Makes something else of it: bytes changed, cut off, doubled, or nothing of it at all."""
    data = bytearray(good)
    kind = chance.randrange(6)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, 600))
    if kind == 1:
        return b"GET / HTTP/1.1\r\nHost: %d\r\n\r\n" % chance.randrange(1 << 30)
    if kind == 2:
        return bytes(data[: chance.randrange(len(data))])
    if kind == 3:
        return bytes((chance.choice((20, 21, 22, 23, 24)), 3, chance.randrange(5))) + chance.randbytes(
            chance.randrange(600)
        )
    for _ in range(chance.choice((1, 2, 10, 50))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data * 2) if kind == 4 else bytes(data)


def main(address: str, port: int, count: int, seed: int) -> None:
    """Sends them in bunches, and waits for the end of each connection."""
    chance, good = random.Random(seed), hello()
    for start in range(0, count, AT_ONCE):
        bunch = [socket.create_connection((address, port), 60) for _ in range(min(AT_ONCE, count - start))]
        for sock in bunch:
            with suppress(OSError):
                sock.sendall(malform(good, chance))
                sock.shutdown(socket.SHUT_WR)
        for sock in bunch:
            with sock, suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
