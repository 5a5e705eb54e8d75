"""What a machine must have for some of the tests, and what becomes of them without it."""

import os
from pathlib import Path
from typing import NoReturn

import pytest


def missing(what: str, group: str) -> NoReturn:
    """Ends a test that needs what a group of packages brings: nobody who could have installed it passes without it.

    Args:
        what: what is missing.
        group: the group, as scripts/system-packages calls it.
    """
    if is_root():
        pytest.fail(f"{what}: run scripts/system-packages {group}")
    pytest.skip(f"{what}: run scripts/system-packages {group} as root; this user may not install it")


def is_root() -> bool:
    """Whether this is the machine's root, and not a sandbox's (user_namespaces(7))."""
    inside, outside, count = map(int, Path("/proc/self/uid_map").read_text().splitlines()[0].split())
    return os.geteuid() == inside == outside == 0 and count > 1
