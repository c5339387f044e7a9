"""What can be chosen about a merge: one frozen, hashable value without tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from lego_core.errors import ConfigError

MAX_RANK = 512
MAX_RESTARTS = 64
_SHOWN = 100

Norm = Literal["l2", "inf", "off"]
Scale = Literal["none", "strength", "norm", "nearest"]

NORM_NAMES: tuple[str, ...] = ("l2", "inf", "off")
SCALE_NAMES: tuple[str, ...] = ("none", "strength", "norm", "nearest")

_SCALE: Mapping[str, Any] = {"scale": "none"}
_CLUSTERING: Mapping[str, Any] = {"restarts": 4, "seed": 0, **_SCALE}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "lego": {
        "balance": True,
        "align_sign": True,
        "parameter_reweighting": "l2",
        "output_reweighting": True,
        **_CLUSTERING,
    },
    "lego-paper": _CLUSTERING,
    "lego-functions": {"normalize": False, **_CLUSTERING},
    "concat": _SCALE,
    "svd": _SCALE,
    "linear": _SCALE,
    "ties": {"density": 0.2, **_SCALE},
    "dare_ties": {"density": 0.5, "seed": 0, **_SCALE},
    "knots": {"density": 0.2, **_SCALE},
    "core_space": {"density": 0.2, **_SCALE},
}
"""The options of each method with their defaults. A method has no others."""

METHOD_NAMES: tuple[str, ...] = tuple(OPTIONS)

_OF_METHOD: Any = None  # stands for the method's own default


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """How to merge. Checked when built: a `MergeConfig` that exists can be used.

    An option left out takes the method's default (`OPTIONS`); one that the method does not have
    is None, and giving it is an error. So two configurations are equal exactly when they mean
    the same merge.

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
        seed: of the random draws.
        density: share of each member's entries that survive, above 0 and at most 1: the
            largest (`ties`, `knots`, `core_space`) or random ones (`dare_ties`).
        normalize: cluster the units as functions of norm 1, by angle, not by distance.
        scale: one factor on the whole merge (`lego_core.scale`). `strength` has each member at
            full strength, `norm` makes the merge as long as a member, `nearest` brings it
            nearest to all of them; `none` leaves it as the method has it.

    Raises:
        ConfigError: a field is out of its domain; `param` names it.
    """

    method: str = "lego"
    rank: int = 16
    balance: bool = _OF_METHOD
    align_sign: bool = _OF_METHOD
    parameter_reweighting: Norm = _OF_METHOD
    output_reweighting: bool = _OF_METHOD
    restarts: int = _OF_METHOD
    seed: int = _OF_METHOD
    density: float = _OF_METHOD
    normalize: bool = _OF_METHOD
    scale: Scale = _OF_METHOD

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHOD_NAMES)
        _integer("rank", self.rank, 1, MAX_RANK)
        options = OPTIONS[self.method]
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is _OF_METHOD:
                object.__setattr__(self, name, options.get(name))
            elif name in options:
                check(name, value)
            else:
                raise ConfigError(
                    f"{name} is {_shown(value)}, but method {self.method} has no such option; "
                    f"it has {', '.join(options) or 'none'}",
                    param=name,
                )

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any], defaults: Self | None = None) -> Self:
        """Build a configuration from JSON-like `fields`, the rest taken from `defaults`.

        Another method than that of `defaults` keeps their rank and takes its own options.

        Raises:
            ConfigError: a field is unknown or out of its domain.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name not in known:
                raise ConfigError(
                    f"unknown field {_shown(name)}; the fields are {', '.join(sorted(known))}",
                    param=name[:_SHOWN],
                )
            if value is None:
                raise ConfigError(f"{name} is None; leave it out for its default", param=name)
        defaults = defaults or cls()
        if not fields:
            return defaults
        if fields.get("method", defaults.method) != defaults.method:
            return cls(**{"rank": defaults.rank, **fields})
        return dataclasses.replace(defaults, **fields)

    def as_dict(self) -> dict[str, str | int | float | bool]:
        """Return method, rank and the method's options, in the order of their declaration.

        A scale of `none` is left out where that is the default: merges made before there were
        scales keep their ids.
        """
        fields = dataclasses.asdict(self)
        if self.scale == "none" == OPTIONS[self.method]["scale"]:
            del fields["scale"]
        return {name: value for name, value in fields.items() if value is not None}


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


def _share(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= 1 or math.isnan(value):  # type: ignore[operator, arg-type]
        raise ConfigError(
            f"{name} is {_shown(value)}; it must be a number above 0, at most 1", param=name
        )


_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "balance": _boolean,
    "align_sign": _boolean,
    "parameter_reweighting": lambda name, value: _one_of(name, value, NORM_NAMES),
    "output_reweighting": _boolean,
    "restarts": lambda name, value: _integer(name, value, 1, MAX_RESTARTS),
    "seed": lambda name, value: _integer(name, value, 0, 2**63 - 1),
    "density": _share,
    "normalize": _boolean,
    "scale": lambda name, value: _one_of(name, value, SCALE_NAMES),
}


def _shown(value: object) -> str:
    """Return a value as a message quotes it, not longer than it helps."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, or a deep list
        text = f"{type(value).__name__} too long to show"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
