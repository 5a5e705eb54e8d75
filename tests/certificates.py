"""Certificates of every kind, good and bad, for the tests."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migproxy.pki import CLIENT_NAMES, SERVER_NAMES, Files
from migproxy.tls import MutualTLS, TLSOptions
from migproxy.verify import Peers

DAY = timedelta(days=1)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True)
class Leaf:
    """What a certificate says; the defaults are KubeVirt's source."""

    names: tuple[str, ...] = CLIENT_NAMES
    usages: tuple[x509.ObjectIdentifier, ...] | None = (CLIENT,)
    begins: timedelta = -DAY
    ends: timedelta = DAY
    ca: bool = False
    sign_only: bool = False  # key usage: certificates alone, as a real CA's


SOURCE = Leaf()
TARGET = Leaf(names=SERVER_NAMES, usages=(SERVER,))


@dataclass(frozen=True)
class Issued:
    """A certificate with its key, and the intermediates to be shown with it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...] = ()

    def pem(self) -> bytes:
        return b"".join(one.public_bytes(Encoding.PEM) for one in (self.certificate, *self.chain))

    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def write(self, folder: Path) -> Path:
        """Writes tls.crt and tls.key, and returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tls.crt").write_bytes(self.pem())
        (folder / "tls.key").write_bytes(self.key_pem())
        return folder

    def issue(self, leaf: Leaf) -> Issued:
        """Signs another certificate, whose chain leads here and not further up."""
        key = ec.generate_private_key(ec.SECP256R1())
        signed = build(leaf, key, self.certificate.subject).sign(self.key, hashes.SHA256())
        below_a_root = self.certificate.issuer == self.certificate.subject
        return Issued(signed, key, () if below_a_root else (self.certificate, *self.chain))


def build(leaf: Leaf, key: ec.EllipticCurvePrivateKey, issuer: x509.Name) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(*leaf.names))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + leaf.begins)
        .not_valid_after(now + leaf.ends)
        .add_extension(x509.BasicConstraints(ca=leaf.ca, path_length=None), critical=True)
    )
    if leaf.sign_only:
        others = "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
        usage = dict.fromkeys([*others.split(), "encipher_only", "decipher_only"], False)
        builder = builder.add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
    if leaf.usages is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(leaf.usages)), critical=False)
    return builder


def name(*common_names: str) -> x509.Name:
    # Each in a set of its own, as several names are usually written.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in common_names])


def self_signed(leaf: Leaf) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    return Issued(build(leaf, key, name(*leaf.names)).sign(key, hashes.SHA256()), key)


def authority(common_name: str = "kubevirt.io") -> Issued:
    return self_signed(Leaf(names=(common_name,), usages=None, ca=True))


def client_context(ca: Path, pair: Path | None) -> ssl.SSLContext:
    """A client of the standard library that trusts that CA, with a folder's certificate or without any."""
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = False
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # 3.13's default, for key identifiers that these do not have
    if pair:
        context.load_cert_chain(pair / "tls.crt", pair / "tls.key")
    return context


def server_context(ca: Path, pair: Path) -> ssl.SSLContext:
    """A server of the standard library that asks its clients for certificates of that CA."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.load_cert_chain(pair / "tls.crt", pair / "tls.key")
    return context


@dataclass
class Cluster:
    """The certificates of a cluster, in files as the daemon reads them."""

    folder: Path
    ca: Issued
    source: Issued
    target: Issued

    @classmethod
    def make(cls, folder: Path) -> Cluster:
        ca = authority()
        cluster = cls(folder, ca, ca.issue(SOURCE), ca.issue(TARGET))
        cluster.write()
        return cluster

    def write(self, *more: Issued) -> None:
        """Writes everything, with more CAs in the bundle."""
        self.source.write(self.folder / "client")
        self.target.write(self.folder / "server")
        bundle = b"".join(one.pem() for one in (self.ca, *more))
        (self.folder / "ca.crt").write_bytes(bundle)

    def files(self, role: str) -> Files:
        return Files(
            str(self.folder / role / "tls.crt"), str(self.folder / role / "tls.key"), str(self.folder / "ca.crt")
        )

    def options(self, **changes: object) -> TLSOptions:
        options = TLSOptions(
            server=self.files("server"),
            client=self.files("client"),
            sources=Peers(CLIENT_NAMES),
            targets=Peers(SERVER_NAMES),
            ktls="off",
        )
        return replace(options, **changes)  # type: ignore[arg-type]

    def security(self, **changes: object) -> MutualTLS:
        return MutualTLS(self.options(**changes))


class SecretMount:
    """A Secret as the kubelet mounts it: files that are links into a folder, which one rename replaces.

    Args:
        folder: The mount.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._generation = 0
        folder.mkdir(parents=True)

    def put(self, content: dict[str, bytes]) -> None:
        """Replaces the whole content at once."""
        old = self.folder / f"..{self._generation}"
        self._generation += 1
        new = self.folder / f"..{self._generation}"
        new.mkdir()
        for file, data in content.items():
            (new / file).write_bytes(data)
        link = self.folder / "..data_tmp"
        link.symlink_to(new.name)
        os.rename(link, self.folder / "..data")
        for file in content:
            if not (self.folder / file).is_symlink():
                (self.folder / file).symlink_to(f"..data/{file}")
        if old.exists():
            for file_path in old.iterdir():
                file_path.unlink()
            old.rmdir()
