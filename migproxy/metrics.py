"""Prometheus metrics, made at scrape time from what the node reports; nothing is kept or copied in between.

Names and units follow Prometheus' conventions. A migration's series carry namespace, name and migration_uid, as
KubeVirt's own metrics do, and the role of this node in it. Counters of a migration have their creation time
(OpenMetrics' _created), which tells a restarted daemon's counter from one that went backwards.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from migproxy import __version__
from migproxy.measure import Measures

STATES = ("waiting", "preparing", "prepared", "running", "bypassed", "error", "ended")

_MIGRATION = ["namespace", "name", "migration_uid", "role"]
_CHANNEL = [*_MIGRATION, "channel"]

Report = Mapping[str, Any]


class Exporter:
    """Turns the node's report into an exposition.

    Args:
        report: `Node.report`; called for each scrape, in the event loop.
        measures: The node's instruments.
    """

    def __init__(self, report: Callable[[], Report], measures: Measures) -> None:
        self._report = report
        self._measures = measures
        self._process = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._process)

    def scrape(self) -> list[Metric]:
        """Reads the live objects; what it returns may be formatted in another thread."""
        measures = self._measures
        instruments = (
            measures.failures,
            measures.resumed,
            measures.reconcile_errors,
            measures.dials,
            measures.handshakes,
            measures.durations,
            measures.http_refused,
        )
        found = [*families(self._report()), *(one for instrument in instruments for one in instrument.collect())]
        return [family for family in [*found, *self._process.collect()] if family.samples]


def render(families: list[Metric], accept: str) -> tuple[bytes, str]:
    """Formats an exposition.

    Args:
        families: What `Exporter.scrape` returned.
        accept: The request's Accept header: OpenMetrics where it asks for that, else Prometheus' text format.

    Returns:
        The body, and its content type.
    """
    encode, content_type = choose_encoder(accept)
    return encode(_Fixed(families)), content_type


class _Fixed(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def families(report: Report) -> Iterator[Metric]:
    """The metrics of a node, of its migrations, and of what it follows; those of which nothing is known are empty.

    Args:
        report: As `Node.report` makes it.
    """
    yield InfoMetricFamily(
        "migproxy_build",
        "Version of migproxy and of the Python that runs it.",
        {"version": __version__, "python_version": platform.python_version()},
    )
    yield from _node(report)
    yield from _health(report)
    yield from _migrations(report["migrations"])
    yield from _channels([migration for migration in report["migrations"] if migration.get("channels")])


def _node(report: Report) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "migproxy_node_ready", "Whether this node takes migrations: 1 while every check is well.", report["ready"]
    )
    checks = GaugeMetricFamily(
        "migproxy_node_check", "Each of the checks that make a node ready: 1 while it is well.", labels=["check"]
    )
    for name, problem in report["checks"].items():
        checks.add_metric([name], problem is None)
    yield checks
    yield GaugeMetricFamily("migproxy_vmis", "VirtualMachineInstances that the inventory tells of.", report["vmis"])
    yield GaugeMetricFamily(
        "migproxy_reconcile_queue_depth",
        "Migrations whose proxy is not (yet) as planned: being made, changed, or retried after an error.",
        report["queue_depth"],
    )
    migrations = GaugeMetricFamily(
        "migproxy_migrations",
        "Migrations of this node by role and state: waiting for the other side, preparing, prepared (listening), "
        "running, bypassed (virt-handler's own proxy serves it), error, ended (still shown).",
        labels=["role", "state"],
    )
    listeners = GaugeMetricFamily(
        "migproxy_listeners", "Sockets on which connections of migrations are accepted.", labels=["role"]
    )
    states = Counter((one["role"], one["state"]) for one in report["migrations"])
    for role in ("source", "target"):
        for state in STATES:
            migrations.add_metric([role, state], states[role, state])
        mine = [one for one in report["migrations"] if one["role"] == role and one["state"] != "ended"]
        channels = [channel for one in mine for channel in one.get("channels") or []]
        listeners.add_metric([role], sum(channel["listening"] is not None for channel in channels))
    yield migrations
    yield listeners


def _health(report: Report) -> Iterator[Metric]:
    watch = report["watch"] or {}
    source = watch.get("source", "")
    last_event = GaugeMetricFamily(
        "migproxy_watch_last_event_timestamp_seconds",
        "When the inventory last heard from its source. A Kubernetes watch hears bookmarks each minute or so; a "
        "folder of VMI files is silent while nobody writes to it.",
        labels=["source"],
    )
    reconnects = CounterMetricFamily(
        "migproxy_watch_reconnects_total", "Times that a broken watch was begun anew.", labels=["source"]
    )
    relists = CounterMetricFamily(
        "migproxy_watch_relists_total", "Times that the whole state was read anew.", labels=["source"]
    )
    for family, key in ((last_event, "last_event"), (reconnects, "reconnects"), (relists, "relists")):
        if watch.get(key) is not None:
            family.add_metric([source], watch[key])
        yield family
    yield GaugeMetricFamily(
        "migproxy_inventory_problems",
        "What keeps the inventory from reading VMIs: folders, files or an API server that cannot be read.",
        len(report["problems"].keys() - {"inventory", "address"}),
    )
    yield GaugeMetricFamily(
        "migproxy_inventory_flaws",
        "VMIs, or documents in VMI files, that cannot be read: their last good state stays in force.",
        report["flaws"]["count"],
    )
    yield CounterMetricFamily(
        "migproxy_ended_migrations_dropped",
        "Ended migrations that were forgotten before their time, because there were too many of a VMI, or in all.",
        report["ended_dropped"],
    )
    yield CounterMetricFamily(
        "migproxy_log_lines_lost",
        "Lines of the log that could not be written: standard error, or the journal, is full, gone, or not read.",
        report["log"]["lines_lost"],
    )
    relay = report["relay"]
    yield GaugeMetricFamily(
        "migproxy_relay_up",
        "1 while the relay has all of this daemon's connections: neither process's crash or restart ends one that is "
        "plain or in kernel TLS.",
        relay["problem"] is None,
    )
    yield GaugeMetricFamily("migproxy_relay_connections", "Connections that the relay moves.", relay["connections"])
    yield GaugeMetricFamily(
        "migproxy_relay_descriptors", "Descriptors that were handed to the relay.", relay["descriptors"]
    )
    yield CounterMetricFamily(
        "migproxy_relay_replacements",
        "Relays that this daemon went on with after the one before had ended.",
        relay["replaced"],
    )
    budget = report["budget"]
    yield GaugeMetricFamily(
        "migproxy_connections",
        "Connections of all migrations, those that are being set up among them.",
        budget["connections"],
    )
    yield GaugeMetricFamily(
        "migproxy_connections_capacity",
        "Connections that this node has room for, by the limits of open files and memory of daemon and relay.",
        budget["capacity"],
    )
    if (beside := report["beside"]) is not None:
        yield GaugeMetricFamily(
            "migproxy_failsafe_running",
            "1 while a failsafe would give back to virt-handler what this daemon has in its way, should it die; beside "
            "virt-handler only.",
            beside["failsafe"],
        )
    expiry = GaugeMetricFamily(
        "migproxy_certificate_expiry_timestamp_seconds",
        "End of validity of the certificates in use, by role and file; of several in a file, the earliest.",
        labels=["role", "file"],
    )
    ends: dict[tuple[str, str], float] = {}
    for one in report["tls"].get("certificates", ()):
        which, end = (one["role"], one["file"]), datetime.fromisoformat(one["not_after"]).timestamp()
        ends[which] = min(end, ends.get(which, end))
    for which, end in ends.items():
        expiry.add_metric(which, end)
    yield expiry
    errors = CounterMetricFamily(
        "migproxy_tls_errors_total", "Connections refused, or broken, for a reason of TLS, by that.", labels=["reason"]
    )
    for reason, count in report["tls"]["errors"].items():
        errors.add_metric([str(reason)], count)
    yield errors


def _migrations(migrations: list[Report]) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "migproxy_migration_info",
        "A migration of this node, with the UID of its VMI and, on the source, the target's address.",
        labels=[*_MIGRATION, "vmi_uid", "peer"],
    )
    running = GaugeMetricFamily(
        "migproxy_migration_running",
        "1 while a migration runs: it is marked as started, or has connections open.",
        labels=_MIGRATION,
    )
    path = GaugeMetricFamily(
        "migproxy_migration_path",
        "Beside virt-handler: whose proxy a migration goes by, migproxy or virt-handler, and why not by migproxy.",
        labels=[*_MIGRATION, "path", "reason"],
    )
    paths = CounterMetricFamily(
        "migproxy_migration_path_connections",
        "Beside virt-handler: connections by whose proxy they went, and why not by migproxy.",
        labels=[*_MIGRATION, "path", "reason"],
    )
    limited = CounterMetricFamily(
        "migproxy_migration_limited_seconds",
        "Seconds in which a migration had connections, by what limited it: on the source's node guest, source (its "
        "CPU), network or target; on the target's node target, or upstream: what comes before.",
        labels=[*_MIGRATION, "by"],
    )
    for migration in migrations:
        for by, seconds in migration.get("limited", {}).get("all", {}).get("seconds", {}).items():
            limited.add_metric([*_labels(migration), by], seconds, migration["began"])
        for one in migration.get("paths", ()):
            paths.add_metric([*_labels(migration), one["path"], one["reason"]], one["connections"])
        if migration.get("path"):
            path.add_metric([*_labels(migration), migration["path"], migration["path_reason"]], 1)
        info.add_metric([*_labels(migration), migration["vmi_uid"], migration.get("peer") or ""], 1)
        running.add_metric(_labels(migration), migration["state"] == "running")
    yield info
    yield running
    yield limited
    yield path
    yield paths


def _channels(migrations: list[Report]) -> Iterator[Metric]:
    """The series of each channel: counters as long as the migration is shown, gauges while it has connections."""
    carried = CounterMetricFamily(
        "migproxy_migration_bytes_total",
        "Bytes that a migration's channel carried: sent from the launcher here to the other node, or received.",
        labels=[*_CHANNEL, "direction"],
    )
    modes = CounterMetricFamily(
        "migproxy_migration_mode_bytes_total",
        "The same bytes, both directions together, by how they moved: spliced (in the kernel), ktls (encrypted by the "
        "kernel, and spliced), user-space (encrypted by the relay's workers).",
        labels=[*_CHANNEL, "mode"],
    )
    opened = CounterMetricFamily(
        "migproxy_migration_connections_total", "Connections of a channel that were relayed.", labels=_CHANNEL
    )
    failed = CounterMetricFamily(
        "migproxy_migration_connections_failed_total",
        "Connections of a channel that failed: dial (no other leg), handshake, reset, timeout, closed (one end left "
        "while the other still sent), lost (with the daemon that relayed it), other.",
        labels=[*_CHANNEL, "reason"],
    )
    retransmits = CounterMetricFamily(
        "migproxy_migration_tcp_retransmitted_segments_total",
        "Segments that this node's TCP sent again for a channel: loss on the migration network.",
        labels=_CHANNEL,
    )
    connections = GaugeMetricFamily(
        "migproxy_migration_connections_open", "Connections of a channel that are open.", labels=_CHANNEL
    )
    waiting = GaugeMetricFamily(
        "migproxy_migration_connections_waiting",
        "1 while further connections of a channel wait to be accepted, by what is full: the channel or the node.",
        labels=[*_CHANNEL, "limit"],
    )
    rtt = GaugeMetricFamily(
        "migproxy_migration_tcp_rtt_seconds",
        "Smoothed round-trip time between the two nodes, of the channel's slowest open connection.",
        labels=_CHANNEL,
    )
    delivery = GaugeMetricFamily(
        "migproxy_migration_tcp_delivery_rate_bytes_per_second",
        "Rate at which the other node lately acknowledged bytes, summed over the channel's open connections.",
        labels=_CHANNEL,
    )
    window = GaugeMetricFamily(
        "migproxy_migration_tcp_congestion_window_bytes",
        "Bytes that TCP lets be in flight, summed over the channel's open connections.",
        labels=_CHANNEL,
    )
    for migration in migrations:
        created = migration["began"]
        for channel in migration["channels"]:
            labels = [*_labels(migration), channel["channel"]]
            carried.add_metric([*labels, "sent"], channel["bytes_sent"], created)
            carried.add_metric([*labels, "received"], channel["bytes_received"], created)
            opened.add_metric(labels, channel["connections_total"], created)
            retransmits.add_metric(labels, channel["retransmits"], created)
            for mode, count in channel["modes"].items():
                modes.add_metric([*labels, mode], count, created)
            for reason, count in channel["failures"].items():
                failed.add_metric([*labels, reason], count, created)
            if migration["state"] != "ended":
                connections.add_metric(labels, channel["connections_open"])
                for limit in ("channel", "node"):
                    waiting.add_metric([*labels, limit], (channel["waits"] or {}).get("limit") == limit)
            if tcp := channel["tcp"]:
                rtt.add_metric(labels, tcp["rtt_seconds"])
                delivery.add_metric(labels, tcp["delivery_rate"])
                window.add_metric(labels, tcp["congestion_window"])
    yield from (carried, modes, opened, failed, retransmits, connections, waiting, rtt, delivery, window)


def _labels(migration: Report) -> list[str]:
    return [migration["namespace"], migration["name"], migration["migration_uid"], migration["role"]]
