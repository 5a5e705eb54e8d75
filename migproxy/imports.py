"""Importing no more of a library than is used, and at less cost: each start, and each crash, of a daemon pays for it.

With all of pyroute2, structlog, prometheus_client and aiohttp a start took 0.5 s of CPU instead of 0.2
(`benchmarks.start`).
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bare(*packages: str) -> Iterator[None]:
    """While it lasts, packages are there without what their __init__ modules would load.

    Whoever imports them afterwards gets the whole of them, and the same modules. But what was loaded meanwhile is no
    attribute of its package: it has to be imported by its own name.

    Args:
        packages: By name, an outer one before those in it. What is imported already stays as it is.
    """
    added = [name for name in packages if name not in sys.modules]
    try:
        for name in added:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"{name} is not installed", name=name)
            package = sys.modules[name] = importlib.util.module_from_spec(spec)
            outer, _, own = name.rpartition(".")
            if outer:
                setattr(sys.modules[outer], own, package)
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


@contextmanager
def without(library: str) -> Iterator[None]:
    """While it lasts, a library is not installed for those who would use it where it is.

    Args:
        library: By name. If it is imported already, nothing changes.
    """
    hidden = library not in sys.modules
    try:
        if hidden:
            sys.modules[library] = None  # type: ignore[assignment]  # "not found", says the import system's reference
        yield
    finally:
        if hidden:
            del sys.modules[library]


@contextmanager
def uncollected() -> Iterator[None]:
    """While it lasts, no garbage is looked for, and what is there afterwards is never looked at again.

    Imports leave hardly any, and looking takes a tenth of their time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
