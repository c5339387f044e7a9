"""Disassembly and gauge: units, their sum, their inner products."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lego_core import LoraAdapter
from lego_core.units import Stack, disassemble, plan_stacks
from tests import strategies

CPU = torch.device("cpu")
Weighted = tuple[list[LoraAdapter], list[float]]


def explicit(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    return stack.coef_a[:, :, None] * stack.a, stack.coef_b[:, :, None] * stack.b


@given(weighted=strategies.weighted_sets(strategies.any_weights), balance=st.booleans())
def test_sum_of_units_is_the_weighted_sum(weighted: Weighted, *, balance: bool) -> None:
    adapters, weights = weighted
    for plan in plan_stacks(adapters):
        stack = disassemble(adapters, weights, plan, balance=balance, device=CPU)
        a, b = explicit(stack)
        for m, name in enumerate(plan.names):
            wanted = sum(
                weight * adapter.modules[name].delta()
                for adapter, weight in zip(adapters, weights, strict=True)
                if name in adapter.modules
            )
            torch.testing.assert_close(b[m].T @ a[m], wanted, rtol=1e-12, atol=1e-12)


@given(adapters=strategies.adapter_sets())
def test_plan_covers_each_module_once_with_all_its_adapters(adapters: list[LoraAdapter]) -> None:
    plans = plan_stacks(adapters)
    planned = [name for plan in plans for name in plan.names]
    assert sorted(planned) == sorted({name for adapter in adapters for name in adapter.modules})
    for plan in plans:
        for name in plan.names:
            touching = [i for i, adapter in enumerate(adapters) if name in adapter.modules]
            assert list(plan.members) == touching
            assert list(plan.ranks) == [adapters[i].modules[name].rank for i in touching]


@given(weighted=strategies.weighted_sets(), balance=st.booleans())
def test_gram_matrices_hold_the_inner_products_of_the_halves(
    weighted: Weighted, *, balance: bool
) -> None:
    for plan in plan_stacks(weighted[0]):
        stack = disassemble(*weighted, plan, balance=balance, device=CPU)
        a, b = explicit(stack)
        torch.testing.assert_close(stack.gram_a, a @ a.mT, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stack.gram_b, b @ b.mT, rtol=1e-12, atol=1e-12)


@given(weighted=strategies.weighted_sets(strategies.any_weights), balance=st.booleans())
def test_weight_and_scaling_go_to_both_halves_and_the_sign_to_b(
    weighted: Weighted, *, balance: bool
) -> None:
    adapters, weights = weighted
    for plan in plan_stacks(adapters):
        stack = disassemble(adapters, weights, plan, balance=balance, device=CPU)
        assert bool((stack.coef_a >= 0).all())
        signs = [
            weights[i] for i, r in zip(plan.members, plan.ranks, strict=True) for _ in range(r)
        ]
        assert torch.equal(stack.coef_b.sign(), torch.tensor(signs).sign().expand_as(stack.coef_b))
        if not balance:
            assert torch.equal(stack.coef_b.abs(), stack.coef_a)


@given(weighted=strategies.weighted_sets())
def test_balance_gives_both_halves_one_norm(weighted: Weighted) -> None:
    for plan in plan_stacks(weighted[0]):
        a, b = explicit(disassemble(*weighted, plan, balance=True, device=CPU))
        torch.testing.assert_close(a.norm(dim=2), b.norm(dim=2), rtol=1e-12, atol=0)


def test_balance_makes_a_unit_with_a_zero_half_the_zero_vector() -> None:
    adapter = strategies.adapter("a", 0, 3)
    adapter.modules["q_proj"].lora_a[0] = 0
    adapter.modules["q_proj"].lora_b[:, 1] = 0
    (plan,) = plan_stacks([adapter])
    a, b = explicit(disassemble([adapter], [1.0], plan, balance=True, device=CPU))
    assert not a[0, :2].any()
    assert not b[0, :2].any()
    assert a[0, 2].any()
    assert b[0, 2].any()
