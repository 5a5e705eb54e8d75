"""The virtual machine: the distribution's kernel, one busybox script, and what it says on its console."""

import asyncio
import lzma
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from demo.lab import MIGPROXY, Lab, LabError, Node, background, run, until

DOMAIN = "default_vmi-migratable"  # what KubeVirt calls it in libvirt: the VMI's namespace and name
DISK_MIB = 32
TAIL_MIB = 8  # of the disk, which the guest rewrites all the time
REMEDY = "run scripts/system-packages demo as root"
_MIGRATION_SECONDS = 600  # of one that takes one on an idle machine

# QEMU before 9.0 loses pages of a guest that it emulates, unless the size of its RAM is no multiple of 256 KiB
# (fixed by its commit 03bfc2188f06). libvirt rounds that size, so QEMU is given it, and the RAM's file, past libvirt.
_RAM_KIB = 192 * 1024 + 8

_DOMAIN = """
<domain type="qemu" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit="KiB">{ram_kib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch="x86_64" machine="pc">hvm</type>
    <kernel>/var/lib/libvirt/images/kernel</kernel>
    <initrd>/var/lib/libvirt/images/initrd</initrd>
    <cmdline>console=ttyS0 quiet tail={tail}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <serial type="file"><source path="/var/log/libvirt/console.log" append="on"/></serial>
    <controller type="usb" model="none"/>
    <memballoon model="none"/>
    {disk}
  </devices>
  <qemu:commandline>
    <qemu:arg value="-object"/>
    <qemu:arg value="memory-backend-file,id=ram,size={ram_kib}K,mem-path=/var/lib/libvirt/images/ram,share=on"/>
    <qemu:arg value="-machine"/>
    <qemu:arg value="memory-backend=ram"/>
    <qemu:arg value="-m"/>
    <qemu:arg value="{ram_kib}K"/>
  </qemu:commandline>
</domain>
"""

_DISK = """
    <disk type="file" device="disk">
      <driver name="qemu" type="raw"/>
      <source file="/var/lib/libvirt/images/disk"/>
      <target dev="vda" bus="virtio"/>
    </disk>
"""


def kernel() -> Path:
    """The newest kernel that this machine could boot.

    Raises:
        LabError: there is none, or none that this user may read.
    """
    found = sorted(Path("/boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise LabError(f"no kernel in /boot for the virtual machine to boot: {REMEDY}")
    if not os.access(found[-1], os.R_OK):
        raise LabError(f"{found[-1]} is not readable: chmod a+r it, or run as root")
    return found[-1]


def check() -> None:
    """Checks that a virtual machine can run here.

    Raises:
        LabError: what is missing, and how to get it.
    """
    if os.uname().machine != "x86_64":
        raise LabError(f"the virtual machine is an x86_64 one, this machine is {os.uname().machine}")
    programs = ("qemu-system-x86_64", "libvirtd", "virsh", "busybox", "cpio", "modprobe", "ip", "nsenter")
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        raise LabError(f"not installed: {', '.join(missing)}: {REMEDY}")
    if b"/ld-linux" in Path(shutil.which("busybox") or "").read_bytes()[:4096]:  # names its dynamic linker
        raise LabError("busybox needs shared libraries, which the virtual machine has not: install busybox-static")
    _modules(_version(kernel()))


def build_initrd(initrd: Path, image: Path) -> None:
    """Writes an initial RAM file system for a kernel: busybox, init.sh, and that kernel's virtio modules."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "bin").mkdir()
        (root / "modules").mkdir()
        shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
        shutil.copy(Path(__file__).with_name("init.sh"), root / "init")
        (root / "init").chmod(0o755)
        for number, module in enumerate(_modules(_version(image))):
            opener = lzma.open if module.suffix == ".xz" else open
            with opener(module, "rb") as packed:
                (root / f"modules/{number:02}-{module.name.removesuffix('.xz')}").write_bytes(packed.read())
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        with initrd.open("wb") as archive:
            command = ["cpio", "--quiet", "--create", "--format=newc"]
            subprocess.run(command, cwd=root, input=names.encode(), stdout=archive, check=True)


def _version(image: Path) -> str:
    return image.name.removeprefix("vmlinuz-")


def _modules(version: str) -> list[Path]:
    """The virtio modules and what they need, in the order to load them in; those built in are left out."""
    command = ["modprobe", "--set-version", version, "--show-depends", "--all", "virtio_pci", "virtio_blk"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise LabError(f"kernel {version} has no virtio modules: {found.stderr.strip()}")
    paths = [Path(line.split()[1]) for line in found.stdout.splitlines() if line.startswith("insmod")]
    modules = list(dict.fromkeys(paths))
    if odd := [path.name for path in modules if path.suffix not in (".ko", ".xz")]:
        raise LabError(f"kernel {version}: cannot unpack {', '.join(odd)}")
    return modules


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat: its number, when it was seen (seconds of the monotonic clock), and on which node."""

    number: int
    seen: float
    node: str


@dataclass(frozen=True, slots=True)
class Hashes:
    """SHA-256 of the guest's unchanging memory and of its disk's front ("-" without a disk), read since a beat."""

    since: int
    memory: str
    disk: str


@dataclass(frozen=True, slots=True)
class Move:
    """A live migration that has happened.

    Args:
        uid: its UID.
        seconds: how long virsh took.
        job: libvirt's statistics of it, by the names that `virsh domjobinfo --rawstats` prints.
    """

    uid: str
    seconds: float
    job: dict[str, int]


class Guest:
    """The virtual machine of a laboratory, and what it said so far.

    Args:
        lab: a laboratory with libvirt.
        disk: it has a disk, of DISK_MIB random MiB.
    """

    def __init__(self, lab: Lab, *, disk: bool) -> None:
        self._lab, self.disk = lab, disk
        self.beats: list[Beat] = []
        self.hashes: list[Hashes] = []

    @classmethod
    @asynccontextmanager
    async def boot(cls, lab: Lab, node: Node, *, disk: bool = False) -> AsyncIterator[Self]:
        """Boots a virtual machine on a node; listens to it until the end of the context."""
        guest = cls(lab, disk=disk)
        await asyncio.to_thread(guest._install, node)
        async with background(guest._listen()):
            create = ["virsh", "create", "/var/lib/libvirt/images/domain.xml"]
            lab.say(f"{node.name}# {shlex.join(create)}")
            await node.exec(*create)
            await until(lambda: bool(guest.hashes), "the virtual machine's first words", 90)
            yield guest

    def _install(self, node: Node) -> None:
        image = kernel()
        build_initrd(node.images / "initrd", image)
        for other in self._lab.nodes:
            (other.images / "kernel").symlink_to(image)
            if other is not node:
                shutil.copy(node.images / "initrd", other.images)
        if self.disk:
            (node.images / "disk").write_bytes(os.urandom(DISK_MIB << 20))
        uid = self._lab.vmi.read()["metadata"]["uid"]
        disk = _DISK if self.disk else ""
        domain = _DOMAIN.format(name=DOMAIN, uuid=uid, ram_kib=_RAM_KIB, tail=TAIL_MIB, disk=disk)
        (node.images / "domain.xml").write_text(domain)

    async def migrate(
        self,
        source: Node,
        target: Node,
        *options: str,
        parallel: int = 0,
        watch: Callable[[dict[str, int]], None] = lambda job: None,
        during: AbstractAsyncContextManager[object] | None = None,
    ) -> Move:
        """Migrates the virtual machine live, its disk too where it has one.

        Afterwards the file `ram` beside the disk's holds on the source what was in its RAM at the switch-over.

        Args:
            source: the node that it runs on.
            target: the node that it is to run on.
            options: more options of `virsh migrate`.
            parallel: the number of connections for the memory; 0 for one without multifd.
            watch: called a few times a second with libvirt's statistics of the job so far.
            during: a context that lasts as long as virsh runs.

        Raises:
            LabError: it failed, or does not end.
        """
        (target.images / "ram").unlink(missing_ok=True)  # an earlier migration's
        if self.disk:  # libvirt copies into a file that is there; it makes none outside of its storage pools
            with (target.images / "disk").open("wb") as disk:
                disk.truncate(DISK_MIB << 20)
        job: dict[str, int] = {}
        async with self._lab.migration(source, target, block=self.disk) as uid:
            command = [*await migrate_command(self._lab.vmi.path, parallel), *options]
            self._lab.say(f"{source.name}# {shlex.join(command)}")
            began = time.monotonic()
            async with background(_watch(source, job, watch)), during or nullcontext():
                try:
                    async with asyncio.timeout(_MIGRATION_SECONDS):
                        await source.exec(*command)
                except TimeoutError as error:
                    raise LabError(f"{shlex.join(command)}: not done after {_MIGRATION_SECONDS} s: {job}") from error
            seconds = time.monotonic() - began
        # The disk's figures are reported only while the job runs; the others are final only after it.
        disk_job = {name: value for name, value in job.items() if name.startswith("disk_")}
        job = await job_statistics(target, "--completed", "--keep-completed") | disk_job
        return Move(uid, seconds, job)

    async def handover(self, source: Node, target: Node) -> tuple[Beat, Beat]:
        """The last heartbeat on the source of a migration and the first on its target, which it waits for."""
        try:
            await until(lambda: self.beats[-1].node == target.name, f"a heartbeat on {target.name}")
        except LabError as error:
            state = (await target.virsh("domstate", DOMAIN, "--reason")).strip()
            words = [f"{node.name}: {node.console.read_bytes()[-1000:]!r}" for node in (source, target)]
            raise LabError(f"{error}: it is {state}; the consoles: {', '.join(words)}") from error
        before = [beat for beat in self.beats if beat.node == source.name][-1]
        for beat in self.beats:
            if beat.node == target.name and beat.number > before.number:
                return before, beat
        raise LabError(f"the heartbeat began anew on {target.name}: {before}, then {self.beats[-1]}")

    async def fresh_hashes(self) -> Hashes:
        """The next hashes that the guest reads from now on."""
        now = self.beats[-1].number
        await until(lambda: self.hashes[-1].since > now, "the virtual machine's hashes", 120)
        return self.hashes[-1]

    async def _listen(self) -> None:
        rest = dict.fromkeys((node.name for node in self._lab.nodes), b"")
        read = dict.fromkeys(rest, 0)
        while True:
            for node in self._lab.nodes:
                if not node.console.exists():
                    continue
                with node.console.open("rb") as console:
                    console.seek(read[node.name])
                    new = console.read()
                read[node.name] += len(new)
                *lines, rest[node.name] = (rest[node.name] + new).split(b"\n")
                for line in lines:
                    self._hear(node.name, line.decode(errors="replace").split())
            await asyncio.sleep(0.01)

    def _hear(self, node: str, words: list[str]) -> None:
        # The firmware's control sequences may stand right before the first word. A line that the migration
        # tore apart, half of it on each console, is no line.
        match words:
            case [word, number] if word.endswith("heartbeat") and number.isdigit():
                self.beats.append(Beat(int(number), time.monotonic(), node))
            case ["hashes", since, memory, disk]:
                self.hashes.append(Hashes(int(since), memory, disk))
            case _:
                pass


async def migrate_command(vmi: Path, parallel: int) -> list[str]:
    """The virsh command that migrates the VMI of a file; see Guest.migrate."""
    return shlex.split(await run(*MIGPROXY, "uri", str(vmi), "--parallel-connections", str(parallel)))


async def job_statistics(node: Node, *options: str) -> dict[str, int]:
    """libvirt's statistics of the virtual machine's migration: of the running one, or with --completed of the last."""
    lines = (await node.virsh("domjobinfo", DOMAIN, "--rawstats", *options)).splitlines()
    pairs = (line.split(": ") for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


async def _watch(source: Node, job: dict[str, int], watch: Callable[[dict[str, int]], None]) -> None:
    while True:
        await asyncio.sleep(0.25)
        with suppress(LabError):  # libvirt knows of no job yet, or of no such domain any more
            job |= await job_statistics(source)
        watch(job)
