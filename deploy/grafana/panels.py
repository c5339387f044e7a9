# ruff: noqa: INP001  beside a script, not in a package
"""The words that `dashboard.py` is written in: PromQL, numbers and graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import common as styles
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units

SOURCE = styles.DataSourceRef(type_val="prometheus", uid="${datasource}")

Override = tuple[str, object]
Panel = TypeVar("Panel", stat.Panel, timeseries.Panel)

# What a legend stands for has the same colour in every panel.
ALONE = {
    "merge": "orange",
    "p50": "green",
    "p90": "yellow",
    "p99": "blue",
    "below 0.5": "red",
    "below 0.8": "orange",
    "below 0.95": "yellow",
    "all": "text",
    "vLLM's queue": "text",
}
COLOURS = {
    "{{result}}": {"hit": "green", "coalesced": "blue", "miss": "orange", "error": "red"},
    "{{tier}}": {"device": "green", "host": "blue", "disk": "purple"},
    "{{phase}}": {"queue": "yellow", "load": "blue", "merge": "orange", "register": "purple"},
    "{{reason}}": {"merge": "orange", "room": "purple", "slot": "blue"},
} | {name: {name: colour} for name, colour in ALONE.items()}
ON_THE_RIGHT: list[Override] = [
    ("custom.axisPlacement", "right"),
    ("custom.lineWidth", 0),
    ("custom.fillOpacity", 30),
    ("color", {"mode": "fixed", "fixedColor": "orange"}),
    ("unit", units.Short),
]
DASHED: list[Override] = [("custom.lineStyle", {"fill": "dash", "dash": [10, 10]})]


def series(metric: str, where: str = "") -> str:
    """Return a metric with the variables' selection. Only vLLM's own know the model's name."""
    model = ', model_name=~"$model_name"' if metric.startswith("vllm:") else ""
    return f'{metric}{{job=~"$job", instance=~"$instance"{model}{where and ", " + where}}}'


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Return what a counter grows by in a second."""
    return f"sum{by and f' by ({by}) '}(rate({series(metric, where)}[$__rate_interval]))"


def level(gauge: str, by: str = "", over: str = "avg") -> str:
    """Return the mean of a gauge between two points of the graph, or the `max`."""
    grouped = by and f" by ({by}) "
    return f"sum{grouped}({over}_over_time({series(gauge)}[$__rate_interval]))"


def quantile(q: float, histogram: str, by: str = "", where: str = "") -> str:
    """Return a quantile of what was observed; absent, not NaN, while nothing is."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', labels, where)}) >= 0"


def ratio(part: str, whole: str) -> str:
    """Return a quotient; absent, too, while nothing happens."""
    return f"{part} / ({whole} > 0)"


def mean(histogram: str, by: str = "", where: str = "") -> str:
    """Return the mean of what was observed."""
    return ratio(rate(histogram + "_sum", by, where), rate(histogram + "_count", by, where))


def stat_panel(
    title: str,
    description: str,
    queries: Mapping[str, str],
    unit: str = units.Short,
    *,
    span: int = 4,
    steps: Sequence[tuple[float, str]] = (),
    none: str = "",
) -> stat.Panel:
    """Return a number with its recent course.

    Args:
        title: of the panel.
        description: names the metrics and says what to do.
        queries: by legend.
        unit: of the values.
        span: width, of 24.
        steps: from which value on it has which colour; green below the first.
        none: what it says while the query has no value, if that happens. There is no course
            then: the last value of one might be of long ago.
    """
    now = bool(none)
    thresholds = [models.Threshold(color="green"), *(models.Threshold(v, c) for v, c in steps)]
    panel = (
        stat.Panel()
        .unit(unit)
        .height(5)  # the least that has room for the course
        .span(span)
        .no_value(none or "0")
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(build.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(thresholds))
        .color_scheme(build.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .graph_mode(styles.BigValueGraphMode.NONE if now else styles.BigValueGraphMode.AREA)
        .orientation(styles.VizOrientation.HORIZONTAL)
    )
    return _with(panel, title, description, queries, now=now)


def graph(
    title: str,
    description: str,
    queries: Mapping[str, str],
    unit: str = units.Short,
    *,
    stacked: bool = False,
    top: float | None = None,
    overrides: Mapping[str, Sequence[Override]] | None = None,
) -> timeseries.Panel:
    """Return lines over time. Arguments as of `stat_panel`; `top` is the end of the axis."""
    panel = (
        timeseries.Panel()
        .unit(unit)
        .min(0)
        .height(8)
        .span(12)
        .line_width(2)
        .fill_opacity(40 if stacked else 0)
        .show_points(styles.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(styles.LegendDisplayMode.LIST)
            .placement(styles.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull"])
        )
        .tooltip(common.VizTooltipOptions().mode(styles.TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(styles.StackingMode.NORMAL).group("A"))
    if top is not None:
        panel.max(top)
    for name, properties in (overrides or {}).items():
        panel.override_by_name(name, [models.DynamicConfigValue(i, v) for i, v in properties])
    return _with(panel, title, description, queries)


def _with(
    panel: Panel, title: str, description: str, queries: Mapping[str, str], *, now: bool = False
) -> Panel:
    panel.title(title).description(description).datasource(SOURCE)
    for ref, (legend, expression) in zip("ABCDEF", queries.items(), strict=False):
        query = prometheus.Dataquery().ref_id(ref).expr(expression).legend_format(legend)
        query = query.instant() if now else query.range()
        panel.with_target(query.datasource(SOURCE))
        for name, colour in COLOURS.get(legend, {}).items():
            fixed: Override = ("color", {"mode": "fixed", "fixedColor": colour})
            panel.override_by_name(name, [models.DynamicConfigValue(*fixed)])
    return panel


def variable(name: str, label: str, metric: str) -> build.QueryVariable:
    """Return a choice among the values of a label, all of them at first."""
    return (
        build.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({metric}, {name})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(text=["All"], value=["$__all"]))
    )
