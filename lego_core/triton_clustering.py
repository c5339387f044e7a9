# mypy: ignore-errors
"""Triton kernels that cluster units. `kernels.py` launches them and says what for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cluster_kernel(
    gram_ptr,
    order_ptr,
    draws_ptr,
    codes_ptr,
    inertia_ptr,
    centroid_squares_ptr,
    products_ptr,
    n_units,
    k,
    relative_zero,
    max_iterations,
    ALIGN: tl.constexpr,
    NP: tl.constexpr,
    KP: tl.constexpr,
    TILE: tl.constexpr,
):
    """k-means of one module's units from one start; the same steps as `cluster.py`, in float32.

    Program (m, r) reads gram_ptr [M, N, N], float64, draws with draws_ptr [R, k], float64, and
    writes codes_ptr [M, R, N], int32: sign times (cluster + 1), and, in units of the module's
    largest square, inertia_ptr [M, R] and centroid_squares_ptr [M, R, k]. Units are visited by
    falling norm, in an order that passes through order_ptr [M, R, N]. With more than one tile of
    units the products of centroids and units pass through products_ptr [M, R, KP, NP].
    """
    module = tl.program_id(0)
    restart = tl.program_id(1)
    run = module * tl.num_programs(1) + restart
    gram = gram_ptr + module.to(tl.int64) * n_units * n_units
    codes = codes_ptr + run * n_units
    unit = tl.arange(0, NP)
    is_unit = unit < n_units
    cluster = tl.arange(0, KP)
    order_ptr += run * n_units
    square = tl.load(gram + unit * n_units + unit, mask=is_unit, other=0)
    place = tl.zeros((NP,), dtype=tl.int32)
    for rivals in range(0, NP, TILE):
        rival = rivals + tl.arange(0, TILE)
        is_rival = rival < n_units
        theirs = tl.load(gram + rival * n_units + rival, mask=is_rival, other=0)[None, :]
        longer = (theirs > square[:, None]) | (
            (theirs == square[:, None]) & (rival[None, :] < unit[:, None])
        )
        place += tl.sum((longer & is_rival[None, :]).to(tl.int32), axis=1)
    tl.store(order_ptr + place, unit, mask=is_unit)
    tl.debug_barrier()
    order = tl.load(order_ptr + unit, mask=is_unit, other=0)
    square = tl.load(gram + order * n_units + order, mask=is_unit, other=0)
    largest = tl.max(square)
    scale = tl.where(largest > 0, 1 / largest, 0.0)  # float32 then has no range to leave
    square = (square * scale).to(tl.float32)

    # k-means++ (Arthur and Vassilvitskii, 2007)
    last = (tl.load(draws_ptr + restart * k) * n_units).to(tl.int32)
    centres = tl.where(cluster == 0, last, -1)
    nearest = tl.where(is_unit, float("inf"), 0.0)
    for step in range(1, k):
        at = tl.load(order_ptr + last)
        row = tl.load(gram + at * n_units + order, mask=is_unit, other=0) * scale
        own = tl.load(gram + at * n_units + at) * scale
        closeness = tl.abs(row) if ALIGN else row
        apart = square + (own - 2 * closeness).to(tl.float32)
        apart = tl.where((apart > relative_zero) & is_unit, apart, 0.0)
        nearest = tl.minimum(nearest, apart)
        cumulative = tl.cumsum(nearest, 0)
        total = tl.max(cumulative)
        target = tl.load(draws_ptr + restart * k + step).to(tl.float32) * total
        drawn = tl.sum(((cumulative <= target) & is_unit).to(tl.int32))
        drawn = tl.minimum(drawn, n_units - 1)
        centres = tl.where(cluster == step, tl.where(total > 0, drawn, -1), centres)
        last = tl.where(total > 0, drawn, 0)

    # Lloyd
    is_centre = centres >= 0
    at = tl.load(order_ptr + tl.maximum(centres, 0), mask=is_centre, other=0)
    products = tl.load(
        gram + at[:, None] * n_units + order[None, :],
        mask=is_centre[:, None] & is_unit[None, :],
        other=0,
    )
    products = (products * scale).to(tl.float32)
    centroid_square = tl.load(gram + at * n_units + at, mask=is_centre, other=0)
    centroid_square = (centroid_square * scale).to(tl.float32)
    sizes = is_centre.to(tl.float32)
    label = tl.full((NP,), -1, dtype=tl.int32)
    sign = tl.full((NP,), 1.0, dtype=tl.float32)
    if NP == TILE:
        whole = tl.load(
            gram + order[:, None] * n_units + order[None, :],
            mask=is_unit[:, None] & is_unit[None, :],
            other=0,
        )
        whole = (whole * scale).to(tl.float32)
    changed = 1
    iteration = 0
    while (changed > 0) & (iteration < max_iterations):
        closeness = tl.abs(products) if ALIGN else products
        distance = square[None, :] - 2 * closeness + centroid_square[:, None]
        distance = tl.where((sizes > 0)[:, None], distance, float("inf"))
        apart = tl.min(distance, axis=0)
        assigned = tl.argmin(distance, axis=0)
        belongs = ((cluster[:, None] == assigned[None, :]) & is_unit[None, :]).to(tl.float32)
        sizes = tl.sum(belongs, axis=1)
        empty = (sizes == 0) & (cluster < k)
        shared = tl.sum(belongs * sizes[:, None], axis=0) > 1
        movable = shared & (apart > relative_zero) & is_unit
        # An emptied cluster takes the unit that is farthest from its centroid.
        while (tl.sum(empty.to(tl.int32)) > 0) & (tl.sum(movable.to(tl.int32)) > 0):
            moved = unit == tl.argmax(tl.where(movable, apart, -1.0), axis=0)
            filled = tl.min(tl.where(empty, cluster, KP))
            assigned = tl.where(moved, filled, assigned)
            apart = tl.where(moved, 0.0, apart)
            belongs = ((cluster[:, None] == assigned[None, :]) & is_unit[None, :]).to(tl.float32)
            sizes = tl.sum(belongs, axis=1)
            empty = (sizes == 0) & (cluster < k)
            shared = tl.sum(belongs * sizes[:, None], axis=0) > 1
            movable = shared & (apart > relative_zero) & is_unit
        towards = tl.sum(tl.where(cluster[:, None] == assigned[None, :], products, 0.0), axis=0)
        turned = tl.where((towards < 0) & ALIGN, -1.0, 1.0)
        changed = tl.sum((((assigned != label) | (turned != sign)) & is_unit).to(tl.int32))
        label = assigned
        sign = turned
        signed = belongs * sign[None, :]
        share = 1 / tl.maximum(sizes, 1.0)
        if NP == TILE:
            products = tl.dot(signed, whole, input_precision="ieee") * share[:, None]
        else:
            code = tl.where(sign < 0, -(label + 1), label + 1)
            tl.store(codes + unit, code, mask=is_unit)
            tl.debug_barrier()
            of_run = products_ptr + run.to(tl.int64) * KP * NP
            for columns in range(0, NP, TILE):
                right = columns + tl.arange(0, TILE)
                right_at = tl.load(order_ptr + right, mask=right < n_units, other=0)
                part = tl.zeros((KP, TILE), dtype=tl.float32)
                for rows in range(0, NP, TILE):
                    left = rows + tl.arange(0, TILE)
                    left_at = tl.load(order_ptr + left, mask=left < n_units, other=0)
                    of_left = tl.load(codes + left, mask=left < n_units, other=0)
                    mine = (tl.abs(of_left)[None, :] - 1) == cluster[:, None]
                    weight = tl.where(mine, tl.where(of_left < 0, -1.0, 1.0)[None, :], 0.0)
                    tile = tl.load(
                        gram + left_at[:, None] * n_units + right_at[None, :],
                        mask=(left < n_units)[:, None] & (right < n_units)[None, :],
                        other=0,
                    )
                    tile = (tile * scale).to(tl.float32)
                    part = tl.dot(weight, tile, part, input_precision="ieee")
                tl.store(of_run + cluster[:, None] * NP + right[None, :], part)
            tl.debug_barrier()
            products = tl.load(of_run + cluster[:, None] * NP + unit[None, :]) * share[:, None]
        centroid_square = tl.sum(products * signed, axis=1) * share
        iteration += 1

    tl.debug_barrier()
    tl.store(codes + order, tl.where(sign < 0, -(label + 1), label + 1), mask=is_unit)
    explained = tl.sum(centroid_square * sizes)
    tl.store(inertia_ptr + run, tl.sum(square) - explained)
    tl.store(centroid_squares_ptr + run * k + cluster, centroid_square, mask=cluster < k)


@triton.jit
def centroids_kernel(
    mix_a_ptr,
    mix_b_ptr,
    sizes_ptr,
    gram_ptr,
    codes_ptr,
    inertia_ptr,
    centroid_squares_ptr,
    n_units,
    k,
    n_restarts,
    rounding,
    output_gain,
    REWEIGHT: tl.constexpr,
    NP: tl.constexpr,
    KP: tl.constexpr,
    RP: tl.constexpr,
):
    """Choose a module's best start and average its clusters, as `lego_core.reassemble` does.

    gram_ptr, codes_ptr, inertia_ptr and centroid_squares_ptr as `cluster_kernel` has them. Writes
    mix_a_ptr and mix_b_ptr [M, k, N] and sizes_ptr [M, k], all float64. REWEIGHT: by the norm l2.
    """
    module = tl.program_id(0).to(tl.int64)
    restart = tl.arange(0, RP)
    is_restart = restart < n_restarts
    spread = tl.load(
        inertia_ptr + module * n_restarts + restart, mask=is_restart, other=float("inf")
    )
    run = module * n_restarts + tl.argmin(spread, axis=0)
    unit = tl.arange(0, NP)
    is_unit = unit < n_units
    cluster = tl.arange(0, KP)
    is_cluster = cluster < k
    code = tl.load(codes_ptr + run * n_units + unit, mask=is_unit, other=0)
    belongs = (tl.abs(code)[None, :] == cluster[:, None] + 1).to(tl.float64)
    sizes = tl.sum(belongs, axis=1)
    share = 1 / tl.maximum(sizes, 1.0)
    if REWEIGHT:
        gram = gram_ptr + module * n_units * n_units
        square = tl.load(gram + unit * n_units + unit, mask=is_unit, other=0)
        norm = tl.sqrt(tl.maximum(square, 0.0))
        wanted = tl.sum(belongs * norm[None, :], axis=1) * share
        found = tl.load(centroid_squares_ptr + run * k + cluster, mask=is_cluster, other=0)
        found = tl.sqrt(tl.maximum(found.to(tl.float64) * tl.max(square), 0.0))
        alive = found > rounding * wanted
        share = tl.where(alive, share * wanted / tl.where(alive, found, 1.0), 0.0)
    weight = belongs * tl.where(code < 0, -1.0, 1.0)[None, :] * share[:, None]
    at = (module * k + cluster[:, None]) * n_units + unit[None, :]
    inside = is_cluster[:, None] & is_unit[None, :]
    tl.store(mix_a_ptr + at, weight, mask=inside)
    tl.store(mix_b_ptr + at, weight * output_gain, mask=inside)
    tl.store(sizes_ptr + module * k + cluster, sizes, mask=is_cluster)
