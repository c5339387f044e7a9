"""`concat` serves y = Wx + s0 B0 A0 x + s1 B1 A1 x, as PEFT with both adapters active computes it.

In float32: in bfloat16 the two roundings alone differ by more than what is to be shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_lego.demo.server import (
    MAX_LORA_RANK,
    ServerProcess,
    server_arguments,
    server_environment,
    shipped_adapters,
)

PAIR = ("json", "signoff")  # of rank 4 each: their exact sum fits the server's 8
TEXT = 'The plural of city is {"answer": "cities"}. Kind regards, your assistant.'


@pytest.fixture(scope="module")
def float32(model: Path) -> Iterator[httpx.Client]:
    adapters = {name: shipped_adapters()[name] for name in PAIR}
    arguments = [
        "--dtype=float32" if a.startswith("--dtype") else a
        for a in server_arguments(model, adapters)
    ]
    with (
        ServerProcess(arguments, server_environment(), progress=print) as process,
        httpx.Client(base_url=process.url, timeout=120) as session,
    ):
        yield session


@pytest.fixture(scope="module")
def peft(model: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, shipped_adapters()[PAIR[0]], adapter_name=PAIR[0])
    wrapped.load_adapter(shipped_adapters()[PAIR[1]], adapter_name=PAIR[1])
    wrapped.base_model.set_adapter(list(PAIR))
    return wrapped.eval()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4), (1.5, 0.0)])
def test_concat_is_the_exact_weighted_sum(float32, peft, model, weights):
    prompt = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    body = {
        "prompt": prompt,
        "adapters": [{"name": n, "weight": w} for n, w in zip(PAIR, weights, strict=True)],
        "merge": {"method": "concat", "rank": MAX_LORA_RANK},
        "max_tokens": 1,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }
    answer = float32.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    served = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(prompt)]
    for layer in (m for m in peft.modules() if isinstance(m, LoraLayer)):
        for name, weight in zip(PAIR, weights, strict=True):
            layer.set_scale(name, weight)
    with torch.no_grad():
        logits = peft(torch.tensor([prompt])).logits[0, :-1]
        with peft.disable_adapter():
            plain = peft(torch.tensor([prompt])).logits[0, :-1]
    targets = torch.tensor(prompt[1:])[:, None]
    expected, base = (x.log_softmax(-1).gather(1, targets)[:, 0] for x in (logits, plain))
    assert served == pytest.approx(expected.tolist(), abs=1e-2)
    assert served != pytest.approx(base.tolist(), abs=1e-1)  # the adapters do something
