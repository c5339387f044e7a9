"""What must hold of every merging method."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lego_core import (
    ConfigError,
    LegoError,
    LoraAdapter,
    LoraModule,
    MergeConfig,
    merge_adapters,
)
from lego_core.config import OPTIONS
from lego_core.methods import METHODS
from tests import references, strategies
from tests.core.members import (
    EMBED,
    EVERY_METHOD,
    SHAPES,
    TIES_LIKE,
    WEIGHTS,
    assert_identical,
    assert_same,
    config_of,
    members_of,
    merged_with,
    reference,
    touching,
    weighted_deltas,
)


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
    "lego-functions": {},
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
        if method.startswith("lego") or method in {"concat", "svd", "core_space"}:
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
    bound = 1e-9 if dtype == torch.float64 else 3e-5
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
