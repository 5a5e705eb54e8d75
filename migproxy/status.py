"""`migproxy status` for people: the daemon's report as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from migproxy.retention import MOST, MOST_OF_ONE
from migproxy.text import printable_values

_HEADINGS = (
    "MIGRATION",
    "ROLE",
    "STATE",
    "AGE",
    "CHANNEL",
    "OPEN",
    "TOTAL",
    "FAILED",
    "SENT",
    "RECEIVED",
    "RTT",
    "RETRANSMITS",
    "MODE",
    "FROM -> TO",
)


def render(report: Mapping[str, Any]) -> str:
    """Renders what the daemon reports, one line per channel of a migration; no text in it controls the terminal.

    Args:
        report: As `Node.report` makes it.
    """
    report = printable_values(report)
    state = "draining" if report["draining"] else "ready" if report["ready"] else "NOT READY"
    lines = [f"node {report['node']}, migration address {report['address'] or 'none'}, {state}"]
    lines += [f"  {name}: {problem}" for name, problem in report["problems"].items()]
    lines += _flaws(report["flaws"])
    if cluster := report.get("cluster"):
        lines += _cluster(cluster)
    if (beside := report.get("beside")) is not None:
        lines.append("beside virt-handler")
        if not beside["failsafe"]:
            lines.append(
                "  no failsafe runs: a daemon that is killed, and not started anew, would stay in virt-handler's way"
            )
    lines += _security(report["tls"])
    lines += _relay(report["relay"])
    if dropped := report["ended_dropped"]:
        lines.append(
            f"ended migrations: {dropped} are not shown any more; at most {MOST_OF_ONE} of a VMI and {MOST} in all are"
        )
    budget = report["budget"]
    lines.append(f"connections: {budget['connections']} of {budget['capacity']}, as {budget['limit']} allow")
    lines += _log(report.get("log", {"lines_lost": 0}))  # an older daemon's has none
    if not report["migrations"]:
        return "\n".join([*lines, "no migrations"])
    rows = [_HEADINGS, *(row for migration in report["migrations"] for row in _rows(migration))]
    lines += ["", *_columns(rows)]
    for migration in report["migrations"]:
        lines += _verdicts(migration)
        if migration.get("path"):
            why = f": {migration['path_why']}" if migration.get("path_why") else ""
            lines.append(f"{_name(migration)} ({migration['role']}): goes by {migration['path']}{why}")
        if paths := migration.get("paths"):
            told = ", ".join(f"{one['connections']} by {one['path']}{_because(one['reason'])}" for one in paths)
            lines.append(f"{_name(migration)} ({migration['role']}): connections {told}")
        for channel in migration.get("channels") or ():
            if waits := channel["waits"]:
                why = f"connections of channel {channel['channel']} wait: {waits['why']}: {waits['remedy']}"
                lines.append(f"{_name(migration)} ({migration['role']}): {why}")
        for label in ("error", "last_error"):
            if migration.get(label):
                lines.append(f"{_name(migration)} ({migration['role']}): {migration[label]}")
    return "\n".join(lines)


def _flaws(flaws: Mapping[str, Any]) -> Iterator[str]:
    """VMIs that cannot be read, which is nothing against the node."""
    for where, why in flaws["first"].items():
        yield f"  cannot be read: {where}: {why}"
    if more := flaws["count"] - len(flaws["first"]):
        yield f"  cannot be read: {more} more"


def _verdicts(migration: Mapping[str, Any]) -> Iterator[str]:
    """What limits a migration, or did."""
    limited = migration.get("limited")
    when = "now" if migration["state"] == "running" else "all"
    if limited and (verdict := limited[when]["verdict"]):
        yield f"{_name(migration)} ({migration['role']}): limited {verdict}"


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _log(log: Mapping[str, Any]) -> Iterator[str]:
    if log["lines_lost"]:
        why = f"; the last one now: {log['problem']}" if log["problem"] else ""
        yield f"log: {log['lines_lost']} lines could not be written{why}"


def _relay(relay: Mapping[str, Any]) -> Iterator[str]:
    if relay["pid"] is not None:
        moving = f"{relay['connections']} connection{'' if relay['connections'] == 1 else 's'}"
        yield f"relay: process {relay['pid']} moves {moving}"
    if relay["problem"]:
        yield f"  relay: {relay['problem']}"


def _cluster(cluster: Mapping[str, Any]) -> Iterator[str]:
    tls = "off" if cluster["disable_tls"] else f"on, {cluster['min_tls'] or 'the default version'} or newer"
    network, ca = cluster["network"] or "the pods'", cluster["ca_certificates"]
    yield f"KubeVirt in {cluster['namespace']}: TLS {tls}; migration network {network}; {ca} CA certificates"
    if cluster["problem"]:
        yield f"  {cluster['problem']}"


def _security(tls: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the certificates, and who was refused."""
    for role, problem in tls.get("problems", {}).items():
        yield f"  certificates ({role}): {problem}; the last good ones are in use"
    if tls["errors"]:
        yield "  TLS: " + ", ".join(f"{reason} {count}" for reason, count in sorted(tls["errors"].items()))


def _name(migration: Mapping[str, Any]) -> str:
    uid = migration["migration_uid"]
    return f"{migration['namespace']}/{migration['name']}" + (f" {uid[:8]}" if uid else "")


def _rows(migration: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    head = (_name(migration), migration["role"], migration["state"], duration(migration.get("age_seconds")))
    channels = migration.get("channels") or []
    if not channels:
        yield (*head, *[""] * (len(_HEADINGS) - len(head)))
    for channel in channels:
        yield (
            *head,
            channel["channel"],
            str(channel["connections_open"]),
            str(channel["connections_total"]),
            str(channel["connections_failed"]),
            size(channel["bytes_sent"]),
            size(channel["bytes_received"]),
            milliseconds(channel["tcp"] and channel["tcp"]["rtt_seconds"]),
            str(channel["retransmits"]),
            ", ".join(mode for mode, count in channel["modes"].items() if count),
            _ways(channel),
        )
        head = ("", "", "", "")
    if migration["state"] == "running":
        sent, received = migration["bytes_sent_per_second"], migration["bytes_received_per_second"]
        yield (*head, "(now)", "", "", "", f"{size(sent)}/s", f"{size(received)}/s", "", "", "", "")


def _ways(channel: Mapping[str, Any]) -> str:
    """Where the channel listens, while it does, and where its connections lead; sockets by their names alone."""
    return " -> ".join(end.rpartition("/")[2] for end in (channel.get("listening"), channel["peer"]) if end)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def milliseconds(seconds: float | None) -> str:
    """A round-trip time for people: 0.25 ms; empty where there is none."""
    return "" if seconds is None else f"{seconds * 1e3:.2f} ms"


def duration(seconds: float | None) -> str:
    """Seconds for people: 1h02m, 3m20s, 12s."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
