"""Models and adapters of a given shape with random weights, as files that vLLM loads."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lego_core import LoraAdapter, LoraModule, save_adapter

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama: the widths that decide what an adapter weighs."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 49152  # of SmolLM2's tokenizer

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of every linear layer by name."""
        kv = self.hidden // self.heads * self.kv_heads
        block = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {
            f"model.layers.{i}.{name}": size
            for i in range(self.layers)
            for name, size in block.items()
        }


SHAPES = {
    "tiny": Shape(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2),
    "smollm2": Shape(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3),
    "1b": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8),
    "8b": Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8),
}


def write_model(shape: Shape, folder: Path, tokenizer: Path, *, weights: bool) -> Path:
    """Write a Llama's configuration and SmolLM2's tokenizer, and random weights if wanted.

    Without weights vLLM serves it with `--load-format dummy`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in _TOKENIZER_FILES:
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, folder)
    shutil.copy(tokenizer / "generation_config.json", folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if weights:
        save_file(_random_weights(shape), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_adapters(
    shape: Shape, folder: Path, count: int, rank: int, strength: float = 1.0
) -> dict[str, Path]:
    """Write adapters of all linear layers with random weights in bfloat16. Returns folders by name."""
    adapters = {f"adapter{i}": folder / f"adapter{i}" for i in range(count)}

    def write(seed: int, name: str) -> None:
        draws = torch.Generator().manual_seed(seed)
        modules = {
            linear: LoraModule(
                (torch.randn(rank, width, generator=draws) / width**0.5).bfloat16(),
                (torch.randn(height, rank, generator=draws) * strength / rank**0.5).bfloat16(),
            )
            for linear, (height, width) in shape.linears().items()
        }
        save_adapter(LoraAdapter(name, modules), adapters[name])

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(write, range(count), adapters))
    return adapters


def _random_weights(shape: Shape) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)

    def matrix(height: int, width: int) -> torch.Tensor:
        return (torch.randn(height, width, generator=draws) / width**0.5).bfloat16()

    one = torch.ones(shape.hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": matrix(shape.vocabulary, shape.hidden)}
    tensors |= {f"{name}.weight": matrix(*size) for name, size in shape.linears().items()}
    for i in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = one.clone()
    return tensors | {"model.norm.weight": one}
