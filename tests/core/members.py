"""Small adapters that the tests of the methods merge, and how to compare what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lego_core import (
    LoraAdapter,
    MergeConfig,
    MergeReport,
    merge_adapters,
)
from lego_core.methods import METHODS
from tests import references, strategies
from tests.references import Array

Q, K, DOWN, EMBED = "layers.0.q_proj", "layers.0.k_proj", "layers.1.down_proj", "embed_tokens"
SHAPES = {Q: (13, 11), K: (13, 6), DOWN: (17, 11), EMBED: (19, 11)}
TOUCHED = ((Q, K, EMBED), (Q, DOWN), (K, Q, DOWN, EMBED))
WEIGHTS = (1.0, 0.5, -0.8)
EVERY_METHOD = tuple(METHODS)
TIES_LIKE = ("ties", "dare_ties", "knots", "core_space")


def config_of(method: str, rank: int = 4, **options: Any) -> MergeConfig:
    """A configuration of the method; the exact sum gets the rank that it takes."""
    return MergeConfig(method=method, rank=16 if method == "concat" else rank, **options)


def members_of(
    method: str, seed: int = 0, *, dtype: torch.dtype = torch.float64
) -> list[LoraAdapter]:
    """Three adapters of their own module sets, ranks (where the method can) and scalings.

    Their digests are given, so that what changes them does not change their canonical order.
    """
    adapters = []
    for i, touched in enumerate(TOUCHED):
        modules = {}
        for j, name in enumerate(touched):
            rank = 3 if method == "linear" else 2 + (i + j) % 3
            drawn = strategies.module(
                100 * seed + 10 * i + j, rank, *SHAPES[name], scaling=0.5 + i, dtype=dtype
            )
            modules[name] = dataclasses.replace(drawn, is_embedding=name == EMBED)
        adapters.append(LoraAdapter(f"adapter-{i}", modules, digest=f"{i}"))
    return adapters


def merged_with(
    method: str, adapters: Sequence[LoraAdapter], **options: Any
) -> tuple[LoraAdapter, MergeReport]:
    """The merge in float64, with weights of both signs unless told otherwise."""
    fields = {"config": config_of(method), "weights": WEIGHTS, "device": "cpu"} | options
    return merge_adapters(adapters, **fields, report=True)


def touching(
    adapters: Sequence[LoraAdapter], weights: Sequence[float], name: str
) -> list[tuple[LoraAdapter, float]]:
    return [
        (adapter, weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        if name in adapter.modules
    ]


def weighted_deltas(
    adapters: Sequence[LoraAdapter], weights: Sequence[float], name: str
) -> list[Array]:
    return [w * references.delta(a.modules[name]) for a, w in touching(adapters, weights, name)]


def balanced_members(
    adapters: Sequence[LoraAdapter], weights: Sequence[float], name: str
) -> list[list[references.Unit]]:
    return [
        [references.balanced(unit) for unit in references.disassemble(adapter, name, weight)]
        for adapter, weight in touching(adapters, weights, name)
    ]


def assert_same(found: LoraAdapter, wanted: LoraAdapter, bound: float) -> None:
    assert list(found.modules) == list(wanted.modules)
    for name, module in found.modules.items():
        assert module.is_embedding == wanted.modules[name].is_embedding
        other = wanted.modules[name]
        assert references.relative_error(references.delta(module), references.delta(other)) < bound


def assert_identical(found: LoraAdapter, wanted: LoraAdapter) -> None:
    assert list(found.modules) == list(wanted.modules)
    for name, module in found.modules.items():
        assert torch.equal(module.lora_a, wanted.modules[name].lora_a)
        assert torch.equal(module.lora_b, wanted.modules[name].lora_b)


def reference(
    config: MergeConfig, adapters: Sequence[LoraAdapter], weights: Sequence[float], name: str
) -> Array:
    """What the method makes of one module, before it is cut to its rank."""
    deltas = weighted_deltas(adapters, weights, name)
    if config.method in {"svd", "concat"}:
        return np.sum(deltas, axis=0)  # type: ignore[no-any-return]
    if config.method == "ties":
        return references.ties_mean(deltas, config.density)
    if config.method == "dare_ties":
        assert config.density == 1
        return references.elected_mean(deltas)
    if config.method == "knots":
        return references.knots_mean(deltas, config.density)
    if config.method == "core_space":
        return references.core_space_mean(balanced_members(adapters, weights, name), config.density)
    raise AssertionError(config.method)
