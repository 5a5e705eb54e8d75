"""`migproxy status` for people."""

import socket
from pathlib import Path
from typing import Any

import pytest

from migproxy.control import ControlError, ask
from migproxy.status import duration, render, size

pytestmark = pytest.mark.tier("gate")

CHANNEL = {
    "channel": "direct",
    "connections_open": 2,
    "connections_total": 3,
    "connections_failed": 1,
    "waits": None,
    "retransmits": 7,
    "modes": {"spliced": 12, "user-space": 0},
    "tcp": {"rtt_seconds": 0.00025},
    "listening": "/run/kubevirt/migrationproxy/KEY-49152-source.sock",
    "peer": "10.1.1.2:42691",
}
MIGRATION = {"namespace": "default", "name": "vm", "migration_uid": "0123456789", "role": "source"}


def report(**fields: Any) -> dict[str, Any]:
    base = {
        "node": "node01",
        "address": "10.1.1.1",
        "ready": True,
        "draining": False,
        "problems": {},
        "flaws": {"count": 0, "first": {}},
        "ended_dropped": 0,
        "relay": {
            "socket": "/run/migproxy/control.relay.sock",
            "pid": 4711,
            "version": "0.1.0",
            "connections": 0,
            "descriptors": 0,
            "limit": 16384,
            "replaced": 0,
            "problem": None,
        },
        "log": {"lines_lost": 0, "problem": None},
        "budget": {"connections": 3, "capacity": 76, "limit": "1024 MiB of memory of the daemon", "remedy": "raise it"},
        "tls": {"errors": {}},
        "migrations": [],
    }
    return base | fields


def test_daemon_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migproxy.control._SECONDS", 0.01)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "control"))
        silent.listen()
        with pytest.raises(ControlError, match="timed out"):
            ask(str(tmp_path / "control"))


def test_idle_node() -> None:
    assert render(report()) == (
        "node node01, migration address 10.1.1.1, ready\n"
        "relay: process 4711 moves 0 connections\n"
        "connections: 3 of 76, as 1024 MiB of memory of the daemon allow\n"
        "no migrations"
    )


def test_a_relay_that_does_not_answer_is_a_problem() -> None:
    relay = report()["relay"] | {"pid": None, "problem": "no relay answers"}
    assert "  relay: no relay answers" in render(report(relay=relay)).splitlines()


def test_problems_are_shown_first() -> None:
    shown = render(report(ready=False, address=None, problems={"address": "interface migration0 is down"}))
    assert shown.splitlines()[:2] == [
        "node node01, migration address none, NOT READY",
        "  address: interface migration0 is down",
    ]


def test_vmis_that_cannot_be_read_are_shown_and_leave_the_node_ready() -> None:
    shown = render(report(flaws={"count": 3, "first": {"/vmis/a.yaml:1": "VMI default/a: metadata.uid is missing"}}))
    assert shown.splitlines()[:3] == [
        "node node01, migration address 10.1.1.1, ready",
        "  cannot be read: /vmis/a.yaml:1: VMI default/a: metadata.uid is missing",
        "  cannot be read: 2 more",
    ]


def test_ended_migrations_that_are_not_shown_are_counted() -> None:
    assert "ended migrations: 390 are not shown any more" in render(report(ended_dropped=390))


def test_nothing_that_others_wrote_controls_the_terminal() -> None:
    evil = "\x1b]0;title\x07\x9b2J\u202e\x7f\r\nready"
    migration = {name: value + evil for name, value in MIGRATION.items()} | {"state": "error", "error": evil}
    shown = render(report(problems={evil: evil}, flaws={"count": 1, "first": {evil: evil}}, migrations=[migration]))
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "ready" not in shown.split("\n")


def test_draining_node_says_so() -> None:
    assert render(report(draining=True, ready=False)).splitlines()[0].endswith("draining")


def test_running_migration_shows_its_channels_and_its_rate() -> None:
    running = MIGRATION | {
        "state": "running",
        "age_seconds": 83,
        "error": None,
        "last_error": None,
        "bytes_sent_per_second": 3 * 2**30,
        "bytes_received_per_second": 0,
        "channels": [CHANNEL | {"bytes_sent": 5 * 2**20, "bytes_received": 12}],
    }
    rows = [" ".join(line.split()) for line in render(report(migrations=[running])).splitlines()[5:]]
    assert rows == [
        (
            "default/vm 01234567 source running 1m23s direct 2 3 1 5.0 MiB 12 B 0.25 ms 7 spliced "
            "KEY-49152-source.sock -> 10.1.1.2:42691"
        ),
        "(now) 3.0 GiB/s 0 B/s",
    ]


@pytest.mark.parametrize(("state", "verdict"), [("running", "90 % by the network"), ("ended", "80 % by the guest")])
def test_a_migration_says_what_limits_it_or_did(state: str, verdict: str) -> None:
    rates = {"bytes_sent_per_second": 1, "bytes_received_per_second": 0}
    limited = {"now": {"verdict": "90 % by the network"}, "all": {"verdict": "80 % by the guest"}}
    shown = render(report(migrations=[MIGRATION | {"state": state, **rates, "limited": limited}])).splitlines()
    assert shown[-1] == f"default/vm 01234567 (source): limited {verdict}"


def test_a_channel_whose_connections_wait_says_why_and_what_to_do() -> None:
    waits = {"limit": "node", "event": "", "why": "80 open files allow 7 connections", "remedy": "raise it"}
    channel = CHANNEL | {"bytes_sent": 0, "bytes_received": 0, "waits": waits}
    shown = render(report(migrations=[MIGRATION | {"state": "prepared", "channels": [channel]}])).splitlines()
    assert shown[-1] == (
        "default/vm 01234567 (source): connections of channel direct wait: 80 open files allow 7 connections: raise it"
    )


def test_waiting_migration_says_what_for() -> None:
    waiting = MIGRATION | {"state": "waiting", "error": "waiting for the target to publish its ports"}
    shown = render(report(migrations=[waiting])).splitlines()
    assert shown[-1] == "default/vm 01234567 (source): waiting for the target to publish its ports"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (5 * 2**50, "5120.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, ""), (0.4, "0s"), (61, "1m01s"), (3725, "1h02m")])
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_it_says_who_was_refused_and_what_is_wrong_with_the_certificates() -> None:
    problem = "/tls/tls.crt holds no certificates in PEM, or damaged ones"
    shown = render(report(tls={"errors": {"wrong_name": 2, "expired": 1}, "problems": {"server": problem}}))
    assert "TLS: expired 1, wrong_name 2" in shown
    assert f"certificates (server): {problem}; the last good ones are in use" in shown


def test_beside_virt_handler_each_migration_says_whose_proxy_it_goes_by() -> None:
    identity = MIGRATION | {"error": None}
    taken = [
        {"path": "migproxy", "reason": "", "connections": 12},
        {"path": "virt-handler", "reason": "timeout", "connections": 1},
    ]
    ours = identity | {"state": "preparing", "path": "migproxy", "path_reason": "", "paths": taken}
    theirs = identity | {
        "state": "bypassed",
        "path": "virt-handler",
        "path_reason": "started",
        "path_why": "it had started",
    }
    beside = {"failsafe": True}
    shown = render(report(beside=beside, migrations=[ours, theirs | {"role": "target"}])).splitlines()
    assert "beside virt-handler" in shown
    assert "default/vm 01234567 (source): connections 12 by migproxy, 1 by virt-handler (timeout)" in shown
    assert "default/vm 01234567 (source): goes by migproxy" in shown
    assert "default/vm 01234567 (target): goes by virt-handler: it had started" in shown
    assert not any("failsafe" in line for line in shown)
    assert "no failsafe runs" in render(report(beside=beside | {"failsafe": False}))


def test_a_log_that_cannot_be_written_is_told_here() -> None:
    assert "log:" not in render(report())
    over = render(report(log={"lines_lost": 3, "problem": None}))
    assert "log: 3 lines could not be written\n" in over
    lasts = render(report(log={"lines_lost": 4, "problem": "No space left on device"}))
    assert "log: 4 lines could not be written; the last one now: No space left on device\n" in lasts
