"""Plan, disassembly and gauge: units, their sum, their inner products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from lego_core import LoraAdapter
from lego_core.plan import Group, plan_merge
from lego_core.pool import TorchPool, open_pool
from lego_core.units import disassemble
from tests import strategies

CPU = torch.device("cpu")
Weighted = tuple[list[LoraAdapter], list[float]]


@dataclass
class Explicit:
    """The units of a few modules, a [M, N, in] and b [M, N, out], and what `disassemble` says of them."""

    group: Group
    names: tuple[str, ...]
    a: torch.Tensor
    b: torch.Tensor
    coef_a: torch.Tensor
    coef_b: torch.Tensor
    gram_a: torch.Tensor
    gram_b: torch.Tensor
    peaks: torch.Tensor


def explicit(adapters: list[LoraAdapter], weights: list[float], *, balance: bool) -> list[Explicit]:
    found = []
    for group in plan_merge(adapters):
        pool = open_pool(group, adapters, CPU, "units")
        assert isinstance(pool, TorchPool)
        units = disassemble(pool, adapters, weights, balance=balance, peaks=True)
        assert units.peaks is not None
        for _, _, where in pool.chunks():
            a, b = pool.units(where)
            coef_a, coef_b = units.coef_a[where], units.coef_b[where]
            found.append(
                Explicit(
                    group,
                    group.names[where],
                    coef_a[:, :, None] * a,
                    coef_b[:, :, None] * b.mT,
                    coef_a,
                    coef_b,
                    units.gram_a[where],
                    units.gram_b[where],
                    units.peaks[where],
                )
            )
    return found


@given(weighted=strategies.weighted_sets(strategies.any_weights), balance=st.booleans())
def test_sum_of_units_is_the_weighted_sum(weighted: Weighted, *, balance: bool) -> None:
    adapters, weights = weighted
    for units in explicit(adapters, weights, balance=balance):
        for m, name in enumerate(units.names):
            wanted = sum(
                weight * adapter.modules[name].delta()
                for adapter, weight in zip(adapters, weights, strict=True)
                if name in adapter.modules
            )
            torch.testing.assert_close(units.b[m].T @ units.a[m], wanted, rtol=1e-12, atol=1e-12)


@given(adapters=strategies.adapter_sets())
def test_plan_covers_each_module_once_with_all_its_adapters(adapters: list[LoraAdapter]) -> None:
    groups = plan_merge(adapters)
    planned = [name for group in groups for name in group.names]
    assert sorted(planned) == sorted({name for adapter in adapters for name in adapter.modules})
    for group in groups:
        for block in group.blocks:
            for name in block.names:
                touching = [i for i, adapter in enumerate(adapters) if name in adapter.modules]
                assert list(group.members) == touching
                modules = [adapters[i].modules[name] for i in touching]
                assert [module.rank for module in modules] == list(group.ranks)
                assert {(m.in_features, m.out_features) for m in modules} == {
                    (block.in_features, block.out_features)
                }


@given(weighted=strategies.weighted_sets(), balance=st.booleans())
def test_gram_matrices_hold_the_inner_products_of_the_halves(
    weighted: Weighted, *, balance: bool
) -> None:
    for units in explicit(*weighted, balance=balance):
        torch.testing.assert_close(units.gram_a, units.a @ units.a.mT, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(units.gram_b, units.b @ units.b.mT, rtol=1e-12, atol=1e-12)


@given(weighted=strategies.weighted_sets(), balance=st.booleans())
def test_peaks_are_the_largest_entries(weighted: Weighted, *, balance: bool) -> None:
    for units in explicit(*weighted, balance=balance):
        wanted = torch.cat([units.a, units.b], dim=2).abs().amax(dim=2)
        torch.testing.assert_close(units.peaks, wanted, rtol=1e-12, atol=0)


@given(weighted=strategies.weighted_sets(strategies.any_weights), balance=st.booleans())
def test_weight_and_scaling_go_to_both_halves_and_the_sign_to_b(
    weighted: Weighted, *, balance: bool
) -> None:
    for units in explicit(*weighted, balance=balance):
        assert bool((units.coef_a >= 0).all())
        signs = [
            weighted[1][i]
            for i, rank in zip(units.group.members, units.group.ranks, strict=True)
            for _ in range(rank)
        ]
        assert torch.equal(units.coef_b.sign(), torch.tensor(signs).sign().expand_as(units.coef_b))
        if not balance:
            assert torch.equal(units.coef_b.abs(), units.coef_a)


@given(weighted=strategies.weighted_sets())
def test_balance_gives_both_halves_one_norm(weighted: Weighted) -> None:
    for units in explicit(*weighted, balance=True):
        torch.testing.assert_close(units.a.norm(dim=2), units.b.norm(dim=2), rtol=1e-12, atol=0)


def test_balance_makes_a_unit_with_a_zero_half_the_zero_vector() -> None:
    adapter = strategies.adapter("a", 0, 3)
    adapter.modules["q_proj"].lora_a[0] = 0
    adapter.modules["q_proj"].lora_b[:, 1] = 0
    (units,) = explicit([adapter], [1.0], balance=True)
    assert not units.a[0, :2].any()
    assert not units.b[0, :2].any()
    assert units.a[0, 2].any()
    assert units.b[0, 2].any()
