"""`migproxy doctor` and Kubernetes: whether the API server answers, and what this account may do there."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from migproxy.doctor.finding import Finding, Level
from migproxy.doctor.host import check_clock

if TYPE_CHECKING:
    from migproxy.kube.api import ApiServer

_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Permission:
    """Something that the daemon does at the API server.

    Attributes:
        verb, group, resource: What, in the words of a Role's rules.
        name: Of the one object that it does it to; None for any.
        in_kubevirt: In KubeVirt's namespace only; otherwise in all of them.
    """

    verb: str
    group: str
    resource: str
    name: str | None = None
    in_kubevirt: bool = False

    def __str__(self) -> str:
        return (
            f"{self.verb} {self.resource}{'.' + self.group if self.group else ''}{' ' + self.name if self.name else ''}"
        )

    def rule(self) -> str:
        """The rule that allows it."""
        names = f', resourceNames ["{self.name}"]' if self.name else ""
        return f'apiGroups ["{self.group}"], resources ["{self.resource}"]{names}, verbs ["{self.verb}"]'


PERMISSIONS = (
    *(Permission(verb, "kubevirt.io", "virtualmachineinstances") for verb in ("list", "watch", "get", "patch")),
    *(Permission(verb, "", "events") for verb in ("create", "patch")),
    *(Permission(verb, "kubevirt.io", "kubevirts", in_kubevirt=True) for verb in ("list", "watch")),
    *(Permission(verb, "", "configmaps", "kubevirt-ca", in_kubevirt=True) for verb in ("list", "watch")),
)


def is_configured(kubeconfig: str | None) -> bool:
    """Whether there is an API server to ask: a kubeconfig is named, or this runs in a pod."""
    return kubeconfig is not None or "KUBERNETES_SERVICE_HOST" in os.environ


def check_api(kubeconfig: str | None, context: str | None, kubevirt: str, *, beside: bool = False) -> list[Finding]:
    """The API server's answers, the permissions there, and its clock.

    Args:
        kubeconfig: Path; None for the pod's own service account.
        context: Of the kubeconfig; None for its current one.
        kubevirt: The namespace that KubeVirt is installed in.
        beside: Beside virt-handler: whether targets can be announced, too.
    """
    return asyncio.run(_check(kubeconfig, context, kubevirt, beside=beside))


async def _check(kubeconfig: str | None, context: str | None, kubevirt: str, *, beside: bool) -> list[Finding]:
    from migproxy.kube.api import ApiError, ApiServer, ConfigurationError  # slow to import

    try:
        async with asyncio.timeout(_TIMEOUT), ApiServer(kubeconfig, context) as api:
            began = datetime.now(UTC)
            version = await api.request("GET", "/version")
            skew = _skew(api.date, began)
            findings = [Finding("API server", Level.OK, f"{api.host} answers, {version['gitVersion']}")]
            if skew is not None:
                findings.append(check_clock(skew, "the API server"))
            if beside:
                findings.append(_announcing(version))
            return [*findings, *[await _permission(api, wanted, kubevirt) for wanted in PERMISSIONS]]
    except (ApiError, ConfigurationError, TimeoutError, KeyError, TypeError) as error:
        why = f"no answer within {_TIMEOUT:g} s" if isinstance(error, TimeoutError) else str(error)
        return [
            Finding(
                "API server",
                Level.FAIL,
                f"{kubeconfig or 'the service account of the pod'}: {' '.join(why.split())}",
                "check the address in the kubeconfig, the service account's token, and network policies to the API",
            )
        ]


def _skew(date: str | None, began: datetime) -> float | None:
    """How far ahead the server's clock is, judged by the middle of the request and the header's whole seconds."""
    if date is None:
        return None
    middle = began + (datetime.now(UTC) - began) / 2
    return (parsedate_to_datetime(date) - middle).total_seconds() + 0.5


def _announcing(version: Mapping[str, Any]) -> Finding:
    """Whether tokens name their node, without which the admission policies let nobody announce."""
    running = tuple(int(re.sub(r"[^0-9].*", "", str(version[part])) or 0) for part in ("major", "minor"))
    if running < (1, 30):
        return Finding(
            "announcing",
            Level.WARN,
            f"Kubernetes {version['gitVersion']} puts no node's name into tokens: no target can be announced",
            "upgrade to Kubernetes 1.30; until then migrations go by virt-handler's own proxy",
        )
    return Finding("announcing", Level.OK, "tokens name their node")


async def _permission(api: ApiServer, wanted: Permission, kubevirt: str) -> Finding:
    attributes = {"verb": wanted.verb, "group": wanted.group, "resource": wanted.resource}
    if wanted.name:
        attributes["name"] = wanted.name
    if wanted.in_kubevirt:
        attributes["namespace"] = kubevirt
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = await api.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=review)
    status, where = answer["status"], f" in namespace {kubevirt}" if wanted.in_kubevirt else ""
    if status.get("allowed"):
        return Finding("permission", Level.OK, f"{wanted}{where}")
    reason = f": {status['reason']}" if status.get("reason") else ""
    role = f"Role in namespace {kubevirt}" if wanted.in_kubevirt else "ClusterRole"
    return Finding(
        "permission", Level.FAIL, f"may not {wanted}{where}{reason}", f"add a rule to the {role}: {wanted.rule()}"
    )
