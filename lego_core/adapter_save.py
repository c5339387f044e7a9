"""Write PEFT LoRA adapter folders, each as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lego_core.adapter import LoraAdapter, is_finite
from lego_core.adapter_config import CONFIG_FILE, shown
from lego_core.adapter_files import MAX_CONFIG_BYTES, WEIGHTS_FILE
from lego_core.errors import AdapterFormatError, AdapterWriteError, ConfigError

PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""

PROVENANCE_KEY = "lego"
"""Where provenance is, in the safetensors metadata and in the configuration."""


class Half(NamedTuple):
    """One of a module's two matrices."""

    side: str
    is_embedding: bool

    @property
    def label(self) -> str:
        """What PEFT calls it."""
        return f"lora_embedding_{self.side}" if self.is_embedding else f"lora_{self.side}"


SUFFIXES = {
    ".lora_A.weight": Half("A", is_embedding=False),
    ".lora_B.weight": Half("B", is_embedding=False),
    ".lora_embedding_A": Half("A", is_embedding=True),
    ".lora_embedding_B": Half("B", is_embedding=True),
}
"""Ends of the tensors' names: an embedding's halves are bare parameters, not layers."""


def save_adapter(
    adapter: LoraAdapter,
    folder: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a PEFT folder that `peft` and vLLM load unchanged.

    The folder appears whole or not at all: it is written beside its place, under a name that
    starts with a dot, and then moved. With `overwrite`, a reader who comes between the two moves
    finds no folder for a moment, never a mix.

    Args:
        adapter: of one rank and one scaling. Its modules are named in full in `target_modules`,
            so that PEFT adapts no other; names so many that the configuration would pass 1 MiB
            are shortened to their last part.
        folder: its parents are made. If it is there, it must be empty.
        provenance: what JSON can say of how the adapter came about; it is kept as one string
            in the safetensors metadata and in the configuration, both under the key `lego`.
            PEFT warns that it ignores the key, vLLM ignores it silently.
        overwrite: replace whatever is in the folder.

    Raises:
        AdapterFormatError: what `load_adapter` would refuse; or the modules differ in rank or
            scaling, which one PEFT configuration without patterns cannot say. A merged adapter
            never does.
        ConfigError: the provenance is not JSON.
        AdapterWriteError: the folder is not empty, or cannot be written.
    """
    _check_loadable(adapter)
    config = _config(adapter)
    metadata = {"format": "pt"}
    if provenance is not None:
        metadata[PROVENANCE_KEY] = _as_json(provenance)
        config[PROVENANCE_KEY] = json.loads(metadata[PROVENANCE_KEY])
    if len(json.dumps(config, indent=2)) > MAX_CONFIG_BYTES:
        config["target_modules"] = sorted({m.rpartition(".")[2] for m in adapter.modules})
    content = json.dumps(config, indent=2).encode()
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"provenance of adapter {adapter.name!r} is longer than an adapter's may be"
        )
    tensors: dict[str, torch.Tensor] = {}
    for module_name, module in adapter.modules.items():
        for side, tensor in (("A", module.lora_a), ("B", module.lora_b)):
            half = Half(side, module.is_embedding)
            suffix = next(s for s, h in SUFFIXES.items() if h == half)
            tensors[f"{PREFIX}{module_name}{suffix}"] = _unshared(tensor)

    target = _place(adapter.name, folder, overwrite=overwrite)
    temporary = target.with_name(f".{target.name[:64]}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        files = temporary / CONFIG_FILE, temporary / WEIGHTS_FILE
        files[0].write_bytes(content)
        save_file(tensors, files[1], metadata)
        shutil.copymode(*files)  # safetensors makes files that only their owner can read
        for path in (*files, temporary):
            _flush(path)
        _move(temporary, target)
        _flush(target.parent)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterWriteError(
            f"adapter {adapter.name!r} cannot be written to {str(folder)!r} "
            f"({getattr(error, 'strerror', None) or error}); nothing was changed there. Make room, "
            "or choose a folder in a place that can be written"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_loadable(adapter: LoraAdapter) -> None:
    adapter.check()
    for name, module in adapter.modules.items():
        if not name:
            raise AdapterFormatError(f"adapter {adapter.name!r} has a module without a name")
        for side, tensor in (("A", module.lora_a), ("B", module.lora_b)):
            if not is_finite(tensor):
                raise AdapterFormatError(
                    f"adapter {adapter.name!r}, module {name!r}: lora_{side} holds NaN or Inf"
                )


def _config(adapter: LoraAdapter) -> dict[str, Any]:
    ranks = {module.rank for module in adapter.modules.values()}
    scalings = {module.scaling for module in adapter.modules.values()}
    if len(ranks) > 1 or len(scalings) > 1:
        raise AdapterFormatError(
            f"adapter {adapter.name!r} has modules of ranks {sorted(ranks)} and scalings "
            f"{sorted(scalings)}; only adapters of one rank and one scaling can be saved"
        )
    rank, scaling = ranks.pop(), scalings.pop()
    return {
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
        "target_modules": sorted(adapter.modules),
    }


def _as_json(provenance: Mapping[str, Any]) -> str:
    try:
        json.dumps(dict(provenance), ensure_ascii=False).encode()  # no half of a surrogate pair
        return json.dumps(dict(provenance), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"provenance {shown(provenance)} is not JSON ({error})") from error


def _place(name: str, folder: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Return where the folder really is; refuse to replace what nobody gave up."""
    try:
        target = Path(os.path.realpath(folder))
        occupied = os.path.lexists(target) and (not target.is_dir() or any(target.iterdir()))
    except (OSError, ValueError) as error:
        raise AdapterWriteError(
            f"adapter {name!r} cannot be written to {str(folder)!r} ({error})"
        ) from error
    if occupied and not target.is_dir():
        raise AdapterWriteError(f"adapter {name!r}: {str(folder)!r} is there and is no folder")
    if occupied and not overwrite:
        raise AdapterWriteError(
            f"adapter {name!r}: folder {str(folder)!r} is not empty; choose another, or overwrite it"
        )
    return target


def _move(temporary: Path, target: Path) -> None:
    """Put a folder in the place of another, or of none; undone if it fails half-way."""
    if not target.exists() or not any(target.iterdir()):
        temporary.replace(target)  # an empty folder gives way
        return
    old = temporary.with_name(temporary.name + ".old")
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        with suppress(OSError):
            os.close(descriptor)


def _unshared(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of its own: safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()
