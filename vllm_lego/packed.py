"""An adapter as one flat buffer, so that one copy moves it between disk, host and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from lego_core import LoraAdapter, LoraModule
from lego_core.adapter import shared_memory
from lego_core.adapter_save import PREFIX

_ALIGNMENT = 16  # of each tensor in the buffer: a multiple of every dtype's size
_WORDS_AT_ONCE = 1 << 20
_BYTES_AT_ONCE = 4 << 20

LINEAR_HALVES = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_HALVES = ".lora_embedding_A", ".lora_embedding_B"


class _Place(NamedTuple):
    """Where one matrix lies in the buffer; `offset` in bytes."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return it as a view, by one call, as an adapter has hundreds.

        Nothing is checked: where it lies is where `pack` found or put it.

        Args:
            buffer: as items of this dtype.
        """
        start = buffer.storage_offset() + self.offset // self.dtype.itemsize
        return buffer.as_strided(self.shape, (self.shape[1], 1), start)


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """The tensors of one adapter in one buffer.

    Attributes:
        buffer: shape [nbytes], uint8; padding between tensors is zero.
        places: module name, place of lora_A, place of lora_B, scaling, whether an embedding.
        name, digest, base_model: of the `LoraAdapter`.
    """

    buffer: torch.Tensor
    places: tuple[tuple[str, _Place, _Place, float, bool], ...]
    name: str
    digest: str
    base_model: str | None

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return self.buffer.nbytes

    @classmethod
    def pack(cls, adapter: LoraAdapter) -> PackedAdapter:
        """Bring an adapter's tensors into one buffer where they lie; a merge's already are in one."""
        modules = adapter.modules
        whole = _whole_words([half for m in modules.values() for half in (m.lora_a, m.lora_b)])
        if whole is not None:
            places = tuple(
                (name, _lies(m.lora_a), _lies(m.lora_b), m.scaling, m.is_embedding)
                for name, m in modules.items()
            )
            return cls(whole, places, adapter.name, adapter.digest, adapter.base_model)
        pieces: list[torch.Tensor] = []
        size = 0

        def put(tensor: torch.Tensor) -> _Place:
            nonlocal size
            place = _Place(size, tensor.dtype, tuple(tensor.shape))
            pieces.append(tensor.contiguous().view(-1).view(torch.uint8))
            padding = -tensor.nbytes % _ALIGNMENT
            if padding:
                pieces.append(tensor.new_zeros(padding, dtype=torch.uint8))
            size += tensor.nbytes + padding
            return place

        places = tuple(
            (name, put(m.lora_a), put(m.lora_b), m.scaling, m.is_embedding)
            for name, m in modules.items()
        )
        return cls(torch.cat(pieces), places, adapter.name, adapter.digest, adapter.base_model)

    def unpack(self, name: str | None = None) -> LoraAdapter:
        """Return the adapter, its tensors views of the buffer, under its own or another name."""
        return self._adapter if name in (None, self.name) else replace(self._adapter, name=name)

    @cached_property
    def _adapter(self) -> LoraAdapter:
        """Made once: an adapter has hundreds of views, and a member is asked for again and again."""
        dtypes = {half.dtype for _, a, b, *_ in self.places for half in (a, b)}
        of = {dtype: _whole_items(self.buffer, dtype) for dtype in dtypes}
        modules = {
            name: LoraModule(a.view(of[a.dtype]), b.view(of[b.dtype]), scaling, is_embedding)
            for name, a, b, scaling, is_embedding in self.places
        }
        return LoraAdapter(self.name, modules, self.digest, self.base_model)

    def on(self, device: torch.device) -> PackedAdapter:
        """Return it on a device; on its own device, itself.

        Waits for the copy, on the current stream: this one may go then, and its memory be used
        for something else.
        """
        if self.buffer.device.type == device.type:
            return self
        room = torch.empty_like(self.buffer, device=device)
        return replace(self, buffer=_copied(self.buffer, room))

    def in_host_memory(self, block: torch.Tensor | None = None) -> PackedAdapter:
        """Return it in a block of host memory; without one, where it lies if that is on the host.

        Waits for the copy.
        """
        if block is None:
            if self.buffer.device.type == "cpu":
                return self
            block = torch.empty_like(self.buffer, device="cpu")
        return replace(self, buffer=_copied(self.buffer, block))

    def fingerprint(self) -> str:
        """Return 16 hex digits that any change of one 32-bit word changes; no cryptography.

        Formed where the buffer lies, from integers modulo 2^64: the order of the sum is without
        meaning, so that equal bytes have equal fingerprints on every device.
        """
        total = 0
        words = self.buffer.view(torch.int32)
        for start in range(0, len(words), _WORDS_AT_ONCE):
            part = words[start : start + _WORDS_AT_ONCE].long()
            # Odd factors: no difference of one word times one of them is 0 modulo 2^64.
            factors = torch.arange(start, start + len(part), device=part.device) * 2 + 1
            total += int((part * factors).sum())
        return f"{total % (1 << 64):016x}"


def _copied(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy bytes to where there is room for them, and wait for it on the current stream.

    In parts: a GPU copies in turns, and the few bytes of each of the engine's steps would wait for a
    copy of a whole adapter to end.
    """
    parts = (torch.split(whole, _BYTES_AT_ONCE) for whole in (target, source))
    for part, original in zip(*parts, strict=True):
        part.copy_(original, non_blocking=True)
    for device in {source.device, target.device}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return target


def _whole_words(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the memory that the tensors share, if the fingerprint can read it as whole words."""
    memory = shared_memory(tensors)
    return None if memory is None or memory.nbytes % 4 else memory


def _whole_items(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a buffer as items of a dtype, but for a rest that is no whole one."""
    return buffer[: buffer.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)


def _lies(tensor: torch.Tensor) -> _Place:
    """Return where a tensor lies in its storage."""
    offset = int(tensor.storage_offset()) * tensor.itemsize
    return _Place(offset, tensor.dtype, tuple(tensor.shape))


def peft_tensors(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the names that PEFT gives them and vLLM knows."""
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        a, b = EMBEDDING_HALVES if module.is_embedding else LINEAR_HALVES
        tensors[f"{PREFIX}{name}{a}"] = module.lora_a
        tensors[f"{PREFIX}{name}{b}"] = module.lora_b
    return tensors
