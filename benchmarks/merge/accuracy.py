"""How right a merge is: its factors given the clusters, and the clusters against scikit-learn's."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.merge.cases import Case
from lego_core import MergeConfig, merge_adapters
from lego_core.cluster import cluster_units, inertia


def accuracy(case: Case, device: torch.device) -> dict[str, Any]:
    """Compare one layer's merge of bfloat16 inputs with float64 arithmetic on the same inputs.

    The reference clusters the same way, so the assignments are the same except at ties; modules
    where they are not are counted and left out.
    """
    single = Case(case.model, case.adapters, case.rank, case.k, layers=1)
    adapters = single.build(device)
    config = MergeConfig(rank=case.k)
    merged, report = merge_adapters(adapters, config, dtype=torch.float32, report=True)
    errors, ratios, otherwise = [], [], 0
    for name, module in merged.modules.items():
        units = _balanced(adapters, name)
        gram = (units @ units.T)[None]
        signs = cluster_units(
            gram, case.k, align_sign=True, restarts=config.restarts, seed=config.seed
        )[0]
        sizes = signs.abs().sum(dim=1)
        found = tuple(sorted((int(size) for size in sizes if size), reverse=True))
        if found != report.modules[name].cluster_sizes:
            otherwise += 1
        else:
            errors.append(_error(module.lora_a, module.lora_b, units, signs, case))
        ratios.append(_inertia_ratio(units, gram, config, case.k))
    known = [ratio for ratio in ratios if ratio is not None]
    return {
        "modules": len(merged.modules),
        "other_assignments": otherwise,
        "largest_relative_error": max(errors, default=None),
        "median_inertia_over_scikit_learn": statistics.median(known) if known else None,
        "total_inertia_over_scikit_learn": statistics.fmean(known) if known else None,
        "largest_inertia_over_scikit_learn": max(known, default=None),
    }


def _balanced(adapters: list[Any], name: str) -> torch.Tensor:
    """Return the vectors [a; b] in float64, |a| = |b|, on the CPU: shape [N, in + out]."""
    rows = []
    for adapter in adapters:
        module = adapter.modules[name]
        root = module.scaling**0.5
        a, b = root * module.lora_a.double().cpu(), root * module.lora_b.double().cpu().T
        stretch = (b.norm(dim=1) / a.norm(dim=1)).sqrt()[:, None]
        rows.append(torch.cat([a * stretch, b / stretch], dim=1))
    return torch.cat(rows)


def _error(
    lora_a: torch.Tensor, lora_b: torch.Tensor, units: torch.Tensor, signs: torch.Tensor, case: Case
) -> float:
    """Return |B A - reference| / |reference| from the factors' inner products."""
    sizes = signs.abs().sum(dim=1, keepdim=True).clamp_min(1)
    means = signs @ units / sizes
    wanted = signs.abs() @ units.norm(dim=1, keepdim=True) / sizes
    means = means * wanted / means.norm(dim=1, keepdim=True).clamp_min(1e-300)
    n_in = lora_a.shape[1]
    a, b = means[:, :n_in], means[:, n_in:].T * (case.rank / min(case.k, len(units))) ** 0.5
    both_a = torch.cat([lora_a.double().cpu(), a])
    both_b = torch.cat([lora_b.double().cpu(), -b], dim=1)
    apart = ((both_a @ both_a.T) * (both_b.T @ both_b)).sum().clamp_min(0).sqrt()
    return float(apart / ((a @ a.T) * (b.T @ b)).sum().sqrt())


def _inertia_ratio(
    units: torch.Tensor, gram: torch.Tensor, config: MergeConfig, k: int
) -> float | None:
    """Return ours over scikit-learn's, same restarts, plain k-means; None without scikit-learn."""
    try:
        from sklearn.cluster import KMeans  # noqa: PLC0415 - of the extra `benchmarks`
    except ImportError:
        return None
    theirs = KMeans(k, n_init=config.restarts, random_state=0).fit(units.numpy()).inertia_
    signs = cluster_units(gram, k, align_sign=False, restarts=config.restarts, seed=config.seed)
    return float(inertia(gram, signs)[0]) / float(theirs)
