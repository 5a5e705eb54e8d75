"""The command line, as far as no daemon is needed."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from migproxy.cli import app

pytestmark = pytest.mark.tier("gate")

VMI = {
    "apiVersion": "kubevirt.io/v1",
    "kind": "VirtualMachineInstance",
    "metadata": {"namespace": "prod", "name": "vm", "uid": "abc-123"},
    "status": {"migrationMethod": "LiveMigration"},
}
BLOCK = VMI | {"status": {"migrationMethod": "BlockMigration"}}
OTHER = VMI | {"metadata": {"namespace": "prod", "name": "other", "uid": "def-456"}}
FOLDER = "/var/run/kubevirt/migrationproxy/abc-123"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "vmis.yaml"


def test_help_needs_neither_kubernetes_nor_the_daemons_modules() -> None:
    program = (
        "import sys; from migproxy.cli import app; app(['--help'], standalone_mode=False);"
        "slow = {'kubernetes_asyncio', 'aiohttp', 'asyncio', 'cryptography', 'uvloop', 'pyroute2', 'ssl', 'structlog', "
        "'yaml'} & set(sys.modules);"
        "sys.exit(f'imported: {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["run", "status", "uri"])
def test_every_command_has_help(command: str) -> None:
    shown = invoke(command, "--help")
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def test_help_of_run_names_each_options_variable_and_default() -> None:
    shown = " ".join(invoke("run", "--help").output.split())
    assert "MIGPROXY_PORT_RANGE" in shown
    assert "MY_POD_IP" in shown
    assert "Default: migration0." in shown


def test_version() -> None:
    assert invoke("--version").output.startswith("migproxy ")


def test_uri_prints_the_command_that_migrates(file: Path) -> None:
    file.write_text(yaml.safe_dump(VMI))
    assert invoke("uri", str(file)).output == (
        "virsh -c qemu:///system migrate --live --p2p prod_vm "
        f"'qemu+unix:///system?socket={FOLDER}-source.sock' unix://{FOLDER}-49152-source.sock\n"
    )


def test_uri_of_a_block_migration_copies_the_disks(file: Path) -> None:
    file.write_text(yaml.safe_dump(BLOCK))
    assert f"--copy-storage-all --disks-uri unix://{FOLDER}-49153-source.sock " in invoke("uri", str(file)).output


def test_uri_of_a_session_in_parallel_elsewhere(file: Path) -> None:
    file.write_text(yaml.safe_dump(VMI))
    shown = invoke(
        *("uri", str(file), "--session", "--parallel-connections", "4", "--run-dir", "/run/vm", "--domain", "guest")
    ).output
    assert shown.startswith("virsh -c qemu:///session migrate --live --p2p --parallel --parallel-connections 4 guest ")
    assert "qemu+unix:///session?socket=/run/vm/kubevirt/migrationproxy/abc-123-source.sock" in shown


def test_uris_alone_one_a_line(file: Path) -> None:
    file.write_text(yaml.safe_dump(VMI))
    lines = invoke("uri", str(file), "--uris").output.splitlines()
    assert [line.partition("abc-123")[2] for line in lines] == [
        "-source.sock",
        "-49152-source.sock",
        "-49153-source.sock",
    ]


def test_uri_of_a_hostile_vmi_controls_no_terminal(tmp_path: Path) -> None:
    file = tmp_path / "\x1b[2J.yaml"
    file.write_text(yaml.safe_dump(VMI | {"metadata": {"name": "\x1b]0;title\x07\u202e", "uid": "u-1"}}))
    done = invoke("uri", str(file))
    assert done.exit_code == 1
    assert "metadata.name is not the name of a Kubernetes object" in done.output
    assert all(line.isprintable() for line in done.output.split("\n"))


def test_uri_reads_standard_input() -> None:
    command = [sys.executable, "-m", "migproxy", "uri", "-"]
    done = subprocess.run(command, input=yaml.safe_dump(VMI), capture_output=True, text=True)
    assert "abc-123-source.sock" in done.stdout


def test_uri_with_several_vmis_asks_which(file: Path) -> None:
    file.write_text(yaml.safe_dump_all([VMI, OTHER]))
    asked = invoke("uri", str(file))
    assert asked.exit_code == 1
    assert "choose with --vmi: prod/vm, prod/other" in asked.output
    assert "def-456-source.sock" in invoke("uri", str(file), "--vmi", "prod/other").output


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the file is empty"),
        ("kind: Pod\n", "holds no such VMI"),
        ("a: 1\nb: [", ".yaml:2: "),
        (yaml.safe_dump(VMI | {"metadata": {"name": "vm", "uid": "a/b"}}), "a/b"),
        (yaml.safe_dump(VMI | {"metadata": {"name": "vm"}}), "metadata.uid is missing"),
    ],
)
def test_uri_of_a_file_that_will_not_do_says_why(file: Path, text: str, why: str) -> None:
    file.write_text(text)
    failed = invoke("uri", str(file))
    assert failed.exit_code == 1
    assert why in failed.output


def test_uri_of_a_missing_file() -> None:
    failed = invoke("uri", "/nonesuch.yaml")
    assert failed.exit_code == 1
    assert "/nonesuch.yaml: " in failed.output
