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
