"""The configuration, read again while the daemon runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from migproxy.reload import changed, limits, merge, port_range
from migproxy.settings import RELOADED, Settings, option

pytestmark = pytest.mark.tier("gate")

DOCS = Path(__file__).parents[2] / "docs/systemd.md"


def settings(**given: Any) -> Settings:
    return Settings(vmi_dir="/vmis", **given)


def test_what_changed_is_told_apart() -> None:
    old, new = settings(dial_timeout=3, node_name="a"), settings(dial_timeout=4, node_name="b", log_level="debug")
    assert changed(old, new) == ({"dial_timeout", "log_level"}, {"node_name"})


def test_only_what_can_change_does() -> None:
    old = settings(dial_timeout=3, node_name="a", port_range="10-20")
    new = merge(old, settings(dial_timeout=4, node_name="b"))
    assert (new.dial_timeout, new.node_name, new.port_range) == (4, "a", None)
    assert limits(new)["dial_timeout"] == 4
    assert port_range(new).low == 0


def test_whether_an_option_is_given_counts_as_a_change() -> None:
    """Where it is not, KubeVirt's own setting is followed."""
    old, new = settings(tls_min_version="1.2"), settings()
    assert changed(old, new)[0] == {"tls_min_version"}
    assert "tls_min_version" not in merge(old, new).model_fields_set
    assert "vmi_dir" in merge(old, new).model_fields_set


def test_the_documentation_says_how_each_option_changes() -> None:
    table = DOCS.read_text().partition("## Changing the configuration")[2].partition("\n## ")[0]
    reloads, restarts = (
        set(re.findall(r"`(--[a-z0-9-]+)`", row))
        for row in re.findall(r"^\| `systemctl (?:reload|restart)` \|(.*)\|$", table, re.MULTILINE)
    )
    assert reloads == {option(field) for field in RELOADED}
    assert restarts == {option(field) for field in Settings.model_fields if field not in RELOADED}
