"""What the parts of a node tell of their health reaches readiness and metrics; what they do not tell, does not."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from migproxy.budget import Budget
from migproxy.capacity import Capacity
from migproxy.health import WatchHealth
from migproxy.inventory import Inventory
from migproxy.inventory.files import FileInventory
from migproxy.launcher import Launchers
from migproxy.measure import Measures
from migproxy.metrics import Exporter, render
from migproxy.netif import AddressWatcher
from migproxy.node import Node, NodeOptions
from migproxy.proxy import Surroundings
from migproxy.relay.client import RelayClient
from migproxy.sockets import TCPOptions
from migproxy.target import PortRange
from migproxy.tls import Plaintext, Security
from migproxy.tlserrors import Reason
from migproxy.transport import Transport
from migproxy.watch import Watcher

pytestmark = pytest.mark.tier("gate")


class Watched:
    """An inventory that watches an API server."""

    problems: Mapping[str, str] = {}
    flaws: Mapping[str, str] = {}
    health = WatchHealth("kubernetes", 1700000000.0, reconnects=2, relists=1)

    async def changes(self) -> AsyncIterator[Mapping[str, Any]]:
        yield {}

    def may_hide(self, uid: str) -> bool:
        raise AssertionError

    async def publish(self, *_: Any) -> None:
        raise AssertionError

    def note(self, *_: Any, **__: Any) -> None:
        raise AssertionError


class Protected:
    """A security with a certificate."""

    encrypts = True

    def __init__(self, ends: str) -> None:
        self.errors: Counter[Reason] = Counter({Reason.WRONG_CA: 3})
        self._ends = ends

    async def settled(self) -> None: ...

    async def secure(
        self, tcp: socket.socket, *, server: bool, meeting: object = None, commit: object = None
    ) -> Transport:
        return Transport(tcp)

    def report(self) -> dict[str, Any]:
        certificates = [{"role": "server", "file": "/tls.crt", "not_after": self._ends}]
        return {"mode": "mTLS", "errors": dict(self.errors), "problems": {}, "certificates": certificates}

    async def watch(self) -> None:
        raise AssertionError


def node(inventory: Inventory, security: Security, watcher: Watcher) -> Node:
    def nowhere(_: int) -> Any:
        raise AssertionError

    around = Surroundings(
        Launchers("/run", "/"),
        TCPOptions(),
        security,
        nowhere,
        1,
        1,
        1,
        1,
        relay=RelayClient("/nonexistent"),
        budget=Budget(lambda: Capacity(1000, "nothing", "")),
    )
    options = NodeOptions("node01", PortRange(), None, "libvirt/virtqemud-sock")
    return Node(options, around, inventory, AddressWatcher("migration0"), watcher)


def exposition(of: Node) -> str:
    return render(Exporter(of.report, Measures()).scrape(), "")[0].decode()


async def test_watch_and_certificates_are_exported_where_they_are_told() -> None:
    async with Watcher() as watcher:
        made = node(Watched(), Protected("2020-01-01T00:00:00+00:00"), watcher)
        assert made.checks["certificates"] == "/tls.crt has expired: renew it"
        text = exposition(made)
    assert 'migproxy_watch_last_event_timestamp_seconds{source="kubernetes"} 1.7e+09' in text
    assert 'migproxy_watch_reconnects_total{source="kubernetes"} 2.0' in text
    assert 'migproxy_watch_relists_total{source="kubernetes"} 1.0' in text
    assert 'migproxy_certificate_expiry_timestamp_seconds{file="/tls.crt",role="server"} 1.5778368e+09' in text
    assert 'migproxy_tls_errors_total{reason="wrong_ca"} 3.0' in text
    assert 'migproxy_node_check{check="certificates"} 0.0' in text
    assert "migproxy_node_ready 0.0" in text


async def test_certificates_that_are_good_are_well() -> None:
    async with Watcher() as watcher:
        assert node(Watched(), Protected("2999-01-01T00:00:00+00:00"), watcher).checks["certificates"] is None


async def test_files_in_plaintext_have_neither_certificates_nor_reconnects(tmp_path: Path) -> None:
    async with Watcher() as watcher:
        made = node(FileInventory(str(tmp_path), watcher), Plaintext(), watcher)
        assert "certificates" not in made.checks
        text = exposition(made)
    for name in ("certificate", "reconnects", "relists", "tls_errors"):
        assert name not in text, name


async def test_a_flawed_vmi_is_told_and_leaves_the_node_ready() -> None:
    class Flawed(Watched):
        flaws: Mapping[str, str] = {
            f"uid-{number}": "VMI default/x: metadata.name is missing" for number in range(1000)
        }

    async with Watcher() as watcher:
        sound, flawed = (node(inventory, Plaintext(), watcher) for inventory in (Watched(), Flawed()))
        assert flawed.checks == sound.checks
        assert flawed.report()["flaws"]["count"] == 1000
        assert len(flawed.report()["flaws"]["first"]) == 20
        assert "migproxy_inventory_flaws 1000.0" in exposition(flawed)
        assert "migproxy_inventory_problems 0.0" in exposition(flawed)


async def test_no_check_controls_a_terminal() -> None:
    class Unreadable(Watched):
        problems: Mapping[str, str] = {"/vmis/\x1b]0;x\x07\udcff": "\u202e\n[+] serving: ok"}

    async with Watcher() as watcher:
        reason = node(Unreadable(), Plaintext(), watcher).checks["inventory"]
    assert reason
    assert reason.isprintable()


async def test_readiness_names_what_is_missing() -> None:
    async with Watcher() as watcher:
        made = node(Watched(), Plaintext(), watcher)
        assert made.checks["synchronised"] == "not synchronised yet"
        assert made.checks["address"] == "the migration address is not known yet"
        made.draining = True
        assert "draining" in (made.checks["serving"] or "")
