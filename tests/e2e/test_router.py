"""vLLM's own router in front of two replicas that share nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import httpx
import pytest

from benchmarks.affinity.replicas import (
    HEADERS,
    KEY,
    MODEL,
    SETS,
    affinity_key,
    forget,
    measure,
    merged,
    metrics,
    replicas,
    router,
)
from vllm_lego.demo.server import ServerProcess

ROUTES = {  # whether `adapters` reaches the replica, and whether the client's key does
    "/v1/completions": (True, True),
    "/v1/chat/completions": (True, True),
    "/v1/embeddings": (False, True),
    "/v1/responses": (True, False),
    "/v1/messages": (True, False),
    "/pooling": (True, False),
    "/tokenize": (True, False),
    "/v1/adapters/merge": (True, False),
}
PROMPT = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    with replicas(tmp_path_factory.mktemp("replicas"), model, store=None) as servers:
        yield servers
        for server in servers:
            assert server.is_alive(), server.log_tail()


@pytest.fixture
def routed(pair: list[ServerProcess]) -> Iterator[httpx.Client]:
    """The router with affinity, over replicas that have merged nothing."""
    forget(pair)
    with (
        router("consistent_hash", urls(pair)) as process,
        httpx.Client(base_url=process.url, headers=HEADERS, timeout=120) as http,
    ):
        yield http


def urls(servers: list[ServerProcess]) -> list[str]:
    return [server.url for server in servers]


class Echo(BaseHTTPRequestHandler):
    """Answers with the body and the headers it was sent; 503 to a prompt of "busy"."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["content-length"]))
        headers = [name.lower() for name in self.headers]
        body = json.loads(sent)
        busy = body.get("prompt") == "busy"
        Echo.asked.append(self.path)
        answer = json.dumps({"body": body, "headers": headers}).encode()
        self.send_response(503 if busy else 200)
        self.send_header("retry-after", "7")
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def echo() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def direct(server: ServerProcess, **fields: Any) -> httpx.Response:
    url = server.url + "/v1/completions"
    return httpx.post(url, json=PROMPT | fields, headers=HEADERS, timeout=120)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["text"]
    return found


def test_affinity_merges_each_set_on_one_replica_only(pair):
    """200 requests of 40 sets, of which a replica has room for only a part."""
    measured = {}
    for policy in ("round_robin", "consistent_hash"):
        with router(policy, urls(pair)) as process:
            measured[policy] = measure(process.url, pair, repeats=5, clients=4)
    without, with_affinity = measured["round_robin"], measured["consistent_hash"]
    # The same answers, whichever replica gave them: 40 sets have 40 names and their own tokens.
    assert without.answers == with_affinity.answers
    assert len({name for name, _ in without.answers}) == len(SETS)
    for run in measured.values():
        assert sum(run.results.values()) == sum(run.shares) == len(SETS) * 5
        assert all(run.shares), "one replica got everything"
    assert with_affinity.kept[0].isdisjoint(with_affinity.kept[1])
    assert not without.kept[0].isdisjoint(without.kept[1])
    # A set is merged again only after it was pushed out of the largest tier.
    assert with_affinity.results["miss"] <= len(SETS) + with_affinity.evictions
    assert with_affinity.results["miss"] < without.results["miss"]
    assert with_affinity.results["hit"] > without.results["hit"]


def test_what_a_client_sends_and_gets_passes_through(pair, routed):
    names = ["adapter0", "adapter1"]
    wanted = {"adapters": ["adapter0", {"name": "adapter1", "weight": 0.5}], "merge": {"rank": 4}}
    key = {"x-session-id": affinity_key(names)}
    answer = routed.post("/v1/completions", json=PROMPT | wanted, headers=key)
    assert answer.headers["x-lego-cache"] == "miss"
    itself = direct(pair[0], **wanted)
    assert text(answer) == text(itself) != text(direct(pair[0], adapters=names))
    identity = itself.headers["x-lego-model"]
    assert answer.headers["x-lego-model"] == answer.json()["model"] == identity

    with routed.stream(
        "POST", "/v1/completions", json=PROMPT | wanted | {"stream": True}, headers=key
    ) as stream:
        assert stream.headers["x-lego-model"] == identity
        assert stream.headers["x-lego-cache"] == "hit"
        *chunks, last = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert last == "[DONE]"
    assert "".join(json.loads(c)["choices"][0]["text"] for c in chunks) == text(answer)

    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, **wanted}
    chat = routed.post("/v1/chat/completions", json=body | {"model": MODEL}, headers=key)
    assert chat.status_code == 200, chat.text
    assert chat.headers["x-lego-model"] == identity


def test_errors_pass_through(routed):
    key = {"x-session-id": "adapter0+nobody"}
    unknown = routed.post(
        "/v1/completions", json=PROMPT | {"adapters": ["adapter0", "nobody"]}, headers=key
    )
    assert unknown.status_code == 404
    assert unknown.json()["error"]["param"] == "adapters"
    assert "nobody" in unknown.json()["error"]["message"]
    wrong = routed.post(
        "/v1/completions",
        json=PROMPT | {"adapters": ["adapter0", "adapter0"]},
        headers=key | {"authorization": "Bearer wrong"},
    )
    assert wrong.status_code == 401


def test_merging_ahead_through_the_router_takes_a_key_of_its_own(pair, routed):
    """It hands the client's key on with completions and chat alone, see the next test."""
    names = ["adapter3", "adapter4"]
    key = {"x-session-id": affinity_key(names)}
    ahead = routed.post("/v1/adapters/merge", json={"adapters": names}, headers=key)
    assert ahead.status_code == 401
    with router("consistent_hash", urls(pair), f"--api-key={KEY}") as process:
        url = process.url + "/v1/adapters/merge"
        ahead = httpx.post(url, json={"adapters": names}, headers=key, timeout=120)
    assert ahead.status_code == 200, ahead.text
    answer = routed.post("/v1/completions", json=PROMPT | {"adapters": names[::-1]}, headers=key)
    assert answer.headers["x-lego-model"] == ahead.json()["id"]
    assert answer.headers["x-lego-cache"] == "hit"
    assert sum(ahead.json()["id"] in merged(server) for server in pair) == 1


def test_what_reaches_a_replica_on_each_route():
    """What deploy/REPLICAS.md says of them: seen by a worker that answers with what it was sent."""
    body = {"model": MODEL, "prompt": "x", "input": "x", "adapters": ["a", "b"], "max_tokens": 1}
    body["messages"] = [{"role": "user", "content": "x"}]
    with (
        echo() as url,
        router("consistent_hash", [url]) as process,
        httpx.Client(base_url=process.url, headers=HEADERS, timeout=120) as http,
    ):
        seen = {path: http.post(path, json=body).json() for path in ROUTES}
    assert {got["body"]["model"] for got in seen.values()} == {MODEL}
    assert {
        path: ("adapters" in got["body"], "authorization" in got["headers"])
        for path, got in seen.items()
    } == ROUTES


@pytest.mark.parametrize(("flags", "attempts"), [([], 5), (["--retry-max-retries=2"], 2)])
def test_how_often_a_busy_replica_is_asked(flags, attempts):
    Echo.asked.clear()
    with echo() as busy, router("consistent_hash", [busy], *flags) as process:
        url = process.url + "/v1/completions"
        answer = httpx.post(url, json=PROMPT | {"prompt": "busy"}, timeout=120)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert Echo.asked == ["/v1/completions"] * attempts


def test_the_default_policy_asks_every_replica_to_render_each_request():
    """Which names the set, and so has it merged there: not a policy for sets."""
    Echo.asked.clear()
    with echo() as one, echo() as two, router("cache_aware", [one, two]) as process:
        url = process.url + "/v1/completions"
        httpx.post(url, json=PROMPT | {"adapters": ["a", "b"]}, timeout=120)
        deadline = time.monotonic() + 30  # the router need not wait for all
        while len(Echo.asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert sorted(Echo.asked) == ["/v1/completions"] + ["/v1/completions/render"] * 2


def test_a_replica_that_never_saw_a_set_answers_all_the_same(pair, routed):
    names = ["adapter7", "adapter8"]  # not one of `SETS`: replicas remember what they evicted
    key = {"x-session-id": affinity_key(names)}
    answer = routed.post("/v1/completions", json=PROMPT | {"adapters": names}, headers=key)
    identity = answer.headers["x-lego-model"]
    (cold,) = [server for server in pair if identity not in merged(server)]
    # Its name alone says nothing to a replica that has not made it.
    unknown = direct(cold, model=identity)
    assert unknown.status_code == 404
    assert identity in unknown.json()["error"]["message"]
    made = metrics(cold)['vllm_lego_merge_seconds_count{phase="total"}']
    itself = direct(cold, adapters=names)
    assert text(itself) == text(answer)
    assert itself.headers["x-lego-model"] == identity
    assert itself.headers["x-lego-cache"] == "miss"
    assert metrics(cold)['vllm_lego_merge_seconds_count{phase="total"}'] == made + 1
    assert text(direct(cold, model=identity)) == text(answer)
