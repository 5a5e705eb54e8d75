"""`migproxy doctor` and Kubernetes: whether the API server answers, and what this account may do there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from migproxy.doctor.finding import Finding, Level
from migproxy.doctor.host import check_clock

_TIMEOUT = 10.0

PERMISSIONS = (
    ("list", "kubevirt.io", "virtualmachineinstances"),
    ("watch", "kubevirt.io", "virtualmachineinstances"),
    ("patch", "kubevirt.io", "virtualmachineinstances"),
    ("list", "kubevirt.io", "kubevirts"),
    ("watch", "kubevirt.io", "kubevirts"),
    ("create", "", "events"),
    ("patch", "", "events"),
)
"""What the daemon does at the API server: verb, API group, resource."""


def is_configured(kubeconfig: str | None) -> bool:
    """Whether there is an API server to ask: a kubeconfig is named, or this runs in a pod."""
    return kubeconfig is not None or "KUBERNETES_SERVICE_HOST" in os.environ


def check_api(kubeconfig: str | None, context: str | None) -> list[Finding]:
    """The API server's answers, the permissions there, and its clock.

    Args:
        kubeconfig: Path; None for the pod's own service account.
        context: Of the kubeconfig; None for its current one.
    """
    return asyncio.run(_check(kubeconfig, context))


async def _check(kubeconfig: str | None, context: str | None) -> list[Finding]:
    try:
        async with asyncio.timeout(_TIMEOUT), _connected(kubeconfig, context) as api:
            host = api.configuration.host
            began = datetime.now(UTC)
            version, _, headers = await _version(api)
            skew = _skew(headers, began)
            findings = [Finding("API server", Level.OK, f"{host} answers, {version.git_version}")]
            if skew is not None:
                findings.append(check_clock(skew, "the API server"))
            return [*findings, *[await _permission(api, *wanted) for wanted in PERMISSIONS]]
    except Exception as error:  # noqa: BLE001 - whatever the client raises is the finding
        why = f"no answer within {_TIMEOUT:g} s" if isinstance(error, TimeoutError) else str(error) or repr(error)
        return [
            Finding(
                "API server",
                Level.FAIL,
                f"{kubeconfig or 'the service account of the pod'}: {' '.join(why.split())}",
                "check the address in the kubeconfig, the service account's token, and network policies to the API",
            )
        ]


@asynccontextmanager
async def _connected(kubeconfig: str | None, context: str | None) -> AsyncIterator[Any]:
    from kubernetes_asyncio import client, config  # slow to import

    configuration = client.Configuration()
    if kubeconfig is None:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    else:
        await config.load_kube_config(kubeconfig, context, client_configuration=configuration)
    async with client.ApiClient(configuration) as api:
        yield api


async def _version(api: Any) -> Any:
    from kubernetes_asyncio import client

    return await client.VersionApi(api).get_code_with_http_info()


def _skew(headers: Any, began: datetime) -> float | None:
    """How far ahead the server's clock is, judged by the middle of the request and the header's whole seconds."""
    date = headers.get("Date")
    if date is None:
        return None
    middle = began + (datetime.now(UTC) - began) / 2
    return (parsedate_to_datetime(date) - middle).total_seconds() + 0.5


async def _permission(api: Any, verb: str, group: str, resource: str) -> Finding:
    from kubernetes_asyncio import client

    attributes = client.V1ResourceAttributes(verb=verb, group=group, resource=resource)
    review = client.V1SelfSubjectAccessReview(spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes))
    answer = await client.AuthorizationV1Api(api).create_self_subject_access_review(review)
    what = f"{verb} {resource}{'.' + group if group else ''}"
    if answer.status.allowed:
        return Finding("permission", Level.OK, what)
    reason = f": {answer.status.reason}" if answer.status.reason else ""
    return Finding(
        "permission",
        Level.FAIL,
        f"may not {what}{reason}",
        f'add a rule to the ClusterRole: apiGroups ["{group}"], resources ["{resource}"], verbs ["{verb}"]',
    )
