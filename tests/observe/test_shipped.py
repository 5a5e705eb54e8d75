"""What is shipped for Prometheus and Grafana, and what the documentation says about it, as promtool sees it."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.tier("gate")

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/observability.md").read_text()
RULES = ROOT / "deploy/prometheus/rules.yaml"
TESTS = ROOT / "deploy/prometheus/rules_test.yaml"
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())


def rules(kind: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=RULES.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr


def queries() -> dict[str, str]:
    documented = re.findall(r"```promql\n(.*?)```", DOCUMENT, re.DOTALL)
    drawn = [
        target["expr"].replace("$namespace", ".*").replace("$name", ".*")
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]
    return {f"q{number}": query.strip() for number, query in enumerate([*documented, *drawn])}


def test_promtool_accepts_the_rules_and_their_tests() -> None:
    promtool("check", "rules", RULES.name)
    promtool("test", "rules", TESTS.name)


@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules("alert")])
def test_every_alert_is_tested_firing_and_not_firing_and_has_a_runbook_entry(alert: str) -> None:
    cases = [
        bool(case["exp_alerts"])
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
        if case["alertname"] == alert
    ]
    assert set(cases) == {True, False}
    (rule,) = (rule for rule in rules("alert") if rule["alert"] == alert)
    assert rule["annotations"]["runbook_url"] == f"docs/observability.md#{alert.lower()}"
    assert f"\n### {alert}\n" in DOCUMENT


def test_prometheus_can_parse_every_query_of_the_dashboard_and_the_documentation(tmp_path: Path) -> None:
    group = {"name": "queries", "rules": [{"record": name, "expr": query} for name, query in queries().items()]}
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [group]}))
    promtool("check", "rules", file)


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    assert {"title", "uid", "schemaVersion", "panels", "templating"} <= DASHBOARD.keys()
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)
    (table,) = (panel for panel in DASHBOARD["panels"] if panel["type"] == "table")
    (organize,) = (step["options"] for step in table["transformations"] if step["id"] == "organize")
    shown = organize["indexByName"].keys() - organize["excludeByName"].keys()
    columns = {organize["renameByName"].get(name, name) for name in shown}
    assert {"rate", "total", "RTT", "retransmits", "mode"} <= columns
