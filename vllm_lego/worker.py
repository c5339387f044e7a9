"""The worker's side: merges are staged by a thread, so that the engine's loop never waits.

The loop calls `stage` to start a merge and again to poll it, `take` to register a finished one,
`discard` to drop it. All state belongs to the loop's thread; the staging thread sees a recipe
and returns a result.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from lego_core import LegoError, LoraAdapter, load_adapter, merge_adapters
from vllm_lego.identity import engine_id
from vllm_lego.recipe import Recipe

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

_NICENESS = 10


@dataclass(frozen=True, slots=True, eq=False)
class StagedMerge:
    """A finished merge on the worker's device, ready to be registered with vLLM."""

    adapter: LoraAdapter
    fidelity: float
    seconds: dict[str, float]


@dataclass(slots=True, eq=False)
class _Staging:
    future: Future[StagedMerge]
    holders: set[str] = field(default_factory=set)


class StagingArea:
    """The merges of one worker.

    A merge lives as long as somebody holds it. A holder is an API server: each keeps its own
    cache, and what one drops another may still serve.

    Args:
        device: where to merge and keep the result.
        dtype: of the result, the engine's LoRA dtype.
        check: raises a `LegoError` for a member that does not fit the base model.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, check: Callable[[LoraAdapter], None]
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._check = check
        self._merges: dict[str, _Staging] = {}
        # One stream for good: PyTorch keeps freed memory for the stream that it was used on.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="lego-staging", initializer=_yield_to_the_engine
        )

    def stage(self, recipe: Recipe, holder: str) -> dict[str, Any]:
        """Start the merge if nobody has, and tell how far it is. Never waits.

        Returns:
            `state` is `pending`, `ready` (with `nbytes`, `fidelity` and `seconds` by phase) or
            `failed` (with `error`, the name of the exception, `message` and `param`).
        """
        staging = self._merges.get(recipe.merge_id)
        if staging is None:
            number = engine_id(recipe.merge_id)
            twin = next((i for i in self._merges if engine_id(i) == number), None)
            if twin is not None:
                message = f"{recipe.merge_id} and {twin} share one id in vLLM: one at a time"
                return {
                    "state": "failed",
                    "error": "CollisionError",
                    "message": message,
                    "param": None,
                }
            future = self._threads.submit(self._make, recipe, time.perf_counter())
            staging = self._merges[recipe.merge_id] = _Staging(future)
        staging.holders.add(holder)
        if not staging.future.done():
            return {"state": "pending"}
        error = staging.future.exception()
        if error is not None:
            self.discard(recipe.merge_id, holder)
            return _failure(recipe, error)
        merge = staging.future.result()
        return {
            "state": "ready",
            "nbytes": merge.adapter.nbytes,
            "fidelity": merge.fidelity,
            "seconds": merge.seconds,
        }

    def discard(self, merge_id: str, holder: str) -> bool:
        """Let go of a merge. Returns whether that made it go, because nobody else holds it."""
        staging = self._merges.get(merge_id)
        if staging is None:
            return False
        staging.holders.discard(holder)
        if staging.holders:
            return False
        staging.future.cancel()
        del self._merges[merge_id]
        return True

    def take(self, recipe: Recipe) -> LoraAdapter:
        """Return a staged merge, for vLLM to copy into a slot.

        The front end dispatches nothing that is not staged. Should it be gone all the same, it
        is made again here, while the loop waits: late, but right.

        Raises:
            LegoError: it was gone and could not be made again.
        """
        staging = self._merges.get(recipe.merge_id)
        if staging is not None:  # unfinished, it is sooner waited for than made once more
            return staging.future.result().adapter
        logger.warning("%s was not staged; merging it while the engine waits", recipe.merge_id)
        return self._make(recipe, time.perf_counter()).adapter

    def _make(self, recipe: Recipe, queued_at: float) -> StagedMerge:
        started = time.perf_counter()
        with torch.inference_mode(), self._side_stream():
            members = [load_adapter(m.path, name=m.name, digest=m.digest) for m in recipe.members]
            for member in members:
                self._check(member)
            loaded = time.perf_counter()
            adapter, report = merge_adapters(
                members,
                recipe.config,
                weights=[m.weight for m in recipe.members],
                device=self._device,
                dtype=self._dtype,
                name=recipe.merge_id,
                report=True,
            )
        seconds = {
            "queue": started - queued_at,
            "load": loaded - started,
            "merge": time.perf_counter() - loaded,
        }
        return StagedMerge(adapter, report.fidelity, seconds)

    def _side_stream(self) -> AbstractContextManager[Any]:
        """On CUDA, a stream of the staging's own: the model's kernels do not queue behind it.

        `merge_adapters` synchronises it before it returns its report, so whoever sees the
        result may use it on any stream.
        """
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _yield_to_the_engine() -> None:
    """Give the staging thread a lower scheduling priority than the engine's threads."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    except OSError as error:  # a container may forbid it; then the kernel shares fairly
        logger.info("the staging thread keeps its priority: %s", error)


def _failure(recipe: Recipe, error: BaseException) -> dict[str, Any]:
    failure = {"state": "failed", "error": type(error).__name__, "message": "", "param": None}
    if isinstance(error, LegoError):
        return failure | {"message": str(error), "param": error.param}
    logger.error("merging %s failed", recipe.merge_id, exc_info=error)
    return failure
