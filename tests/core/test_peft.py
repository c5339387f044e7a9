"""Both ways between us and the real `peft`, on a tiny random Llama."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

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
MIXTRAL = MixtralConfig(**LLAMA.to_dict() | {"num_local_experts": 3, "model_type": "mixtral"})
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def save_with_peft(folder: Path, **options: Any) -> PeftModel:
    """A peft adapter in training mode, with random weights in both halves, saved by peft."""
    return save_of(LlamaForCausalLM(LLAMA), folder, **options)


def save_of(base: torch.nn.Module, folder: Path, **options: Any) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ATTENTION} | options)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # halves that start as zeros would hide what is lost
            torch.nn.init.normal_(parameter, std=0.3)
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


MIXED = (
    {
        "target_modules": ["embed_tokens", "lm_head", "q_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"lm_head": 2, r"layers\.1\.self_attn\.q_proj": 3},
    },
    {
        "target_modules": ["embed_tokens", "lm_head", "v_proj", "down_proj"],
        "r": 3,
        "alpha_pattern": {"embed_tokens": 5},
    },
)
"""Embedding and head in both, modules of one alone, six combinations of ranks."""


@pytest.mark.parametrize(
    ("config", "is_exact"),
    [
        (MergeConfig(method="concat", rank=9), True),
        (MergeConfig(method="svd", rank=9), True),
        (MergeConfig(rank=9, output_reweighting=False), True),
        (MergeConfig(rank=3), False),
        (MergeConfig(method="lego-paper", rank=3), False),
    ],
)
def test_round_trip_through_peft_answers_as_the_dense_weights_do(
    tmp_path: Path, config: MergeConfig, *, is_exact: bool
) -> None:
    """Trained, saved by peft, loaded, merged, saved, loaded by peft: the logits of a real model."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LLAMA).eval()
    dense = copy.deepcopy(base)
    weights = [1.0, -0.5]
    trained = [
        save_of(copy.deepcopy(base), tmp_path / name, **options)
        for name, options in zip("ab", MIXED, strict=True)
    ]
    members = [load_adapter(tmp_path / name) for name in "ab"]
    check_shapes(members, config_of(tmp_path))
    merged = merge_adapters(members, config, weights=weights)
    assert [name for name, m in merged.modules.items() if m.is_embedding] == ["model.embed_tokens"]
    save_adapter(merged, tmp_path / "out", provenance={"members": ["a", "b"]})

    layers: dict[str, Any] = dict(dense.named_modules())
    if is_exact:  # the sum of peft's own updates
        for model, weight in zip(trained, weights, strict=True):
            for name, delta in peft_deltas(model).items():
                layers[name].weight.data += weight * delta
    else:
        for name, module in merged.modules.items():
            delta = module.delta()
            layers[name].weight.data += delta.T if module.is_embedding else delta
    served = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    tokens = torch.arange(LLAMA.vocab_size).view(4, -1)
    with torch.no_grad():
        found, wanted, plain = (model(tokens).logits for model in (served, dense, base))
    assert (found - wanted).abs().max() < 1e-4
    assert (wanted - plain).abs().max() > 0.1, "the adapters would do nothing"


def test_embedding_and_head_load_as_peft_made_them(tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    model = save_with_peft(tmp_path / "a", target_modules=targets, use_rslora=True)
    adapter = load_adapter(tmp_path / "a")
    wanted = peft_deltas(model)
    assert adapter.modules.keys() == wanted.keys()
    for name, module in adapter.modules.items():
        assert module.is_embedding == (name == "model.embed_tokens")
        assert wanted[name].norm() > 0.1
        assert_close(module.delta().T if module.is_embedding else module.delta(), wanted[name])


def of_experts() -> LlamaForCausalLM:
    """A model whose experts are layers of their own, named as in DeepSeek's and Qwen's checkpoints."""
    model = LlamaForCausalLM(LLAMA)
    for layer in model.model.layers:
        expert = torch.nn.ModuleDict(
            {"up_proj": torch.nn.Linear(16, 8), "down_proj": torch.nn.Linear(8, 16)}
        )
        layer.mlp = torch.nn.ModuleDict(
            {"experts": torch.nn.ModuleList(copy.deepcopy(expert) for _ in range(3))}
        )
    return model


def test_experts_come_back_by_name(tmp_path: Path) -> None:
    targets = (["up_proj", "down_proj"], r".*\.1\.mlp\.experts\.[01]\.up_proj")
    deltas = [
        peft_deltas(save_of(of_experts(), tmp_path / name, target_modules=of, r=rank))
        for name, of, rank in zip("ab", targets, (2, 3), strict=True)
    ]
    members = [load_adapter(tmp_path / name) for name in "ab"]
    assert [member.modules.keys() for member in members] == [of.keys() for of in deltas]
    assert set(members[1].modules) == {f"model.layers.1.mlp.experts.{i}.up_proj" for i in (0, 1)}
    save_adapter(merge_adapters(members, MergeConfig(method="concat", rank=5)), tmp_path / "out")
    found = peft_deltas(PeftModel.from_pretrained(of_experts(), tmp_path / "out"))
    assert found.keys() == deltas[0].keys()
    for name, delta in found.items():
        assert_close(delta, sum(of[name] for of in deltas if name in of))


def of_mixtral(name: str, rank: int) -> LoraAdapter:
    """As peft and vLLM name Mixtral's experts, which transformers 5 keeps in one tensor."""
    shapes = {"w1": (16, 24), "w2": (24, 16), "w3": (16, 24)}
    modules = {
        f"model.layers.1.block_sparse_moe.experts.{expert}.{part}": strategies.module(
            expert, rank, *shape, dtype=torch.float32
        )
        for expert in range(3)
        for part, shape in shapes.items()
    }
    return LoraAdapter(name, modules)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")  # of the names peft gives them itself
def test_experts_of_mixtral_answer_as_the_dense_weights_do(tmp_path: Path) -> None:
    base = MixtralForCausalLM(MIXTRAL).eval()
    members = [of_mixtral("a", 1), of_mixtral("b", 2)]
    base.config.save_pretrained(tmp_path)
    check_shapes(members, tmp_path)
    merged = merge_adapters(members, MergeConfig(method="concat", rank=3), weights=[0.1, -0.2])
    save_adapter(merged, tmp_path / "out")
    dense = copy.deepcopy(base)
    experts: Any = dense.model.layers[1].mlp.experts
    for member, weight in zip(members, (0.1, -0.2), strict=True):
        for name, module in member.modules.items():
            expert, part = name.split(".")[-2:]
            where = {"w1": slice(0, 24), "w2": slice(None), "w3": slice(24, 48)}[part]
            weights = experts.down_proj if part == "w2" else experts.gate_up_proj
            weights.data[int(expert), where] += weight * module.delta()
    served = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    tokens = torch.arange(LLAMA.vocab_size).view(4, -1)
    with torch.no_grad():
        found, wanted, plain = (model(tokens).logits for model in (served, dense, base))
    assert (found - wanted).abs().max() < 1e-4
    assert (wanted - plain).abs().max() > 0.01, "the adapters would do nothing"


@pytest.mark.parametrize("name", ["experts.3.w1", "experts.0.w4", "experts.0.w2", "gate.0.w1"])
def test_experts_that_the_base_model_has_not(tmp_path: Path, name: str) -> None:
    MixtralForCausalLM(MIXTRAL).config.save_pretrained(tmp_path)
    module = strategies.module(0, 2, 16, 24)
    adapter = LoraAdapter("sql", {f"model.layers.1.block_sparse_moe.{name}": module})
    with pytest.raises(IncompatibleAdaptersError, match=f"'sql'.*{name}"):
        check_shapes([adapter], tmp_path)


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    """What peft makes of transformers' own mixtures of experts: an update of bare parameters."""
    base = MixtralForCausalLM(MIXTRAL)
    options = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    save_of(base, tmp_path / "sql", **options)
    with pytest.raises(AdapterFormatError, match=r"'sql'.*target_parameters.*down_proj"):
        load_adapter(tmp_path / "sql")


def config_of(folder: Path) -> Path:
    LLAMA.architectures = ["LlamaForCausalLM"]
    LLAMA.save_pretrained(folder)
    return folder


def test_shapes_that_disagree_with_the_base_model(tmp_path: Path) -> None:
    for name, message in (("q_proj", "no linear layer"), ("lm_head", "'lm_head'.*from 7 to 5")):
        adapter = LoraAdapter("sql", {name: strategies.module(0, 2)})
        with pytest.raises(IncompatibleAdaptersError, match=f"'sql'.*{message}"):
            check_shapes([adapter], config_of(tmp_path))
