"""What `vllm-lego inspect` has found out, before anything is printed or drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lego_core import AdapterConfig, LoraAdapter
from lego_core.comparison import MethodOutcome, Similarity, UnitMap


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter, and what only its configuration says."""

    adapter: LoraAdapter
    config: AdapterConfig
    provenance: Mapping[str, Any] | None

    @property
    def alphas(self) -> list[float]:
        """lora_alpha of each module."""
        return [
            module.scaling * (math.sqrt(module.rank) if self.config.use_rslora else module.rank)
            for module in self.adapter.modules.values()
        ]

    @property
    def kinds(self) -> list[str]:
        """The last parts of its modules' names."""
        return sorted({name.rpartition(".")[2] for name in self.adapter.modules})

    @property
    def layers(self) -> int:
        """In how many layers it has modules."""
        return len({layer_of(name) for name in self.adapter.modules} - {None})


@dataclass(frozen=True, slots=True)
class Findings:
    """All that is known of the adapters.

    Attributes:
        members: those that can be read.
        unreadable: the others' names, each with the reason.
        reason: why the members cannot be merged; empty if they can.
        similarity: None if their shapes disagree.
        rank: of the merges.
        outcomes: by method.
        skipped: methods that would have taken long.
        units: of one module, if asked for.
    """

    members: Sequence[Member]
    unreadable: Sequence[tuple[str, str]]
    reason: str
    similarity: Similarity | None
    rank: int
    outcomes: Sequence[MethodOutcome]
    skipped: Sequence[str]
    units: UnitMap | None

    @property
    def names(self) -> list[str]:
        """The members' names."""
        return [member.adapter.name for member in self.members]


def layer_of(module: str) -> int | None:
    """Return the first number in a module's name."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return int(match[1]) if match else None
