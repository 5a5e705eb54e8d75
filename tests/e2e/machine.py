"""A virtual machine whose kernel has TLS, emulated by software. Its root is this machine's, read-only."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.missing import missing

ROOT = Path(__file__).parents[2]
DEADLINE = 900.0


def kernel() -> Path:
    """The newest installed kernel with a module for TLS."""
    for image in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        release = image.name.partition("-")[2]
        if list(Path(f"/lib/modules/{release}/kernel/net/tls").glob("tls.ko*")):
            return image
    return missing("no kernel with TLS in /boot (linux-image-amd64)", "lab")


def run_guest(module: str, *options: str, variables: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Runs a Python module in the virtual machine, and returns what it printed in lines of RESULT and JSON.

    Args:
        module: The module's name.
        options: QEMU's.
        variables: Environment variables of the module's.
    """
    if shutil.which("qemu-system-x86_64") is None:
        missing("no qemu-system-x86_64", "lab")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    vng = shutil.which("vng", path=path)
    assert vng, "virtme-ng is among the locked packages: run make venv"
    command = [vng, "--disable-kvm", "--run", str(kernel()), "--memory", "1G", "--cpus", "1", "--cwd", str(ROOT)]
    command += [f"--qemu-opts={option}" for option in options]
    environment = " ".join(f"{name}={value}" for name, value in (variables or {}).items())
    command += ["--", f"{environment} {sys.executable} -m {module}"]
    text = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": path},
        timeout=DEADLINE,
        text=True,
        errors="replace",
        check=False,
    ).stdout
    # With the brace: a traceback shows the line that prints it, too.
    found = [json.loads(line.partition("RESULT ")[2]) for line in text.splitlines() if "RESULT {" in line]
    assert found, text[-8000:]
    return found
