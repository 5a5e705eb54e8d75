"""The exposition as a function of the node's report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed  # as Prometheus reads it

from migproxy.measure import FAILURES, Measures
from migproxy.metrics import STATES, Exporter, render

pytestmark = pytest.mark.tier("gate")

OPENMETRICS = "application/openmetrics-text;version=1.0.0"
DOCUMENT = Path(__file__).parents[2] / "docs/observability.md"


def channel(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "channel": name,
        "listening": "/run/a.sock",
        "peer": "10.1.1.2:1",
        "connections_open": 1,
        "connections_total": 3,
        "connections_failed": 1,
        "failures": {"reset": 1},
        "waits": None,
        "bytes_sent": 1000,
        "bytes_received": 10,
        "modes": {"spliced": 1010},
        "retransmits": 2,
        "tcp": {"rtt_seconds": 0.0002, "delivery_rate": 5_000_000, "congestion_window": 14480},
        **changes,
    }


def migration(**changes: Any) -> dict[str, Any]:
    return {
        "namespace": "default",
        "name": "vmi",
        "vmi_uid": "uid",
        "migration_uid": "m1",
        "role": "source",
        "state": "running",
        "error": None,
        "peer": "10.1.1.2",
        "began": 1700000000.5,
        "limited": {
            "now": {"seconds": {"guest": 1.0, "network": 9.0}, "verdict": "90 % by the network, 10 % by the guest"},
            "all": {"seconds": {"guest": 20.0, "network": 5.5}, "verdict": "78 % by the guest, 22 % by the network"},
        },
        "channels": [channel("libvirt"), channel("direct", bytes_sent=1 << 40)],
        **changes,
    }


def report(*migrations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "node": "node01",
        "ready": True,
        "draining": False,
        "checks": {"synchronised": None, "address": "no address"},
        "problems": {},
        "flaws": {"count": 2, "first": {}},
        "ended_dropped": 3,
        "vmis": 7,
        "queue_depth": 1,
        "watch": {"source": "kubernetes", "last_event": 1700000000.0, "reconnects": 3, "relists": 1},
        "relay": {
            "socket": "/run/migproxy/control.relay.sock",
            "pid": 4711,
            "version": "0.1.0",
            "connections": 2,
            "descriptors": 14,
            "limit": 16384,
            "replaced": 1,
            "problem": None,
        },
        "log": {"lines_lost": 0, "problem": None},
        "budget": {"connections": 12, "capacity": 6144, "limit": "65536 open files of the relay", "remedy": "more"},
        "tls": {
            "mode": "mTLS",
            "errors": {"wrong_ca": 4},
            "certificates": [
                {"role": "server", "file": "/tls.crt", "not_after": "2027-01-15T08:00:00+00:00"},
                {"role": "server", "file": "/ca.crt", "not_after": "2028-01-15T08:00:00+00:00"},
                {"role": "server", "file": "/ca.crt", "not_after": "2027-01-15T08:00:00+00:00"},
            ],
        },
        "beside": None,
        "migrations": list(migrations),
        **changes,
    }


def exposition(of: dict[str, Any], accept: str = "", measures: Measures | None = None) -> str:
    return render(Exporter(lambda: of, measures or Measures()).scrape(), accept)[0].decode()


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_a_migrations_bytes_are_counters_by_channel_and_direction_with_the_labels_of_kubevirts_metrics() -> None:
    text = exposition(report(migration()))
    labels = 'migration_uid="m1",name="vmi",namespace="default",role="source"'
    assert lines(text, "migproxy_migration_bytes_total") == [
        f'migproxy_migration_bytes_total{{channel="libvirt",direction="sent",{labels}}} 1000.0',
        f'migproxy_migration_bytes_total{{channel="libvirt",direction="received",{labels}}} 10.0',
        f'migproxy_migration_bytes_total{{channel="direct",direction="sent",{labels}}} 1.099511627776e+12',
        f'migproxy_migration_bytes_total{{channel="direct",direction="received",{labels}}} 10.0',
    ]
    assert f"migproxy_migration_running{{{labels}}} 1.0" in text
    assert f'migproxy_migration_tcp_rtt_seconds{{channel="direct",{labels}}} 0.0002' in text
    assert 'reason="reset"' in lines(text, "migproxy_migration_connections_failed_total")[0]


def test_counters_carry_when_they_began_so_that_a_restart_is_no_way_back() -> None:
    text = exposition(report(migration()), OPENMETRICS)
    families = {one.name: one for one in parsed(text)}  # type: ignore[no-untyped-call]
    created = [s.value for s in families["migproxy_migration_bytes"].samples if s.name.endswith("_created")]
    assert set(created) == {1700000000.5}


@pytest.mark.parametrize(("limit", "values"), [(None, [0, 0]), ("channel", [1, 0]), ("node", [0, 1])])
def test_a_channel_whose_connections_wait_says_what_is_full(limit: str | None, values: list[int]) -> None:
    full = limit and {"limit": limit}
    text = exposition(report(migration(channels=[channel("direct", waits=full)])))
    waiting = lines(text, "migproxy_migration_connections_waiting{")
    assert [float(line.rpartition(" ")[2]) for line in waiting] == values
    assert "migproxy_connections 12.0" in text
    assert "migproxy_connections_capacity 6144.0" in text


def test_an_ended_migration_keeps_its_counters_and_has_no_gauges_of_connections() -> None:
    ended = migration(state="ended", channels=[channel("direct", connections_open=0, tcp=None)])
    text = exposition(report(ended))
    assert lines(text, "migproxy_migration_bytes_total")
    assert "migproxy_migration_running" in text
    assert not lines(text, "migproxy_migration_connections_open")
    assert not lines(text, "migproxy_migration_tcp_rtt")
    assert 'migproxy_listeners{role="source"} 0.0' in text


def test_a_migration_that_waits_has_no_counters_yet_and_is_counted_by_its_state() -> None:
    waiting = {
        key: value
        for key, value in migration(state="waiting").items()
        if key not in ("channels", "began", "peer", "limited")
    }
    text = exposition(report(waiting))
    assert not lines(text, "migproxy_migration_bytes")
    assert 'migproxy_migrations{role="source",state="waiting"} 1.0' in text
    assert len(lines(text, "migproxy_migrations{")) == 2 * len(STATES)


def test_what_is_not_known_is_not_exported() -> None:
    text = exposition(report(watch=None, tls={"mode": "plaintext", "errors": {}}))
    for name in ("watch", "certificate", "tls_errors", "handshake", "migration_bytes"):
        assert f"migproxy_{name}" not in text, name
    files = exposition(report(watch={"source": "files", "last_event": 5.0, "reconnects": None, "relists": None}))
    assert 'migproxy_watch_last_event_timestamp_seconds{source="files"} 5.0' in files
    assert "reconnects" not in files


def test_of_several_certificates_in_a_file_the_first_to_expire_counts() -> None:
    text = exposition(report())
    assert lines(text, "migproxy_certificate_expiry_timestamp_seconds{") == [
        'migproxy_certificate_expiry_timestamp_seconds{file="/tls.crt",role="server"} 1.8e+09',
        'migproxy_certificate_expiry_timestamp_seconds{file="/ca.crt",role="server"} 1.8e+09',
    ]


def test_every_reason_of_failure_exists_before_the_first_failure() -> None:
    text = exposition(report())
    for role in ("source", "target"):
        for reason in FAILURES:
            assert f'migproxy_connections_failed_total{{reason="{reason}",role="{role}"}} 0.0' in text


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_names_that_others_chose_cannot_break_the_exposition(accept: str) -> None:
    text = exposition(report(migration(name='a"b\nc\\d')), accept)
    assert 'name="a\\"b\\nc\\\\d"' in text
    if accept:
        assert list(parsed(text))  # type: ignore[no-untyped-call]


def test_each_metric_is_documented_and_each_documented_metric_exists() -> None:
    measures = Measures()
    measures.dials.labels("source", "direct").observe(1)
    measures.handshakes.labels("source").observe(1)
    measures.durations.labels("source").observe(1)
    taken = [{"path": "virt-handler", "reason": "timeout", "connections": 2}]
    beside = report(migration(path="migproxy", path_reason="", paths=taken), beside={"failsafe": True})
    families: list[Metric] = Exporter(lambda: beside, measures).scrape()
    suffixes = {"counter": "_total", "info": "_info"}
    exported = {one.name + suffixes.get(one.type, "") for one in families if one.name.startswith("migproxy")}
    documented = set(re.findall(r"^\| `(migproxy_\w+)` \|", DOCUMENT.read_text(), re.MULTILINE))
    assert exported == documented
    undescribed = [one.name for one in families if len(one.documentation) < 20]
    assert undescribed == [], "a HELP text that an operator understands"


def test_a_documented_metric_has_a_query_or_answers_by_itself() -> None:
    text = DOCUMENT.read_text()
    queries = "\n".join(re.findall(r"```promql\n(.*?)```", text, re.DOTALL))
    documented = set(re.findall(r"^\| `(migproxy_\w+)` \|", text, re.MULTILINE))
    assert {name for name in documented if name not in queries} == set()


def test_what_limits_a_migration_is_a_counter_of_seconds() -> None:
    labels = 'migration_uid="m1",name="vmi",namespace="default",role="source"'
    assert lines(exposition(report(migration())), "migproxy_migration_limited_seconds_total") == [
        f'migproxy_migration_limited_seconds_total{{by="guest",{labels}}} 20.0',
        f'migproxy_migration_limited_seconds_total{{by="network",{labels}}} 5.5',
    ]


def test_the_instruments_of_two_daemons_in_one_process_are_apart() -> None:
    first, second = Measures(), Measures()
    first.reconcile_errors.inc()
    assert "migproxy_reconcile_errors_total 1.0" in exposition(report(), measures=first)
    assert "migproxy_reconcile_errors_total 0.0" in exposition(report(), measures=second)
    CollectorRegistry().register(first.durations)  # which would refuse a duplicate of the global registry's


def test_beside_virt_handler_each_migration_has_a_path_and_a_reason() -> None:
    bypassed = {name: value for name, value in migration(state="bypassed", role="target").items() if name != "channels"}
    told = bypassed | {"path": "virt-handler", "path_reason": "late"}
    text = exposition(report(migration(path="migproxy", path_reason=""), told, migration(path=None, path_reason="")))
    labels = 'migration_uid="m1",name="vmi",namespace="default"'
    assert lines(text, "migproxy_migration_path{") == [
        f'migproxy_migration_path{{{labels},path="migproxy",reason="",role="source"}} 1.0',
        f'migproxy_migration_path{{{labels},path="virt-handler",reason="late",role="target"}} 1.0',
    ]
    assert 'migproxy_migrations{role="target",state="bypassed"} 1.0' in text
    assert not lines(exposition(report(migration())), "migproxy_migration_path")


@pytest.mark.parametrize(("runs", "value"), [(True, "1.0"), (False, "0.0")])
def test_beside_virt_handler_it_is_told_whether_a_failsafe_runs(runs: bool, value: str) -> None:
    text = exposition(report(beside={"failsafe": runs}))
    assert lines(text, "migproxy_failsafe_running ") == [f"migproxy_failsafe_running {value}"]
    assert not lines(exposition(report()), "migproxy_failsafe_running")
