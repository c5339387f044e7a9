"""Step 4 and 5 of LoRA-LEGO: centroids and the two reweightings."""

from __future__ import annotations

import math
from functools import partial

import torch

from lego_core.cluster import MAX_ITERATIONS, RELATIVE_ZERO, kmeans_draws
from lego_core.config import MergeConfig
from lego_core.pool import Factors, Units
from lego_core.units import Merged, Mixing, moments


def fused_centroids(units: Units, config: MergeConfig) -> Mixing:
    """Do what `cluster_units` and `centroids` do, for the norms l2 and off, in two launches."""
    from lego_core import kernels  # noqa: PLC0415 - not on every machine

    gram = units.gram_a + units.gram_b
    draws = kmeans_draws(config.rank, config.restarts, config.seed)
    clusters = kernels.cluster(
        gram,
        draws.to(gram.device, non_blocking=True),
        align_sign=config.align_sign,
        relative_zero=RELATIVE_ZERO,
        max_iterations=MAX_ITERATIONS,
    )
    a, b, sizes = kernels.centroids(
        gram,
        clusters,
        reweight=config.parameter_reweighting == "l2",
        rounding=_product_rounding(units),
        output_gain=_output_gain(units, config),
    )
    return Mixing(a, b, sizes)


def centroids(units: Units, signs: torch.Tensor, config: MergeConfig) -> Mixing:
    """Average the units of each cluster and rescale.

    The norm `inf` needs the centroids themselves, see `rescaled_to_peaks`.

    Args:
        units: the units.
        signs: their clusters, shape [M, k, N], as `cluster_units` returns them.
        config: which reweightings.

    Returns:
        k units per module; an empty cluster gives a zero unit.
    """
    sizes = signs.abs().sum(dim=2)
    means = signs / sizes.clamp_min(1)[:, :, None]
    if config.parameter_reweighting == "l2":
        gram = units.gram_a + units.gram_b
        unit_norms = gram.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        centroid_norms = ((means @ gram) * means).sum(dim=2).clamp_min(0).sqrt()
        gain = _gain(signs, sizes, unit_norms, centroid_norms, _product_rounding(units))
        means = means * gain[:, :, None]
    return Mixing(means, means * _output_gain(units, config), sizes)


def rescaled_to_peaks(
    units: Units, signs: torch.Tensor, mixing: Mixing, config: MergeConfig, dtype: torch.dtype
) -> Merged:
    """Assemble centroids and scale them back to their members' mean norm `inf`.

    That norm is not an inner product, so it is taken from the finished centroids.

    Args:
        units: the units, with their peaks.
        signs: their clusters, shape [M, k, N].
        mixing: the centroids, as `centroids` returns them.
        config: the configuration; its output reweighting is in `mixing`.
        dtype: of the result.
    """
    if units.peaks is None:
        raise TypeError("disassembled without peaks")
    coefs = units.coef_a, units.coef_b
    plain = units.pool.mix((mixing.a, mixing.b), coefs, units.pool.dtype)
    output_gain = _output_gain(units, config)
    peaks = torch.cat(
        [
            torch.maximum(a.abs().amax(dim=2), b.abs().amax(dim=1) / output_gain)
            for a, b in plain.blocks
        ]
    ).double()
    rounding = 16 * torch.finfo(units.pool.dtype).eps
    sizes = signs.abs().sum(dim=2)
    gain = _gain(signs, sizes, units.peaks, peaks, rounding)
    scaled = Factors.empty(units.group, signs.shape[1], dtype, units.pool.device)
    first = 0
    for (a, b), (scaled_a, scaled_b) in zip(plain.blocks, scaled.blocks, strict=True):
        of_block = gain[first : first + len(a)].to(a.dtype)
        first += len(a)
        scaled_a.copy_(a * of_block[:, :, None])
        scaled_b.copy_(b * of_block[:, None, :])
    mixing = Mixing(mixing.a * gain[:, :, None], mixing.b * gain[:, :, None], sizes)
    return Merged(scaled, partial(moments, units, mixing), sizes)


def _gain(
    signs: torch.Tensor,
    sizes: torch.Tensor,
    unit_norms: torch.Tensor,
    centroid_norms: torch.Tensor,
    rounding: float,
) -> torch.Tensor:
    """Mean norm of each cluster's members over the norm of its centroid, shape [M, k].

    A centroid that is nothing but the rounding of members that cancel becomes zero.
    """
    wanted = (signs.abs() @ unit_norms[:, :, None])[:, :, 0] / sizes.clamp_min(1)
    alive = centroid_norms > rounding * wanted
    return torch.where(alive, wanted / centroid_norms.clamp_min(1e-300), 0.0)


def _product_rounding(units: Units) -> float:
    """Return the share of its members' norm below which a centroid's is rounding, from products.

    An inner product is right to about eps, so the norm of what cancels is to sqrt(eps).
    """
    return 4 * math.sqrt(torch.finfo(units.pool.dtype).eps)


def _output_gain(units: Units, config: MergeConfig) -> float:
    """Return sqrt(r / k), k the number of clusters there can be."""
    if not config.output_reweighting:
        return 1.0
    return math.sqrt(units.group.mean_rank / min(config.rank, units.group.n_units))
