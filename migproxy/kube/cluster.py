"""What the cluster's KubeVirt is configured with, as far as its migration proxies follow it, and KubeVirt's CA."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

import structlog

from migproxy.kube.api import ApiServer
from migproxy.kube.reflector import Listed, Pace, Reflector

log = structlog.get_logger(__name__)

CA_CONFIG_MAP: Final = "kubevirt-ca"
CA_KEY: Final = "ca-bundle"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """KubeVirt's own settings for migrations.

    Attributes:
        disable_tls: spec.configuration.migrations.disableTLS.
        network: spec.configuration.migrations.network: the NetworkAttachmentDefinition, None for the pods' network.
        min_tls: spec.configuration.tlsConfiguration.minTLSVersion (VersionTLS12), None where it says nothing.
        ciphers: spec.configuration.tlsConfiguration.ciphers, as KubeVirt names them; empty for its default.
        ca_bundle: PEM of KubeVirt's CA certificates (ConfigMap kubevirt-ca); several while they rotate.
    """

    disable_tls: bool = False
    network: str | None = None
    min_tls: str | None = None
    ciphers: tuple[str, ...] = ()
    ca_bundle: str | None = None

    @property
    def ca_certificates(self) -> int:
        """How many certificates the CA bundle holds."""
        return (self.ca_bundle or "").count("-----BEGIN CERTIFICATE-----")


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the daemon's options say instead of the cluster; None where they do not."""

    disable_tls: bool | None = None
    network: str | None = None
    min_tls: str | None = None
    ciphers: tuple[str, ...] | None = None
    ca_bundle: str | None = None


def merge(cluster: ClusterSettings, given: Overrides) -> ClusterSettings:
    """The settings in force: each option that is given beats the cluster's, which beats the default."""
    return replace(
        cluster,
        disable_tls=cluster.disable_tls if given.disable_tls is None else given.disable_tls,
        network=cluster.network if given.network is None else given.network,
        min_tls=cluster.min_tls if given.min_tls is None else given.min_tls,
        ciphers=cluster.ciphers if given.ciphers is None else given.ciphers,
        ca_bundle=cluster.ca_bundle if given.ca_bundle is None else given.ca_bundle,
    )


def parse_kubevirt(document: Mapping[str, Any]) -> ClusterSettings:
    """Reads a KubeVirt resource; what is absent or of a wrong type counts as not configured."""
    configuration = _mapping(_mapping(document.get("spec")).get("configuration"))
    migrations, tls = _mapping(configuration.get("migrations")), _mapping(configuration.get("tlsConfiguration"))
    ciphers = tls.get("ciphers")
    return ClusterSettings(
        disable_tls=migrations.get("disableTLS") is True,
        network=_text(migrations.get("network")),
        min_tls=_text(tls.get("minTLSVersion")),
        ciphers=tuple(name for name in ciphers if isinstance(name, str)) if isinstance(ciphers, list) else (),
    )


def parse_ca(document: Mapping[str, Any]) -> str | None:
    """Reads the ConfigMap kubevirt-ca."""
    return _text(_mapping(document.get("data")).get(CA_KEY))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


class _Followed(Generic[T]):
    """The objects of a reflector, of which there should be one."""

    def __init__(self, reflector: Reflector[T]) -> None:
        self.reflector = reflector
        self.objects: dict[str, T] = {}
        self.is_listed = False

    async def run(self, changed: Callable[[], None]) -> None:
        async with aclosing(self.reflector.changes()) as changes:
            async for change in changes:
                if isinstance(change, Listed):
                    self.objects, self.is_listed = dict(change.objects), True
                elif change.object is None:
                    self.objects.pop(change.uid, None)
                else:
                    self.objects[change.uid] = change.object
                changed()


class Cluster:
    """Follows the settings of the KubeVirt that is installed in a namespace.

    Attributes:
        settings: As they are now; the last ones known while the API server is away, defaults without a KubeVirt.

    Args:
        api: The API server.
        namespace: Where KubeVirt is installed.
        changed: Called with the settings when they are first known, and whenever they change.
        pace: How it follows.
    """

    def __init__(
        self, api: ApiServer, namespace: str, changed: Callable[[ClusterSettings], None], pace: Pace | None = None
    ) -> None:
        self.settings = ClusterSettings()
        self._namespace = namespace
        self._changed = changed
        pace = pace or Pace()
        self._kubevirts = _Followed(
            Reflector(api, f"/apis/kubevirt.io/v1/namespaces/{namespace}/kubevirts", {}, parse_kubevirt, pace)
        )
        selector = {"fieldSelector": f"metadata.name={CA_CONFIG_MAP}"}
        self._cas = _Followed(Reflector(api, f"/api/v1/namespaces/{namespace}/configmaps", selector, parse_ca, pace))
        self._told: ClusterSettings | None = None

    @property
    def problem(self) -> str | None:
        """Why the settings are not the cluster's, or not known to be; None when they are."""
        for followed, what in ((self._kubevirts, "the KubeVirt resource"), (self._cas, f"ConfigMap {CA_CONFIG_MAP}")):
            if followed.reflector.problem:
                return f"cannot read {what} in namespace {self._namespace}: {followed.reflector.problem}"
            if followed.is_listed and not followed.objects:
                return (
                    f"namespace {self._namespace} has no {what.removeprefix('the ')}: if KubeVirt is installed in "
                    "another, name it with --kubevirt-namespace; until then only the options of migproxy count"
                )
        return None

    async def run(self) -> None:
        """Follows the settings until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for followed in (self._kubevirts, self._cas):
                tasks.create_task(followed.run(self._settle))

    def report(self) -> dict[str, Any]:
        """What `migproxy status` shows of it."""
        settings = self.settings
        return {
            "namespace": self._namespace,
            "disable_tls": settings.disable_tls,
            "network": settings.network,
            "min_tls": settings.min_tls,
            "ciphers": list(settings.ciphers),
            "ca_certificates": settings.ca_certificates,
            "problem": self.problem,
        }

    def _settle(self) -> None:
        if not (self._kubevirts.is_listed and self._cas.is_listed):
            return
        base = next(iter(self._kubevirts.objects.values()), ClusterSettings())
        self.settings = replace(base, ca_bundle=next(iter(self._cas.objects.values()), None))
        if self.settings == self._told:
            return
        self._told = self.settings
        log.info("KubeVirt's settings", **{name: value for name, value in self.report().items() if name != "problem"})
        if self.problem:
            log.warning("KubeVirt's settings are not all known", problem=self.problem)
        self._changed(self.settings)
