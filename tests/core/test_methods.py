"""Every merging method against what its paper says, naively, and what must hold of all of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lego_core import (
    ConfigError,
    IncompatibleAdaptersError,
    LegoError,
    LoraAdapter,
    LoraModule,
    MergeConfig,
    MergeReport,
    merge_adapters,
)
from lego_core.config import OPTIONS
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


# Each method against its reference


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


# What holds of every method


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_order_of_the_adapters_changes_no_bit(method: str, dtype: torch.dtype) -> None:
    adapters = members_of(method, dtype=dtype)
    plain, report = merged_with(method, adapters)
    for order in itertools.permutations(range(3)):
        permuted, other = merged_with(
            method, [adapters[i] for i in order], weights=[WEIGHTS[i] for i in order]
        )
        assert_identical(permuted, plain)
        assert other.modules == report.modules


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_order_of_adapters_without_a_digest_or_name_of_their_own_changes_no_bit(
    method: str,
) -> None:
    adapters = [LoraAdapter("same", a.modules) for a in members_of(method)]
    plain, _ = merged_with(method, adapters)
    reversed_, _ = merged_with(method, adapters[::-1], weights=WEIGHTS[::-1])
    assert_identical(reversed_, plain)


def permuted_units(module: LoraModule) -> LoraModule:
    order = torch.arange(module.rank).flip(0).roll(1)
    return dataclasses.replace(module, lora_a=module.lora_a[order], lora_b=module.lora_b[:, order])


def with_zero_units(module: LoraModule) -> LoraModule:
    a, b = module.lora_a, module.lora_b
    return dataclasses.replace(
        module, lora_a=torch.cat([a, a[:1]]), lora_b=torch.cat([b, torch.zeros_like(b[:, :1])], 1)
    )


def changed(source: LoraAdapter, change: Callable[[LoraModule], LoraModule]) -> LoraAdapter:
    """The adapter with each of its modules changed, its digest the same."""
    modules = {name: change(module) for name, module in source.modules.items()}
    return dataclasses.replace(source, modules=modules)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_order_of_the_units_changes_nothing(method: str, seed: int) -> None:
    """Of all members alike, where position matters."""
    adapters = members_of(method, seed)
    plain, _ = merged_with(method, adapters)
    permuted, _ = merged_with(method, [changed(adapter, permuted_units) for adapter in adapters])
    assert_same(permuted, plain, 1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["concat", "linear", "svd", *TIES_LIKE])
def test_units_that_do_nothing_change_nothing(method: str, seed: int) -> None:
    adapters = members_of(method, seed)
    plain, _ = merged_with(method, adapters)
    longer, _ = merged_with(method, [changed(adapter, with_zero_units) for adapter in adapters])
    assert_same(longer, plain, 1e-9)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_member_of_weight_0_has_no_influence(method: str) -> None:
    adapters = members_of(method)
    silent = strategies.adapter("silent", 5, 4)
    plain, report = merged_with(method, adapters)
    with_it, other = merged_with(method, [silent, *adapters], weights=[0.0, *WEIGHTS])
    assert_identical(with_it, plain)
    assert other.modules == report.modules


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_all_weights_0_give_the_zero_adapter(method: str) -> None:
    merged, report = merged_with(method, members_of(method), weights=[0.0, 0.0, 0.0])
    assert not any(module.delta().any() for module in merged.modules.values())
    assert merged.rank == config_of(method).rank
    assert report.fidelity == 1


@pytest.mark.parametrize("zero", ["lora_a", "lora_b", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_untrained_adapters_give_the_zero_adapter(
    method: str, dtype: torch.dtype, zero: str
) -> None:
    adapters = members_of(method, dtype=dtype)
    for module in (module for adapter in adapters for module in adapter.modules.values()):
        if zero != "lora_b":
            module.lora_a.zero_()
        if zero != "lora_a":
            module.lora_b.zero_()
    merged, report = merged_with(method, adapters)
    for module in merged.modules.values():
        assert torch.equal(module.delta(), torch.zeros_like(module.delta()))
    assert report.fidelity == 1


KEEPS_ALL = {
    "lego": {},
    "lego-paper": {},
    "concat": {},
    "svd": {},
    "linear": {},
    **{method: {"density": 1.0} for method in TIES_LIKE},
}


@pytest.mark.parametrize("scaling", [1.0, 0.25, -2.0])
@pytest.mark.parametrize("rank", [4, 5, 9, 14])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_one_adapter_comes_back_where_there_is_room(method: str, rank: int, scaling: float) -> None:
    adapter = strategies.adapter("a", 7, 4, in_features=13, out_features=11, scaling=scaling)
    config = MergeConfig.from_mapping({"method": method, "rank": rank, **KEEPS_ALL[method]})
    merged, report = merge_adapters([adapter], config, report=True)
    assert merged.rank == rank
    assert_same(merged, adapter, 1e-9)
    assert report.fidelity == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("density", [0.01, 0.3])
@pytest.mark.parametrize("method", TIES_LIKE)
def test_one_adapter_alone_is_only_trimmed(method: str, density: float) -> None:
    """Each kept entry as it was; of `knots` and `core_space`, in the basis that they work in."""
    adapter = strategies.adapter("a", 7, 4, in_features=13, out_features=11)
    config = MergeConfig(method=method, rank=11, density=density)
    found = references.delta(merge_adapters([adapter], config).modules["q_proj"])
    wanted = references.delta(adapter.modules["q_proj"])
    if method == "dare_ties":
        kept = ~np.isclose(found, 0, atol=1e-9)
        assert np.allclose(found[kept], wanted[kept] / density)
    else:
        wanted = reference(config, [adapter], [1.0], "q_proj")
        assert references.relative_error(found, wanted) < 1e-9


@pytest.mark.parametrize("rank", [1, 2, 8, 12, 20])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_rank_is_uniform_and_padded_with_zeros(method: str, rank: int) -> None:
    adapters = members_of(method)
    config = MergeConfig(method=method, rank=rank)
    if (method == "concat" and rank < 8) or (method == "linear" and rank < 3):
        with pytest.raises(ConfigError):
            merged_with(method, adapters, config=config)
        return
    merged, report = merged_with(method, adapters, config=config)
    assert sorted(merged.modules) == sorted(SHAPES)
    for name, module in merged.modules.items():
        assert (module.in_features, module.out_features) == SHAPES[name]
        assert module.rank == rank == report.modules[name].rank
        assert module.scaling == 1
        assert bool(module.lora_a.isfinite().all() and module.lora_b.isfinite().all())
        useful = 3 if method == "linear" else min(SHAPES[name])
        if method in {"lego", "lego-paper", "concat", "svd", "core_space"}:
            useful = sum(a.modules[name].rank for a, _ in touching(adapters, WEIGHTS, name))
        assert not module.lora_a[useful:].any()
        assert not module.lora_b[:, useful:].any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_fidelity_is_the_cosine_of_the_dense_matrices(
    method: str, dtype: torch.dtype, seed: int
) -> None:
    adapters = members_of(method, seed, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    merged, report = merged_with(method, adapters, dtype=wide)
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    found, exact = {}, {}
    for name, module in merged.modules.items():
        found[name] = references.delta(module)
        exact[name] = np.sum(weighted_deltas(adapters, WEIGHTS, name), axis=0)
        dense = references.cosine([found[name]], [exact[name]])
        assert report.modules[name].fidelity == pytest.approx(dense, abs=bound)
    dense = references.cosine(list(found.values()), list(exact.values()))
    assert report.fidelity == pytest.approx(dense, abs=bound)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_module_does_not_depend_on_the_other_modules(method: str) -> None:
    adapters = members_of(method)
    together, report = merged_with(method, adapters)
    for name in SHAPES:
        pairs = touching(adapters, WEIGHTS, name)
        alone, other = merged_with(
            method,
            [dataclasses.replace(a, modules={name: a.modules[name]}) for a, _ in pairs],
            weights=[weight for _, weight in pairs],
        )
        assert_same(alone, LoraAdapter("together", {name: together.modules[name]}), 1e-9)
        assert other.modules[name].fidelity == pytest.approx(
            report.modules[name].fidelity, abs=1e-9
        )


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_embedding_stays_an_embedding(method: str) -> None:
    merged, _ = merged_with(method, members_of(method))
    assert {name for name, module in merged.modules.items() if module.is_embedding} == {EMBED}


@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_result_in_a_narrow_dtype_is_the_wide_one_rounded(method: str, dtype: torch.dtype) -> None:
    adapters = members_of(method, dtype=dtype)
    same, _ = merged_with(method, adapters)
    assert same.dtype == dtype
    wide = [changed(adapter, _in_float64) for adapter in adapters]
    exact, _ = merged_with(method, wide)
    assert exact.dtype == torch.float64
    in_float32, _ = merged_with(method, adapters, dtype=torch.float32)
    assert in_float32.dtype == torch.float32
    assert_same(in_float32, exact, 1e-5)
    assert_same(same, exact, max(1e-5, 4 * torch.finfo(dtype).eps))
    assert_same(merged_with(method, adapters, dtype=torch.float16)[0], exact, 4e-3)


def _in_float64(module: LoraModule) -> LoraModule:
    return dataclasses.replace(module, lora_a=module.lora_a.double(), lora_b=module.lora_b.double())


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_members_of_mixed_dtypes_merge(method: str) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    adapters = [members_of(method, dtype=dtype)[i] for i, dtype in enumerate(dtypes)]
    merged, _ = merged_with(method, adapters)
    assert merged.dtype == torch.float32
    exact, _ = merged_with(method, [changed(adapter, _in_float64) for adapter in adapters])
    assert_same(merged, exact, 1e-5)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_members_are_left_as_they_were(method: str) -> None:
    adapters = members_of(method)
    merged, _ = merged_with(method, adapters)
    for module in merged.modules.values():
        module.lora_a.zero_()
        module.lora_b.zero_()
    for adapter, before in zip(adapters, members_of(method), strict=True):
        assert_identical(adapter, before)


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize(("rank", "in_features", "out_features"), [(1, 1, 1), (3, 1, 2), (2, 5, 1)])
def test_layers_narrower_than_the_rank_merge(
    method: str, rank: int, in_features: int, out_features: int
) -> None:
    adapters = [
        strategies.adapter(name, seed, rank, in_features=in_features, out_features=out_features)
        for seed, name in enumerate("ab")
    ]
    config = MergeConfig.from_mapping({"method": method, "rank": 6, **KEEPS_ALL[method]})
    merged, report = merge_adapters(adapters, config, report=True)
    module = merged.modules["q_proj"]
    assert (module.rank, module.in_features, module.out_features) == (6, in_features, out_features)
    assert bool(module.delta().isfinite().all())
    if method in {"svd", "concat"}:
        wanted = np.sum(weighted_deltas(adapters, [1, 1], "q_proj"), axis=0)
        assert references.relative_error(references.delta(module), wanted) < 1e-9
        assert report.fidelity == pytest.approx(1, abs=1e-9)


def of_scaling(adapters: Sequence[LoraAdapter], scaling: float) -> list[LoraAdapter]:
    return [changed(a, lambda m: dataclasses.replace(m, scaling=scaling)) for a in adapters]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_common_factor_of_any_size_scales_the_merge(
    method: str, dtype: torch.dtype, scale: float
) -> None:
    adapters = members_of(method, dtype=dtype)
    plain, report = merged_with(method, of_scaling(adapters, 1.0), dtype=torch.float64)
    found, other = merged_with(method, of_scaling(adapters, scale), dtype=torch.float64)
    root = math.sqrt(scale)
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    assert_same(
        changed(found, lambda m: LoraModule(m.lora_a / root, m.lora_b / root, 1.0, m.is_embedding)),
        plain,
        bound,
    )
    assert other.fidelity == pytest.approx(report.fidelity, abs=bound)


@pytest.mark.parametrize("scale", [1e-300, 1e-100, 1e38, 1e100, 1e200, 1e307, 1e308])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_numbers_beyond_float32_are_merged_or_refused(
    method: str, dtype: torch.dtype, scale: float
) -> None:
    adapters = of_scaling(members_of(method, dtype=dtype), scale)
    try:
        merged, report = merged_with(method, adapters, dtype=torch.float64)
    except LegoError as error:
        assert "overflow" in str(error)  # noqa: PT017
        assert scale > 1
    else:
        for module in merged.modules.values():
            assert bool(module.lora_a.isfinite().all() and module.lora_b.isfinite().all())
        assert -1 <= report.fidelity <= 1


# Bad configurations are refused when built


@pytest.mark.parametrize(
    ("method", "option"),
    [
        (method, option)
        for method, option in itertools.product(
            EVERY_METHOD, sorted({name for options in OPTIONS.values() for name in options})
        )
        if option not in OPTIONS[method]
    ],
)
def test_option_that_a_method_does_not_have_is_refused(method: str, option: str) -> None:
    value = next(options[option] for options in OPTIONS.values() if option in options)
    with pytest.raises(ConfigError, match=rf"{option}.*{method} has no such option") as caught:
        MergeConfig(method=method, **{option: value})
    assert caught.value.param == option


@pytest.mark.parametrize("method", TIES_LIKE)
@pytest.mark.parametrize("density", [0, -0.1, 1.001, 0.0, float("nan"), float("inf"), "1", True])
def test_density_out_of_its_domain_is_refused(method: str, density: Any) -> None:
    with pytest.raises(ConfigError, match="density") as caught:
        MergeConfig(method=method, density=density)
    assert caught.value.param == "density"


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("rank", [0, -1, 513, 2.0, "8", True])
def test_rank_out_of_its_domain_is_refused(method: str, rank: Any) -> None:
    with pytest.raises(ConfigError, match="rank") as caught:
        MergeConfig(method=method, rank=rank)
    assert caught.value.param == "rank"


def test_table_has_a_row_for_every_method_that_can_be_configured() -> None:
    assert list(METHODS) == list(OPTIONS)
