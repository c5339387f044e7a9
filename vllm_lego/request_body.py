"""Which request bodies name a set of adapters: first by their bytes, then by their JSON.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_lego.adapter_set import names_none, shown
from vllm_lego.errors import BadRequestError

OWN_FIELDS = ("adapters", "merge")
MOST_MODELS = 32


def _escaped(word: str) -> str:
    """A pattern for `word` in JSON, whose letters may each be written as an escape."""
    return "".join(rf"(?:{c}|\\u00{ord(c):02x})" for c in word)


_ADAPTERS_KEY = b'"adapters"'
_MODEL_KEY = b'"model"'
_ESCAPE = b"\\u00"
_ESCAPED_LETTERS = (b"\\u006", b"\\u007")  # all that the two keys consist of
_ESCAPED_ADAPTERS = re.compile(rf'"{_escaped("adapters")}"'.encode(), re.IGNORECASE)
_ESCAPED_MODEL = re.compile(rf'"{_escaped("model")}"\s*:'.encode(), re.IGNORECASE)
# A name that is a set or a merge's id. An escape in it may hide anything.
_NAMES_A_SET = re.compile(rb'\s*:\s*"(?:lego-|[^"]*[+\\])')
_NAME = re.compile(rb'\s*:\s*"([^"\\]*)"')


def models_at(body: bytes) -> list[int]:
    """Return where each key `"model"` ends, at the top or further down.

    No more than `MOST_MODELS` of them, which no client writes: such a body is parsed instead.
    `bytes.find` is several times as quick as a pattern, and large bodies are mostly text.
    """
    found: list[int] = []
    at = body.find(_MODEL_KEY)
    while at >= 0 and len(found) < MOST_MODELS:
        found.append(at + len(_MODEL_KEY))
        at = body.find(_MODEL_KEY, found[-1])
    return found


def may_hold_a_set(body: bytes, models: Sequence[int]) -> bool:
    """Whether a body is worth parsing: cheap, and never wrong in the other direction.

    Args:
        body: of the request.
        models: see `models_at`.
    """
    if len(models) >= MOST_MODELS:
        return True
    if _ADAPTERS_KEY in body or json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
        return True
    if any(_NAMES_A_SET.match(body, at) for at in models):
        return True
    escaped = _ESCAPE in body and any(letters in body for letters in _ESCAPED_LETTERS)
    return escaped and bool(_ESCAPED_ADAPTERS.search(body) or _ESCAPED_MODEL.search(body))


def models_named(body: bytes, models: Iterable[int]) -> set[str]:
    """Return every plain string that some `model` in the body has, at the top or further down."""
    names = (_NAME.match(body, at) for at in models)
    return {name[1].decode(errors="replace") for name in names if name}


class _Ambiguous(dict[str, Any]):
    """A JSON object with fields that were given more than once; `repeated` has all their values."""

    repeated: dict[str, list[Any]]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    ambiguous = _Ambiguous(fields)
    values: dict[str, list[Any]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    ambiguous.repeated = {name: given for name, given in values.items() if len(given) > 1}
    return ambiguous


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse(body: bytes) -> dict[str, Any] | None:
    """Return the request as JSON, or None when it is not an object: vLLM says what is wrong."""
    try:
        request = _DECODER.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        return None
    return request if isinstance(request, dict) else None


def ever_names_a_set(request: dict[str, Any]) -> bool:
    """Whether `adapters` names some in any of its occurrences; the last one is what counts."""
    if not names_none(request.get("adapters")):
        return True
    repeated = request.repeated.get("adapters", ()) if isinstance(request, _Ambiguous) else ()
    return not all(map(names_none, repeated))


def without_own_fields(request: dict[str, Any]) -> bytes:
    """Return the request as JSON without the fields that vLLM does not know, and without `model`.

    Raises:
        BadRequestError: it is nested too deeply.
    """
    rest = {k: v for k, v in request.items() if k not in ("model", *OWN_FIELDS)}
    try:
        return json.dumps(rest).encode()
    except RecursionError as error:
        raise BadRequestError("the body is nested too deeply") from error


def with_model(rest: bytes, model: str) -> bytes:
    """Return the JSON object `rest` with one field more, `model`, in front."""
    field = f'{{"model": {json.dumps(model)}'.encode()
    return field + (b", " if rest != b"{}" else b"") + rest[1:]


def refuse_repeated(request: dict[str, Any]) -> None:
    """Refuse a set that can be read in two ways.

    Whoever is in front of this server may take the first of two equal keys; JSON's last wins here.

    Raises:
        BadRequestError: `model`, `adapters`, `merge` or a field in one of them is given twice.
    """
    _refuse_in(request, ("model", *OWN_FIELDS), "")
    adapters = request.get("adapters")
    for i, entry in enumerate(adapters if isinstance(adapters, list) else ()):
        _refuse_in(entry, None, f"adapters[{i}].")
    _refuse_in(request.get("merge"), None, "merge.")


def _refuse_in(value: Any, fields: Iterable[str] | None, prefix: str) -> None:
    repeated = value.repeated if isinstance(value, _Ambiguous) else {}
    for name in repeated if fields is None else fields:
        if name in repeated:
            raise BadRequestError(
                f"{shown(name)} is given {len(repeated[name])} times; give it once",
                param=f"{prefix}{name[:100]}",
            )
