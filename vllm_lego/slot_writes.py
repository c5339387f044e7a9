"""Many small writes into adapter slots, done in a few launches.

For the time of one activation a layer's tuples of slots are replaced by stand-ins that note what the
layer zeroes and copies. So vLLM's own code decides which layer takes which part of an adapter. What
it does in another way than by `slots[i] = 0` and `slots[...].copy_(source)` happens at once, after
what was noted before. A part whose memory is laid out otherwise than the slot's, of a lower rank for one,
is copied by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class SlotWrites:
    """Collects what layers write into their slots.

    Args:
        layers: any objects.
        attributes: those of a layer that hold a tuple of tensors, each indexed by slot first.
    """

    def __init__(self, layers: Iterable[Any], attributes: Sequence[str]) -> None:
        self._zeroed: list[torch.Tensor] = []
        self._filled: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._slots = [
            (layer, name, stock, tuple(_NotedSlots(slots, self) for slots in stock))
            for layer in layers
            for name in attributes
            if isinstance(stock := getattr(layer, name, None), tuple)
            and all(isinstance(slots, torch.Tensor) for slots in stock)
        ]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Collect what is written while the context is open, and write it at its end."""
        # Not by setattr, which for a PyTorch module looks for parameters: 2 ms for an 8B model.
        for layer, name, _, noted in self._slots:
            vars(layer)[name] = noted
        try:
            yield
            self.write()
        finally:
            for layer, name, stock, _ in self._slots:
                vars(layer)[name] = stock
            self._forget()

    def zero(self, slot: torch.Tensor) -> None:
        """Note that a part of a slot is to be zero."""
        self._zeroed.append(slot)

    def fill(self, slot: torch.Tensor, source: torch.Tensor) -> None:
        """Note that a part of a slot is to be a copy of `source`, of the same shape."""
        self._filled.append(slot)
        self._sources.append(source)

    def write(self) -> None:
        """Write what was noted: first the zeros."""
        if self._zeroed:
            torch._foreach_zero_(self._zeroed)
        alike: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for slot, source in zip(self._filled, self._sources, strict=True):
            if slot.stride() == source.stride():
                alike[0].append(slot)
                alike[1].append(source)
            else:  # one of these in the list, and PyTorch copies all of it one by one
                slot.copy_(source, non_blocking=True)
        if alike[0]:
            torch._foreach_copy_(*alike, non_blocking=True)
        self._forget()

    def _forget(self) -> None:
        self._zeroed, self._filled, self._sources = [], [], []


class _NotedSlots:
    """Stands for a tensor of slots: zeroing and copying are noted, all else is the tensor's."""

    def __init__(self, tensor: torch.Tensor, writes: SlotWrites) -> None:
        self._tensor = tensor
        self._writes = writes

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, int) and value == 0:
            self._writes.zero(self._tensor[index])
        else:
            self._writes.write()
            self._tensor[index] = value

    def __getitem__(self, index: Any) -> _NotedSlots:
        return _NotedSlots(self._tensor[index], self._writes)

    def copy_(self, source: torch.Tensor, *, non_blocking: bool = False) -> None:  # noqa: ARG002
        self._writes.fill(self._tensor, source)

    def __getattr__(self, name: str) -> Any:
        if name != "shape":  # whatever it is, it comes after what was noted
            self._writes.write()
        return getattr(self._tensor, name)
