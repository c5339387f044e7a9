"""The merging methods: one table, one signature.

| name | what | source |
| --- | --- | --- |
| `lego` | cluster the units, keep the centroids, in the gauge of `MergeConfig` | Zhao et al., ICLR 2025, https://arxiv.org/abs/2409.16167 |
| `lego-paper` | the same as the paper has it, as far as can be known: no gauge, norm `inf` | the same |
| `lego-functions` | cluster the units as functions, keep each cluster's leading singular pair | this project's, see `lego_core.functions` |
| `concat` | the exact weighted sum, if the rank has room for all units | the same, section 3.1 |
| `svd` | the best approximation of the weighted sum in Frobenius norm | Eckart and Young, 1936 |
| `linear` | average A and B by position, as PEFT's `linear` does | https://huggingface.co/docs/peft/developer_guides/model_merging |
| `ties` | trim, elect signs, average what agrees, on the dense updates | Yadav et al., NeurIPS 2023, https://arxiv.org/abs/2306.01708 |
| `dare_ties` | drop at random, rescale, then elect and average | Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099 |
| `knots` | TIES on the right singular vectors that the updates have in a common basis | Stoica et al., ICLR 2025, https://arxiv.org/abs/2410.19735 |
| `core_space` | TIES on the small matrices that the updates are in common bases | Panariello et al., NeurIPS 2025, https://arxiv.org/abs/2509.17786 |

All but `ties`, `dare_ties` and `knots` need the weights' inner products alone. What has a higher rank
than asked for is cut to it by SVD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lego_core.cluster import cluster_units
from lego_core.config import MergeConfig
from lego_core.elementwise import dare_ties, ties
from lego_core.errors import ConfigError, IncompatibleAdaptersError
from lego_core.functions import lego_functions
from lego_core.knots import knots
from lego_core.pool import Units, fits_kernels
from lego_core.reassemble import centroids, fused_centroids, rescaled_to_peaks
from lego_core.spectral import core_space, svd
from lego_core.units import Merged, Mixing, assembled


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        merge: from units to their merge, factors of the given dtype. It raises a `ConfigError`
            for a rank it cannot have, an `IncompatibleAdaptersError` for members it cannot take.
        balanced: the gauge that it wants its units in; None means that the configuration says.
        needs: of the weights: inner products; the same in float64, to divide by small ones; or
            the explicit units.
    """

    merge: Callable[[Units, MergeConfig, torch.dtype], Merged]
    balanced: bool | None = None
    needs: Literal["products", "exact products", "units"] = "products"

    def balance(self, config: MergeConfig) -> bool:
        """Return whether units are to be balanced."""
        return config.balance if self.balanced is None else self.balanced

    def needs_peaks(self, config: MergeConfig) -> bool:
        """Return whether the units' largest entries are needed, for the norm `inf`."""
        return self.merge is lego_paper or config.parameter_reweighting == "inf"


def lego(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Cluster the units in parameter space and keep one centroid per cluster."""
    if config.parameter_reweighting != "inf" and fits_kernels(units.pool, config.rank):
        return assembled(units, fused_centroids(units, config), dtype)
    signs = cluster_units(
        units.gram_a + units.gram_b,
        config.rank,
        align_sign=config.align_sign,
        restarts=config.restarts,
        seed=config.seed,
    )
    mixing = centroids(units, signs, config)
    if config.parameter_reweighting == "inf":
        return rescaled_to_peaks(units, signs, mixing, config, dtype)
    return assembled(units, mixing, dtype)


def lego_paper(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Run `lego` with the paper's choices: neither gauge, both reweightings, the norm `inf`."""
    return lego(units, paper_config(config), dtype)


def paper_config(config: MergeConfig) -> MergeConfig:
    """Return the configuration of `lego` that `lego-paper` stands for."""
    return MergeConfig(
        method="lego",
        rank=config.rank,
        balance=False,
        align_sign=False,
        parameter_reweighting="inf",
        output_reweighting=True,
        restarts=config.restarts,
        seed=config.seed,
    )


def concat(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Keep every unit: the exact weighted sum.

    Raises:
        ConfigError: there are more units than the rank has room for.
    """
    group = units.group
    if group.n_units > config.rank:
        raise ConfigError(
            f"module {group.names[0]!r}: the exact sum of these adapters has rank {group.n_units}, "
            f"above the rank {config.rank} asked for; raise rank to {group.n_units}, or use another "
            "method",
            param="rank",
        )
    each = torch.eye(config.rank, group.n_units, dtype=torch.float64, device=units.pool.device)
    each = each.expand(len(group.names), -1, -1)
    return assembled(units, Mixing(each, each), dtype)


def linear(units: Units, config: MergeConfig, dtype: torch.dtype) -> Merged:
    """Sum A and B by position, each member's by the root of scaling times weight.

    The product has cross terms between members that have nothing to do with each other. The
    sign of a negative weight goes to A alone, as in PEFT.

    Raises:
        IncompatibleAdaptersError: members of different ranks have no common positions.
        ConfigError: their rank is above the rank asked for.
    """
    group = units.group
    rank = group.ranks[0]
    if len(set(group.ranks)) > 1:
        raise IncompatibleAdaptersError(
            f"module {group.names[0]!r}: method linear averages by position, but the adapters have "
            f"ranks {', '.join(map(str, group.ranks))}; use another method"
        )
    if rank > config.rank:
        raise ConfigError(
            f"module {group.names[0]!r}: method linear keeps the adapters' rank {rank}, above the "
            f"rank {config.rank} asked for; raise rank to {rank}, or use another method",
            param="rank",
        )
    position = torch.eye(config.rank, rank, dtype=torch.float64, device=units.pool.device)
    position = position.repeat(1, len(group.ranks)).expand(len(group.names), -1, -1)
    sign = units.coef_b.sign()[:, None, :]
    return assembled(units, Mixing(position * sign, position * sign), dtype)


METHODS: Mapping[str, Method] = {
    "lego": Method(lego),
    "lego-paper": Method(lego_paper, balanced=False),
    "lego-functions": Method(lego_functions, balanced=True),
    "concat": Method(concat, balanced=False),
    "svd": Method(svd, balanced=True, needs="exact products"),
    "linear": Method(linear, balanced=False),
    "ties": Method(ties, balanced=True, needs="units"),
    "dare_ties": Method(dare_ties, balanced=True, needs="units"),
    "knots": Method(knots, balanced=True, needs="units"),
    "core_space": Method(core_space, balanced=True, needs="exact products"),
}
