"""The pooled units of a group of modules, and the only two passes over the weights.

A merge needs the weights twice: once for the inner products of the units (`disassemble`), once to mix
them into the result (`mix`). Everything between works on matrices of N rows, N the number of
units of a module. Here are both passes in PyTorch; `kernels.py` has them fused for CUDA.

Source: Zhao et al., "Merging LoRAs like Playing LEGO", ICLR 2025, arXiv 2409.16167, section 3.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch

from lego_core.adapter import LoraAdapter
from lego_core.plan import Block, Group

_MAX_UNITS = 512
_MAX_CLUSTERS = 128
_CHUNK_BYTES = 16 << 20
"""Of the copies that one step of a pass makes in the computing dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """The units of M modules. Unit i of module m is

        a_i = coef_a[m, i] * (row i of the pooled A),  b_i = coef_b[m, i] * (column i of the pooled B)

    so that sum_i b_i a_i^T is exactly the weighted sum of the adapters: the coefficients hold
    scaling, weight and gauge, and the weights themselves are never rewritten.

    Attributes:
        pool: where the weights are.
        coef_a, coef_b: shape [M, N], float64.
        gram_a, gram_b: inner products of the units' halves with the coefficients applied,
            shape [M, N, N], float64. Their sum is the Gram matrix of the vectors [a; b]; their
            entrywise product that of the matrices b a^T.
        peaks: the largest absolute entry of each vector [a; b], shape [M, N], if asked for.
    """

    pool: Pool
    coef_a: torch.Tensor
    coef_b: torch.Tensor
    gram_a: torch.Tensor
    gram_b: torch.Tensor
    peaks: torch.Tensor | None = None

    @property
    def group(self) -> Group:
        """The modules, and whose units these are."""
        return self.pool.group


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """k units for each of the M modules of a group.

    Attributes:
        flat: all the factors, one behind the other: per block all lora_A, then all lora_B.
        blocks: views of it, per block lora_A [m, k, in_features], lora_B [m, out_features, k].
        overflow: not 0 where an entry is not finite, of any shape; None if nobody looked.
    """

    flat: torch.Tensor
    blocks: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    overflow: torch.Tensor | None = None

    def is_finite(self) -> bool:
        """Whether all entries are finite. Waits for the device."""
        if self.overflow is not None:
            return not bool(self.overflow.any())
        # Without the temporary of `isfinite`, which is slow on the CPU; NaN is both largest and least.
        return bool(self.flat.max().isfinite() and self.flat.min().isfinite())

    @classmethod
    def empty(
        cls,
        group: Group,
        k: int,
        dtype: torch.dtype,
        device: torch.device,
        overflow: torch.Tensor | None = None,
    ) -> Factors:
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
            overflow,
        )


class Pool(Protocol):
    """The units of one group, member after member, in the order of each member's ranks."""

    group: Group
    device: torch.device
    dtype: torch.dtype
    """That sums are formed in."""

    def disassemble(self, gains: torch.Tensor, *, balance: bool, peaks: bool) -> Units:
        """Form the inner products of all units of each module: the first pass.

        Args:
            gains: scaling times weight of each module's members, shape [M, T], float64, on the CPU.
            balance: the gauge, see `gauge`.
            peaks: whether to find the largest entries too.
        """
        ...

    def mix(
        self,
        weights: tuple[torch.Tensor, torch.Tensor],
        coefs: tuple[torch.Tensor, torch.Tensor],
        dtype: torch.dtype,
    ) -> Factors:
        """Sum the units' halves with weights: the second pass.

        Args:
            weights: for a and b, shape [M, k, N] each; row c of the result's lora_A is
                sum_i weights_a[m, c, i] a_i, and column c of its lora_B likewise.
            coefs: what makes units of the pooled rows and columns, shape [M, N] each.
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
    members = [adapters[i] for i in group.members]
    wide = any(torch.float64 in member.table.dtypes for member in members)
    if needs == "products" and not wide and has_kernels(device):
        from lego_core.kernels import TritonPool  # noqa: PLC0415 - not on every machine

        return TritonPool(group, members, device)
    # PyTorch may be set to round float32 factors to TF32 or bfloat16; float64 it leaves alone.
    rounds = device.type == "cuda" or torch.get_float32_matmul_precision() != "highest"
    exact = needs == "exact products" or rounds or wide
    return TorchPool(group, members, torch.float64 if exact else torch.float32, device)


def gauge(
    gain: torch.Tensor, gram_a: torch.Tensor, gram_b: torch.Tensor, *, balance: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coefficients that make units of pooled rows and columns.

    Scaling and weight go to both halves, a by sqrt(|s w|), b by sign(w) sqrt(|s w|). With
    `balance` each unit is rescaled to |a| = |b|; a unit with a zero half is the zero function
    and becomes the zero vector.

    Args:
        gain: scaling times weight of each unit, shape [M, N].
        gram_a: inner products of the pooled rows of A, shape [M, N, N].
        gram_b: of the pooled columns of B.
        balance: whether to.

    Returns:
        coef_a, coef_b: shape [M, N].
    """
    coef_a = gain.abs().sqrt()
    coef_b = coef_a * gain.sign()
    if not balance:
        return coef_a, coef_b
    norm_a, norm_b = (coef_a * gram.diagonal(dim1=1, dim2=2).sqrt() for gram in (gram_a, gram_b))
    alive = (norm_a > 0) & (norm_b > 0)
    stretch = torch.where(alive, norm_b / norm_a, 1.0).sqrt()
    return torch.where(alive, coef_a * stretch, 0.0), torch.where(alive, coef_b / stretch, 0.0)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the fused kernels run on this device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def fits_kernels(pool: Pool, k: int) -> bool:
    """Whether one program can hold the clustering of one module into k clusters."""
    n_units = pool.group.n_units
    return has_kernels(pool.device) and k < n_units <= _MAX_UNITS and k <= _MAX_CLUSTERS


class TorchPool:
    """Both passes as batched matrix products, a few modules at a time.

    Args:
        group: which modules.
        members: the adapters that touch them.
        dtype: to compute in, float32 or float64.
        device: where to compute and to leave results.
    """

    def __init__(
        self,
        group: Group,
        members: Sequence[LoraAdapter],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.group = group
        self.device = device
        self._modules = [[member.modules[name] for member in members] for name in group.names]
        self.dtype = dtype

    def disassemble(self, gains: torch.Tensor, *, balance: bool, peaks: bool) -> Units:
        """See `Pool`."""
        n_modules, n_units = len(self.group.names), self.group.n_units
        grams = torch.empty(
            (2, n_modules, n_units, n_units), dtype=torch.float64, device=self.device
        )
        largest = torch.zeros((2, n_modules, n_units), dtype=torch.float64, device=self.device)
        for _, _, where in self.chunks():
            units_a, units_b = self.units(where)
            grams[0, where] = units_a @ units_a.mT
            grams[1, where] = units_b.mT @ units_b
            if peaks:
                largest[0, where] = units_a.abs().amax(dim=2)
                largest[1, where] = units_b.abs().amax(dim=1)
        ranks = torch.tensor(self.group.ranks)
        gain = gains.repeat_interleave(ranks, dim=1).to(self.device)
        (gram_a, gram_b), (peak_a, peak_b) = grams, largest
        coef_a, coef_b = gauge(gain, gram_a, gram_b, balance=balance)
        return Units(
            pool=self,
            coef_a=coef_a,
            coef_b=coef_b,
            gram_a=coef_a[:, :, None] * gram_a * coef_a[:, None, :],
            gram_b=coef_b[:, :, None] * gram_b * coef_b[:, None, :],
            peaks=torch.maximum(coef_a * peak_a, coef_b.abs() * peak_b) if peaks else None,
        )

    def mix(
        self,
        weights: tuple[torch.Tensor, torch.Tensor],
        coefs: tuple[torch.Tensor, torch.Tensor],
        dtype: torch.dtype,
    ) -> Factors:
        """See `Pool`."""
        mix_a, mix_b = (
            (of_half * coef[:, None, :]).to(self.dtype)
            for of_half, coef in zip(weights, coefs, strict=True)
        )
        factors = Factors.empty(self.group, mix_a.shape[1], dtype, self.device)
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
