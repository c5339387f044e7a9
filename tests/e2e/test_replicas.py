"""Two replicas that share a store: what one has merged, the other loads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx
import pytest
import torch

from benchmarks.affinity.replicas import ADAPTERS, HEADERS, MODEL, merged, metrics, replicas
from lego_core import load_adapter, merge_adapters
from vllm_lego.demo.server import ServerProcess
from vllm_lego.store import MergeStore

DISK_HITS = 'vllm_lego_cache_hits_total{tier="disk"}'
MERGES = 'vllm_lego_merge_seconds_count{phase="total"}'
STORE_FAULTS = ("store_read", "store_write", "store_broken")
WRITTEN_WITHIN_S = 120  # by threads of low priority


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def pair(
    model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ServerProcess]]:
    with replicas(tmp_path_factory.mktemp("replicas"), model, store=store) as servers:
        yield servers
        for server in servers:
            assert server.is_alive(), server.log_tail()
            found = metrics(server)
            for fault in STORE_FAULTS:
                assert found[f'vllm_lego_errors_total{{reason="{fault}"}}'] == 0


def ask(server: ServerProcess, **fields: Any) -> tuple[str, str, list[str]]:
    """Return the merge's id, how it was come by, and greedy tokens."""
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    answer = httpx.post(
        server.url + "/v1/completions", json=body | fields, headers=HEADERS, timeout=120
    )
    assert answer.status_code == 200, answer.text
    tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
    return answer.headers["x-lego-model"], answer.headers["x-lego-cache"], tokens


def wait_until_holds(store: Path, identities: set[str]) -> None:
    """Wait until the files of these merges, and none that is being written, are in the store."""
    wanted = {f"{identity}.safetensors" for identity in identities}
    deadline = time.monotonic() + WRITTEN_WITHIN_S
    while (found := {path.name for path in store.iterdir()}) != wanted:
        assert time.monotonic() < deadline, f"the store holds {found}, not {wanted}"
        time.sleep(0.05)


def stored(store: Path) -> set[str]:
    """Return the ids of the merges in the store."""
    return {path.stem for path in store.glob("*.safetensors")}


def grown(server: ServerProcess, before: dict[str, float], series: str) -> float:
    return metrics(server)[series] - before[series]


def test_a_set_merged_on_one_replica_is_loaded_by_the_other(pair, store):
    first, second = pair
    here_already = stored(store)
    wanted = ["adapter0", {"name": "adapter1", "weight": 0.5}]
    identity, result, tokens = ask(first, model=MODEL, adapters=wanted)
    assert result == "miss"
    wait_until_holds(store, here_already | {identity})
    assert merged(second)[identity] == "disk"
    before = metrics(second)
    assert ask(second, model=MODEL, adapters=wanted[::-1]) == (identity, "hit", tokens)
    assert grown(second, before, DISK_HITS) == 1
    assert grown(second, before, MERGES) == 0
    assert merged(second)[identity] == "device"


def test_a_merges_id_is_known_wherever_the_store_is(pair, store):
    first, second = pair
    here_already = stored(store)
    identity, result, tokens = ask(first, adapters=["adapter2", "adapter3"])
    assert result == "miss"
    wait_until_holds(store, here_already | {identity})
    before = metrics(second)
    assert ask(second, model=identity) == (identity, "hit", tokens)
    assert grown(second, before, MERGES) == 0


def test_both_merging_a_set_at_once_leave_one_valid_copy(pair, store):
    """Slow merges of large sets, each asked of both replicas at the same moment."""
    sets = [list(c) for c in combinations([f"adapter{i}" for i in range(ADAPTERS)], ADAPTERS - 1)]
    here_already = stored(store)
    at_once = Barrier(2)

    def race(server: ServerProcess) -> list[tuple[str, str, list[str]]]:
        answers = []
        for wanted in sets:
            at_once.wait(timeout=120)
            answers.append(ask(server, adapters=wanted, merge={"restarts": 64}))
        return answers

    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(race, pair)
    assert [(name, tokens) for name, _, tokens in ours] == [(n, tokens) for n, _, tokens in theirs]
    results = [{a, b} for (_, a, _), (_, b, _) in zip(ours, theirs, strict=True)]
    assert all("miss" in of_set for of_set in results)
    assert {"miss"} in results, "no set was merged by both: nothing raced"

    identities = {name for name, _, _ in ours}
    assert len(identities) == len(sets)
    wait_until_holds(store, here_already | identities)
    for server in pair:
        assert identities <= merged(server).keys()
    told: list[tuple[str, str, float]] = []
    reader = MergeStore(store, 1 << 30, lambda *event: told.append(event))
    for identity in identities:
        recipe = reader.recipe(identity)
        assert recipe is not None
        loaded = reader.load(recipe)
        assert loaded is not None, told
        made = merge_adapters(
            [load_adapter(member.path) for member in recipe.members],
            recipe.config,
            weights=[member.weight for member in recipe.members],
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        for name, module in made.modules.items():
            read = loaded[0].modules[name].delta().float()
            torch.testing.assert_close(read, module.delta().float().cpu(), rtol=1e-2, atol=1e-2)
    assert {kind for kind, _, _ in told} == {"store_seconds"}, told
