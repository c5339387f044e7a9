"""The committed dashboard is what its code says, and keeps what it promises.

`tests/e2e/test_dashboard_data.py` asks all its queries of a real Prometheus.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from tests.deploy.tools import ROOT
from vllm_lego.settings import Settings, variable_name

GRAFANA = ROOT / "deploy" / "grafana"
COMMITTED = GRAFANA / "vllm-lego.json"
BOARD: dict[str, Any] = json.loads(COMMITTED.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], query["expr"]) for panel in PANELS for query in panel["targets"]]
SERIES = re.compile(r"\b(vllm(?:_lego_|:)\w+)(\{[^}]*\})")


def test_the_json_is_what_the_code_writes(tmp_path: Path):
    written = tmp_path / "written.json"
    subprocess.run([sys.executable, GRAFANA / "dashboard.py", written], check=True)
    assert written.read_text() == COMMITTED.read_text(), "run python deploy/grafana/dashboard.py"


def test_it_can_be_imported_by_hand():
    assert "__inputs" not in BOARD  # it asks for its data source by a variable instead
    assert not BOARD.get("id")
    assert BOARD["uid"] == "vllm-lego"
    assert "vllm" in BOARD["tags"]
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "model_name", "instance"]
    assert variables.pop("datasource")["query"] == "prometheus"
    sources = [thing["datasource"] for thing in (*PANELS, *variables.values())]
    sources += [query["datasource"] for panel in PANELS for query in panel["targets"]]
    assert {source["uid"] for source in sources} == {"${datasource}"}


def test_stats_are_on_top_and_graphs_in_pairs_below():
    stats = [panel["gridPos"] for panel in PANELS if panel["type"] == "stat"]
    assert {place["y"] for place in stats} == {0}
    assert sum(place["w"] for place in stats) == 24
    graphs = [panel["gridPos"] for panel in PANELS if panel["type"] == "timeseries"]
    assert len(stats) + len(graphs) == len(PANELS)
    assert {(place["w"], place["h"]) for place in graphs} == {(12, 8)}
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for one, other in combinations((panel["gridPos"] for panel in BOARD["panels"]), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_description_names_the_metrics_and_settings_that_there_are(panel):
    for query in panel["targets"]:
        for metric, _ in SERIES.findall(query["expr"]):
            assert re.sub("_(bucket|sum|count)$", "", metric) in panel["description"]
    known = {variable_name(name) for name in Settings.__dataclass_fields__}
    assert set(re.findall(r"VLLM_LEGO_\w+", panel["description"])) <= known
    titles = {other["title"] for other in PANELS}
    for title in re.findall(r"see ([A-Z][a-z]+(?: [a-z]+)*)", panel["description"]):
        assert any(other.startswith(title) for other in titles), title


@pytest.mark.parametrize(("title", "expression"), QUERIES)
def test_a_query_asks_for_the_chosen_instances_over_the_scrape_interval(title, expression):
    found = SERIES.findall(expression)
    assert found
    for metric, chosen in found:
        assert 'job=~"$job"' in chosen
        assert 'instance=~"$instance"' in chosen
        assert ('model_name=~"$model_name"' in chosen) == metric.startswith("vllm:")
    assert set(re.findall(r"\[(.*?)\]", expression)) <= {"$__rate_interval"}
    parsed = promql_parser.parse(expression.replace("$__rate_interval", "1m"))
    assert all(is_guarded(part) for part in division_parts(parsed)), f"{title}: 0 / 0 is NaN"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_number_that_is_absent_at_times_is_not_one_of_long_ago(panel):
    absent = any(
        re.search("histogram_quantile|/", query["expr"]) and "or vector" not in query["expr"]
        for query in panel["targets"]
    )
    expected = absent and panel["type"] == "stat"
    assert {query.get("instant", False) for query in panel["targets"]} == {expected}
    assert not expected or panel["fieldConfig"]["defaults"]["noValue"].endswith(" now")


def division_parts(expression: Any) -> list[Any]:
    """Return what is divided by, everywhere in an expression."""
    children = [getattr(expression, name, None) for name in ("lhs", "rhs", "expr")]
    children += getattr(expression, "args", None) or []
    found = [part for child in children if child is not None for part in division_parts(child)]
    divides = isinstance(expression, promql_parser.BinaryExpr) and str(expression.op) == "/"
    return [*found, expression.rhs] if divides else found


def is_guarded(divisor: Any) -> bool:
    inside = divisor.expr if isinstance(divisor, promql_parser.ParenExpr) else divisor
    return isinstance(inside, promql_parser.BinaryExpr) and str(inside.op) == ">"


def test_an_unguarded_division_is_found():
    unguarded = promql_parser.parse("histogram_quantile(0.5, sum by (le) (a / b))")
    assert [is_guarded(part) for part in division_parts(unguarded)] == [False]
