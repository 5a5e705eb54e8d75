"""What the node says of its migrations, as plain values: the rows that status, top, the page and the metrics share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from migproxy.bottleneck import Limits, describe
from migproxy.plan import Bypassed, Migration, Role
from migproxy.source import Source
from migproxy.status import size
from migproxy.takeover import AdoptedProxy
from migproxy.target import Target
from migproxy.traffic import Progress, Traffic

_FLAWS = 20  # that are shown: whoever may create VMIs may create many


def certificate_problem(tls: Mapping[str, Any]) -> str | None:
    """What is wrong with the certificates, for people; None where nothing is.

    Args:
        tls: What the security reports of itself.
    """
    now = datetime.now(UTC)
    expired = [
        f"{one['file']} has expired: renew it"
        for one in tls.get("certificates", ())
        if datetime.fromisoformat(one["not_after"]) <= now
    ]
    told = [tls.get("problem"), *tls.get("problems", {}).values(), *expired]
    return "; ".join(dict.fromkeys(problem for problem in told if problem)) or None


def flaws(found: Mapping[str, str]) -> dict[str, Any]:
    """How many VMIs and documents cannot be read, and the first of them by where they are.

    Args:
        found: What the inventory tells of them.
    """
    return {"count": len(found), "first": dict(islice(found.items(), _FLAWS))}


def bypass(item: Bypassed) -> dict[str, Any]:
    """The row of a migration that virt-handler serves, and why."""
    told = {"path": "virt-handler", "path_reason": str(item.reason), "path_why": item.why}
    return {**identity(item.migration, item.role), "state": "bypassed", "error": None, **told}


def identity(migration: Migration, role: Role) -> dict[str, Any]:
    """What every row begins with."""
    return {
        "namespace": migration.namespace,
        "name": migration.name,
        "vmi_uid": migration.vmi_uid,
        "migration_uid": migration.migration_uid,
        "role": str(role),
    }


def adopted(left: AdoptedProxy) -> dict[str, Any]:
    """The row of what an earlier daemon left."""
    return {
        **identity(left.migration, left.role),
        "state": "running" if left.open_connections else "prepared",
        "error": "taken over from an earlier daemon, and the inventory is not known yet",
        **traffic(left),
    }


def traffic(proxy: Source | Target | AdoptedProxy) -> dict[str, Any]:
    """What a proxy adds to its migration's row."""
    sent, received = proxy.rate
    loss, encrypts = proxy.progress.loss, proxy.progress.encrypts
    return {
        "peer": str(proxy.plan.address or "virt-handler") if isinstance(proxy, Source) else None,
        "last_error": proxy.progress.last_error,
        "paths": [
            {"path": path, "reason": reason, "connections": count}
            for (path, reason), count in sorted(proxy.progress.paths.items())
        ],
        "began": proxy.progress.began,
        "age_seconds": round(time.time() - proxy.progress.began, 3),
        "history": proxy.history,
        "limited_by": proxy.limited_by,
        "bytes_sent_per_second": round(sent),
        "bytes_received_per_second": round(received),
        "limited": {
            "now": _limits(proxy.limited, loss, encrypts=encrypts),
            "all": _limits(proxy.progress.limited, loss, encrypts=encrypts),
        },
        "loss": round(loss, 6),
        "channels": [
            {
                "channel": channel.label,
                "listening": proxy.listening(channel),
                "peer": proxy.peer(channel),
                "connections_open": len(traffic.open),
                "connections_total": traffic.connections,
                "connections_failed": traffic.failed,
                "waits": asdict(full) if (full := proxy.waits.get(channel)) else None,
                "failures": dict(traffic.failures),
                "bytes_sent": traffic.sent,
                "bytes_received": traffic.received,
                "modes": dict(traffic.modes),
                "retransmits": traffic.retransmits,
                "tcp": _tcp(traffic),
                "bytes_spliced_sent": traffic.spliced[0],
                "bytes_spliced_received": traffic.spliced[1],
            }
            for channel, traffic in sorted(proxy.traffic.items())
        ],
    }


def summary(progress: Progress) -> dict[str, Any]:
    """What a migration that is over has moved, how fast, and what limited it; nothing where it moved nothing.

    Returns:
        moved: Bytes, for people.
        seconds: From its first connection to its last one's end.
        rate: For people.
        limited: See `bottleneck.describe`.
    """
    if not progress.moved or progress.opened is None:
        return {}
    seconds = max((progress.closed or time.time()) - progress.opened, 1e-3)
    verdict = describe(progress.limited, loss=progress.loss, encrypts=progress.encrypts)
    rate = f"{progress.moved * 8 / seconds / 1e9:.2f} Gbit/s"
    return {"moved": size(progress.moved), "seconds": round(seconds, 1), "rate": rate, "limited": verdict}


def _limits(limits: Limits, loss: float, *, encrypts: bool) -> dict[str, Any]:
    """Seconds by what limited them, and what is told to people."""
    verdict = describe(limits, loss=loss, encrypts=encrypts)
    return {"seconds": {str(by): round(seconds, 3) for by, seconds in limits.items()}, "verdict": verdict}


def _tcp(traffic: Traffic) -> dict[str, float] | None:
    """TCP's view of a channel: its slowest connection's round trip, and the sums over all that are open."""
    infos = traffic.tcp_infos
    if not infos:
        return None
    return {
        "rtt_seconds": max(info.rtt for info in infos),
        "delivery_rate": sum(info.delivery_rate for info in infos),
        "congestion_window": sum(info.congestion_window for info in infos),
    }
