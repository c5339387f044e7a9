# mypy: ignore-errors
"""Triton kernels of the two passes over the weights. `kernels.py` launches them and says what for.

Addresses are integers because the weights of one launch lie in many tensors. Masked lanes hold 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_units(
    anchor_ptr,
    offsets_ptr,
    members_ptr,
    rows_ptr,
    ranks_ptr,
    module,
    n_members,
    unit,
    n_units,
    column,
    width,
    HALF_B: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Load entries of a few units of one module's half.

    Args:
        anchor_ptr: where offsets are counted from, of the weights' dtype.
        offsets_ptr: where each member's half begins, shape [M, T], int64.
        members_ptr: whose unit i is, shape [N].
        rows_ptr: its row in that member's half, shape [N].
        ranks_ptr: that member's rank, shape [N].
        module: m.
        n_members: T.
        unit: shape [U].
        n_units: N.
        column: shape [C].
        width: in_features or out_features.
        HALF_B: False for lora_A [r, width], True for lora_B [width, r].
        ALIGNED: whether offsets, widths and ranks are multiples of 8, so that loads can be wide.

    Returns:
        Shape [U, C] for lora_A, [C, U] for lora_B: as the weights lie in memory.
    """
    if ALIGNED:
        n_units = tl.multiple_of(n_units, 8)
        width = tl.multiple_of(width, 8)
    is_unit = unit < n_units
    member = tl.load(members_ptr + unit, mask=is_unit, other=0)
    row = tl.load(rows_ptr + unit, mask=is_unit, other=0)
    rank = tl.load(ranks_ptr + unit, mask=is_unit, other=0)
    start = tl.load(offsets_ptr + module * n_members + member, mask=is_unit, other=0)
    if ALIGNED:
        row = tl.max_contiguous(tl.multiple_of(row, 8), 8)
        rank = tl.max_constancy(tl.multiple_of(rank, 8), 8)
        start = tl.max_constancy(tl.multiple_of(start, 8), 8)
    if HALF_B:
        at = start[None, :] + (column[:, None] * rank[None, :] + row[None, :])
        inside = (column < width)[:, None] & is_unit[None, :]
    else:
        at = (start[:, None] + row[:, None].to(tl.int64) * width) + column[None, :]
        inside = is_unit[:, None] & (column < width)[None, :]
    return tl.load(anchor_ptr + at, mask=inside, other=0)


@triton.jit
def gram_kernel(
    partial_ptr,
    peak_ptr,
    anchor_ptr,
    offsets_ptr,
    members_ptr,
    rows_ptr,
    ranks_ptr,
    items_ptr,
    n_members,
    n_units,
    HALF_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    FACTOR: tl.constexpr,
    PEAKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Inner products over one item, CHUNK columns of one module: partial_ptr [items, N, N], float32.

    Program (item, i, j) has tile (i, j) of them; with PEAKS also the largest absolute entries,
    peak_ptr [items, N]. FACTOR is the dtype that is multiplied. items_ptr [items, 3] holds module,
    first column and width.
    """
    item = tl.program_id(0)
    module = tl.load(items_ptr + item * 3)
    first = tl.load(items_ptr + item * 3 + 1)
    width = tl.load(items_ptr + item * 3 + 2)
    unit = tl.program_id(1) * TILE + tl.arange(0, TILE)
    other = tl.program_id(2) * TILE + tl.arange(0, TILE)
    products = tl.zeros((TILE, TILE), dtype=tl.float32)
    peak = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, CHUNK, STEP):
        column = first + start + tl.arange(0, STEP)
        left = load_units(
            anchor_ptr, offsets_ptr, members_ptr, rows_ptr, ranks_ptr, module, n_members, unit,
            n_units, column, width, HALF_B, ALIGNED,
        ).to(FACTOR)  # fmt: skip
        if ONE_TILE:
            right = left
        else:
            right = load_units(
                anchor_ptr, offsets_ptr, members_ptr, rows_ptr, ranks_ptr, module, n_members, other,
                n_units, column, width, HALF_B, ALIGNED,
            ).to(FACTOR)  # fmt: skip
        if HALF_B:
            products = tl.dot(tl.trans(left), right, products, input_precision="ieee")
        else:
            products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
        if PEAKS:
            peak = tl.maximum(peak, tl.max(tl.abs(left.to(tl.float32)), axis=0 if HALF_B else 1))
    is_unit = unit < n_units
    at = item.to(tl.int64) * n_units * n_units + unit[:, None] * n_units + other[None, :]
    tl.store(partial_ptr + at, products, mask=is_unit[:, None] & (other < n_units)[None, :])
    if PEAKS:
        tl.store(peak_ptr + item * n_units + unit, peak, mask=is_unit)


@triton.jit
def sum_tile(partial_ptr, first, last, n_units, unit, other):
    """Sum a tile of a module's items in their order, made symmetric: shape [U, V], float64."""
    inside = (unit < n_units)[:, None] & (other < n_units)[None, :]
    at = unit[:, None] * n_units + other[None, :]
    mirrored = other[None, :] * n_units + unit[:, None]
    total = tl.zeros((unit.shape[0], other.shape[0]), dtype=tl.float64)
    for item in range(first, last):
        of_item = partial_ptr + item * n_units * n_units
        one = tl.load(of_item + at, mask=inside, other=0).to(tl.float64)
        two = tl.load(of_item + mirrored, mask=inside, other=0).to(tl.float64)
        total += 0.5 * (one + two)
    return total


@triton.jit
def sum_diagonal(partial_ptr, first, last, n_units, unit):
    """Sum the squares of a module's units, shape [U], float64."""
    total = tl.zeros((unit.shape[0],), dtype=tl.float64)
    for item in range(first, last):
        at = partial_ptr + item * n_units * n_units + unit * n_units + unit
        total += tl.load(at, mask=unit < n_units, other=0).to(tl.float64)
    return total


@triton.jit
def largest_peak(peak_ptr, first, last, n_units, unit):
    """Return the largest entries of a module's units, shape [U], float64."""
    largest = tl.zeros((unit.shape[0],), dtype=tl.float32)
    for item in range(first, last):
        peak = tl.load(peak_ptr + item * n_units + unit, mask=unit < n_units, other=0)
        largest = tl.maximum(largest, peak)
    return largest.to(tl.float64)


@triton.jit
def gauge_kernel(
    gram_a_ptr,
    gram_b_ptr,
    coef_a_ptr,
    coef_b_ptr,
    peak_ptr,
    partial_a_ptr,
    partial_b_ptr,
    peak_a_ptr,
    peak_b_ptr,
    first_a_ptr,
    first_b_ptr,
    gains_ptr,
    members_ptr,
    n_members,
    n_units,
    BALANCE: tl.constexpr,
    PEAKS: tl.constexpr,
    NP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum the items of a module and fix the gauge of its units, as `lego_core.units.gauge` does.

    gains_ptr [M, T], scaling times weight. All results are float64: gram_a_ptr and gram_b_ptr
    [M, N, N], coef_a_ptr, coef_b_ptr and, with PEAKS, peak_ptr [M, N].
    """
    module = tl.program_id(0).to(tl.int64)
    first_a = tl.load(first_a_ptr + module)
    last_a = tl.load(first_a_ptr + module + 1)
    first_b = tl.load(first_b_ptr + module)
    last_b = tl.load(first_b_ptr + module + 1)
    unit = tl.arange(0, NP)
    is_unit = unit < n_units
    member = tl.load(members_ptr + unit, mask=is_unit, other=0)
    gain = tl.load(gains_ptr + module * n_members + member, mask=is_unit, other=0)
    coef_a = tl.sqrt(tl.abs(gain))
    coef_b = tl.where(gain < 0, -coef_a, coef_a)
    if BALANCE:
        norm_a = coef_a * tl.sqrt(sum_diagonal(partial_a_ptr, first_a, last_a, n_units, unit))
        norm_b = coef_a * tl.sqrt(sum_diagonal(partial_b_ptr, first_b, last_b, n_units, unit))
        alive = (norm_a > 0) & (norm_b > 0)
        stretch = tl.sqrt(tl.where(alive, norm_b, 1.0) / tl.where(alive, norm_a, 1.0))
        coef_a = tl.where(alive, coef_a * stretch, 0.0)
        coef_b = tl.where(alive, coef_b / stretch, 0.0)
    tl.store(coef_a_ptr + module * n_units + unit, coef_a, mask=is_unit)
    tl.store(coef_b_ptr + module * n_units + unit, coef_b, mask=is_unit)
    if PEAKS:
        peak_a = coef_a * largest_peak(peak_a_ptr, first_a, last_a, n_units, unit)
        peak_b = tl.abs(coef_b) * largest_peak(peak_b_ptr, first_b, last_b, n_units, unit)
        tl.store(peak_ptr + module * n_units + unit, tl.maximum(peak_a, peak_b), mask=is_unit)
    tl.debug_barrier()
    for rows in range(0, NP, TILE):
        left = rows + tl.arange(0, TILE)
        left_a = tl.load(coef_a_ptr + module * n_units + left, mask=left < n_units, other=0)
        left_b = tl.load(coef_b_ptr + module * n_units + left, mask=left < n_units, other=0)
        for columns in range(0, NP, TILE):
            right = columns + tl.arange(0, TILE)
            right_a = tl.load(coef_a_ptr + module * n_units + right, mask=right < n_units, other=0)
            right_b = tl.load(coef_b_ptr + module * n_units + right, mask=right < n_units, other=0)
            at = module * n_units * n_units + left[:, None] * n_units + right[None, :]
            inside = (left < n_units)[:, None] & (right < n_units)[None, :]
            gram_a = sum_tile(partial_a_ptr, first_a, last_a, n_units, left, right)
            tl.store(gram_a_ptr + at, left_a[:, None] * right_a[None, :] * gram_a, mask=inside)
            gram_b = sum_tile(partial_b_ptr, first_b, last_b, n_units, left, right)
            tl.store(gram_b_ptr + at, left_b[:, None] * right_b[None, :] * gram_b, mask=inside)


@triton.jit
def split_weights(mix_ptr, coef_ptr, cluster, k, unit, n_units, FACTOR: tl.constexpr):
    """Load a tile of a module's weights as a sum of three parts of dtype FACTOR times a factor.

    A float32 is the sum of three narrow floats once its row has no range to leave; so products
    with narrow weights need no wide ones.

    Returns:
        high, middle, low: shape [K, U]. A float32 FACTOR needs the first alone.
        largest: the factor of each row, shape [K], float32.
    """
    is_unit = unit < n_units
    coef = tl.load(coef_ptr + unit, mask=is_unit, other=0)
    weight = tl.load(
        mix_ptr + cluster[:, None] * n_units + unit[None, :],
        mask=(cluster < k)[:, None] & is_unit[None, :],
        other=0,
    )
    weight = weight * coef[None, :]
    largest = tl.max(tl.abs(weight), axis=1)
    largest = tl.where(largest > 0, largest, 1.0)
    weight = (weight / largest[:, None]).to(tl.float32)
    high = weight.to(FACTOR)
    middle = (weight - high.to(tl.float32)).to(FACTOR)
    low = (weight - high.to(tl.float32) - middle.to(tl.float32)).to(FACTOR)
    return high, middle, low, largest.to(tl.float32)


@triton.jit
def mix_kernel(
    out_ptr,
    overflow_ptr,
    mix_ptr,
    coef_ptr,
    starts_ptr,
    anchor_ptr,
    offsets_ptr,
    members_ptr,
    rows_ptr,
    ranks_ptr,
    items_ptr,
    n_members,
    n_units,
    k,
    HALF_B: tl.constexpr,
    ALIGNED: tl.constexpr,
    FACTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    KP: tl.constexpr,
):
    """Weighted sums of units over one item: mix_ptr [M, k, N] times coef_ptr [M, N] times the units.

    A module's result begins k * starts_ptr[m] elements into out_ptr and is laid out as lora_A
    [k, width] or lora_B [width, k]. overflow_ptr [items, tiles of k] says whether any is not finite.
    """
    item = tl.program_id(0)
    module = tl.load(items_ptr + item * 3)
    first = tl.load(items_ptr + item * 3 + 1)
    width = tl.load(items_ptr + item * 3 + 2)
    cluster = tl.program_id(1) * KP + tl.arange(0, KP)
    is_cluster = cluster < k
    out = out_ptr + tl.load(starts_ptr + module) * k
    of_module = mix_ptr + module.to(tl.int64) * k * n_units
    of_units = coef_ptr + module * n_units
    if ONE_TILE:
        unit = tl.arange(0, TILE)
        high, middle, low, largest = split_weights(
            of_module, of_units, cluster, k, unit, n_units, FACTOR
        )
    beyond = tl.zeros((STEP, KP) if HALF_B else (KP, STEP), dtype=tl.float32)
    for start in range(0, CHUNK, STEP):
        column = first + start + tl.arange(0, STEP)
        is_column = column < width
        mixed = tl.zeros((STEP, KP) if HALF_B else (KP, STEP), dtype=tl.float32)
        for tile in range(0, n_units, TILE):
            if not ONE_TILE:
                unit = tile + tl.arange(0, TILE)
                high, middle, low, largest = split_weights(
                    of_module, of_units, cluster, k, unit, n_units, FACTOR
                )
            units = load_units(
                anchor_ptr, offsets_ptr, members_ptr, rows_ptr, ranks_ptr, module, n_members, unit,
                n_units, column, width, HALF_B, ALIGNED,
            ).to(FACTOR)  # fmt: skip
            if HALF_B:
                part = tl.dot(units, tl.trans(high), input_precision="ieee")
                if FACTOR != tl.float32:
                    part = tl.dot(units, tl.trans(middle), part)
                    part = tl.dot(units, tl.trans(low), part)
                mixed += part * largest[None, :]
            else:
                part = tl.dot(high, units, input_precision="ieee")
                if FACTOR != tl.float32:
                    part = tl.dot(middle, units, part)
                    part = tl.dot(low, units, part)
                mixed += part * largest[:, None]
        if HALF_B:
            at = out + column[:, None].to(tl.int64) * k + cluster[None, :]
            inside = is_column[:, None] & is_cluster[None, :]
        else:
            at = out + cluster[:, None].to(tl.int64) * width + column[None, :]
            inside = is_cluster[:, None] & is_column[None, :]
        result = mixed.to(out_ptr.dtype.element_ty)
        tl.store(at, result, mask=inside)
        beyond += (result - result).to(tl.float32)  # NaN from infinity and NaN, else 0
    overflow = (tl.sum(tl.sum(beyond, axis=1), axis=0) != 0).to(tl.int32)
    tl.store(overflow_ptr + item * tl.num_programs(1) + tl.program_id(1), overflow)
