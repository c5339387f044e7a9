"""The merge against a naive float64 reference, which is written from the paper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from lego_core import LoraAdapter, MergeConfig, merge_adapters
from tests import references, strategies

Weighted = tuple[list[LoraAdapter], list[float]]
NARROW = (torch.float32, torch.float16, torch.bfloat16)


def worst_error(weighted: Weighted, config: MergeConfig, dtype: torch.dtype) -> float:
    """Largest |B A - reference| / |reference| over the modules."""
    adapters, weights = weighted
    merged = merge_adapters(adapters, config, weights=weights, dtype=dtype)
    wanted = references.merge(adapters, config, weights)
    assert merged.modules.keys() == wanted.keys()
    return max(
        references.relative_error(references.delta(merged.modules[name]), wanted[name].delta)
        for name in wanted
    )


@settings(max_examples=100)
@given(
    weighted=strategies.weighted_sets(strategies.any_weights, NARROW), config=strategies.configs()
)
def test_merge_of_narrow_dtypes_equals_the_reference(
    weighted: Weighted, config: MergeConfig
) -> None:
    assert worst_error(weighted, config, torch.float32) < 1e-6


@settings(max_examples=100)
@given(weighted=strategies.weighted_sets(strategies.any_weights), config=strategies.configs())
def test_merge_in_float64_equals_the_reference(weighted: Weighted, config: MergeConfig) -> None:
    assert worst_error(weighted, config, torch.float64) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("restarts", [1, 4])
@pytest.mark.parametrize("norm", ["l2", "inf", "off"])
@pytest.mark.parametrize("align_sign", [False, True])
@pytest.mark.parametrize("balance", [False, True])
def test_merge_of_layers_wider_than_ranks_equals_the_reference(
    balance: bool,  # noqa: FBT001
    align_sign: bool,  # noqa: FBT001
    norm: str,
    restarts: int,
    dtype: torch.dtype,
) -> None:
    adapters = [
        strategies.adapter(
            f"adapter-{rank}", rank, rank, in_features=96, out_features=64, dtype=dtype
        )
        for rank in (4, 8, 16)
    ]
    config = MergeConfig.from_mapping(
        {
            "rank": 8,
            "balance": balance,
            "align_sign": align_sign,
            "parameter_reweighting": norm,
            "restarts": restarts,
        }
    )
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    assert worst_error((adapters, [1.0, 0.5, -0.8]), config, dtype) < bound


@given(weighted=strategies.weighted_sets(), config=strategies.configs())
def test_report_has_the_cluster_sizes_and_fidelity_of_the_reference(
    weighted: Weighted, config: MergeConfig
) -> None:
    adapters, weights = weighted
    _, report = merge_adapters(adapters, config, weights=weights, report=True)
    wanted = references.merge(adapters, config, weights)
    for name, module in report.modules.items():
        assert module.rank == config.rank
        assert module.cluster_sizes == wanted[name].cluster_sizes
        dense = references.cosine([wanted[name].delta], [wanted[name].weighted_sum])
        assert module.fidelity == pytest.approx(dense, abs=1e-9)
    dense = references.cosine(
        [module.delta for module in wanted.values()],
        [module.weighted_sum for module in wanted.values()],
    )
    assert report.fidelity == pytest.approx(dense, abs=1e-9)
