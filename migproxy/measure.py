"""Instruments that the event loop writes and Prometheus reads: latencies, durations, and counts of this process.

What belongs to one migration is counted on its own objects (`relay.Traffic`) and goes with it; what is here belongs to
the node, and lasts as long as the process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from migproxy.httpd import Refusal
from migproxy.imports import bare

with bare("prometheus_client"):  # whose __init__ loads an HTTP server
    from prometheus_client.metrics import Counter, Histogram

FAILURES = ("dial", "handshake", "reset", "timeout", "closed", "lost", "other")
"""Why a connection failed: its other leg could not be had; the peer was refused or refused us; the network reset it;
the other node answered nothing for `--peer-timeout`; one end went away while the other still sent; the process that had
its keys died; anything else."""

_LATENCY = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
_DURATION = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


def _dials() -> Histogram:
    return Histogram(
        "migproxy_dial_duration_seconds",
        "Time from accepting a connection until its other leg stood: the target node's port, or QEMU's socket, "
        "retries included.",
        ["role", "channel"],
        buckets=_LATENCY,
        registry=None,
    )


def _handshakes() -> Histogram:
    return Histogram(
        "migproxy_tls_handshake_duration_seconds",
        "Time that a completed TLS handshake between the two nodes took.",
        ["role"],
        buckets=_LATENCY,
        registry=None,
    )


def _durations() -> Histogram:
    return Histogram(
        "migproxy_migration_duration_seconds",
        "Time from a migration's first connection until its proxy on this node ended.",
        ["role"],
        buckets=_DURATION,
        registry=None,
    )


def _failures() -> Counter:
    counter = Counter(
        "migproxy_connections_failed_total",
        "Connections of all migrations that failed on this node, by reason. Unlike a migration's own count, it "
        "exists from the start, so that increase() sees the first failure.",
        ["role", "reason"],
        registry=None,
    )
    for role in ("source", "target"):
        for reason in FAILURES:
            counter.labels(role, reason)
    return counter


def _resumed() -> Counter:
    counter = Counter(
        "migproxy_connections_resumed_total",
        "Connections that went on after the daemon that relayed them had died or was replaced.",
        ["role"],
        registry=None,
    )
    for role in ("source", "target"):
        counter.labels(role)
    return counter


def _reconcile_errors() -> Counter:
    return Counter(
        "migproxy_reconcile_errors_total",
        "Attempts to make a migration's proxy as planned that failed and are retried.",
        registry=None,
    )


def _http_refused() -> Counter:
    counter = Counter(
        "migproxy_http_refused_total",
        "HTTP connections that ended without what they asked for: malformed (no HTTP request), tls (a failed "
        "handshake), timeout (no whole request, or an answer that was not taken, in time), displaced (gave way to a "
        "newer one), error (this daemon could not answer).",
        ["reason"],
        registry=None,
    )
    for reason in get_args(Refusal):
        counter.labels(reason)
    return counter


@dataclass(frozen=True, slots=True)
class Measures:
    """The instruments of one daemon."""

    dials: Histogram = field(default_factory=_dials)
    handshakes: Histogram = field(default_factory=_handshakes)
    durations: Histogram = field(default_factory=_durations)
    failures: Counter = field(default_factory=_failures)
    resumed: Counter = field(default_factory=_resumed)
    reconcile_errors: Counter = field(default_factory=_reconcile_errors)
    http_refused: Counter = field(default_factory=_http_refused)
