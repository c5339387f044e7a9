"""What an `adapter_config.json` says, and which adapters are refused for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from lego_core.errors import AdapterFormatError

CONFIG_FILE = "adapter_config.json"

_MAX_PATTERN = 256
_SHOWN = 200
# Python's regular expressions try all ways to match, which can take for ever to fail: bound the
# ways. A repeated group alone can be too many.
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_MAX_REPEATS, _REPEAT = 3, re.compile(r"[*+{]")
_MAX_CHOICES, _CHOICE = 12, re.compile(r"[*+?{|]")
# Initialisations that leave the base model as it was; the others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) shift the base weights, so their files are no plain update of it.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica"}
_UNMERGEABLE: dict[str, str] = {
    "use_dora": "DoRA rescales whole weight columns, which no sum of low-rank updates can express",
    "lora_bias": "it trains a bias in lora_B, which a low-rank update cannot carry",
    "modules_to_save": "it replaces whole modules of the base model",
    "trainable_token_indices": "it replaces embeddings of the base model",
    "target_parameters": "it updates bare parameters instead of layers",
    "layer_replication": "it changes the base model's layers",
    "alora_invocation_tokens": "activated LoRA applies to a part of the sequence only",
    "use_bdlora": "block-diagonal LoRA is not a plain low-rank product",
    "kasa_config": "KaSA truncates the base weights",
    "arrow_config": "Arrow routes each token to other adapters",
    "use_qalora": "QALoRA pools its inputs, which a plain LoRA does not",
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields of `adapter_config.json` that decide what the weights mean.

    Attributes:
        rank, alpha: of the modules that no pattern names.
        use_rslora: scaling is alpha / sqrt(rank) instead of alpha / rank.
        rank_pattern, alpha_pattern: exceptions, by a regular expression of the name's end.
        target_modules: ends of the names of the adapted modules, or one regular expression.
        base_model: hub name or folder of the base model, if it is named.
        targets_listed: whether `target_modules` are ends of names.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...]
    base_model: str | None
    targets_listed: bool = True

    def rank_of(self, module: str) -> int:
        """Return r of one module, by its name in the base model."""
        return int(_pattern_value(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """Return alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = float(_pattern_value(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def untargeted(self, modules: Iterable[str]) -> str | None:
        """Return one of the modules that a list of targets leaves out.

        PEFT would drop its weights on loading, vLLM would not. Regular expressions are not
        tried: a hostile one takes exponential time.
        """
        if not self.targets_listed or not self.target_modules:
            return None
        targets = set(self.target_modules)
        return next((m for m in modules if targets.isdisjoint(_ends(m))), None)


def parse_config(content: bytes, name: str) -> AdapterConfig:
    """Check the bytes of an `adapter_config.json` and keep what the merge needs.

    Raises:
        AdapterFormatError: not JSON, not LoRA, or a kind of LoRA that cannot be merged.
    """
    fields = parse_json_object(content, CONFIG_FILE, name)
    _check_kind(fields, name)
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if not _is_rank(rank):
        raise _refusal(name, f"has r {shown(rank)}; it must be a positive integer")
    if not _is_finite(alpha):
        raise _refusal(name, f"has lora_alpha {shown(alpha)}; it must be a finite number")
    targets = fields.get("target_modules") or []
    if not isinstance(targets, str | list):
        raise _refusal(name, f"has target_modules {shown(targets)}; it must be a string or a list")
    base_model = fields.get("base_model_name_or_path")
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        use_rslora=bool(fields.get("use_rslora", False)),
        rank_pattern=_pattern(fields, "rank_pattern", _is_rank, name),
        alpha_pattern=_pattern(fields, "alpha_pattern", _is_finite, name),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(map(str, targets))),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        targets_listed=not isinstance(targets, str),
    )


def parse_json_object(content: bytes, file: str, name: str) -> dict[str, Any]:
    """As `json_object`.

    Raises:
        AdapterFormatError: it is anything else; the message names adapter and file.
    """
    try:
        return json_object(content)
    except ValueError as error:
        raise AdapterFormatError(f"adapter {name!r}: {file} {error}") from error


def json_object(content: bytes | bytearray) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top is an object and whose objects name no key twice.

    Raises:
        ValueError: it is anything else; the message goes on where the file has been named.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ValueError(f"key {shown(key)} is there twice")
                seen.add(key)
        return found

    try:
        text = content.decode()
        # Half of a surrogate pair is legal JSON, but can be neither hashed nor written again.
        fields = json.loads(text, object_pairs_hook=unique)
        if "\\u" in text:
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = str(error)[:_SHOWN].encode(errors="backslashreplace").decode()
        raise ValueError(f"is not JSON ({reason})") from error
    if not isinstance(fields, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004  a file's mistake, not a caller's
    return fields


def shown(value: object) -> str:
    """Quote a file's value, but not at any length."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__}, too deep to show"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _check_kind(fields: Mapping[str, Any], name: str) -> None:
    """Refuse whatever is not a plain sum W + scaling * B @ A."""
    if fields.get("peft_type") != "LORA":
        kind = shown(fields.get("peft_type"))
        raise _refusal(name, f"has peft_type {kind}; only LORA adapters can be merged")
    if fields.get("bias", "none") != "none":
        bias = shown(fields["bias"])
        raise _refusal(name, f"has bias {bias}; an adapter that trains biases cannot be merged")
    for field, reason in _UNMERGEABLE.items():
        if fields.get(field):
            value = shown(fields[field])
            raise _refusal(name, f"has {field} {value}; it cannot be merged: {reason}")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise _refusal(
            name,
            f"has init_lora_weights {shown(init)}, which changes the base model's weights; convert "
            "it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        )


def _pattern(
    fields: Mapping[str, Any], field: str, is_valid: Callable[[object], bool], name: str
) -> Mapping[str, Any]:
    pattern = fields.get(field) or {}
    if not isinstance(pattern, dict):
        raise _refusal(name, f"has {field} {shown(pattern)}; it must be an object")
    for key, value in pattern.items():
        if not is_valid(value):
            raise _refusal(name, f"has {field}[{shown(key)}] {shown(value)}; it is out of range")
        if not _is_quick(key):
            raise _refusal(
                name,
                f"has {field} key {key[:80]!r}, too long or with too many repeats to be safe",
            )
        try:
            _pattern_regex(key)
        except (re.error, OverflowError, RecursionError) as error:
            raise _refusal(
                name, f"has {field} key {key!r}, no regular expression ({error})"
            ) from error
    return pattern


def _refusal(name: str, problem: str) -> AdapterFormatError:
    return AdapterFormatError(f"adapter {name!r}: {CONFIG_FILE} {problem}")


def _pattern_value(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the whole name or its end after a dot."""
    for key, value in pattern.items():
        if _pattern_regex(key).match(module):
            return value
    return default


def _is_quick(key: str) -> bool:
    return (
        len(key) <= _MAX_PATTERN
        and not _REPEATED_GROUP.search(key)
        and len(_REPEAT.findall(key)) <= _MAX_REPEATS
        and len(_CHOICE.findall(key)) <= _MAX_CHOICES
    )


def _pattern_regex(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _ends(module: str) -> Iterable[str]:
    """All ends of a name at its dots: `a.b.c`, `b.c`, `c`."""
    while module:
        yield module
        module = module.partition(".")[2]


def _is_rank(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_finite(value: object) -> TypeGuard[float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
