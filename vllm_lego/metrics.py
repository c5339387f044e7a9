"""The plugin's Prometheus metrics, on vLLM's own `/metrics`.

No label carries an adapter's name or a merge id: their number has no bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_FIDELITY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)

TIERS = ("device", "host", "disk")
RESULTS = ("hit", "miss", "coalesced", "error")
PHASES = ("queue", "load", "merge", "register", "total")


class Metrics:
    """Build once per API server, after vLLM has built its own registry."""

    def __init__(self) -> None:
        self.requests = Counter(
            "vllm_lego_requests",
            "Requests that named a set of adapters, by what became of it.",
            ["result"],
        )
        self.evictions = Counter(
            "vllm_lego_cache_evictions", "Merges dropped to make room.", ["tier"]
        )
        self.hits = Counter(
            "vllm_lego_cache_hits", "Merges found instead of made, by where.", ["tier"]
        )
        # Every API server counts the same tensors of the same workers: the largest view counts.
        self.entries = Gauge(
            "vllm_lego_cache_entries",
            "Merges in the cache.",
            ["tier"],
            multiprocess_mode="livemax",
        )
        self.bytes = Gauge(
            "vllm_lego_cache_bytes",
            "Bytes of merges in the cache, on one worker.",
            ["tier"],
            multiprocess_mode="livemax",
        )
        self.merge_seconds = Histogram(
            "vllm_lego_merge_seconds",
            "Time of a merge by phase; total is until it is ready. It is registered when first admitted.",
            ["phase"],
            buckets=_SECONDS,
        )
        self.fidelity = Histogram(
            "vllm_lego_merge_fidelity",
            "Cosine between a merge and the exact weighted sum of its members.",
            ["method"],
            buckets=_FIDELITY,
        )
        self.in_progress = Gauge(
            "vllm_lego_merges_in_progress",
            "Merges queued or running.",
            multiprocess_mode="livesum",
        )
        self.errors = Counter(
            "vllm_lego_errors",
            "Requests refused or failed, and faults of the store that failed none, by reason.",
            ["reason"],
        )
        # A series that exists at 0 can be alerted on; one that appears at 1 cannot.
        for result in RESULTS:
            self.requests.labels(result)
        for phase in PHASES:
            self.merge_seconds.labels(phase)
        for tier in TIERS:
            self.evictions.labels(tier)
            self.hits.labels(tier)
            self.set_tier(tier, 0, 0)

    def set_tier(self, tier: str, entries: int, nbytes: int) -> None:
        """Show the size of a tier."""
        self.entries.labels(tier).set(entries)
        self.bytes.labels(tier).set(nbytes)

    def observe_workers(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Record what workers say of their tiers, see `StagingArea.stage`.

        Sizes and evictions are one worker's, as all keep the same; errors are everybody's.
        """
        for tier, (entries, nbytes) in answers[0]["tiers"].items():
            self.set_tier(tier, entries, nbytes)
        for worker, answer in enumerate(answers):
            for kind, label in answer["events"]:
                if kind == "errors":
                    self.errors.labels(label).inc()
                elif worker == 0:
                    self.evictions.labels(label).inc()

    def observe_merge(self, method: str, fidelity: float, seconds: Mapping[str, float]) -> None:
        """Record a finished merge; `seconds` by phase. Registering it comes later, see there."""
        for phase, value in seconds.items():
            self.merge_seconds.labels(phase).observe(value)
        self.fidelity.labels(method).observe(fidelity)

    def count_error(self, reason: str, *, named_a_set: bool) -> None:
        """Record a request that got an error of ours."""
        if named_a_set:
            self.requests.labels("error").inc()
        self.errors.labels(reason).inc()
