"""What a test leaves behind in its sandbox: found, told, and taken away."""

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SETTLE_SECONDS = (
    10.0  # for what is ending already: a killed namespace's interfaces go when the kernel gets round to it
)


_TOOLS = {"mount", "netns", "lock"}  # in /run: what mount(8) and ip(8) make there once, for themselves


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a sandbox.

    Attributes:
        processes: By process ID and start time, their command lines.
        links: The network interfaces' names.
        mounts: By ID, the mount points.
        files: The names in /run.
    """

    processes: dict[tuple[int, str], str]
    links: frozenset[str]
    mounts: dict[str, str]
    files: frozenset[str]

    def since(self, before: "Contents") -> "Contents":
        """What is here and was not before."""
        return Contents(
            {key: line for key, line in self.processes.items() if key not in before.processes},
            self.links - before.links,
            {key: point for key, point in self.mounts.items() if key not in before.mounts},
            self.files - before.files,
        )

    def __bool__(self) -> bool:
        return bool(self.processes or self.links or self.mounts or self.files)

    def __str__(self) -> str:
        parts = {
            "processes": sorted(f"{pid} ({line})" for (pid, _), line in self.processes.items()),
            "interfaces": sorted(self.links),
            "mounts": sorted(self.mounts.values()),
            "in /run": sorted(self.files),
        }
        return "; ".join(f"{what}: {', '.join(found)}" for what, found in parts.items() if found)


def is_sandbox() -> bool:
    """Whether this process is in a sandbox of scripts/sandbox, whose first process it is."""
    return "MIGPROXY_SANDBOX" in os.environ and os.getpid() == 1


def look() -> Contents:
    """What is in this sandbox now, besides this process."""
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return Contents(
        _processes(),
        frozenset(name for _, name in socket.if_nameindex()),
        {fields[0]: fields[4] for fields in mounts},
        frozenset(os.listdir("/run")) - _TOOLS,
    )


def clean(before: Contents) -> Contents:
    """Takes away what has come since and does not go by itself; returns that.

    Args:
        before: What was there before.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    while left := look().since(before):
        if time.monotonic() > deadline:
            _take_away(left)
            break
        time.sleep(0.02)
    return left


def _processes() -> dict[tuple[int, str], str]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with suppress(OSError):
            state, parent, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
            if state == "Z" and int(parent) == os.getpid() and _reap(pid):
                continue
            if pid != os.getpid():
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found[pid, rest[17]] = line or (folder / "comm").read_text().strip()
    return found


def _reap(pid: int) -> bool:
    """Reaps an orphan, as a machine's first process does."""
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return False


def _take_away(left: Contents) -> None:
    for pid, _ in left.processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for link in left.links:
        subprocess.run(["ip", "link", "delete", link], check=False, capture_output=True)
    for point in left.mounts.values():
        subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
    for name in left.files:
        subprocess.run(["rm", "-rf", f"/run/{name}"], check=False, capture_output=True)
