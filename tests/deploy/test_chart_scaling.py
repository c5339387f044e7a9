"""The Helm chart's autoscalers: what they ask is asked of the real Prometheus."""

from __future__ import annotations

import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from tests.deploy.charts import CHART, of_kind, render
from tests.deploy.tools import tool


def test_both_autoscalers_are_slow_to_end_a_pod():
    hpa = of_kind(render("everything"), "HorizontalPodAutoscaler")["spec"]
    keda = of_kind(render("keda"), "ScaledObject")["spec"]["advanced"]
    assert keda["horizontalPodAutoscalerConfig"]["behavior"] == hpa["behavior"]
    assert hpa["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 600


POD = "sets-6d4cf56db6-x7x2k"
OTHERS = ["sets-two-6d4cf56db6-x7x2k", "sets-test"]
WAITING = {
    "both queues": (["vllm:num_requests_waiting", "vllm_lego_waiting_requests"], 14),
    "the plugin's": (["vllm_lego_waiting_requests"], 7),
    "vLLM's": (["vllm:num_requests_waiting"], 7),
    "vLLM's, without its colon": (["vllm_num_requests_waiting"], 7),
}


def _ask(query: str, series: dict[str, int], answer: dict[str, int], folder: Path) -> None:
    """Ask the real Prometheus."""
    wanted = [{"labels": labels, "value": value} for labels, value in answer.items()]
    case = {
        "input_series": [{"series": name, "values": str(value)} for name, value in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": "0", "exp_samples": wanted}],
    }
    (folder / "case.yaml").write_text(yaml.safe_dump({"tests": [case]}))
    done = subprocess.run(
        [tool("promtool"), "test", "rules", str(folder / "case.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("reported", WAITING)
def test_the_autoscalers_count_who_waits(reported, tmp_path):
    names, total = WAITING[reported]
    series = {
        f'{name}{{namespace="llm",pod="{pod}",reason="{reason}"}}': value
        for name in names
        for pod in (POD, *OTHERS)
        for reason, value in (("slot", 3), ("merge", 4))
    }
    changes = {"keda.query": "", "keda.minReplicaCount": 1}
    (trigger,) = of_kind(render("keda", changes), "ScaledObject")["spec"]["triggers"]
    _ask(trigger["metadata"]["query"], series, {"{}": total}, tmp_path)

    readme = (CHART.parent / "README.md").read_text()
    rules = yaml.safe_load(readme.partition("```yaml\n")[2].partition("```")[0])
    (rule,) = rules["rules"]["custom"]
    promql_parser.parse(rule["seriesQuery"])
    assert (
        rule["name"]["as"]
        == yaml.safe_load((CHART / "values.yaml").read_text())["autoscaling"]["metric"]
    )
    query = rule["metricsQuery"].replace(
        "<<.LabelMatchers>>", f'namespace="llm",pod=~"{POD}|sets-test"'
    )
    answer = {f'{{pod="{pod}"}}': total for pod in (POD, "sets-test")}
    _ask(query.replace("<<.GroupBy>>", "pod"), series, answer, tmp_path)
