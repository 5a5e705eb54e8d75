"""What protects the connections between the two nodes: mTLS as KubeVirt's migration proxy speaks it, or nothing.

The handshake is OpenSSL's, in steps that the event loop waits for and threads carry out. After it the connection
goes to the kernel where kernel TLS can have both directions (`ktls`), else to user space (`userspace`).
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar

import structlog

from migproxy import credentials, ktls
from migproxy.credentials import Credentials, CredentialsError, Loaded
from migproxy.fds import reset
from migproxy.ktls import KernelSend
from migproxy.pki import Files
from migproxy.relay.protocol import Way
from migproxy.sockets import ready
from migproxy.splice import Pipe, Pump
from migproxy.tally import Tally
from migproxy.tlserrors import Reason, TLSError
from migproxy.transport import KernelTransport, Transport, UserTransport
from migproxy.userspace import HANDSHAKE_READ, MemorySession, MemoryTransport, SocketReceive, alert
from migproxy.verify import Peers

log = structlog.get_logger(__name__)
T = TypeVar("T")

Version = Literal["1.2", "1.3"]
_VERSIONS: dict[Version, ssl.TLSVersion] = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

_SUITES = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}
"""The cipher suites of TLS 1.2 that are not broken, by IANA's and Go's name, as OpenSSL calls them; fastest first."""

_ALWAYS = {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}
"""TLS 1.3's, which neither Go nor Python's ssl lets anyone choose from."""

_OFFLOADS = {(True, True): "both ways", (True, False): "only sending", (False, False): "not at all"}
_KERNEL_REMEDY = (
    "load the kernel's module (modprobe tls); OpenSSL 3.0 offloads all of TLS 1.2, receiving TLS 1.3 needs 3.2"
)
_OLD = re.compile(r"_CBC_|_RC4_|^TLS_RSA_|3DES|-SHA\d*$|^(AES|RC4|DES)")
_CHECK_SECONDS = 60.0
_THREADS = 2  # a step of a handshake takes a millisecond or less


class SecurityError(Exception):
    """The connections between the nodes cannot be protected as demanded."""


class Security(Protocol):
    """Protects one TCP connection after it is made and before a byte of the launcher's crosses it.

    Attributes:
        errors: Connections that were refused, or broke, for a reason of TLS: by reason.
        encrypts: Whether a connection that is not secured yet cannot be gone on with by another process; None while
            that is not known.
        is_relayed: Whether the relay can move connections (`KernelTransport`), as far as it is known before.
    """

    errors: Counter[Reason]

    @property
    def encrypts(self) -> bool | None: ...

    @property
    def is_relayed(self) -> bool: ...

    async def settled(self) -> None:
        """Returns once it is known how connections are to be protected, or nobody will tell soon."""

    async def secure(self, tcp: socket.socket, *, server: bool) -> Transport:
        """Does what the peers must do first, and returns the connection to relay.

        Args:
            tcp: The connected socket, not blocking; owned by whoever gets the result.
            server: Whether this end accepted the connection (the target does).

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
    is_relayed = True

    def __init__(self) -> None:
        self.errors: Counter[Reason] = Counter()

    async def settled(self) -> None:
        """See Security: it is."""

    async def secure(self, tcp: socket.socket, *, server: bool) -> Transport:
        return KernelTransport(tcp)

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
        ciphers: Cipher suites of TLS 1.2, by IANA's or OpenSSL's names, best first; empty for the built-in list.
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


def cipher_string(names: Sequence[str]) -> tuple[str, list[str]]:
    """Translates names of cipher suites for OpenSSL.

    Args:
        names: IANA's (Go's, KubeVirt's `tlsConfiguration.ciphers`) or OpenSSL's.

    Returns:
        OpenSSL's list for TLS 1.2, empty where none is left, and the names left out because they are old.

    Raises:
        SecurityError: A name is unknown.
    """
    chosen, old = [], []
    for name in names:
        if name in _SUITES or name in _SUITES.values():
            chosen.append(_SUITES.get(name, name))
        elif name in _ALWAYS:
            continue
        elif _OLD.search(name):
            old.append(name)
        else:
            raise SecurityError(f"--tls-ciphers: {name} is not known; known are {', '.join([*_SUITES, *_ALWAYS])}")
    return ":".join(chosen), old


class MutualTLS:
    """mTLS with KubeVirt's rules.

    Attributes:
        errors: See Security.
        version: The only version that is spoken, where kernel TLS decides; None for any from `min_version`.
        kernel: Whether connections are given to the kernel.
        kernel_problem: Why not, None where they are.
        encrypts: See Security.

    Raises:
        SecurityError: Certificates cannot be loaded, a cipher is unknown, or kernel TLS cannot be had with ktls "on".
    """

    encrypts = True

    def __init__(self, options: TLSOptions) -> None:
        self.errors: Counter[Reason] = Counter()
        self.version: Version | None = None
        self.kernel = False
        self.kernel_problem: str | None = "off (--ktls off)"
        self._options = options
        self._warned: set[object] = set()
        self._ciphers, old = cipher_string(options.ciphers or tuple(_SUITES))
        if old:
            log.warning("old cipher suites are never used", ciphers=old)
        if not self._ciphers and options.min_version == "1.2":
            raise SecurityError("--tls-ciphers names no usable suite of TLS 1.2: add one, or set --tls-min-version 1.3")
        try:
            if options.ktls != "off":
                self._choose_kernel()
            self._server = self._credentials(server=True)
            self._client = self._credentials(server=False)
        except CredentialsError as error:
            raise SecurityError(_without_certificates(error)) from error
        self._pool = ThreadPoolExecutor(_THREADS, "handshake")

    @property
    def is_relayed(self) -> bool:
        """See Security: only with both directions in the kernel."""
        return self.kernel and self.kernel_problem is None

    async def settled(self) -> None:
        """See Security: it is."""

    def _credentials(self, *, server: bool) -> Credentials:
        files = self._options.server if server else self._options.client
        return Credentials("server" if server else "client", files, lambda: self._context(server=server))

    def _context(self, *, server: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        # As for Go, everything in the CA bundle is an anchor of trust.
        context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
        context.minimum_version = _VERSIONS[self._options.min_version]
        if self.version:
            context.minimum_version = context.maximum_version = _VERSIONS[self.version]
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
        # Python 3.11.2, Debian 12's, sets it: a stream without a close_notify would pass for a complete one.
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        if self._ciphers:
            context.set_ciphers(self._ciphers)
        if server:
            context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
            context.num_tickets = 0
        if self.kernel:
            context.options |= ktls.OP_ENABLE_KTLS
        return context

    def _choose_kernel(self) -> None:
        """Tries which version OpenSSL and the kernel can offload, and settles for it."""
        allowed: list[Version] = ["1.3", "1.2"] if self._options.min_version == "1.2" else ["1.3"]
        self.kernel = True
        results: dict[Version, tuple[bool, bool]] = {}
        for self.version in allowed:
            contexts = [self._credentials(server=server).current().context for server in (True, False)]
            results[self.version] = _try_offload(*contexts)
        best = max(allowed, key=lambda version: sum(results[version]))
        sends, receives = results[best]
        self.kernel, self.version = sends, best if sends else None
        if sends and receives:
            self.kernel_problem = None
            return
        found = ", ".join(f"TLS {version} {_OFFLOADS[ways]}" for version, ways in results.items())
        self.kernel_problem = f"{ssl.OPENSSL_VERSION} and this kernel offload {found}; {_KERNEL_REMEDY}"
        if self._options.ktls == "on":
            raise SecurityError(f"--ktls on: {self.kernel_problem}; or use --ktls auto")
        log.warning("kernel TLS sends only" if sends else "kernel TLS is not used", why=self.kernel_problem)

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
            "min_version": self.version or self._options.min_version,
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

    async def secure(self, tcp: socket.socket, *, server: bool) -> Transport:
        timeout = self._options.handshake_timeout
        try:
            async with asyncio.timeout(timeout):
                return await self._secure(tcp, server=server)
        except TimeoutError as error:
            raise TLSError(Reason.TIMEOUT, f"the TLS handshake was not finished within {timeout:g} s") from error

    async def _secure(self, tcp: socket.socket, *, server: bool) -> Transport:
        credentials = self._server if server else self._client
        peers = self._options.sources if server else self._options.targets
        loaded = await self._step(credentials.current)

        def check(tls: ssl.SSLObject | ssl.SSLSocket) -> str:
            leaf = tls.getpeercert(binary_form=True)
            if leaf is None:
                raise TLSError(Reason.NO_CERTIFICATE, "the peer shows no certificate")
            if tls.session_reused:  # see Credentials.wear
                raise TLSError(Reason.HANDSHAKE, "the peer resumes a session, which is not allowed")
            if server and tls.version() == "TLSv1.2":
                credentials.wear()
            return peers.check(leaf, loaded.authorities, client=server)

        if self.kernel:
            return await self._over_socket(tcp, loaded.context, check, server=server)
        return await self._over_memory(tcp, loaded.context, check, server=server)

    async def _over_memory(
        self, tcp: socket.socket, context: ssl.SSLContext, check: Callable[[ssl.SSLObject], str], *, server: bool
    ) -> Transport:
        loop = asyncio.get_running_loop()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=server)
        try:
            while await self._step(lambda: _handshake(tls)) != "done":
                if outgoing.pending:
                    await loop.sock_sendall(tcp, outgoing.read())
                data = await loop.sock_recv(tcp, HANDSHAKE_READ)
                if data:
                    incoming.write(data)
                else:
                    incoming.write_eof()
            # Before the last flight is sent: a client of TLS 1.2 that is refused never sees the handshake succeed.
            who = await self._step(lambda: check(tls))
            await loop.sock_sendall(tcp, outgoing.read())
        except OSError as error:
            with suppress(OSError):
                if outgoing.pending and not isinstance(error, TLSError):  # OpenSSL's alert
                    tcp.send(outgoing.read())
            raise refusal(error, tls) from error
        label = f"{tls.version()} {_cipher(tls)} with {who}, in user space"
        return MemoryTransport(tcp, MemorySession(tls, incoming, outgoing), label)

    async def _over_socket(
        self, tcp: socket.socket, context: ssl.SSLContext, check: Callable[[ssl.SSLSocket], str], *, server: bool
    ) -> Transport:
        try:
            tls = context.wrap_socket(
                tcp, server_side=server, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        except OSError as error:
            raise refusal(error) from error
        try:
            while (state := await self._step(lambda: _handshake(tls))) != "done":
                await ready(tls.fileno(), writing=state == "write")
            who = await self._step(lambda: check(tls))
            return self._offload(tls, who)
        except OSError as error:
            refused = refusal(error, tls)
            reset(tls)
            raise refused from error
        except BaseException:
            reset(tls)
            raise

    def _offload(self, tls: ssl.SSLSocket, who: str) -> Transport:
        sends, receives = ktls.offloaded(tls)
        label = f"{tls.version()} {_cipher(tls)} with {who}"
        if sends and receives:
            return KernelTransport(tls, f"{label}, in the kernel", Way.KTLS)
        if sends and self._options.ktls == "auto":
            return _SendingKernelTransport(tls, f"{label}, sending in the kernel")
        raise TLSError(Reason.NOT_OFFLOADED, f"the kernel did not take over {label}: use --ktls off for this peer")

    async def _step(self, call: Callable[[], T]) -> T:
        """Runs a call in a thread, to its end even when cancelled: what it uses must not be closed under it."""
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


class _SendingKernelTransport(UserTransport):
    """A connection that the kernel encrypts, and OpenSSL decrypts."""

    def __init__(self, tls: ssl.SSLSocket, label: str) -> None:
        super().__init__(tls, label)
        self._tls = tls

    def pumps(self, unix: socket.socket, tallies: tuple[Tally, Tally]) -> tuple[Pump, Pump]:
        sending, receiving = tallies
        return KernelSend(unix, self._tls, sending, Pipe()), SocketReceive(self._tls, unix, receiving)


class Unfinished:
    """The handshakes of one listener that are not finished: a bounded number, so that nobody's silence costs much.

    Where the bound is reached, the oldest one is given up of the address that has most of them: whoever opens
    connections and says nothing displaces themselves, and a real peer, which is done within milliseconds, stays.

    Args:
        limit: The bound.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[asyncio.Timeout, str] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, address: str) -> AsyncIterator[None]:
        """Holds a place for the handshake within the context.

        Args:
            address: The peer's.

        Raises:
            TLSError: The place was given to a newer one.
        """
        if len(self._waiting) >= self._limit:
            self._displace()
        try:
            async with asyncio.timeout(None) as expiry:
                self._waiting[expiry] = address
                try:
                    yield
                finally:
                    self._waiting.pop(expiry, None)
        except TimeoutError as error:
            raise TLSError(
                Reason.DISPLACED, f"the TLS handshake was given up for a newer one: {self._limit} were unfinished"
            ) from error

    def _displace(self) -> None:
        ((most, _),) = Counter(self._waiting.values()).most_common(1)
        oldest = next(expiry for expiry, address in self._waiting.items() if address == most)
        del self._waiting[oldest]
        oldest.reschedule(0)


def _handshake(tls: ssl.SSLObject | ssl.SSLSocket) -> Literal["done", "read", "write"]:
    """Goes on with a handshake as far as it can; says what it waits for."""
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return "read"
    except ssl.SSLWantWriteError:
        return "write"
    return "done"


def _try_offload(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> tuple[bool, bool]:
    """Makes a connection to itself; returns whether the kernel took over sending, and receiving."""
    server_context.verify_mode = client_context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = client_context.wrap_socket(
                socket.create_connection(listener.getsockname()), do_handshake_on_connect=False
            )
            with client:
                accepted, _ = listener.accept()
                server = server_context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
                with server:
                    for end in (client, server):
                        end.setblocking(False)
                        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # nothing waits for an ACK
                    while {_handshake(client), _handshake(server)} != {"done"}:
                        pass
                    (sends, receives), (also_sends, also_receives) = map(ktls.offloaded, (client, server))
    except OSError as error:
        log.debug("kernel TLS cannot be tried", error=str(error))
        return False, False
    return sends and also_sends, sends and also_sends and receives and also_receives


def refusal(error: OSError, tls: ssl.SSLObject | ssl.SSLSocket | None = None) -> TLSError:
    """Why a handshake failed, from what OpenSSL or the socket says, and how far the handshake was."""
    if isinstance(error, TLSError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = _VERIFY_CODES.get(error.verify_code, Reason.BAD_CERTIFICATE)
        return TLSError(reason, f"the peer's certificate is refused: {error.verify_message}")
    if not isinstance(error, ssl.SSLError):
        return TLSError(Reason.CLOSED, f"the connection broke during the TLS handshake: {error.strerror or error}")
    why = error.reason or str(error)
    if isinstance(error, ssl.SSLEOFError) or "UNEXPECTED_EOF" in why:
        return TLSError(Reason.CLOSED, "the peer closed the connection during the TLS handshake")
    if "_ALERT_" in why:
        return TLSError(Reason.REFUSED_BY_PEER, f"the peer refuses us with a TLS alert: {alert(why)}")
    reason = _REASONS.get(why, Reason.HANDSHAKE)
    if why == "RECORD_LAYER_FAILURE" and tls and not tls.cipher():  # OpenSSL 3.2 and newer, of each record that is none
        reason = Reason.NOT_TLS  # with a cipher, it may be an encrypted one that was damaged
    return TLSError(reason, f"the TLS handshake failed: {_SAYS.get(reason) or why.lower().replace('_', ' ')}")


_VERIFY_CODES = {  # openssl/x509_vfy.h
    2: Reason.WRONG_CA,
    7: Reason.WRONG_CA,
    9: Reason.NOT_YET_VALID,
    10: Reason.EXPIRED,
    18: Reason.SELF_SIGNED,
    19: Reason.WRONG_CA,
    20: Reason.WRONG_CA,
    21: Reason.WRONG_CA,
    24: Reason.WRONG_CA,
    26: Reason.WRONG_USAGE,
    79: Reason.WRONG_CA,
}
_REASONS = {
    "HTTP_REQUEST": Reason.NOT_TLS,
    "HTTPS_PROXY_REQUEST": Reason.NOT_TLS,
    "WRONG_VERSION_NUMBER": Reason.NOT_TLS,
    "PACKET_LENGTH_TOO_LONG": Reason.NOT_TLS,
    "RECORD_TOO_SMALL": Reason.NOT_TLS,
    "UNEXPECTED_MESSAGE": Reason.NOT_TLS,
    "UNSUPPORTED_PROTOCOL": Reason.VERSION,
    "VERSION_TOO_LOW": Reason.VERSION,
    "VERSION_TOO_HIGH": Reason.VERSION,
    "NO_SHARED_CIPHER": Reason.CIPHER,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": Reason.NO_CERTIFICATE,
}
_SAYS = {
    Reason.NOT_TLS: "the peer does not speak TLS",
    Reason.VERSION: "the peer offers no version of TLS that is allowed here (--tls-min-version)",
    Reason.CIPHER: "the peer offers no cipher suite that is allowed here (--tls-ciphers)",
    Reason.NO_CERTIFICATE: "the peer shows no certificate",
}


def _cipher(tls: ssl.SSLObject | ssl.SSLSocket) -> str:
    cipher = tls.cipher()
    return cipher[0] if cipher else "(no cipher)"


def _without_certificates(error: CredentialsError) -> str:
    return (
        f"mTLS is the default, and its certificates cannot be loaded: {error}. Name others with --tls-dir, or "
        "--tls-cert, --tls-key and --tls-ca (`migproxy certs DIR` makes a set to try with); or, on a migration network "
        "that you trust, start with --disable-tls (the other end must have TLS off too; in KubeVirt: "
        "spec.configuration.migrations.disableTLS)."
    )
