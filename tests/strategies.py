"""Hypothesis strategies for adapters, weights and configurations.

Shapes, ranks and seeds are drawn; the entries are normal numbers from the drawn seed, so that no
two distances or norms are equal by accident, which is where k-means may decide either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from lego_core import LoraAdapter, LoraModule, MergeConfig

SHAPES = {
    "model.layers.0.mlp.down_proj": (9, 4),
    "model.layers.0.self_attn.q_proj": (7, 5),
    "model.layers.1.self_attn.q_proj": (7, 5),
}
"""[in_features, out_features] of the modules that the adapters drawn here may touch."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

seeds = st.integers(0, 2**32 - 1)


def module(
    seed: int,
    rank: int,
    in_features: int = 7,
    out_features: int = 5,
    *,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> LoraModule:
    """Return a module of normal numbers; its units are distinct in norm and direction."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return LoraModule(normal(rank, in_features), normal(out_features, rank), scaling)


def adapter(name: str, seed: int, rank: int, **options: Any) -> LoraAdapter:
    """Return an adapter of one module, `q_proj`."""
    return LoraAdapter(name, {"q_proj": module(seed, rank, **options)})


def map_modules(source: LoraAdapter, change: Callable[[LoraModule], LoraModule]) -> LoraAdapter:
    """Return the adapter with each of its modules changed."""
    return LoraAdapter(
        source.name, {name: change(module) for name, module in source.modules.items()}
    )


@st.composite
def adapter_sets(
    draw: st.DrawFn,
    max_size: int = 4,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
) -> list[LoraAdapter]:
    """Adapters with module sets, ranks and scalings of their own; no two units are equal."""
    seed = draw(seeds)
    return [
        LoraAdapter(
            f"adapter-{i}",
            {
                name: module(
                    seed + len(SHAPES) * i + position,
                    draw(st.integers(1, 4)),
                    *SHAPES[name],
                    scaling=draw(st.sampled_from([1.0, 0.25, 2.0, 0.7])),
                    dtype=draw(st.sampled_from(dtypes)),
                )
                for position, name in enumerate(
                    draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
                )
            },
        )
        for i in range(draw(st.integers(1, max_size)))
    ]


nonzero_weights = st.sampled_from([1.0, 0.5, 2.0, -0.7, -1.0, 0.1])
any_weights = st.sampled_from([1.0, 0.5, 2.0, -0.7, -1.0, 0.1, 0.0])


@st.composite
def weighted_sets(
    draw: st.DrawFn,
    weights: st.SearchStrategy[float] = nonzero_weights,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
) -> tuple[list[LoraAdapter], list[float]]:
    """Several adapters with one weight each."""
    members = draw(adapter_sets(dtypes=dtypes))
    return members, [draw(weights) for _ in members]


def configs(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[MergeConfig]:
    """Every valid kind of configuration, of small ranks; `fixed` replaces a field's strategy."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "rank": st.integers(1, 14),
        "balance": st.booleans(),
        "align_sign": st.booleans(),
        "parameter_reweighting": st.sampled_from(["l2", "inf", "off"]),
        "output_reweighting": st.booleans(),
        "restarts": st.integers(1, 4),
        "seed": st.integers(0, 2**63 - 1),
    }
    return st.builds(MergeConfig, **(fields | fixed))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
"""Whatever `json.loads` may return."""
