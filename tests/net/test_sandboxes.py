"""What becomes of a test that hangs, or leaves something behind: it fails, and no other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.tier("gate")

LEAVES = """
import os, subprocess
from pathlib import Path
import pytest
pytestmark = pytest.mark.tier("gate")

def test_leaves_things_behind():
    os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "300")
    subprocess.run(["ip", "link", "add", "left1", "type", "veth", "peer", "left2"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "left", "/mnt"], check=True)
    Path("/run/left").touch()

def test_finds_nothing_of_it():
    assert "sleep" not in subprocess.run(["ps", "-e"], capture_output=True, text=True, check=True).stdout
    assert "left" not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert "left" not in Path("/proc/self/mounts").read_text()
"""

HANGS = """
import signal, subprocess
import pytest
pytestmark = pytest.mark.tier("gate")

@pytest.mark.patience(1)
def test_hangs():
    subprocess.Popen(["sleep", "300"])
    subprocess.run(["ip", "link", "add", "left1", "type", "veth", "peer", "left2"], check=True)
    signal.pause()

def test_finds_nothing_of_it():
    assert "left" not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
"""


def outcomes(folder: Path, source: str, *options: str) -> tuple[int, set[str], str]:
    """Runs tests by one worker in a sandbox; returns the exit status, which did not pass, and the output."""
    (folder / "test_it.py").write_text(source)
    worker = f"popen//python={ROOT}/scripts/sandbox {sys.executable}"
    command = [sys.executable, "-m", "pytest", "-c", f"{ROOT}/pyproject.toml", "--rootdir", str(folder)]
    command += ["-p", "no:cacheprovider", "-p", "tests.conftest", "-o", f"pythonpath={ROOT}"]
    command += ["--dist", "load", "--tx", worker, *options, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False
    )
    text = done.stdout + done.stderr
    return done.returncode, set(re.findall(r"^(?:FAILED|ERROR) \S*test_it\.py::(\w+)", text, re.MULTILINE)), text


def test_what_is_left_behind_fails_its_own_test_and_is_taken_away(tmp_path: Path) -> None:
    status, failed, text = outcomes(tmp_path, LEAVES)
    assert (status, failed) == (1, {"test_leaves_things_behind"}), text
    for left in ("sleep 300", "left1", "/mnt", "in /run: left"):
        assert left in text


def test_a_hanging_test_ends_with_its_sandbox_and_the_next_starts_clean(tmp_path: Path) -> None:
    status, failed, text = outcomes(tmp_path, HANGS)
    assert (status, failed) == (1, {"test_hangs"}), text
    assert "1 passed" in text, text
    assert "test_hangs hangs: it took 1 s" in text, text
    assert "in test_hangs" in text, "it says where"


@pytest.mark.parametrize("mark", ["", 'pytestmark = pytest.mark.tier("fast")'])
def test_a_test_without_a_tier_is_refused(tmp_path: Path, mark: str) -> None:
    status, failed, text = outcomes(tmp_path, f"import pytest\n{mark}\ndef test_it(): pass\n", "--collect-only")
    assert (status != 0, failed) == (True, set()), text
    assert 'test_it.py::test_it: mark it with @pytest.mark.tier("gate")' in text
