"""Host memory that is pinned once, at the start, and handed out in blocks.

To pin memory for each merge takes tens of milliseconds, in which the engine's kernel launches wait
for the driver, and PyTorch rounds such memory up to a power of two.
"""

from __future__ import annotations

import logging
import time
import weakref
from bisect import insort
from collections import deque
from contextlib import suppress

import torch

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

ALIGNMENT = 512  # of each block, in bytes


class HostMemory:
    """One range of host memory. Not thread-safe, except that blocks may go in any thread.

    A block is a tensor. Its memory is free again once that tensor and all views of it are gone;
    copies that CUDA still makes from it do not count, so wait for them first.

    Args:
        nbytes: its size, rounded up to whole multiples of the alignment.
        pin: whether to pin it for CUDA. Else the system backs only what is written to.
    """

    def __init__(self, nbytes: int, *, pin: bool) -> None:
        size = _rounded(nbytes)
        # As an array: whoever holds a part of it, a tensor too, holds that one Python object, and
        # Python tells when it goes.
        self._memory = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        self._free = [(0, size)] if size else []  # (start, end), in order, none adjacent
        self._returned: deque[tuple[int, int]] = deque()  # to be free; appended in any thread
        if pin and size:
            address = self._memory.ctypes.data
            if _register(address, size):
                unregister = torch.cuda.cudart().cudaHostUnregister  # type: ignore[no-untyped-call]
                weakref.finalize(self._memory, unregister, address).atexit = False

    def allocate(self, nbytes: int) -> torch.Tensor | None:
        """Return a block, shape [nbytes], uint8, of the first free range that is large enough.

        None if there is none.
        """
        self._take_back()
        size = _rounded(nbytes)
        for i, (start, end) in enumerate(self._free):
            if size <= end - start:
                self._free[i : i + 1] = [(start + size, end)] if size < end - start else []
                block = self._memory[start : start + nbytes]
                # No more than an append: it may run in the middle of anything, under any lock.
                finalizer = weakref.finalize(block, self._returned.append, (start, start + size))
                finalizer.atexit = False
                return torch.from_numpy(block)
        return None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in a block of this memory."""
        start = self._memory.ctypes.data
        return start <= tensor.data_ptr() < start + self._memory.nbytes

    def free_ranges(self) -> list[tuple[int, int]]:
        """Return where no block lies, start and end in bytes, in order."""
        self._take_back()
        return list(self._free)

    def _take_back(self) -> None:
        while self._returned:
            insort(self._free, self._returned.popleft())
        joined: list[tuple[int, int]] = []
        for start, end in self._free:
            adjacent = joined and joined[-1][1] == start
            joined.append((joined.pop()[0] if adjacent else start, end))
        self._free = joined


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _register(address: int, nbytes: int) -> bool:
    """Pin memory where it lies. Returns whether CUDA did; without, copies are slower but right."""
    started = time.perf_counter()
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(cudart.cudaHostRegister(address, nbytes, 0))
    if code:
        with suppress(RuntimeError):  # CUDA tells this thread's next launch of it once more
            torch.ones((), device="cuda")
        logger.warning(
            "%d bytes of host memory could not be pinned (%s), so that copies to and from the GPU "
            "are slower: lower VLLM_LEGO_HOST_CACHE_BYTES, or raise the limit of locked memory "
            "(ulimit -l)",
            nbytes,
            torch.cuda.CudaError(code),
        )
        return False
    seconds = time.perf_counter() - started
    logger.info("pinned %d bytes of host memory in %.1f s", nbytes, seconds)
    return True
