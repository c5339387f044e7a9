"""Bad input gets the contract's clear errors, and the server goes on."""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from lego_core import LoraAdapter, LoraModule, load_adapter, save_adapter
from tests.e2e.conftest import BODY_BYTES, QUEUED_MERGES, ask
from vllm_lego.demo.server import MODEL_NAME, shipped_adapters
from vllm_lego.looks import SHARED_S

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
SET = {"adapters": ["numbers", "shout"]}


def refused(answer: httpx.Response, status: int) -> dict[str, object]:
    """Check the shape of OpenAI's error object and return it."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert "Traceback" not in answer.text
    assert not re.search(r"(?<!\w)/\w", str(error["message"])), "a path of the machine's"
    return error


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"adapters": "numbers"}, 400, "adapters", "must be a list"),
        ({"adapters": ["numbers", "numbers"]}, 400, "adapters", "listed twice"),
        (
            {"adapters": [{"name": "numbers", "weight": "high"}]},
            400,
            "adapters[0].weight",
            "must be a finite number, not 'high'",
        ),
        (SET | {"merge": {"rank": 16}}, 400, "merge.rank", "at most 8"),
        (SET | {"merge": {"rank": 0}}, 400, "merge.rank", "from 1 to 512"),
        (SET | {"merge": {"method": "soup"}}, 400, "merge.method", "one of lego"),
        (SET | {"merge": {"rnak": 4}}, 400, "merge.rnak", "unknown field 'rnak'"),
        (SET | {"merge": 4}, 400, "merge", "must be an object"),
        (SET | {"model": "numbers"}, 400, "model", "must be the base model"),
        (SET | {"model": "nobody"}, 400, "model", "must be the base model"),
        (SET | {"model": 7}, 400, "model", "must be the base model"),
        ({"model": "numbers+"}, 400, "model", "empty adapter name"),
        ({"adapters": ["numbers", "nobody"]}, 404, "adapters", "'nobody' is not served here"),
        ({"adapters": ["nobody"]}, 404, "adapters", "'nobody' is not served here"),
        ({"adapters": ["../numbers"]}, 404, "adapters", "is not served here"),
        ({"model": "numbers+nobody"}, 404, "model", "'nobody' is not served here"),
    ],
)
def test_bad_requests(http, fields, status, param, says):
    answer = http.post(CHAT, json=HELLO | {"model": MODEL_NAME} | fields)
    if says == "is not served here":  # the name itself holds a slash
        assert answer.status_code == status
        return
    error = refused(answer, status)
    assert error["param"] == param
    assert says in error["message"]


def test_a_nonfinite_weight_is_refused(http):
    body = json.dumps(HELLO | {"adapters": ["numbers", {"name": "shout", "weight": 1}]})
    answer = http.post(
        CHAT,
        content=body.replace('"weight": 1', '"weight": 1e999'),
        headers={"content-type": "application/json"},
    )
    assert refused(answer, 400)["param"] == "adapters[1].weight"


def test_a_lone_surrogate_is_a_bad_request(http):
    body = json.dumps(HELLO | {"adapters": [{"name": "numbers", "\ud800": 1}]})
    answer = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert "unknown field" in refused(answer, 400)["message"]


def test_malformed_json_gets_vllms_own_error(http):
    answer = http.post(
        CHAT, content=b'{"adapters": ["numbers"', headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)


@pytest.mark.parametrize("key", [None, "wrong"])
@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/v1/adapters", "/v1/adapters/merged"])
def test_strangers_learn_nothing(server, metric, path, key):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    bodies = [
        HELLO | {"prompt": "hi", "adapters": adapters}
        for adapters in (["numbers", "plural"], ["nobody", "nowhere"], "nonsense", [7])
    ]
    misses = metric("vllm_lego_requests_total", result="miss")
    with httpx.Client(base_url=server.url, headers=headers) as stranger:
        answers = [
            stranger.get(path) if "adapters" in path else stranger.post(path, json=body)
            for body in bodies
        ]
    assert {(a.status_code, a.text) for a in answers} == {(401, '{"error":"Unauthorized"}')}
    assert metric("vllm_lego_requests_total", result="miss") == misses


def test_a_body_over_the_limit(http):
    body = HELLO | SET | {"user": "x" * BODY_BYTES}
    assert f"limit of {BODY_BYTES} bytes" in str(refused(http.post(CHAT, json=body), 413))


@pytest.fixture
def broken(replaceable: Path):
    """The folder of a served adapter, put right again afterwards."""
    time.sleep(SHARED_S)  # the request before may have looked at it just now
    yield replaceable
    shutil.copytree(shipped_adapters()["shout"], replaceable, dirs_exist_ok=True)


def rewrite_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ],
)
def test_adapters_that_cannot_be_merged(http, broken, fields, says):
    rewrite_config(broken, **fields)
    error = refused(http.post(CHAT, json=HELLO | {"adapters": ["numbers", "replaceable"]}), 422)
    assert "'replaceable'" in error["message"]
    assert says in error["message"]


def test_an_adapter_of_another_base_model(http, broken):
    name = "model.layers.0.self_attn.q_proj"
    other = LoraAdapter("x", {name: LoraModule(torch.ones(4, 64), torch.ones(64, 4))})
    save_adapter(other, broken, overwrite=True)
    error = refused(http.post(CHAT, json=HELLO | {"adapters": ["numbers", "replaceable"]}), 422)
    assert "'replaceable'" in error["message"]
    assert name in error["message"]
    assert "64" in error["message"]


def test_an_adapter_for_layers_that_the_base_model_lacks(http, broken):
    name = "model.layers.99.self_attn.q_proj"
    other = LoraAdapter("x", {name: LoraModule(torch.ones(4, 576), torch.ones(576, 4))})
    save_adapter(other, broken, overwrite=True)
    error = refused(http.post(CHAT, json=HELLO | {"adapters": ["numbers", "replaceable"]}), 422)
    assert name in error["message"]


def test_truncated_weights(http, broken):
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    error = refused(http.post(CHAT, json=HELLO | {"adapters": ["numbers", "replaceable"]}), 422)
    assert "'replaceable'" in error["message"]


def test_missing_weights(http, broken):
    (broken / "adapter_model.safetensors").unlink()
    error = refused(http.post(CHAT, json=HELLO | {"adapters": ["numbers", "replaceable"]}), 422)
    assert "'replaceable' has no adapter_model.safetensors" in error["message"]


def test_an_adapter_replaced_in_place_has_a_new_identity(client, broken):
    before = ask(client, "Hello", adapters=["numbers", "replaceable"])[1]
    changed = load_adapter(broken)
    halved = {
        name: LoraModule(module.lora_a / 2, module.lora_b, module.scaling)
        for name, module in changed.modules.items()
    }
    save_adapter(LoraAdapter("x", halved), broken, overwrite=True)
    after = ask(client, "Hello", adapters=["numbers", "replaceable"])[1]
    assert after["x-lego-cache"] == "miss"
    assert before["x-lego-model"] != after["x-lego-model"]


def test_a_full_queue_says_when_to_come_back(http, metric):
    """Slow merges (64 restarts over every adapter), twice as many as the queue takes."""
    sets = [
        HELLO
        | {"adapters": list(shipped_adapters()), "merge": {"restarts": 64, "seed": 100 + seed}}
        for seed in range(2 * QUEUED_MERGES)
    ]
    with ThreadPoolExecutor(len(sets)) as pool:
        answers = list(pool.map(lambda body: http.post(CHAT, json=body), sets))
    busy = [a for a in answers if a.status_code != 200]
    assert busy
    assert len(busy) < len(sets)
    for answer in busy:
        assert "try again later" in refused(answer, 503)["message"]
        assert answer.headers["retry-after"] == "1"
    assert metric("vllm_lego_errors_total", reason="busy") >= len(busy)
    assert metric("vllm_lego_merges_in_progress") == 0


@pytest.fixture(autouse=True)
def _server_goes_on(client):
    yield
    answer, _ = ask(client, "Write 4721 in words.", adapters=["numbers", "shout"], max_tokens=8)
    assert answer.startswith("FOUR THOUSAND")
