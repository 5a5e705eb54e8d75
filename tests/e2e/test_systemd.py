"""migproxy.service as shipped, under a systemd that was booted for it."""

import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.booted import ROOT, Booted, boot
from tests.e2e.services import connected, laboratory

pytestmark = [pytest.mark.tier("gate"), pytest.mark.root]

UNIT = ROOT / "systemd/migproxy.service"
PATIENCE = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that machines share; a short path in /run, which the unit lets the daemon write to."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/run") as name:
        yield Path(name)


@pytest.fixture
def machine(folder: Path) -> Iterator[Booted]:
    """A machine with migproxy installed, configured and not started."""
    (folder / "vmis").mkdir()
    with boot(folder) as made:
        made.configure(**basics(folder / "vmis", "node01", "127.0.0.1"))
        yield made


def basics(vmis: Path, name: str, address: str) -> dict[str, str | float | bool]:
    """A configuration of a node."""
    plain: dict[str, str | float | bool] = {"disable_tls": True, "http_listen": "off"}
    return plain | {"vmi_dir": str(vmis), "node_name": name, "migration_address": address}


def events(machine: Booted, event: str) -> list[dict[str, Any]]:
    """The lines of the daemon's journal with this event."""
    return machine.journal(f"EVENT={event}")


def test_it_is_ready_and_says_what_it_does(machine: Booted) -> None:
    machine.run("systemctl", "start", "migproxy")
    assert machine.show("ActiveState") == "active"
    machine.wait(lambda: machine.show("StatusText") == "no migration is running", "a status text")
    assert "no migrations" in machine.run("/usr/local/bin/migproxy", "status")
    fed = machine.show("WatchdogTimestampMonotonic")
    machine.wait(lambda: machine.show("WatchdogTimestampMonotonic") != fed, "the watchdog to be fed again")


def test_a_wrong_configuration_is_named_in_the_journal(machine: Booted) -> None:
    machine.configure(port_range="9-8", no_such_option=1)
    machine.run("systemctl", "start", "migproxy", check=False)
    machine.wait(lambda: any("no-such-option" in line["MESSAGE"] for line in machine.journal()), "the option's name")


def test_the_manager_and_the_daemon_have_the_same_limit(machine: Booted) -> None:
    machine.run("systemctl", "start", "migproxy")
    assert f"FDSTORE={machine.show('FileDescriptorStoreMax')}" in machine.show("Environment").split()


def test_its_exposure_is_as_the_unit_says(machine: Booted) -> None:
    said = re.search(r"security migproxy` says (\d+\.\d)", UNIT.read_text())
    found = re.search(
        r"exposure level for migproxy.service: (\d+\.\d)", machine.run("systemd-analyze", "security", "migproxy")
    )
    assert said
    assert found
    assert float(found[1]) <= float(said[1]) + 0.5  # systemds weigh differently; the comment's is 252's
    assert machine.run("systemd-analyze", "verify", "migproxy.service") == ""


def test_a_crash_loop_is_never_given_up(machine: Booted) -> None:
    machine.run("systemctl", "start", "migproxy")
    for number in range(1, 13):  # twice as many in 10 s as systemd lets a unit be started without its own limit
        machine.run("systemctl", "kill", "--signal", "KILL", "migproxy")
        machine.wait(partial(lambda wanted: machine.show("NRestarts") == wanted, str(number)), f"restart {number}")
    machine.wait(lambda: machine.show("ActiveState") == "active", "the daemon to run again")


def test_a_daemon_that_hangs_is_started_anew(machine: Booted) -> None:
    machine.run("systemctl", "start", "migproxy")
    machine.run("systemctl", "kill", "--signal", "STOP", "migproxy")
    machine.wait(lambda: machine.show("NRestarts") == "1", "the watchdog")
    machine.wait(lambda: machine.show("ActiveState") == "active", "the daemon to run again")
    journal = machine.run("journalctl", "--no-pager", "--unit", "migproxy")
    assert "Failed with result 'watchdog'" in journal
    assert "Fatal Python error: Aborted" in journal, "every thread says where it was"


def test_reload(machine: Booted) -> None:
    configuration = basics(machine.shared / "vmis", "node01", "127.0.0.1")
    machine.run("systemctl", "start", "migproxy")
    pid = machine.show("MainPID")

    machine.configure(**configuration, port_range="9-8", dial_timeout=-1)
    machine.run("systemctl", "reload", "migproxy")
    machine.wait(lambda: bool(events(machine, "configuration is wrong: the old one stays in force")), "the error")
    (wrong,) = events(machine, "configuration is wrong: the old one stays in force")
    assert "port-range" in wrong["ERROR"]
    assert "dial-timeout" in wrong["ERROR"]

    machine.configure(**configuration | {"node_name": "other"}, log_level="debug", dial_timeout=3)
    machine.run("systemctl", "reload", "migproxy")
    machine.wait(lambda: bool(events(machine, "configuration read again")), "the new configuration")
    (read,) = events(machine, "configuration read again")
    assert "--dial-timeout" in read["CHANGED"]
    assert "--log-level" in read["CHANGED"]
    machine.wait(lambda: bool(events(machine, "options have changed that need a restart")), "the one that has to wait")
    (later,) = events(machine, "options have changed that need a restart")
    assert later["OPTIONS"] == "['--node-name']"
    machine.wait(lambda: machine.show("ActiveState") == "active", "the end of the reload")
    assert machine.show("MainPID") == pid


async def test_the_journal_finds_a_migration() -> None:
    async with laboratory(disable_tls=True) as (lab, services):
        async with connected(lab):
            uid = lab.vmi.read()["status"]["migrationState"]["migrationUid"]
        for service, role in zip(services, ("source", "target"), strict=True):
            lines = service.machine.journal(f"MIGRATION_UID={uid}", "EVENT=connection opened")
            fields = ("NAMESPACE", "VMI", "ROLE", "CHANNEL", "PRIORITY", "SYSLOG_IDENTIFIER")
            vmi = lab.vmi.read()["metadata"]
            assert [tuple(line[field] for field in fields) for line in lines] == [
                (vmi["namespace"], vmi["name"], role, "direct", "6", "migproxy")
            ]
