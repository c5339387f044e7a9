"""A recipe: all that a worker needs to make a merge, in one string.

It travels as the `lora_path` of vLLM's LoRARequest, which accompanies every request to every
worker, so no worker depends on having seen an earlier message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

from lego_core.config import MergeConfig

SCHEME = "lego://"


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter of a merge: where it lies, which content is meant, and how much of it.

    Files with this `stamp` (see `file_stamps`) have that content; empty if that is not known. It is no
    part of what is meant.
    """

    name: str
    path: str
    digest: str
    weight: float
    stamp: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to merge and how. `merge_id` is its identity, see `vllm_lego.identity`."""

    merge_id: str
    members: tuple[Member, ...]
    config: MergeConfig

    @property
    def content(self) -> tuple[list[tuple[str, float]], MergeConfig]:
        """What decides the numbers: content and weight of each member, and the configuration."""
        return sorted((member.digest, member.weight) for member in self.members), self.config

    def unstamped(self) -> Recipe:
        """Return it without what is true of one host at one time only."""
        return replace(self, members=tuple(replace(m, stamp="") for m in self.members))

    def encode(self) -> str:
        """Return it as a `lego://` string."""
        fields = {
            "id": self.merge_id,
            "members": [
                [m.name, m.path, m.digest, m.weight, *([m.stamp] if m.stamp else [])]
                for m in self.members
            ],
            "config": self.config.as_dict(),
        }
        return SCHEME + json.dumps(fields, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> Recipe:
        """Undo `encode`."""
        fields = json.loads(text.removeprefix(SCHEME))
        return cls(
            merge_id=fields["id"],
            members=tuple(Member(*member) for member in fields["members"]),
            config=MergeConfig.from_mapping(fields["config"]),
        )
