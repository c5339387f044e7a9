"""How alike adapters are, and what each method would make of them: all from inner products."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import NormalDist

import torch

from lego_core.adapter import LoraAdapter, LoraModule
from lego_core.cluster import cluster_units
from lego_core.config import MergeConfig
from lego_core.errors import ConfigError, IncompatibleAdaptersError
from lego_core.merge import merge_adapters
from lego_core.methods import METHODS
from lego_core.plan import Group, plan_merge
from lego_core.pool import Units, open_pool
from lego_core.threads import one_thread
from lego_core.units import disassemble

CHEAP_ENTRIES = 200_000_000
"""Dense entries of all members that `ties` and its like get through in seconds on one core."""


@dataclass(frozen=True, slots=True)
class Pair:
    """How alike two adapters are. None where they have nothing to compare.

    Attributes:
        first, second: their indices.
        cosine: of their updates, over all modules of both, from -1 to 1.
        alignment: the mean, over the units of both, of the best |cosine| with a unit of the
            other, from 0 to 1. Units are compared as they are clustered: balanced, sign aligned.
        by_chance: about what the alignment of unrelated adapters of these shapes would be.
    """

    first: int
    second: int
    cosine: float | None
    alignment: float | None
    by_chance: float | None


@dataclass(frozen=True, slots=True)
class Similarity:
    """All pairs, and by module the mean alignment of the pairs that have it in common."""

    pairs: tuple[Pair, ...]
    modules: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class MethodOutcome:
    """What a method would make of the adapters.

    Attributes:
        method: its name.
        fidelity: of the whole merge; None if the method cannot have them.
        modules: fidelity by module.
        reason: why it cannot.
    """

    method: str
    fidelity: float | None
    modules: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class UnitMap:
    """The units of one module, in the order of their clusters.

    Attributes:
        module: its name.
        owners: index of the adapter of each unit.
        clusters: which cluster each unit is in, 0, 0, …, 1, …; those shared by most adapters
            come first.
        similarity: |cosine| of each two units, [N][N]; 0 for a unit that does nothing.
    """

    module: str
    owners: tuple[int, ...]
    clusters: tuple[int, ...]
    similarity: tuple[tuple[float, ...], ...]


def check_mergeable(
    adapters: Sequence[LoraAdapter], weights: Sequence[float] | None = None
) -> None:
    """Run the checks of `merge_adapters` without the work: on stand-ins of rank 1.

    Raises:
        IncompatibleAdaptersError: these adapters cannot be merged.
    """
    zero = torch.zeros(1, 1)
    stand_ins = [
        replace(
            adapter,
            digest=adapter.digest or "-",
            modules={
                name: LoraModule(
                    zero.expand(1, module.in_features),
                    zero.expand(module.out_features, 1),
                    module.scaling,
                    is_embedding=module.is_embedding,
                )
                for name, module in adapter.modules.items()
            },
        )
        for adapter in adapters
    ]
    merge_adapters(stand_ins, MergeConfig(method="svd", rank=1), weights=weights)


def compare_adapters(
    adapters: Sequence[LoraAdapter], *, device: torch.device | str = "cpu"
) -> Similarity:
    """Compare each two adapters, as they are: without weights.

    Raises:
        IncompatibleAdaptersError: they disagree about a module's shape.
    """
    target = torch.device(device)
    n = len(adapters)
    dots = [[0.0] * n for _ in range(n)]
    best: dict[tuple[int, int], _Best] = {}
    modules: dict[str, float] = {}
    with one_thread(target):
        for group in plan_merge(adapters):
            pool = open_pool(group, adapters, target, "products")
            units = disassemble(pool, adapters, [1.0] * n, balance=True)
            products = units.gram_a * units.gram_b
            cosines = _cosines(units)
            alive = cosines.diagonal(dim1=1, dim2=2) > 0
            of_pairs: list[torch.Tensor] = []
            columns = list(zip(group.members, group.columns, strict=True))
            for i, at in columns:
                dots[i][i] += float(products[:, at, at].sum())
            for (i, at), (j, to) in combinations(columns, 2):
                dots[i][j] += float(products[:, at, to].sum())
                between = cosines[:, at, to]
                total = between.amax(dim=2).sum(dim=1) + between.amax(dim=1).sum(dim=1)
                count = (alive[:, at].sum(dim=1) + alive[:, to].sum(dim=1)).double()
                sums = best.setdefault((i, j), _Best())
                sums.total += float(total.sum())
                sums.count += float(count.sum())
                sums.by_chance += float((_by_chance(group, at, to).to(target) * count).sum())
                of_pairs.append(total / count.clamp_min(1))
            if of_pairs:
                means = torch.stack(of_pairs).mean(dim=0).tolist()
                modules |= zip(group.names, means, strict=True)
    return Similarity(
        tuple(
            _pair(i, j, _ratio(dots[i][j], math.sqrt(dots[i][i] * dots[j][j])), best.get((i, j)))
            for i, j in combinations(range(n), 2)
        ),
        modules,
    )


def try_methods(
    adapters: Sequence[LoraAdapter],
    rank: int,
    *,
    weights: Sequence[float] | None = None,
    methods: Collection[str] | None = None,
    device: torch.device | str = "cpu",
    starting: Callable[[str], None] | None = None,
) -> tuple[MethodOutcome, ...]:
    """Merge by each method with its default options, and keep the fidelities.

    Args:
        adapters: what to merge.
        rank: of the merges.
        weights: as for `merge_adapters`.
        methods: which; by default all, those that work entry by entry (`ties`, `dare_ties`,
            `knots`) only if the members' dense updates have at most `CHEAP_ENTRIES` entries.
        device: where to compute.
        starting: told each method when its turn comes.
    """
    if methods is None:
        methods = [name for name in METHODS if name not in costly_methods(adapters)]
    outcomes: list[MethodOutcome] = []
    for method in METHODS:
        if method not in methods:
            continue
        if starting:
            starting(method)
        config = MergeConfig(method=method, rank=rank)
        try:
            _, report = merge_adapters(
                adapters, config, weights=weights, device=device, report=True
            )
        except (ConfigError, IncompatibleAdaptersError) as error:
            outcomes.append(MethodOutcome(method, None, reason=str(error)))
            continue
        fidelities = {name: module.fidelity for name, module in report.modules.items()}
        outcomes.append(MethodOutcome(method, report.fidelity, fidelities))
    return tuple(outcomes)


def costly_methods(adapters: Sequence[LoraAdapter]) -> tuple[str, ...]:
    """Return the methods that would take long over these adapters."""
    entries = sum(m.in_features * m.out_features for a in adapters for m in a.modules.values())
    if entries <= CHEAP_ENTRIES:
        return ()
    return tuple(name for name, method in METHODS.items() if method.needs == "units")


def map_units(
    adapters: Sequence[LoraAdapter],
    module: str,
    config: MergeConfig,
    *,
    weights: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> UnitMap:
    """Cluster the units of one module as method `lego` does, and tell how alike they are.

    Args:
        adapters: some of them must have the module.
        module: its name.
        config: of method `lego`.
        weights: as for `merge_adapters`.
        device: where to compute.
    """
    target = torch.device(device)
    touching = [i for i, adapter in enumerate(adapters) if module in adapter.modules]
    parts = [replace(adapters[i], modules={module: adapters[i].modules[module]}) for i in touching]
    gains = [1.0 if weights is None else weights[i] for i in touching]
    with one_thread(target):
        (group,) = plan_merge(parts)
        pool = open_pool(group, parts, target, "products")
        units = disassemble(pool, parts, gains, balance=config.balance)
        signs = cluster_units(
            units.gram_a + units.gram_b,
            config.rank,
            align_sign=config.align_sign,
            restarts=config.restarts,
            seed=config.seed,
        )
        cluster_of: list[int] = signs.abs().argmax(dim=1)[0].tolist()
        similarity: list[list[float]] = _cosines(units)[0].tolist()
    owners = [
        touching[member]
        for member, rank in zip(group.members, group.ranks, strict=True)
        for _ in range(rank)
    ]
    order, clusters = _by_cluster(cluster_of, owners)
    return UnitMap(
        module,
        tuple(owners[i] for i in order),
        tuple(clusters),
        tuple(tuple(similarity[i][j] for j in order) for i in order),
    )


def _by_cluster(cluster_of: Sequence[int], owners: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the units' order and their clusters, numbered in that order."""
    members: dict[int, list[int]] = {}
    for unit, cluster in enumerate(cluster_of):
        members.setdefault(cluster, []).append(unit)

    def most_shared_first(units: list[int]) -> tuple[int, int, int, int]:
        of = [owners[unit] for unit in units]
        return -len(set(of)), -len(units), of[0], units[0]

    ranked = sorted(members.values(), key=most_shared_first)
    order = [unit for units in ranked for unit in units]
    return order, [number for number, units in enumerate(ranked) for _ in units]


def _cosines(units: Units) -> torch.Tensor:
    """Return |cosine| of the vectors [a; b] of each two units, shape [M, N, N]; of zero units 0."""
    gram = units.gram_a + units.gram_b
    norms = gram.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    return torch.where(scale > 0, gram.abs() / scale, 0.0).clamp_max(1)


@dataclass(slots=True)
class _Best:
    """Sums over the units of two adapters."""

    total: float = 0.0
    count: float = 0.0
    by_chance: float = 0.0


def _pair(i: int, j: int, cosine: float | None, best: _Best | None) -> Pair:
    if best is None:
        return Pair(i, j, cosine, None, None)
    return Pair(i, j, cosine, _ratio(best.total, best.count), _ratio(best.by_chance, best.count))


def _by_chance(group: Group, at: slice, to: slice) -> torch.Tensor:
    """Return the best |cosine| of a random unit with those of the other adapter, shape [M].

    Cosines of random vectors are nearly normal; this is the median of the largest of so many.
    """
    normal = NormalDist()
    ranks = [columns.stop - columns.start for columns in (at, to)]
    largest = [normal.inv_cdf((1 + 0.5 ** (1 / rank)) / 2) for rank in ranks]
    # Of the adapter at `at` there are ranks[0] units, each with ranks[1] to choose from.
    mean = (ranks[0] * largest[1] + ranks[1] * largest[0]) / sum(ranks)
    return torch.tensor(
        [
            min(1.0, mean * math.sqrt(1 / block.in_features + 1 / block.out_features) / 2)
            for block in group.blocks
            for _ in block.names
        ],
        dtype=torch.float64,
    )


def _ratio(value: float, of: float) -> float | None:
    return value / of if of > 0 else None
