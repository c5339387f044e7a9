"""What can be chosen about a merge: one frozen, hashable value without tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from lego_core.errors import ConfigError

MAX_RANK = 512
MAX_RESTARTS = 64
_SHOWN = 100

Method = Literal["lego"]
Norm = Literal["l2", "inf", "off"]

METHOD_NAMES: tuple[str, ...] = ("lego",)
NORM_NAMES: tuple[str, ...] = ("l2", "inf", "off")


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """How to merge. Checked when built: a `MergeConfig` that exists can be used.

    Attributes:
        method: name of the merging method, a key of `lego_core.methods.METHODS`.
        rank: rank k of the merged adapter, 1 to 512. k-means makes k clusters per module.
        balance: rescale each unit so that its two halves have equal norm. (a, b) and
            (ca, b/c) are one function; the paper clusters them as they come.
        align_sign: treat a unit and its negated twin as one point. (a, b) and (-a, -b) are
            one function, but cancel in a plain centroid. Not in the paper either.
        parameter_reweighting: scale each centroid back to the mean norm of its members, in
            this norm. The paper's first reweighting; it does not say which norm.
        output_reweighting: scale the merge by sqrt(r / k), the paper's Theorem 3.1. r is the
            rank that the sources share, or their mean, which the paper leaves open.
        restarts: independent k-means++ starts, 1 to 64; the lowest inertia wins.
        seed: of the k-means++ draws.

    Raises:
        ConfigError: a field is out of its domain; `param` names it.
    """

    method: Method = "lego"
    rank: int = 16
    balance: bool = True
    align_sign: bool = True
    parameter_reweighting: Norm = "l2"
    output_reweighting: bool = True
    restarts: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHOD_NAMES)
        _integer("rank", self.rank, 1, MAX_RANK)
        _boolean("balance", self.balance)
        _boolean("align_sign", self.align_sign)
        _one_of("parameter_reweighting", self.parameter_reweighting, NORM_NAMES)
        _boolean("output_reweighting", self.output_reweighting)
        _integer("restarts", self.restarts, 1, MAX_RESTARTS)
        _integer("seed", self.seed, 0, 2**63 - 1)

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any], defaults: Self | None = None) -> Self:
        """Build a configuration from JSON-like `fields`, the rest taken from `defaults`.

        Raises:
            ConfigError: a field is unknown or out of its domain.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ConfigError(
                    f"unknown field {_shown(name)}; the fields are {', '.join(sorted(known))}",
                    param=name[:_SHOWN],
                )
        return dataclasses.replace(defaults or cls(), **fields)

    def as_dict(self) -> dict[str, str | int | bool]:
        """Return the fields as JSON-ready values, in the order of their declaration."""
        return dataclasses.asdict(self)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(
            f"{name} is {_shown(value)}; it must be one of {', '.join(allowed)}", param=name
        )


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"{name} is {_shown(value)}; it must be an integer from {low} to {high}", param=name
        )


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {_shown(value)}; it must be true or false", param=name)


def _shown(value: object) -> str:
    """Return a value as a message quotes it, not longer than it helps."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"{type(value).__name__} too long to show"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
