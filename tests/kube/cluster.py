"""A cluster to test against: the double, or what the environment names a folder of.

KUBEBUILDER_ASSETS: a real kube-apiserver, and etcd. MIGPROXY_POLICY_SERVER: what scripts/policy-server builds, that is
etcd and Kubernetes' own server of custom resources with its admission policies, which then stands behind the double.

All get the same objects by the same requests: KubeVirt's resource definitions (minimal ones), namespaces, two nodes,
and everything in daemonset.yaml; migproxy's tokens are bound to a pod on a node, as the kubelet's are.
"""

import asyncio
import json
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tests.kube.apiserver import ADMIN_TOKEN, KINDS, ApiDouble, certificate, serve, server_tls

MANIFESTS = Path(__file__).parents[2] / "daemonset.yaml"
NODES = ("node01", "node02")
NAMESPACE = "kubevirt"
VMIS = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances"
KUBEVIRTS = f"/apis/kubevirt.io/v1/namespaces/{NAMESPACE}/kubevirts"
JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"

_PLURALS = {kind: plural for plural, kind in KINDS.items()}
_START_SECONDS = 90


@cache
def documents(path: Path) -> tuple[Any, ...]:
    """What a manifest holds; not to be changed."""
    return tuple(yaml.safe_load_all(path.read_text()))


class Refused(Exception):
    """The server answered a test's own request with an error."""


class Cluster:
    """A running API server, seen by its administrator.

    Attributes:
        double: Its state, where it is the double; tests that need what only the double can do ask for it.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, tls: ssl.SSLContext | bool, double: ApiDouble | None):
        self.url = url
        self.tls = tls
        self.double = double
        self._session = session
        self._tokens: dict[str, str] = {}

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        content_type: str = "application/json",
        *,
        token: str = ADMIN_TOKEN,
    ) -> Any:
        """Makes a request, as the administrator where no other token is given."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": content_type}
        data = None if body is None else json.dumps(body)
        async with self._session.request(method, self.url + path, data=data, headers=headers) as response:
            if response.status >= 400:  # in plain text, too, where nobody serves the path
                raise Refused(f"{method} {path}: {response.status}: {await response.text()}")
            return await response.json(content_type=None)

    async def create(self, document: Any) -> Any:
        """Creates any object of a known kind."""
        group, _, version = document["apiVersion"].rpartition("/")
        namespace = document["metadata"].get("namespace")
        path = f"/apis/{group}/{version}" if group else f"/api/{version}"
        path += f"/namespaces/{namespace}" if namespace else ""
        return await self.request("POST", f"{path}/{_PLURALS[document['kind']]}", document)

    async def install(self) -> None:
        """Creates everything that a KubeVirt cluster with migproxy has."""
        for kind in ("VirtualMachineInstance", "KubeVirt"):
            await self.create(resource_definition(kind))
        for namespace in ("default", NAMESPACE):
            try:
                await self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
            except Refused as error:
                if "already exists" not in str(error):
                    raise
        for document in documents(MANIFESTS):
            await self.create(document)
        for node in NODES:
            await self.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}})
            self._tokens[node] = await self._issue_token(node)
        await self._until_served()

    def token(self, node: str) -> str:
        """The token of migproxy on a node."""
        return self._tokens[node]

    async def use_unbound_token(self, node: str) -> None:
        """Has migproxy on a node use a token of its ServiceAccount that no pod holds."""
        self._tokens[node] = await self._request_token("migproxy", {})

    async def use_renamed_account(self, node: str, account: str) -> None:
        """Has migproxy on a node use another ServiceAccount of KubeVirt's namespace, with the rights of migproxy's.

        Args:
            node: Its node.
            account: The ServiceAccount's name.
        """
        await self.create(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": NAMESPACE}}
        )
        (binding,) = (one for one in documents(MANIFESTS) if one["kind"] == "ClusterRoleBinding")
        subjects = [{**binding["subjects"][0], "name": account}]
        await self.create({**binding, "metadata": {"name": account}, "subjects": subjects})
        self._tokens[node] = await self._issue_token(node, account)

    async def use_handlers_token(self) -> None:
        """Has migproxy run as virt-handler does, whom KubeVirt lets write a VMI's status."""
        await self.kubevirt_token("kubevirt-handler")
        self._tokens = {node: await self._request_token("kubevirt-handler", {}) for node in NODES}

    async def kubevirt_token(self, account: str) -> str:
        """A token of one of KubeVirt's ServiceAccounts, with the right to do what it likes to VMIs and Events.

        Args:
            account: Its name, such as kubevirt-handler.
        """
        group, name = "rbac.authorization.k8s.io", {"name": account}
        verbs = ["get", "list", "watch", "create", "update", "patch", "delete"]
        rules = [
            {"apiGroups": ["kubevirt.io"], "resources": ["virtualmachineinstances"], "verbs": verbs},
            {"apiGroups": ["kubevirt.io"], "resources": ["kubevirts"], "verbs": verbs[:3]},
            {"apiGroups": [""], "resources": ["events"], "verbs": verbs},
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": verbs[:3]},
        ]
        account_object = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {**name, "namespace": NAMESPACE}}
        role = {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": name, "rules": rules}
        binding = {
            "apiVersion": f"{group}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": name,
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", **name},
            "subjects": [{"kind": "ServiceAccount", "namespace": NAMESPACE, **name}],
        }
        for document in (account_object, role, binding):
            await self.create(document)
        return await self._request_token(account, {})

    async def _issue_token(self, node: str, account: str = "migproxy") -> str:
        pod = await self.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"{account}-{node}", "namespace": NAMESPACE},
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": account,
                    "containers": [{"name": "migproxy", "image": "migproxy"}],
                },
            }
        )
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        return await self._request_token(account, {"boundObjectRef": bound})

    async def _request_token(self, account: str, bound: dict[str, Any]) -> str:
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token"
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "metadata": {},
            "spec": {"expirationSeconds": 3600, **bound},
        }
        return str((await self.request("POST", path, body))["status"]["token"])

    async def _until_served(self) -> None:
        """A real server serves a new resource definition, and follows a new policy, a moment later."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                await self.request("GET", VMIS)
                await self.request("GET", f"/apis/kubevirt.io/v1/namespaces/{NAMESPACE}/kubevirts")
            except Refused:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)
            else:
                return

    def kubeconfig(self, folder: Path, node: str, url: str | None = None) -> Path:
        """Writes the kubeconfig of migproxy on a node.

        Args:
            folder: Where to.
            node: Whose.
            url: Of a gate; by default, of the server itself.
        """
        path = folder / f"{node}.kubeconfig"
        path.write_text(yaml.safe_dump(kubeconfig_of(url or self.url, self._tokens[node])))
        return path


def kubeconfig_of(url: str, token: str) -> dict[str, Any]:
    """A kubeconfig for one server and one token."""
    cluster: dict[str, Any] = {"server": url}
    if url.startswith("https:"):
        cluster["insecure-skip-tls-verify"] = True
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "migproxy", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "migproxy"}}],
        "current-context": "test",
    }


def resource_definition(kind: str) -> dict[str, Any]:
    """A minimal definition of one of KubeVirt's resources: unknown fields are kept, and status is no subresource."""
    plural = f"{kind.lower()}s"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.kubevirt.io"},
        "spec": {
            "group": "kubevirt.io",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
            "scope": "Namespaced",
            "versions": [
                {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}},
            ],
        },
    }


@asynccontextmanager
async def cluster(folder: Path, *, separate: bool = False) -> AsyncIterator[Cluster]:
    """A cluster with migproxy's objects in it.

    Args:
        folder: For the files of a real one.
        separate: The double is a process of its own, as a real one always is.
    """
    assets, policy_server = os.environ.get("KUBEBUILDER_ASSETS"), os.environ.get("MIGPROXY_POLICY_SERVER")
    tls = ssl._create_unverified_context() if assets or policy_server else False
    double = None
    async with AsyncExitStack() as stack:
        if assets:
            url = await stack.enter_async_context(_real(Path(assets), folder))
        elif policy_server:
            url = await stack.enter_async_context(_policy_server(Path(policy_server), folder))
        elif separate:
            url = await stack.enter_async_context(_double())
        else:
            double = ApiDouble()
            url = await stack.enter_async_context(serve(double))
        connector = aiohttp.TCPConnector(ssl=tls, limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, read_bufsize=2**21))
        made = Cluster(url, session, tls, double)
        await _ready(made)
        await made.install()
        yield made


@asynccontextmanager
async def _double() -> AsyncIterator[str]:
    command = [sys.executable, "-m", "tests.kube.apiserver"]
    process = await asyncio.create_subprocess_exec(*command, cwd=MANIFESTS.parent, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def _real(assets: Path, folder: Path) -> AsyncIterator[str]:
    """etcd and kube-apiserver, with RBAC, admission policies and a token for the administrator."""
    etcd, peer, secure = _free_ports(3)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (folder / "sa.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "sa.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (folder / "tokens.csv").write_text(f'{ADMIN_TOKEN},admin,admin,"system:masters"\n')
    command = [
        str(assets / "kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{etcd}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",  # else the address of the default route's interface, and a sandbox has none
        "--endpoint-reconciler-type=none",  # endpoints may not be loopback addresses
        f"--secure-port={secure}",
        f"--cert-dir={folder / 'certs'}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--disable-admission-plugins=ServiceAccount",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={folder / 'sa.pub'}",
        f"--service-account-signing-key-file={folder / 'sa.key'}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--allow-privileged=true",
    ]
    async with _running([_etcd(assets, folder, etcd, peer), command], folder):
        yield f"https://127.0.0.1:{secure}"


@asynccontextmanager
async def _policy_server(assets: Path, folder: Path) -> AsyncIterator[str]:
    """The double, and behind it etcd and the server of custom resources, which reads the policies from the double."""
    etcd, peer, secure = _free_ports(3)
    tls = server_tls(*certificate(folder / "double"))  # client-go sends no token without
    async with serve(ApiDouble(custom=f"https://127.0.0.1:{secure}"), tls=tls) as url:
        kubeconfig = folder / "policy-server.kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(kubeconfig_of(url, ADMIN_TOKEN)))
        command = [
            str(assets / "policy-server"),
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={secure}",
            f"--cert-dir={folder / 'certs'}",
            f"--kubeconfig={kubeconfig}",
        ]
        async with _running([_etcd(assets, folder, etcd, peer), command], folder):
            yield url


def _etcd(assets: Path, folder: Path, client: int, peer: int) -> list[str]:
    return [
        str(assets / "etcd"),
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{client}",
        f"--advertise-client-urls=http://127.0.0.1:{client}",
        f"--listen-peer-urls=http://127.0.0.1:{peer}",
        "--unsafe-no-fsync",
    ]


@asynccontextmanager
async def _running(commands: list[list[str]], folder: Path) -> AsyncIterator[None]:
    processes: list[asyncio.subprocess.Process] = []
    # The double lists and watches apart from each other, as API servers long did.
    environment = {**os.environ, "KUBE_FEATURE_WatchListClient": "false"}
    try:
        for command in commands:
            with (folder / f"{Path(command[0]).name}.log").open("wb") as log:
                started = asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=environment)
                processes.append(await started)
        yield
    finally:
        for process in reversed(processes):
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()
                await process.wait()
        for command in commands:
            log_path = folder / f"{Path(command[0]).name}.log"
            if log_path.exists() and sys.exc_info()[0] is not None:
                print(f"--- {log_path}\n{log_path.read_text(errors='replace')[-4000:]}")


async def _ready(made: Cluster) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            await made.request("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions")
        except (aiohttp.ClientError, Refused) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the API server did not come up: {error}") from error
            await asyncio.sleep(0.3)
        else:
            return


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def vmi(name: str, *, node: str = NODES[0], padding: int = 0) -> dict[str, Any]:
    """A VMI that runs on a node.

    Args:
        name: Its name.
        node: Where it runs.
        padding: Bytes more in its spec, for the size that real ones have.
    """
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstance",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"kubevirt.io/nodeName": node},
            "annotations": {"kubevirt.io/latest-observed-api-version": "v1"},
            "finalizers": [],
        },
        "spec": {"evictionStrategy": "LiveMigrate", "padding": "x" * padding},
        "status": {
            "phase": "Running",
            "nodeName": node,
            "migrationMethod": "LiveMigration",
            "migrationTransport": "Unix",
            "activePods": {f"{name}-pod-1": NODES[0], f"{name}-pod-2": NODES[1]},
        },
    }


def kubevirt(configuration: dict[str, Any]) -> dict[str, Any]:
    """A KubeVirt resource with that spec.configuration."""
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": "KubeVirt",
        "metadata": {"name": "kubevirt", "namespace": NAMESPACE},
        "spec": {"configuration": configuration},
    }


def begin(migration: str, source: str = NODES[0], target: str = NODES[1]) -> dict[str, Any]:
    """The merge patch with which virt-controller asks for a migration."""
    state = {"migrationUid": migration, "sourceNode": source, "targetNode": target}
    return {
        "metadata": {"labels": {"kubevirt.io/migrationTargetNodeName": target}},
        "status": {"migrationState": state},
    }


def start() -> dict[str, Any]:
    """The merge patch that marks a migration as running."""
    return {"status": {"migrationState": {"startTimestamp": timestamp()}}}


def end(source: str = NODES[0], target: str = NODES[1], *, failed: bool = False) -> dict[str, Any]:
    """The merge patch that marks a migration as over, and the VMI as running on its target where it did not fail."""
    node = source if failed else target
    state = {"endTimestamp": timestamp(), "completed": True, "failed": failed}
    return {
        "metadata": {"labels": {"kubevirt.io/migrationTargetNodeName": None, "kubevirt.io/nodeName": node}},
        "status": {"nodeName": node, "migrationState": state},
    }


def timestamp() -> str:
    """Now, as Kubernetes writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
