"""The same inputs give the same bits, whatever else goes on in the process; and leave it as it was."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lego_core import ConfigError, LoraAdapter, LoraModule, MergeConfig, merge_adapters
from lego_core.adapter import content_digest
from lego_core.methods import METHODS
from tests import strategies

EVERY_METHOD = tuple(METHODS)
THREADS = (1, 2, 4)

SMALL = (3, 4, 40, 30)
WIDE = (1, 8, 1536, 1536)
"""Modules, rank, in_features, out_features. With 24 units of this width MKL's matrix products sum in
an order that depends on the number of threads."""
LONG = (2, 8, 4096, 1024)


def members_of(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[LoraAdapter]:
    modules, rank, in_features, out_features = shape
    return [
        LoraAdapter(
            f"adapter-{i}",
            {
                f"layers.{m}": strategies.module(
                    10 * i + m, rank, in_features, out_features, scaling=0.5 + i, dtype=dtype
                )
                for m in range(modules)
            },
        )
        for i in range(3)
    ]


def config_of(method: str) -> MergeConfig:
    return MergeConfig(method=method, rank=24 if method == "concat" else 8)


def bits(adapters: list[LoraAdapter], method: str, **options: Any) -> str:
    """A digest of the merge and of its report."""
    merged, report = merge_adapters(
        adapters, config_of(method), weights=[1.0, 0.5, -0.8], report=True, **options
    )
    modules = [(name, of.cluster_sizes, of.fidelity.hex()) for name, of in report.modules.items()]
    return f"{content_digest(merged)} {report.fidelity.hex()} {modules}"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def busy(count: int = 2) -> Iterator[None]:
    """Other threads that compute and allocate, with threads of torch's own."""
    done = threading.Event()

    def compute() -> None:
        torch.set_num_threads(2)
        left = torch.randn(300, 300)
        while not done.is_set():
            left = torch.nn.functional.normalize(left @ left)

    workers = [threading.Thread(target=compute) for _ in range(count)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()


FAST = [
    (method, shape)
    for shape in (SMALL, WIDE, LONG)
    for method in EVERY_METHOD
    if shape == SMALL or method not in {"ties", "dare_ties", "knots"}
]
"""What is made entry by entry takes seconds for large modules."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("method", "shape"), FAST)
def test_number_of_threads_changes_no_bit(
    method: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    adapters = members_of(shape, dtype)
    found = set()
    for count in THREADS:
        with torch_threads(count):
            found.add(bits(adapters, method))
    assert len(found) == 1


@pytest.mark.parametrize("method", ["ties", "dare_ties", "knots"])
def test_number_of_threads_changes_no_bit_of_a_large_dense_update(method: str) -> None:
    adapters = members_of((1, 8, 1536, 384), torch.bfloat16)
    found = set()
    for count in THREADS:
        with torch_threads(count):
            found.add(bits(adapters, method))
    assert len(found) == 1


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_what_else_runs_changes_no_bit(method: str) -> None:
    adapters = members_of(SMALL, torch.float32)
    alone = bits(adapters, method)
    with busy():
        assert {bits(adapters, method) for _ in range(5)} == {alone}


@pytest.mark.parametrize("method", ["lego", "lego-paper", "lego-functions", "svd", "core_space"])
def test_what_else_runs_changes_no_bit_of_wide_modules(method: str) -> None:
    adapters = members_of(WIDE, torch.float32)
    alone = bits(adapters, method)
    with busy(), torch_threads(4):
        assert {bits(adapters, method) for _ in range(3)} == {alone}


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_merges_at_the_same_time_change_no_bit(method: str) -> None:
    adapters = members_of(SMALL, torch.float32)
    alone = bits(adapters, method)

    def one(count: int) -> tuple[str, int]:
        torch.get_num_threads()  # a thread's first call gives it the last number set anywhere
        torch.set_num_threads(count)
        return bits(adapters, method), torch.get_num_threads() - count

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(one, [1, 2, 3, 4] * 3)) == {(alone, 0)}


def test_another_process_finds_the_same_bits() -> None:
    code = (
        "from tests.core.test_determinism import *\n"
        "torch.set_num_threads(2)\n"
        "for method in EVERY_METHOD:\n"
        "    print(bits(members_of(SMALL, torch.float32), method))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    found = answer.stdout.splitlines()
    assert found == [bits(members_of(SMALL, torch.float32), method) for method in EVERY_METHOD]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_where_the_weights_lie_in_memory_changes_no_bit(method: str) -> None:
    adapters = members_of(SMALL, torch.float32)

    def moved(half: torch.Tensor) -> torch.Tensor:
        """A copy that does not begin where an allocation begins."""
        return torch.cat([torch.zeros(1), half.flatten()])[1:].view(half.shape)

    def column_major(half: torch.Tensor) -> torch.Tensor:
        return half.T.contiguous().T

    for change in (moved, column_major):
        changed = [
            strategies.map_modules(
                adapter,
                lambda m, c=change: dataclasses.replace(  # type: ignore[misc]
                    m, lora_a=c(m.lora_a), lora_b=c(m.lora_b)
                ),
            )
            for adapter in adapters
        ]
        assert bits(changed, method) == bits(adapters, method)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_settings_of_torch_change_no_bit_and_stay(method: str) -> None:
    adapters = members_of(SMALL, torch.float32)
    plain = bits(adapters, method)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch_threads(2), torch.inference_mode():
            assert bits(adapters, method) == plain
    finally:
        torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert bits(adapters, method) == plain
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_weights_that_require_a_gradient_merge_without_one(method: str) -> None:
    adapters = members_of(SMALL, torch.float32)
    trained = [
        strategies.map_modules(
            adapter,
            lambda m: LoraModule(
                torch.nn.Parameter(m.lora_a), torch.nn.Parameter(m.lora_b), m.scaling
            ),
        )
        for adapter in adapters
    ]
    assert bits(trained, method) == bits(adapters, method)
    merged = merge_adapters(trained, config_of(method))
    assert not any(
        m.lora_a.requires_grad or m.lora_b.requires_grad for m in merged.modules.values()
    )


@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_number_of_threads_is_restored(method: str, count: int) -> None:
    adapters = members_of(SMALL, torch.float32)
    with torch_threads(count):
        bits(adapters, method)
        assert torch.get_num_threads() == count


@pytest.mark.parametrize("count", THREADS)
def test_number_of_threads_is_restored_after_an_error(count: int) -> None:
    adapters = members_of(SMALL, torch.float32)
    with torch_threads(count):
        with pytest.raises(ConfigError):
            merge_adapters(adapters, MergeConfig(method="concat", rank=1))
        assert torch.get_num_threads() == count
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "device",
    ["nonsense", "cpu:x", "meta", "cuda:99", torch.device("mps"), torch.device("cuda", 64)],
)
def test_device_that_cannot_be_is_refused(device: torch.device | str) -> None:
    with pytest.raises(ConfigError, match="device") as caught:
        merge_adapters(members_of(SMALL, torch.float32), device=device)
    assert caught.value.param == "device"


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32"]
)
def test_dtype_that_weights_cannot_have_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=str(dtype)) as caught:
        merge_adapters(members_of(SMALL, torch.float32), dtype=dtype)
    assert caught.value.param == "dtype"


def test_the_number_of_threads_would_matter() -> None:
    """So that the tests above test something: a plain product at this width, where MKL differs."""
    units = torch.randn(1, 24, 1536, generator=torch.Generator().manual_seed(0))
    found = set()
    for count in THREADS:
        with torch_threads(count):
            found.add((units @ units.mT).numpy().tobytes())
    if len(found) == 1:
        pytest.skip("not with this processor's matrix products")
