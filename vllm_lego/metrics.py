"""The plugin's Prometheus metrics, on vLLM's own `/metrics`; `docs/metrics.md` lists them.

No label carries an adapter's name or a merge id: their number has no bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from lego_core.config import METHOD_NAMES
from vllm_lego.errors import REASONS

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WAIT_SECONDS = (*_SECONDS, 120, 300)
_IDLE_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 14_400, 86_400)
_FIDELITY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)

TIERS = ("device", "host", "disk")
RESULTS = ("hit", "miss", "coalesced", "error")
PHASES = ("queue", "load", "merge", "register", "total")
OPERATIONS = ("read", "write")
WAITED_FOR = ("room", "slot")
WAITING_FOR = ("merge", *WAITED_FOR)
ERRORS = (*REASONS, "store_read", "store_write", "store_broken", "keep")


class Metrics:
    """Build once per API server, after vLLM has built its own registry.

    Gauges of what the API servers have each are summed over them. Of what all of them see, the
    workers' tiers, or have alike, the largest value counts.
    """

    def __init__(self) -> None:
        self.requests = Counter(
            "vllm_lego_requests",
            "Requests that named a set of adapters, by what became of it.",
            ["result"],
        )
        self.evictions = Counter(
            "vllm_lego_cache_evictions", "Merges dropped to make room.", ["tier"]
        )
        self.evicted_idle = Histogram(
            "vllm_lego_cache_evicted_idle_seconds",
            "Seconds for which a merge that was dropped to make room had not been used.",
            ["tier"],
            buckets=_IDLE_SECONDS,
        )
        self.hits = Counter(
            "vllm_lego_cache_hits", "Merges found instead of made, by where.", ["tier"]
        )
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
        self.capacity = Gauge(
            "vllm_lego_cache_capacity_bytes",
            "Bytes that the cache may take, on one worker; of the device, one API server's share. "
            "0: the tier is off.",
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
        self.waiting = Gauge(
            "vllm_lego_waiting_requests",
            "Requests that wait now: for a merge, for room for it on the device, for a slot.",
            ["reason"],
            multiprocess_mode="livesum",
        )
        self.wait_seconds = Histogram(
            "vllm_lego_wait_seconds",
            "Time that a merge waited for room on the device, and a request for a slot; 0 counts too.",
            ["reason"],
            buckets=_WAIT_SECONDS,
        )
        self.slots = Gauge(
            "vllm_lego_slots",
            "Sets and adapters that may run at the same time.",
            multiprocess_mode="livesum",
        )
        self.slots_in_use = Gauge(
            "vllm_lego_slots_in_use",
            "Sets and adapters that are admitted to a slot.",
            multiprocess_mode="livesum",
        )
        self.store_seconds = Histogram(
            "vllm_lego_store_seconds",
            "Time to read a merge from the store or write one, where that succeeded.",
            ["operation"],
            buckets=_SECONDS,
        )
        self.errors = Counter(
            "vllm_lego_errors",
            "Requests refused or failed, and faults of the store that failed none, by reason.",
            ["reason"],
        )
        self.info = Gauge(
            "vllm_lego_info",
            "1, with the plugin's version and what requests get that name no method and no rank.",
            ["version", "method", "rank", "max_loras"],
            multiprocess_mode="livemax",
        )
        # A series that exists at 0 can be alerted on; one that appears at 1 cannot.
        for metric, values in (
            (self.requests, RESULTS),
            (self.evictions, TIERS),
            (self.evicted_idle, TIERS),
            (self.hits, TIERS),
            (self.entries, TIERS),
            (self.bytes, TIERS),
            (self.capacity, TIERS),
            (self.merge_seconds, PHASES),
            (self.fidelity, METHOD_NAMES),
            (self.waiting, WAITING_FOR),
            (self.wait_seconds, WAITED_FOR),
            (self.store_seconds, OPERATIONS),
            (self.errors, ERRORS),
        ):
            for value in values:
                metric.labels(value)

    def describe(self, capacity: Mapping[str, int], slots: int, **labels: str | int) -> None:
        """Show what stays as it is: bytes by tier, slots, and the labels of `vllm_lego_info`."""
        for tier, nbytes in capacity.items():
            self.capacity.labels(tier).set(nbytes)
        self.slots.set(slots)
        self.info.labels(version=version("vllm-lego"), **labels).set(1)

    def set_tier(self, tier: str, entries: int, nbytes: int) -> None:
        """Show the size of a tier."""
        self.entries.labels(tier).set(entries)
        self.bytes.labels(tier).set(nbytes)

    @contextmanager
    def waited(self, reason: str) -> Iterator[None]:
        """Record how long something was waited for, in vain or not."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.wait_seconds.labels(reason).observe(time.perf_counter() - started)

    def observe_workers(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Record what workers say of their tiers, see `StagingArea.stage`.

        Sizes and evictions are one worker's, as all keep the same; the rest is everybody's.
        """
        for tier, (entries, nbytes) in answers[0]["tiers"].items():
            self.set_tier(tier, entries, nbytes)
        for worker, answer in enumerate(answers):
            for kind, label, seconds in answer["events"]:
                if kind != "evictions" or worker == 0:
                    self.observe_event(kind, label, seconds)

    def observe_event(self, kind: str, label: str, seconds: float = 0) -> None:
        """Record one event of the tiers below the device, see `Tiers.events`."""
        if kind == "evictions":
            self.observe_eviction(label, seconds)
        elif kind == "store_seconds":
            self.store_seconds.labels(label).observe(seconds)
        else:
            self.errors.labels(label).inc()

    def observe_eviction(self, tier: str, idle_s: float) -> None:
        """Record a merge dropped to make room, which had not been used for so many seconds."""
        self.evictions.labels(tier).inc()
        self.evicted_idle.labels(tier).observe(idle_s)

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
