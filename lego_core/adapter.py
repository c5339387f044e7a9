"""A LoRA adapter in memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch
from numpy.typing import NDArray

from lego_core.errors import AdapterFormatError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that LoRA weights may have."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """The low-rank update of one linear layer or embedding: W + scaling * B @ A.

    An embedding's weight is stored the other way round, [in_features, out_features] (vocabulary,
    width), so its update is the transpose of `delta()`.

    Attributes:
        lora_a: A, shape [rank, in_features], of one of the `DTYPES`.
        lora_b: B, shape [out_features, rank], same device as A.
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        is_embedding: whether the layer is an embedding; PEFT names and stores those otherwise.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float = 1.0
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """Number of rank-one units."""
        return self.lora_a.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the layer's input."""
        return self.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the layer's output."""
        return self.lora_b.shape[0]

    def delta(self) -> torch.Tensor:
        """Return scaling * B @ A, shape [out_features, in_features], float32 or wider."""
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)
        return self.scaling * (self.lora_b.to(dtype) @ self.lora_a.to(dtype))


@dataclass(frozen=True)
class Layout:
    """Names, ranks and shapes of an adapter's modules; equal for adapters that merge alike.

    Attributes:
        modules: name, rank, in_features, out_features and whether it is an embedding, of each.
    """

    modules: tuple[tuple[str, int, int, int, bool], ...]

    @cached_property
    def _hash(self) -> int:
        return hash(self.modules)

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True, eq=False)
class WeightTable:
    """What is known of an adapter's n modules before their weights are read, in its layout's order.

    Attributes:
        scalings: shape [n], float64.
        addresses: of lora_A and lora_B, shape [2, n], int64.
        dtypes: of all tensors.
        devices: of all tensors.
        is_contiguous: whether all tensors are.
    """

    scalings: NDArray[np.float64]
    addresses: NDArray[np.int64]
    dtypes: frozenset[torch.dtype]
    devices: frozenset[torch.device]
    is_contiguous: bool


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A named set of `LoraModule`s over one base model.

    Attributes:
        name: what messages call it.
        modules: by the layer's name in the base model, `model.layers.0.self_attn.q_proj`.
        digest: SHA-256 (hex) of the content it was read from, or what `load_adapter` was told it is; empty
            when it was made in memory.
        base_model: the base model that its configuration names, if any.
        source: the folder or hub repository that it was read from, if any.
        revision: the repository's commit that it was read at.
    """

    name: str
    modules: Mapping[str, LoraModule]
    digest: str = ""
    base_model: str | None = None
    source: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.modules:
            raise AdapterFormatError(f"adapter {self.name!r} has no LoRA modules")
        for module_name, module in self.modules.items():
            a, b = tuple(module.lora_a.shape), tuple(module.lora_b.shape)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
                raise AdapterFormatError(
                    f"adapter {self.name!r}, module {module_name!r}: lora_A has shape {list(a)} and "
                    f"lora_B {list(b)}; expected [rank, in] and [out, rank] of one rank, none of them 0"
                )

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(module.rank for module in self.modules.values())

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds all its tensors."""
        return reduce(torch.promote_types, self.table.dtypes)

    @cached_property
    def layout(self) -> Layout:
        """Names, ranks and shapes of its modules."""
        return Layout(
            tuple(
                (name, *m.lora_a.shape, m.lora_b.shape[0], m.is_embedding)
                for name, m in self.modules.items()
            )
        )

    @cached_property
    def table(self) -> WeightTable:
        """Where its weights lie; found once, since a set of adapters has thousands of tensors.

        Raises:
            AdapterFormatError: they are not what the attributes of `LoraModule` say.
        """
        self.check()
        modules = self.modules.values()
        halves = [[m.lora_a for m in modules], [m.lora_b for m in modules]]
        tensors = halves[0] + halves[1]
        return WeightTable(
            scalings=np.array([m.scaling for m in modules]),
            addresses=np.array([[half.data_ptr() for half in of] for of in halves]),
            dtypes=frozenset(tensor.dtype for tensor in tensors),
            devices=frozenset(tensor.device for tensor in tensors),
            is_contiguous=all(tensor.is_contiguous() for tensor in tensors),
        )

    def check(self) -> None:
        """See that the tensors can be merged and saved; their values are not looked at.

        Raises:
            AdapterFormatError: they are not what the attributes of `LoraModule` say.
        """
        for name, module in self.modules.items():
            for label, half in (("lora_A", module.lora_a), ("lora_B", module.lora_b)):
                if (
                    half.dtype not in DTYPES
                    or half.layout != torch.strided
                    or half.device.type not in {"cpu", "cuda"}
                    or half.device != module.lora_a.device
                ):
                    raise AdapterFormatError(
                        f"adapter {self.name!r}, module {name!r}: {label} is a {half.dtype} tensor, "
                        f"{half.layout}, on {half.device}; expected a dense one of float64, float32, float16 or bfloat16 on the CPU or a CUDA device, "
                        "the same for both halves"
                    )
            if not math.isfinite(module.scaling):
                raise AdapterFormatError(
                    f"adapter {self.name!r}, module {name!r}: scaling is {module.scaling}; it must be "
                    "a finite number"
                )

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(m.lora_a.nbytes + m.lora_b.nbytes for m in self.modules.values())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all entries are: one pass and no temporary, as bounds are NaN where any entry is."""
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all entries of all tensors are, in one pass if they share their memory and a dtype."""
    memory = shared_memory(tensors) if len({tensor.dtype for tensor in tensors}) == 1 else None
    if memory is None:
        return all(is_finite(tensor) for tensor in tensors if tensor.numel())
    return memory.numel() == 0 or is_finite(memory.view(tensors[0].dtype))


def shared_memory(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the memory that contiguous tensors share, shape [bytes], uint8, if they tile it."""
    if not tensors:
        return None
    storage = tensors[0].untyped_storage()
    end = start = storage.data_ptr()
    for tensor in sorted(tensors, key=torch.Tensor.data_ptr):
        if not tensor.is_contiguous() or (tensor.numel() and tensor.data_ptr() != end):
            return None
        end += tensor.nbytes
    if end - start != storage.nbytes():
        return None
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def content_digest(adapter: LoraAdapter) -> str:
    """Return a SHA-256 (hex) of the tensors and scalings, for adapters made in memory."""
    adapter.check()
    sha = hashlib.sha256()
    for name, module in sorted(adapter.modules.items()):
        kind = " embedding" if module.is_embedding else ""
        sha.update(f"{name} {module.scaling!r}{kind}".encode())
        for half in (module.lora_a, module.lora_b):
            sha.update(f"{half.dtype} {tuple(half.shape)}".encode())
            sha.update(half.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
