"""Requests to the API server: plain JSON, with the configuration, authentication and TLS of kubernetes-asyncio."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
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

__all__ = ["JSON_PATCH", "MERGE_PATCH", "ApiError", "ApiServer", "ConfigurationError", "Expired"]

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


# RuntimeError: the session was closed by another request that found its token refused.
_REQUEST_ERRORS = (aiohttp.ClientError, TimeoutError, OSError, ValueError, RuntimeError)


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


class Expired(ApiError):
    """The resourceVersion or continue token is too old: list anew (410 Gone)."""


class ApiServer:
    """A connection pool to the API server; an asynchronous context manager that closes it.

    The configuration is read again after a refused token or a failed TLS handshake, because tokens, client
    certificates and the cluster's CA are replaced in their files.

    Args:
        kubeconfig: Path of the kubeconfig, or None for the pod's service account.
        context: The kubeconfig's context; None for its current one.
    """

    def __init__(self, kubeconfig: str | None = None, context: str | None = None) -> None:
        self.date: str | None = None
        self._kubeconfig = kubeconfig
        self._context = context
        self._configuration: Configuration | None = None
        self._rest: RESTClientObject | None = None
        self._refused = False
        self._loading = asyncio.Lock()

    async def __aenter__(self) -> ApiServer:
        """Reads the configuration; the server itself may be away.

        Raises:
            ConfigurationError: It is missing or malformed.
        """
        await self._load()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    @property
    def host(self) -> str:
        """The server's URL."""
        return str(self._configuration.host) if self._configuration else "the API server"

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
        try:
            response = await self._send(method, path, query, body, content_type, timeout)
            async with response:
                return await response.json(content_type=None)
        except _REQUEST_ERRORS as error:
            raise await self._no_answer(error) from error

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
        try:
            response = await self._send("GET", path, query, None, "application/json", timeout)
            async with response:
                _notice_dead_peer(response)
                yield b""
                async for line in response.content:
                    yield line
        except _REQUEST_ERRORS as error:
            raise await self._no_answer(error) from error

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Any,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        rest, configuration = await self._client()
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": "migproxy"}
        headers |= await _authorization(configuration)
        response: aiohttp.ClientResponse = await rest.request(
            method,
            f"{configuration.host}{path}",
            query_params=dict(query) if query else None,
            headers=headers,
            body=body,
            _preload_content=False,
            _request_timeout=timeout,
        )
        self.date = response.headers.get("Date")
        if response.status >= 400:
            async with response:
                raise await self._refusal(response)
        return response

    async def _client(self) -> tuple[RESTClientObject, Configuration]:
        async with self._loading:
            if self._rest is None or self._refused:
                try:
                    await self._load()
                except ConfigurationError as error:
                    raise ApiError(0, str(error)) from error
            assert self._rest is not None
            assert self._configuration is not None
            return self._rest, self._configuration

    async def _refusal(self, response: aiohttp.ClientResponse) -> ApiError:
        raw = await response.content.read(_ERROR_BYTES)
        if response.status == 401:
            self._refused = True
        try:
            told = json.loads(raw)["message"]
        except (ValueError, KeyError, TypeError):
            told = raw.decode(errors="replace").strip()[:200]
        message = f"{response.status} {response.reason}" + (f": {told}" if told else "")
        retry_after = None
        with suppress(ValueError):  # it may be a date too, or missing
            retry_after = float(response.headers.get("Retry-After", ""))
        kind = Expired if response.status == 410 else ApiError
        return kind(response.status, message, retry_after)

    async def _no_answer(self, error: Exception) -> ApiError:
        if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
            await self._close()  # the CA or the client certificate may have been replaced
        if isinstance(error, TimeoutError):
            return ApiError(0, "no answer in time")
        return ApiError(0, str(error) or type(error).__name__)

    async def _load(self) -> None:
        configuration = Configuration()
        try:
            if self._kubeconfig is None:
                load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            else:
                await load_kube_config(
                    self._kubeconfig, self._context, client_configuration=configuration, persist_config=False
                )
            if self._rest is None or configuration.cert_file:
                await self._close()
                self._rest = RESTClientObject(configuration)
        except _CONFIGURATION_ERRORS as error:
            if self._kubeconfig is None:
                raise ConfigurationError(
                    f"not in a pod with a service account ({error}): give --kubeconfig for a cluster, or --vmi-dir to "
                    "do without one"
                ) from error
            raise ConfigurationError(f"--kubeconfig {self._kubeconfig}: {error or type(error).__name__}") from error
        self._configuration, self._refused = configuration, False

    async def _close(self) -> None:
        stale, self._rest = self._rest, None
        if stale is not None:
            await stale.close()


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
