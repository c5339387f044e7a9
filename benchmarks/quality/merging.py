"""What is compared: merges of the library, at equal rank, and the bounds on them."""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.quality.model import Subject, Update, worn
from lego_core import LoraAdapter, LoraModule, MergeConfig, merge_adapters
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
        """Whether it works entry by entry."""
        return self.method in SLOW


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
        adapters: the members, on the subject's device.
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


def make(variant: Variant, members: Members, rank: int, subject: Subject) -> Merge:
    """Merge on the subject's device, in a stream of its own."""
    if subject.device.type != "cuda":
        return _make(variant, members, rank, subject)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        merge = _make(variant, members, rank, subject)
    stream.synchronize()
    return merge


@torch.no_grad()
def _make(variant: Variant, members: Members, rank: int, subject: Subject) -> Merge:
    started = time.perf_counter()
    if variant.method in DENSE:
        updates = dict(_dense(variant, members.adapters, subject))
        norm, overlap = _dense_norm(updates, members.exact)
        fidelity = overlap / (norm * members.sum_norm) if norm * members.sum_norm else 0.0
        return Merge(updates, None, fidelity, norm, time.perf_counter() - started)
    kept = members.exact.rank if variant.bound else rank
    config = MergeConfig(method=variant.method, rank=kept, **variant.options)
    merged, report = merge_adapters(members.adapters, config, report=True)
    updates = worn([merged], subject)
    seconds = time.perf_counter() - started
    return Merge(updates, kept, report.fidelity, frobenius(merged), seconds)


def _dense(
    variant: Variant, members: Sequence[LoraAdapter], subject: Subject
) -> Iterator[tuple[str, Update]]:
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
        yield name, Update(merged.T.to(subject.device, subject.gains.dtype)[None])


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
