"""What each fault gets: those concerned the contract's error or a right answer, all others theirs.

Each fault is the real one: files that vanish, a full tmpfs, a killed server. Those that need no
server are in `tests/plugin`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from lego_core import LoraAdapter, LoraModule, load_adapter, save_adapter
from tests.e2e.conftest import TINY_SERVER, read_metric
from vllm_lego.demo.server import LEGO_SERVE, ServerProcess, server_environment

# Longer than sets wait for room here on a busy machine; shorter than the client's timeout, so that what
# hangs fails its test.
LIMIT_S = 30
WEIGHTS = "adapter_model.safetensors"
_fresh = count(1)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(SHAPES["tiny"], tmp_path_factory.mktemp("members"), 4, rank=8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def arguments(
    model: Path, adapters: dict[str, Path], store: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    return [
        str(write_model(SHAPES["tiny"], folder, model, weights=True)),
        *TINY_SERVER,
        "--shutdown-timeout=60",
        f"--store-dir={store}",
        "--host-cache-bytes=0",
        "--device-cache-bytes=600000",  # two merges
        f"--merge-timeout-s={LIMIT_S}",
        "--lora-modules",
        *(f"{name}={path}" for name, path in adapters.items()),
    ]


@pytest.fixture(scope="module")
def server(arguments: list[str]) -> Iterator[ServerProcess]:
    with ServerProcess(arguments, server_environment(), command=LEGO_SERVE) as process:
        yield process
        assert process.is_alive(), process.log_tail()


@pytest.fixture(scope="module")
def tiny(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


@pytest.fixture(autouse=True)
def _others_go_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test of the shared server broke, an untouched set is served as before."""
    if "tiny" not in request.fixturenames:
        yield
        return
    tiny = request.getfixturevalue("tiny")
    before = tokens(ask(tiny, ["adapter2", "adapter3"]))
    yield
    assert tokens(ask(tiny, ["adapter2", "adapter3"])) == before
    assert read_metric(tiny, "vllm_lego_merges_in_progress") == 0


@pytest.fixture
def member(adapters: dict[str, Path]) -> Iterator[Path]:
    """The folder of adapter0, whole again afterwards."""
    folder = adapters["adapter0"]
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    copy.rename(folder)


def ask(http: httpx.Client, adapters: list[Any], **fields: Any) -> httpx.Response:
    body = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0, "logprobs": 0}
    body |= {"ignore_eos": True, "adapters": adapters}
    return http.post("/v1/completions", json=body | fields)


def tokens(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    found: list[str] = answer.json()["choices"][0]["logprobs"]["tokens"]
    return found


def new_set() -> list[Any]:
    return ["adapter1", {"name": "adapter0", "weight": 1 + next(_fresh) / 1000}]


def refused(answer: httpx.Response, status: int, says: str) -> None:
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


def until(condition: Callable[[], bool], limit_s: float = 30) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def waiting(http: httpx.Client) -> float:
    reasons = ("merge", "room", "slot")
    return sum(read_metric(http, "vllm_lego_waiting_requests", reason=one) for one in reasons)


def errors(http: httpx.Client, reason: str) -> float:
    with suppress(AssertionError):  # no series yet
        return read_metric(http, "vllm_lego_errors_total", reason=reason)
    return 0.0


def test_source_removed(tiny, member):
    known = new_set()
    first = ask(tiny, known)
    before = errors(tiny, "unmergeable")
    shutil.rmtree(member)
    refused(ask(tiny, known), 422, "'adapter0' has no adapter_config.json")
    refused(ask(tiny, new_set()), 422, "'adapter0' has no adapter_config.json")
    assert errors(tiny, "unmergeable") == before + 2
    # Its name says the content it was made of: that is still here.
    by_name = ask(tiny, [], model=first.headers["x-lego-model"])
    assert tokens(by_name) == tokens(first)


def test_source_removed_between_eviction_and_use_again(tiny, member):
    """Stock vLLM dies of this: it loads the adapter again in the middle of a step."""
    first = ask(tiny, new_set())
    for _ in range(4):
        tokens(ask(tiny, new_set()))
    shutil.rmtree(member)
    again = ask(tiny, [], model=first.headers["x-lego-model"])
    assert tokens(again) == tokens(first)
    assert again.headers["x-lego-cache"] == "hit"


def test_source_replaced_in_place(tiny, member):
    wanted = new_set()
    before = ask(tiny, wanted)
    changed = {
        name: LoraModule(-module.lora_a, module.lora_b, module.scaling)
        for name, module in load_adapter(member).modules.items()
    }
    save_adapter(LoraAdapter("x", changed), member, overwrite=True)
    after = ask(tiny, wanted)
    assert after.headers["x-lego-model"] != before.headers["x-lego-model"]
    assert tokens(after) != tokens(before)  # no cached block of the old weights was used


def test_source_truncated(tiny, member):
    content = (member / WEIGHTS).read_bytes()
    (member / WEIGHTS).write_bytes(content[: len(content) // 2])
    refused(ask(tiny, new_set()), 422, "'adapter0'")


def test_source_with_a_nan(tiny, member):
    name = next(iter(load_adapter(member).modules))
    weights = member / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"base_model.model.{name}.lora_A.weight"].fill_(torch.nan)
    save_file(tensors, weights, {"format": "pt"})
    refused(ask(tiny, new_set()), 422, f"module '{name}': lora_A holds NaN or Inf")


def test_source_replaced_by_a_pipe(tiny, member):
    """Nobody writes to it: reading it would wait for ever."""
    (member / WEIGHTS).unlink()
    os.mkfifo(member / WEIGHTS)
    refused(ask(tiny, new_set()), 422, "'adapter0'")


@pytest.fixture
def full_store(store: Path) -> Iterator[None]:
    """Another file system over the store's folder, without room."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(store)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes privileges")
    yield
    subprocess.run(["umount", "-l", str(store)], check=True)


@pytest.mark.usefixtures("full_store")
def test_disk_full(tiny):
    before = errors(tiny, "store_write")
    asked = [new_set() for _ in range(3)]
    first = [tokens(ask(tiny, wanted)) for wanted in asked]
    assert [tokens(ask(tiny, wanted)) for wanted in asked] == first
    assert errors(tiny, "store_write") > before


def test_store_unreadable(tiny, store):
    """A file lies where its folder was: nothing can be read from it or written to it."""
    wanted = new_set()
    first = ask(tiny, wanted)
    for _ in range(3):
        tokens(ask(tiny, new_set()))
    before = {reason: errors(tiny, reason) for reason in ("store_read", "store_write")}
    aside = store.rename(store.with_name("aside"))
    store.touch()
    try:
        again = ask(tiny, wanted)
        assert tokens(again) == tokens(first)
        assert again.headers["x-lego-cache"] == "miss"
        tokens(ask(tiny, new_set()))
    finally:
        store.unlink()
        aside.rename(store)
    for reason, count_before in before.items():
        assert errors(tiny, reason) > count_before


def test_store_file_replaced_by_a_folder(tiny, store):
    wanted = new_set()
    first = ask(tiny, wanted)
    path = store / f"{first.headers['x-lego-model']}.safetensors"
    until(path.is_file)
    for _ in range(3):
        tokens(ask(tiny, new_set()))
    path.unlink()
    path.mkdir()
    before = errors(tiny, "store_broken")
    again = ask(tiny, wanted)
    assert tokens(again) == tokens(first)
    assert again.headers["x-lego-cache"] == "miss"
    assert errors(tiny, "store_broken") == before + 1
    until(path.is_file)


def test_store_file_truncated(tiny, store):
    wanted = new_set()
    first = ask(tiny, wanted)
    path = store / f"{first.headers['x-lego-model']}.safetensors"
    until(path.exists)
    for _ in range(3):
        tokens(ask(tiny, new_set()))
    path.write_bytes(path.read_bytes()[:-1000])
    before = errors(tiny, "store_broken")
    again = ask(tiny, wanted)
    assert tokens(again) == tokens(first)
    assert again.headers["x-lego-cache"] == "miss"
    assert errors(tiny, "store_broken") == before + 1
    until(path.exists)
    assert path.with_name(path.name + ".broken").exists()


def test_clients_gone_in_the_middle_of_their_merges(tiny, server):
    def made() -> float:
        return read_metric(tiny, "vllm_lego_merge_seconds_count", phase="total")

    before = made()
    with httpx.Client(base_url=server.url, timeout=0.02) as impatient:

        def leave() -> bool:
            with suppress(httpx.TimeoutException):
                ask(impatient, new_set())
            return made() > before

        until(leave)  # at least one was at it when its client left
        for _ in range(20):
            leave()
    until(lambda: read_metric(tiny, "vllm_lego_merges_in_progress") == 0)


def test_more_sets_at_once_than_the_device_holds(tiny):
    """Each keeps its merge while it is served; the others wait for room instead of an error."""
    wanted = [new_set() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: ask(tiny, one, max_tokens=32), wanted))
    assert [answer.status_code for answer in answers] == [200] * 8


def test_steady_traffic_on_every_slot_starves_nobody(tiny):
    """Two sets, one for each slot, always with two overlapping requests; then another comes.

    Without admission in front of vLLM's scheduler it waits until the traffic ends.
    """
    done = threading.Event()
    busy = [new_set(), new_set()]
    for wanted in busy:
        tokens(ask(tiny, wanted))

    def keep_busy(wanted: list[Any], delay: float) -> int:
        time.sleep(delay)
        asked = 0
        while not done.is_set():
            tokens(ask(tiny, wanted, max_tokens=100))
            asked += 1
        return asked

    with ThreadPoolExecutor(8) as pool:
        traffic = [pool.submit(keep_busy, wanted, d) for wanted in busy for d in (0, 0.2)]
        time.sleep(1)
        try:
            # The first needs room on the device too, which the two fill. One by one: who stands
            # in line makes way for others as well.
            for other in (new_set(), ["adapter3"]):
                # Stock behaviour: a timeout here.
                assert pool.submit(ask, tiny, other).result(timeout=50).status_code == 200
            assert not any(future.done() for future in traffic)
        finally:
            done.set()
        assert all(future.result() > 0 for future in traffic)


def test_sigterm_under_load_drains_and_the_next_server_knows_what_this_one_knew(arguments):
    wanted = new_set()
    # Some sets below wait for room until others have been answered, which takes what it takes.
    arguments = [*arguments, "--merge-timeout-s=120", "--shutdown-timeout=240"]
    with ServerProcess(arguments, server_environment(), command=LEGO_SERVE) as first:
        with httpx.Client(base_url=first.url, timeout=120) as http, ThreadPoolExecutor(4) as pool:
            known = tokens(ask(http, wanted))
            # There are two slots: two sets, merged before, are in the engine ...
            busy = [new_set(), new_set()]
            for one in busy:
                tokens(ask(http, one))
            running = [pool.submit(ask, http, one, max_tokens=300) for one in busy]
            until(lambda: read_metric(http, "vllm:num_requests_running") == 2)
            # ... and two more in the plugin's line.
            running += [pool.submit(ask, http, new_set(), max_tokens=300) for _ in range(2)]
            until(lambda: waiting(http) == 2)
            os.kill(first.session, signal.SIGTERM)
            until(lambda: ask(http, busy[0], max_tokens=1).status_code == 503)
            refused(ask(http, new_set()), 503, "shutting down")
            answers = [future.result() for future in running]
        assert [len(tokens(answer)) for answer in answers] == [300] * 4
        assert first.wait() == 0
    with (
        ServerProcess(arguments, server_environment(), command=LEGO_SERVE) as second,
        httpx.Client(base_url=second.url, timeout=60) as http,
    ):
        again = ask(http, wanted)
        assert tokens(again) == known
        assert again.headers["x-lego-cache"] == "hit"
        assert read_metric(http, "vllm_lego_cache_hits_total", tier="disk") == 1
        assert read_metric(http, "vllm_lego_merge_seconds_count", phase="total") == 0
