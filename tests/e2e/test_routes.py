"""The management routes: merge ahead of requests, list, drop."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import httpx
import pytest

from tests.e2e.conftest import BODY_BYTES, chat
from tests.e2e.test_errors import refused
from vllm_lego.demo.server import MODEL_NAME
from vllm_lego.identity import MERGE_ID

MERGE = "/v1/adapters/merge"
MERGED = "/v1/adapters/merged"
NUMBER = "Write 4721 in words."

_weights = count(1)


def new_set() -> dict[str, object]:
    """A set that no other test has asked for: its weights are new."""
    return {"adapters": ["numbers", {"name": "shout", "weight": 2 + next(_weights) / 1000}]}


def listed(http: httpx.Client) -> dict[str, dict[str, object]]:
    return {merge["id"]: merge for merge in http.get(MERGED).json()["data"]}


def test_a_merge_made_ahead_is_a_hit_for_its_first_request(http, client, metric):
    wanted = new_set()
    made = metric("vllm_lego_merge_seconds_count", phase="total")
    answer = http.post(MERGE, json=wanted | {"merge": {"rank": 4}, "model": MODEL_NAME})
    assert answer.status_code == 200, answer.text
    merge = answer.json()
    assert MERGE_ID.fullmatch(merge["id"])
    assert merge["result"] == "miss"
    assert merge["members"] == [{"name": "numbers", "weight": 1.0}, wanted["adapters"][1]]
    assert (merge["method"], merge["rank"], merge["tier"]) == ("lego", 4, "device")
    assert 0.5 < merge["fidelity"] <= 1
    assert merge["bytes"] > 100_000
    assert set(merge["seconds"]) == {"queue", "load", "merge", "total"}
    assert all(seconds >= 0 for seconds in merge["seconds"].values())
    assert merge["seconds"]["total"] >= merge["seconds"]["merge"] > 0
    asked = chat(NUMBER, max_tokens=1, **wanted, merge={"rank": 4})
    raw = client.chat.completions.with_raw_response.create(**asked)
    assert raw.headers["x-lego-cache"] == "hit"
    assert raw.headers["x-lego-model"] == merge["id"]
    assert metric("vllm_lego_merge_seconds_count", phase="total") == made + 1
    again = http.post(MERGE, json=wanted | {"merge": {"rank": 4}}).json()
    assert (again["id"], again["result"], again["seconds"]) == (merge["id"], "hit", {})
    described = {k: v for k, v in again.items() if k not in ("result", "seconds")}
    assert listed(http)[merge["id"]] == described


def test_asked_for_four_times_at_once_it_is_made_once(http, metric):
    wanted = new_set()
    made = metric("vllm_lego_merge_seconds_count", phase="total")
    with ThreadPoolExecutor(4) as pool:
        merges = list(pool.map(lambda _: http.post(MERGE, json=wanted).json(), range(4)))
    assert metric("vllm_lego_merge_seconds_count", phase="total") == made + 1
    assert [merge["result"] for merge in merges].count("miss") == 1
    assert len({merge["id"] for merge in merges}) == 1


def test_what_a_foreign_web_page_can_send_merges_nothing(http, metric):
    """No JSON type, so no preflight; nor does it get past the limit of a body."""
    made = metric("vllm_lego_merge_seconds_count", phase="total")
    for content in (json.dumps(new_set()), "x" * (BODY_BYTES + 1)):
        answer = http.post(MERGE, content=content, headers={"content-type": "text/plain"})
        refused(answer, 400 if len(content) <= BODY_BYTES else 413)
    assert metric("vllm_lego_merge_seconds_count", phase="total") == made


def test_what_is_dropped_is_gone_from_every_tier_and_can_be_made_again(http):
    wanted = new_set()
    merge = http.post(MERGE, json=wanted).json()
    answer = http.delete(f"{MERGED}/{merge['id']}")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "id": merge["id"],
        "object": "merged_adapter",
        "deleted": True,
        "still_on_device": False,
    }
    assert merge["id"] not in listed(http)
    assert "not kept here" in refused(http.delete(f"{MERGED}/{merge['id']}"), 404)["message"]
    body = {"model": merge["id"], "prompt": "x", "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 404
    again = http.post(MERGE, json=wanted).json()
    assert (again["id"], again["result"]) == (merge["id"], "miss")
    assert again["fidelity"] == merge["fidelity"]


def test_a_merge_in_use_is_not_dropped_until_its_requests_are_done(http, client):
    wanted = new_set()
    asked = chat(NUMBER, **wanted) | {"max_tokens": 256, "stream": True}
    asked["extra_body"] |= {"ignore_eos": True}
    stream = client.chat.completions.create(**asked)
    identity = next(iter(stream)).model
    error = refused(http.delete(f"{MERGED}/{identity}"), 409)
    assert identity in error["message"]
    assert identity in listed(http)
    answer = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert "FOUR" in answer  # the refusal disturbed nobody
    assert http.delete(f"{MERGED}/{identity}").status_code == 200


def test_dropping_under_load_fails_no_request(http):
    """One client drops what four others ask for, over and over."""
    wanted = new_set()
    identity = http.post(MERGE, json=wanted).json()["id"]
    body = wanted | {"messages": [{"role": "user", "content": NUMBER}], "max_tokens": 2}
    done = threading.Event()

    def drop() -> list[int]:
        statuses = []
        while not done.is_set():
            statuses.append(http.delete(f"{MERGED}/{identity}").status_code)
        return statuses

    with ThreadPoolExecutor(5) as pool:
        dropping = pool.submit(drop)
        try:
            asked = [pool.submit(http.post, "/v1/chat/completions", json=body) for _ in range(24)]
            answers = [answer.result() for answer in asked]
        finally:  # or the test hangs
            done.set()
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-lego-model"] for answer in answers} == {identity}
    assert set(dropping.result()) <= {200, 404, 409}


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({}, 400, "adapters", "names none"),
        ({"adapters": []}, 400, "adapters", "names none"),
        ({"adapters": ["numbers"]}, 400, "adapters", "nothing to merge"),
        ({"adapters": "numbers"}, 400, "adapters", "must be a list"),
        ({"adapters": ["numbers", "shout"], "rank": 4}, 400, "rank", "unknown field 'rank'"),
        ({"adapters": ["numbers", "shout"], "model": "numbers"}, 400, "model", "the base model"),
        ({"adapters": ["numbers", "shout"], "merge": {"rank": 9}}, 400, "merge.rank", "at most 8"),
        (
            {"adapters": ["numbers", "shout"], "merge": {"method": "concat"}},
            400,
            "merge.rank",
            "raise rank to",
        ),
        ({"adapters": ["numbers", "nobody"]}, 404, "adapters", "'nobody' is not served here"),
        ({"adapters": ["nobody"]}, 404, "adapters", "'nobody' is not served here"),
    ],
)
def test_what_cannot_be_merged_is_refused_as_in_requests(http, fields, status, param, says):
    error = refused(http.post(MERGE, json=fields), status)
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(http, body):
    answer = http.post(MERGE, content=body, headers={"content-type": "application/json"})
    assert "must be a JSON object" in refused(answer, 400)["message"]


def test_a_body_over_the_limit_is_refused(http):
    answer = http.post(MERGE, json={"adapters": ["x" * BODY_BYTES]})
    assert str(BODY_BYTES) in refused(answer, 413)["message"]


@pytest.mark.parametrize(
    "identity", ["lego-0123456789abcdef", "numbers", "..%2F..%2Fetc", "%00", "lego-", "x" * 5000]
)
def test_only_merges_can_be_dropped(http, identity):
    answer = http.delete(f"{MERGED}/{identity}")
    if "%2F" in identity:  # a slash is another route
        assert answer.status_code == 404
        return
    assert refused(answer, 404)["param"] == "id"


@pytest.mark.parametrize("key", [None, "wrong"])
def test_strangers_neither_merge_nor_drop(server, http, metric, key):
    identity = http.post(MERGE, json=new_set()).json()["id"]
    before = [metric("vllm_lego_requests_total", result=r) for r in ("miss", "hit", "error")]
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=server.url, headers=headers) as stranger:
        answers = [
            stranger.post(MERGE, json=new_set()),
            stranger.post(MERGE, json={"adapters": ["nobody", "nowhere"]}),
            stranger.post(MERGE, content=b"{"),
            stranger.delete(f"{MERGED}/{identity}"),
            stranger.delete(f"{MERGED}/lego-0123456789abcdef"),
        ]
    assert {(a.status_code, a.text) for a in answers} == {(401, '{"error":"Unauthorized"}')}
    after = [metric("vllm_lego_requests_total", result=r) for r in ("miss", "hit", "error")]
    assert before == after
    assert identity in listed(http)
