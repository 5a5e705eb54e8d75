"""KubeVirt's certificates as their users see them: the names in them, and the files that they are in.

Imported by the command line, and so without the libraries that read certificates.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

CLIENT_NAMES = ("kubevirt.io:system:client:migration",)
"""Common name of KubeVirt's sources."""

OLDER_CLIENT_NAME = "kubevirt.io:system:client:virt-handler"
"""What they are called where a KubeVirt has no certificate for migrations alone; elsewhere others have this name."""

SERVER_NAMES = ("kubevirt.io:system:node:virt-handler",)
"""Common name of KubeVirt's targets."""


SERVER_DIR = "/etc/virt-handler/servercertificates"
CLIENT_DIR = "/etc/virt-handler/migrationservercertificates"
"""Where virt-handler has its Secrets mounted."""

OLDER_CLIENT_DIR = "/etc/virt-handler/clientcertificates"
"""Where it had the client's until August 2026."""

CA_DIR = "/etc/virt-handler/kubevirt-ca"
"""Where this daemon expects the ConfigMap kubevirt-ca, which virt-handler itself reads from the API."""

_CA_NAMES = ("ca.crt", "ca-bundle", "ca-bundle.crt")


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one role.

    Attributes:
        cert, key: The certificate, with intermediates after it if there are any, and its key; PEM.
        ca: The CA bundle, PEM, or a folder that holds it under one of its usual names.
    """

    cert: str
    key: str
    ca: str

    def bundle(self) -> str:
        """The file that the CA bundle is in."""
        if not os.path.isdir(self.ca):
            return self.ca
        candidates = [os.path.join(self.ca, name) for name in _CA_NAMES]
        return next((path for path in candidates if os.path.exists(path)), candidates[0])

    def identity(self) -> tuple[tuple[int, int, int, int], ...]:
        """What differs once a file was replaced or written to; raises OSError for a missing one."""
        each = [os.stat(path) for path in (self.cert, self.key, self.bundle())]
        return tuple((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size) for status in each)


def locate(
    *, server: str | None, client: str | None, pair: tuple[str, str] | None, folder: str | None, ca: str | None
) -> tuple[Files, Files]:
    """Decides which files serve which role: the most particular that was given, KubeVirt's where nothing was.

    Args:
        server, client: Folders with tls.crt and tls.key for the one role.
        pair: Certificate and key for both roles.
        folder: As `migproxy certs` makes it: ca.crt, and tls.crt and tls.key for both roles, or for each in
            folders `server` and `client`.
        ca: The CA bundle, file or folder.

    Returns:
        The target's files and the source's.
    """

    def of_role(own: str | None, name: str, default: str) -> Files:
        bundle = ca or folder or CA_DIR
        if own is None and pair is not None:
            return Files(*pair, bundle)
        if own is None and folder is not None:
            own = os.path.join(folder, name)
            if not os.path.isdir(own):
                own = folder
        base = own or default
        return Files(os.path.join(base, "tls.crt"), os.path.join(base, "tls.key"), bundle)

    client_dir = CLIENT_DIR if os.path.isdir(CLIENT_DIR) else OLDER_CLIENT_DIR
    return of_role(server, "server", SERVER_DIR), of_role(client, "client", client_dir)
