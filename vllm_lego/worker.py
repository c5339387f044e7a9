"""The worker's side: merges are staged by threads, so that the engine's loop never waits.

The loop calls `stage` to start merges and again to poll them, `take` to register a finished one,
`discard` to drop it. What is staged belongs to the loop's thread; the staging threads see a recipe
and return a result, and look at whether others wait for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.profiler import record_function

from lego_core import LegoError, LoraAdapter, merge_adapters
from vllm_lego.host_memory import HostMemory
from vllm_lego.identity import engine_id
from vllm_lego.packed import PackedAdapter
from vllm_lego.recipe import Recipe
from vllm_lego.settings import Settings
from vllm_lego.threads import hand_over_soon, yield_to_the_engine
from vllm_lego.tiers import Tiers

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

# Front ends ask every 20 ms at least, then register. What that takes after `take` nobody tells.
_TAKEN_WITHIN_S = 0.1
_REGISTERED_WITHIN_S = 0.03


@dataclass(frozen=True, slots=True, eq=False)
class StagedMerge:
    """A finished merge on the worker's device, ready to be registered with vLLM.

    Attributes:
        packed: its tensors.
        prepared: what `take` returns, until it does.
        tier: where it came from: `host`, `disk`, or `merge` when it was made.
        fidelity: cosine to the exact weighted sum.
        fingerprint: equal on all workers that hold the same merge; empty when there is but one.
        seconds: by phase.
        taken: set when the loop begins to register it.
    """

    packed: PackedAdapter
    prepared: list[Any]
    tier: str
    fidelity: float
    fingerprint: str
    seconds: dict[str, float]
    taken: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    merge_id: str
    result: Future[StagedMerge]
    thread: Future[None]  # done once the merge is kept, too


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
        prepare: turns a merge and its id in vLLM into what `take` returns. Called by the staging
            threads, that the loop need not; called again for each further `take`, because vLLM
            changes what it is given.
        settings: threads and budgets.
        rank: of this worker in its engine; rank 0 writes to the store.
        workers: of the engine; with more than one, merges have fingerprints.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        check: Callable[[LoraAdapter], None],
        prepare: Callable[[LoraAdapter, int], Any],
        settings: Settings,
        *,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        self._device = device
        self._prepare = prepare
        self._dtype = dtype
        self._workers = workers
        self._merges: dict[str, _Staging] = {}
        on_gpu = device.type == "cuda"  # on a CPU, host memory is where merges are made
        memory = HostMemory(settings.host_cache_bytes, pin=True) if on_gpu else None
        # To merge and to keep. One each for all threads: PyTorch keeps freed memory for its stream, so
        # that with one for each thread they would take more than the budget. Keeping takes none.
        self._merging = _stream(device)
        self._keeping = _stream(device)
        self.tiers = Tiers(device, check, settings, memory, writes=rank == 0)
        self._account = self.tiers.account()
        self._jobs: list[_Job] = []  # the threads look at it
        self._changed = threading.Condition()  # a job came, or a merge was taken
        hand_over_soon()
        self._thread_count = settings.merge_threads
        self._threads = ThreadPoolExecutor(
            max_workers=self._thread_count,
            thread_name_prefix="lego-staging",
            initializer=yield_to_the_engine,
        )

    def stage(self, recipes: Iterable[Recipe], holder: str) -> dict[str, Any]:
        """Start the merges that nobody has, and tell how far each is. Never waits.

        Returns:
            `merges`: by merge id; its `state` is `pending`, `ready` (with `nbytes`, `tier`,
            `fidelity`, `fingerprint` and `seconds` by phase) or `failed` (with `error`, the name
            of the exception, `message` and `param`).
            `tiers`: (entries, bytes) of merges by tier.
            `events`: what happened to the tiers since anybody was told, see `Tiers.events`.
            `busy`: whether there will be more to tell, as a thread still merges or keeps.
        """
        merges = {recipe.merge_id: self._stage(recipe, holder) for recipe in recipes}
        return {
            "merges": merges,
            "busy": bool(self._unfinished()),  # before the rest: what ends now is told of next time
            "tiers": self._account,
            "events": self.tiers.events(),
        }

    def _stage(self, recipe: Recipe, holder: str) -> dict[str, Any]:
        staging = self._merges.get(recipe.merge_id)
        if staging is None:
            number = engine_id(recipe.merge_id)
            twin = next((i for i in self._merges if engine_id(i) == number), None)
            if twin is not None:
                message = f"{recipe.merge_id} and {twin} share one id in vLLM: one at a time"
                return _failed("CollisionError", message)
            staging = self._merges[recipe.merge_id] = _Staging(self._job(recipe))
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
            "nbytes": merge.packed.nbytes,
            "tier": merge.tier,
            "fidelity": merge.fidelity,
            "fingerprint": merge.fingerprint,
            "seconds": merge.seconds,
        }

    def _job(self, recipe: Recipe) -> Future[StagedMerge]:
        """Start a merge, or join one under way that its holders gave up."""
        for job in self._unfinished(recipe.merge_id):
            if not job.result.done():
                return job.result
            if not job.result.cancelled() and job.result.exception() is None:
                return _still_here(job.result.result())
        result: Future[StagedMerge] = Future()
        thread = self._threads.submit(self._fulfil, recipe, result, time.perf_counter())
        self._jobs.append(_Job(recipe.merge_id, result, thread))
        self._tell_threads()
        return result

    def _unfinished(self, merge_id: str | None = None) -> list[_Job]:
        """Return the jobs whose thread still merges, keeps or waits for its turn."""
        self._jobs = [job for job in self._jobs if not job.thread.done()]
        return [job for job in self._jobs if merge_id in (None, job.merge_id)]

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

    def forget(self, merge_id: str) -> bool | None:
        """Drop a merge from host memory.

        Returns:
            Whether somebody still holds it on the device; None while a thread may yet keep or
            write it: ask again.
        """
        if self._unfinished(merge_id):
            return None
        self.tiers.forget(merge_id)
        self._account = self._account | {"host": self.tiers.host_account()}
        return merge_id in self._merges

    def take(self, recipe: Recipe) -> Any:
        """Return a staged merge, prepared for vLLM to copy into a slot.

        The front end dispatches nothing that is not staged. Should it be gone all the same, it
        is made again here, while the loop waits: late, but right.

        Raises:
            LegoError: it was gone and could not be made again.
        """
        staging = self._merges.get(recipe.merge_id)
        if staging is not None:  # unfinished, it is sooner waited for than made once more
            merge = staging.future.result()
        else:
            logger.warning("%s was not staged; the engine waits until it is", recipe.merge_id)
            merge = self._make(recipe, time.perf_counter())
        merge.taken.set()
        self._tell_threads()
        if self._device.type == "cuda":
            # Made on a staging stream: not to be reused before this stream has copied it.
            merge.packed.buffer.record_stream(torch.cuda.current_stream(self._device))
        return merge.prepared.pop() if merge.prepared else self._prepared(recipe, merge.packed)

    def _fulfil(self, recipe: Recipe, future: Future[StagedMerge], queued_at: float) -> None:
        """Make one merge in a staging thread, hand it over, then keep it for later."""
        if not future.set_running_or_notify_cancel():
            return  # nobody wants it any more
        try:
            merge = self._make(recipe, queued_at)
        except BaseException as error:  # noqa: BLE001  whatever it is, somebody waits for this future
            future.set_exception(error)
            return
        future.set_result(merge)
        if merge.tier == "merge":
            self._let_it_be_registered(merge)
            try:
                with (
                    torch.inference_mode(),
                    torch.cuda.stream(self._keeping),
                    self._range("lego.keep"),
                ):
                    self.tiers.keep(recipe, merge.packed, merge.fidelity)
            except Exception:  # no host memory, for one: the merge itself is served
                logger.exception("%s could not be kept in host memory", recipe.merge_id)
                self.tiers.tell("errors", "keep")
        self._account = self.tiers.account()

    def _let_it_be_registered(self, merge: StagedMerge) -> None:
        """Wait while the loop registers a merge, as it mostly does at once, unless other merges wait.

        Streams wait for the loop. To describe and write the merge meanwhile would take turns with it for
        Python's lock.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: merge.taken.is_set() or self._others_wait(), _TAKEN_WITHIN_S
            )
            if merge.taken.is_set():
                self._changed.wait_for(self._others_wait, _REGISTERED_WITHIN_S)

    def _others_wait(self) -> bool:
        """Whether merges wait for a thread."""
        return sum(not job.thread.done() for job in list(self._jobs)) > self._thread_count

    def _tell_threads(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _make(self, recipe: Recipe, queued_at: float) -> StagedMerge:
        started = time.perf_counter()
        with torch.inference_mode(), torch.cuda.stream(self._merging):
            with self._range("lego.find"):
                found = self.tiers.find(recipe)
            if found is not None:
                packed, fidelity, tier = found
                loaded = merged = time.perf_counter()
            else:
                packed, fidelity, loaded = self._merge_in_what_memory_there_is(recipe)
                tier, merged = "merge", time.perf_counter()
            fingerprint = packed.fingerprint() if self._workers > 1 else ""
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        self.tiers.spare_device(self._staged_bytes() + packed.nbytes)
        prepared = [self._prepared(recipe, packed)]
        seconds = {"queue": started - queued_at, "load": loaded - started, "merge": merged - loaded}
        return StagedMerge(packed, prepared, tier, fidelity, fingerprint, seconds)

    def _prepared(self, recipe: Recipe, packed: PackedAdapter) -> Any:
        with self._range("lego.prepare"):
            return self._prepare(packed.unpack(), engine_id(recipe.merge_id))

    def _merge_in_what_memory_there_is(self, recipe: Recipe) -> tuple[PackedAdapter, float, float]:
        with suppress(torch.OutOfMemoryError):
            return self._merge(recipe)
        # Members on the device are a convenience: without them there may be room.
        self.tiers.drop_from_device()
        torch.cuda.empty_cache()
        return self._merge(recipe)

    def _merge(self, recipe: Recipe) -> tuple[PackedAdapter, float, float]:
        """Merge a recipe's members. Returns the merge, its fidelity, and when they were loaded."""
        with self._range("lego.load"):
            members = self.tiers.members(recipe.members)
        loaded = time.perf_counter()
        with self._range("lego.merge"):
            adapter, report = merge_adapters(
                members,
                recipe.config,
                weights=[member.weight for member in recipe.members],
                device=self._device,
                dtype=self._dtype,
                name=recipe.merge_id,
                report=True,
            )
            return PackedAdapter.pack(adapter), report.fidelity, loaded

    def _staged_bytes(self) -> int:
        """Bytes of finished merges on the device, as seen from any thread."""
        futures = [staging.future for staging in list(self._merges.values())]
        done = [f for f in futures if f.done() and not f.cancelled() and f.exception() is None]
        return sum(future.result().packed.nbytes for future in done)

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        """Name what a thread does to PyTorch's profiler, and on CUDA to Nsight's."""
        with ExitStack() as stack:
            stack.enter_context(record_function(name))
            if self._device.type == "cuda":
                stack.enter_context(torch.cuda.nvtx.range(name))
            yield


def _still_here(merge: StagedMerge) -> Future[StagedMerge]:
    """Return a merge once more that was let go of before its thread has kept it.

    As found in host memory: that is where it will be, if there is room.
    """
    found: Future[StagedMerge] = Future()
    seconds = dict.fromkeys(merge.seconds, 0.0)
    found.set_result(replace(merge, prepared=[], tier="host", seconds=seconds))
    return found


def _stream(device: torch.device) -> Any:
    """Return a stream beside the model's, whose kernels do not queue behind it; None without CUDA.

    A thread synchronises it before it hands anything over, so that whoever sees the result may use
    it on any stream.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _failure(recipe: Recipe, error: BaseException) -> dict[str, Any]:
    if isinstance(error, LegoError):
        return _failed(type(error).__name__, str(error), error.param)
    logger.error("merging %s failed", recipe.merge_id, exc_info=error)
    # What PyTorch raises on the CPU is a plain RuntimeError.
    exhausted = isinstance(error, MemoryError) or "allocate memory" in str(error)
    return _failed("OutOfMemoryError" if exhausted else type(error).__name__)


def _failed(error: str, message: str = "", param: str | None = None) -> dict[str, Any]:
    return {"state": "failed", "error": error, "message": message, "param": param}
