# ruff: noqa: INP001  a script, not a package
"""The Grafana dashboard: `python deploy/grafana/dashboard.py` writes `vllm-lego.json` beside it,
or the file that is named.

`STATS` is the row on top, `ROWS` everything below, in the words of `panels.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units
from panels import (
    DASHED,
    ON_THE_RIGHT,
    graph,
    level,
    mean,
    quantile,
    rate,
    ratio,
    series,
    stat_panel,
    variable,
)

REQUESTS = "vllm_lego_requests_total"
ERRORS = "vllm_lego_errors_total"
MERGE_SECONDS = "vllm_lego_merge_seconds"
FIDELITY = "vllm_lego_merge_fidelity"

COUNTED_WHOLE = 'tier=~"device|disk"'  # host memory has members too, which are not counted

# Seconds of work in a second: exact, where a gauge misses what comes and goes between two scrapes.
AT_WORK = rate(MERGE_SECONDS + "_sum", where='phase=~"load|merge|register"')

STATS = [
    stat_panel(
        "Hit rate",
        "Requests whose set a tier had, of all that named one and were served "
        "(vllm_lego_requests_total). Low with steady traffic: see Evictions, and give the tiers "
        "more room. Low after a start or a deployment: normal, it warms up.",
        {"": ratio(rate(REQUESTS, where='result="hit"'), rate(REQUESTS, where='result!="error"'))},
        units.PercentUnit,
        steps=[(0, "red"), (0.5, "orange"), (0.8, "green")],
        none="no requests now",
    ),
    stat_panel(
        "Merges a minute",
        "New merges made (vllm_lego_merge_seconds_count). Each takes the device for a moment; if "
        "streams slow down with it, lower VLLM_LEGO_MERGE_THREADS.",
        {"": "60 * " + rate(MERGE_SECONDS + "_count", where='phase="total"')},
        span=3,
    ),
    stat_panel(
        "Merge p99",
        "From a request for a new set until its merge is ready (vllm_lego_merge_seconds, phase "
        "total). High: Where the time of a merge goes says which phase.",
        {"": quantile(0.99, MERGE_SECONDS, where='phase="total"')},
        units.Seconds,
        steps=[(1, "orange"), (5, "red")],
        none="no merges now",
    ),
    stat_panel(
        "Cached sets",
        "Merges ready on the devices, of all instances together (vllm_lego_cache_entries). A set "
        "that several instances keep counts for each. Of an instance with several API servers, what "
        "the one with most has.",
        {"": "sum(" + series("vllm_lego_cache_entries", 'tier="device"') + ")"},
        span=3,
    ),
    stat_panel(
        "Bytes by tier",
        "Of the fullest instance, one worker (vllm_lego_cache_bytes). How much of the settings' "
        "limits that is: see How full the tiers are.",
        {"{{tier}}": f"max by (tier) ({series('vllm_lego_cache_bytes')})"},
        units.BytesIEC,
        span=6,
    ),
    stat_panel(
        "Errors a minute",
        "Requests refused or failed, and faults of the store (vllm_lego_errors_total). Errors by "
        "reason says whose they are: the clients' or the server's.",
        {"": f"60 * ({rate(ERRORS)} or vector(0))"},
        steps=[(1, "orange"), (10, "red")],
    ),
]

ROWS = {
    "Cold path: what does a new set cost?": [
        graph(
            "Requests by result",
            "Requests a second that named a set (vllm_lego_requests_total). hit: a tier had it. "
            "coalesced: it joined a merge in the making. miss: it had to be merged. Many misses "
            "for sets seen before: the tiers are too small, see Evictions.",
            {"{{result}}": rate(REQUESTS, "result")},
            units.RequestsPerSecond,
            stacked=True,
        ),
        graph(
            "Where the time of a merge goes",
            "Mean seconds of each phase (vllm_lego_merge_seconds). queue: raise "
            "VLLM_LEGO_MERGE_THREADS, or merge ahead. load: the adapters' volume is slow, or "
            "VLLM_LEGO_HOST_CACHE_BYTES too small for the members. merge: the device is busy, or "
            "ranks and sets are large. register: vLLM's copy into a slot, between its steps.",
            {"{{phase}}": mean(MERGE_SECONDS, "phase", 'phase!="total"')},
            units.Seconds,
            stacked=True,
        ),
        graph(
            "Time of a merge",
            "From the request until the merge is ready, all phases (vllm_lego_merge_seconds, phase "
            "total). A median that is fine with a bad p99: bursts that queue.",
            {
                f"p{q}": quantile(q / 100, MERGE_SECONDS, where='phase="total"')
                for q in (50, 90, 99)
            },
            units.Seconds,
        ),
        graph(
            "Errors a minute, by reason",
            "Errors (vllm_lego_errors_total). Unknown, bad and unmergeable: clients ask "
            "for what is not served; the answer tells them. Busy and timeouts: too many new sets "
            "at once. Store errors and failures: read the server's log.",
            {"{{reason}}": f"60 * {rate(ERRORS, 'reason')} > 0"},
            stacked=True,
        ),
    ],
    "Tiers: is the cache big enough?": [
        graph(
            "How full the tiers are",
            "Bytes of what the settings allow, of the fullest instance (vllm_lego_cache_bytes, "
            "vllm_lego_cache_capacity_bytes). Full is normal; full with Evictions of sets used a "
            "moment ago is too small. Host memory is not here: members fill it beside merges, and "
            "only merges are counted; its Evictions tell that it is full.",
            {
                "{{tier}}": f"max by (tier) ({series('vllm_lego_cache_bytes', COUNTED_WHOLE)}"
                f" / ({series('vllm_lego_cache_capacity_bytes', COUNTED_WHOLE)} > 0))"
            },
            units.PercentUnit,
            top=1,
        ),
        graph(
            "Where sets were found",
            "Requests a second that needed no merging, by the tier that had the set "
            "(vllm_lego_cache_hits_total). Much from host or disk: the device's tier is smaller "
            "than the sets in use; raise VLLM_LEGO_DEVICE_CACHE_BYTES.",
            {"{{tier}}": rate("vllm_lego_cache_hits_total", "tier")},
            units.RequestsPerSecond,
            stacked=True,
        ),
        graph(
            "Evictions a minute",
            "Sets dropped to make room (vllm_lego_cache_evictions_total). What the device drops "
            "need not be merged again while the host or the disk has it; what the last tier drops "
            "must be.",
            {"{{tier}}": f"60 * {rate('vllm_lego_cache_evictions_total', 'tier')}"},
        ),
        graph(
            "How long evicted sets had not been used",
            "Median time from a set's last request until the device dropped it "
            "(vllm_lego_cache_evicted_idle_seconds, tier device). Minutes or less: sets in use push "
            "each other out; raise VLLM_LEGO_DEVICE_CACHE_BYTES. The other tiers count their own "
            "reads alone, so theirs says nothing of the sets that the device has.",
            {
                "{{tier}}": quantile(
                    0.5, "vllm_lego_cache_evicted_idle_seconds", "tier", 'tier="device"'
                )
            },
            units.Seconds,
        ),
        graph(
            "Time of the store",
            "Reading and writing one merge on disk, p99 (vllm_lego_store_seconds). Slow: the "
            "volume of VLLM_LEGO_STORE_DIR is; a merge does not wait for the writing.",
            {"{{operation}}": quantile(0.99, "vllm_lego_store_seconds", "operation")},
            units.Seconds,
        ),
        graph(
            "Sets kept",
            "Merges in each tier, of the instance with most (vllm_lego_cache_entries).",
            {"{{tier}}": f"max by (tier) ({series('vllm_lego_cache_entries')})"},
        ),
    ],
    "Fairness: does anybody wait too long?": [
        graph(
            "Requests waiting",
            "Mean number of requests that wait for a merge, for room on the device or for one of "
            "vLLM's adapter slots (vllm_lego_waiting_requests), and in vLLM's own queue "
            "(vllm:num_requests_waiting). For slots: raise --max-loras, or send a set's requests "
            "to the same instance.",
            {
                "{{reason}}": level("vllm_lego_waiting_requests", "reason"),
                "vLLM's queue": level("vllm:num_requests_waiting"),
            },
            stacked=True,
        ),
        graph(
            "Time waited",
            "p99: of a merge until it is ready (vllm_lego_merge_seconds, phase total), for room on "
            "the device and for a slot (vllm_lego_wait_seconds). Room: raise "
            "VLLM_LEGO_DEVICE_CACHE_BYTES. Slot: raise --max-loras; the k-th name in line waits at "
            "most k / max-loras times VLLM_LEGO_SLOT_QUANTUM_S and the longest request.",
            {
                "merge": quantile(0.99, MERGE_SECONDS, where='phase="total"'),
                "{{reason}}": quantile(0.99, "vllm_lego_wait_seconds", "reason"),
            },
            units.Seconds,
        ),
        graph(
            "Adapter slots in use",
            "The most sets and adapters admitted to vLLM at a time, of its --max-loras "
            "(vllm_lego_slots_in_use, vllm_lego_slots). All in use with requests waiting: raise "
            "--max-loras.",
            {
                "in use": level("vllm_lego_slots_in_use", over="max"),
                "all": level("vllm_lego_slots"),
            },
            overrides={"all": DASHED},
        ),
        graph(
            "Merges queued or running",
            "The most at a time, of all instances and their API servers together "
            "(vllm_lego_merges_in_progress). An API server that has VLLM_LEGO_MAX_QUEUED_MERGES of "
            "them itself answers new sets with 503: scale out, or merge ahead by "
            "POST /v1/adapters/merge.",
            {"merges": level("vllm_lego_merges_in_progress", over="max")},
        ),
    ],
    "Streams: do merges hurt anybody?": [
        graph(
            "Gaps between tokens, beside merges",
            "vLLM's own time between two tokens of a stream (vllm:inter_token_latency_seconds), "
            "and how many merges were worked at on average (vllm_lego_merge_seconds_sum). They "
            "should not move together; if they do, lower VLLM_LEGO_MERGE_THREADS.",
            {
                "p50": quantile(0.5, "vllm:inter_token_latency_seconds"),
                "p99": quantile(0.99, "vllm:inter_token_latency_seconds"),
                "merges at work": AT_WORK,
            },
            units.Seconds,
            overrides={"merges at work": ON_THE_RIGHT},
        ),
        graph(
            "Tokens a second, beside merges",
            "vLLM's throughput (vllm:generation_tokens_total) and merges worked at on average "
            "(vllm_lego_merge_seconds_sum).",
            {"tokens": rate("vllm:generation_tokens_total"), "merges at work": AT_WORK},
            overrides={"merges at work": ON_THE_RIGHT},
        ),
        graph(
            "Time to the first token",
            "vLLM's own (vllm:time_to_first_token_seconds): it starts once the set is ready, so a "
            "merge's wait comes on top, see Time waited.",
            {
                "p50": quantile(0.5, "vllm:time_to_first_token_seconds"),
                "p99": quantile(0.99, "vllm:time_to_first_token_seconds"),
            },
            units.Seconds,
        ),
        graph(
            "Requests running",
            "Mean number of requests in vLLM's batch (vllm:num_requests_running) and in its queue "
            "(vllm:num_requests_waiting).",
            {
                "running": level("vllm:num_requests_running"),
                "waiting": level("vllm:num_requests_waiting"),
            },
        ),
    ],
    "Fidelity: are the merges any good?": [
        graph(
            "Fidelity of new merges",
            "Cosine between a merge and the exact weighted sum of its members "
            "(vllm_lego_merge_fidelity). Low: the adapters contradict each other or the rank is "
            "too small; `vllm-lego inspect` says which, for the set that the log names.",
            {
                "{{method}} median": quantile(0.5, FIDELITY, "method"),
                "{{method}} worst in 20": quantile(0.05, FIDELITY, "method"),
            },
            top=1,
        ).decimals(2),
        graph(
            "Merges below a fidelity",
            "Share of new merges that are less than so close to the exact sum "
            "(vllm_lego_merge_fidelity_bucket). Look at the log for their sets.",
            {
                f"below {bound}": ratio(
                    rate(FIDELITY + "_bucket", where=f'le="{bound}"'), rate(FIDELITY + "_count")
                )
                for bound in (0.5, 0.8, 0.95)
            },
            units.PercentUnit,
            top=1,
        ),
    ],
}


def dashboard() -> models.Dashboard:
    """Return the whole dashboard."""
    board = (
        build.Dashboard("vLLM LEGO: merged adapters")
        .uid("vllm-lego")
        .description("Sets of LoRA adapters, merged and served by vLLM with the plugin vllm-lego.")
        .tags(["vllm", "lora"])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .with_variable(
            build.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(variable("job", "Job", REQUESTS))
        .with_variable(variable("model_name", "Model", 'vllm:num_requests_running{job=~"$job"}'))
        .with_variable(
            variable(
                "instance",
                "Instance",
                'vllm:num_requests_running{job=~"$job", model_name=~"$model_name"}',
            )
        )
    )
    for number, stat in enumerate(STATS, 1):
        board.with_panel(stat.id(number))
    for row, (title, graphs) in enumerate(ROWS.items(), 1):
        board.with_row(build.Row(title).id(100 * row))
        for number, panel in enumerate(graphs, 100 * row + 1):
            board.with_panel(panel.id(number))
    return board.build()


def as_json() -> str:
    """Return the dashboard as Grafana imports it."""
    return JSONEncoder(sort_keys=True, indent=2).encode(dashboard()) + "\n"


if __name__ == "__main__":
    beside = Path(__file__).with_name("vllm-lego.json")
    (Path(sys.argv[1]) if sys.argv[1:] else beside).write_text(as_json())
