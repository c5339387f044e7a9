"""For all tests of the plugin."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


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
