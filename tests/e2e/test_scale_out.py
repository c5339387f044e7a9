"""Several API servers, engines or ranks answer as a server of one process does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import httpx
import pytest
import torch

from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from vllm_lego.demo.server import LEGO_SERVE, ServerProcess, server_environment

SETS = [["adapter0", "adapter1", {"name": "adapter2", "weight": 0.5}]] + [
    list(pair) for pair in combinations([f"adapter{i}" for i in range(4)], 2)
]
PROMPTS = ["Once upon a time", "The capital of France is", "One, two, three"]

needs_two_gpus = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="takes two GPUs"
)


@pytest.fixture(scope="module")
def arguments(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small Llama whose heads two ranks can share, and four adapters that change its answers."""
    folder = tmp_path_factory.mktemp("tiny")
    adapters = write_adapters(SHAPES["tiny"], folder, 4, rank=8)
    return [
        str(write_model(SHAPES["tiny"], folder / "model", model, weights=True)),
        "--served-model-name=tiny",
        "--dtype=float32",  # ranks add in another order: bfloat16 would turn near-ties
        "--enforce-eager",
        "--max-model-len=256",
        "--max-num-seqs=16",
        "--gpu-memory-utilization=0.2",
        "--max-loras=4",
        "--max-lora-rank=8",
        "--lora-modules",
        *(f"{name}={path}" for name, path in adapters.items()),
    ]


def answers(server: ServerProcess) -> dict[tuple[int, str], list[str]]:
    """The tokens of every set and prompt, asked for by many clients at once, twice."""

    def ask(wanted: tuple[int, str]) -> tuple[list[str], str]:
        number, prompt = wanted
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        body |= {"adapters": SETS[number], "logprobs": 0, "ignore_eos": True}
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return choice["logprobs"]["tokens"], answer.headers["x-lego-model"]

    wanted = [(number, prompt) for number in range(len(SETS)) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        first, second = list(pool.map(ask, wanted)), list(pool.map(ask, wanted))
    assert first == second
    assert len({name for _, name in first}) == len(SETS)
    return {key: tokens for key, (tokens, _) in zip(wanted, first, strict=True)}


@pytest.fixture(scope="module")
def alone(arguments: list[str]) -> dict[tuple[int, str], list[str]]:
    with ServerProcess(arguments, server_environment(), command=LEGO_SERVE) as server:
        return answers(server)


def test_the_sets_answer_differently(alone):
    for prompt in PROMPTS:
        assert len({tuple(alone[number, prompt]) for number in range(len(SETS))}) == len(SETS)


@needs_two_gpus
@pytest.mark.parametrize(
    "flags",
    [
        ["--api-server-count=2"],
        ["--data-parallel-size=2"],
        ["--tensor-parallel-size=2"],
    ],
    ids=lambda flags: flags[0].strip("-"),
)
def test_answers_are_those_of_one_process(arguments, alone, flags):
    # Left to itself vLLM's CPU backend wants a NUMA node for each rank.
    unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment = server_environment() | unbound
    with ServerProcess(
        [*arguments, *flags], environment, command=LEGO_SERVE, progress=print
    ) as server:
        assert answers(server) == alone
        assert server.is_alive()
