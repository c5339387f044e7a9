"""What must hold of every merge, whatever the clusters."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lego_core import LoraAdapter, LoraModule, MergeConfig, merge_adapters
from tests import references, strategies

Weighted = tuple[list[LoraAdapter], list[float]]

EVERY_KIND = [
    MergeConfig(
        rank=3,
        balance=balance,
        align_sign=align_sign,
        parameter_reweighting=norm,
        output_reweighting=output,
    )
    for balance, align_sign, norm, output in itertools.product(
        [False, True], [False, True], ["l2", "inf", "off"], [False, True]
    )
]


def every_kind(**fields: object) -> list[MergeConfig]:
    """The gauges and reweightings that differ once `fields` are set."""
    return list(dict.fromkeys(dataclasses.replace(kind, **fields) for kind in EVERY_KIND))


def assert_same_update(found: LoraAdapter, wanted: LoraAdapter, bound: float = 1e-9) -> None:
    assert found.modules.keys() == wanted.modules.keys()
    for name, module in found.modules.items():
        error = references.relative_error(
            references.delta(module), references.delta(wanted.modules[name])
        )
        assert error < bound, name


def assert_identical(found: LoraAdapter, wanted: LoraAdapter) -> None:
    assert list(found.modules) == list(wanted.modules)
    for name, module in found.modules.items():
        assert torch.equal(module.lora_a, wanted.modules[name].lora_a)
        assert torch.equal(module.lora_b, wanted.modules[name].lora_b)
        assert module.scaling == wanted.modules[name].scaling


def permuted_units(module: LoraModule) -> LoraModule:
    order = torch.arange(module.rank).roll(1)
    return LoraModule(module.lora_a[order], module.lora_b[:, order], module.scaling)


def flipped_units(module: LoraModule) -> LoraModule:
    signs = torch.ones(module.rank, dtype=module.lora_a.dtype)
    signs[::2] = -1
    return LoraModule(signs[:, None] * module.lora_a, module.lora_b * signs, module.scaling)


def rescaled_units(module: LoraModule) -> LoraModule:
    stretch = 2.0 ** torch.arange(-1, module.rank - 1, dtype=module.lora_a.dtype)
    return LoraModule(stretch[:, None] * module.lora_a, module.lora_b / stretch, module.scaling)


def weighted_sum(adapters: list[LoraAdapter], weights: list[float]) -> dict[str, references.Array]:
    total: dict[str, references.Array] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, module in adapter.modules.items():
            total[name] = total.get(name, 0) + weight * references.delta(module)
    return total


@given(weighted=strategies.weighted_sets(strategies.any_weights), config=strategies.configs())
def test_result_has_one_rank_and_scaling_1_on_all_modules(
    weighted: Weighted, config: MergeConfig
) -> None:
    adapters, weights = weighted
    assume(any(weights))
    merged = merge_adapters(adapters, config, weights=weights)
    counted = [a for a, w in zip(adapters, weights, strict=True) if w]
    assert set(merged.modules) == {name for adapter in counted for name in adapter.modules}
    for name, module in merged.modules.items():
        assert (module.in_features, module.out_features) == strategies.SHAPES[name]
        assert module.rank == config.rank
        assert module.scaling == 1
        assert bool(module.lora_a.isfinite().all() and module.lora_b.isfinite().all())


@given(
    weighted=strategies.weighted_sets(strategies.any_weights, strategies.DTYPES),
    config=strategies.configs(),
    data=st.data(),
)
def test_order_of_the_adapters_changes_no_bit(
    weighted: Weighted, config: MergeConfig, data: st.DataObject
) -> None:
    adapters, weights = weighted
    order = data.draw(st.permutations(range(len(adapters))))
    plain = merge_adapters(adapters, config, weights=weights)
    permuted = merge_adapters(
        [adapters[i] for i in order], config, weights=[weights[i] for i in order]
    )
    assert_identical(permuted, plain)


@given(weighted=strategies.weighted_sets(), config=strategies.configs())
def test_merging_again_changes_no_bit(weighted: Weighted, config: MergeConfig) -> None:
    adapters, weights = weighted
    once = merge_adapters(adapters, config, weights=weights)
    assert_identical(merge_adapters(adapters, config, weights=weights), once)


@given(weighted=strategies.weighted_sets(), config=strategies.configs())
def test_order_of_the_units_changes_nothing(weighted: Weighted, config: MergeConfig) -> None:
    adapters, weights = weighted
    permuted = [strategies.map_modules(adapter, permuted_units) for adapter in adapters]
    assert_same_update(
        merge_adapters(permuted, config, weights=weights),
        merge_adapters(adapters, config, weights=weights),
    )


@given(weighted=strategies.weighted_sets(), config=strategies.configs(align_sign=st.just(True)))
def test_sign_of_the_units_changes_nothing_with_align_sign(
    weighted: Weighted, config: MergeConfig
) -> None:
    adapters, weights = weighted
    flipped = [strategies.map_modules(adapter, flipped_units) for adapter in adapters]
    assert_same_update(
        merge_adapters(flipped, config, weights=weights),
        merge_adapters(adapters, config, weights=weights),
    )


@given(weighted=strategies.weighted_sets(), config=strategies.configs(balance=st.just(True)))
def test_scale_between_the_halves_changes_nothing_with_balance(
    weighted: Weighted, config: MergeConfig
) -> None:
    adapters, weights = weighted
    rescaled = [strategies.map_modules(adapter, rescaled_units) for adapter in adapters]
    assert_same_update(
        merge_adapters(rescaled, config, weights=weights),
        merge_adapters(adapters, config, weights=weights),
    )


def test_negated_units_cancel_without_align_sign() -> None:
    plain = strategies.adapter("a", 0, 1)
    halves = plain.modules["q_proj"]
    twin = LoraAdapter("b", {"q_proj": LoraModule(-halves.lora_a, -halves.lora_b)})
    together = {
        align_sign: merge_adapters([plain, twin], MergeConfig(rank=1, align_sign=align_sign))
        for align_sign in (False, True)
    }
    assert not together[False].modules["q_proj"].delta().any()
    assert_same_update(together[True], plain)


@given(weighted=strategies.weighted_sets(), config=strategies.configs())
def test_weight_is_a_factor_of_the_scaling(weighted: Weighted, config: MergeConfig) -> None:
    adapters, weights = weighted
    scaled = [
        strategies.map_modules(
            adapter,
            lambda m, w=weight: LoraModule(m.lora_a, m.lora_b, m.scaling * w),  # type: ignore[misc]
        )
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    assert_same_update(
        merge_adapters(adapters, config, weights=weights), merge_adapters(scaled, config)
    )


@given(weighted=strategies.weighted_sets(), config=strategies.configs())
def test_common_factor_of_the_weights_scales_the_merge(
    weighted: Weighted, config: MergeConfig
) -> None:
    adapters, weights = weighted
    plain = merge_adapters(adapters, config, weights=weights)
    scaled = merge_adapters(adapters, config, weights=[3.0 * weight for weight in weights])
    thrice = strategies.map_modules(plain, lambda m: LoraModule(m.lora_a, m.lora_b, 3.0))
    assert_same_update(scaled, thrice)


@given(weighted=strategies.weighted_sets(), config=strategies.configs())
def test_member_of_weight_0_has_no_influence(weighted: Weighted, config: MergeConfig) -> None:
    adapters, weights = weighted
    silent = strategies.adapter("silent", 1, 4)
    with_it = merge_adapters([silent, *adapters], config, weights=[0.0, *weights])
    assert_identical(with_it, merge_adapters(adapters, config, weights=weights))


@pytest.mark.parametrize("config", EVERY_KIND)
def test_all_weights_0_give_the_zero_adapter(config: MergeConfig) -> None:
    adapters = [strategies.adapter("a", 0, 2), strategies.adapter("b", 1, 4)]
    merged = merge_adapters(adapters, config, weights=[0, 0])
    assert not merged.modules["q_proj"].delta().any()
    assert merged.rank == 3


@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize("config", every_kind(rank=4))
def test_copies_of_one_adapter_give_it_back(config: MergeConfig, copies: int) -> None:
    for dtype in strategies.DTYPES:
        adapter = strategies.adapter("a", 3, 4, scaling=2.0, dtype=dtype)
        renamed = [LoraAdapter(f"copy-{i}", adapter.modules) for i in range(copies)]
        wide = torch.promote_types(dtype, torch.float32)
        merged = merge_adapters(renamed, config, dtype=wide)
        assert_same_update(merged, adapter, 1e-6 if wide == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_stay_together_when_there_are_clusters_to_spare(dtype: torch.dtype) -> None:
    config = MergeConfig(rank=5, output_reweighting=False)
    for seed in range(30):
        adapter = strategies.adapter("a", seed, 3, dtype=dtype)
        renamed = [LoraAdapter(f"copy-{i}", adapter.modules) for i in range(3)]
        assert_same_update(merge_adapters(renamed, config), adapter, 1e-6)


@given(weighted=strategies.weighted_sets(), config=strategies.configs(rank=st.integers(16, 20)))
def test_rank_for_all_units_gives_the_weighted_sum_times_the_output_gain(
    weighted: Weighted, config: MergeConfig
) -> None:
    adapters, weights = weighted
    merged = merge_adapters(adapters, config, weights=weights)
    for name, exact in weighted_sum(adapters, weights).items():
        ranks = [a.modules[name].rank for a in adapters if name in a.modules]
        gain = 1.0
        if config.output_reweighting:
            gain = (sum(ranks) / len(ranks) / sum(ranks)) ** 0.5
        found = references.delta(merged.modules[name])
        assert references.relative_error(found, gain * exact) < 1e-12
        assert not merged.modules[name].lora_a[sum(ranks) :].any()
        assert not merged.modules[name].lora_b[:, sum(ranks) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", every_kind(rank=4))
def test_planted_prototypes_are_recovered(config: MergeConfig, dtype: torch.dtype) -> None:
    prototypes = strategies.module(0, 4, 40, 30, dtype=dtype)
    adapters = []
    for i in range(6):
        noise = strategies.module(i + 1, 4, 40, 30, dtype=dtype)
        order = torch.arange(4).roll(i)
        noisy = LoraModule(
            (prototypes.lora_a + 1e-3 * noise.lora_a)[order],
            (prototypes.lora_b + 1e-3 * noise.lora_b)[:, order],
        )
        adapters.append(LoraAdapter(f"adapter-{i}", {"q_proj": noisy}))
    merged, report = merge_adapters(adapters, config, report=True)
    assert report.modules["q_proj"].cluster_sizes == (6, 6, 6, 6)
    planted = LoraAdapter("planted", {"q_proj": prototypes})
    assert_same_update(merged, planted, 2e-3)


@given(weighted=strategies.weighted_sets(), config=strategies.configs())
def test_fidelity_never_exceeds_that_of_the_best_rank_k_matrix(
    weighted: Weighted, config: MergeConfig
) -> None:
    adapters, weights = weighted
    _, report = merge_adapters(adapters, config, weights=weights, report=True)
    for name, exact in weighted_sum(adapters, weights).items():
        best = references.best_cosine(exact, config.rank)
        assert report.modules[name].fidelity <= best + 1e-9


@given(
    weighted=strategies.weighted_sets(dtypes=(torch.float32, torch.bfloat16)),
    config=strategies.configs(),
)
def test_fidelity_is_the_cosine_of_the_dense_matrices(
    weighted: Weighted, config: MergeConfig
) -> None:
    adapters, weights = weighted
    merged, report = merge_adapters(
        adapters, config, weights=weights, dtype=torch.float32, report=True
    )
    exact = weighted_sum(adapters, weights)
    found = {name: references.delta(module) for name, module in merged.modules.items()}
    for name, matrix in found.items():
        dense = references.cosine([matrix], [exact[name]])
        assert report.modules[name].fidelity == pytest.approx(dense, abs=1e-5)
    dense = references.cosine([found[name] for name in found], [exact[name] for name in found])
    assert report.fidelity == pytest.approx(dense, abs=1e-5)


@given(weighted=strategies.weighted_sets(), config=strategies.configs())
def test_other_modules_do_not_change_a_module(weighted: Weighted, config: MergeConfig) -> None:
    adapters, weights = weighted
    together, report = merge_adapters(adapters, config, weights=weights, report=True)
    for name in together.modules:
        touching = [
            (LoraAdapter(adapter.name, {name: adapter.modules[name]}), weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if name in adapter.modules
        ]
        alone, alone_report = merge_adapters(
            [adapter for adapter, _ in touching],
            config,
            weights=[weight for _, weight in touching],
            report=True,
        )
        error = references.relative_error(
            references.delta(alone.modules[name]), references.delta(together.modules[name])
        )
        assert error < 1e-9
        assert alone_report.modules[name].cluster_sizes == report.modules[name].cluster_sizes


@pytest.mark.parametrize("ranks", [(1,), (5,), (1, 1), (1, 5)])
@pytest.mark.parametrize("rank", [1, 2, 5, 6, 7])
def test_degenerate_sizes_have_every_unit_in_a_cluster(ranks: tuple[int, ...], rank: int) -> None:
    adapters = [strategies.adapter(f"a{i}", i, r) for i, r in enumerate(ranks)]
    merged, report = merge_adapters(adapters, MergeConfig(rank=rank), report=True)
    module = report.modules["q_proj"]
    assert sum(module.cluster_sizes) == sum(ranks)
    assert len(module.cluster_sizes) == min(rank, sum(ranks))
    assert merged.rank == rank


@pytest.mark.parametrize("zero", ["lora_a", "lora_b", "both"])
@pytest.mark.parametrize("config", EVERY_KIND)
def test_untrained_adapters_give_the_zero_adapter(config: MergeConfig, zero: str) -> None:
    adapters = [strategies.adapter(f"a{i}", i, 4, dtype=torch.float32) for i in range(2)]
    for adapter in adapters:
        if zero != "lora_b":
            adapter.modules["q_proj"].lora_a.zero_()
        if zero != "lora_a":
            adapter.modules["q_proj"].lora_b.zero_()
    merged, report = merge_adapters(adapters, config, report=True)
    assert torch.equal(merged.modules["q_proj"].delta(), torch.zeros(5, 7))
    assert report.fidelity == 1


@pytest.mark.parametrize("config", every_kind(rank=5, balance=True))
def test_untrained_adapter_beside_a_trained_one_adds_nothing(config: MergeConfig) -> None:
    trained, untrained = strategies.adapter("a", 0, 4), strategies.adapter("b", 1, 4)
    untrained.modules["q_proj"].lora_b.zero_()
    merged = merge_adapters([trained, untrained], config)
    gain = (4 / 5) ** 0.5 if config.output_reweighting else 1.0
    wanted = strategies.map_modules(trained, lambda m: LoraModule(m.lora_a, m.lora_b, gain))
    assert_same_update(merged, wanted)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("config", every_kind(output_reweighting=False))
def test_equal_units_give_one_of_them(config: MergeConfig, rank: int) -> None:
    ones = LoraModule(torch.ones(4, 7), torch.ones(5, 4))
    adapter = LoraAdapter("equal", {"q_proj": ones})
    merged, report = merge_adapters([adapter], dataclasses.replace(config, rank=rank), report=True)
    torch.testing.assert_close(merged.modules["q_proj"].delta(), torch.ones(5, 7))
    assert report.modules["q_proj"].cluster_sizes == (4,)


@pytest.mark.parametrize("norm", ["l2", "inf"])
@pytest.mark.parametrize("seed", range(5))
def test_members_that_cancel_give_zero_and_not_magnified_rounding(seed: int, norm: str) -> None:
    two = strategies.module(seed, 2, dtype=torch.float32)
    a = torch.cat([two.lora_a, -two.lora_a.sum(dim=0, keepdim=True)])
    b = torch.cat([two.lora_b, -two.lora_b.sum(dim=1, keepdim=True)], dim=1)
    config = MergeConfig.from_mapping(
        {"rank": 1, "balance": False, "align_sign": False, "parameter_reweighting": norm}
    )
    merged = merge_adapters([LoraAdapter("a", {"q_proj": LoraModule(a, b)})], config)
    assert not merged.modules["q_proj"].delta().any()


@pytest.mark.parametrize("config", EVERY_KIND)
def test_pruning_one_adapter_keeps_fewer_units(config: MergeConfig) -> None:
    adapter = strategies.adapter("a", 5, 8)
    merged, report = merge_adapters([adapter], config, report=True)
    assert merged.rank == 3
    assert sum(report.modules["q_proj"].cluster_sizes) == 8
    assert 0 < report.fidelity < 1


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_result_has_the_narrowest_dtype_that_holds_all_members(
    dtypes: tuple[torch.dtype, ...], wanted: torch.dtype
) -> None:
    adapters = [strategies.adapter(f"a{i}", i, 2, dtype=dtype) for i, dtype in enumerate(dtypes)]
    assert merge_adapters(adapters).dtype == wanted
    assert merge_adapters(adapters, dtype=torch.float16).dtype == torch.float16


def test_inputs_are_left_as_they_were() -> None:
    adapter = strategies.adapter("a", 0, 4)
    before = strategies.adapter("a", 0, 4)
    merged = merge_adapters([adapter], MergeConfig(rank=4))
    merged.modules["q_proj"].lora_a.zero_()
    assert_identical(adapter, before)


def test_order_of_adapters_of_one_name_changes_no_bit() -> None:
    adapters = [strategies.adapter("same", seed, 4) for seed in range(2)]
    config = MergeConfig(rank=3)
    assert_identical(merge_adapters(adapters[::-1], config), merge_adapters(adapters, config))


def test_report_tells_the_time_of_each_phase() -> None:
    adapters = [strategies.adapter(name, seed, 4) for seed, name in enumerate("ab")]
    _, report = merge_adapters(adapters, MergeConfig(rank=4), report=True)
    phases = {name: seconds for name, seconds in report.seconds.items() if name != "total"}
    assert set(phases) == {"disassemble", "reassemble"}
    assert all(seconds > 0 for seconds in phases.values())
    assert sum(phases.values()) <= report.seconds["total"]
