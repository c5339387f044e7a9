"""LoRA-LEGO once more, naively: float64 NumPy, loops, explicit unit vectors and centroids.

Written from the paper (arXiv 2409.16167) and the documented choices, not from `lego_core`: it never
forms a Gram matrix and treats one module, one restart and one unit at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lego_core import LoraAdapter, LoraModule, MergeConfig

Array = NDArray[np.float64]

ROUNDING = 1e-6
"""A centroid this much shorter than its members is a float32 rounding of zero."""


@dataclass(frozen=True)
class Unit:
    """A rank-one update b a^T."""

    a: Array
    b: Array

    @property
    def vector(self) -> Array:
        return np.concatenate([self.a, self.b])

    @property
    def matrix(self) -> Array:
        return np.outer(self.b, self.a)


@dataclass(frozen=True)
class ReferenceModule:
    delta: Array
    weighted_sum: Array
    cluster_sizes: tuple[int, ...]


Cluster = list[tuple[int, float]]
"""Units (by index) of one cluster, each with the sign it is averaged with."""


def merge(
    adapters: Sequence[LoraAdapter], config: MergeConfig, weights: Sequence[float]
) -> dict[str, ReferenceModule]:
    """Merge module by module. A member of weight 0 takes no part unless all weigh 0."""
    members = [pair for pair in zip(adapters, weights, strict=True) if pair[1] != 0]
    members = members or list(zip(adapters, weights, strict=True))
    members.sort(key=lambda pair: pair[0].name)
    return {
        name: merge_module(name, members, config)
        for name in {name for adapter, _ in members for name in adapter.modules}
    }


def merge_module(
    name: str, members: Sequence[tuple[LoraAdapter, float]], config: MergeConfig
) -> ReferenceModule:
    touching = [(adapter, weight) for adapter, weight in members if name in adapter.modules]
    ranks = [adapter.modules[name].rank for adapter, _ in touching]
    units: list[Unit] = []
    for adapter, weight in touching:
        units += disassemble(adapter, name, weight)
    weighted_sum = np.sum([unit.matrix for unit in units], axis=0)
    if config.balance:
        units = [balanced(unit) for unit in units]
    clusters = cluster([unit.vector for unit in units], config)
    return ReferenceModule(
        delta=reassemble(units, clusters, config, float(np.mean(ranks))),
        weighted_sum=weighted_sum,
        cluster_sizes=tuple(sorted((len(c) for c in clusters if c), reverse=True)),
    )


def disassemble(adapter: LoraAdapter, name: str, weight: float) -> list[Unit]:
    module = adapter.modules[name]
    rows = module.lora_a.to(torch.float64).numpy()
    columns = module.lora_b.to(torch.float64).numpy().T
    gain = np.sqrt(abs(module.scaling * weight))
    sign = np.sign(module.scaling * weight)
    return [Unit(gain * a, sign * gain * b) for a, b in zip(rows, columns, strict=True)]


def balanced(unit: Unit) -> Unit:
    norm_a, norm_b = np.linalg.norm(unit.a), np.linalg.norm(unit.b)
    if norm_a == 0 or norm_b == 0:
        return Unit(np.zeros_like(unit.a), np.zeros_like(unit.b))
    stretch = np.sqrt(norm_b / norm_a)
    return Unit(unit.a * stretch, unit.b / stretch)


def cluster(vectors: Sequence[Array], config: MergeConfig) -> list[Cluster]:
    """The best of several k-means++ and Lloyd runs that visit the units by falling norm."""
    if config.rank >= len(vectors):
        return [[(i, 1.0)] for i in range(len(vectors))]
    order = sorted(range(len(vectors)), key=lambda i: -float(vectors[i] @ vectors[i]))
    visited = [vectors[i] for i in order]
    if config.normalize:
        visited = [vector / (np.linalg.norm(vector) or 1.0) for vector in visited]
    generator = torch.Generator().manual_seed(config.seed)
    draws = torch.rand(
        (config.restarts, config.rank), dtype=torch.float64, generator=generator
    ).tolist()
    runs = [
        lloyd(visited, seed_centres(visited, of_run, align_sign=config.align_sign), config)
        for of_run in draws
    ]
    best = min(runs, key=lambda clusters: inertia(visited, clusters))
    return [[(order[i], sign) for i, sign in members] for members in best]


def seed_centres(
    vectors: Sequence[Array], draws: Sequence[float], *, align_sign: bool
) -> list[Array]:
    """k-means++ (Arthur and Vassilvitskii, 2007): far units are likelier centres."""
    centres = [vectors[int(draws[0] * len(vectors))]]
    for draw in draws[1:]:
        nearest = [
            min(distance(vector, centre, align_sign=align_sign) for centre in centres)
            for vector in vectors
        ]
        reached = np.cumsum(nearest)
        target = draw * reached[-1]
        chosen = next((i for i, r in enumerate(reached) if r > target), len(vectors) - 1)
        centres.append(vectors[chosen])
    return centres


def lloyd(vectors: Sequence[Array], centres: Sequence[Array], config: MergeConfig) -> list[Cluster]:
    """Assign and average until nothing moves. An emptied cluster takes the farthest unit."""
    current: list[Array | None] = list(centres)
    clusters: list[Cluster] = []
    longest = max(float(v @ v) for v in vectors)
    for _ in range(100):
        assigned, nearest, signs = [], [], []
        for vector in vectors:
            distances = [
                np.inf if c is None else distance(vector, c, align_sign=config.align_sign)
                for c in current
            ]
            chosen = int(np.argmin(distances))
            assigned.append(chosen)
            nearest.append(distances[chosen])
        for empty in range(len(current)):
            if empty in assigned:
                continue
            movable = [
                i
                for i in range(len(vectors))
                if assigned.count(assigned[i]) > 1 and nearest[i] > 1e-12 * longest
            ]
            if movable:
                farthest = max(movable, key=lambda i: nearest[i])
                assigned[farthest], nearest[farthest] = empty, 0.0
        for i, vector in enumerate(vectors):
            centre = current[assigned[i]]
            flipped = config.align_sign and centre is not None and float(vector @ centre) < 0
            signs.append(-1.0 if flipped else 1.0)
        before = clusters
        clusters = [
            [(i, signs[i]) for i in range(len(vectors)) if assigned[i] == c]
            for c in range(len(current))
        ]
        if clusters == before:
            break
        current = [centroid(vectors, members) if members else None for members in clusters]
    return clusters


def distance(vector: Array, centre: Array, *, align_sign: bool) -> float:
    """Squared Euclidean distance, to the nearer of centre and -centre with `align_sign`."""
    apart = float(np.sum((vector - centre) ** 2))
    return min(apart, float(np.sum((vector + centre) ** 2))) if align_sign else apart


def centroid(vectors: Sequence[Array], members: Cluster) -> Array:
    return np.mean([sign * vectors[i] for i, sign in members], axis=0)


def inertia(vectors: Sequence[Array], clusters: Sequence[Cluster]) -> float:
    return sum(
        float(np.sum((sign * vectors[i] - centroid(vectors, members)) ** 2))
        for members in clusters
        for i, sign in members
    )


def reassemble(
    units: Sequence[Unit], clusters: Sequence[Cluster], config: MergeConfig, rank: float
) -> Array:
    """The sum of the centroids' matrices, with both reweightings."""
    order = {"l2": 2, "inf": np.inf}.get(config.parameter_reweighting)
    split = len(units[0].a)
    total = np.zeros_like(units[0].matrix)
    for members in clusters:
        if not members:
            continue
        centre = centroid([unit.vector for unit in units], members)
        if order is not None:
            wanted = np.mean([np.linalg.norm(units[i].vector, order) for i, _ in members])
            found = np.linalg.norm(centre, order)
            centre = centre * (wanted / found if found > ROUNDING * wanted else 0.0)
        total += np.outer(centre[split:], centre[:split])
    if config.output_reweighting:
        total *= np.sqrt(rank / min(config.rank, len(units)))
    return total


def function_sums(units: Sequence[Unit], config: MergeConfig) -> list[Array]:
    """The partial sums of clusters of matrices b a^T, compared entry by entry."""
    matrices = [unit.matrix for unit in units]
    return [
        np.sum([matrices[i] for i, _ in members], axis=0)
        for members in cluster([matrix.ravel() for matrix in matrices], config)
        if members
    ]


def delta(module: LoraModule) -> Array:
    """The dense scaling * B @ A."""
    a, b = (half.to(torch.float64).numpy() for half in (module.lora_a, module.lora_b))
    return module.scaling * (b @ a)


def cosine(left: Sequence[Array], right: Sequence[Array]) -> float:
    """The cosine between two lists of matrices, each list taken as one vector."""
    dot = sum(float(np.sum(x * y)) for x, y in zip(left, right, strict=True))
    squares = [sum(float(np.sum(x * x)) for x in side) for side in (left, right)]
    return dot / float(np.sqrt(squares[0] * squares[1]))


def best_cosine(matrix: Array, rank: int) -> float:
    """The highest cosine that any matrix of this rank has with `matrix` (Eckart and Young)."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return float(np.sqrt(squares[:rank].sum() / squares.sum()))


def relative_error(found: Array, wanted: Array) -> float:
    """|found - wanted| / |wanted|; against zero, |found| itself."""
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0))


def truncated(matrix: Array, rank: int) -> Array:
    """The best approximation of this rank in Frobenius norm, by a dense SVD (Eckart and Young)."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def trimmed(matrix: Array, density: float) -> Array:
    """TIES (arXiv 2306.01708), algorithm 1, step 1: keep the entries of largest magnitude."""
    kept = max(1, int(density * matrix.size))
    out = np.zeros_like(matrix)
    for flat in np.argsort(-np.abs(matrix), axis=None)[:kept]:
        out.flat[flat] = matrix.flat[flat]
    return out


def elected_mean(matrices: Sequence[Array]) -> Array:
    """TIES, steps 2 and 3: the sign of the sum, then the mean of the non-zero entries that have it."""
    out = np.zeros_like(matrices[0])
    for place in np.ndindex(out.shape):
        entries = [float(matrix[place]) for matrix in matrices]
        elected = np.sign(sum(entries))
        agreeing = [entry for entry in entries if entry != 0 and np.sign(entry) == elected]
        out[place] = np.mean(agreeing) if agreeing else 0.0
    return out


def ties_mean(matrices: Sequence[Array], density: float) -> Array:
    return elected_mean([trimmed(matrix, density) for matrix in matrices])


def knots_mean(deltas: Sequence[Array], density: float) -> Array:
    """KnOTS-TIES (arXiv 2410.19735): SVD of the updates side by side, TIES on the right vectors.

    Only the directions that the updates have: singular values above rounding.
    """
    left, values, right = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    alive = int((values > 1e-9 * values[0]).sum())
    parts = np.split(right[:alive], len(deltas), axis=1)
    merged: Array = (left[:, :alive] * values[:alive]) @ ties_mean(parts, density)
    return merged


def core_space_mean(members: Sequence[Sequence[Unit]], density: float) -> Array:
    """Core Space (arXiv 2509.17786): TIES on the updates in the singular bases of all A and all B."""
    units = [unit for member in members for unit in member]
    basis_b = span(np.stack([unit.b for unit in units]))
    basis_a = span(np.stack([unit.a for unit in units]))
    cores = [
        basis_b @ np.sum([unit.matrix for unit in member], axis=0) @ basis_a.T for member in members
    ]
    merged: Array = basis_b.T @ ties_mean(cores, density) @ basis_a
    return merged


def span(rows: Array) -> Array:
    """The right singular vectors of non-zero singular values, as rows."""
    _, values, right = np.linalg.svd(rows, full_matrices=False)
    spanned: Array = right[values > 1e-6 * values[0]]
    return spanned
