"""Every route that has a `model` takes a set, in every form, and answers otherwise as vLLM does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from lego_core import MergeConfig, load_adapter, merge_adapters, save_adapter
from tests.e2e.bodies import GENERATING, KNOWN, MESSAGES, POOLING, TEXT
from vllm_lego.demo.server import MODEL_NAME, ServerProcess, server_environment
from vllm_lego.identity import MERGE_ID

CHAT = "/v1/chat/completions"
SET = {"adapters": ["numbers", "shout"]}
SPELLED = "FOUR THOUSAND, SEVEN HUNDRED AND TWENTY-ONE"
RANK = 8


def posted(http: httpx.Client, path: str, body: dict[str, object]) -> httpx.Response:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def check_all_forms(http: httpx.Client, path: str, body: dict[str, object], *pair: str) -> None:
    """One set, named in every way: the same merge, which the answer names wherever it names one."""
    first = posted(http, path, body | {"adapters": list(pair)})
    identity = first.headers["x-lego-model"]
    assert MERGE_ID.fullmatch(identity)
    forms = [
        {"adapters": [{"name": name} for name in pair], "model": MODEL_NAME},
        {"adapters": list(pair), "merge": {"rank": RANK}},
        {"model": "+".join(pair)},
        {"model": identity},
    ]
    answers = [first, *(posted(http, path, body | form) for form in forms)]
    for answer in answers:
        assert answer.headers["x-lego-model"] == identity
        assert answer.json().get("model", identity) == identity
    assert {answer.headers["x-lego-cache"] for answer in answers[1:]} == {"hit"}
    base = posted(http, path, body | {"model": MODEL_NAME})
    assert "x-lego-model" not in base.headers
    assert base.json().keys() == first.json().keys()


@pytest.mark.parametrize("path", [*GENERATING, *TEXT])
def test_every_route_takes_a_set_in_every_form(http, path):
    body = (GENERATING | TEXT)[path]
    if http.post(path, json=body).status_code == 404:
        pytest.skip("this vLLM has no such route")
    check_all_forms(http, path, body, "numbers", "shout")


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages", "/invocations"])
def test_every_route_that_generates_does_so_with_the_set(http, path):
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    answer = posted(http, path, GENERATING[path] | SET | {limit: 32, "temperature": 0})
    assert SPELLED in answer.text


def test_this_vllm_has_no_route_that_nobody_thought_of(http):
    document = http.get("/openapi.json").json()
    posts = {path for path, operations in document["paths"].items() if "post" in operations}
    assert posts <= KNOWN


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_stream_says_what_the_whole_answer_says(http, path):
    body = GENERATING[path] | SET | {"temperature": 0}
    whole = posted(http, path, body)
    streamed = posted(http, path, body | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["x-lego-model"] == whole.headers["x-lego-model"]
    events = [
        json.loads(line.removeprefix("data: "))
        for line in streamed.text.splitlines()
        if line.startswith("data: {")
    ]
    names = {match for event in events for match in MERGE_ID.findall(json.dumps(event))}
    assert names == {whole.json()["model"]}
    pieces = [_piece(path, event) for event in events]
    assert "".join(pieces) == _text(path, whole.json()) != ""


def _piece(path: str, event: dict) -> str:
    if path == "/v1/responses":
        return event["delta"] if event["type"] == "response.output_text.delta" else ""
    if path == "/v1/messages":
        return event["delta"]["text"] if event["type"] == "content_block_delta" else ""
    (choice,) = event["choices"] or [{}]
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


def _text(path: str, answer: dict) -> str:
    if path == "/v1/responses":
        return answer["output"][-1]["content"][0]["text"]
    if path == "/v1/messages":
        return answer["content"][0]["text"]
    (choice,) = answer["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_several_choices_with_logprobs(http):
    asked = {"n": 3, "seed": 1, "temperature": 1, "logprobs": True, "top_logprobs": 2}
    answer = posted(http, CHAT, GENERATING[CHAT] | SET | asked).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        assert len(choice["logprobs"]["content"]) == 4
        assert all(len(token["top_logprobs"]) >= 2 for token in choice["logprobs"]["content"])
    assert answer["usage"]["completion_tokens"] == 12


def test_echo_scores_the_prompt_with_the_set(http):
    asked = {"prompt": "four thousand", "echo": True, "logprobs": 1, "temperature": 0}
    scores = []
    for form in (SET, {"model": MODEL_NAME}):
        answer = posted(http, "/v1/completions", asked | {"max_tokens": 1} | form).json()
        assert answer["choices"][0]["text"].startswith("four thousand")
        scores.append(answer["choices"][0]["logprobs"]["token_logprobs"])
    assert scores[0][0] is scores[1][0] is None
    assert len(scores[0]) == len(scores[1])
    assert scores[0][1:] != scores[1][1:]


def test_structured_output(http):
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["ONE", "TWO"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    asked = {"max_tokens": 128, "temperature": 0, "response_format": form}
    content = posted(
        http, CHAT, GENERATING[CHAT] | {"adapters": ["plural", "json"]} | asked
    ).json()["choices"][0]["message"]["content"]
    assert json.loads(content)["answer"] in ("ONE", "TWO")


def test_a_tool_that_must_be_called(http):
    function = {
        "name": "spell",
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["one", "two"]}},
            "required": ["word"],
            "additionalProperties": False,
        },
    }
    asked = {
        "max_tokens": 128,
        "temperature": 0,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "spell"}},
    }
    answer = posted(http, CHAT, GENERATING[CHAT] | {"adapters": ["plural", "json"]} | asked)
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "spell"
    assert MERGE_ID.fullmatch(answer.headers["x-lego-model"])


def test_a_conversation_of_stored_responses(http):
    first = posted(
        http, "/v1/responses", GENERATING["/v1/responses"] | SET | {"store": True}
    ).json()
    stored = http.get(f"/v1/responses/{first['id']}")
    assert stored.json()["output"] == first["output"]
    assert "x-lego-model" not in stored.headers
    asked = {"input": "Once more.", "previous_response_id": first["id"], "max_output_tokens": 4}
    second = posted(http, "/v1/responses", asked | SET).json()
    assert second["previous_response_id"] == first["id"]
    assert second["model"] == first["model"]
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_background_response_keeps_its_merge_until_it_ends(http, stream):
    asked = {
        "input": "Tell me a long story about a river.",
        "max_output_tokens": 96,
        "background": True,
        "store": True,
        "ignore_eos": True,
    }
    merge = {"adapters": ["numbers", {"name": "shout", "weight": 0.5 + stream}]}
    with http.stream("POST", "/v1/responses", json=asked | merge | {"stream": stream}) as queued:
        identity = queued.headers["x-lego-model"]
        lines = (line for line in queued.iter_lines() if line.startswith(("{", "data: {")))
        event = json.loads(next(lines).removeprefix("data: "))
        response = event["response"]["id"] if stream else event["id"]
    assert http.delete(f"/v1/adapters/merged/{identity}").status_code == 409
    state = ended(http, response)
    assert (state["status"], state["model"]) == ("incomplete", identity)  # its tokens are up
    assert state["usage"]["output_tokens"] == 96
    deadline = time.monotonic() + 30
    while (dropped := http.delete(f"/v1/adapters/merged/{identity}")).status_code == 409:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert dropped.status_code == 200


def ended(http: httpx.Client, response: str) -> dict[str, object]:
    while True:
        state = http.get(f"/v1/responses/{response}").json()
        if state["status"] not in ("queued", "in_progress"):
            return state
        time.sleep(0.05)


def test_what_is_in_an_answer_is_what_vllm_gives(http):
    """A set and the adapter of the same weights, which vLLM serves itself, differ in the name alone."""
    body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "logprobs": True}
    alone = posted(http, CHAT, body | {"model": "numbers"})
    merged = posted(
        http, CHAT, body | {"adapters": ["numbers"], "merge": {"method": "concat", "rank": RANK}}
    )
    ours = {name for name in merged.headers if name.startswith("x-lego-")}
    assert set(merged.headers) - ours == set(alone.headers)
    answers = [answer.json() for answer in (alone, merged)]
    for answer in answers:
        for key in ("id", "created", "model"):
            answer.pop(key)
        for choice in answer["choices"]:
            for token in choice["logprobs"]["content"]:
                token.pop("logprob")  # the factors are the same, their rounding is not
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def pooling(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server of a pooling model, tiny and random, and of the exact sum of two of its adapters."""
    folder = tmp_path_factory.mktemp("pooling")
    shape = SHAPES["tiny"]
    base = write_model(shape, folder / "model", model, weights=True)
    adapters = write_adapters(shape, folder, 2, RANK // 2)
    merged = merge_adapters(
        [load_adapter(path) for path in adapters.values()],
        MergeConfig(method="concat", rank=RANK),
    )
    save_adapter(merged, folder / "both")
    arguments = [
        str(base),
        f"--served-model-name={MODEL_NAME}",
        *("--runner=pooling", "--convert=embed", "--dtype=float32", "--max-model-len=256"),
        *("--enforce-eager", "--enable-lora", f"--max-lora-rank={RANK}", "--max-loras=3"),
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
        f"both={folder / 'both'}",
    ]
    with (
        ServerProcess(arguments, server_environment(), progress=print) as process,
        httpx.Client(base_url=process.url, timeout=120) as session,
    ):
        yield session


@pytest.mark.parametrize("path", POOLING)
def test_every_route_of_a_pooling_model_takes_a_set_in_every_form(pooling, path):
    if pooling.post(path, json=POOLING[path]).status_code == 404:
        pytest.skip("this vLLM has no such route for this model")
    check_all_forms(pooling, path, POOLING[path], "adapter0", "adapter1")


def test_a_set_embeds_as_its_exact_sum(pooling):
    def embedded(**form: object) -> list[float]:
        body = POOLING["/v1/embeddings"] | form
        return [
            x
            for d in posted(pooling, "/v1/embeddings", body).json()["data"]
            for x in d["embedding"]
        ]

    summed = embedded(adapters=["adapter0", "adapter1"], merge={"method": "concat", "rank": RANK})
    assert summed == pytest.approx(embedded(model="both"), abs=1e-4)
    for other in (MODEL_NAME, "adapter0", "adapter1"):
        assert summed != pytest.approx(embedded(model=other), abs=1e-2)


def test_a_pooling_server_has_no_route_that_nobody_thought_of(pooling):
    document = pooling.get("/openapi.json").json()
    posts = {path for path, operations in document["paths"].items() if "post" in operations}
    assert posts <= KNOWN
