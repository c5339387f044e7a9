"""Which modules are merged together: known from names and shapes alone, before any tensor is touched.

Modules of one shape are a `Block`; blocks whose modules are touched by the same adapters with the
same ranks are a `Group`. Each step of a merge is then one batched operation: over a block where
weights are read, over a group where only the small matrices of inner products are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from lego_core.adapter import Layout, LoraAdapter
from lego_core.errors import IncompatibleAdaptersError

_REMEMBERED_PLANS = 64


@dataclass(frozen=True)
class Block:
    """M modules of one shape."""

    names: tuple[str, ...]
    in_features: int
    out_features: int
    is_embedding: bool


@dataclass(frozen=True)
class Group:
    """Blocks that the same adapters touch with the same ranks.

    Attributes:
        members: indices into the adapters.
        ranks: rank of each member, in the order of `members`.
        blocks: the modules, M in all.
        places: where the modules are in each member's layout, shape [members][M].
    """

    members: tuple[int, ...]
    ranks: tuple[int, ...]
    blocks: tuple[Block, ...]
    places: tuple[tuple[int, ...], ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The M module names, block after block."""
        return tuple(name for block in self.blocks for name in block.names)

    @property
    def n_units(self) -> int:
        """N: units per module."""
        return sum(self.ranks)

    @property
    def mean_rank(self) -> float:
        """The rank that the members share, or their mean."""
        return self.n_units / len(self.ranks)

    @cached_property
    def columns(self) -> tuple[slice, ...]:
        """Where each member's units are among the N."""
        ends = [sum(self.ranks[: i + 1]) for i in range(len(self.ranks))]
        return tuple(slice(end - r, end) for end, r in zip(ends, self.ranks, strict=True))


def plan_merge(adapters: Sequence[LoraAdapter]) -> tuple[Group, ...]:
    """Group the union of the adapters' modules by who touches them, then by shape.

    Raises:
        IncompatibleAdaptersError: two adapters give one module different shapes.
    """
    try:
        return _plan(tuple(adapter.layout for adapter in adapters))
    except _ShapesDifferError as differ:
        name, first, other = differ.args
        one, two = (adapters[i].modules[name] for i in (first, other))
        if one.is_embedding != two.is_embedding:
            raise IncompatibleAdaptersError(
                f"module {name!r} is an embedding to one of the adapters {adapters[first].name!r} and "
                f"{adapters[other].name!r} and a linear layer to the other; they cannot be merged"
            ) from None
        raise IncompatibleAdaptersError(
            f"module {name!r}: adapter {adapters[other].name!r} updates a layer of "
            f"{two.in_features} inputs and {two.out_features} outputs, adapter "
            f"{adapters[first].name!r} one of {one.in_features} and {one.out_features}; "
            "they were trained on different base models and cannot be merged"
        ) from None


class _ShapesDifferError(Exception):
    """Module name and the indices of two adapters."""


@lru_cache(_REMEMBERED_PLANS)  # a server merges adapters of few layouts, again and again
def _plan(layouts: tuple[Layout, ...]) -> tuple[Group, ...]:
    touched: dict[str, list[tuple[int, int, tuple[int, int, bool]]]] = defaultdict(list)
    for i, layout in enumerate(layouts):
        for name, rank, *shape in layout.modules:
            touched[name].append((i, rank, tuple(shape)))  # type: ignore[arg-type]
    grouped: dict[tuple[Any, Any], dict[tuple[int, int, bool], list[str]]] = {}
    for name in sorted(touched):
        members, ranks, shapes = zip(*touched[name], strict=True)
        for i, shape in zip(members, shapes, strict=True):
            if shape != shapes[0]:
                raise _ShapesDifferError(name, members[0], i)
        grouped.setdefault((members, ranks), {}).setdefault(shapes[0], []).append(name)
    places = [{entry[0]: at for at, entry in enumerate(layout.modules)} for layout in layouts]
    groups = []
    for (members, ranks), by_shape in grouped.items():
        blocks = tuple(Block(tuple(names), *shape) for shape, names in by_shape.items())
        names = [name for block in blocks for name in block.names]
        where = tuple(tuple(places[i][name] for name in names) for i in members)
        groups.append(Group(members, ranks, blocks, where))
    return tuple(groups)
