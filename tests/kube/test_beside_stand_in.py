"""The stand-in for virt-handler is as strict as virt-handler: or a mix of the two would prove little."""

import asyncio
import socket
from pathlib import Path

import pytest

from migproxy.pki import CLIENT_NAMES, SERVER_NAMES
from migproxy.portmap import Channel
from tests import certificates
from tests.certificates import Leaf
from tests.virt_handler import VirtHandler, contexts, shortened

pytestmark = pytest.mark.tier("gate")

KEY = "uid"


@pytest.mark.parametrize(
    ("clients", "servers", "is_relayed"),
    [
        pytest.param(CLIENT_NAMES[:1], SERVER_NAMES, True, id="today's"),
        pytest.param(CLIENT_NAMES[1:], SERVER_NAMES, True, id="older"),
        pytest.param(("kubevirt.io:system:client:other",), SERVER_NAMES, False, id="another-client"),
        pytest.param(CLIENT_NAMES[:1], ("kubevirt.io:system:node:other",), False, id="another-server"),
    ],
)
async def test_it_checks_whose_certificate_a_peer_has(
    tmp_path: Path, clients: tuple[str, ...], servers: tuple[str, ...], is_relayed: bool
) -> None:
    authority = certificates.authority()
    source = authority.issue(Leaf(names=clients))
    target = authority.issue(Leaf(names=servers, usages=(certificates.SERVER,)))
    certificates.Cluster(tmp_path, authority, source, target).write()
    (tmp_path / "kubevirt/migrationproxy").mkdir(parents=True)
    loop = asyncio.get_running_loop()
    virt_handler = VirtHandler("127.0.0.1", tmp_path, "libvirt-sock", contexts(tmp_path))
    with socket.socket(socket.AF_UNIX) as libvirt, socket.socket(socket.AF_UNIX) as near:
        libvirt.bind(str(tmp_path / "libvirt-sock"))
        libvirt.listen()
        for sock in (libvirt, near):
            sock.setblocking(False)
        ports = virt_handler.listen_for("first", KEY)
        virt_handler.bind(KEY, Channel.LIBVIRT, ("127.0.0.1", ports))
        with shortened(virt_handler.path(KEY, Channel.LIBVIRT)) as path:
            near.connect(path)
        await loop.sock_sendall(near, b"through")
        if is_relayed:
            far, _ = await asyncio.wait_for(loop.sock_accept(libvirt), 20)
            with far:
                assert await asyncio.wait_for(loop.sock_recv(far, 7), 20) == b"through"
        else:
            assert await asyncio.wait_for(loop.sock_recv(near, 1), 20) == b""
    await virt_handler.close()
