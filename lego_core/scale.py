"""One factor on a whole merge, by a rule that needs no data.

The merge of T adapters that have little in common can be their sum, which disturbs each with all the others,
or as short as their mean, which leaves a T-th of each. How much an adapter bears of either, no inner
product tells, so each rule is one answer. M is the merge as its method has it, D_t the members' weighted
updates, S their sum; means are over members, each counted by the size of its weight:

| rule | factor g of M | of orthogonal members, if M = S |
| --- | --- | --- |
| `none` | 1 | S |
| `strength` | mean <M, D_t> / mean (<M, D_t>^2 / norm(D_t)^2) | S: each at full strength |
| `norm` | sqrt(mean norm(D_t)^2) / norm(M) | S / sqrt(T): as long as a member |
| `nearest` | mean <M, D_t> / norm(M)^2 | S / T: their mean |

For p = 0 `strength` and for p = 1 `nearest` minimise the mean of |along|^2 + p |across|^2, the parts of
g M - D_t along D_t and across it: p is what disturbance costs against weakness. The less a merge is like the
sum, the shorter `nearest` makes it: with equal weights norm(g M) is fidelity * norm(S) / T.

If all members are equal, or one is alone, all three give that member, where M is a multiple of it. None makes M
longer than S or turns it around. A member fades out with its weight. Inner products are over all modules, so
that the ratio between modules stays the method's, and a member is as strong where it is alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import one_hot

from lego_core.config import Scale
from lego_core.pool import Factors, Units
from lego_core.units import Merged, Moments


def common_gain(
    rule: Scale,
    overlaps: torch.Tensor,
    squares: torch.Tensor,
    merged_square: torch.Tensor,
    sum_square: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Return the factor, of shape [].

    Args:
        rule: not `none`.
        overlaps: <M, D_t>, shape [T], float64.
        squares: |D_t|^2, shape [T].
        merged_square: |M|^2, shape [].
        sum_square: |S|^2, shape [].
        weights: w_t, shape [T].
    """
    share = weights.abs() / weights.abs().sum()
    overlap = (share * overlaps).sum()
    if rule == "strength":
        tiny = torch.finfo(squares.dtype).tiny
        gain = overlap / (share * overlaps * (overlaps / squares.clamp_min(tiny))).sum()
    elif rule == "norm":
        gain = ((share * squares).sum() / merged_square).sqrt()
    else:
        gain = overlap / merged_square
    gain = gain.clamp_min(0).minimum((sum_square / merged_square).sqrt())
    return torch.where((merged_square <= 0) | (sum_square <= 0), 0.0, gain)


def scaled(
    outcomes: Sequence[tuple[Units, Merged]],
    weights: Sequence[float],
    rule: Scale,
    dtype: torch.dtype,
) -> list[tuple[Units, Merged]]:
    """Scale the merges of all groups by their common factor, on lora_B, and round them to `dtype`.

    Args:
        outcomes: the merges, in float32 or wider.
        weights: of all members, as `Group.members` counts them.
        rule: not `none`.
        dtype: of the result.
    """
    device = outcomes[0][0].gram_a.device
    moments = [merged.moments() for _, merged in outcomes]
    overlaps = torch.zeros(len(weights), dtype=torch.float64, device=device)
    squares = torch.zeros_like(overlaps)
    for (units, _), of_group in zip(outcomes, moments, strict=True):
        group = units.group
        ranks = torch.tensor(group.ranks)
        owner = torch.tensor(group.members).repeat_interleave(ranks)
        owned = one_hot(owner, len(weights)).to(device, torch.float64)
        products = (units.gram_a * units.gram_b).sum(dim=0)
        overlaps += of_group.overlap.sum(dim=0) @ owned
        squares += ((products @ owned) * owned).sum(dim=0)
    gain = common_gain(
        rule,
        overlaps,
        squares.clamp_min(0),
        torch.stack([of_group.merged_square.sum() for of_group in moments]).sum(),
        torch.stack([of_group.sum_square.sum() for of_group in moments]).sum(),
        torch.tensor(weights, dtype=torch.float64, device=device),
    )
    return [
        (units, _times(gain, units, merged, of_group, dtype))
        for (units, merged), of_group in zip(outcomes, moments, strict=True)
    ]


def _times(
    gain: torch.Tensor, units: Units, merged: Merged, moments: Moments, dtype: torch.dtype
) -> Merged:
    rank = merged.factors.blocks[0][0].shape[1]
    factors = Factors.empty(units.group, rank, dtype, gain.device)
    for (a, b), (to_a, to_b) in zip(merged.factors.blocks, factors.blocks, strict=True):
        to_a.copy_(a)
        to_b.copy_(b * gain)
    after = Moments(
        moments.overlap * gain, moments.merged_square * gain.square(), moments.sum_square
    )
    return Merged(factors, lambda: after, merged.sizes)
