"""Step 3 of LoRA-LEGO: k-means over the units of many modules at once, on Gram matrices alone.

The distance of unit i to the mean of a set of units needs only inner products, so after the
Gram matrices are formed the weights are not read again. Every module is one entry of a batch of
small matrices.
"""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

MAX_ITERATIONS = 100
# Squared distances below this share of the largest square are the rounding of float32 inner
# products: such units are equal.
RELATIVE_ZERO = 1e-6


def cluster_units(
    gram: torch.Tensor,
    k: int,
    *,
    align_sign: bool,
    restarts: int,
    seed: int,
    normalize: bool = False,
) -> torch.Tensor:
    """Partition the N units of each module into at most k clusters.

    Lloyd's algorithm from k-means++ starts (Arthur and Vassilvitskii, 2007), squared Euclidean
    distance; the lowest inertia of `restarts` starts wins. An emptied cluster takes the unit
    that is farthest from its centroid. With `align_sign` unit and negated unit are one point:
    the nearer of the two is assigned and averaged.

    Units are visited by falling norm and the random draws are the same for every module, so
    the partition depends neither on the order of the units nor on what else is clustered.

    Args:
        gram: inner products of the units, shape [M, N, N], float64.
        k: number of clusters, at least 1.
        align_sign: see above.
        restarts: number of starts, at least 1.
        seed: of the draws.
        normalize: compare directions only; the order of visits is still that of the norms.

    Returns:
        Membership with signs, shape [M, k, N], float64: +1 or -1 where unit n belongs to
        cluster c, else 0. Every unit is in one cluster. Clusters are empty only when the units
        have fewer than k distinct values; with k >= N unit n is cluster n.
    """
    n_modules, n_units, _ = gram.shape
    if k >= n_units:
        own = torch.eye(n_units, dtype=gram.dtype, device=gram.device)
        own = torch.nn.functional.pad(own, (0, 0, 0, k - n_units))
        return own.expand(n_modules, k, n_units)

    draws = kmeans_draws(k, restarts, seed).to(gram.device)
    order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    ordered = gram.gather(1, order[:, :, None].expand_as(gram))
    ordered = ordered.gather(2, order[:, None, :].expand_as(gram))
    if normalize:
        norms = ordered.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        scale = norms[:, :, None] * norms[:, None, :]
        ordered = torch.where(scale > 0, ordered / scale, 0.0)

    chosen = torch.zeros(n_modules, k, n_units, dtype=gram.dtype, device=gram.device)
    lowest = gram.new_full((n_modules,), torch.inf)
    for of_restart in draws:  # one after another: memory does not grow with the restarts
        centres = _seed(ordered, of_restart.expand(n_modules, k), align_sign=align_sign)
        signs = _lloyd(ordered, centres, align_sign=align_sign)
        spread = inertia(ordered, signs)
        better = spread < lowest
        chosen = torch.where(better[:, None, None], signs, chosen)
        lowest = torch.where(better, spread, lowest)
    undo = order.argsort(dim=1)
    return chosen.gather(2, undo[:, None, :].expand_as(chosen))


def kmeans_draws(k: int, restarts: int, seed: int) -> torch.Tensor:
    """Return the random numbers of the k-means++ starts, shape [restarts, k], float64, in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((restarts, k), dtype=torch.float64, generator=generator)


def _seed(gram: torch.Tensor, draws: torch.Tensor, *, align_sign: bool) -> torch.Tensor:
    """Draw k-means++ centres. gram [B, N, N], draws [B, k] in [0, 1) -> unit indices [B, k].

    Once every unit equals some centre the rest are -1: no centre.
    """
    n_batch, n_units, _ = gram.shape
    squares = gram.diagonal(dim1=1, dim2=2)
    floor = RELATIVE_ZERO * squares.amax(dim=1, keepdim=True)
    # A product with a triangle of ones: cumsum has no deterministic CUDA implementation.
    below = torch.ones(n_units, n_units, dtype=gram.dtype, device=gram.device).triu()
    rows = torch.arange(n_batch, device=gram.device)
    centres = [(draws[:, 0] * n_units).long()]
    nearest = torch.full_like(squares, torch.inf)
    for step in range(1, draws.shape[1]):
        last = centres[-1].clamp_min(0)
        products = gram[rows, last]
        if align_sign:
            products = products.abs()
        apart = squares + squares.gather(1, last[:, None]) - 2 * products
        nearest = nearest.minimum(apart.where(apart > floor, 0))
        cumulative = nearest @ below
        target = draws[:, step, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
        centres.append(drawn.clamp_max(n_units - 1).where(cumulative[:, -1] > 0, -1))
    return torch.stack(centres, dim=1)


def _lloyd(gram: torch.Tensor, centres: torch.Tensor, *, align_sign: bool) -> torch.Tensor:
    """Iterate from unit indices [B, k], or -1, to a fixed point. Returns signs [B, k, N]."""
    n_units, k = gram.shape[1], centres.shape[1]
    squares = gram.diagonal(dim1=1, dim2=2)
    floor = RELATIVE_ZERO * squares.amax(dim=1, keepdim=True)
    signs = (one_hot(centres.clamp_min(0), n_units) * (centres >= 0)[:, :, None]).to(gram.dtype)
    previous = None
    for _ in range(MAX_ITERATIONS):
        sizes = signs.abs().sum(dim=2)
        means = signs / sizes.clamp_min(1)[:, :, None]
        products = means @ gram
        centroid_squares = (products * means).sum(dim=2)
        closeness = products.abs() if align_sign else products
        distances = squares[:, None, :] - 2 * closeness + centroid_squares[:, :, None]
        distances = distances.masked_fill((sizes == 0)[:, :, None], torch.inf)
        nearest, assigned = distances.min(dim=1)
        _fill_empty(assigned, nearest, k, floor)
        member = one_hot(assigned, k).mT.to(gram.dtype)
        signs = torch.where((products < 0) & align_sign, -member, member)
        if previous is not None and torch.equal(signs, previous):
            break
        previous = signs
    return signs


def _fill_empty(assigned: torch.Tensor, nearest: torch.Tensor, k: int, floor: torch.Tensor) -> None:
    """Move the farthest unit of a shared cluster into each empty one, in place."""
    while True:
        sizes = one_hot(assigned, k).sum(dim=1)
        empty = sizes == 0
        movable = (sizes.gather(1, assigned) > 1) & (nearest > floor)
        needs = (empty.any(dim=1) & movable.any(dim=1)).nonzero()[:, 0]
        if needs.numel() == 0:
            return
        unit = nearest.masked_fill(~movable, -1).argmax(dim=1)[needs]
        assigned[needs, unit] = empty.to(torch.uint8).argmax(dim=1)[needs]
        nearest[needs, unit] = 0


def inertia(gram: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return the sum of squared distances of the units to their centroids, shape [M]."""
    sizes = signs.abs().sum(dim=2)
    explained = ((signs @ gram) * signs).sum(dim=2) / sizes.clamp_min(1)
    return gram.diagonal(dim1=1, dim2=2).sum(dim=1) - explained.sum(dim=1)
