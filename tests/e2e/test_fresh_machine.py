"""The README's two commands on fresh machines of each release that is promised: as root, and as a user who is not."""

import subprocess
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.tier("soak"),
    pytest.mark.outside,
    pytest.mark.patience(3600),
    pytest.mark.parametrize("release", ["bookworm", "trixie"]),
]

ROOT = Path(__file__).parents[2]


def fresh_machine(*arguments: str) -> str:
    """Runs scripts/fresh-machine, which dies with this process; returns what it said."""
    found = subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", "scripts/fresh-machine", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    assert found.returncode == 0, found.stdout[-20_000:]
    return found.stdout


def test_root_gets_everything(release: str) -> None:
    said = fresh_machine(release)
    assert f"{release}$ make demo" in said
    assert "installing system packages" in said
    assert "golang" not in said.partition(f"{release}$ make test")[0]
    assert "hashes of memory and disk" in said
    assert f"{release}$ make test" in said
    assert " failed" not in said.partition("short test summary")[2]


def test_a_user_gets_the_main_job_of_the_demo(release: str) -> None:
    said = fresh_machine("--user", release, "make", "demo")
    assert "missing system packages: busybox-static" in said
    assert "sudo apt-get install" in said
    assert "because not installed: ip (the package iproute2)" in said
    assert "Both daemons counted the same bytes" in said


def test_a_user_gets_everything_where_root_has_installed_the_packages(release: str) -> None:
    said = fresh_machine("--user", "--with", "lab bench observability", release)
    assert "missing system packages" not in said
    assert "hashes of memory and disk" in said
    assert f"{release}$ make test" in said
