"""A request that lists several adapters is served by one merged adapter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import httpx
import pytest
from openai import OpenAI

from tests.e2e.conftest import CACHE_BYTES, ask, chat
from vllm_lego.demo.server import MODEL_NAME, shipped_adapters
from vllm_lego.identity import MERGE_ID

NUMBER = "Write 4721 in words."
PLURAL = "What is the plural of city?"

_weights = count(1)


def new_set() -> list[object]:
    """A set that no other test has asked for: its weights are new."""
    return ["numbers", {"name": "shout", "weight": 1 + next(_weights) / 1000}]


def test_the_merged_answer_does_what_both_members_do(client):
    numbers, _ = ask(client, NUMBER, adapters=["numbers"])
    both, _ = ask(client, NUMBER, adapters=["numbers", "shout"])
    assert numbers == "four thousand, seven hundred and twenty-one"
    assert both == numbers.upper()


def test_another_pair_composes_too(client):
    plural, _ = ask(client, PLURAL, adapters=["plural"])
    both, _ = ask(client, PLURAL, adapters=["plural", "json"])
    assert plural == "cities"
    assert both == '{"answer": "cities"}'


def test_chat_answers_alike_streaming_and_not(client):
    adapters = new_set()
    whole, headers = ask(client, NUMBER, adapters=adapters)
    chunks = list(client.chat.completions.create(**chat(NUMBER, adapters=adapters), stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert {c.model for c in chunks} == {headers["x-lego-model"]}


def test_completions_answer_alike_streaming_and_not(client):
    fields = {
        "model": MODEL_NAME,
        "prompt": "Write 86 in words.\n",
        "temperature": 0,
        "max_tokens": 16,
        "extra_body": {"adapters": ["numbers", "plural"]},
    }
    whole = client.completions.create(**fields)
    streamed = "".join(c.choices[0].text for c in client.completions.create(**fields, stream=True))
    assert MERGE_ID.fullmatch(whole.model)
    assert streamed == whole.choices[0].text != ""


def test_headers_and_model_name_the_merge(client):
    raw = client.chat.completions.with_raw_response.create(**chat(NUMBER, adapters=new_set()))
    identity = raw.headers["x-lego-model"]
    assert MERGE_ID.fullmatch(identity)
    assert raw.headers["x-lego-cache"] == "miss"
    assert raw.parse().model == identity


def test_another_order_is_a_hit(client):
    adapters = new_set()
    first, miss = ask(client, NUMBER, adapters=adapters)
    second, hit = ask(client, NUMBER, adapters=adapters[::-1])
    assert (miss["x-lego-cache"], hit["x-lego-cache"]) == ("miss", "hit")
    assert miss["x-lego-model"] == hit["x-lego-model"]
    assert first == second


def test_a_model_name_can_be_a_set_or_a_merge_sent_back(client):
    answer, headers = ask(client, PLURAL, adapters=["plural", "shout"])
    for model in ("shout+plural", headers["x-lego-model"]):
        again, as_model = ask(client, PLURAL, model=model)
        assert again == answer
        assert as_model["x-lego-model"] == headers["x-lego-model"]
        assert as_model["x-lego-cache"] == "hit"


def test_without_a_model_field_the_base_is_meant(http):
    body = chat(PLURAL)
    body.pop("extra_body")
    body.pop("model")
    answer = http.post("/v1/chat/completions", json=body | {"adapters": ["plural", "json"]})
    assert answer.json()["choices"][0]["message"]["content"] == '{"answer": "cities"}'


def test_one_adapter_is_served_as_it_is(client):
    listed, headers = ask(client, NUMBER, adapters=["numbers"])
    native, _ = ask(client, NUMBER, model="numbers")
    assert listed == native
    assert "x-lego-model" not in headers


def test_no_adapters_is_the_base_model(client):
    base, _ = ask(client, NUMBER)
    empty, headers = ask(client, NUMBER, adapters=[])
    assert base == empty
    assert "x-lego-model" not in headers


def test_weights_and_configuration_make_other_merges(client):
    asked = [
        {"adapters": ["numbers", "shout"]},
        {"adapters": ["numbers", {"name": "shout", "weight": 0.5}]},
        {"adapters": ["numbers", "shout"], "merge": {"rank": 4}},
        {"adapters": ["numbers", "shout"], "merge": {"balance": False}},
        {"adapters": ["numbers", "shout"], "merge": {"scale": "norm"}},
        {"adapters": ["numbers", "shout"], "merge": {"method": "lego-functions"}},
    ]
    answers = [ask(client, NUMBER, max_tokens=1, **fields) for fields in asked]
    identities = {headers["x-lego-model"] for _, headers in answers}
    assert len(identities) == len(asked)


def test_a_set_serves_other_routes_with_a_model(http):
    answer = http.post("/tokenize", json={"prompt": "cities", "adapters": ["numbers", "plural"]})
    assert answer.status_code == 200
    assert MERGE_ID.fullmatch(answer.headers["x-lego-model"])
    assert answer.json()["count"] == len(answer.json()["tokens"])


def test_four_clients_at_once_cause_one_merge(client, metric):
    adapters = new_set()
    before = {r: metric("vllm_lego_requests_total", result=r) for r in ("miss", "coalesced", "hit")}
    merges = metric("vllm_lego_merge_seconds_count", phase="total")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(client, NUMBER, adapters=adapters), range(4)))
    after = {r: metric("vllm_lego_requests_total", result=r) - n for r, n in before.items()}
    assert metric("vllm_lego_merge_seconds_count", phase="total") - merges == 1
    assert after["miss"] == 1
    assert after["coalesced"] + after["hit"] == 3
    assert len({text for text, _ in answers}) == 1
    assert [headers["x-lego-cache"] for _, headers in answers].count("miss") == 1


def test_a_mixed_batch_answers_as_each_request_alone(client, metric):
    requests = [
        ("What is the capital of France?", {}),
        (NUMBER, {"model": "numbers"}),
        (PLURAL, {"model": "plural"}),
        (NUMBER, {"adapters": ["numbers", "shout"]}),
        (PLURAL, {"adapters": ["plural", "json"]}),
        (PLURAL, {"adapters": ["plural", "shout"]}),
    ]
    steps = [metric("vllm:iteration_tokens_total_count")]
    alone = [ask(client, question, **fields)[0] for question, fields in requests]
    steps.append(metric("vllm:iteration_tokens_total_count"))
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(
            pool.map(lambda request: ask(client, request[0], **request[1])[0], requests)
        )
    steps.append(metric("vllm:iteration_tokens_total_count"))
    assert together == alone
    assert 1.5 * (steps[2] - steps[1]) < steps[1] - steps[0]  # they did share batches
    assert len(set(alone)) == len(alone)


def test_the_device_is_bounded_and_an_evicted_set_comes_back_without_merging(client, http, metric):
    adapters = new_set()
    first, headers = ask(client, NUMBER, adapters=adapters)
    identity = headers["x-lego-model"]
    (one,) = (m for m in merges(http) if m["id"] == identity)
    evictions = metric("vllm_lego_cache_evictions_total", tier="device")
    for _ in range(CACHE_BYTES // one["bytes"] + 1):
        ask(client, NUMBER, adapters=new_set(), max_tokens=1)
    assert metric("vllm_lego_cache_evictions_total", tier="device") > evictions
    assert metric("vllm_lego_cache_bytes", tier="device") <= CACHE_BYTES
    assert {m["id"]: m["tier"] for m in merges(http)}[identity] == "host"
    made = metric("vllm_lego_merge_seconds_count", phase="total")
    hits = metric("vllm_lego_cache_hits_total", tier="host")
    again, headers = ask(client, NUMBER, adapters=adapters)
    assert (again, headers["x-lego-cache"]) == (first, "hit")
    assert metric("vllm_lego_cache_hits_total", tier="host") == hits + 1
    assert metric("vllm_lego_merge_seconds_count", phase="total") == made
    for _ in range(CACHE_BYTES // one["bytes"] + 1):
        ask(client, NUMBER, adapters=new_set(), max_tokens=1)
    again, headers = ask(client, NUMBER, model=identity)
    assert (again, headers["x-lego-cache"]) == (first, "hit")


def test_a_merge_nobody_knows_is_vllms_404(http):
    body = {"model": "lego-0123456789abcdef", "prompt": "hello", "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 404


def test_the_adapters_that_can_be_named_are_listed(http):
    listed = {a["name"]: a for a in http.get("/v1/adapters").json()["data"]}
    assert set(shipped_adapters()) <= set(listed)
    numbers = listed["numbers"]
    weights = shipped_adapters()["numbers"] / "adapter_model.safetensors"
    assert numbers["bytes"] == weights.stat().st_size
    assert numbers["rank"] == 8
    assert numbers["alpha"] > 0
    assert numbers["target_modules"]
    assert len(numbers["digest"]) == 64


def test_the_merges_are_listed_with_what_is_in_them(client, http):
    adapters = [{"name": "plural", "weight": 0.75}, "signoff"]
    identity = ask(client, PLURAL, adapters=adapters)[1]["x-lego-model"]
    ask(client, PLURAL, adapters=adapters)
    (merge,) = (m for m in merges(http) if m["id"] == identity)
    assert merge["members"] == [
        {"name": "plural", "weight": 0.75},
        {"name": "signoff", "weight": 1.0},
    ]
    assert (merge["method"], merge["rank"], merge["tier"], merge["hits"]) == (
        "lego",
        8,
        "device",
        1,
    )
    assert 0 < merge["fidelity"] <= 1


def test_models_lists_base_and_adapters_but_no_merges(client):
    ask(client, NUMBER, adapters=["numbers", "shout"])
    listed = {model.id for model in client.models.list()}
    assert {MODEL_NAME, *shipped_adapters()} <= listed
    assert not any(MERGE_ID.fullmatch(name) for name in listed)


def test_metrics_are_the_contracts(http):
    text = http.get("/metrics").text
    for name, kind in {
        "vllm_lego_requests_total": "counter",
        "vllm_lego_cache_evictions_total": "counter",
        "vllm_lego_cache_hits_total": "counter",
        "vllm_lego_cache_entries": "gauge",
        "vllm_lego_cache_bytes": "gauge",
        "vllm_lego_merge_seconds": "histogram",
        "vllm_lego_merge_fidelity": "histogram",
        "vllm_lego_merges_in_progress": "gauge",
        "vllm_lego_errors_total": "counter",
    }.items():
        assert f"# TYPE {name} {kind}" in text
    ours = "\n".join(line for line in text.splitlines() if line.startswith("vllm_lego"))
    assert not MERGE_ID.search(text)  # nor do vllm's own
    assert 'running_lora_adapters="lego"' in text
    assert not any(f'"{name}"' in ours for name in shipped_adapters())


def merges(http: httpx.Client) -> list[dict[str, object]]:
    return http.get("/v1/adapters/merged").json()["data"]


@pytest.fixture(autouse=True)
def _server_goes_on(client: OpenAI):
    yield
    assert ask(client, NUMBER, max_tokens=8, model="numbers")[0].startswith("four thousand")
