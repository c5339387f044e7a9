"""The server of all these tests was started by `vllm-lego serve`, with little said."""

from __future__ import annotations

from tests.e2e.conftest import ask
from vllm_lego.demo.server import MAX_LORA_RANK, shipped_adapters


def test_what_was_not_given_was_chosen_and_said(server):
    adapters = len(shipped_adapters()) + 1
    told = [line for line in server.log.read_text().splitlines() if line.startswith("vllm-lego:")]
    assert len(told) == 1
    assert f"adds --enable-lora --max-lora-rank={MAX_LORA_RANK} (" in told[0]
    assert f"({adapters} adapters named, highest rank {MAX_LORA_RANK})" in told[0]


def test_the_rank_chosen_is_that_of_the_engine(client, http):
    body = {"prompt": "Hello", "max_tokens": 1, "adapters": ["numbers", "shout"]}
    refused = http.post("/v1/completions", json=body | {"merge": {"rank": MAX_LORA_RANK + 1}})
    assert refused.status_code == 400
    assert f"at most {MAX_LORA_RANK}" in refused.json()["error"]["message"]
    assert ask(client, "Write 4721 in words.", adapters=["numbers", "shout"])[0].startswith("FOUR")
