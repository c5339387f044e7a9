"""What is compared: merges of the library, at equal rank, and the bounds on them."""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from benchmarks.quality.model import Update, worn
from lego_core import LoraAdapter, LoraModule, MergeConfig, load_adapter, merge_adapters
from lego_core.config import NORM_NAMES, OPTIONS
from lego_core.elementwise import ties_mean
from lego_core.methods import METHODS

SCALES = tuple(round(2 ** (j / 2 - 3), 4) for j in range(11))
"""Factors on a merge that are tried on the validation split, an eighth to four."""

DENSE = ("ties, dense", "dare_ties, dense")
SLOW = (*(name for name, method in METHODS.items() if method.needs == "units"), *DENSE)
LEGO = tuple(name for name in METHODS if name.startswith("lego"))


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to merge.

    Attributes:
        label: what tables call it.
        method: of the library, or one of `DENSE`: TIES and DARE as published, without a rank.
        options: of the method.
        bound: as large a rank as loses nothing; such a merge is no competitor.
        scales: factors to try.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bound: bool = False
    scales: tuple[float, ...] = SCALES

    @property
    def is_slow(self) -> bool:
        """Whether it works entry by entry, which takes a core half a minute."""
        return self.method in SLOW

    @property
    def is_for_cores(self) -> bool:
        """Whether it is thousands of small decompositions, in which a GPU waits for its host."""
        return self.is_slow or METHODS[self.method].needs != "products"


def competitors() -> list[Variant]:
    """All methods at the rank of the members, with their defaults."""
    return [Variant(name, name) for name in METHODS if name != "concat"]


def bounds() -> list[Variant]:
    """What no merge of so small a rank can be: the exact sum, and the others before they are cut."""
    return [
        Variant("sum, no cut", "concat", bound=True),
        *(Variant(f"{name}, no cut", name, bound=True) for name in ("knots", "core_space")),
        *(Variant(name, name, bound=True) for name in DENSE),
    ]


def scale_rules() -> list[Variant]:
    """The library's rules for a merge's scale, which need no data: nothing is tuned here."""
    from lego_core import config  # noqa: PLC0415 - SCALE_NAMES is not in every version

    rules = [rule for rule in getattr(config, "SCALE_NAMES", ()) if rule != "none"]
    return [
        Variant(f"{name}, scale {rule}", name, {"scale": rule}, name == "concat", (1.0,))
        for name in (*LEGO, "svd", "concat")
        for rule in rules
    ]


def ablation() -> list[Variant]:
    """Every gauge, with every reweighting; and the clustering of functions, as it can be had."""
    domains = {
        "balance": (False, True),
        "align_sign": (False, True),
        "parameter_reweighting": NORM_NAMES,
        "output_reweighting": (False, True),
        "normalize": (False, True),
    }
    found = []
    for name in LEGO:
        known = [option for option in domains if option in OPTIONS[name]]
        for values in itertools.product(*(domains[option] for option in known)):
            options = dict(zip(known, values, strict=True))
            shown = ", ".join(f"{option} {value}" for option, value in options.items())
            found.append(Variant(f"{name}: {shown}" if shown else name, name, options))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Members:
    """What is merged, and what is known of it once for all methods.

    Attributes:
        adapters: the members.
        norms: of their updates, in the Frobenius sense, over all layers.
        exact: their sum.
        sum_norm: its norm.
    """

    adapters: tuple[LoraAdapter, ...]
    norms: tuple[float, ...]
    exact: LoraAdapter
    sum_norm: float

    @classmethod
    def of(cls, adapters: Sequence[LoraAdapter]) -> Members:
        """Measure adapters."""
        rank = sum(adapter.rank for adapter in adapters)
        exact = merge_adapters(adapters, MergeConfig(method="concat", rank=rank))
        norms = tuple(map(frobenius, adapters))
        return cls(tuple(adapters), norms, exact, frobenius(exact))


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """A merge to be worn, and what is known of it without data.

    Attributes:
        updates: by layer.
        rank: of the merge; None if dense.
        fidelity: its cosine with the exact sum.
        norm: of the merge.
        seconds: that it took, beside others.
    """

    updates: Mapping[str, Update]
    rank: int | None
    fidelity: float
    norm: float
    seconds: float

    def rules(self, members: Members) -> dict[str, float]:
        """Scales that need no data, by name."""
        n, norm = len(members.norms), self.norm or 1.0
        return {
            "as it is": 1.0,
            "1 / members": 1 / n,
            "1 / root of members": n**-0.5,
            "norm of a member": sum(members.norms) / n / norm,
            "norm of the average": members.sum_norm / n / norm,
        }


@torch.no_grad()
def make(variant: Variant, members: Members, rank: int) -> Merge:
    """Merge where the members lie."""
    started = time.perf_counter()
    if variant.method in DENSE:
        updates = dict(_dense(variant, members.adapters))
        norm, overlap = _dense_norm(updates, members.exact)
        fidelity = overlap / (norm * members.sum_norm) if norm * members.sum_norm else 0.0
        return Merge(updates, None, fidelity, norm, time.perf_counter() - started)
    kept = members.exact.rank if variant.bound else rank
    config = MergeConfig(method=variant.method, rank=kept, **variant.options)
    merged, report = merge_adapters(members.adapters, config, report=True)
    seconds = time.perf_counter() - started
    return Merge(worn([merged]), kept, report.fidelity, frobenius(merged), seconds)


def make_elsewhere(
    variant: Variant, folder: str, names: tuple[str, ...], rank: int
) -> tuple[Merge, bytes]:
    """Merge on one core of the CPU, in another process: `taken` undoes the packing."""
    torch.set_num_threads(1)
    merge = make(variant, _read(folder, names), rank)
    tensors = {}
    for name, update in merge.updates.items():
        tensors[f"{name}.a"] = update.a.contiguous()
        if update.b is not None:
            tensors[f"{name}.b"] = update.b.contiguous()
    return replace(merge, updates={}), save(tensors)


def taken(merge: Merge, content: bytes) -> Merge:
    """Put the updates back into a merge that was made elsewhere."""
    tensors = load(content)
    names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    updates = {name: Update(tensors[f"{name}.a"], tensors.get(f"{name}.b")) for name in names}
    return replace(merge, updates=updates)


@lru_cache(maxsize=4)
def _read(folder: str, names: tuple[str, ...]) -> Members:
    return Members.of([load_adapter(Path(folder) / name) for name in names])


def _dense(variant: Variant, members: Sequence[LoraAdapter]) -> Iterator[tuple[str, Update]]:
    """Merge whole updates entry by entry, layer after layer."""
    density = OPTIONS[variant.method.removesuffix(", dense")]["density"]
    for name in sorted({name for member in members for name in member.modules}):
        deltas = torch.stack([m.modules[name].delta() for m in members if name in m.modules])
        if variant.method.startswith("dare"):
            generator = torch.Generator(deltas.device).manual_seed(zlib.crc32(name.encode()))
            draws = torch.rand(deltas.shape, generator=generator, device=deltas.device)
            merged = ties_mean(deltas * (draws < density) / density, 1.0)
        else:
            merged = ties_mean(deltas, density)
        yield name, Update(merged.T.to(members[0].dtype)[None])


def _dense_norm(updates: Mapping[str, Update], exact: LoraAdapter) -> tuple[float, float]:
    """Return the norm of dense updates, and their inner product with the exact sum."""
    square, overlap = torch.zeros(2, dtype=torch.float64).unbind()
    for name, update in updates.items():
        dense = update.a[0].T.float()
        square = square + (dense * dense).sum().double().cpu()
        overlap = overlap + (dense * exact.modules[name].delta()).sum().double().cpu()
    return math.sqrt(float(square)), float(overlap)


def frobenius(adapter: LoraAdapter) -> float:
    """Return the norm of an adapter's whole update, from its factors, layers of one shape at once."""
    alike: dict[object, list[LoraModule]] = {}
    for module in adapter.modules.values():
        alike.setdefault((module.lora_a.shape, module.lora_b.shape), []).append(module)
    squares = []
    for modules in alike.values():
        a = torch.stack([module.lora_a for module in modules]).float()
        b = torch.stack([module.lora_b for module in modules]).float()
        scaling = torch.tensor([module.scaling for module in modules], device=a.device)
        squares.append((((a @ a.mT) * (b.mT @ b)).sum(dim=(1, 2)) * scaling**2).sum())
    return math.sqrt(max(0.0, float(torch.stack(squares).double().sum())))
