"""Slots filled at once hold what vLLM's own layers would have written one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.layers.column_parallel_linear import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
)

from vllm_lego._vllm import _fill_slots_at_once
from vllm_lego.identity import engine_id
from vllm_lego.slot_writes import SlotWrites

SLOTS, MAX_RANK, WIDTH, HEIGHT = 3, 4, 6, 10
ATTRIBUTES = ("lora_a_stacked", "lora_b_stacked")


def layer(kind: type, slices: int, tp_size: int = 1) -> Any:
    """What vLLM's code needs of a layer, the code itself being vLLM's; all slots are full."""

    class Layer(SimpleNamespace):
        reset_lora = kind.reset_lora
        set_lora = kind.set_lora
        slice_lora_a = kind.slice_lora_a
        slice_lora_b = kind.slice_lora_b

    return Layer(
        n_slices=slices,
        tp_size=tp_size,
        tp_rank=tp_size - 1,
        is_merged_col_linear=False,
        output_size=HEIGHT,
        output_ids=[tp_size - 1] * slices,
        output_slices=[HEIGHT] * slices,
        lora_a_stacked=tuple(torch.ones(SLOTS, 1, MAX_RANK, WIDTH) for _ in range(slices)),
        lora_b_stacked=tuple(torch.ones(SLOTS, 1, HEIGHT, MAX_RANK) for _ in range(slices)),
    )


def layers(tp_size: int) -> list[Any]:
    return [
        layer(ColumnParallelLinearWithLoRA, 1, tp_size),
        layer(MergedColumnParallelLinearWithLoRA, 3, tp_size),
        layer(ColumnParallelLinearWithLoRA, 1),
    ]


def fill(model: list[Any], rank: int) -> None:
    draws = torch.Generator().manual_seed(rank)
    single, merged, untouched = model

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws)

    tall = HEIGHT * single.tp_size
    single.set_lora(1, half(rank, WIDTH), half(tall, rank))
    merged.set_lora(
        1,
        [half(rank, WIDTH), None, half(rank, WIDTH)],
        [half(tall, rank), None, half(tall, rank)],
    )
    untouched.reset_lora(1)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_slots_hold_what_stock_vllm_writes(tp_size):
    stock, ours = layers(tp_size), layers(tp_size)
    writes = SlotWrites(ours, ATTRIBUTES)
    for rank in (4, 2):  # the second leaves nothing of the first
        fill(stock, rank)
        with writes.noted():
            fill(ours, rank)
        for one, other in zip(stock, ours, strict=True):
            for name in ATTRIBUTES:
                for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
                    assert isinstance(b, torch.Tensor)
                    assert torch.equal(a, b)


def test_nothing_is_written_before_the_end_and_then_at_once(monkeypatch):
    calls: list[int] = []
    stock = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda a, b, **k: (calls.append(len(a)), stock(a, b, **k))
    )
    model = layers(1)
    tensors = [t for one in model for name in ATTRIBUTES for t in getattr(one, name)]
    with SlotWrites(model, ATTRIBUTES).noted():
        fill(model, 4)
        assert all(torch.equal(t, torch.ones_like(t)) for t in tensors)
    assert calls == [6]
    assert not any(torch.equal(t, torch.ones_like(t)) for t in tensors)


def test_what_it_does_not_know_happens_in_its_place():
    model = layers(1)
    with SlotWrites(model, ATTRIBUTES).noted():
        model[0].reset_lora(1)
        model[0].lora_a_stacked[0][1].fill_(7)
        model[0].lora_b_stacked[0][1] = 5
    assert torch.equal(model[0].lora_a_stacked[0][1], torch.full((1, MAX_RANK, WIDTH), 7.0))
    assert torch.equal(model[0].lora_b_stacked[0][1], torch.full((1, HEIGHT, MAX_RANK), 5.0))


def test_after_an_error_the_layers_are_vllms_again():
    model = layers(1)
    writes = SlotWrites(model, ATTRIBUTES)
    with pytest.raises(RuntimeError, match="half way"), writes.noted():
        _fail_half_way(model)
    assert isinstance(model[0].lora_a_stacked[0], torch.Tensor)
    with writes.noted():
        pass
    assert torch.equal(model[0].lora_a_stacked[0][1], torch.ones(1, MAX_RANK, WIDTH))


def _fail_half_way(model: list[Any]) -> None:
    model[0].set_lora(1, torch.zeros(2, WIDTH), torch.zeros(HEIGHT, 2))
    raise RuntimeError("half way")


def test_other_layers_are_left_alone():
    embedding = SimpleNamespace(lora_a_stacked=torch.ones(SLOTS, 8, MAX_RANK))
    with SlotWrites([embedding, SimpleNamespace()], ATTRIBUTES).noted():
        assert isinstance(embedding.lora_a_stacked, torch.Tensor)


def test_a_merge_that_has_its_slot_costs_a_step_nothing():
    """vLLM activates every adapter of every step; to replace all layers' slots takes too long for that."""
    model = layers(1)
    noted: list[bool] = []

    def activate_adapter(lora_id: int) -> bool:
        noted.append(not isinstance(model[0].lora_a_stacked[0], torch.Tensor))
        manager.lora_index_to_id[1] = lora_id
        return True

    manager = SimpleNamespace(
        modules=dict(enumerate(model)),
        lora_index_to_id=[None] * SLOTS,
        activate_adapter=activate_adapter,
    )
    _fill_slots_at_once(manager)
    merge, other = engine_id("lego-0123456789abcdef"), engine_id("lego-fedcba9876543210")
    for lora_id in (merge, merge, merge, other, merge, 1):
        manager.activate_adapter(lora_id)
    assert noted == [True, False, False, True, True, False]
