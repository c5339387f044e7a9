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
    monkeypatch.setattr(logger, "disabled", False)  # by whatever configured logging before
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
