"""The pooled units of a group of modules, and the only two passes over the weights.

A merge needs the weights twice: once for the inner products of the units (`grams`), once to mix
them into the result (`mix`). Everything between works on matrices of N rows, N the number of
units of a module. Here are both passes in PyTorch; `kernels.py` has them fused for CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from lego_core.adapter import LoraAdapter, LoraModule
from lego_core.plan import Block, Group

_CHUNK_BYTES = 16 << 20
"""Of the copies that one step of a pass makes in the computing dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class Grams:
    """Inner products of the units' halves as they are stored, without scaling or weight.

    Attributes:
        a, b: shape [M, N, N], float64.
        peak_a, peak_b: the largest absolute entry of each half, shape [M, N], float64; None
            when not asked for.
    """

    a: torch.Tensor
    b: torch.Tensor
    peak_a: torch.Tensor | None = None
    peak_b: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """k units for each of the M modules of a group.

    Attributes:
        flat: all the factors, one behind the other: per block all lora_A, then all lora_B.
        blocks: views of it, per block lora_A [m, k, in_features], lora_B [m, out_features, k].
    """

    flat: torch.Tensor
    blocks: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def empty(cls, group: Group, k: int, dtype: torch.dtype, device: torch.device) -> Factors:
        """Allocate the factors in one piece of memory."""
        sizes = [
            len(block.names) * k * width
            for block in group.blocks
            for width in (block.in_features, block.out_features)
        ]
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        halves = iter(torch.split(flat, sizes))
        return cls(
            flat,
            tuple(
                (
                    next(halves).view(len(block.names), k, block.in_features),
                    next(halves).view(len(block.names), block.out_features, k),
                )
                for block in group.blocks
            ),
        )


class Pool(Protocol):
    """The units of one group, member after member, in the order of each member's ranks."""

    group: Group
    device: torch.device
    dtype: torch.dtype
    """That sums are formed in."""

    def grams(self, *, peaks: bool = False) -> Grams:
        """Return the inner products of all units of each module: the first pass."""
        ...

    def mix(self, mix_a: torch.Tensor, mix_b: torch.Tensor, dtype: torch.dtype) -> Factors:
        """Return weighted sums of the units' halves: the second pass.

        Args:
            mix_a: shape [M, k, N]; row c of the result's lora_A is sum_i mix_a[m, c, i] a_i.
            mix_b: shape [M, k, N]; column c of its lora_B is sum_i mix_b[m, c, i] b_i.
            dtype: of the result. Sums are formed in float32 or wider.
        """
        ...


def open_pool(
    group: Group,
    adapters: Sequence[LoraAdapter],
    device: torch.device,
    needs: Literal["products", "exact products", "units"],
) -> Pool:
    """Choose how to read the weights of a group.

    Args:
        group: which modules.
        adapters: as given to `plan_merge`.
        device: where to compute and to leave results.
        needs: see `lego_core.methods.Method`.
    """
    modules = [[adapters[i].modules[name] for i in group.members] for name in group.names]
    dtypes = {half.dtype for row in modules for m in row for half in (m.lora_a, m.lora_b)}
    if needs == "products" and device.type == "cuda":
        from lego_core.kernels import TritonPool, has_triton  # noqa: PLC0415 - not on every machine

        if has_triton() and torch.float64 not in dtypes:
            return TritonPool(group, modules, device)
    # PyTorch may be set to round float32 factors to TF32 or bfloat16; float64 it leaves alone.
    rounds = device.type == "cuda" or torch.get_float32_matmul_precision() != "highest"
    exact = needs == "exact products" or rounds or torch.float64 in dtypes
    return TorchPool(group, modules, torch.float64 if exact else torch.float32, device)


class TorchPool:
    """Both passes as batched matrix products, a few modules at a time.

    Args:
        group: which modules.
        modules: the group's modules as its members have them, shape [M][members].
        dtype: to compute in, float32 or float64.
        device: where to compute and to leave results.
    """

    def __init__(
        self,
        group: Group,
        modules: Sequence[Sequence[LoraModule]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.group = group
        self.device = device
        self._modules = modules
        self.dtype = dtype

    def grams(self, *, peaks: bool = False) -> Grams:
        """See `Pool`."""
        n_modules, n_units = len(self.group.names), self.group.n_units
        a, b = torch.empty(
            (2, n_modules, n_units, n_units), dtype=torch.float64, device=self.device
        )
        peak_a, peak_b = torch.empty(
            (2, n_modules, n_units), dtype=torch.float64, device=self.device
        )
        for _, _, where in self.chunks():
            units_a, units_b = self.units(where)
            a[where] = units_a @ units_a.mT
            b[where] = units_b.mT @ units_b
            if peaks:
                peak_a[where] = units_a.abs().amax(dim=2)
                peak_b[where] = units_b.abs().amax(dim=1)
        return Grams(a, b, peak_a, peak_b) if peaks else Grams(a, b)

    def mix(self, mix_a: torch.Tensor, mix_b: torch.Tensor, dtype: torch.dtype) -> Factors:
        """See `Pool`."""
        factors = Factors.empty(self.group, mix_a.shape[1], dtype, self.device)
        mix_a, mix_b = mix_a.to(self.dtype), mix_b.to(self.dtype)
        for block, in_block, where in self.chunks():
            units_a, units_b = self.units(where)
            a, b = factors.blocks[block]
            a[in_block] = mix_a[where] @ units_a
            b[in_block] = units_b @ mix_b[where].mT
        return factors

    def chunks(self) -> Iterator[tuple[int, slice, slice]]:
        """Cut the group into modules to be handled together.

        The cut depends on the shapes alone, so that results never depend on memory or threads.

        Returns:
            Index of the block, slice of its modules, slice of the group's modules.
        """
        first = 0
        for i, block in enumerate(self.group.blocks):
            step = max(1, _CHUNK_BYTES // self._bytes_per_module(block))
            for start in range(0, len(block.names), step):
                stop = min(start + step, len(block.names))
                yield i, slice(start, stop), slice(first + start, first + stop)
            first += len(block.names)

    def units(self, where: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool some modules of one block: halves a [m, N, in_features], b [m, out_features, N]."""
        rows = self._modules[where]
        like = rows[0][0]
        n_units = self.group.n_units
        units_a = torch.empty(
            (len(rows), n_units, like.in_features), dtype=self.dtype, device=self.device
        )
        units_b = torch.empty(
            (len(rows), like.out_features, n_units), dtype=self.dtype, device=self.device
        )
        for row, of_a, of_b in zip(rows, units_a, units_b, strict=True):
            for module, columns in zip(row, self.group.columns, strict=True):
                of_a[columns] = module.lora_a
                of_b[:, columns] = module.lora_b
        return units_a, units_b

    def _bytes_per_module(self, block: Block) -> int:
        return self.group.n_units * (block.in_features + block.out_features) * self.dtype.itemsize
