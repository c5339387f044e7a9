"""`lego-functions`: clusters of functions, and the leading singular pair of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lego_core import ConfigError, LoraAdapter, LoraModule, MergeConfig, merge_adapters
from lego_core.functions import leading_pairs
from lego_core.plan import plan_merge
from lego_core.pool import TorchPool, Units
from lego_core.units import disassemble
from tests import references, strategies
from tests.core.members import (
    WEIGHTS,
    assert_identical,
    assert_same,
    members_of,
    merged_with,
    touching,
    weighted_deltas,
)
from tests.references import Array

METHOD = "lego-functions"
Weighted = tuple[list[LoraAdapter], list[float]]

configs = st.builds(
    MergeConfig,
    method=st.just(METHOD),
    rank=st.integers(1, 14),
    normalize=st.booleans(),
    restarts=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
)


def units_of(
    adapters: Sequence[LoraAdapter], weights: Sequence[float], name: str
) -> list[references.Unit]:
    return [
        unit
        for adapter, weight in touching(adapters, weights, name)
        for unit in references.disassemble(adapter, name, weight)
    ]


def has_one_leading_pair(matrix: Array) -> bool:
    """Whether the pair is told by more than rounding."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return bool(values[1] < 0.99 * values[0])


@settings(max_examples=100)
@given(weighted=strategies.weighted_sets(), config=configs)
def test_merge_equals_the_reference(weighted: Weighted, config: MergeConfig) -> None:
    adapters, weights = weighted
    adapters, weights = zip(
        *sorted(zip(adapters, weights, strict=True), key=lambda pair: pair[0].name), strict=True
    )
    merged = merge_adapters(adapters, config, weights=weights)
    for name, module in merged.modules.items():
        sums = references.function_sums(units_of(adapters, weights, name), config)
        assume(all(map(has_one_leading_pair, sums)))
        wanted = np.sum([references.truncated(matrix, 1) for matrix in sums], axis=0)
        assert references.relative_error(references.delta(module), wanted) < 1e-9


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(8, 8, 8), (4, 8, 16)])
def test_merge_of_layers_wider_than_ranks_equals_the_reference(
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    normalize: bool,  # noqa: FBT001
) -> None:
    adapters = [
        strategies.adapter(f"{i}", i, rank, in_features=96, out_features=64, dtype=dtype)
        for i, rank in enumerate(ranks)
    ]
    config = MergeConfig(method=METHOD, rank=8, normalize=normalize)
    merged = merge_adapters(adapters, config, weights=WEIGHTS, dtype=torch.float32)
    order = sorted(range(3), key=lambda i: adapters[i].name)
    units = units_of([adapters[i] for i in order], [WEIGHTS[i] for i in order], "q_proj")
    wanted = np.sum(
        [references.truncated(matrix, 1) for matrix in references.function_sums(units, config)],
        axis=0,
    )
    found = references.delta(merged.modules["q_proj"])
    assert references.relative_error(found, wanted) < 2e-5


# Each cluster's pair


def units_from(
    modules: Sequence[LoraModule], dtype: torch.dtype = torch.float64, weights: Sequence[float] = ()
) -> Units:
    adapters = [LoraAdapter(f"{i}", {"q_proj": module}) for i, module in enumerate(modules)]
    (group,) = plan_merge(adapters)
    pool = TorchPool(group, adapters, dtype, torch.device("cpu"))
    return disassemble(pool, adapters, weights or [1.0] * len(adapters), balance=True)


def pairs_of(units: Units, member: torch.Tensor) -> list[Array]:
    """The dense matrix of each merged unit."""
    mixing = leading_pairs(units, member[None].double())
    coefs = units.coef_a, units.coef_b
    ((a, b),) = units.pool.mix((mixing.a, mixing.b), coefs, torch.float64).blocks
    return [np.outer(column, row) for column, row in zip(b[0].T.numpy(), a[0].numpy(), strict=True)]


def partial_sums(module: LoraModule, member: torch.Tensor) -> list[Array]:
    """The dense sum of each cluster's units."""
    return [
        references.delta(LoraModule(mask[:, None] * module.lora_a, module.lora_b * mask))
        for mask in member.to(module.lora_a.dtype)
    ]


@settings(max_examples=200)
@given(seed=strategies.seeds, rank=st.integers(1, 20), k=st.integers(1, 6))
def test_pair_of_a_cluster_is_the_leading_one_of_the_dense_sum(
    seed: int, rank: int, k: int
) -> None:
    module = strategies.module(seed, rank, 13, 11)
    generator = torch.Generator().manual_seed(seed)
    assigned = torch.randint(0, k, (rank,), generator=generator)
    member = torch.nn.functional.one_hot(assigned, k).T
    for found, exact in zip(
        pairs_of(units_from([module]), member), partial_sums(module, member), strict=True
    ):
        best = references.truncated(exact, 1)
        # Of nearly equal pairs any mixture does as well.
        assert np.sum(found * exact) == pytest.approx(np.sum(best**2), rel=1e-4, abs=1e-12)
        assert np.sum(found**2) == pytest.approx(np.sum(best**2), rel=1e-4, abs=1e-12)
        if exact.any() and has_one_leading_pair(exact):
            assert references.relative_error(found, best) < 1e-9


def test_pairs_are_balanced() -> None:
    module = strategies.module(0, 9, 13, 11)
    units = units_from([module])
    member = torch.eye(4).repeat_interleave(3, dim=1)[:, :9]
    mixing = leading_pairs(units, member[None].double())
    norms_a, norms_b = (
        ((mix @ gram) * mix).sum(dim=2)
        for mix, gram in ((mixing.a, units.gram_a), (mixing.b, units.gram_b))
    )
    torch.testing.assert_close(norms_a, norms_b, rtol=1e-12, atol=0)
    assert mixing.sizes is not None
    assert mixing.sizes.tolist() == [[3, 3, 3, 0]]
    assert not mixing.a[0, 3].any()
    assert not mixing.b[0, 3].any()


def test_pair_of_orthogonal_units_is_the_largest() -> None:
    """Where a power iteration that starts from the wrong one never leaves it."""
    lengths = torch.tensor([1.0, 3.0, 2.0, 2.5], dtype=torch.float64)
    module = LoraModule(torch.diag(lengths), torch.eye(4, dtype=torch.float64))
    (found,) = pairs_of(units_from([module]), torch.ones(1, 4))
    assert references.relative_error(found, np.diag([0.0, 3, 0, 0])) < 1e-12


def test_pair_of_equally_strong_units_is_as_good_as_either() -> None:
    ones = torch.eye(4, dtype=torch.float64)
    (found,) = pairs_of(units_from([LoraModule(ones, ones)]), torch.ones(1, 4))
    assert np.linalg.svd(found, compute_uv=False) == pytest.approx([1, 0, 0, 0])


@pytest.mark.parametrize("exponent", [-30, -15, 15, 30])
def test_pair_does_not_depend_on_the_size_of_its_units(exponent: int) -> None:
    """Nor on that of another cluster's, however different."""
    module = strategies.module(3, 6, 13, 11)
    gain = torch.tensor([1.0, 10.0**exponent] * 3, dtype=torch.float64)
    module = dataclasses.replace(module, lora_b=module.lora_b * gain)
    member = torch.eye(2).repeat(1, 3)
    for found, exact in zip(
        pairs_of(units_from([module]), member), partial_sums(module, member), strict=True
    ):
        assert references.relative_error(found, references.truncated(exact, 1)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_units_that_cancel_give_zero_and_not_magnified_rounding(
    seed: int, dtype: torch.dtype
) -> None:
    module = strategies.module(seed, 3, 13, 11, dtype=dtype)
    units = units_from([module, module], dtype, [1.0, -1.0])
    (found,) = pairs_of(units, torch.ones(1, 6))
    size = np.linalg.norm(references.delta(module))
    assert np.linalg.norm(found) < 4 * torch.finfo(dtype).eps ** 0.5 * size


# The merge


def flipped(module: LoraModule) -> LoraModule:
    signs = 1 - 2 * (torch.arange(module.rank) % 2)
    return dataclasses.replace(
        module, lora_a=signs[:, None] * module.lora_a, lora_b=module.lora_b * signs
    )


def stretched(module: LoraModule) -> LoraModule:
    by = 10.0 ** torch.linspace(-3, 3, module.rank, dtype=torch.float64)
    return dataclasses.replace(
        module, lora_a=by[:, None] * module.lora_a, lora_b=module.lora_b / by
    )


def shuffled(module: LoraModule) -> LoraModule:
    order = torch.arange(module.rank).roll(1)
    return dataclasses.replace(module, lora_a=module.lora_a[order], lora_b=module.lora_b[:, order])


@pytest.mark.parametrize("change", [flipped, stretched, shuffled])
@given(weighted=strategies.weighted_sets(), config=configs)
def test_gauge_and_order_of_the_units_change_nothing(
    change, weighted: Weighted, config: MergeConfig
) -> None:
    adapters, weights = weighted
    for name in {name for adapter in adapters for name in adapter.modules}:
        sums = references.function_sums(units_of(adapters, weights, name), config)
        assume(all(map(has_one_leading_pair, sums)))
    changed = [strategies.map_modules(adapter, change) for adapter in adapters]
    assert_same(
        merge_adapters(changed, config, weights=weights),
        merge_adapters(adapters, config, weights=weights),
        1e-7,
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_copies_of_one_adapter_are_summed(copies: int, normalize: bool) -> None:  # noqa: FBT001
    for dtype in strategies.DTYPES:
        adapter = strategies.adapter("a", 3, 4, scaling=2.0, dtype=dtype)
        renamed = [LoraAdapter(f"copy-{i}", adapter.modules) for i in range(copies)]
        wide = torch.promote_types(dtype, torch.float32)
        config = MergeConfig(method=METHOD, rank=4, normalize=normalize)
        merged, report = merge_adapters(renamed, config, dtype=wide, report=True)
        wanted = strategies.map_modules(
            adapter, lambda m: dataclasses.replace(m, scaling=m.scaling * copies)
        )
        assert_same(merged, wanted, 1e-6 if wide == torch.float32 else 1e-12)
        assert report.modules["q_proj"].cluster_sizes == (copies,) * 4
        assert report.fidelity == pytest.approx(1, abs=1e-6)


@given(weighted=strategies.weighted_sets(), rank=st.integers(16, 20), normalize=st.booleans())
def test_rank_for_all_units_gives_the_weighted_sum(
    weighted: Weighted, rank: int, *, normalize: bool
) -> None:
    adapters, weights = weighted
    config = MergeConfig(method=METHOD, rank=rank, normalize=normalize)
    merged = merge_adapters(adapters, config, weights=weights)
    for name, module in merged.modules.items():
        wanted = np.sum(weighted_deltas(adapters, weights, name), axis=0)
        assert references.relative_error(references.delta(module), wanted) < 1e-12
        n_units = len(units_of(adapters, weights, name))
        assert not module.lora_a[n_units:].any()
        assert not module.lora_b[:, n_units:].any()


@given(weighted=strategies.weighted_sets(), config=configs)
def test_fidelity_is_at_most_that_of_svd(weighted: Weighted, config: MergeConfig) -> None:
    adapters, weights = weighted
    best = MergeConfig(method="svd", rank=config.rank)
    _, report = merge_adapters(adapters, config, weights=weights, report=True)
    _, bound = merge_adapters(adapters, best, weights=weights, report=True)
    for name, module in report.modules.items():
        assert module.fidelity <= bound.modules[name].fidelity + 1e-9
    assert 0 < report.fidelity <= bound.fidelity + 1e-9


@pytest.mark.parametrize("normalize", [False, True])
def test_zero_units_do_no_harm(normalize: bool) -> None:  # noqa: FBT001
    adapters = [strategies.adapter(name, seed, 4) for seed, name in enumerate("ab")]
    adapters[1].modules["q_proj"].lora_b.zero_()
    config = MergeConfig(method=METHOD, rank=5, normalize=normalize)
    assert_same(merge_adapters(adapters, config), adapters[0], 1e-12)


def test_clusters_depend_on_the_seed_alone() -> None:
    adapters = members_of(METHOD)

    def merged(seed: int) -> LoraAdapter:
        config = MergeConfig(method=METHOD, rank=3, restarts=1, seed=seed)
        return merged_with(METHOD, adapters, config=config)[0]

    first = {seed: merged(seed) for seed in range(6)}
    for seed, once in first.items():
        assert_identical(merged(seed), once)
    deltas = {first[seed].modules["layers.0.q_proj"].delta().numpy().tobytes() for seed in first}
    assert len(deltas) > 1


@pytest.mark.parametrize("value", [1, "yes", "off", 0.5])
def test_normalize_is_a_boolean(value: object) -> None:
    with pytest.raises(ConfigError, match=r"normalize is .* must be true or false") as caught:
        MergeConfig.from_mapping({"method": METHOD, "normalize": value})
    assert caught.value.param == "normalize"
