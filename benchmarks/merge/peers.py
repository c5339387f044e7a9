"""What others do with one module: scikit-learn's KMeans, PEFT's SVD."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.merge.cases import Case
from lego_core import LoraAdapter, MergeConfig, merge_adapters

MODULES = 16


def peers(case: Case, projection: str, repeats: int) -> dict[str, Any]:
    """Time ours and theirs in alternation, in float32 as PEFT has it on the CPU.

    Theirs on one module. Ours on MODULES of its shape at once, as a model has them, divided by that.
    """
    name = f"model.layers.0.{projection}"
    drawn = replace(case, layers=1).build(torch.device("cpu"), torch.float32)
    adapters = [
        LoraAdapter(a.name, {f"{name}.{i}": a.modules[name] for i in range(MODULES)}, a.digest)
        for a in drawn
    ]
    runs = {
        "lego": lambda: merge_adapters(adapters, MergeConfig(rank=case.k)),
        "svd": lambda: merge_adapters(adapters, MergeConfig(method="svd", rank=case.k)),
        "scikit-learn KMeans": _kmeans(drawn, name, case.k),
        "PEFT svd": _peft(drawn, name, case.k),
    }
    seconds: dict[str, list[float]] = {of: [] for of in runs}
    for of in ("lego", "svd", "scikit-learn KMeans"):
        runs[of]()
    for _ in range(repeats):
        for of, run in runs.items():
            started = time.perf_counter()
            run()
            taken = time.perf_counter() - started
            seconds[of].append(taken / MODULES if of in {"lego", "svd"} else taken)
    medians = {of: statistics.median(times) for of, times in seconds.items()}
    ours = {"svd": "svd", "PEFT svd": "svd"}
    return {
        "module": projection,
        "repeats": repeats,
        "peers": {
            of: {
                "median_ms": median * 1e3,
                "min_ms": min(seconds[of]) * 1e3,
                "max_ms": max(seconds[of]) * 1e3,
                "over_ours": median / medians[ours.get(of, "lego")],
                "over_lego": median / medians["lego"],
            }
            for of, median in medians.items()
        },
    }


def _kmeans(adapters: list[LoraAdapter], name: str, k: int) -> Callable[[], object]:
    from sklearn.cluster import KMeans  # noqa: PLC0415 - of the extra `benchmarks`

    units = torch.cat(
        [torch.cat([a.modules[name].lora_a, a.modules[name].lora_b.T], dim=1) for a in adapters]
    ).numpy()
    restarts = MergeConfig().restarts
    return lambda: KMeans(k, n_init=restarts, random_state=0).fit(units)


def _peft(adapters: list[LoraAdapter], name: str, k: int) -> Callable[[], object]:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - of the extra `dev`

    first = adapters[0].modules[name]
    plain = nn.Sequential(nn.Linear(first.in_features, first.out_features, bias=False))
    model: Any = None
    for adapter in adapters:
        module = adapter.modules[name]
        config = LoraConfig(r=module.rank, lora_alpha=2 * module.rank, target_modules=["0"])
        if model is None:
            model = get_peft_model(plain, config, adapter.name)
        else:
            model.add_adapter(adapter.name, config)
        layer = model.base_model.model[0]
        layer.lora_A[adapter.name].weight.data = module.lora_a
        layer.lora_B[adapter.name].weight.data = module.lora_b
    names = [adapter.name for adapter in adapters]

    def run() -> None:
        model.add_weighted_adapter(names, [1.0] * len(names), "merged", "svd", svd_rank=k)
        model.delete_adapter("merged")

    return run
