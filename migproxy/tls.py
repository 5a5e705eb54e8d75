"""What protects the connections between the two nodes: mTLS as KubeVirt's migration proxy speaks it, or nothing.

The handshake (`handshake`) is carried out by threads, in steps that the event loop waits for. After it the connection
goes to the kernel where that takes both directions (`offload`), else to the relay with its keys.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Final, Literal, Protocol, TypeVar

import structlog
from OpenSSL import SSL

from migproxy import credentials, offload
from migproxy.credentials import Credentials, CredentialsError, Loaded
from migproxy.greeting import GO, Greet, PlainWire, SecureWire, greet
from migproxy.handshake import Handshake, Refused, Secured, prepare
from migproxy.pki import Files
from migproxy.relay.protocol import Way
from migproxy.relay.records import pack
from migproxy.rounds import Permits
from migproxy.sockets import ready
from migproxy.tlserrors import Reason, TLSError
from migproxy.transport import Transport
from migproxy.verify import Peers

log = structlog.get_logger(__name__)
T = TypeVar("T")

Version = Literal["1.2", "1.3"]
_VERSIONS: dict[Version, int] = {"1.2": SSL.TLS1_2_VERSION, "1.3": SSL.TLS1_3_VERSION}

_SUITES = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}
"""The cipher suites of TLS 1.2 that are not broken, by IANA's and Go's name, as OpenSSL calls them; fastest first."""

_SUITES_1_3 = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
"""TLS 1.3's; fastest first."""

_OLD = re.compile(r"_CBC_|_RC4_|^TLS_RSA_|3DES|-SHA\d*$|^(AES|RC4|DES)")
_CHECK_SECONDS = 60.0
_GREETING_SECONDS = 10.0
_THREADS = 2  # a step of a handshake takes a millisecond or less
_STEPS = 2 * _THREADS  # at a time: what comes next waits beside each thread, not for the event loop
_MOST_AT_ONCE = 128  # reads of half a record before other handshakes have their turn


class SecurityError(Exception):
    """The connections between the nodes cannot be protected as demanded."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What the two ends of a connection know of each other beyond their certificates.

    Attributes:
        name: The TLS server name that carries the migration; None where the ends have no common one.
        greet: Of a connection to an announced target, see `greeting.greet`; None of one to a published target, which
            may be KubeVirt's.
        whose: Whose turn the steps of the handshake take: the migration's, within it the peer's (`rounds`).
        place: Where an unfinished handshake is counted; None where nobody counts.
    """

    name: str | None = None
    greet: Greet | None = None
    whose: tuple[Hashable, ...] = ()
    place: Place | None = None

    def admits(self, sent: str | None) -> None:
        """Looks at the server name that a source has sent.

        KubeVirt's sends none. An announced target is there for migproxies alone, which do.

        Raises:
            TLSError: It means another migration.
        """
        if self.name is None or sent == self.name or (sent is None and self.greet is None):
            return
        raise TLSError(Reason.OTHER_MIGRATION, f"the source means {sent or 'no migration by name'}, not {self.name}")


UNKNOWN: Final = Meeting()


class Security(Protocol):
    """Protects one TCP connection after it is made and before a byte of the launcher's crosses it.

    Attributes:
        errors: Connections that were refused, or broke, for a reason of TLS: by reason.
        encrypts: Whether a connection that is not secured yet cannot be gone on with by another process; None while
            that is not known.
    """

    errors: Counter[Reason]

    @property
    def encrypts(self) -> bool | None: ...

    async def settled(self) -> None:
        """Returns once it is known how connections are to be protected, or nobody will tell soon."""

    async def secure(
        self, tcp: socket.socket, *, server: bool, meeting: Meeting = UNKNOWN, commit: Callable[[], None] | None = None
    ) -> Transport:
        """Does what the peers must do first, and returns the connection to relay.

        Args:
            tcp: The connected socket, not blocking; owned by whoever gets the result.
            server: Whether this end accepted the connection (the target does).
            meeting: What the two ends know of each other.
            commit: Is called before a client says what lets the server take the connection for made.

        Raises:
            TLSError: The peer is refused, or refuses; the socket is closed.
        """

    def report(self) -> dict[str, Any]:
        """What `migproxy status` shows of it, as plain values."""

    async def watch(self) -> None:
        """Looks after what it needs, until cancelled."""


class Plaintext:
    """No protection: every byte of the guest's memory crosses the migration network readable."""

    encrypts = False

    def __init__(self) -> None:
        self.errors: Counter[Reason] = Counter()

    async def settled(self) -> None:
        """See Security: it is."""

    async def secure(
        self, tcp: socket.socket, *, server: bool, meeting: Meeting = UNKNOWN, commit: Callable[[], None] | None = None
    ) -> Transport:
        if meeting.greet is None:
            return Transport(tcp)
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                await greet(PlainWire(tcp), meeting.greet, server=server)
        except TimeoutError as error:
            raise TLSError(Reason.TIMEOUT, f"the peer said nothing for {_GREETING_SECONDS:g} s") from error
        return Transport(tcp, preface=b"" if server else GO)

    def report(self) -> dict[str, Any]:
        return {"mode": "plaintext", "errors": {}}

    async def watch(self) -> None:
        await asyncio.Event().wait()


@dataclass(frozen=True, slots=True)
class TLSOptions:
    """How mTLS is spoken.

    Attributes:
        server, client: The files of the target's and of the source's role.
        sources, targets: Who is accepted as a client (source), and as a server (target).
        min_version: The oldest version.
        ciphers: Cipher suites of both versions, by IANA's or OpenSSL's names, best first; empty for the built-in lists.
        handshake_timeout: Seconds for a whole handshake.
        ktls: Use kernel TLS where it can be had, always, or never.
        expiry_notice: How long before a certificate's end to warn; None for the last third of its life, two weeks
            at most.
    """

    server: Files
    client: Files
    sources: Peers
    targets: Peers
    min_version: Version = "1.2"
    ciphers: tuple[str, ...] = ()
    handshake_timeout: float = 10.0
    ktls: Literal["auto", "on", "off"] = "auto"
    expiry_notice: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Suites:
    """Cipher suites that somebody named.

    Attributes:
        older, newer: OpenSSL's lists for TLS 1.2, empty where none is named, and for TLS 1.3, all where none is named.
        old: Names that are left out because nobody should use them.
        unknown: Names that mean nothing.
    """

    older: str
    newer: str
    old: tuple[str, ...]
    unknown: tuple[str, ...]


def parse_ciphers(names: Sequence[str]) -> Suites:
    """Reads names of cipher suites: IANA's (Go's, KubeVirt's `tlsConfiguration.ciphers`) or OpenSSL's."""
    older, newer = [], []
    old: list[str] = []
    unknown: list[str] = []
    for name in names:
        if name in _SUITES or name in _SUITES.values():
            older.append(_SUITES.get(name, name))
        elif name in _SUITES_1_3:
            newer.append(name)
        else:
            (old if _OLD.search(name) else unknown).append(name)
    return Suites(":".join(older), ":".join(newer or _SUITES_1_3), tuple(old), tuple(unknown))


class MutualTLS:
    """mTLS with KubeVirt's rules.

    Attributes:
        errors: See Security.
        kernel: Whether connections are given to the kernel.
        kernel_problem: Why not, None where they are.
        encrypts: See Security.

    Raises:
        SecurityError: Certificates cannot be loaded, a cipher is unknown, or kernel TLS cannot be had with ktls "on".
    """

    encrypts = True

    def __init__(self, options: TLSOptions) -> None:
        self.errors: Counter[Reason] = Counter()
        self._options = options
        self._warned: set[object] = set()
        self._suites = parse_ciphers(options.ciphers or tuple(_SUITES))
        if self._suites.unknown:
            unknown, known = ", ".join(self._suites.unknown), ", ".join([*_SUITES, *_SUITES_1_3])
            raise SecurityError(f"--tls-ciphers: {unknown} is not known; known are {known}")
        if self._suites.old:
            log.warning("old cipher suites are never used", ciphers=self._suites.old)
        if not self._suites.older and options.min_version == "1.2":
            raise SecurityError("--tls-ciphers names no usable suite of TLS 1.2: add one, or set --tls-min-version 1.3")
        self.kernel_problem = "off (--ktls off)" if options.ktls == "off" else offload.problem()
        self.kernel = self.kernel_problem is None
        if not self.kernel and options.ktls == "on":
            raise SecurityError(f"--ktls on: {self.kernel_problem}: {offload.REMEDY}; or use --ktls auto")
        if not self.kernel and options.ktls == "auto":
            log.warning("kernel TLS is not used", why=self.kernel_problem, remedy=offload.REMEDY)
        try:
            self._server = self._credentials(server=True)
            self._client = self._credentials(server=False)
        except CredentialsError as error:
            raise SecurityError(_without_certificates(error)) from error
        self._pool = ThreadPoolExecutor(_THREADS, "handshake")
        self._permits = Permits(_STEPS)

    async def settled(self) -> None:
        """See Security: it is."""

    def _credentials(self, *, server: bool) -> Credentials:
        files = self._options.server if server else self._options.client
        return Credentials("server" if server else "client", files, lambda: self._context(server=server))

    def _context(self, *, server: bool) -> SSL.Context:
        context = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(_VERSIONS[self._options.min_version])
        context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_TICKET)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        if self._suites.older:
            context.set_cipher_list(self._suites.older.encode())
        context.set_tls13_ciphersuites(self._suites.newer.encode())
        if server:
            context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE)
        prepare(context)
        return context

    async def watch(self) -> None:
        """Looks at the files each minute, so that their state is known and their end announced without connections."""
        while True:
            for role in (self._server, self._client):
                loaded = await self._step(role.current)
                self._warn_of_ends(loaded)
            await asyncio.sleep(_CHECK_SECONDS)

    def _warn_of_ends(self, loaded: Loaded) -> None:
        now = credentials.now()
        for validity in loaded.validities:
            key = (validity, now.date())
            if key not in self._warned and validity.nears_end(now, self._options.expiry_notice):
                self._warned.add(key)
                log.warning(
                    "certificate expired" if now >= validity.ends else "certificate expires soon",
                    role=validity.role,
                    file=validity.path,
                    ends=validity.ends.isoformat(),
                    remedy="renew it: connections are refused once it has expired",
                )

    def report(self) -> dict[str, Any]:
        roles = (self._server, self._client)
        validities = {validity: None for role in roles for validity in role.validities}
        return {
            "mode": "mTLS",
            "min_version": self._options.min_version,
            "ktls": "on" if self.kernel else "off",
            "ktls_problem": self.kernel_problem,
            "errors": dict(self.errors),
            "reloads": sum(role.reloads for role in roles),
            "reload_failures": sum(role.failures for role in roles),
            "problems": {role.role: role.problem for role in roles if role.problem},
            "certificates": [
                {"role": one.role, "file": one.path, "not_after": one.ends.isoformat()} for one in validities
            ],
        }

    async def secure(
        self, tcp: socket.socket, *, server: bool, meeting: Meeting = UNKNOWN, commit: Callable[[], None] | None = None
    ) -> Transport:
        timeout = self._options.handshake_timeout
        try:
            async with asyncio.timeout(timeout):
                return await self._secure(tcp, None if server else commit, meeting, server=server)
        except TimeoutError as error:
            raise TLSError(Reason.TIMEOUT, f"the TLS handshake was not finished within {timeout:g} s") from error

    async def _secure(
        self, tcp: socket.socket, commit: Callable[[], None] | None, meeting: Meeting, *, server: bool
    ) -> Transport:
        credentials = self._server if server else self._client
        peers = self._options.sources if server else self._options.targets

        def begin() -> tuple[Handshake, bytes]:
            loaded = credentials.current()
            handshake = Handshake(
                loaded.context,
                server=server,
                check=lambda leaf: peers.check(leaf, loaded.authorities, client=server),
                follows=not self.kernel,  # this relay does not ask the kernel to follow, which Linux 6.14 can
                name=meeting.name,
                admits=meeting.admits if server else None,
            )
            return handshake, _answer(tcp, handshake) if server else handshake.begin()

        try:
            if server:  # who says nothing costs a descriptor, and no more
                await ready(tcp.fileno(), writing=False)
            with _our_turn(meeting.place):
                handshake, said = await self._step(begin, *meeting.whose)
            secured = await self._shake_hands(tcp, handshake, said, commit, meeting)
            if meeting.greet:
                await _greet(tcp, secured, meeting.greet, server=server)
        except Refused as refused:
            with suppress(OSError):
                tcp.send(refused.last)
            raise refused.error from refused
        except TLSError:
            raise
        except OSError as error:
            why = error.strerror or error
            raise TLSError(Reason.CLOSED, f"the connection broke during the TLS handshake: {why}") from error
        return self._transport(tcp, secured, GO if meeting.greet and not server else b"", server=server)

    async def _shake_hands(
        self,
        tcp: socket.socket,
        handshake: Handshake,
        said: bytes,
        commit: Callable[[], None] | None,
        meeting: Meeting,
    ) -> Secured:
        loop = asyncio.get_running_loop()
        while not (secured := handshake.result):
            if said:
                await loop.sock_sendall(tcp, said)
            await ready(tcp.fileno(), writing=False)
            with _our_turn(meeting.place):
                said = await self._step(lambda: _answer(tcp, handshake), *meeting.whose)
            if said and commit:  # what follows the first words has the client's Finished
                commit()
                commit = None
        await loop.sock_sendall(tcp, said)
        return secured

    def _transport(self, tcp: socket.socket, secured: Secured, preface: bytes, *, server: bool) -> Transport:
        label = f"{secured.version} {secured.suite} with {secured.who}"
        try:
            if self.kernel and offload.install(tcp, secured.sealing, secured.opening):
                return Transport(
                    tcp, f"{label}, in the kernel", Way.KTLS, preface=preface, is_migproxy=secured.is_migproxy
                )
            if self._options.ktls == "on":
                raise TLSError(Reason.NOT_OFFLOADED, f"the kernel did not take over {label}: use --ktls auto")
            keys = pack(secured.sealing, secured.opening, is_client=not server, renews=secured.renews, preface=preface)
            return Transport(tcp, f"{label}, in user space", Way.TLS, keys, is_migproxy=secured.is_migproxy)
        finally:
            secured.sealing.wipe()
            secured.opening.wipe()

    async def _step(self, call: Callable[[], T], *whose: Hashable) -> T:
        """Runs a call in a thread, to its end even when cancelled: what it uses must not be closed under it.

        Args:
            whose: See Meeting.
        """
        async with self._permits.permit(*whose):
            return await self._run(call)

    async def _run(self, call: Callable[[], T]) -> T:
        running = asyncio.get_running_loop().run_in_executor(self._pool, call)
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled:
            running.exception()  # looked at: nobody else will
            raise cancelled
        return running.result()


async def _greet(tcp: socket.socket, secured: Secured, ready: Greet, *, server: bool) -> None:
    try:
        with closing(SecureWire(tcp, secured, is_client=not server)) as wire:
            await greet(wire, ready, server=server)
    except BaseException:
        secured.sealing.wipe()
        secured.opening.wipe()
        raise


def _answer(tcp: socket.socket, handshake: Handshake) -> bytes:
    """Goes on with a handshake as far as what has arrived allows; returns what is to be sent."""
    said = bytearray()
    with suppress(BlockingIOError):
        for _ in range(_MOST_AT_ONCE):
            data = tcp.recv(handshake.wanted)
            if not data:
                raise TLSError(Reason.CLOSED, "the peer closed the connection during the TLS handshake")
            said += handshake.take(data)
            if handshake.result:
                break
    return bytes(said)


class Awaits(Enum):
    """What a handshake that is not finished waits for; those before are given up before those after."""

    FIRST_WORDS = "the peer, which has said nothing yet"
    PEER = "the peer, which has been answered"
    US = "this end"


class Place:
    """The place of one handshake among those that are not finished.

    Args:
        expiry: Ends it.
        address: The peer's.
    """

    def __init__(self, unfinished: Unfinished, expiry: asyncio.Timeout, address: str) -> None:
        self.address, self.awaits = address, Awaits.FIRST_WORDS
        self._unfinished, self._expiry = unfinished, expiry

    def wait_for(self, what: Awaits) -> None:
        """Says what it waits for from now on."""
        self._unfinished.move(self, what)

    def give_up(self) -> None:
        """Ends the handshake."""
        self._expiry.reschedule(0)


class Unfinished:
    """The handshakes of one listener that are not finished: a bounded number, so that nobody's silence costs much.

    Where the bound is reached, one is given up that waits for its peer: of the newcomer's own address, if that has a
    quarter of all places or more, else of any. Those that have said nothing go first, and of them the oldest: a real
    peer speaks at once, and is done within milliseconds. Nobody is accepted while half of all wait for this end, which
    does what it can: they need not go, and whoever has been answered has time to say the next word.

    Args:
        limit: The bound.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._places: dict[Awaits, dict[Place, None]] = {what: {} for what in Awaits}
        self._of: Counter[str] = Counter()
        self._keeps_up = asyncio.Event()
        self._keeps_up.set()

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    async def room(self) -> None:
        """Returns when another one can be begun."""
        await self._keeps_up.wait()

    @asynccontextmanager
    async def place(self, address: str) -> AsyncIterator[Place]:
        """Holds a place for the handshake within the context.

        Args:
            address: The peer's.

        Raises:
            TLSError: The place was given to a newer one.
        """
        if len(self) >= self._limit:
            self._displace(address)
        try:
            async with asyncio.timeout(None) as expiry:
                place = Place(self, expiry, address)
                self._places[place.awaits][place] = None
                self._of[address] += 1
                try:
                    yield place
                finally:
                    self._remove(place)
        except TimeoutError as error:
            raise TLSError(
                Reason.DISPLACED, f"the TLS handshake was given up for a newer one: {self._limit} were unfinished"
            ) from error

    def move(self, place: Place, what: Awaits) -> None:
        """See `Place.wait_for`."""
        if place in self._places[place.awaits]:  # else it has been given up
            del self._places[place.awaits][place]
            place.awaits = what
            self._places[what][place] = None
            self._look()

    def _displace(self, address: str) -> None:
        is_greedy = self._of[address] >= max(1, self._limit // 4)
        place = next(
            one for places in self._places.values() for one in places if not is_greedy or one.address == address
        )
        self._remove(place)
        place.give_up()

    def _remove(self, place: Place) -> None:
        if place in self._places[place.awaits]:
            del self._places[place.awaits][place]
            self._of[place.address] -= 1
            if not self._of[place.address]:
                del self._of[place.address]
            self._look()

    def _look(self) -> None:
        if len(self._places[Awaits.US]) < max(1, self._limit // 2):
            self._keeps_up.set()
        else:
            self._keeps_up.clear()


@contextmanager
def _our_turn(place: Place | None) -> Iterator[None]:
    """This end has to do something within the context, and then waits for the peer."""
    if place:
        place.wait_for(Awaits.US)
    try:
        yield
    finally:
        if place:
            place.wait_for(Awaits.PEER)


def _without_certificates(error: CredentialsError) -> str:
    return (
        f"mTLS is the default, and its certificates cannot be loaded: {error}. Name others with --tls-dir, or "
        "--tls-cert, --tls-key and --tls-ca (`migproxy certs DIR` makes a set to try with); or, on a migration network "
        "that you trust, start with --disable-tls (the other end must have TLS off too; in KubeVirt: "
        "spec.configuration.migrations.disableTLS)."
    )
