"""Requests to the API server: plain JSON, with the configuration, authentication and TLS of kubernetes-asyncio."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import aiohttp
import yaml

from migproxy.kube.library import (
    ConfigException,
    Configuration,
    RESTClientObject,
    load_incluster_config,
    load_kube_config,
)

__all__ = ["JSON_PATCH", "MERGE_PATCH", "ApiError", "ApiServer", "ConfigurationError", "Expired", "Silent"]

JSON_PATCH: Final = "application/json-patch+json"
MERGE_PATCH: Final = "application/merge-patch+json"

_REQUEST_SECONDS: Final = 30.0
_CONNECT_SECONDS: Final = 10.0
_DEAD_PEER_SECONDS: Final = 20
_ERROR_BYTES: Final = 1 << 16

# What kubernetes-asyncio raises for a configuration that is missing, malformed or incomplete.
_CONFIGURATION_ERRORS = (
    *(ConfigException, OSError, yaml.YAMLError),
    *(AssertionError, AttributeError, KeyError, TypeError, ValueError),
)

# RuntimeError: the session is closed, because the daemon ends.
_REQUEST_ERRORS = (aiohttp.ClientError, TimeoutError, OSError, ValueError, RuntimeError)

_CERTIFICATE_DATES: Final = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_CERTIFICATE_NAMES: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH

# What the policy of daemonset.yaml denies is 403: with 422 its expression failed, for want of the token's node.
_POLICY_FAILED: Final = "ValidatingAdmissionPolicy 'migproxy' "


class ConfigurationError(Exception):
    """There is no usable configuration for the API server; says where it was looked for."""


class ApiError(Exception):
    """A request failed.

    Attributes:
        status: The HTTP status, or 0 where there was no answer.
        retry_after: Seconds that the server asks to wait, None where it does not.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    @property
    def is_conflict(self) -> bool:
        """Whether the object is not what the request took it for: it was changed, or a JSON patch's test failed.

        A test that failed is 422, without a word of which; so is what an admission policy or a webhook has denied.
        """
        is_denial = "denied request" in str(self) or "denied the request" in str(self)
        return self.status == 409 or (self.status == 422 and not is_denial)


class Expired(ApiError):
    """The resourceVersion or continue token is too old: list anew (410 Gone)."""


class Silent(ApiError):
    """The server keeps the connection and says nothing."""


class _Client:
    """A session with the configuration that it was made of.

    One that is retired is closed when its last request has ended: the watches share it.
    """

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.rest = RESTClientObject(configuration)
        self._requests = 0
        self._is_retired = False

    async def __aenter__(self) -> _Client:
        self._requests += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._requests -= 1
        if self._is_retired:
            await self.retire()

    async def retire(self) -> None:
        self._is_retired = True
        if not self._requests:
            await self.rest.close()


class ApiServer:
    """A connection pool to the API server; an asynchronous context manager that closes it.

    The configuration is read again after a refused token or a failed TLS handshake, because tokens, client
    certificates and the cluster's CA are replaced in their files.

    Attributes:
        date: The Date of its last answer.
        host: The server's URL.

    Args:
        kubeconfig: Path of the kubeconfig, or None for the pod's service account.
        context: The kubeconfig's context; None for its current one.
    """

    def __init__(self, kubeconfig: str | None = None, context: str | None = None) -> None:
        self.date: str | None = None
        self.host = "the API server"
        self._kubeconfig = kubeconfig
        self._context = context
        self._client: _Client | None = None
        self._loading = asyncio.Lock()

    async def __aenter__(self) -> ApiServer:
        """Reads the configuration; the server itself may be away.

        Raises:
            ConfigurationError: It is missing or malformed.
        """
        self._client = await self._load()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.rest.close()

    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Any:
        """Makes a request and returns the JSON that answers it.

        Args:
            method: GET, POST, PATCH.
            path: From the root, /api/... or /apis/...
            query: Query parameters.
            body: To be sent as JSON; None for none.
            content_type: Of the body.

        Raises:
            ApiError: No answer, or one that is an error.
        """
        timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS, connect=_CONNECT_SECONDS)
        async with self._answer(method, path, query, timeout, body, content_type) as response:
            return await response.json(content_type=None)

    async def lines(self, path: str, query: Mapping[str, str], silence: float) -> AsyncGenerator[bytes, None]:
        """Yields the lines of a streamed answer, an empty one first when the server has accepted the request.

        Args:
            path: From the root.
            query: Query parameters.
            silence: Seconds without a byte after which the connection counts as dead.

        Raises:
            ApiError: The stream could not be had, or broke.
        """
        timeout = aiohttp.ClientTimeout(connect=_CONNECT_SECONDS, sock_read=silence)
        async with self._answer("GET", path, query, timeout) as response:
            _notice_dead_peer(response)
            yield b""
            async for line in response.content:
                yield line

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        timeout: aiohttp.ClientTimeout,
        body: Any = None,
        content_type: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Makes a request; whatever goes wrong with it, the reading of its answer included, is an ApiError."""
        client = await self._current()
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": "migproxy"}
        try:
            async with client:
                response: aiohttp.ClientResponse = await client.rest.request(
                    method,
                    f"{client.configuration.host}{path}",
                    query_params=dict(query) if query else None,
                    headers=headers | await _authorization(client.configuration),
                    body=body,
                    _preload_content=False,
                    _request_timeout=timeout,
                )
                async with response:
                    self.date = response.headers.get("Date")
                    if response.status == 401:
                        await self._retire(client)
                    if response.status >= 400:
                        raise await _refusal(response)
                    yield response
        except _REQUEST_ERRORS as error:
            if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
                await self._retire(client)
            raise _no_answer(error) from error

    async def _current(self) -> _Client:
        async with self._loading:
            if self._client is None:
                try:
                    self._client = await self._load()
                except ConfigurationError as error:
                    raise ApiError(0, str(error)) from error
            return self._client

    async def _retire(self, client: _Client) -> None:
        """Has the next request read the configuration again, unless another one that failed with it has done so."""
        if self._client is client:
            self._client = None
            await client.retire()

    async def _load(self) -> _Client:
        configuration = Configuration()
        # Python 3.13 refuses CAs and certificates without key identifiers, which older clusters have. Chain, dates and
        # names are verified all the same.
        configuration.disable_strict_ssl_verification = True
        try:
            if self._kubeconfig is None:
                load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            else:
                _check_kind(self._kubeconfig)
                await load_kube_config(
                    self._kubeconfig, self._context, client_configuration=configuration, persist_config=False
                )
            client = _Client(configuration)
        except _CONFIGURATION_ERRORS as error:
            if self._kubeconfig is None:
                raise ConfigurationError(
                    f"not in a pod with a service account ({error}): give --kubeconfig for a cluster, or --vmi-dir to "
                    "do without one"
                ) from error
            raise ConfigurationError(f"--kubeconfig {self._kubeconfig}: {error or type(error).__name__}") from error
        self.host = str(configuration.host)
        return client


def _check_kind(path: str) -> None:
    if os.path.exists(path) and not os.path.isfile(path):  # a FIFO might never answer
        raise ValueError("it is no regular file: give one")


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    raw = await response.content.read(_ERROR_BYTES)
    try:
        told = json.loads(raw)["message"]
    except (ValueError, KeyError, TypeError):
        told = raw.decode(errors="replace").strip()[:200]
    message = f"{response.status} {response.reason}" + (f": {told}" if told else "")
    if response.status == 422 and _POLICY_FAILED in message:
        message += " (the API server puts no node's name into this token: Kubernetes 1.30 or newer does, for pods)"
    retry_after = None
    with suppress(ValueError):  # it may be a date too, or missing
        retry_after = float(response.headers.get("Retry-After", ""))
    kind = Expired if response.status == 410 else ApiError
    return kind(response.status, message, retry_after)


def _no_answer(error: Exception) -> ApiError:
    if isinstance(error, TimeoutError):
        return Silent(0, "no answer in time")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return ApiError(0, _certificate_refused(error.certificate_error))
    return ApiError(0, str(error) or type(error).__name__)


def _certificate_refused(error: Exception) -> str:
    code = getattr(error, "verify_code", None)
    if code in _CERTIFICATE_DATES:
        remedy = "renew it, or set this node's clock"
    elif code in _CERTIFICATE_NAMES:
        remedy = "reach the server by a name or address that the certificate has"
    else:
        remedy = "the CA that signed it must be the kubeconfig's certificate-authority, or the service account's ca.crt"
    return f"certificate verify failed: {getattr(error, 'verify_message', error)} (the API server's: {remedy})"


async def _authorization(configuration: Configuration) -> dict[str, str]:
    try:
        settings = await configuration.auth_settings()
    except _CONFIGURATION_ERRORS as error:
        raise ApiError(0, f"the token cannot be read: {error}") from error
    return {one["key"]: one["value"] for one in settings.values() if one["in"] == "header" and one["value"]}


def _notice_dead_peer(response: aiohttp.ClientResponse) -> None:
    """A watch may be silent for a minute in good health: the kernel asks the peer meanwhile (tcp(7))."""
    transport = response.connection.transport if response.connection else None
    sock = transport.get_extra_info("socket") if transport else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    interval = _DEAD_PEER_SECONDS // 4
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_PEER_SECONDS * 1000)
