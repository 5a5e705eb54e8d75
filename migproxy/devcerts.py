"""Certificates to try mTLS with: a CA and the two pairs, with KubeVirt's names. Not for production: no rotation."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migproxy.pki import CLIENT_NAMES, SERVER_NAMES
from migproxy.safefiles import make_folder

_EARLY = timedelta(hours=1)  # for clocks that differ


def make(directory: str, days: int) -> None:
    """Writes ca.crt, ca.key, and tls.crt and tls.key in the folders `server` and `client`, as `--tls-dir` takes them.

    Args:
        directory: The folder; made if need be.
        days: How long the certificates are good for.

    Raises:
        OSError: They cannot be written, or exist already: nothing is replaced.
    """
    make_folder(directory)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    signed = (
        _certificate("migproxy development CA", authority_key.public_key(), days)
        .issuer_name(_name("migproxy development CA"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    _write(directory, "ca", signed, authority_key)
    pairs = (
        ("server", SERVER_NAMES[0], ExtendedKeyUsageOID.SERVER_AUTH),
        ("client", CLIENT_NAMES[0], ExtendedKeyUsageOID.CLIENT_AUTH),
    )
    for role, name, usage in pairs:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = (
            _certificate(name, key.public_key(), days)
            .issuer_name(signed.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
            .sign(authority_key, hashes.SHA256())
        )
        folder = os.path.join(directory, role)
        make_folder(folder)
        _write(folder, "tls", leaf, key)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _certificate(name: str, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _write(folder: str, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for suffix, content, mode in (("key", private, 0o600), ("crt", certificate.public_bytes(Encoding.PEM), 0o644)):
        fd = os.open(os.path.join(folder, f"{name}.{suffix}"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
