"""The rules that ship: checked and run by promtool, each alert firing and silent, each with a runbook."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from dataclasses import fields
from typing import Any

import pytest
import yaml
from promql_parser import MatchOp, VectorSelector, parse

from tests.deploy.tools import ROOT, tool
from tests.metrics_table import documented, registered
from vllm_lego.settings import PREFIX, Settings

FOLDER = ROOT / "deploy" / "prometheus"
RUNBOOK = ROOT / "deploy" / "RUNBOOK.md"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
CASES = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]


@pytest.mark.parametrize(
    "command", [["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]]
)
def test_promtool_is_content(command):
    done = subprocess.run(
        [tool("promtool"), *command], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_each_alert_is_shown_firing_and_silent():
    shown: dict[str, set[bool]] = defaultdict(set)
    for case in CASES:
        for expected in case["alert_rule_test"]:
            shown[expected["alertname"]].add(bool(expected["exp_alerts"]))
    assert shown == {alert: {True, False} for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_it_is_and_where_help_is(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"deploy/RUNBOOK.md#{alert.lower()}"


def test_the_runbook_is_of_these_alerts():
    text = RUNBOOK.read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(ALERTS)
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= {alert.lower() for alert in ALERTS}


def test_the_runbook_tells_of_each_reason_and_of_settings_that_exist():
    text = RUNBOOK.read_text()
    asked = {
        reason
        for rule in RULES
        for selector in selectors(rule["expr"])
        if selector.name == "vllm_lego_errors_total"
        for matcher in selector.matchers.matchers
        if matcher.name == "reason"
        for reason in matcher.value.split("|")
    }
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == asked
    settings = {field.name.upper() for field in fields(Settings)}
    assert set(re.findall(r"`([A-Z_]+)`", text)) <= settings | {PREFIX}


def selectors(expression: str) -> list[VectorSelector]:
    found: list[VectorSelector] = []

    def visit(node: Any) -> None:
        if isinstance(node, VectorSelector):
            found.append(node)
        for part in "lhs", "rhs", "expr", "vector_selector", "vs", "args", "param":
            child = getattr(node, part, None)
            for each in child if isinstance(child, list) else [child]:
                if each is not None and not isinstance(each, str):
                    visit(each)

    visit(parse(expression))
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_there_is(rule):
    table = documented()
    bounds = {
        (sample.name, sample.labels["le"])
        for family in registered()
        for sample in family.samples
        if "le" in sample.labels
    }
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    named = selectors(rule["expr"])
    assert named
    for selector in named:
        if selector.name in recorded:
            continue
        name = re.sub(r"_(bucket|sum|count)$", "", selector.name)
        assert name in table, selector.name
        assert (name != selector.name) == (table[name].kind == "histogram")
        for matcher in selector.matchers.matchers:
            if matcher.name == "le":
                assert (selector.name, matcher.value) in bounds
            else:
                values = matcher.value.split("|") if matcher.op == MatchOp.Re else [matcher.value]
                assert set(values) <= table[name].labels[matcher.name]
