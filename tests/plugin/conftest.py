"""For all tests of the plugin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from lego_core import LoraAdapter, LoraModule, save_adapter
from tests.plugin.played_vllm import NAMES, PlayedVllm
from vllm_lego import file_stamps
from vllm_lego._vllm import Engine
from vllm_lego.metrics import Metrics
from vllm_lego.service import LegoService
from vllm_lego.settings import Settings


@pytest.fixture
def caplog(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """What the plugin logs: once vLLM is imported, nothing below its logger reaches the root."""
    logger = logging.getLogger("vllm.lego")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):  # whatever vLLM's was left at
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def stamped_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files need not settle to have a stamp, and this test's are on a local file system."""
    monkeypatch.setattr(file_stamps, "SETTLED_NS", 0)
    monkeypatch.setattr(file_stamps, "local_devices", lambda: {tmp_path.stat().st_dev})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draws = torch.Generator().manual_seed(0)
    for name in NAMES:
        modules = {
            f"layer.{i}": LoraModule(
                torch.randn(2, 6, generator=draws), torch.randn(4, 2, generator=draws)
            )
            for i in range(3)
        }
        save_adapter(LoraAdapter(name, modules), tmp_path / name)
    return tmp_path


@pytest.fixture
def start(folder: Path):
    """Start a service; what Prometheus was told of is forgotten afterwards."""
    metrics = Metrics()

    def started(
        check: Callable[[LoraAdapter], None] = lambda adapter: None, **settings: Any
    ) -> tuple[LegoService, PlayedVllm]:
        vllm = PlayedVllm(folder, check, Settings(**settings))
        return LegoService(Engine(vllm, vllm.state), Settings(**settings), metrics), vllm

    yield started
    for collector in vars(metrics).values():
        REGISTRY.unregister(collector)
