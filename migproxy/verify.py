"""Whether a peer is who it must be, beyond the chain that OpenSSL has verified. Pure.

The rules are those of KubeVirt's migration proxy (virt-handler, main branch of August 2026): the certificates carry no
host names, so that a peer is known by its issuer, its extended key usage and its common name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migproxy.tlserrors import Reason, TLSError


@dataclass(frozen=True, slots=True)
class Peers:
    """Who is accepted at the other end.

    Attributes:
        names: Common names, one of which the peer must have.
        externally_managed: The cluster's own PKI issues the certificates: intermediates are accepted, and the
            common name is not checked.
    """

    names: tuple[str, ...]
    externally_managed: bool = False

    @lru_cache(maxsize=256)  # noqa: B019 - there are as few of these as configurations
    def check(self, leaf: bytes, authorities: tuple[x509.Certificate, ...], *, client: bool) -> str:
        """Checks a peer's certificate, whose chain and dates have been verified.

        A certificate without the extended key usage extension is good for every use, as for Go's x509 package.

        Args:
            leaf: The certificate that the peer proved to have, DER.
            authorities: The CA bundle.
            client: Whether the peer is the client (the source).

        Returns:
            Who it is, for people.

        Raises:
            TLSError: It is not accepted; says why.
        """
        try:
            certificate = x509.load_der_x509_certificate(leaf)
            subject = certificate.subject
            extensions = certificate.extensions
        except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
            raise TLSError(Reason.BAD_CERTIFICATE, f"the peer's certificate cannot be read: {error}") from error
        names = [str(name.value) for name in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        who = " and ".join(map(repr, names)) or "without a common name"
        if _is_authority(extensions):
            raise TLSError(Reason.CA_AS_LEAF, f"the peer shows the certificate of a CA as its own: {who}")
        if not _serves(extensions, client=client):
            use = "clientAuth" if client else "serverAuth"
            raise TLSError(Reason.WRONG_USAGE, f"the peer's certificate ({who}) is not for {use}")
        if self.externally_managed:
            return who
        if not any(issued(certificate, authority) for authority in authorities):
            raise TLSError(
                Reason.INTERMEDIATE,
                f"the peer's certificate ({who}) is issued by an intermediate CA; if this cluster's own PKI manages "
                "the certificates, use --tls-externally-managed",
            )
        # One name only: of several, others may read another one.
        if len(names) != 1 or names[0] not in self.names:
            option = "--tls-client-names" if client else "--tls-server-names"
            raise TLSError(
                Reason.WRONG_NAME,
                f"the peer is {who}, which is not among those accepted ({option} {','.join(self.names)})",
            )
        return who


def _is_authority(extensions: x509.Extensions) -> bool:
    try:
        return extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _serves(extensions: x509.Extensions, *, client: bool) -> bool:
    try:
        usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    wanted = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
    return wanted in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages


def issued(leaf: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether that authority's key signed the certificate, and its name stands there as the issuer's."""
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
