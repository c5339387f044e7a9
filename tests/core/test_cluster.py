"""k-means on Gram matrices against explicit vectors, and what a partition must satisfy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lego_core import MergeConfig
from lego_core.cluster import _lloyd, cluster_units, inertia
from tests import references, strategies


@st.composite
def points(draw: st.DrawFn, max_distinct: int = 10, max_copies: int = 1) -> torch.Tensor:
    """Normal vectors as rows, each up to `max_copies` times."""
    generator = torch.Generator().manual_seed(draw(strategies.seeds))
    distinct = draw(st.integers(1, max_distinct))
    dimensions = draw(st.integers(2, 6))
    vectors = torch.randn(distinct, dimensions, generator=generator, dtype=torch.float64)
    copies = torch.randint(1, max_copies + 1, (distinct,), generator=generator)
    return vectors.repeat_interleave(copies, dim=0)


def partition(
    vectors: torch.Tensor, k: int, *, align_sign: bool, restarts: int = 2, seed: int = 0
) -> torch.Tensor:
    gram = (vectors @ vectors.T)[None]
    return cluster_units(gram, k, align_sign=align_sign, restarts=restarts, seed=seed)[0]


def as_sets(signs: torch.Tensor) -> set[frozenset[int]]:
    rows = (row.nonzero()[:, 0].tolist() for row in signs)
    return {frozenset(row) for row in rows if row}


def inertia_of(vectors: torch.Tensor, signs: torch.Tensor) -> float:
    return float(inertia((vectors @ vectors.T)[None], signs[None])[0])


@given(vectors=points(max_copies=3), k=st.integers(1, 12), align_sign=st.booleans())
def test_every_unit_is_in_exactly_one_cluster(
    vectors: torch.Tensor, k: int, *, align_sign: bool
) -> None:
    signs = partition(vectors, k, align_sign=align_sign)
    assert signs.shape == (k, len(vectors))
    assert set(signs.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(signs.abs().sum(dim=0), torch.ones(len(vectors), dtype=torch.float64))
    if not align_sign:
        assert bool((signs >= 0).all())


@given(vectors=points(max_copies=3), k=st.integers(1, 12), align_sign=st.booleans())
def test_no_cluster_is_empty_when_there_are_k_distinct_units(
    vectors: torch.Tensor, k: int, *, align_sign: bool
) -> None:
    signs = partition(vectors, k, align_sign=align_sign, restarts=1)
    assert len(as_sets(signs)) >= min(k, len(vectors.unique(dim=0)))


@given(vectors=points(), extra=st.integers(0, 3), align_sign=st.booleans())
def test_with_enough_clusters_unit_n_is_cluster_n(
    vectors: torch.Tensor, extra: int, *, align_sign: bool
) -> None:
    n = len(vectors)
    signs = partition(vectors, n + extra, align_sign=align_sign)
    assert torch.equal(signs, torch.eye(n + extra, n, dtype=torch.float64))


@given(
    vectors=points(max_distinct=14),
    k=st.integers(1, 6),
    restarts=st.integers(1, 3),
    seed=st.integers(0, 1000),
    align_sign=st.booleans(),
)
def test_partition_is_that_of_a_naive_lloyd_from_the_same_starts(
    vectors: torch.Tensor, k: int, restarts: int, seed: int, *, align_sign: bool
) -> None:
    signs = partition(vectors, k, align_sign=align_sign, restarts=restarts, seed=seed)
    config = MergeConfig(rank=k, align_sign=align_sign, restarts=restarts, seed=seed)
    rows = list(vectors.numpy())
    naive = references.cluster(rows, config)
    assert inertia_of(vectors, signs) <= references.inertia(rows, naive) * (1 + 1e-9) + 1e-9
    assert as_sets(signs) == {frozenset(i for i, _ in members) for members in naive if members}


@given(vectors=points(max_distinct=12), align_sign=st.booleans(), data=st.data())
def test_emptied_clusters_take_the_farthest_units(
    vectors: torch.Tensor, *, align_sign: bool, data: st.DataObject
) -> None:
    """Equal starts leave clusters empty at once, which k-means++ starts hardly ever do."""
    one_of_few = st.integers(0, min(1, len(vectors) - 1))
    starts = data.draw(st.lists(one_of_few, min_size=1, max_size=min(5, len(vectors))))
    gram, centres = (vectors @ vectors.T)[None], torch.tensor([starts])
    signs = _lloyd(gram, centres, align_sign=align_sign)[0]
    rows = list(vectors.numpy())
    config = MergeConfig(rank=len(starts), align_sign=align_sign)
    naive = references.lloyd(rows, [rows[i] for i in starts], config)
    assert as_sets(signs) == {frozenset(i for i, _ in members) for members in naive}
    assert len(as_sets(signs)) == len(starts)


@given(vectors=points(max_distinct=14), k=st.integers(1, 6), align_sign=st.booleans())
def test_every_unit_is_nearest_to_its_own_centroid(
    vectors: torch.Tensor, k: int, *, align_sign: bool
) -> None:
    signs = partition(vectors, k, align_sign=align_sign)
    used = signs[signs.abs().sum(dim=1) > 0]
    centroids = (used @ vectors) / used.abs().sum(dim=1, keepdim=True)
    own = (used.T @ centroids - vectors).norm(dim=1)
    aligned = torch.cat([centroids, -centroids]) if align_sign else centroids
    nearest = torch.cdist(vectors, aligned).amin(dim=1)
    torch.testing.assert_close(own, nearest, rtol=1e-9, atol=1e-9)


@given(vectors=points(max_distinct=14), k=st.integers(1, 6), align_sign=st.booleans())
def test_more_restarts_never_raise_the_inertia(
    vectors: torch.Tensor, k: int, *, align_sign: bool
) -> None:
    few = partition(vectors, k, align_sign=align_sign, restarts=1)
    many = partition(vectors, k, align_sign=align_sign, restarts=8)
    assert inertia_of(vectors, many) <= inertia_of(vectors, few) + 1e-9


@given(vectors=points(), k=st.integers(1, 6), align_sign=st.booleans(), data=st.data())
def test_order_of_the_units_does_not_change_the_partition(
    vectors: torch.Tensor, k: int, *, align_sign: bool, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(vectors))))
    plain = partition(vectors, k, align_sign=align_sign)
    permuted = partition(vectors[order], k, align_sign=align_sign)
    if k < len(vectors):
        assert torch.equal(permuted, plain[:, order])
    else:
        assert as_sets(permuted) == as_sets(plain)


@given(seed=strategies.seeds, k=st.integers(1, 6), align_sign=st.booleans())
def test_what_else_is_clustered_does_not_matter(seed: int, k: int, *, align_sign: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(4, 9, 5, generator=generator, dtype=torch.float64)
    together = cluster_units(vectors @ vectors.mT, k, align_sign=align_sign, restarts=3, seed=1)
    for alone, of_batch in zip(vectors, together, strict=True):
        signs = partition(alone, k, align_sign=align_sign, restarts=3, seed=1)
        assert torch.equal(signs, of_batch)


@given(vectors=points(), k=st.integers(1, 6), data=st.data())
def test_align_sign_does_not_see_the_sign_of_a_unit(
    vectors: torch.Tensor, k: int, data: st.DataObject
) -> None:
    size = len(vectors)
    flips = data.draw(st.lists(st.sampled_from([1.0, -1.0]), min_size=size, max_size=size))
    flipped = torch.tensor(flips, dtype=torch.float64)[:, None] * vectors
    assert as_sets(partition(flipped, k, align_sign=True)) == as_sets(
        partition(vectors, k, align_sign=True)
    )


@pytest.mark.parametrize("align_sign", [False, True])
def test_all_units_zero_or_equal_leave_one_cluster(*, align_sign: bool) -> None:
    for vectors in (torch.zeros(6, 3), torch.ones(6, 3), 2 * torch.eye(1, 3).expand(6, 3)):
        signs = partition(vectors.double(), 4, align_sign=align_sign)
        assert as_sets(signs) == {frozenset(range(6))}
