"""Read and write PEFT LoRA adapter folders.

Only safetensors are read: a `.bin` is a pickle, and unpickling executes code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import safetensors
import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors

from lego_core.adapter import LoraAdapter, LoraModule
from lego_core.errors import AdapterChangedError, AdapterFormatError, AdapterNotFoundError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20

_PREFIX = "base_model.model."
_MAX_PATTERN = 256
# A quantifier after a group can take exponential time to fail.
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
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
    """The fields of `adapter_config.json` that decide what the weights mean."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...]
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """Return r of one module, by its name in the base model."""
        return int(_pattern_value(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """Return alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = float(_pattern_value(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def load_adapter(
    source: str | os.PathLike[str],
    revision: str | None = None,
    *,
    name: str | None = None,
    digest: str | None = None,
) -> LoraAdapter:
    """Read a PEFT LoRA adapter folder into memory, on the CPU, in the dtypes it was saved in.

    Args:
        source: the folder.
        revision: of a hub repository; those cannot be read yet, so only None is taken.
        name: what messages call it; the folder's name by default.
        digest: if given, the content must have this digest.

    Raises:
        AdapterNotFoundError: no such folder or files.
        AdapterFormatError: not a plain LoRA, unreadable, NaN or Inf, or configuration and
            weights disagree.
        AdapterChangedError: the content has another digest.
    """
    folder = Path(source)
    name = name if name is not None else folder.name
    if revision is not None:
        raise AdapterNotFoundError(
            f"adapter {name!r}: revision {revision!r} of a hub repository cannot be read yet; "
            "download it and give the folder"
        )
    config_bytes = _read(folder, CONFIG_FILE, name)
    weights_bytes = _read(folder, WEIGHTS_FILE, name)
    sha = _digest_of(config_bytes)
    sha.update(weights_bytes)
    found = sha.hexdigest()
    if digest is not None and found != digest:
        raise AdapterChangedError(
            f"adapter {name!r} changed on disk: digest {digest[:12]} was asked for, "
            f"{found[:12]} is there; send the request again to use the new content"
        )
    config = parse_config(config_bytes, name)
    try:
        tensors = parse_safetensors(weights_bytes)
    except (safetensors.SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise AdapterFormatError(
            f"adapter {name!r}: {WEIGHTS_FILE} is not a readable safetensors file ({error})"
        ) from error
    return LoraAdapter(
        name=name,
        modules=_modules(tensors, config, name),
        digest=found,
        base_model=config.base_model,
    )


def describe_adapter(
    source: str | os.PathLike[str], *, name: str | None = None
) -> tuple[AdapterConfig, str, int]:
    """Return an adapter's configuration, digest and size in bytes without parsing its weights.

    Raises:
        AdapterNotFoundError, AdapterFormatError: as `load_adapter`, the weights unread.
    """
    folder = Path(source)
    name = name if name is not None else folder.name
    config_bytes = _read(folder, CONFIG_FILE, name)
    sha, size = _digest_of(config_bytes), 0
    with _opened(folder, WEIGHTS_FILE, name) as weights:
        while block := weights.read(_BLOCK_BYTES):
            sha.update(block)
            size += len(block)
    return parse_config(config_bytes, name), sha.hexdigest(), size


def save_adapter(adapter: LoraAdapter, folder: str | os.PathLike[str]) -> None:
    """Write a PEFT folder that `peft` and vLLM load unchanged. Each file appears whole or not at all.

    Raises:
        AdapterFormatError: the modules differ in rank or scaling, which one PEFT configuration
            without patterns cannot say. A merged adapter never does.
    """
    ranks = {module.rank for module in adapter.modules.values()}
    scalings = {module.scaling for module in adapter.modules.values()}
    if len(ranks) > 1 or len(scalings) > 1:
        raise AdapterFormatError(
            f"adapter {adapter.name!r} has modules of ranks {sorted(ranks)} and scalings "
            f"{sorted(scalings)}; only adapters of one rank and one scaling can be saved"
        )
    rank, scaling = ranks.pop(), scalings.pop()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": rank * scaling,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter.modules}),
    }
    tensors: dict[str, torch.Tensor] = {}
    for module_name, module in adapter.modules.items():
        tensors[f"{_PREFIX}{module_name}.lora_A.weight"] = _unshared(module.lora_a)
        tensors[f"{_PREFIX}{module_name}.lora_B.weight"] = _unshared(module.lora_b)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _write_atomically(target / WEIGHTS_FILE, format_safetensors(tensors, {"format": "pt"}))
    _write_atomically(target / CONFIG_FILE, json.dumps(config, indent=2).encode())


def parse_config(content: bytes, name: str) -> AdapterConfig:
    """Check the bytes of an `adapter_config.json` and keep what the merge needs.

    Raises:
        AdapterFormatError: not JSON, not LoRA, or a kind of LoRA that cannot be merged.
    """
    try:
        fields: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _refusal(name, f"is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _refusal(name, "is not a JSON object")
    _check_kind(fields, name)
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if not _is_rank(rank):
        raise _refusal(name, f"has r {rank!r}; it must be a positive integer")
    if not _is_finite(alpha):
        raise _refusal(name, f"has lora_alpha {alpha!r}; it must be a finite number")
    targets = fields.get("target_modules") or []
    if not isinstance(targets, str | list):
        raise _refusal(name, f"has target_modules {targets!r}; it must be a string or a list")
    base_model = fields.get("base_model_name_or_path")
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        use_rslora=bool(fields.get("use_rslora", False)),
        rank_pattern=_pattern(fields, "rank_pattern", _is_rank, name),
        alpha_pattern=_pattern(fields, "alpha_pattern", _is_finite, name),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(map(str, targets))),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
    )


def _check_kind(fields: Mapping[str, Any], name: str) -> None:
    """Refuse whatever is not a plain sum W + scaling * B @ A."""
    if fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type")
        raise _refusal(name, f"has peft_type {kind!r}; only LORA adapters can be merged")
    if fields.get("bias", "none") != "none":
        bias = fields["bias"]
        raise _refusal(name, f"has bias {bias!r}; an adapter that trains biases cannot be merged")
    for field, reason in _UNMERGEABLE.items():
        if fields.get(field):
            raise _refusal(name, f"has {field} {fields[field]!r}; it cannot be merged: {reason}")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise _refusal(
            name,
            f"has init_lora_weights {init!r}, which changes the base model's weights; convert it "
            "to a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        )


def _pattern(
    fields: Mapping[str, Any], field: str, is_valid: Callable[[object], bool], name: str
) -> Mapping[str, Any]:
    pattern = fields.get(field) or {}
    if not isinstance(pattern, dict):
        raise _refusal(name, f"has {field} {pattern!r}; it must be an object")
    for key, value in pattern.items():
        if not is_valid(value):
            raise _refusal(name, f"has {field}[{key!r}] {value!r}; it is out of range")
        if len(key) > _MAX_PATTERN or _REPEATED_GROUP.search(key):
            raise _refusal(
                name, f"has {field} key {key[:80]!r}, too long or with a repeated group to be safe"
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


def _modules(
    tensors: Mapping[str, torch.Tensor], config: AdapterConfig, name: str
) -> dict[str, LoraModule]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(tensors):
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            raise AdapterFormatError(
                f"adapter {name!r}: tensor {key!r} is no lora_A or lora_B weight of a linear layer; "
                "embeddings, biases and whole modules cannot be merged"
            )
        module = key.removesuffix(suffix).removeprefix(_PREFIX)
        tensor = tensors[key]
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise AdapterFormatError(
                f"adapter {name!r}, module {module!r}: lora_{_SUFFIXES[suffix]} is {tensor.dtype}; "
                "expected float32, float16 or bfloat16"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFormatError(
                f"adapter {name!r}, module {module!r}: lora_{_SUFFIXES[suffix]} holds NaN or Inf"
            )
        half = pairs.setdefault(module, {}).setdefault(_SUFFIXES[suffix], tensor)
        if half is not tensor:
            raise AdapterFormatError(
                f"adapter {name!r}, module {module!r}: lora_{_SUFFIXES[suffix]} is there twice, with "
                f"and without {_PREFIX!r}"
            )
    modules: dict[str, LoraModule] = {}
    for module, halves in pairs.items():
        if len(halves) < 2:
            missing = "B" if "A" in halves else "A"
            raise AdapterFormatError(
                f"adapter {name!r}, module {module!r}: lora_{missing} is missing"
            )
        built = LoraModule(halves["A"], halves["B"], config.scaling_of(module))
        if halves["A"].ndim == 2 and built.rank != config.rank_of(module):
            raise AdapterFormatError(
                f"adapter {name!r}, module {module!r}: {CONFIG_FILE} says rank "
                f"{config.rank_of(module)}, lora_A has {built.rank} rows"
            )
        modules[module] = built
    return modules


def _pattern_value(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the whole name or its end after a dot."""
    for key, value in pattern.items():
        if _pattern_regex(key).match(module):
            return value
    return default


def _pattern_regex(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _is_rank(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_finite(value: object) -> TypeGuard[float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _read(folder: Path, file: str, name: str) -> bytes:
    with _opened(folder, file, name) as content:
        if file == CONFIG_FILE and os.fstat(content.fileno()).st_size > MAX_CONFIG_BYTES:
            raise _refusal(name, f"is larger than {MAX_CONFIG_BYTES} bytes")
        return content.read()


@contextmanager
def _opened(folder: Path, file: str, name: str) -> Iterator[BinaryIO]:
    """Open a file for reading; whatever goes wrong until it is closed is a `LegoError`."""
    try:
        with (folder / file).open("rb") as content:
            yield content
    except FileNotFoundError as error:
        hint = ""
        if file == WEIGHTS_FILE and (folder / "adapter_model.bin").exists():
            hint = (
                "; adapter_model.bin is a pickle, which executes code when read: convert it with "
                "safetensors.torch.save_file"
            )
        raise AdapterNotFoundError(f"adapter {name!r} has no {file}{hint}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AdapterFormatError(f"adapter {name!r}: {file} cannot be read ({reason})") from error


def _digest_of(config: bytes) -> Any:
    """Start a SHA-256 of both files; the length keeps the border between them unambiguous."""
    sha = hashlib.sha256(len(config).to_bytes(8, "big"))
    sha.update(config)
    return sha


def _unshared(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of its own: safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
