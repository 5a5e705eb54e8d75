"""TLS records after a handshake: with OpenSSL as the peer, by the RFC's own bytes, and against peers that do wrong."""

from __future__ import annotations

import hmac
import os
import random
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migproxy.relay import records
from migproxy.relay.records import (
    MOST_ADDED,
    MOST_SEALED,
    RECORD,
    SLOT,
    Cipher,
    Keys,
    Opener,
    RecordError,
    Sealer,
    Version,
    pack,
    unpack,
)
from migproxy.tlserrors import Alert, Reason, TLSError, Truncated
from tests.certificates import Cluster

pytestmark = pytest.mark.tier("gate")

KINDS = [(version, cipher) for version in Version for cipher in Cipher]
DATA, HANDSHAKE, ALERT = 23, 22, 21


def keys(version: Version, cipher: Cipher, seed: int = 1) -> Keys:
    chance = random.Random(seed)
    if version is Version.TLS_1_3:
        return Keys.of_secret(cipher, chance.randbytes(48 if cipher is Cipher.AES_256_GCM else 32))
    iv = 12 if cipher is Cipher.CHACHA20 else 4
    return Keys(version, cipher, bytearray(chance.randbytes(cipher.key_length)), bytearray(chance.randbytes(iv)))


def pair(version: Version, cipher: Cipher, *, is_client: bool = True) -> tuple[Sealer, Opener]:
    return Sealer(keys(version, cipher)), Opener(keys(version, cipher), is_client=is_client)


def seal(sealer: Sealer, data: bytes) -> bytes:
    """Seals data as a loop does that has received them into slots."""
    count = max(1, -(-len(data) // RECORD))
    desk, wire = bytearray(count * SLOT), bytearray((count + 1) * (RECORD + MOST_ADDED))
    for number in range(count):
        part = data[number * RECORD : (number + 1) * RECORD]
        desk[number * SLOT : number * SLOT + len(part)] = part
    return bytes(wire[: sealer.seal(memoryview(desk), len(data), memoryview(wire))])


def raw(sealer: Sealer, kind: int, body: bytes) -> bytes:
    """Seals a record of any type."""
    return sealer._record(kind, memoryview(bytearray(body + b"\0")))


def receive(opener: Opener, wire: bytes, room: int = 4 * SLOT) -> bytes:
    """Opens all of it, in as many steps as the room takes."""
    got, left, plain = bytearray(), memoryview(wire), memoryview(bytearray(room))
    while True:
        taken, filled = opener.open(left, plain)
        got += plain[:filled]
        left = left[taken:]
        if not taken:
            return bytes(got)


def refusal(opener: Opener, wire: bytes) -> Alert:
    with pytest.raises(RecordError) as caught:
        receive(opener, wire)
    assert caught.value.reason is Reason.BAD_RECORD
    return caught.value.alert


# The RFC's own bytes


def test_the_bytes_of_rfc_8448() -> None:
    """Section 3: application data and the client's end."""
    secret = bytes.fromhex("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5")
    made = Keys.of_secret(Cipher.AES_128_GCM, secret)
    assert (made.key.hex(), made.iv.hex()) == ("17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9")
    sealer, opener = Sealer(made), Opener(Keys.of_secret(Cipher.AES_128_GCM, secret), is_client=False)
    data, end = seal(sealer, bytes(range(50))), sealer.alert(Alert.CLOSE_NOTIFY)
    assert data.hex() == (
        "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2"
        "977014bd1e3deae63aeebb21694915e4"
    )
    assert end.hex() == "1703030013c9872760655666b74d7ff1153efd6db6d0b0e3"
    assert receive(opener, data + end) == bytes(range(50))
    assert opener.ended


# OpenSSL as the peer


@dataclass
class Peer:
    """OpenSSL's end after a handshake of it with itself, and the keys of both directions."""

    tls: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    sealer: Sealer
    opener: Opener

    def hear(self, wire: bytes) -> bytes:
        self.incoming.write(wire)
        heard = b""
        while True:
            try:
                part = self.tls.read(1 << 20)
            except ssl.SSLWantReadError:
                return heard
            if not part:
                return heard
            heard += part

    def say(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self.outgoing.read()


def key_block(master: bytes, seed: bytes, length: int, hash_name: str) -> bytes:
    """TLS 1.2's PRF (RFC 5246, 5)."""
    label = b"key expansion" + seed
    block, step = b"", label
    while len(block) < length:
        step = hmac.digest(master, step, hash_name)
        block += hmac.digest(master, step + label, hash_name)
    return block[:length]


SUITES = {
    "ECDHE-ECDSA-AES128-GCM-SHA256": (Cipher.AES_128_GCM, "sha256"),
    "ECDHE-ECDSA-AES256-GCM-SHA384": (Cipher.AES_256_GCM, "sha384"),
    "ECDHE-ECDSA-CHACHA20-POLY1305": (Cipher.CHACHA20, "sha256"),
    "TLS_AES_256_GCM_SHA384": (Cipher.AES_256_GCM, "sha384"),
    "TLS_CHACHA20_POLY1305_SHA256": (Cipher.CHACHA20, "sha256"),
    "TLS_AES_128_GCM_SHA256": (Cipher.AES_128_GCM, "sha256"),
}


def handshake(folder: Path, version: ssl.TLSVersion, suite: str | None, *, peer_is_server: bool) -> Peer:
    cluster = Cluster.make(folder / "pki")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cluster.folder / "server/tls.crt", cluster.folder / "server/tls.key")
    server.num_tickets = 0
    client.minimum_version = client.maximum_version = version
    if suite:
        client.set_ciphers(suite)
    client.keylog_filename = str(folder / "keys")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)
    hello = b""
    for _ in range(4):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
            if not hello and end is ends[1]:
                hello = to_client.read()
                to_client.write(hello)
    lines = [line.split() for line in (folder / "keys").read_text().splitlines() if not line.startswith("#")]
    secrets = {label: (bytes.fromhex(one), bytes.fromhex(two)) for label, one, two in lines}
    chosen = ends[0].cipher()
    assert chosen
    cipher, hash_name = SUITES[chosen[0]]
    if version is ssl.TLSVersion.TLSv1_3:
        sides = [Keys.of_secret(cipher, secrets[f"{side}_TRAFFIC_SECRET_0"][1]) for side in ("CLIENT", "SERVER")]
        again = [Keys.of_secret(cipher, secrets[f"{side}_TRAFFIC_SECRET_0"][1]) for side in ("CLIENT", "SERVER")]
    else:
        client_random, master = secrets["CLIENT_RANDOM"]
        server_random = hello[11:43]
        fixed = 12 if cipher is Cipher.CHACHA20 else 4
        size = cipher.key_length
        block = key_block(master, server_random + client_random, 2 * (size + fixed), hash_name)

        def part(side: int) -> Keys:
            iv = block[2 * size + side * fixed :][:fixed]
            return Keys(Version.TLS_1_2, cipher, bytearray(block[side * size :][:size]), bytearray(iv), 1)

        sides, again = [part(0), part(1)], [part(0), part(1)]
    assert not to_client.pending
    assert not to_server.pending
    if peer_is_server:
        return Peer(ends[1], to_server, to_client, Sealer(sides[0]), Opener(again[1], is_client=True))
    return Peer(ends[0], to_client, to_server, Sealer(sides[1]), Opener(again[0], is_client=False))


@pytest.mark.parametrize("peer_is_server", [True, False])
@pytest.mark.parametrize(
    ("version", "suite"),
    [
        (ssl.TLSVersion.TLSv1_3, None),
        *((ssl.TLSVersion.TLSv1_2, name) for name in SUITES if name.startswith("ECDHE")),
    ],
)
def test_openssl_understands_and_is_understood(
    tmp_path: Path, version: ssl.TLSVersion, suite: str | None, peer_is_server: bool
) -> None:
    peer = handshake(tmp_path, version, suite, peer_is_server=peer_is_server)
    chance = random.Random(1)
    for size in (1, 2, RECORD - 1, RECORD, RECORD + 1, 5 * RECORD + 17, 1_000_000):
        data = chance.randbytes(size)
        assert peer.hear(seal(peer.sealer, data)) == data
        assert receive(peer.opener, peer.say(data)) == data
    with pytest.raises(Truncated):
        peer.opener.end_of_stream()
    with pytest.raises(ssl.SSLWantReadError):
        peer.tls.unwrap()
    assert receive(peer.opener, peer.outgoing.read()) == b""
    assert peer.opener.ended
    peer.opener.end_of_stream()
    peer.incoming.write(peer.sealer.alert(Alert.CLOSE_NOTIFY))
    peer.tls.unwrap()


def test_openssl_follows_and_answers_other_keys(tmp_path: Path) -> None:
    peer = handshake(tmp_path, ssl.TLSVersion.TLSv1_3, None, peer_is_server=True)
    for asks in (False, True, True):
        assert peer.hear(peer.sealer.update(asks=asks) + seal(peer.sealer, b"there")) == b"there"
        assert receive(peer.opener, peer.say(b"and back")) == b"and back"
    assert not peer.opener.is_asked


# Both ends of ours


@pytest.mark.parametrize(("version", "cipher"), KINDS)
@given(sizes=st.lists(st.integers(0, 3 * RECORD), max_size=5), seed=st.integers(0, 1 << 32))
@settings(max_examples=20, deadline=None)
def test_bytes_arrive_unchanged_however_they_are_cut(
    version: Version, cipher: Cipher, sizes: list[int], seed: int
) -> None:
    cuts = random.Random(seed)
    sealer, opener = pair(version, cipher)
    data = [cuts.randbytes(size) for size in sizes]
    wire = b"".join(seal(sealer, part) for part in data) + sealer.alert(Alert.CLOSE_NOTIFY)
    got, kept, plain = bytearray(), b"", memoryview(bytearray(cuts.choice((SLOT, 2 * SLOT + 5))))
    while wire:
        size = cuts.randint(1, 2 * MOST_SEALED)
        kept, wire = kept + wire[:size], wire[size:]
        taken = 1
        while taken:
            taken, filled = opener.open(memoryview(kept), plain)
            got += plain[:filled]
            kept = kept[taken:]
        assert len(kept) < MOST_SEALED
    assert bytes(got) == b"".join(data)
    assert opener.ended


@pytest.mark.parametrize(("version", "cipher"), KINDS)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_of_what_was_altered_not_a_byte_goes_on(version: Version, cipher: Cipher, seed: int) -> None:
    assert_nothing_altered_goes_on(version, cipher, random.Random(seed))


@pytest.mark.tier("soak")
@pytest.mark.patience(1800)
@pytest.mark.parametrize(("version", "cipher"), KINDS)
def test_of_ten_million_records_that_were_altered_not_a_byte_goes_on(version: Version, cipher: Cipher) -> None:
    """Six at a time, of six kinds."""
    seed = random.randrange(1 << 64)
    print(f"seed {seed}")
    for number in range(10**7 // 36):
        assert_nothing_altered_goes_on(version, cipher, random.Random(seed + number))


def assert_nothing_altered_goes_on(version: Version, cipher: Cipher, chance: random.Random) -> None:
    """Seals a few records, changes what is sent of them, and opens that: a beginning of what was sent comes out."""
    sealer, opener = pair(version, cipher)
    sent = [chance.randbytes(chance.randint(1, 400)) for _ in range(6)]
    wires = [seal(sealer, data) for data in sent]
    match chance.randrange(5):
        case 0:  # a bit
            at = chance.randrange(len(wires))
            bits = bytearray(wires[at])
            bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(8)
            wires[at] = bytes(bits)
        case 1:  # a record is missing
            at = chance.randrange(len(wires) - 1)
            del wires[at]
        case 2:  # or comes twice
            at = chance.randrange(len(wires)) + 1
            wires.insert(at, wires[at - 1])
        case 3:  # or too early
            at = chance.randrange(len(wires) - 1)
            wires[at], wires[at + 1] = wires[at + 1], wires[at]
        case _:  # or is cut
            at = chance.randrange(len(wires) - 1)
            whole = wires[at]
            wires[at] = whole[: chance.randrange(len(whole))]
            if b"".join(wires[at:]).startswith(whole):  # by chance the next one begins with what is missing
                at += 1
    got, rest = bytearray(), memoryview(b"".join(wires))
    plain = memoryview(bytearray(SLOT))
    try:
        taken = 1
        while taken:
            taken, filled = opener.open(rest, plain)
            got += plain[:filled]
            rest = rest[taken:]
    except TLSError:
        pass
    assert b"".join(sent).startswith(bytes(got))
    assert bytes(got) == b"".join(sent[:at])
    with pytest.raises(Truncated):
        opener.end_of_stream()


def test_what_came_before_a_damaged_record_is_delivered_and_the_failure_stays() -> None:
    sealer, opener = pair(Version.TLS_1_3, Cipher.AES_128_GCM)
    wire = memoryview(seal(sealer, b"good") + b"\x17\x03\x03\x00\x14" + bytes(20))
    plain = memoryview(bytearray(SLOT))
    taken, filled = opener.open(wire, plain)
    assert bytes(plain[:filled]) == b"good"
    for _ in range(2):
        with pytest.raises(RecordError):
            opener.open(wire[taken:], plain)


def test_nothing_is_taken_after_the_peers_end_or_without_room() -> None:
    sealer, opener = pair(Version.TLS_1_3, Cipher.CHACHA20)
    wire = seal(sealer, b"data")
    assert opener.open(memoryview(wire), memoryview(bytearray(SLOT - 1))) == (0, 0)
    end = sealer.alert(Alert.CLOSE_NOTIFY)
    assert opener.open(memoryview(wire + end + b"rubbish"), memoryview(bytearray(2 * SLOT))) == (len(wire + end), 4)
    opener.end_of_stream()


# Other keys


@pytest.mark.parametrize("cipher", list(Cipher))
def test_other_keys_are_followed_and_the_old_ones_wiped(cipher: Cipher) -> None:
    sealer, opener = pair(Version.TLS_1_3, cipher)
    before = sealer._keys
    for asks in (False, True):
        assert receive(opener, seal(sealer, b"old") + sealer.update(asks=asks) + seal(sealer, b"new")) == b"oldnew"
        assert opener.is_asked == asks
    assert not any(before.secret)
    assert not any(before.iv)


def test_keys_are_renewed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RENEWED", 3)
    sealer, opener = pair(Version.TLS_1_3, Cipher.AES_256_GCM)
    first = sealer._keys
    assert receive(opener, seal(sealer, bytes(3 * RECORD)) + seal(sealer, b"last")) == bytes(3 * RECORD) + b"last"
    assert sealer._keys is not first
    worn = [opener.is_worn]
    opener._sequence = 3
    assert [*worn, opener.is_worn] == [False, True]
    for version, cipher in ((Version.TLS_1_3, Cipher.CHACHA20), (Version.TLS_1_2, Cipher.AES_128_GCM)):
        lasting, _ = pair(version, cipher)
        seal(lasting, bytes(4 * RECORD))
        assert not lasting.is_worn


def test_keys_stay_as_they_are_for_a_peer_that_cannot_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RENEWED", 3)
    made = [keys(Version.TLS_1_3, Cipher.AES_128_GCM) for _ in range(4)]
    sealer, opener, _ = unpack(memoryview(pack(made[0], made[1], is_client=True, renews=False)))
    peer = Opener(made[2], is_client=False)
    assert receive(peer, seal(sealer, bytes(4 * RECORD))) == bytes(4 * RECORD)
    opener._sequence = 3
    assert (sealer.is_worn, opener.is_worn) == (False, False)


@pytest.mark.parametrize("is_client", [True, False])
@pytest.mark.parametrize(("version", "cipher"), KINDS)
def test_keys_reach_another_process(version: Version, cipher: Cipher, is_client: bool) -> None:
    ours, theirs = (replace(keys(version, cipher), sequence=7) for _ in range(2))
    packed = pack(ours, theirs, is_client=is_client, renews=True, preface=b"before" if is_client else b"")
    sealer, opener, preface = unpack(memoryview(packed))
    assert preface == (b"before" if is_client else b"")
    assert receive(opener, seal(sealer, b"data")) == b"data"
    assert opener._is_client == is_client


def test_keys_that_are_lent_stay_as_they_are() -> None:
    ours, theirs = (keys(Version.TLS_1_3, Cipher.AES_128_GCM) for _ in range(2))
    lent = Sealer(ours.copy())
    first = lent.data(b"a")
    lent.close()
    ours.sequence += 1
    opener = Opener(theirs, is_client=False)
    assert receive(opener, first) == b"a"
    assert receive(opener, Sealer(ours).data(b"few bytes")) == b"few bytes"


@pytest.mark.parametrize("end", [0, 1, 2, 13, 40])
def test_half_of_the_keys_are_refused(end: int) -> None:
    packed = pack(*(keys(Version.TLS_1_3, Cipher.AES_128_GCM) for _ in range(2)), is_client=True, renews=True)
    with pytest.raises(ValueError, match=r"^no keys of a connection$"):
        unpack(memoryview(packed)[:end])


def test_tickets_are_read_past_in_one_record_or_in_many() -> None:
    sealer, opener = pair(Version.TLS_1_3, Cipher.AES_128_GCM)
    ticket = b"\x04" + (40_000).to_bytes(3, "big") + bytes(40_000)
    parts = b"".join(
        raw(sealer, HANDSHAKE, part) for part in (ticket[:3], ticket[3:RECORD], ticket[RECORD : 2 * RECORD])
    )
    both = raw(sealer, HANDSHAKE, ticket[2 * RECORD :] + b"\x04\0\0\1x")
    assert receive(opener, parts + both + seal(sealer, b"data")) == b"data"


def test_padding_is_taken_off() -> None:
    sealer, opener = pair(Version.TLS_1_3, Cipher.AES_128_GCM)
    padded = raw(sealer, 0, b"data" + bytes([DATA]) + bytes(99))
    full = raw(sealer, 0, b"x" * (RECORD - 5) + bytes([DATA]) + bytes(4))
    assert receive(opener, padded + full) == b"data" + b"x" * (RECORD - 5)


def test_warnings_are_read_past() -> None:
    for version, warning in ((Version.TLS_1_2, b"\x01\x70"), (Version.TLS_1_3, b"\x01\x5a")):
        sealer, opener = pair(version, Cipher.AES_128_GCM)
        assert receive(opener, raw(sealer, ALERT, warning) + seal(sealer, b"data")) == b"data"


# Peers that do wrong

BOTH = list(Version)
NEW, OLD = [Version.TLS_1_3], [Version.TLS_1_2]
UPDATE = b"\x18\0\0\1"
Wrong = Callable[[Sealer], bytes]


@pytest.mark.parametrize(
    ("versions", "wrong", "alert"),
    [
        (BOTH, lambda s: raw(s, 20, b"\1"), Alert.UNEXPECTED_MESSAGE),
        (BOTH, lambda s: raw(s, 24, b"heartbeat"), Alert.UNEXPECTED_MESSAGE),
        (BOTH, lambda s: raw(s, ALERT, b"\1"), Alert.UNEXPECTED_MESSAGE),
        (BOTH, lambda s: raw(s, ALERT, b"\1\0\1\0"), Alert.UNEXPECTED_MESSAGE),
        (BOTH, lambda s: raw(s, HANDSHAKE, b""), Alert.UNEXPECTED_MESSAGE),
        (BOTH, lambda s: raw(s, HANDSHAKE, b"\x0d\0\0\0"), Alert.UNEXPECTED_MESSAGE),
        (BOTH, lambda s: raw(s, HANDSHAKE, b"\4\xff\xff\xff"), Alert.ILLEGAL_PARAMETER),
        (BOTH, lambda s: raw(s, HANDSHAKE, b"\4\0") + raw(s, DATA, b"data"), Alert.UNEXPECTED_MESSAGE),
        (BOTH, lambda s: raw(s, HANDSHAKE, b"\4\0") + raw(s, ALERT, b"\1\0"), Alert.UNEXPECTED_MESSAGE),
        (
            BOTH,
            lambda s: b"".join(raw(s, DATA, b"") for _ in range(33)),
            Alert.UNEXPECTED_MESSAGE,
        ),
        (NEW, lambda s: b"".join(s.update(asks=True) for _ in range(33)), Alert.UNEXPECTED_MESSAGE),
        (NEW, lambda s: raw(s, 0, b""), Alert.UNEXPECTED_MESSAGE),
        (NEW, lambda s: raw(s, 0, bytes(100)), Alert.UNEXPECTED_MESSAGE),
        (NEW, lambda s: raw(s, HANDSHAKE, UPDATE + b"\2"), Alert.ILLEGAL_PARAMETER),
        (NEW, lambda s: raw(s, HANDSHAKE, b"\x18\0\0\2\0\0"), Alert.DECODE_ERROR),
        (NEW, lambda s: raw(s, HANDSHAKE, UPDATE + b"\0\4"), Alert.UNEXPECTED_MESSAGE),
        (NEW, lambda s: b"\x15\x03\x03\0\2\2\x28", Alert.UNEXPECTED_MESSAGE),
        (NEW, lambda s: b"\x14\x03\x03\0\1\1", Alert.UNEXPECTED_MESSAGE),
        (NEW, lambda s: b"\x17\x03\x03\x40\x12", Alert.RECORD_OVERFLOW),
        (OLD, lambda s: b"\x17\x03\x03\x40\x19", Alert.RECORD_OVERFLOW),
        (BOTH, lambda s: b"\x17\x03\x03\0\x0f", Alert.BAD_RECORD_MAC),
        (BOTH, lambda s: b"\x17\x03\x03\0\x20" + bytes(32), Alert.BAD_RECORD_MAC),
        (OLD, lambda s: b"\x17\x03\x01\0\x20" + bytes(32), Alert.PROTOCOL_VERSION),
        (OLD, lambda s: raw(s, HANDSHAKE, b"\0\0\0\0"), Alert.NO_RENEGOTIATION),
        (OLD, lambda s: raw(s, HANDSHAKE, UPDATE + b"\0"), Alert.UNEXPECTED_MESSAGE),
    ],
)
def test_a_wrong_record_ends_the_connection_with_the_rfcs_alert(
    versions: list[Version], wrong: Wrong, alert: Alert
) -> None:
    for version in versions:
        sealer, opener = pair(version, Cipher.AES_128_GCM)
        good = seal(sealer, b"good")
        assert receive(opener, good) == b"good"
        assert refusal(opener, wrong(sealer)) is alert


def test_what_only_a_server_may_send_is_refused_from_a_client() -> None:
    sealer, opener = pair(Version.TLS_1_3, Cipher.AES_128_GCM, is_client=False)
    assert refusal(opener, raw(sealer, HANDSHAKE, b"\4\0\0\1x")) is Alert.UNEXPECTED_MESSAGE
    sealer, opener = pair(Version.TLS_1_2, Cipher.AES_128_GCM, is_client=False)
    assert refusal(opener, raw(sealer, HANDSHAKE, b"\1\0\0\0")) is Alert.NO_RENEGOTIATION


@pytest.mark.parametrize("version", BOTH)
def test_a_peers_alert_is_its_refusal(version: Version) -> None:
    sealer, opener = pair(version, Cipher.AES_128_GCM)
    with pytest.raises(TLSError, match="TLS alert 20") as caught:
        receive(opener, sealer.alert(Alert.BAD_RECORD_MAC))
    assert caught.value.reason is Reason.REFUSED_BY_PEER


def test_the_level_of_an_alert() -> None:
    for alert, level in ((Alert.CLOSE_NOTIFY, 1), (Alert.NO_RENEGOTIATION, 1), (Alert.DECODE_ERROR, 2)):
        sealer, opener = pair(Version.TLS_1_2, Cipher.AES_128_GCM)
        wire = memoryview(sealer.alert(alert))
        _, size = opener._open(wire, plain := memoryview(bytearray(SLOT)))
        assert bytes(plain[:size]) == bytes((level, alert))


# Secrets


@pytest.mark.parametrize(("version", "cipher"), KINDS)
def test_keys_are_shown_nowhere_and_wiped(version: Version, cipher: Cipher) -> None:
    made = keys(version, cipher)
    secret = bytes(made.key)
    sealer = Sealer(made)
    for shown in (
        repr(made),
        str(made),
        repr(sealer),
        repr(vars(sealer)),
        repr(Opener(keys(version, cipher), is_client=True)),
    ):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
    assert not any(made.key), "the cipher has it"
    sealer.close()
    assert not any(made.iv + made.secret)
    with pytest.raises(AttributeError):
        seal(sealer, b"data")


def test_nonces_are_those_of_the_rfc() -> None:
    """TLS 1.2 with AES-GCM sends the record's number as the explicit nonce: never one twice (RFC 5288, 3)."""
    sealer, _ = pair(Version.TLS_1_2, Cipher.AES_128_GCM)
    numbers = {struct.unpack("!Q", seal(sealer, os.urandom(9))[5:13])[0] for _ in range(100)}
    assert numbers == set(range(100))
