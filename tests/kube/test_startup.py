"""What the Kubernetes side costs a daemon before it does anything, and what it says when it cannot start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.tier("gate")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def migproxy(*options: str) -> str:
    """What `migproxy run` says when it refuses to start."""
    command = [sys.executable, "-m", "migproxy", "run", "--disable-tls", *options]
    environment = {"PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    return result.stderr


def test_generated_models_are_not_loaded() -> None:
    code = "import sys, migproxy.inventory.kube; print(sum('kubernetes_asyncio' in name for name in sys.modules))"
    assert int(python(code)) < 20


def test_whole_library_can_be_imported_afterwards() -> None:
    code = (
        "import migproxy.inventory.kube, kubernetes_asyncio; from migproxy.kube.library import Configuration;"
        "print(kubernetes_asyncio.client.V1Pod.__name__, kubernetes_asyncio.client.Configuration is Configuration)"
    )
    assert python(code) == "V1Pod True"


def test_command_line_does_not_load_the_client() -> None:
    code = "import sys, migproxy.cli; print(any('kube' in name or 'aiohttp' in name for name in sys.modules))"
    assert python(code) == "False"


def test_outside_of_a_cluster_it_says_what_to_give() -> None:
    told = migproxy()
    assert "--kubeconfig" in told
    assert "--vmi-dir" in told


@pytest.mark.parametrize(
    "content",
    [None, "", "- a list", "{", yaml.safe_dump({"current-context": "missing", "contexts": [], "clusters": []})],
    ids=["missing", "empty", "list", "malformed", "without-its-context"],
)
def test_kubeconfig_that_cannot_be_used_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    assert f"--kubeconfig {path}: " in migproxy("--kubeconfig", str(path), "--control-socket", str(tmp_path / "c"))


def test_kubeconfig_that_is_a_fifo_is_named_and_nobody_waits_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "kubeconfig")
    told = migproxy("--kubeconfig", f"{tmp_path}/kubeconfig", "--control-socket", str(tmp_path / "c"))
    assert told.endswith(f"--kubeconfig {tmp_path}/kubeconfig: it is no regular file: give one\n")


def test_contradicting_options_are_named(tmp_path: Path) -> None:
    assert "--vmi-dir is given too" in migproxy("--kubeconfig", "x", "--vmi-dir", str(tmp_path))
    assert "--kubeconfig" in migproxy("--context", "x")
    assert "--kubevirt-namespace" in migproxy("--kubevirt-namespace", "Not A Namespace")
