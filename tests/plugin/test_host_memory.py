"""Blocks of host memory: never two in one place, and all of it back once nobody can read them."""

from __future__ import annotations

import gc
import logging
import resource
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_lego.host_memory import ALIGNMENT, HostMemory, _register

CAPACITY = 16 * ALIGNMENT
ALL = [(0, CAPACITY)]

steps = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, CAPACITY + 1)),
        st.tuples(st.just("allocate"), st.integers(1, 3 * ALIGNMENT)),
        st.tuples(st.just("drop"), st.integers(0, 99)),
    ),
    max_size=60,
)


def place_of(memory: HostMemory, block: torch.Tensor) -> tuple[int, int]:
    start = block.data_ptr() - memory._memory.ctypes.data
    return start, start + block.nbytes


def fill(memory: HostMemory, blocks: dict[int, torch.Tensor], mark: int, nbytes: int) -> None:
    """Allocate a block, fill it with a number of its own, and look at it and its neighbours."""
    fits = any(nbytes <= end - start for start, end in memory.free_ranges())
    block = memory.allocate(nbytes)
    assert (block is not None) == fits
    if block is None:
        return
    assert (block.dtype, block.shape) == (torch.uint8, (nbytes,))
    start, end = place_of(memory, block)
    assert start % ALIGNMENT == 0
    assert 0 <= start < end <= CAPACITY
    taken = [place_of(memory, other) for other in blocks.values()]
    assert all(end <= first or last <= start for first, last in taken)
    blocks[mark] = block.fill_(mark)
    assert all(bool((kept == written).all()) for written, kept in blocks.items())


@given(steps)
def test_blocks_never_meet_and_give_everything_back(script):
    memory = HostMemory(CAPACITY, pin=False)
    blocks: dict[int, torch.Tensor] = {}
    for mark, (step, number) in enumerate(script):
        if step == "allocate":
            fill(memory, blocks, mark, number)
        elif blocks:
            del blocks[list(blocks)[number % len(blocks)]]
    blocks.clear()
    assert memory.free_ranges() == ALL
    assert memory.allocate(CAPACITY) is not None


def test_the_first_range_that_is_large_enough_is_taken():
    memory = HostMemory(CAPACITY, pin=False)
    blocks = [memory.allocate(size * ALIGNMENT) for size in (2, 1, 4, 1)]
    blocks[0] = blocks[2] = None
    assert place_of(memory, memory.allocate(3 * ALIGNMENT))[0] == 3 * ALIGNMENT
    assert place_of(memory, memory.allocate(1))[0] == 0


def test_a_view_of_any_kind_keeps_a_block_from_being_used_again():
    memory = HostMemory(CAPACITY, pin=False)
    block = memory.allocate(CAPACITY)
    views = [block[16:48].view(torch.float32).view(2, 4), block.untyped_storage(), block.numpy()]
    del block
    while views:
        assert memory.allocate(1) is None
        views.pop()
    assert memory.free_ranges() == ALL


def test_a_block_outlives_its_memorys_owner():
    memory = HostMemory(CAPACITY, pin=False)
    block = memory.allocate(CAPACITY).fill_(7)
    del memory
    gc.collect()
    assert (block == 7).all()


def test_a_block_that_only_the_garbage_collector_finds_may_go_at_any_moment():
    memory = HostMemory(CAPACITY, pin=False)
    for _ in range(500):
        cycle = [memory.allocate(1)]
        cycle.append(cycle)
        del cycle
    gc.collect()
    assert memory.free_ranges() == ALL


def test_blocks_may_go_in_any_thread():
    memory = HostMemory(CAPACITY, pin=False)
    lock = threading.Lock()

    def work() -> None:
        for _ in range(300):
            with lock:
                block = memory.allocate(ALIGNMENT)
            del block

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.free_ranges() == ALL


def test_no_memory_has_no_room():
    memory = HostMemory(0, pin=True)
    assert memory.free_ranges() == []
    assert memory.allocate(1) is None


def test_memory_is_backed_only_once_it_is_used():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    memory = HostMemory(1 << 30, pin=False)
    memory.allocate(ALIGNMENT).fill_(1)
    assert resident() - before < 64 << 20


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """CUDA's runtime as PyTorch shows it, with the result of a call to come and those made."""
    runtime = SimpleNamespace(code=0, pinned=[])

    def register(address: int, nbytes: int, flags: int) -> int:
        assert flags == 0
        if not runtime.code:
            runtime.pinned.append((address, nbytes))
        return runtime.code

    def launch(*_: object, **__: object) -> None:
        runtime.code, code = 0, runtime.code
        if code:
            raise RuntimeError("CUDA error: out of memory")

    runtime.cudaHostRegister = register
    runtime.cudaHostUnregister = lambda address: runtime.pinned.pop(0) == address
    runtime.cudaGetErrorString = lambda code: {2: "out of memory"}[code]
    runtime.cudaError = int
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "_cudart", runtime)
    monkeypatch.setattr(torch, "ones", launch)
    return runtime


def test_it_is_pinned_as_a_whole_until_it_is_gone(cuda, caplog):
    caplog.set_level(logging.INFO, "vllm.lego")
    memory = HostMemory(CAPACITY - 1, pin=True)
    assert cuda.pinned == [(memory._memory.ctypes.data, CAPACITY)]
    assert f"pinned {CAPACITY} bytes of host memory in 0." in caplog.text
    block = memory.allocate(1)
    del memory
    assert cuda.pinned
    del block
    assert not cuda.pinned


def test_what_cannot_be_pinned_is_used_all_the_same(cuda, caplog):
    cuda.code = 2
    memory = HostMemory(CAPACITY, pin=True)
    assert cuda.code == 0, "the next launch would fail of it"
    [record] = caplog.records
    assert record.levelname == "WARNING"
    for part in f"{CAPACITY} bytes", "out of memory (2)", "VLLM_LEGO_HOST_CACHE_BYTES", "ulimit -l":
        assert part in record.message
    assert memory.allocate(CAPACITY) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
def test_a_gpu_takes_it_for_pinned(caplog):
    memory = HostMemory(64 << 20, pin=True)
    block = memory.allocate(1 << 20)
    assert block.is_pinned()
    there = block.fill_(3).to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert (there == 3).all()
    assert (block.zero_().copy_(there) == 3).all()

    assert not _register(memory._memory.ctypes.data, 64 << 20), "it is registered already"
    assert "could not be pinned" in caplog.text
    torch.ones(3, device="cuda").sum().item()  # and no launch hears of it
    gone = weakref.ref(memory._memory)
    del memory, block
    assert gone() is None
    HostMemory(64 << 20, pin=True)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, "what was at that address is no longer pinned"
