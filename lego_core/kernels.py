"""The passes over the weights and the clustering, fused for CUDA.

Launched operation by operation a merge of a few hundred small modules is all launches; copied into
a pool first it moves every weight twice more. These kernels read the adapters where they lie,
through tables of addresses, and cluster the units of each module in one program.

Sums are formed in a fixed order and without atomics: the same adapters on the same kind of device
give the same bits. `TRITON_INTERPRET=1` runs the kernels on the CPU, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton.language as tl

from lego_core import triton_clustering, triton_passes
from lego_core.adapter import LoraAdapter
from lego_core.plan import Group
from lego_core.pool import Factors, Units

_CHUNK = 2048
_GRAM_STEP = 64
_MIX_STEP = 128
_TILE = 64
_VECTOR = 8  # elements of one wide load
_ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class _Half:
    """What is known of the halves A, or B, of a group's modules before their weights are.

    Attributes:
        items: module, first column and width of each piece of work, shape [items, 3], int32.
        first_items: a module's items are first_items[m] up to first_items[m + 1], shape [M + 1].
        starts: where a module's half begins in `Factors.flat`, in units of k, shape [M], int64.
    """

    items: torch.Tensor
    first_items: torch.Tensor
    starts: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """Tables of one group on one device.

    Attributes:
        halves: of A and B.
        of_units: member, row in that member's half and that member's rank, shape [N] each, int32.
        places: where the modules are in each member's layout, shape [M, T], on the CPU.
        is_aligned: whether widths and ranks are multiples of `_VECTOR`.
    """

    halves: tuple[_Half, _Half]
    of_units: tuple[torch.Tensor, ...]
    places: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    is_aligned: bool


class TritonPool:
    """Both passes over weights that stay where they are; see `lego_core.pool.Pool`.

    Args:
        group: which modules.
        members: the adapters that touch them: float32, float16 or bfloat16.
        device: where to compute and to leave results.
    """

    dtype = torch.float32

    def __init__(self, group: Group, members: Sequence[LoraAdapter], device: torch.device) -> None:
        self.group = group
        self.device = device
        self._tables = _tables(group, device)
        dtypes = frozenset().union(*(member.table.dtypes for member in members))
        in_place = len(dtypes) == 1 and all(
            member.table.is_contiguous and member.table.devices == {device} for member in members
        )
        self._element = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
        # The tensors are kept as long as their addresses are.
        self._weights: list[object] = list(members)
        addresses = (
            np.stack(
                [
                    member.table.addresses[:, places]
                    for member, places in zip(members, self._tables.places.T, strict=True)
                ],
                axis=2,
            )
            if in_place
            else self._bring(members)
        )
        self._anchor = self._empty(_VECTOR, dtype=self._element)
        offsets = (
            np.ascontiguousarray(addresses - self._anchor.data_ptr()) // self._element.itemsize
        )
        self._is_aligned = self._tables.is_aligned and not (offsets % _VECTOR).any()
        self._offsets = torch.from_numpy(offsets).to(device, non_blocking=True)
        # Triton's interpreter multiplies 16-bit floats wrongly; a GPU is best at them.
        self._factor = _ELEMENTS[self._element] if device.type == "cuda" else tl.float32

    def disassemble(self, gains: torch.Tensor, *, balance: bool, peaks: bool) -> Units:
        """See `Pool`."""
        n_modules, n_units = len(self.group.names), self.group.n_units
        tiles = _tiles(n_units, _TILE)
        half_a, half_b = self._tables.halves
        partials, partial_peaks = [], []
        for is_b, half in enumerate(self._tables.halves):
            n_items = len(half.items)
            partials.append(self._empty(n_items, n_units, n_units, dtype=torch.float32))
            partial_peaks.append(self._empty(n_items if peaks else 1, n_units, dtype=torch.float32))
            triton_passes.gram_kernel[(n_items, tiles, tiles)](
                partials[-1],
                partial_peaks[-1],
                self._anchor,
                self._offsets[is_b],
                *self._tables.of_units,
                half.items,
                len(self.group.ranks),
                n_units,
                HALF_B=bool(is_b),
                ALIGNED=self._is_aligned,
                FACTOR=self._factor,
                PEAKS=peaks,
                CHUNK=_CHUNK,
                STEP=_GRAM_STEP,
                TILE=_TILE,
                ONE_TILE=tiles == 1,
                num_warps=4,
                num_stages=4,
            )
        grams = self._empty(2, n_modules, n_units, n_units, dtype=torch.float64)
        of_units = self._empty(3, n_modules, n_units, dtype=torch.float64)
        triton_passes.gauge_kernel[(n_modules,)](
            grams[0],
            grams[1],
            *of_units,
            *partials,
            *partial_peaks,
            half_a.first_items,
            half_b.first_items,
            gains.contiguous().to(self.device, non_blocking=True),
            self._tables.of_units[0],
            len(self.group.ranks),
            n_units,
            BALANCE=balance,
            PEAKS=peaks,
            NP=_power_of_2(n_units),
            TILE=min(_TILE, _power_of_2(n_units)),
        )
        coef_a, coef_b, largest = of_units
        return Units(self, coef_a, coef_b, grams[0], grams[1], largest if peaks else None)

    def mix(
        self,
        weights: tuple[torch.Tensor, torch.Tensor],
        coefs: tuple[torch.Tensor, torch.Tensor],
        dtype: torch.dtype,
    ) -> Factors:
        """See `Pool`."""
        k = weights[0].shape[1]
        padded = min(_power_of_2(k), _TILE)
        tiles = _tiles(k, padded)
        n_items = [len(half.items) for half in self._tables.halves]
        overflow = self._empty(sum(n_items) * tiles, dtype=torch.int32)
        factors = Factors.empty(self.group, k, dtype, self.device, overflow)
        for is_b, half in enumerate(self._tables.halves):
            triton_passes.mix_kernel[(n_items[is_b], tiles)](
                factors.flat,
                overflow[n_items[0] * tiles :] if is_b else overflow,
                weights[is_b].contiguous(),
                coefs[is_b],
                half.starts,
                self._anchor,
                self._offsets[is_b],
                *self._tables.of_units,
                half.items,
                len(self.group.ranks),
                self.group.n_units,
                k,
                HALF_B=bool(is_b),
                ALIGNED=self._is_aligned,
                FACTOR=self._factor,
                CHUNK=_CHUNK,
                STEP=_MIX_STEP,
                TILE=_TILE,
                ONE_TILE=self.group.n_units <= _TILE,
                KP=padded,
                num_warps=4,
                num_stages=3,
            )
        return factors

    def _bring(
        self, members: Sequence[LoraAdapter]
    ) -> np.ndarray[tuple[int, int, int], np.dtype[np.int64]]:
        """Copy what lies elsewhere or otherwise; return addresses as in `WeightTable`."""

        def address(half: torch.Tensor) -> int:
            brought = half.to(self.device, self._element).contiguous()
            self._weights.append(brought)
            return brought.data_ptr()

        modules = [[member.modules[name] for member in members] for name in self.group.names]
        return np.array(
            [
                [[address(module.lora_a) for module in row] for row in modules],
                [[address(module.lora_b) for module in row] for row in modules],
            ]
        )

    def _empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def cluster(
    gram: torch.Tensor,
    draws: torch.Tensor,
    *,
    align_sign: bool,
    relative_zero: float,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cluster the units of each module from each start; see `cluster_units`.

    Args:
        gram: shape [M, N, N], float64, N at most `lego_core.cluster.MAX_UNITS`.
        draws: shape [R, k], float64, on the device; k at most `lego_core.cluster.MAX_CLUSTERS`.
        align_sign: see `cluster_units`.
        relative_zero: squared distances below this share of the largest square are none.
        max_iterations: of each start.

    Returns:
        codes: sign times (cluster + 1) of each unit, shape [M, R, N], int32.
        inertia: shape [M, R], float32, in shares of the largest square.
        centroid_squares: shape [M, R, k], float32, likewise.
    """
    n_modules, n_units, _ = gram.shape
    restarts, k = draws.shape
    padded_units, padded_k = _power_of_2(n_units), _power_of_2(k)
    tile = min(padded_units, _TILE)
    spill = n_modules * restarts * padded_k * padded_units if padded_units > tile else 1
    codes, order = torch.empty(
        (2, n_modules, restarts, n_units), dtype=torch.int32, device=gram.device
    )
    inertia = torch.empty((n_modules, restarts), dtype=torch.float32, device=gram.device)
    squares = torch.empty((n_modules, restarts, k), dtype=torch.float32, device=gram.device)
    triton_clustering.cluster_kernel[(n_modules, restarts)](
        gram.contiguous(),
        order,
        draws.contiguous(),
        codes,
        inertia,
        squares,
        torch.empty(spill, dtype=torch.float32, device=gram.device),
        n_units,
        k,
        relative_zero,
        max_iterations,
        ALIGN=align_sign,
        NP=padded_units,
        KP=padded_k,
        TILE=tile,
        num_warps=max(1, min(16, padded_units * padded_k // 1024)),
    )
    return codes, inertia, squares


def centroids(
    gram: torch.Tensor,
    clusters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    reweight: bool,
    rounding: float,
    output_gain: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Average the clusters of each module's best start; see `lego_core.reassemble.centroids`.

    Args:
        gram: as given to `cluster`.
        clusters: what that returned.
        reweight: by the norm l2.
        rounding: centroids shorter than this share of their members' mean norm are zero.
        output_gain: factor of the mixing of b.

    Returns:
        mix_a, mix_b: shape [M, k, N], float64.
        sizes: shape [M, k], float64.
    """
    codes, inertia, squares = clusters
    n_modules, restarts, n_units = codes.shape
    k = squares.shape[2]
    mix_a, mix_b = torch.empty((2, n_modules, k, n_units), dtype=torch.float64, device=gram.device)
    sizes = torch.empty((n_modules, k), dtype=torch.float64, device=gram.device)
    triton_clustering.centroids_kernel[(n_modules,)](
        mix_a,
        mix_b,
        sizes,
        gram,
        codes,
        inertia,
        squares,
        n_units,
        k,
        restarts,
        rounding,
        output_gain,
        REWEIGHT=reweight,
        NP=_power_of_2(n_units),
        KP=_power_of_2(k),
        RP=1 << (restarts - 1).bit_length(),
    )
    return mix_a, mix_b, sizes


@lru_cache(64)
def _tables(group: Group, device: torch.device) -> _Tables:
    def half(*, is_b: bool) -> _Half:
        items: list[tuple[int, int, int]] = []
        first_items, offset = [0], 0
        starts: list[int] = []
        for block in group.blocks:
            width, other = block.in_features, block.out_features
            if is_b:
                width, other = other, width
                offset += other * len(block.names)
            for _ in block.names:
                module = len(starts)
                items += [(module, column, width) for column in range(0, width, _CHUNK)]
                first_items.append(len(items))
                starts.append(offset)
                offset += width
            if not is_b:
                offset += other * len(block.names)
        return _Half(
            torch.tensor(items, dtype=torch.int32, device=device),
            torch.tensor(first_items, dtype=torch.int64, device=device),
            torch.tensor(starts, dtype=torch.int64, device=device),
        )

    of_units = [
        (member, row, rank) for member, rank in enumerate(group.ranks) for row in range(rank)
    ]
    sizes = [
        *group.ranks,
        *(width for block in group.blocks for width in (block.in_features, block.out_features)),
    ]
    return _Tables(
        halves=(half(is_b=False), half(is_b=True)),
        of_units=tuple(torch.tensor(of_units, dtype=torch.int32, device=device).T.contiguous()),
        places=np.array(group.places).T,
        is_aligned=not any(size % _VECTOR for size in sizes),
    )


def _power_of_2(size: int) -> int:
    """Return the power of 2 that has room for `size`, at least 16, the least that a dot takes."""
    return max(16, 1 << (size - 1).bit_length())


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)
