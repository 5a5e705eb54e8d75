"""What is answered over HTTP: metrics, health and readiness, a status page, and its JSON."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from migproxy.httpd import Answer, Handler, Request, json_answer
from migproxy.measure import Measures

Report = Mapping[str, Any]
Checks = Mapping[str, str | None]

_OPENMETRICS = "application/openmetrics-text"
_SHARED_SECONDS = 1.0  # from when it began to be made
_COMPRESSED_BYTES = 1400  # less is one packet anyway


def routes(
    report: Callable[[], Report],
    checks: Callable[[], Checks],
    measures: Measures,
    hangs: Callable[[], Sequence[str]],
) -> dict[str, Handler]:
    """Returns who answers which path.

    Args:
        report, checks, measures, hangs: See `web.serve`.
    """

    async def make_status(compressed: bool) -> Answer:
        return await _compress(json_answer(report()), compressed)

    async def make_metrics(openmetrics: bool, compressed: bool) -> Answer:
        await asyncio.to_thread(import_module, "migproxy.metrics")  # at the first scrape, and aside: it takes 0.1 s
        from migproxy.metrics import Exporter, render

        # Formatting takes most of the time, and needs nothing of the event loop's.
        families = Exporter(report, measures).scrape()
        body, content_type = await asyncio.to_thread(render, families, _OPENMETRICS if openmetrics else "")
        return await _compress(Answer(body, content_type), compressed)

    shared_status, shared_metrics = _Shared(make_status), _Shared(make_metrics)

    async def status_page(request: Request) -> Answer:
        return await _compress(_page(), _takes_gzip(request))

    async def status(request: Request) -> Answer:
        return await shared_status.get(_takes_gzip(request))

    async def metrics(request: Request) -> Answer:
        openmetrics = accepts(request.headers.get("accept", ""), _OPENMETRICS)
        return await shared_metrics.get(openmetrics, _takes_gzip(request))

    async def alive(_: Request) -> Answer:
        problems = hangs()
        return _lines(problems or ["ok"], well=not problems)

    async def ready(_: Request) -> Answer:
        now = checks()
        lines = [f"[{'-' if reason else '+'}] {name}: {reason or 'ok'}" for name, reason in now.items()]
        return _lines(lines, well=not any(now.values()))

    return {"/": status_page, "/api/status": status, "/metrics": metrics, "/healthz": alive, "/readyz": ready}


class _Shared:
    """An answer that takes long to make: each variant is made once for all who ask meanwhile, or within a second."""

    def __init__(self, make: Callable[..., Awaitable[Answer]]) -> None:
        self._make = make
        self._made: dict[tuple[bool, ...], asyncio.Future[Answer]] = {}

    async def get(self, *variant: bool) -> Answer:
        if variant not in self._made:
            loop = asyncio.get_running_loop()
            until = loop.time() + _SHARED_SECONDS
            made = self._made[variant] = asyncio.ensure_future(self._make(*variant))
            made.add_done_callback(lambda _: loop.call_at(until, self._made.pop, variant))
        return await asyncio.shield(self._made[variant])  # who asked first may leave


def accepts(header: str, name: str) -> bool:
    """Whether an Accept or Accept-Encoding header names something, with a quality above 0 (RFC 9110, 12.4.2).

    Args:
        name: In lower case.
    """
    for one in header.lower().split(","):
        found, *parameters = (part.strip() for part in one.split(";"))
        if found == name:
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


def _takes_gzip(request: Request) -> bool:
    return accepts(request.headers.get("accept-encoding", ""), "gzip")


async def _compress(answer: Answer, wanted: bool) -> Answer:
    if not wanted or len(answer.body) < _COMPRESSED_BYTES:
        return replace(answer, headers={**answer.headers, "Vary": "Accept-Encoding"})
    body = await asyncio.to_thread(zlib.compress, answer.body, wbits=31)  # gzip's header, says zlib
    return replace(answer, body=body, headers={**answer.headers, "Vary": "Accept-Encoding", "Content-Encoding": "gzip"})


def _lines(lines: Sequence[str], *, well: bool) -> Answer:
    return Answer(("\n".join(lines) + "\n").encode(), status=200 if well else 503)


@functools.cache
def _page() -> Answer:
    from importlib.resources import files

    page = files("migproxy").joinpath("page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _policy(page), "X-Content-Type-Options": "nosniff"}
    return Answer(page.encode(), "text/html; charset=utf-8", headers=headers)


def _policy(page: str) -> str:
    """The page may run its own script, use its own style, and talk to this daemon: nothing leaves the host."""

    def allow(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in contents]
        return " ".join(f"'sha256-{one}'" for one in hashes)

    return (
        f"default-src 'none'; script-src {allow('script')}; style-src {allow('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
