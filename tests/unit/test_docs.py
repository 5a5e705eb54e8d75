"""What the documentation says is true: the options, and the links."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tier("gate")

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_readmes_options_are_the_daemons() -> None:
    """Mend it with `make docs`."""
    table = subprocess.run([sys.executable, ROOT / "scripts/options-table"], capture_output=True, text=True, check=True)
    assert table.stdout.strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


RIGHTS = sorted([*PAGES, *ROOT.glob("*.yaml"), *ROOT.glob("systemd/*.service")])
LISTS_RIGHTS = re.compile(r"SYS_PTRACE|DAC_OVERRIDE|\b(?:four|five|six) capabilities\b")


def test_whatever_lists_the_daemons_capabilities_says_what_they_amount_to() -> None:
    texts = {str(page.relative_to(ROOT)): re.sub(r"[\s#]+", " ", page.read_text()) for page in RIGHTS}
    listing = {name for name, text in texts.items() if LISTS_RIGHTS.search(text)}
    assert {"SECURITY.md", "docs/kubernetes.md", "docs/systemd.md", "daemonset.yaml"} <= listing
    assert "systemd/migproxy.service" in listing
    assert [name for name in sorted(listing) if "root on the node" not in texts[name]] == []
