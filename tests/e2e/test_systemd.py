"""migproxy.service and migproxy-relay.service as shipped, under a systemd that was booted for them."""

import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.booted import ROOT, Booted, boot
from tests.e2e.services import RELAY, connected, laboratory

pytestmark = [pytest.mark.tier("gate"), pytest.mark.root]

UNITS = ("migproxy", RELAY)
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


@pytest.mark.parametrize("unit", UNITS)
def test_its_exposure_is_as_the_unit_says(machine: Booted, unit: str) -> None:
    said = re.search(rf"security {unit}` says (\d+\.\d)", (ROOT / f"systemd/{unit}.service").read_text())
    found = re.search(
        rf"exposure level for {unit}.service: (\d+\.\d)", machine.run("systemd-analyze", "security", unit)
    )
    assert said
    assert found
    assert float(found[1]) <= float(said[1]) + 0.5  # systemds weigh differently; the comment's is 252's
    assert machine.run("systemd-analyze", "verify", f"{unit}.service") == ""


def test_the_relay_is_not_root_and_has_no_capability(machine: Booted) -> None:
    machine.run("systemctl", "start", "migproxy")
    status = machine.run("cat", f"/proc/{machine.show('MainPID', RELAY)}/status")
    assert re.search(r"^Uid:\t[1-9]", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)


def test_the_relay_starts_and_stops_with_the_daemon_and_outlives_its_restarts(machine: Booted) -> None:
    machine.run("systemctl", "start", "migproxy")
    relay = machine.show("MainPID", RELAY)
    assert relay != "0"
    machine.run("systemctl", "restart", "migproxy")
    assert machine.show("MainPID", RELAY) == relay
    machine.run("systemctl", "kill", "--signal", "KILL", "migproxy")
    machine.wait(lambda: machine.show("NRestarts") == "1", "the daemon's restart")
    machine.wait(lambda: machine.show("ActiveState") == "active", "the daemon to run again")
    assert machine.show("MainPID", RELAY) == relay
    machine.configure(no_such_option=1)
    machine.run("systemctl", "restart", "migproxy", check=False)
    machine.wait(lambda: any("no-such-option" in line["MESSAGE"] for line in machine.journal()), "a failed start")
    assert machine.show("MainPID", RELAY) == relay, "a daemon that cannot start takes no connection with it"
    machine.run("systemctl", "stop", "migproxy")
    machine.wait(lambda: machine.show("ActiveState", RELAY) == "inactive", "the relay's end")
    assert machine.show("Result", RELAY) == "success"


@pytest.mark.parametrize("unit", UNITS)
def test_a_crash_loop_is_never_given_up(machine: Booted, unit: str) -> None:
    machine.run("systemctl", "start", "migproxy")
    for number in range(1, 13):  # twice as many in 10 s as systemd lets a unit be started without its own limit
        machine.run("systemctl", "kill", "--signal", "KILL", unit)
        machine.wait(
            partial(lambda wanted: machine.show("NRestarts", unit) == wanted, str(number)), f"restart {number}"
        )
    machine.wait(lambda: machine.show("ActiveState", unit) == "active", "it to run again")


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


@pytest.mark.parametrize("tls", [False, True])
async def test_the_journal_finds_a_migration(tls: bool) -> None:
    """And with mTLS, too, daemon and relay do with what the units allow them."""
    async with laboratory(tls=tls, ktls="off") as (lab, services):
        async with connected(lab):
            uid = lab.vmi.read()["status"]["migrationState"]["migrationUid"]
        for service, role in zip(services, ("source", "target"), strict=True):
            lines = service.machine.journal(f"MIGRATION_UID={uid}", "EVENT=connection opened")
            fields = ("NAMESPACE", "VMI", "ROLE", "CHANNEL", "PRIORITY", "SYSLOG_IDENTIFIER")
            vmi = lab.vmi.read()["metadata"]
            assert [tuple(line[field] for field in fields) for line in lines] == [
                (vmi["namespace"], vmi["name"], role, "direct", "6", "migproxy")
            ]
