"""Certificates from files: where they are, when they changed, when they end, and the contexts made of them.

KubeVirt's certificates are Secrets mounted into the pod, replaced in place about daily by the swap of a symbolic link.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from migproxy.pki import Files
from migproxy.safefiles import read_regular

log = structlog.get_logger(__name__)

_SMALLEST_SHARE = 3  # a certificate nears its end in the last third of its life,
_LONGEST_NOTICE = timedelta(days=14)  # but not earlier than this


class CredentialsError(Exception):
    """A certificate, its key or the CA bundle cannot be used; the message names the file, and what to do."""


@dataclass(frozen=True, slots=True)
class Validity:
    """How long a file's certificate is good for.

    Attributes:
        role: "server", "client", or "ca" for the bundle.
        path: The file.
        begins, ends: Of a bundle with several: the latest of each, since CAs are replaced one by one.
    """

    role: str
    path: str
    begins: datetime
    ends: datetime

    def notice(self, wanted: timedelta | None) -> timedelta:
        """How long before the end to warn: as wanted, or the last third of its life, two weeks at most."""
        return wanted if wanted is not None else min((self.ends - self.begins) / _SMALLEST_SHARE, _LONGEST_NOTICE)

    def nears_end(self, now: datetime, wanted: timedelta | None) -> bool:
        """Whether to warn by now."""
        return now >= self.ends - self.notice(wanted)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One role's files as they were at one time.

    Attributes:
        context: For connections of that role.
        authorities: The CA bundle.
        validities: Of the certificate and of the bundle.
    """

    context: SSL.Context
    authorities: tuple[x509.Certificate, ...]
    validities: tuple[Validity, Validity]


class Credentials:
    """One role's certificate, key and CA bundle, loaded again when their files change.

    What cannot be loaded leaves what was loaded before in force. Safe to use from several threads.

    Attributes:
        role: "server" or "client".
        problem: Why the files as they are now cannot be used, None when they are in use.
        reloads: How often they were loaded again since they changed.
        failures: How often that failed.

    Args:
        role: See above.
        files: Where they are.
        make_context: Makes a context for the role, without certificates.

    Raises:
        CredentialsError: They cannot be loaded.
    """

    def __init__(self, role: str, files: Files, make_context: Callable[[], SSL.Context]) -> None:
        self.role = role
        self.problem: str | None = None
        self.reloads = 0
        self.failures = 0
        self._files = files
        self._make_context = make_context
        self._lock = threading.Lock()
        self._loaded, self._identity = self._load()
        self._attempted = self._identity

    def current(self) -> Loaded:
        """What the files hold now; what they held before while they are unusable."""
        with self._lock:
            self._refresh()
            return self._loaded

    @property
    def validities(self) -> tuple[Validity, Validity]:
        """Of what is in use."""
        return self._loaded.validities

    def _refresh(self) -> None:
        try:
            identity = self._files.identity()
            if identity == self._identity:
                self._note(None)
                return
            if identity == self._attempted and self.problem:
                return
            self._attempted = identity
            self._loaded, self._identity = self._load()
        except (OSError, CredentialsError) as error:
            self._note(_explain(error))
            return
        self._note(None)
        self.reloads += 1
        log.info("certificates loaded", role=self.role, file=self._files.cert, ends=self._ends())

    def _note(self, problem: str | None) -> None:
        if problem and problem != self.problem:
            self.failures += 1
            log.error("certificates cannot be loaded, the last good ones stay in use", role=self.role, error=problem)
        self.problem = problem

    def _ends(self) -> str:
        return self._loaded.validities[0].ends.isoformat()

    def _load(self) -> tuple[Loaded, tuple[tuple[int, int, int, int], ...]]:
        files = self._files
        try:
            identity = files.identity()  # before they are read: what changes meanwhile is read again
            leaf = _read(files.cert)
            bundle = files.bundle()
            authorities = _read(bundle)
        except OSError as error:
            raise CredentialsError(_explain(error)) from error
        context = self._make_context()
        try:
            key = load_pem_private_key(read_regular(files.key), None)
            context.use_certificate(leaf[0])
            for issuer in leaf[1:]:
                context.add_extra_chain_cert(issuer)
            context.use_privatekey(key)  # type: ignore[arg-type]
            context.check_privatekey()
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm, SSL.Error) as error:
            why = getattr(error, "strerror", None) or (
                str(error) if not isinstance(error, SSL.Error) else "they differ"
            )
            raise CredentialsError(
                f"{files.cert} and {files.key} are no pair: {why}; the key must be that of the first certificate, in "
                "PEM, and not encrypted"
            ) from error
        store = context.get_cert_store()
        assert store
        for authority in authorities:
            store.add_cert(crypto.X509.from_cryptography(authority))
        # As for Go, everything in the CA bundle is an anchor of trust.
        store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
        validities = (_validity(self.role, files.cert, leaf[:1]), _validity("ca", bundle, authorities))
        return Loaded(context, tuple(authorities), validities), identity


def _read(path: str) -> list[x509.Certificate]:
    text = read_regular(path)
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError as error:
        raise CredentialsError(f"{path} holds no certificates in PEM, or damaged ones") from error


def _validity(role: str, path: str, certificates: Sequence[x509.Certificate]) -> Validity:
    begins = max(one.not_valid_before_utc for one in certificates)
    return Validity(role, path, begins, max(one.not_valid_after_utc for one in certificates))


def _explain(error: OSError | CredentialsError) -> str:
    if isinstance(error, CredentialsError):
        return str(error)
    return f"{error.filename}: {error.strerror}"


def now() -> datetime:
    """The time that validities are compared with."""
    return datetime.now(UTC)
