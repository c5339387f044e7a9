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

from lego_core.adapter import LoraAdapter
from lego_core.errors import IncompatibleAdaptersError

_REMEMBERED_PLANS = 64

Shape = tuple[int, int, bool]
"""in_features, out_features, whether it is an embedding."""
Layout = tuple[tuple[str, int, Shape], ...]
"""Name, rank and shape of each of an adapter's modules."""


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
    """

    members: tuple[int, ...]
    ranks: tuple[int, ...]
    blocks: tuple[Block, ...]

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
        return _plan(tuple(_layout(adapter) for adapter in adapters))
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


def _layout(adapter: LoraAdapter) -> Layout:
    return tuple(
        (name, *_rank_and_shape(module.lora_a.shape, module.lora_b.shape, module.is_embedding))
        for name, module in adapter.modules.items()
    )


def _rank_and_shape(
    a: Sequence[int],
    b: Sequence[int],
    is_embedding: bool,  # noqa: FBT001
) -> tuple[int, Shape]:
    return a[0], (a[1], b[0], is_embedding)


class _ShapesDifferError(Exception):
    """Module name and the indices of two adapters."""


@lru_cache(_REMEMBERED_PLANS)  # a server merges adapters of few layouts, again and again
def _plan(layouts: tuple[Layout, ...]) -> tuple[Group, ...]:
    touched: dict[str, list[tuple[int, int, Shape]]] = defaultdict(list)
    for i, layout in enumerate(layouts):
        for name, rank, shape in layout:
            touched[name].append((i, rank, shape))
    grouped: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[Shape, list[str]]] = {}
    for name in sorted(touched):
        members, ranks, shapes = zip(*touched[name], strict=True)
        for i, shape in zip(members, shapes, strict=True):
            if shape != shapes[0]:
                raise _ShapesDifferError(name, members[0], i)
        grouped.setdefault((members, ranks), {}).setdefault(shapes[0], []).append(name)
    return tuple(
        Group(
            members,
            ranks,
            tuple(Block(tuple(names), *shape) for shape, names in by_shape.items()),
        )
        for (members, ranks), by_shape in grouped.items()
    )
