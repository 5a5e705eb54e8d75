"""What the documentation says is true: the options, and the links."""

import ast
import errno
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest
import typer
import yaml

from migproxy.cli import app
from migproxy.httpd import Refusal
from migproxy.measure import FAILURES
from migproxy.metrics import STATES
from migproxy.node import Node
from migproxy.plan import Reason as PathReason
from migproxy.tlserrors import Reason as TLSReason

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


# What documents quote

MODES = ("spliced", "ktls", "user-space")
OTHERS_OPTIONS = {"--uid", "--migration-cn-types"}
"""virt-launcher's, and virt-handler's."""


def literals() -> list[str]:
    """Every text in the code, and in the policies that speak to users; of one with values, what is between them."""
    found = []
    for file in (ROOT / "migproxy").rglob("*.py"):
        tree = ast.parse(file.read_text())
        found += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return [*found, " ".join((ROOT / "daemonset.yaml").read_text().split())]


VALUE = re.compile(
    r"""
    \[?\d+(?:\.\d+){3}\]?(?::\d+)?   # an address, with a port
    | '[^']*'                        # what is quoted within
    | process\ \d+\ \(ps\ -fp\ \d+\) | \bthe\ launchers\ in\ /run | the\ node\ host1\ of\ \S+
    | \d[\d-]*                       # a number, or a range of them
    | \.\.\. | /pods
    | \b(?:no\ answer(?=\ to) | by\ eth0 | address\ and\ ports | list\ and\ watch | KubeVirt\ resource | opened)
    | \b(?:fuse | migration0 | kubevirt | default/vm1)(?=\W|$)
    """,
    re.VERBOSE,
)
"""What stands for a value in the examples of documents."""

OTHERS = {os.strerror(number) for number in errno.errorcode} | {
    "403 Forbidden",
    "401 Unauthorized",
    "certificate verify failed",
    "Cannot connect to host",
    "Dirty rate",
}
"""What the kernel, the API server, OpenSSL, aiohttp and virsh say."""


def seen(page: str) -> list[str]:
    """What the first column of a table of troubles shows, but for what other programs say there."""
    cells = re.findall(r"^\| ([^|]+) \| [^|]+ \|(?: [^|]+ \|)?$", (ROOT / page).read_text(), re.MULTILINE)
    quoted = r'"([^"]+)"' if page == "README.md" else r"`([^`]+)`"
    return [quote for cell in cells if not cell.startswith("virsh:") for quote in re.findall(quoted, cell)]


def unknown_words(quote: str, texts: list[str]) -> list[str]:
    """The parts of a quotation, between the values in it, that no text has."""
    for other in OTHERS:
        quote = quote.replace(other, "...")
    parts = [part.strip(" :,()") for part in VALUE.split(quote)]
    return [part for part in parts if part and not any(part in text for text in texts)]


@pytest.mark.parametrize("page", ["README.md", "docs/kubernetes.md"])
def test_what_a_table_of_troubles_quotes_is_said_by_the_code(page: str) -> None:
    texts, quotes = literals(), seen(page)
    assert len(quotes) > 10
    assert {quote: words for quote in quotes if (words := unknown_words(quote, texts))} == {}


@pytest.mark.parametrize("page", ["docs/observability.md", "docs/slow.md"])
def test_quotations_elsewhere_are_said_by_the_code(page: str) -> None:
    texts = literals()
    prose = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    quotes = [" ".join(quote.split()) for quote in re.findall(r'"([^"]+)"', prose)]
    assert len(quotes) > 3
    assert {quote: words for quote in quotes if (words := unknown_words(quote, texts))} == {}


def test_quoting_what_nobody_says_is_noticed() -> None:
    texts = literals()
    assert unknown_words("status names 10.1.1.9, which is not this node's", texts) == ["which is not this node's"]
    assert unknown_words("connections wait: the channel is full", texts) == []


def values(page: str, start: str) -> set[str]:
    """What the paragraph, or the row of a table, with this beginning lists in backticks."""
    lines = (ROOT / page).read_text().split("\n\n" if not start.startswith("|") else "\n")
    (found,) = [line for line in lines if line.startswith(start)]
    return set(re.findall(r"`([a-z][a-z-]*(?:_[a-z]+)*)`", found.removeprefix(start)))


def column(page: str, heading: str) -> set[str]:
    """The first column of the table with this heading."""
    table = (ROOT / page).read_text().partition(f"\n| {heading} |")[2].partition("\n\n")[0]
    return {
        value for cell in re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE) for value in re.findall(r"`([^`]+)`", cell)
    }


def test_the_values_that_documents_list_are_the_codes() -> None:
    observability = "docs/observability.md"
    assert values(observability, "Reasons:") == set(FAILURES)
    assert values(observability, "| `migproxy_migrations` |") == {"role", "state", *STATES}
    assert values(observability, "| `migproxy_http_refused_total` |") == {"reason", *get_args(Refusal)}
    assert values(observability, "| `migproxy_migration_mode_bytes_total` |") == {"mode", *MODES}
    paths = {"path", "reason", *PathReason}
    assert values(observability, "| `migproxy_migration_path` |") == paths
    assert column("docs/kubernetes.md", "reason") == set(PathReason)
    assert column("docs/tls.md", "reason") == set(TLSReason)


def test_each_metric_that_anybody_names_is_documented() -> None:
    """Which tests/unit/test_metrics.py compares with what is exported."""
    table = (ROOT / "docs/observability.md").read_text()
    known = set(re.findall(r"^\| `(migproxy_\w+)` \|", table, re.MULTILINE))
    named = set()
    for page in [*PAGES, *ROOT.glob("deploy/**/*.yaml"), *ROOT.glob("deploy/**/*.json")]:
        named |= set(re.findall(r"\bmigproxy_[a-z_]+", page.read_text()))
    assert len(named) > 30
    assert {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in named} - known == set()


def test_the_checks_that_documents_list_are_the_nodes() -> None:
    source = inspect.getsource(Node.checks.fget)  # type: ignore[attr-defined]
    checks = set(re.findall(r'^ +"(\w+)": |checks\["(\w+)"\]', source, re.MULTILINE))
    names = {one or other for one, other in checks}
    assert values("docs/observability.md", "| `migproxy_node_check` |") == {"check", *names}
    assert column("docs/observability.md", "check") == names


def test_the_capabilities_that_documents_list_are_those_that_are_given() -> None:
    unit = (ROOT / "systemd/migproxy.service").read_text()
    given = set(re.search(r"^CapabilityBoundingSet=(.+)$", unit, re.MULTILINE)[1].split())  # type: ignore[index]
    explained = set(re.findall(r"^#   (CAP_\w+) ", unit, re.MULTILINE))
    security = set(re.findall(r"CAP_\w+", (ROOT / "SECURITY.md").read_text()))
    assert given == explained == security
    containers = yaml.safe_load_all((ROOT / "daemonset.yaml").read_text())
    (daemonset,) = [one for one in containers if one and one["kind"] == "DaemonSet"]
    (daemon,) = [one for one in daemonset["spec"]["template"]["spec"]["containers"] if one["name"] == "migproxy"]
    table = (ROOT / "docs/kubernetes.md").read_text()
    listed = set(re.findall(r"^\| ([A-Z]+(?:_[A-Z]+)*) \|", table, re.MULTILINE))
    assert set(daemon["securityContext"]["capabilities"]["add"]) == listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_documents_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # which tells of options that have gone, too
    commands: dict[str, click.Command] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {"--"} | {name for command in commands.values() for one in command.params for name in one.opts}
    named = set(re.findall(r"`(--[a-z-]+)", page.read_text()))
    assert named - known - OTHERS_OPTIONS == set()
