"""Step 4 and 5 of LoRA-LEGO: centroids and the two reweightings."""

from __future__ import annotations

import math

import torch

from lego_core.config import MergeConfig
from lego_core.pool import Factors
from lego_core.units import Merged, Mixing, Units, moments


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
        # An inner product is right to about eps, so the norm of what cancels to sqrt(eps).
        rounding = 4 * torch.finfo(units.pool.dtype).eps ** 0.5
        means = means * _gain(signs, sizes, unit_norms, centroid_norms, rounding)[:, :, None]
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
    plain = units.assemble(mixing, units.pool.dtype)
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
    return Merged(scaled, moments(units, mixing), sizes)


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


def _output_gain(units: Units, config: MergeConfig) -> float:
    """Return sqrt(r / k), k the number of clusters there can be."""
    if not config.output_reweighting:
        return 1.0
    return math.sqrt(units.group.mean_rank / min(config.rank, units.group.n_units))
