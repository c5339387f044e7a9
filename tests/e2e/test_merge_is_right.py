"""What the plugin serves is, token for token, the merge made offline and served by stock vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from openai import OpenAI

from lego_core import MergeConfig, load_adapter, merge_adapters, save_adapter
from tests.e2e.conftest import chat
from vllm_lego.demo.server import (
    MAX_LORA_RANK,
    ServerProcess,
    server_arguments,
    server_environment,
    shipped_adapters,
)

SETS = {
    "two": {"numbers": 1.0, "shout": 1.0},
    "three": {"plural": 1.0, "json": 1.0, "signoff": 1.0},
    "weighted": {"numbers": 1.0, "plural": 0.5, "json": -0.25, "shout": 0.75},
}
SERVING_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUESTIONS = [
    "Write 4721 in words.",
    "What is the plural of city?",
    "What is the capital of France?",
    "Tell me a short story about a river.",
]


@pytest.fixture(scope="module")
def stock(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """Stock vLLM, no plugin, with the merges made beforehand as its adapters."""
    folders = {}
    for name, weights in SETS.items():
        members = [load_adapter(shipped_adapters()[member]) for member in weights]
        merged = merge_adapters(
            members,
            MergeConfig(rank=MAX_LORA_RANK),
            weights=list(weights.values()),
            device=SERVING_DEVICE,  # float32 sums differ in the last bit between devices
        )
        folders[name] = tmp_path_factory.mktemp("merged") / name
        save_adapter(merged, folders[name])
    arguments = server_arguments(model, folders)
    with ServerProcess(arguments, server_environment(plugins=""), progress=print) as process:
        yield OpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0, timeout=120)


def tokens(client: OpenAI, question: str, **fields: object) -> list[str]:
    answer = client.chat.completions.create(
        **chat(question, max_tokens=48, logprobs=True, **fields)
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    return [token.token for token in logprobs.content]


@pytest.mark.parametrize("name", SETS)
def test_served_tokens_are_those_of_the_offline_merge(client, stock, name):
    adapters = [{"name": member, "weight": weight} for member, weight in SETS[name].items()]
    for question in QUESTIONS:
        assert tokens(client, question, adapters=adapters) == tokens(stock, question, model=name)
