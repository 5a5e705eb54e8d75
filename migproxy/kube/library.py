"""The parts of kubernetes-asyncio that migproxy uses: configuration, authentication and the HTTP client.

Importing any of them in the usual way runs the packages' __init__ modules, which load more than 800 generated models:
35 MiB on every node for classes that nobody here uses (measured with kubernetes-asyncio 36.1, Python 3.11).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from migproxy.imports import bare

__all__ = ["ConfigException", "Configuration", "RESTClientObject", "load_incluster_config", "load_kube_config"]

_PACKAGES = ("kubernetes_asyncio", "kubernetes_asyncio.client", "kubernetes_asyncio.client.models")

if TYPE_CHECKING:
    from kubernetes_asyncio.client import Configuration
    from kubernetes_asyncio.client.rest import RESTClientObject
    from kubernetes_asyncio.config import ConfigException, load_incluster_config, load_kube_config
else:
    with bare(*_PACKAGES):
        client = sys.modules["kubernetes_asyncio.client"]
        Configuration = client.Configuration = import_module("kubernetes_asyncio.client.configuration").Configuration
        client.ApiClient = import_module("kubernetes_asyncio.client.api_client").ApiClient
        from kubernetes_asyncio.client.rest import RESTClientObject
        from kubernetes_asyncio.config import ConfigException, load_incluster_config, load_kube_config
