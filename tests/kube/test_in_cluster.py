"""In a pod: the service account's token and CA, which are replaced in their files, and TLS."""

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from migproxy.kube.api import ApiError, ApiServer
from tests.kube.apiserver import ApiDouble, User, certificate, serve, server_tls

pytestmark = pytest.mark.tier("gate")

PATH = "/api/v1/namespaces"
ADMIN = User("admin", ("system:masters",))


class ServiceAccount:
    """The files that the kubelet mounts into a pod."""

    def __init__(self, folder: Path) -> None:
        self.token, self.ca = folder / "token", folder / "ca.crt"


@pytest.fixture
def double() -> ApiDouble:
    return ApiDouble(users={"first": ADMIN})


@pytest.fixture
async def account(double: ApiDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ServiceAccount]:
    """A pod's view of an API server with TLS."""
    crt, key = certificate(tmp_path / "server")
    made = ServiceAccount(tmp_path)
    made.token.write_text("first")
    made.ca.write_bytes(crt.read_bytes())
    module = "kubernetes_asyncio.config.incluster_config"
    monkeypatch.setattr(f"{module}.SERVICE_TOKEN_FILENAME", str(made.token))
    monkeypatch.setattr(f"{module}.SERVICE_CERT_FILENAME", str(made.ca))
    async with serve(double, tls=server_tls(crt, key)) as url:
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
        with pytest.raises(ApiError, match="certificate verify failed"):
            await api.request("GET", PATH)
        account.ca.write_bytes(right)
        assert (await api.request("GET", PATH))["items"] == []


async def test_token_that_is_gone_is_said(double: ApiDouble, account: ServiceAccount) -> None:
    async with ApiServer() as api:
        account.token.unlink()
        await api.request("GET", PATH)  # the one that was read is good for a minute
        double.users = {}
        with pytest.raises(ApiError, match="401"):
            await api.request("GET", PATH)
        with pytest.raises(ApiError, match="Service token file does not exist"):
            await api.request("GET", PATH)
