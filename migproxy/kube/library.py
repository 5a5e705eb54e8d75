"""The parts of kubernetes-asyncio that migproxy uses: configuration, authentication and the HTTP client.

Importing any of them in the usual way runs the packages' __init__ modules, which load more than 800 generated models:
35 MiB on every node for classes that nobody here uses (measured with kubernetes-asyncio 36.1, Python 3.11).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = ["ConfigException", "Configuration", "RESTClientObject", "load_incluster_config", "load_kube_config"]

_PACKAGES = ("kubernetes_asyncio", "kubernetes_asyncio.client", "kubernetes_asyncio.client.models")


@contextmanager
def _bare_packages() -> Iterator[None]:
    """While it lasts, the packages are there without what their __init__ modules would load."""
    found = importlib.util.find_spec(_PACKAGES[0])
    if found is None or not found.submodule_search_locations:
        raise ImportError("kubernetes-asyncio is not installed")
    root = found.submodule_search_locations[0]
    try:
        for name in _PACKAGES:
            package = sys.modules[name] = ModuleType(name)
            package.__path__ = ["/".join([root, *name.split(".")[1:]])]
            if parent := name.rpartition(".")[0]:
                setattr(sys.modules[parent], name.rpartition(".")[2], package)
        client = sys.modules["kubernetes_asyncio.client"]
        client.Configuration = importlib.import_module("kubernetes_asyncio.client.configuration").Configuration  # type: ignore[attr-defined]
        client.ApiClient = importlib.import_module("kubernetes_asyncio.client.api_client").ApiClient  # type: ignore[attr-defined]
        yield
    finally:
        for name in _PACKAGES:  # whoever imports them after us gets the whole of them
            sys.modules.pop(name, None)


if TYPE_CHECKING or _PACKAGES[0] in sys.modules:
    from kubernetes_asyncio.client import Configuration
    from kubernetes_asyncio.client.rest import RESTClientObject
    from kubernetes_asyncio.config import ConfigException, load_incluster_config, load_kube_config
else:
    with _bare_packages():
        from kubernetes_asyncio.client import Configuration
        from kubernetes_asyncio.client.rest import RESTClientObject
        from kubernetes_asyncio.config import ConfigException, load_incluster_config, load_kube_config
