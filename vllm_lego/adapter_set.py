"""What a request asks for: a set of adapters with weights. Parsing only, no look-up.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_lego.errors import BadRequestError

MODEL_SEPARATOR = "+"
_ENTRY_FIELDS = {"name", "weight"}
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """The adapters of one request.

    Attributes:
        weights: weight of each adapter by name, sorted by name: the order in a request is
            without meaning.
        merge: fields of the merge configuration that the request sets, not yet checked.
    """

    weights: Mapping[str, float]
    merge: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_single(self) -> bool:
        """Whether it is one adapter as it is, which needs no merge."""
        return len(self.weights) == 1 and not self.merge and set(self.weights.values()) == {1.0}


def names_none(adapters: object) -> bool:
    """Whether the request field `adapters` asks for nothing: absent, null or an empty list."""
    return adapters is None or adapters == []


def parse_adapters(adapters: object, merge: object, *, max_adapters: int) -> AdapterSet:
    """Read the request fields `adapters`, which names at least one, and `merge`.

    Raises:
        BadRequestError: malformed, a duplicate name, a weight that is not finite, too many.
    """
    if not isinstance(adapters, list):
        raise BadRequestError(
            f"`adapters` must be a list of names or of objects with name and weight, not "
            f"{_json_type(adapters)}",
            param="adapters",
        )
    _refuse_too_many(len(adapters), max_adapters, "adapters")
    return _checked([_entry(entry, i) for i, entry in enumerate(adapters)], merge, "adapters")


def parse_model_name(model: str, merge: object, *, max_adapters: int) -> AdapterSet:
    """Read a `model` that names a set, `sql+style`.

    Raises:
        BadRequestError: as `parse_adapters`.
    """
    names = model.split(MODEL_SEPARATOR)
    _refuse_too_many(len(names), max_adapters, "model")
    if not all(names):
        raise BadRequestError(
            f"`model` {shown(model)} has an empty adapter name around {MODEL_SEPARATOR!r}",
            param="model",
        )
    return _checked([(name, 1.0) for name in names], merge, "model")


def _refuse_too_many(count: int, max_adapters: int, param: str) -> None:
    """Refuse a list before anybody looks into it, however long it is."""
    if count > max_adapters:
        raise BadRequestError(
            f"{count} adapters; this server merges at most {max_adapters} in one request",
            param=param,
        )


def _checked(entries: list[tuple[str, float]], merge: object, param: str) -> AdapterSet:
    weights: dict[str, float] = {}
    for name, weight in sorted(entries):
        if name in weights:
            raise BadRequestError(
                f"adapter {shown(name)} is listed twice; give it one entry with the weight you want",
                param=param,
            )
        weights[name] = weight
    if merge is not None and not isinstance(merge, dict):
        raise BadRequestError(f"`merge` must be an object, not {_json_type(merge)}", param="merge")
    return AdapterSet(weights, merge or {})


def _entry(entry: object, position: int) -> tuple[str, float]:
    param = f"adapters[{position}]"
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, dict):
        raise BadRequestError(
            f"`{param}` must be an adapter's name or an object with name and weight, not "
            f"{_json_type(entry)}",
            param=param,
        )
    unknown = sorted(set(entry) - _ENTRY_FIELDS)
    if unknown:
        raise BadRequestError(
            f"`{param}` has an unknown field {shown(unknown[0])}; the fields are name and weight",
            param=f"{param}.{unknown[0][:_SHOWN]}",
        )
    name, weight = entry.get("name"), entry.get("weight", 1)
    if not isinstance(name, str) or not name:
        raise BadRequestError(
            f"`{param}.name` must be an adapter's name, not {shown(name)}", param=f"{param}.name"
        )
    return name, _weight(weight, param)


def _weight(weight: object, param: str) -> float:
    if not isinstance(weight, bool) and isinstance(weight, int | float):
        try:
            value = float(weight)
        except OverflowError:
            value = math.inf
        if math.isfinite(value):
            return value + 0.0  # so that -0.0 and 0.0 are one weight
    raise BadRequestError(
        f"`{param}.weight` must be a finite number, not {shown(weight)}", param=f"{param}.weight"
    )


def shown(value: object) -> str:
    """Return a client's value as a message shows it: quoted, and not longer than it helps."""
    try:
        text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    except RecursionError:
        text = f"{_json_type(value)} nested too deeply to show"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")
