"""Each merging method against what its paper says, naively."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lego_core import (
    ConfigError,
    IncompatibleAdaptersError,
    LoraAdapter,
    LoraModule,
    MergeConfig,
    merge_adapters,
)
from tests import references, strategies
from tests.core.members import (
    EVERY_METHOD,
    SHAPES,
    WEIGHTS,
    K,
    Q,
    assert_identical,
    assert_same,
    config_of,
    members_of,
    merged_with,
    reference,
    touching,
    weighted_deltas,
)
from tests.references import Array

# Each method against its reference


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rank", [1, 3, 6, 11, 14])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd", {}),
        ("concat", {}),
        ("ties", {"density": 0.2}),
        ("ties", {"density": 1.0}),
        ("ties", {"density": 0.01}),
        ("dare_ties", {"density": 1.0}),
        ("knots", {"density": 0.2}),
        ("knots", {"density": 1.0}),
        ("core_space", {"density": 0.2}),
        ("core_space", {"density": 1.0}),
    ],
)
def test_result_is_the_references_cut_to_the_rank(
    method: str, options: dict[str, Any], rank: int, seed: int
) -> None:
    adapters = members_of(method, seed)
    config = config_of(method, rank, **options)
    merged, _ = merged_with(method, adapters, config=config)
    for name, module in merged.modules.items():
        wanted = references.truncated(reference(config, adapters, WEIGHTS, name), config.rank)
        assert references.relative_error(references.delta(module), wanted) < 1e-6


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("rank", [2, 8, 24])
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_cut_of_a_large_dense_matrix_is_nearly_the_best(
    method: str, rank: int, density: float
) -> None:
    """What is left after trimming has a long tail of singular values, where iteration is slow."""
    adapters = [
        strategies.adapter(f"{i}", i, 8, in_features=192, out_features=160) for i in range(3)
    ]
    at_full_rank = config_of(method, 160, density=density)
    dense = references.delta(merge_adapters(adapters, at_full_rank).modules["q_proj"])
    if method == "ties":
        wanted = references.ties_mean(weighted_deltas(adapters, [1, 1, 1], "q_proj"), density)
        assert references.relative_error(dense, wanted) < 1e-9
    cut = merge_adapters(adapters, dataclasses.replace(at_full_rank, rank=rank))
    error = np.linalg.norm(references.delta(cut.modules["q_proj"]) - dense)
    best = np.linalg.norm(references.truncated(dense, rank) - dense)
    assert error < 1.01 * best


# svd


def svd_error(adapters: Sequence[LoraAdapter], rank: int, weights: Sequence[float]) -> float:
    """|found - best| over the sum of the members' norms."""
    config = MergeConfig(method="svd", rank=rank)
    merged = merge_adapters(adapters, config, weights=weights, dtype=torch.float64)
    deltas = weighted_deltas(adapters, weights, "q_proj")
    wanted = references.truncated(np.sum(deltas, axis=0), rank)
    size = sum(float(np.linalg.norm(delta)) for delta in deltas)
    found = references.delta(merged.modules["q_proj"])
    return float(np.linalg.norm(found - wanted)) / size


def spread(module: LoraModule, exponent_a: float, exponent_b: float) -> LoraModule:
    """Unit i times 10^(exponent i / (rank - 1)) in each half."""
    steps = torch.linspace(0, 1, module.rank, dtype=torch.float64)
    scale_a, scale_b = (10 ** (e * steps) for e in (exponent_a, exponent_b))
    a, b = scale_a[:, None] * module.lora_a, module.lora_b * scale_b
    return LoraModule(a.to(module.lora_a.dtype), b.to(module.lora_b.dtype), module.scaling)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("exponent_a", "exponent_b"), [(0, -6), (6, 0), (-9, 9), (12, -12), (3, -10), (-4, -4)]
)
def test_svd_of_units_of_a_wide_range_of_scales(
    exponent_a: float, exponent_b: float, dtype: torch.dtype
) -> None:
    adapters = [
        LoraAdapter(
            f"{i}",
            {
                "q_proj": spread(
                    strategies.module(i, 6, 30, 20, dtype=dtype), exponent_a, exponent_b
                )
            },
        )
        for i in range(3)
    ]
    for rank in (1, 3, 9, 18):
        assert svd_error(adapters, rank, [1, -1, 0.5]) < 1e-9


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
def test_svd_of_members_that_nearly_cancel(noise: float) -> None:
    first, other = strategies.module(0, 6, 30, 20), strategies.module(1, 6, 30, 20)
    near = LoraModule(first.lora_a + noise * other.lora_a, first.lora_b + noise * other.lora_b)
    adapters = [LoraAdapter("a", {"q_proj": first}), LoraAdapter("b", {"q_proj": near})]
    for rank in (1, 6, 12):
        assert svd_error(adapters, rank, [1, -1]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_svd_of_members_that_cancel_is_zero(dtype: torch.dtype) -> None:
    module = strategies.module(0, 6, 30, 20, dtype=dtype)
    adapters = [LoraAdapter(name, {"q_proj": module}) for name in "ab"]
    assert svd_error(adapters, 6, [1, -1]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [2, 5])
def test_svd_of_duplicate_units(copies: int, dtype: torch.dtype) -> None:
    module = strategies.module(0, 3, 30, 20, dtype=dtype)
    doubled = LoraModule(module.lora_a.repeat(2, 1), module.lora_b.repeat(1, 2), 0.5)
    other = strategies.module(1, 2, 30, 20, dtype=dtype)
    adapters = [LoraAdapter(f"{i}", {"q_proj": doubled}) for i in range(copies)]
    adapters.append(LoraAdapter("other", {"q_proj": other}))
    for rank in (1, 4, 5, 40):
        assert svd_error(adapters, rank, [1.0] * len(adapters)) < 1e-9


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_no_method_is_closer_to_the_sum_than_svd(rank: int, seed: int) -> None:
    adapters = members_of("linear", seed)
    _, best = merged_with("svd", adapters, config=MergeConfig(method="svd", rank=rank))
    for name, module in best.modules.items():
        exact = np.sum(weighted_deltas(adapters, WEIGHTS, name), axis=0)
        dense = references.best_cosine(exact, rank)
        assert module.fidelity == pytest.approx(dense, abs=1e-9)
    for method in EVERY_METHOD:
        config = MergeConfig(method=method, rank=rank)
        try:
            _, report = merged_with(method, adapters, config=config)
        except ConfigError:
            assert method in {"concat", "linear"}
            continue
        for name, module in report.modules.items():
            assert module.fidelity <= best.modules[name].fidelity + 1e-9, method


# concat


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_concat_is_the_exact_weighted_sum(dtype: torch.dtype) -> None:
    adapters = members_of("concat", dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    merged, report = merged_with("concat", adapters, dtype=wide)
    for name, module in merged.modules.items():
        wanted = np.sum(weighted_deltas(adapters, WEIGHTS, name), axis=0)
        bound = 1e-6 if wide == torch.float32 else 1e-14
        assert references.relative_error(references.delta(module), wanted) < bound
    assert report.fidelity == pytest.approx(1, abs=1e-6)


def test_concat_keeps_units_as_they_are_where_scaling_and_weight_are_1() -> None:
    adapter = strategies.adapter("a", 0, 4)
    merged = merge_adapters([adapter], MergeConfig(method="concat", rank=4))
    assert_identical(merged, adapter)


def test_concat_into_too_small_a_rank_is_refused_and_the_next_is_enough() -> None:
    adapters = members_of("concat")  # q_proj has 2 + 3 + 3 units, the other modules fewer
    largest = max(
        sum(a.modules[name].rank for a, _ in touching(adapters, WEIGHTS, name)) for name in SHAPES
    )
    with pytest.raises(
        ConfigError, match=rf"rank {largest}, above the rank {largest - 1}"
    ) as caught:
        merge_adapters(adapters, MergeConfig(method="concat", rank=largest - 1))
    assert caught.value.param == "rank"
    merged = merge_adapters(adapters, MergeConfig(method="concat", rank=largest))
    assert merged.rank == largest


# linear


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(13, 11, bias=False, dtype=torch.float64)
        self.k_proj = nn.Linear(13, 6, bias=False, dtype=torch.float64)
        self.embed = nn.Embedding(19, 11, dtype=torch.float64)


TARGETS = ["q_proj", "k_proj", "embed"]


def peft_model(alphas: Sequence[int], rank: int = 3) -> PeftModel:
    """A model with one random adapter per alpha, named a0, a1, ..."""
    torch.manual_seed(0)
    model: Any = None
    for i, alpha in enumerate(alphas):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS)
        if model is None:
            model = get_peft_model(Tiny(), config, f"a{i}", autocast_adapter_dtype=False)
        else:
            model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64)
    return model


def from_peft(model: Any, adapter: str) -> LoraAdapter:
    modules = {}
    for name, layer in model.base_model.model.named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            modules[name] = LoraModule(a.detach(), b.detach(), layer.scaling[adapter])
        elif adapter in getattr(layer, "lora_embedding_A", {}):
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            modules[name] = LoraModule(
                a.detach(), b.detach(), layer.scaling[adapter], is_embedding=True
            )
    return LoraAdapter(adapter, modules)


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (1.0, -0.5, 2.0), (-1.0, -1.0, -0.3)]
)
def test_linear_is_that_of_peft(weights: tuple[float, ...]) -> None:
    model = peft_model([3, 6, 1])
    adapters = [from_peft(model, f"a{i}") for i in range(3)]
    model.add_weighted_adapter(["a0", "a1", "a2"], list(weights), "merged", "linear")
    wanted = from_peft(model, "merged")
    assert sorted(wanted.modules) == sorted(TARGETS)
    merged = merge_adapters(adapters, MergeConfig(method="linear", rank=3), weights=weights)
    # PEFT has the weights' roots in float32.
    assert_same(merged, LoraAdapter("peft", dict(sorted(wanted.modules.items()))), 1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, -0.5, 2.0)])
def test_svd_is_that_of_peft(weights: tuple[float, ...]) -> None:
    model = peft_model([3, 6, 1])
    adapters = [from_peft(model, f"a{i}") for i in range(3)]
    model.add_weighted_adapter(["a0", "a1", "a2"], list(weights), "merged", "svd", svd_rank=2)
    wanted = {
        name: module
        for name, module in sorted(from_peft(model, "merged").modules.items())
        if not module.is_embedding  # PEFT transposes these once too often
    }
    merged = merge_adapters(adapters, MergeConfig(method="svd", rank=2), weights=weights)
    assert_same(
        LoraAdapter("ours", {name: merged.modules[name] for name in wanted}),
        LoraAdapter("peft", wanted),
        1e-6,
    )


def test_linear_refuses_unequal_ranks_by_module_and_rank() -> None:
    adapters = [strategies.adapter("a", 0, 2), strategies.adapter("b", 1, 4)]
    with pytest.raises(IncompatibleAdaptersError, match=r"'q_proj'.*ranks (2, 4|4, 2)"):
        merge_adapters(adapters, MergeConfig(method="linear", rank=8))


def test_linear_into_too_small_a_rank_is_refused_and_into_a_larger_one_padded() -> None:
    adapters = [strategies.adapter(name, seed, 4) for seed, name in enumerate("ab")]
    with pytest.raises(ConfigError, match=r"'q_proj'.*rank 4, above the rank 3") as caught:
        merge_adapters(adapters, MergeConfig(method="linear", rank=3))
    assert caught.value.param == "rank"
    plain = merge_adapters(adapters, MergeConfig(method="linear", rank=4))
    padded = merge_adapters(adapters, MergeConfig(method="linear", rank=6))
    assert padded.rank == 6
    assert_same(padded, plain, 1e-14)


# dare_ties


def dense_dare(adapters: Sequence[LoraAdapter], density: float, seed: int) -> Array:
    config = MergeConfig(method="dare_ties", rank=11, density=density, seed=seed)
    return references.delta(merge_adapters(adapters, config).modules["q_proj"])


def test_dare_ties_depends_on_its_seed_alone() -> None:
    adapters = members_of("dare_ties")
    runs = {
        seed: [
            merged_with("dare_ties", adapters, config=config_of("dare_ties", seed=seed))[0]
            for _ in range(2)
        ]
        for seed in (0, 1, 2**63 - 1)
    }
    for once, again in runs.values():
        assert_identical(again, once)
    for (one, _), (other, _) in itertools.combinations(runs.values(), 2):
        assert not torch.equal(one.modules[Q].lora_a, other.modules[Q].lora_a)


def test_dare_ties_drops_other_entries_in_each_module_and_member() -> None:
    module = strategies.module(0, 3, 13, 11)
    adapters = [LoraAdapter(name, {Q: module, K: module}) for name in "ab"]
    merged = merge_adapters(adapters, MergeConfig(method="dare_ties", rank=11, density=0.5))
    dense = {name: references.delta(m) for name, m in merged.modules.items()}
    assert not np.allclose(dense[Q], dense[K])
    # One entry is dropped in both members a quarter of the time, not half of it.
    dropped = np.isclose(dense[Q], 0, atol=1e-9).mean()
    assert 0.15 < dropped < 0.35


@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
def test_dare_of_one_adapter_is_right_on_average(density: float) -> None:
    adapter = strategies.adapter("a", 0, 3, in_features=13, out_features=11)
    wanted = references.delta(adapter.modules["q_proj"])
    runs = np.stack([dense_dare([adapter], density, seed) for seed in range(300)])
    dropped = np.isclose(runs, 0, atol=1e-9)
    assert np.allclose(runs, np.where(dropped, 0, wanted / density))
    assert abs((1 - dropped.mean()) - density) < 0.02
    deviation = np.abs(wanted) * math.sqrt((1 / density - 1) / len(runs))
    assert np.all(np.abs(runs.mean(axis=0) - wanted) < 5 * deviation)


def test_dare_ties_of_two_adapters_is_right_on_average() -> None:
    density = 0.6
    adapters = [
        strategies.adapter(name, seed, 3, in_features=13, out_features=11)
        for seed, name in enumerate("ab")
    ]
    one, two = weighted_deltas(adapters, [1, 1], "q_proj")
    both, alone = density**2, density * (1 - density)
    elected = references.elected_mean([one, two])
    wanted = (both * elected + alone * (one + two)) / density
    runs = np.stack([dense_dare(adapters, density, seed) for seed in range(400)])
    deviation = runs.std(axis=0) / math.sqrt(len(runs))
    assert np.all(np.abs(runs.mean(axis=0) - wanted) < 5 * deviation)


# lego-paper


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("restarts", [1, 4])
@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_lego_paper_is_lego_with_the_papers_choices(
    dtype: torch.dtype, restarts: int, rank: int
) -> None:
    adapters = members_of("lego", dtype=dtype)
    paper = MergeConfig(method="lego-paper", rank=rank, restarts=restarts, seed=3)
    plain = MergeConfig(
        method="lego",
        rank=rank,
        balance=False,
        align_sign=False,
        parameter_reweighting="inf",
        output_reweighting=True,
        restarts=restarts,
        seed=3,
    )
    found, report = merged_with("lego-paper", adapters, config=paper)
    wanted, other = merged_with("lego", adapters, config=plain)
    assert_identical(found, wanted)
    assert report.modules == other.modules
    naive = references.merge(adapters, plain, WEIGHTS)
    wide = merge_adapters(adapters, paper, weights=WEIGHTS, dtype=torch.float64)
    for name, module in wide.modules.items():
        assert references.relative_error(references.delta(module), naive[name].delta) < 1e-5
