"""Both ways between us and the real `peft`, on a tiny random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lego_core import (
    AdapterFormatError,
    IncompatibleAdaptersError,
    LoraAdapter,
    MergeConfig,
    check_shapes,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from tests import references, strategies

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

LLAMA = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=32,
)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def save_with_peft(folder: Path, **options: Any) -> PeftModel:
    """A peft adapter in training mode, with random weights in both halves, saved by peft."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ATTENTION} | options)
    model = get_peft_model(LlamaForCausalLM(LLAMA), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def peft_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert references.relative_error(found.double().numpy(), wanted.double().numpy()) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.1\..*_proj"},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}},
        {"alpha_pattern": {r".*\.0\.self_attn\..*": 3, "o_proj": 9}},
        {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"k_proj": 5}, "use_rslora": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_what_peft_saves_loads_with_the_same_update(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    wanted = peft_deltas(save_with_peft(tmp_path, **options))
    adapter = load_adapter(tmp_path)
    assert adapter.modules.keys() == wanted.keys()
    for name, module in adapter.modules.items():
        assert_close(module.delta(), wanted[name])


def test_scaling_is_that_of_peft(tmp_path: Path) -> None:
    model = save_with_peft(tmp_path, use_rslora=True, rank_pattern={"q_proj": 2})
    layers = dict(model.base_model.model.named_modules())
    for name, module in load_adapter(tmp_path).modules.items():
        assert module.scaling == pytest.approx(layers[name].scaling["default"], rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_that_we_save_loads_in_peft_with_the_same_update(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    save_with_peft(tmp_path / "a")
    save_with_peft(tmp_path / "b", r=8, target_modules=["q_proj", "up_proj"])
    members = [load_adapter(tmp_path / name) for name in "ab"]
    merged = merge_adapters(members, MergeConfig(rank=5), weights=[1.0, -0.5], dtype=dtype)
    save_adapter(merged, tmp_path / "out")
    found = peft_deltas(PeftModel.from_pretrained(LlamaForCausalLM(LLAMA), tmp_path / "out"))
    assert found.keys() == merged.modules.keys()
    for name, module in merged.modules.items():
        assert_close(found[name], module.delta())


def test_modules_that_share_a_name_with_ours_get_no_update_in_peft(tmp_path: Path) -> None:
    """`target_modules` are ends of names for PEFT: in full, they name no module of layer 1."""
    name = "model.layers.0.self_attn.q_proj"
    module = strategies.module(0, 3, 16, 16, scaling=0.5, dtype=torch.float32)
    save_adapter(LoraAdapter("one layer", {name: module}), tmp_path)
    found = peft_deltas(PeftModel.from_pretrained(LlamaForCausalLM(LLAMA), tmp_path))
    assert_close(found.pop(name), module.delta())
    assert not found


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_peft_saves_of_other_kinds_is_refused(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    save_with_peft(tmp_path / "sql", **options)
    with pytest.raises(AdapterFormatError, match=f"'sql'.*{named}"):
        load_adapter(tmp_path / "sql")


def test_embedding_and_head_come_back_as_they_were(tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    model = save_with_peft(tmp_path / "a", target_modules=targets, use_rslora=True)
    adapter = load_adapter(tmp_path / "a")
    embedding = adapter.modules["model.embed_tokens"]
    assert embedding.is_embedding
    assert not adapter.modules["lm_head"].is_embedding
    assert_close(embedding.delta().T, peft_deltas(model)["model.embed_tokens"])
    check_shapes([adapter], config_of(tmp_path))
    save_adapter(adapter, tmp_path / "out", provenance={"members": ["a"]})
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "out")
    tokens = torch.arange(8)[None]
    wanted = PeftModel.from_pretrained(LlamaForCausalLM(LLAMA), tmp_path / "a")
    wanted.load_state_dict(again.state_dict(), strict=True)
    assert torch.allclose(again.eval()(tokens).logits, wanted.eval()(tokens).logits, atol=1e-4)
    assert peft_deltas(again).keys() == adapter.modules.keys()


def config_of(folder: Path) -> Path:
    LLAMA.architectures = ["LlamaForCausalLM"]
    LLAMA.save_pretrained(folder)
    return folder


def test_shapes_that_disagree_with_the_base_model(tmp_path: Path) -> None:
    for name, message in (("q_proj", "no linear layer"), ("lm_head", "'lm_head'.*from 7 to 5")):
        adapter = LoraAdapter("sql", {name: strategies.module(0, 2)})
        with pytest.raises(IncompatibleAdaptersError, match=f"'sql'.*{message}"):
            check_shapes([adapter], config_of(tmp_path))
