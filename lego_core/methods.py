"""The merging methods: one table, one signature.

| name | source |
| --- | --- |
| `lego` | Zhao et al., ICLR 2025, https://arxiv.org/abs/2409.16167, with the gauge of `MergeConfig` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lego_core.cluster import cluster_units
from lego_core.config import MergeConfig
from lego_core.reassemble import Reassembled, reassemble
from lego_core.units import Stack


@dataclass(frozen=True, slots=True, eq=False)
class StackMerge:
    """What a method makes of one stack: the merged units and, per module, the cluster sizes."""

    merged: Reassembled
    sizes: torch.Tensor


Method = Callable[[Stack, MergeConfig, float], StackMerge]


def lego(stack: Stack, config: MergeConfig, rank: float) -> StackMerge:
    """Cluster the units in parameter space and keep one centroid per cluster."""
    signs = cluster_units(
        stack.gram_a + stack.gram_b,
        config.rank,
        align_sign=config.align_sign,
        restarts=config.restarts,
        seed=config.seed,
    )
    return StackMerge(reassemble(stack, signs, config, rank), signs.abs().sum(dim=2))


METHODS: Mapping[str, Method] = {"lego": lego}
