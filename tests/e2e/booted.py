"""A machine that systemd boots: this machine's root, read-only below an overlay in memory, with migproxy installed.

It has mount, process, IPC, UTS and cgroup namespaces of its own, and the network of whoever starts it. Nothing that it
writes reaches this machine; the kernel ends all of it together with its first process.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_SYSTEMD = Path("/lib/systemd/systemd")
_TOOLS = ("unshare", "nsenter", "setpriv", "pivot_root", "systemctl")
_NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc"]
_DEADLINE = 60.0

_BOOT = r"""
set -e
base=$1 shared=$2 installed=$3
mount --make-rprivate /
mount -t tmpfs tmpfs "$base/own"
mkdir "$base/own/upper" "$base/own/work" "$base/own/root"
root=$base/own/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/own/upper,workdir=$base/own/work" "$root"
# The kernel's settings are this machine's: systemd-sysctl and its like leave alone what they find read-only.
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
# Of this machine's own services none runs.
for folder in tmp run var/log etc/systemd/system; do mount -t tmpfs -o mode=755 tmpfs "$root/$folder"; done
chmod 1777 "$root/tmp"
: >"$root/etc/fstab"
ln -s /dev/null "$root/etc/systemd/system/systemd-journald-audit.socket"
printf '[Unit]\nRequires=basic.target\nAfter=basic.target\n' >"$root/etc/systemd/system/booted.target"
ln -s booted.target "$root/etc/systemd/system/default.target"
cp -r --no-dereference "$installed/etc" "$installed/usr" "$root"
mkdir -p "$root/opt/migproxy" "$root$shared" "$root/mnt"
mount --bind "$installed/opt/migproxy" "$root/opt/migproxy"
mount -o remount,bind,ro "$root/opt/migproxy"
mount --bind "$shared" "$root$shared"
cd "$root"
pivot_root . mnt
umount -l /mnt
exec chroot . setpriv --bounding-set=-sys_module,-sys_time,-sys_boot,-sys_rawio,-mknod \
    env -i container=migproxy-test "PATH=$PATH" /lib/systemd/systemd --log-target=journal
"""


class Booted:
    """A running machine.

    Attributes:
        shared: A folder that is the same on it and outside, by the same path.
        root: Its root folder, seen from outside.
    """

    def __init__(self, shared: Path, init: int) -> None:
        self.shared = shared
        self.root = Path(f"/proc/{init}/root")
        self._init = init

    def run(self, *command: str, check: bool = True, timeout: float = _DEADLINE) -> str:
        """Runs a command on the machine and returns what it prints, errors too."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._init), "--all", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def show(self, name: str, unit: str = "migproxy") -> str:
        """A property of migproxy.service, or of another unit."""
        return self.run("systemctl", "show", "--value", "--property", name, f"{unit}.service").strip()

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """migproxy's lines of the journal that match (FIELD=value), oldest first."""
        # The unit is not on record for what a process writes just before its end.
        ours = "SYSLOG_IDENTIFIER=migproxy"
        out = self.run("journalctl", "--quiet", "--no-pager", "--output", "json", ours, *matches)
        return [json.loads(line) for line in out.splitlines()]

    def configure(self, **options: str | float | bool) -> None:
        """Writes migproxy's configuration file, whole: its keys have dashes for the underscores."""
        lines = [f"{key.replace('_', '-')} = {json.dumps(value)}\n" for key, value in options.items()]
        (self.root / "etc/migproxy/migproxy.toml").write_text("".join(lines))

    def wait(self, condition: Any, what: str, seconds: float = _DEADLINE) -> None:
        """Waits until that holds; fails with the journal of the daemon."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {seconds:.0f} s\n" + self.run("journalctl", "-n", "60", check=False))
            time.sleep(0.02)


def _status(path: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)


def require() -> None:
    """Fails, with the remedy, where no machine can be booted."""
    missing = [tool for tool in _TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if missing or not _SYSTEMD.exists():
        pytest.fail(f"no systemd to boot ({', '.join(missing)} {_SYSTEMD}): scripts/system-packages lab installs it")
    if os.geteuid() or _status(Path("/proc/self/status")).get("CapEff", "0") == "0" * 16:
        pytest.fail("booting a systemd takes root: cgroups are not delegated to other users; run as root")


def installed() -> Path:
    """Where `make installed` has installed migproxy, as `make install` does; fails where that is not as the sources."""
    sources = [ROOT / "scripts/install", ROOT / "requirements-runtime.lock", *ROOT.glob("systemd/*")]
    sources += [path for path in ROOT.glob("migproxy/**/*") if "__pycache__" not in path.parts]
    ready = ROOT / ".venv/installed/ready"
    newest = max(path.stat().st_mtime for path in sources)
    if not ready.exists() or ready.stat().st_mtime < newest:
        pytest.fail("migproxy is not installed as it is now: run `make installed`, outside of the sandbox")
    return ready.parent


@contextmanager
def boot(shared: Path) -> Iterator[Booted]:
    """Boots a machine, and ends it with the context.

    Args:
        shared: A folder that is the same on it and outside, by the same path.
    """
    require()
    program = installed()
    with tempfile.TemporaryDirectory(prefix="b", dir="/run") as folder:
        base = Path(folder)
        for name in ("own", "cgroups"):
            (base / name).mkdir()
        with _cgroup(base / "cgroups") as cgroup, (base / "log").open("wb") as log:
            machine = subprocess.Popen(
                [*_NAMESPACES, "sh", "-c", _BOOT, "boot", folder, str(shared), str(program)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
                preexec_fn=lambda: (cgroup / "cgroup.procs").write_text("0"),
            )
            try:
                booted = Booted(shared, _child_of(machine, base / "log"))
                state = "starting"
                deadline = time.monotonic() + _DEADLINE
                while "running" not in state:
                    assert machine.poll() is None, (base / "log").read_text()
                    assert time.monotonic() < deadline, f"{state}\n" + booted.run("systemctl", "--failed", check=False)
                    time.sleep(0.05)
                    state = booted.run("systemctl", "is-system-running", check=False)
                yield booted
            finally:
                machine.send_signal(signal.SIGKILL)  # and, by --kill-child, the machine's first process
                machine.wait()


def _child_of(machine: subprocess.Popen[bytes], log: Path) -> int:
    """The machine's first process, once it is systemd."""
    deadline = time.monotonic() + _DEADLINE
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children")
    while time.monotonic() < deadline:
        assert machine.poll() is None, log.read_text()
        for child in children.read_text().split():
            with suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        time.sleep(0.02)
    raise AssertionError(f"the machine does not boot: {log.read_text()}")


@contextmanager
def _cgroup(mount: Path) -> Iterator[Path]:
    """A cgroup of its own, for the machine to be the root of."""
    mounted = subprocess.run(["mount", "-t", "cgroup2", "cgroup2", mount], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.fail(
            f"cgroups cannot be had here: {mounted.stderr.strip()}: run on a machine, or in a privileged container"
        )
    own = mount / f"migproxy-test-{os.getpid()}-{mount.parent.name}"
    try:
        own.mkdir()
        yield own
    finally:
        with suppress(FileNotFoundError):
            (own / "cgroup.kill").write_text("1")
        _remove(own)
        subprocess.run(["umount", str(mount)], check=True)


def _remove(cgroup: Path) -> None:
    for folder, _, _ in os.walk(cgroup, topdown=False):
        deadline = time.monotonic() + _DEADLINE
        while True:
            try:
                os.rmdir(folder)
                break
            except OSError:  # its processes are about to end
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
