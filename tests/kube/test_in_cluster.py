"""In a pod: the service account's token and CA, which are replaced in their files, and TLS."""

import asyncio
import gc
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from migproxy.inventory.kube import KubeInventory
from migproxy.kube.api import ApiError, ApiServer
from tests.clock import eventually
from tests.kube.apiserver import ApiDouble, User, certificate, serve, server_tls
from tests.kube.world import PACE, Listener

pytestmark = pytest.mark.tier("gate")

PATH = "/api/v1/namespaces"
ADMIN = User("admin", ("system:masters",))


class ServiceAccount:
    """The files that the kubelet mounts into a pod, and the API server's own certificate.

    Attributes:
        server: What new connections are answered with.
    """

    def __init__(self, folder: Path, server: ssl.SSLContext) -> None:
        self.token, self.ca = folder / "token", folder / "ca.crt"
        self.server = server


@pytest.fixture
def double() -> ApiDouble:
    return ApiDouble(users={"first": ADMIN})


@pytest.fixture
async def account(double: ApiDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ServiceAccount]:
    """A pod's view of an API server with TLS."""
    crt, key = certificate(tmp_path / "server")
    made = ServiceAccount(tmp_path, server_tls(crt, key))
    made.token.write_text("first")
    made.ca.write_bytes(crt.read_bytes())
    module = "kubernetes_asyncio.config.incluster_config"
    monkeypatch.setattr(f"{module}.SERVICE_TOKEN_FILENAME", str(made.token))
    monkeypatch.setattr(f"{module}.SERVICE_CERT_FILENAME", str(made.ca))
    async with serve(double, tls=made.server) as url:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(urlsplit(url).port))
        yield made


async def test_service_account_is_used(account: ServiceAccount) -> None:
    async with ApiServer() as api:
        assert api.host.startswith("https://127.0.0.1:")
        assert (await api.request("GET", PATH))["items"] == []


async def test_replaced_token_is_used(double: ApiDouble, account: ServiceAccount) -> None:
    async with ApiServer() as api:
        await api.request("GET", PATH)
        double.users = {"second": ADMIN}
        account.token.write_text("second")
        with pytest.raises(ApiError, match="401"):
            await api.request("GET", PATH)
        assert (await api.request("GET", PATH))["items"] == []


async def test_server_that_the_ca_did_not_sign_is_refused_until_the_ca_is_replaced(
    account: ServiceAccount, tmp_path: Path
) -> None:
    right = account.ca.read_bytes()
    account.ca.write_bytes(certificate(tmp_path / "other")[0].read_bytes())
    async with ApiServer() as api:
        with pytest.raises(ApiError, match=r"certificate verify failed: .*service account's ca\.crt"):
            await api.request("GET", PATH)
        account.ca.write_bytes(right)
        assert (await api.request("GET", PATH))["items"] == []


async def test_certificate_that_has_expired_is_refused_with_a_remedy(account: ServiceAccount, tmp_path: Path) -> None:
    crt, key = certificate(tmp_path / "old", expired=True)
    account.server.load_cert_chain(crt, key)
    account.ca.write_bytes(crt.read_bytes())
    async with ApiServer() as api:
        with pytest.raises(ApiError, match=r"certificate has expired .*renew it, or set this node's clock"):
            await api.request("GET", PATH)


async def test_certificate_without_a_key_identifier_is_accepted(
    account: ServiceAccount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = certificate(tmp_path / "ca")
    account.server.load_cert_chain(*certificate(tmp_path / "old", ca=ca))
    account.ca.write_bytes(ca[0].read_bytes())
    lenient = ssl.create_default_context

    def strict(cafile: str) -> ssl.SSLContext:
        """What Python 3.13 makes."""
        made = lenient(cafile=cafile)
        made.verify_flags |= ssl.VERIFY_X509_STRICT
        return made

    monkeypatch.setattr(ssl, "create_default_context", strict)
    async with ApiServer() as api:
        assert (await api.request("GET", PATH))["items"] == []


async def test_watches_go_on_while_other_requests_are_refused_the_handshake(
    double: ApiDouble, account: ServiceAccount, tmp_path: Path
) -> None:
    double.faults.bookmark_seconds = 0.05
    crt, key = certificate(tmp_path / "new")
    watch = {"watch": "true", "allowWatchBookmarks": "true"}
    async with ApiServer() as api, aclosing(api.lines(PATH, watch, 5)) as lines:
        await anext(lines)
        account.server.load_cert_chain(crt, key)
        attempts = [api.request("GET", PATH) for _ in range(5)]
        failed = await asyncio.gather(*attempts, return_exceptions=True)
        assert {type(error) for error in failed} == {ApiError}
        assert all("certificate verify failed" in str(error) for error in failed)
        assert b"BOOKMARK" in await anext(lines)
        account.ca.write_bytes(crt.read_bytes())
        assert (await api.request("GET", PATH))["items"] == []
        assert b"BOOKMARK" in await anext(lines)


async def test_session_that_was_replaced_is_closed_when_its_last_watch_ends(
    double: ApiDouble, account: ServiceAccount
) -> None:
    async with ApiServer() as api:
        async with aclosing(api.lines(PATH, {"watch": "true"}, 5)) as lines:
            await anext(lines)
            double.users = {}
            with pytest.raises(ApiError, match="401"):
                await api.request("GET", PATH)
        gc.collect()  # of a session that nobody has closed, aiohttp warns then, which fails the test


async def test_request_after_the_end_is_an_error_like_any_other(account: ServiceAccount) -> None:
    async with ApiServer() as api:
        await api.request("GET", PATH)
    with pytest.raises(ApiError, match="closed"):
        await api.request("GET", PATH)


async def test_watches_survive_a_certificate_that_is_refused(
    double: ApiDouble, account: ServiceAccount, tmp_path: Path
) -> None:
    right = account.ca.read_bytes()
    account.ca.write_bytes(certificate(tmp_path / "other")[0].read_bytes())
    async with ApiServer() as api:
        listener = Listener(KubeInventory(api, "node01", PACE))
        task = asyncio.create_task(listener.run())
        try:
            await eventually(lambda: len(listener.inventory.problems) == 2 or task.done(), "the problems")
            assert all("service account's ca.crt" in problem for problem in listener.inventory.problems.values())
            account.ca.write_bytes(right)
            await eventually(lambda: bool(listener.batches) or task.done(), "the first synchronisation")
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_token_that_is_gone_is_said(double: ApiDouble, account: ServiceAccount) -> None:
    async with ApiServer() as api:
        account.token.unlink()
        await api.request("GET", PATH)  # the one that was read is good for a minute
        double.users = {}
        with pytest.raises(ApiError, match="401"):
            await api.request("GET", PATH)
        with pytest.raises(ApiError, match="Service token file does not exist"):
            await api.request("GET", PATH)
