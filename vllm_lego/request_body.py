"""Which request bodies name a set of adapters: first by their bytes, then by their JSON.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_lego.adapter_set import names_none, shown
from vllm_lego.errors import BadRequestError

OWN_FIELDS = ("adapters", "merge")
MOST_MODELS = 32
MOST_FIELDS = 1000
"""What no client sends: to read them one by one takes the event loop longer than to read what they hold."""


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
    ambiguous.repeated = _repeated(pairs)
    return ambiguous


def _repeated(pairs: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return {name: given for name, given in values.items() if len(given) > 1}


class Request(_Ambiguous):
    """A request: a JSON object that knows its text, so that what is not ours goes on as it came.

    Of two equal fields the last counts, as for vLLM.

    Attributes:
        repeated: all values of the fields that were given more than once.
    """

    def __init__(self, text: str, found: Sequence[tuple[str, Any, slice]]) -> None:
        super().__init__((name, value) for name, value, _ in found)
        same = len(self) == len(found)
        self.repeated = {} if same else _repeated((name, value) for name, value, _ in found)
        self._text = text
        self._found = found

    def rest(self) -> str:
        """Return the text of all fields but `model` and those that vLLM does not know, without braces."""
        found = self._found
        return ", ".join(self._text[where] for name, _, where in found if name not in _REPLACED)


_REPLACED = ("model", *OWN_FIELDS)
_VALUES = json.JSONDecoder()
_OWN_VALUES = json.JSONDecoder(object_pairs_hook=_object)
_BRACE = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_COMMA_OR_BRACE = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")


def parse(body: bytes) -> Request | None:
    """Return the request as JSON, or None when it is not an object: vLLM says what is wrong.

    Raises:
        BadRequestError: it has more than `MOST_FIELDS`.
    """
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        return _read(text)
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        return None


def _read(text: str) -> Request | None:
    """Read an object field by field: a decoder tells where a value ends."""
    found: list[tuple[str, Any, slice]] = []
    match = _BRACE.match(text)
    if match is not None and text.startswith("}", match.end()):
        match = _COMMA_OR_BRACE.match(text, match.end())
    while match is not None and match[0].strip() != "}":
        start = match.end()
        name, end = _VALUES.raw_decode(text, start)
        colon = _COLON.match(text, end)
        if colon is None or not isinstance(name, str):
            return None
        decoder = _OWN_VALUES if name in OWN_FIELDS else _VALUES
        value, end = decoder.raw_decode(text, colon.end())
        found.append((name, value, slice(start, end)))
        if len(found) > MOST_FIELDS:
            raise BadRequestError(f"the body has more than {MOST_FIELDS} fields")
        match = _COMMA_OR_BRACE.match(text, end)
    return Request(text, found) if match is not None and match.end() == len(text) else None


def ever_names_a_set(request: Request) -> bool:
    """Whether `adapters` names some in any of its occurrences; the last one is what counts."""
    if not names_none(request.get("adapters")):
        return True
    return not all(map(names_none, request.repeated.get("adapters", ())))


def with_fields(rest: str, fields: Mapping[str, str]) -> bytes:
    """Return a body: a `Request`'s rest, and other fields in front of it."""
    first = json.dumps(fields)[:-1]
    text = f"{first}, {rest}}}" if rest else f"{first}}}"
    return text.encode("utf-8", "surrogatepass")


def refuse_repeated(request: Request) -> None:
    """Refuse a set that can be read in two ways.

    Whoever is in front of this server may take the first of two equal keys; JSON's last wins here.

    Raises:
        BadRequestError: `model`, `adapters`, `merge` or a field in one of them is given twice.
    """
    _refuse_in(request, _REPLACED, "")
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
