"""Check adapters against the base model they are meant for, by its config.json alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lego_core.adapter import LoraAdapter, LoraModule
from lego_core.errors import ConfigError, IncompatibleAdaptersError

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


def check_shapes(adapters: Iterable[LoraAdapter], base: str | os.PathLike[str]) -> None:
    """Check that the base model has every adapted module, in the adapter's shape.

    The base model is built without weights (on the meta device) by transformers, from its
    configuration. Code that comes with a model is never run.

    Args:
        adapters: what to check.
        base: the base model's folder, or its `config.json`. It is the caller's own and is
            trusted to be of sane size.

    Raises:
        ConfigError: transformers is missing, or does not know the base model.
        IncompatibleAdaptersError: it lacks a module, or the shapes disagree.
    """
    layers = _layers(base)
    for adapter in adapters:
        for name, module in adapter.modules.items():
            where = f"adapter {adapter.name!r}, module {name!r}"
            wanted = _shape_of(layers, name)
            if wanted is None:
                raise IncompatibleAdaptersError(
                    f"{where}: base model {str(base)!r} has no linear layer or embedding of that name"
                )
            found = _shape_of_module(module)
            if found != wanted:
                raise IncompatibleAdaptersError(
                    f"{where}: updates {_described(found)}, base model {str(base)!r} has "
                    f"{_described(wanted)}"
                )


_Shape = tuple[int, int, bool]
"""in_features, out_features, and whether it is an embedding."""


def _described(shape: _Shape) -> str:
    kind = "an embedding" if shape[2] else "a linear layer"
    return f"{kind} from {shape[0]} to {shape[1]} features"


def _shape_of_module(module: LoraModule) -> _Shape:
    return module.in_features, module.out_features, module.is_embedding


def _layers(base: str | os.PathLike[str]) -> Mapping[str, torch.nn.Module]:
    """Build the base model without weights; return its layers by name."""
    path = Path(base)
    if not path.exists():
        raise ConfigError(f"base model {str(base)!r}: no such folder or config.json", param="base")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415  # optional
    except ImportError as error:
        raise ConfigError(
            "checking adapters against a base model needs transformers: pip install transformers",
            param="base",
        ) from error
    auto_config: Any = AutoConfig
    auto_model: Any = AutoModelForCausalLM
    try:
        config = auto_config.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = auto_model.from_config(config, trust_remote_code=False)
    # A configuration that makes no sense can fail anywhere in the model's own code.
    except Exception as error:
        reason = str(error).partition("\n")[0][:300]
        raise ConfigError(
            f"base model {str(base)!r} cannot be built from its configuration by transformers "
            f"({type(error).__name__}: {reason})",
            param="base",
        ) from error
    return dict(model.named_modules())


def _shape_of(layers: Mapping[str, torch.nn.Module], name: str) -> _Shape | None:
    layer = layers.get(name)
    if layer is None:
        return _shape_of_expert(layers, name)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return None
    rows, columns = weight.shape
    if isinstance(layer, torch.nn.Embedding):
        return rows, columns, True
    if type(layer).__name__ == "Conv1D":  # GPT-2's linear layer, [in, out]
        return rows, columns, False
    return columns, rows, False


def _shape_of_expert(layers: Mapping[str, torch.nn.Module], name: str) -> _Shape | None:
    """Find a matrix of one expert where transformers keeps all experts in one tensor.

    `gate_up_proj` is [experts, 2 * inner, hidden] and `down_proj` [experts, hidden, inner].
    """
    match = _EXPERT.fullmatch(name)
    # Checkpoints of Mixtral, and adapters that go with them, have a name that transformers 5 has not.
    place = match[1].replace(".block_sparse_moe.", ".mlp.") if match else ""
    experts = layers.get(place)
    gate_up, down = (getattr(experts, part, None) for part in ("gate_up_proj", "down_proj"))
    if match is None or gate_up is None or down is None or gate_up.ndim != 3 or down.ndim != 3:
        return None
    count, hidden, inner = down.shape
    if int(match[2]) >= count or gate_up.shape != (count, 2 * inner, hidden):
        return None
    if match[3] in {"gate_proj", "up_proj", "w1", "w3"}:
        return hidden, inner, False
    return (inner, hidden, False) if match[3] in {"down_proj", "w2"} else None
