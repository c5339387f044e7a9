"""Read PEFT LoRA adapters from folders and hub repositories.

Only safetensors are read: a `.bin` is a pickle, and unpickling executes code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lego_core.adapter import LoraAdapter, LoraModule, are_finite, is_finite
from lego_core.adapter_config import CONFIG_FILE, AdapterConfig, parse_config
from lego_core.adapter_files import (
    DTYPES,
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    MemoryShortError,
    Observe,
    Room,
    TensorEntry,
    digest_part,
    opened,
    read_small,
    read_tensors,
    weight_files,
)
from lego_core.adapter_save import PREFIX, SUFFIXES, Half, save_adapter
from lego_core.digest import Digest, Unhashed
from lego_core.errors import AdapterChangedError, AdapterFormatError
from lego_core.hub import resolve_source

__all__ = [
    "CONFIG_FILE",
    "MAX_CONFIG_BYTES",
    "WEIGHTS_FILE",
    "AdapterConfig",
    "describe_adapter",
    "load_adapter",
    "parse_config",
    "save_adapter",
]

# What PEFT adds to an adapter that trains embeddings (`save_embedding_layers`): a copy of the
# base model's weights. vLLM skips these names, and so do we: the base model brings its own.
_BASE_COPIES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_REMEMBERED = 1 << 12
_HALVES = [[Half(side, is_embedding=embedding) for side in "AB"] for embedding in (False, True)]
# What betrays a kind of adapter whatever the configuration says.
_TELLTALES = {
    ".lora_magnitude_vector": "DoRA's magnitudes, which no sum of low-rank updates can express",
    ".lora_B.bias": "a bias, which a low-rank update cannot carry",
    ".lora_A.bias": "a bias, which a low-rank update cannot carry",
    ".trainable_tokens": "new embeddings of some tokens, which replace the base model's",
    ".base_layer.": "an update of bare parameters, or weights of the base model",
}


def load_adapter(
    source: str | os.PathLike[str],
    revision: str | None = None,
    *,
    name: str | None = None,
    digest: str | None = None,
    trust_digest: bool = False,
    room: Room | None = None,
    observe: Observe | None = None,
) -> LoraAdapter:
    """Read a PEFT LoRA adapter into memory, on the CPU, in the dtypes it was saved in.

    The files are read once, the tensors of each into one memory: the peak is the size of the
    adapter's tensors, a header of at most 32 MiB and, of what is not kept, 36 MiB.

    Args:
        source: a folder, or the name `org/name` of a hub repository where no such folder
            exists. A `Path` is always a folder.
        revision: branch, tag or commit of the repository; its default branch if None. It is
            resolved to a commit first, and every file is that commit's.
        name: what messages call it; the folder's or the repository's name by default.
        digest: if given, the content must have this digest.
        trust_digest: take the content for that of `digest` without hashing it. The caller answers for it.
        room: where to read the tensors to, if they are in one file: given their size in bytes, it
            returns memory on the CPU, shape [bytes], uint8, or None if it has none. By default they
            get memory of their own.
        observe: told a file's name and what `fstat` says of it, once for each, when it has been read.

    Raises:
        AdapterNotFoundError: no such folder, files, repository or revision, or no access to it.
        AdapterFormatError: not a plain LoRA, unreadable, NaN or Inf, or configuration and
            weights disagree.
        AdapterChangedError: the content has another digest.
        HubError: the hub did not deliver.
        ValueError: `trust_digest` without `digest`.
    """
    if trust_digest and digest is None:
        raise ValueError("trust_digest needs a digest")
    found = resolve_source(source, revision, name=name)
    name = found.name
    config_bytes = read_small(found.folder, CONFIG_FILE, name, observe=observe)
    config = parse_config(config_bytes, name)
    sha = Unhashed(digest) if digest is not None and trust_digest else Digest(config_bytes)
    tensors = _read_weights(found.folder, name, sha, room, observe)
    content = sha.hexdigest()
    if digest is not None and content != digest:
        raise AdapterChangedError(
            f"adapter {name!r} changed on disk: digest {digest[:12]} was asked for, "
            f"{content[:12]} is there; send the request again to use the new content"
        )
    return LoraAdapter(
        name=name,
        modules=_modules(tensors, config, name),
        digest=content,
        base_model=config.base_model,
        source=found.source,
        revision=found.revision,
    )


def describe_adapter(
    source: str | os.PathLike[str],
    revision: str | None = None,
    *,
    name: str | None = None,
    observe: Observe | None = None,
) -> tuple[AdapterConfig, str, int]:
    """Return an adapter's configuration, digest and size in bytes without parsing its weights.

    The size is that of the weights' files. The arguments are those of `load_adapter`.

    Raises:
        AdapterNotFoundError, AdapterFormatError, HubError: as `load_adapter`, the weights unread.
    """
    found = resolve_source(source, revision, name=name)
    config_bytes = read_small(found.folder, CONFIG_FILE, found.name, observe=observe)
    config = parse_config(config_bytes, found.name)
    sha, total = Digest(config_bytes), 0
    for file, size, content in _weights(found.folder, found.name, sha, observe)[1]:
        del file
        total += sha.take(content, size)
    return config, sha.hexdigest(), total


def _weights(
    folder: Path, name: str, sha: Digest | Unhashed, observe: Observe | None
) -> tuple[Mapping[str, str], Iterator[tuple[str, int, Any]]]:
    """Return the shard of each tensor, and each file's name, size and content, still unhashed."""
    files, index, shards = weight_files(folder, name, observe)
    if index:
        digest_part(sha, INDEX_FILE, len(index))
        sha.update(index)

    def contents() -> Iterator[tuple[str, int, Any]]:
        for file in files:
            with opened(folder, file, name, observe) as content:
                size = os.fstat(content.fileno()).st_size
                if index:
                    digest_part(sha, file, size)
                yield file, size, content

    return shards, contents()


def _read_weights(
    folder: Path,
    name: str,
    sha: Digest | Unhashed,
    room: Room | None,
    observe: Observe | None,
) -> dict[str, torch.Tensor]:
    """Read the LoRA tensors of all weight files, each in the file that the index says."""

    def wanted(entry: TensorEntry) -> bool:
        if shards and shards.get(entry.key) != file:
            there = shards.get(entry.key, "no file")
            raise AdapterFormatError(
                f"adapter {name!r}: {file} holds tensor {entry.key!r}, which {INDEX_FILE} places in "
                f"{there!r}"
            )
        seen.add(entry.key)
        return _is_wanted(entry, name)

    tensors: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    shards, contents = _weights(folder, name, sha, observe)
    if shards:
        room = None  # in memory of their own, shards are no one piece
    for file, _, content in contents:
        try:
            tensors |= read_tensors(content, file, name, sha, wanted, room)
        except MemoryShortError as error:
            raise AdapterFormatError(
                f"adapter {name!r}: {file} cannot be read ({error})"
            ) from error
    if missing := sorted(shards.keys() - seen):
        raise AdapterFormatError(
            f"adapter {name!r}: {shards[missing[0]]} lacks tensor {missing[0]!r}, which "
            f"{INDEX_FILE} places there"
        )
    return tensors


def _is_wanted(entry: TensorEntry, name: str) -> bool:
    """Whether to read a tensor; what is no LoRA weight of a sound dtype is refused."""
    if entry.key.endswith(_BASE_COPIES):
        return False
    try:
        module, half = _parse_key(entry.key)
    except ValueError as error:
        raise AdapterFormatError(f"adapter {name!r}: {error}") from None
    if entry.dtype not in DTYPES:
        raise AdapterFormatError(
            f"adapter {name!r}, module {module!r}: {half.label} is {entry.dtype}; expected F32, F16 "
            "or BF16"
        )
    return True


@lru_cache(_REMEMBERED)  # they are the same in all adapters of a model; at most 18 MiB
def _parse_key(key: str) -> tuple[str, Half]:
    """Split a tensor's name into module and half.

    Raises:
        ValueError: it is the name of no LoRA weight that can be merged.
    """
    for part, reason in _TELLTALES.items():
        if part in key:
            raise ValueError(f"tensor {key!r} is {reason}; it cannot be merged")
    suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
    if suffix is None:
        raise ValueError(
            f"tensor {key!r} is no LoRA weight of a linear layer or embedding; whole modules cannot "
            "be merged"
        )
    module = key.removesuffix(suffix).removeprefix(PREFIX)
    if not all(module.split(".")) or not module.isprintable() or len(module) > 512:
        raise ValueError(f"tensor {key[:600]!r} names no module")
    return module, SUFFIXES[suffix]


def _modules(
    tensors: dict[str, torch.Tensor], config: AdapterConfig, name: str
) -> dict[str, LoraModule]:
    pairs: dict[str, dict[Half, torch.Tensor]] = {}
    finite = not tensors or are_finite(list(tensors.values()))
    for key in sorted(tensors):
        module, half = _parse_key(key)  # it was wanted, so it is sound
        halves = pairs.setdefault(module, {})
        if half in halves:
            raise AdapterFormatError(
                f"adapter {name!r}, module {module!r}: {half.label} is there twice, with and "
                f"without {PREFIX!r}"
            )
        halves[half] = tensors[key]
        if not finite and tensors[key].numel() and not is_finite(tensors[key]):
            raise AdapterFormatError(
                f"adapter {name!r}, module {module!r}: {half.label} holds NaN or Inf"
            )
    left_out = config.untargeted(pairs)
    if left_out is not None:
        raise AdapterFormatError(
            f"adapter {name!r}, module {left_out!r}: has weights, but {CONFIG_FILE} does not name "
            "it in target_modules, so PEFT would drop them and vLLM would not; name it there or "
            "remove its weights"
        )
    return {module: _module(module, halves, config, name) for module, halves in pairs.items()}


def _module(
    module: str, halves: Mapping[Half, torch.Tensor], config: AdapterConfig, name: str
) -> LoraModule:
    is_embedding = any(half.is_embedding for half in halves)
    half_a, half_b = _HALVES[is_embedding]
    if halves.keys() != {half_a, half_b}:
        missing = half_b if half_a in halves else half_a
        reason = "is missing" if len(halves) < 2 else "is missing, but others are there"
        raise AdapterFormatError(f"adapter {name!r}, module {module!r}: {missing.label} {reason}")
    a, rank = halves[half_a], config.rank_of(module)
    if a.ndim == 2 and a.shape[0] != rank:
        raise AdapterFormatError(
            f"adapter {name!r}, module {module!r}: {CONFIG_FILE} says rank {rank}, {half_a.label} "
            f"has {a.shape[0]} rows"
        )
    scaling = config.scaling_of(module)
    return LoraModule(a, halves[half_b], scaling, is_embedding=is_embedding)
