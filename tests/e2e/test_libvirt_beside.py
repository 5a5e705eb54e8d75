"""A virtual machine migrates live beside virt-handlers that know nothing of migproxy, by whichever of them serves.

Each node's virt-handler (a stand-in) is in the node's network, with the migration network, and so is its migproxy.
"""

import asyncio
import json
import signal
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from demo import guest as vm
from demo.guest import Guest, Move
from demo.lab import MIGPROXY, LabError, Node, end, until
from migproxy.announcement import TARGET_ANNOTATION
from migproxy.pki import CLIENT_NAMES, OLDER_CLIENT_NAME
from tests import certificates
from tests.e2e.test_libvirt_kubernetes import KubeLab
from tests.e2e.test_libvirt_migration import assert_heartbeat_goes_on, assert_runs_only_on
from tests.e2e.unbreakable import SUSPENDED, metronome

pytestmark = [pytest.mark.tier("soak"), pytest.mark.alone]

BEAT = 0.3  # seconds that a daemon lives once it serves
OLD_STYLE = certificates.Leaf(names=(OLDER_CLIENT_NAME,), usages=(certificates.CLIENT, certificates.SERVER))


class StandIn:
    """A node's virt-handler.

    Args:
        lab: Where its API server and its certificates are.
        node: Its node.
    """

    def __init__(self, lab: "BesideLab", node: Node) -> None:
        self._lab, self._node = lab, node
        self._report, self._log = node.directory / "virt-handler.json", node.directory / "virt-handler.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, period: float = 0.2) -> None:
        """Starts it; it looks at the VMIs once in that many seconds."""
        options = {
            "node": self._node.name,
            "address": self._node.address,
            "api": self._lab.door.url,
            "token": self._lab.handler_token,
            "libvirt-socket": "libvirt/libvirt-sock",
            "run-dir": self._node.run_dir,
            "report": self._report,
            "period": period,
            "hold": self._lab.hold,
            **({"tls-dir": self._lab.directory / "tls"} if self._lab.tls else {}),
        }
        command = [*self._node.prefix("net"), sys.executable, "-m", "tests.virt_handler"]
        command += ["--older-clients"] if self._lab.old_style else []
        self._report.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, *(f"--{option}={value}" for option, value in options.items()), stdout=log, stderr=log
            )
        try:
            await until(self._report.exists, f"{self._node.name}'s virt-handler")
        except LabError as error:
            raise LabError(f"{error}: {self._log.read_text()}") from error

    async def stop(self) -> None:
        """Ends it."""
        process, self._process = self._process, None
        if process:
            await end(process, signal.SIGTERM)

    def report(self) -> dict[str, Any]:
        """What it has done."""
        return dict(json.loads(self._report.read_text()))


class Failsafe:
    """A node's `migproxy failsafe`, with the capabilities that its container has.

    Args:
        node: Its node.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts it, and waits until the daemon knows of it."""
        node, capabilities = self._node, "+sys_ptrace,+dac_override,+chown"
        command = ["setpriv", f"--bounding-set=-all,{capabilities}", *MIGPROXY, "failsafe", "--node-name", node.name]
        command += ["--kubeconfig", str(node.directory.with_suffix(".kubeconfig")), "--socket-owner", "0:0"]
        command += ["--launcher-run-dir", str(node.run_dir), "--control-socket", str(node.proxy.control)]
        with (node.directory / "failsafe.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        async with asyncio.timeout(30):
            while not (await node.proxy.status())["beside"]["failsafe"]:
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Ends it; it does once the daemon has ended."""
        process, self._process = self._process, None
        if process:
            assert await end(process, signal.SIGTERM) == 0


class BesideLab(KubeLab):
    """A laboratory with virt-handlers, beside which migproxies run where they are started.

    Attributes:
        virt_handlers: By their nodes' names.
        handler_token: Theirs.
        old_style: Whether sources have certificates as KubeVirt once gave them, and virt-handlers accept those.
        prepared: Called when virt-handlers and migproxies have prepared, before the migration starts.
        begun: Called as soon as the migration has been asked for.
    """

    def _node(self, number: int) -> Node:
        node = super()._node(number)
        node.proxy.arguments += ("--http-listen", "off")
        return node

    @classmethod
    @asynccontextmanager
    async def prepare(cls, *, tls: bool, old_style: bool = False) -> AsyncIterator["BesideLab"]:
        """Yields it with both virt-handlers running, and no migproxy."""
        async with AsyncExitStack() as stack:
            lab = cls(tls=tls)
            await stack.enter_async_context(lab.served())
            if old_style:
                authority = certificates.authority()
                source, target = authority.issue(OLD_STYLE), authority.issue(certificates.TARGET)
                certificates.Cluster(lab.directory / "tls", authority, source, target).write()
                for node in lab.nodes:
                    node.proxy.arguments += ["--tls-client-names", ",".join((*CLIENT_NAMES, OLDER_CLIENT_NAME))]
            lab.old_style = old_style
            lab.handler_token = await lab.kubernetes.kubevirt_token("kubevirt-handler")
            lab.virt_handlers = {node.name: StandIn(lab, node) for node in lab.nodes}
            for node in lab.nodes:
                stack.push_async_callback(lab.virt_handlers[node.name].stop)
                await lab.virt_handlers[node.name].start()
                stack.push_async_callback(node.proxy.stop)
            try:
                yield lab
            except BaseException:
                for node in lab.nodes:
                    if node.proxy.log.exists():
                        print(f"--- {node.name}", *node.proxy.log.read_text().splitlines()[-60:], sep="\n")
                raise

    @property
    def hold(self) -> Path:
        """While this file is there, no virt-handler publishes."""
        return self.directory / "hold"

    publishes = False
    virt_handlers: dict[str, StandIn]
    handler_token: str
    old_style: bool
    prepared: Callable[[], Awaitable[None]] | None = None
    begun: Callable[[], Awaitable[None]] | None = None

    async def use(self, *nodes: Node) -> None:
        """Has a migproxy run on these nodes, and on no other."""
        for node in self.nodes:
            if node in nodes:
                if not node.proxy.runs:
                    await node.proxy.start()
            else:
                await node.proxy.stop()

    @asynccontextmanager
    async def migration(self, source: Node, target: Node, *, block: bool = False) -> AsyncIterator[str]:
        # A real virt-handler has its launcher prepare before it publishes, which takes longer than to announce.
        self.hold.touch()
        uid = self.vmi.begin(source, target, block=block)
        failed = True
        try:
            if target.proxy.runs:
                await until(lambda: self.announced() is not None, f"{target.name}'s announcement")
            if self.begun:
                await self.begun()
            self.hold.unlink()
            await until(lambda: self._is_prepared(source), "the two virt-handlers to have prepared")
            if source.proxy.runs:
                await until(lambda: is_ours(source), f"{source.name}'s migproxy to be in the path")
            if self.prepared:
                await self.prepared()
            self.vmi.start()
            yield uid
            failed = False
        finally:
            self.vmi.end(failed=failed)
        for node in self.nodes:
            if node.proxy.runs:
                await node.proxy.ended(uid)
        await until(lambda: not any(one.report()["targets"] for one in self.virt_handlers.values()), "their end")
        await until(lambda: not list(source.migrationproxy.iterdir()), f"an empty {source.migrationproxy}")

    def _is_prepared(self, source: Node) -> bool:
        return self.vmi.read()["metadata"]["uid"] in self.virt_handlers[source.name].report()["sources"]

    def announced(self) -> str | None:
        """What is announced on the VMI."""
        found = self.vmi.read()["metadata"].get("annotations", {}).get(TARGET_ANNOTATION)
        return str(found) if found else None

    def relayed(self, node: Node) -> int:
        """How many connections a node's virt-handler has relayed."""
        return int(sum(self.virt_handlers[node.name].report()["relayed"].values()))


def is_ours(source: Node) -> bool:
    """Each socket that virt-handler has made on the source has given way to one of migproxy's."""
    modes = [path.stat().st_mode for path in source.migrationproxy.glob("*.sock") if not path.name.startswith(".")]
    return len(modes) >= 2 and all(mode & stat.S_ISVTX for mode in modes)


async def migrate(lab: BesideLab, guest: Guest, source: Node, target: Node, *, by: str, why: str = "") -> None:
    """Migrates the guest, and sees which path its connections took.

    Args:
        by: The path, "migproxy" or "virt-handler".
        why: The reason for the latter, where the source's migproxy tells it.
    """
    before = {node.name: lab.relayed(node) for node in lab.nodes}
    move = await guest.migrate(source, target)
    await assert_runs_only_on(target, lab)
    await assert_heartbeat_goes_on(guest, *await guest.handover(source, target))
    theirs = {node.name: lab.relayed(node) - before[node.name] for node in lab.nodes}
    assert [count > 0 for count in theirs.values()] == [by == "virt-handler"] * 2, f"by virt-handlers: {theirs}"
    for node in (source, target) if by == "migproxy" else ():
        await assert_carried(node, move, by)
    if why:
        await assert_carried(source, move, by, why)


async def assert_carried(node: Node, move: Move, path: str, reason: str = "") -> None:
    """A node's migproxy has carried the whole migration, and says by which path."""
    (report,) = [one for one in (await node.proxy.status())["migrations"] if one["migration_uid"] == move.uid]
    assert report["state"] == "ended"
    if report["role"] == "source":
        assert {(one["path"], one["reason"]) for one in report["paths"]} == {(path, reason)}
    assert not any(one["failures"] for one in report["channels"])
    moved = {one["channel"]: one["bytes_sent"] + one["bytes_received"] for one in report["channels"]}
    assert moved["direct"] >= move.job["memory_processed"] * 0.95


@pytest.fixture(scope="module", autouse=True)
def _machine_has_what_it_takes() -> None:
    vm.check()


@pytest.mark.tier("gate")
async def test_two_migproxies_migrate_it() -> None:
    async with BesideLab.prepare(tls=True) as lab:
        here, there = lab.nodes
        async with Guest.boot(lab, here) as guest:
            await lab.use(here, there)
            await migrate(lab, guest, here, there, by="migproxy")


@pytest.mark.parametrize(
    ("tls", "old_style"), [(True, False), (True, True), (False, False)], ids=["tls", "old-tls", "plaintext"]
)
async def test_every_mix_of_the_two_migrates(tls: bool, old_style: bool) -> None:
    async with BesideLab.prepare(tls=tls, old_style=old_style) as lab:
        here, there = lab.nodes
        async with Guest.boot(lab, here) as guest:
            await lab.use(here)  # the source alone
            await migrate(lab, guest, here, there, by="virt-handler", why="unannounced")
            await migrate(lab, guest, there, here, by="virt-handler")  # the target alone
            await lab.use(here, there)
            await migrate(lab, guest, here, there, by="migproxy")
            await lab.use()
            await migrate(lab, guest, there, here, by="virt-handler")
            assert lab.announced() is None


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plaintext"])
async def test_migproxies_may_be_killed_at_any_moment_before_the_start(tls: bool) -> None:
    async with BesideLab.prepare(tls=tls) as lab:
        here, there = lab.nodes

        async def kill(*nodes: Node) -> None:
            for node in nodes:
                await node.proxy.stop(signal.SIGKILL)

        async def restart() -> None:
            await kill(here, there)
            await lab.use(here, there)

        async def restart_in_path() -> None:
            await restart()
            await until(lambda: is_ours(here if here.name == source_of(lab) else there), "the successor in the path")

        async with Guest.boot(lab, here) as guest:
            # Before anything is handed over, and for good: it is as if there never had been a migproxy.
            await lab.use(here, there)
            await kill(here, there)
            await migrate(lab, guest, here, there, by="virt-handler")

            # While a target has announced and virt-handler has not published: the next one keeps its word.
            await lab.use(here, there)
            lab.begun = restart
            await migrate(lab, guest, there, here, by="migproxy")
            lab.begun = None

            # Once both are in the path.
            lab.prepared = restart_in_path
            await migrate(lab, guest, here, there, by="migproxy")

            # A source that is told to stop there gives virt-handler's sockets back.
            async def stop_source() -> None:
                await there.proxy.stop()
                assert not is_ours(there)

            lab.prepared = stop_source
            await migrate(lab, guest, there, here, by="virt-handler")

            # A target that is told to stop withdraws what it has announced.
            async def stop_target() -> None:
                await there.proxy.stop()
                assert lab.announced() is None

            await lab.use(here, there)
            lab.prepared = stop_target
            await migrate(lab, guest, here, there, by="virt-handler", why="unannounced")

            # One that is killed for good keeps its listeners, at its relay, and accepts nobody.
            await lab.use(here, there)
            lab.prepared = partial(kill, here)
            await migrate(lab, guest, there, here, by="virt-handler", why="timeout")

            # And one whose relay is gone as well refuses.
            async def kill_both() -> None:
                await kill(there)
                await there.relay.stop(signal.SIGKILL)

            await lab.use(here, there)
            lab.prepared = kill_both
            await migrate(lab, guest, here, there, by="virt-handler", why="unreachable")


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plaintext"])
async def test_target_that_a_firewall_hides_is_gone_round(tls: bool) -> None:
    async with BesideLab.prepare(tls=tls) as lab:
        here, there = lab.nodes
        async with Guest.boot(lab, here) as guest:
            await lab.use(here, there)
            lab.prepared = partial(hide, lab, there, "blackhole")
            await migrate(lab, guest, here, there, by="virt-handler", why="timeout")
            lab.prepared = partial(hide, lab, here, "prohibit")
            await migrate(lab, guest, there, here, by="virt-handler", why="unreachable")


async def hide(lab: BesideLab, target: Node, how: str) -> None:
    """Keeps what arrives from the target's announced ports, and from no others.

    Args:
        how: "blackhole" drops it, "prohibit" tells the sender (ip-rule(8)).
    """
    announced = lab.announced()
    assert announced
    await target.exec("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")  # else nobody is told
    await target.exec("ip", "rule", "add", "pref", "10", "lookup", "local")
    for pair in announced.split(" ")[2].split(","):
        port = pair.partition(":")[0]
        await target.exec("ip", "rule", "add", "pref", "5", "ipproto", "tcp", "dport", port, how)
    await target.exec("ip", "rule", "del", "pref", "0")


async def test_sockets_of_a_source_that_is_killed_for_good_are_given_back() -> None:
    async with BesideLab.prepare(tls=False) as lab, AsyncExitStack() as stack:
        here, there = lab.nodes
        await lab.use(here, there)
        for node in lab.nodes:
            failsafe = Failsafe(node)
            await failsafe.start()
            stack.push_async_callback(failsafe.stop)
            stack.push_async_callback(node.proxy.stop)

        async def kill_both() -> None:
            for node in lab.nodes:
                await node.proxy.stop(signal.SIGKILL)
            await until(lambda: not is_ours(here), "virt-handler's sockets")

        async with Guest.boot(lab, here) as guest:
            lab.prepared = kill_both
            await migrate(lab, guest, here, there, by="virt-handler")


async def test_migration_goes_on_though_its_migproxies_are_killed_while_it_runs() -> None:
    async with BesideLab.prepare(tls=False) as lab:
        here, there = lab.nodes
        await lab.use(here, there)
        async with Guest.boot(lab, here) as guest:
            at_first = guest.hashes[0]
            struck: list[float] = []
            proxies = [node.proxy for node in lab.nodes]
            await guest.migrate(here, there, *SUSPENDED, during=metronome(proxies, BEAT, struck))
            assert struck
            await assert_runs_only_on(there, lab)
            await assert_heartbeat_goes_on(guest, *await guest.handover(here, there))
            assert (await guest.fresh_hashes()).memory == at_first.memory
            assert not any(lab.relayed(node) for node in lab.nodes)


def source_of(lab: BesideLab) -> str:
    return str(lab.vmi.read()["status"]["migrationState"]["sourceNode"])
