"""The merges of one API server: which are ready, in the making, or can be had again.

`MergedAdapters.obtain` makes one servable, read it first. Whoever serves from one keeps it from
eviction meanwhile with `cache.pinned`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from cachetools import LRUCache

from lego_core import MergeConfig
from vllm_lego import tracing
from vllm_lego._vllm import Engine
from vllm_lego.cache import CachedMerge, CacheFullError, MergedAdapterCache
from vllm_lego.errors import (
    BusyError,
    InUseError,
    MergeFailedError,
    MergeTimeoutError,
    ServingError,
    UnmergeableError,
    WorkersDisagreeError,
)
from vllm_lego.identity import engine_id, merge_id
from vllm_lego.metrics import Metrics
from vllm_lego.recipe import Member, Recipe
from vllm_lego.settings import Settings
from vllm_lego.slots import Slots
from vllm_lego.staging import Stager
from vllm_lego.store import MergeStore
from vllm_lego.verdict import agreed

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

Result = Literal["hit", "miss", "coalesced"]
_Found = TypeVar("_Found")

_ROOM_POLL_S = 0.01
_LETTING_GO_S = 10.0
_REMEMBERED = 4096


class MergedAdapters:
    """Makes merges servable and keeps account of them, on the event loop of its API server."""

    def __init__(
        self, engine: Engine, settings: Settings, metrics: Metrics, slots: Slots, files: Executor
    ) -> None:
        # The workers keep the union of what the API servers keep, and the engine runs it.
        self.cache = MergedAdapterCache(
            settings.device_cache_bytes // engine.api_servers, engine.in_flight
        )
        self._store = (  # the front end reads and deletes, the workers write
            MergeStore(Path(settings.store_dir), settings.store_bytes, metrics.observe_event)
            if settings.store_dir
            else None
        )
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._slots = slots
        self._files = files
        self._stager = Stager(engine.stage, metrics.observe_workers)
        # More than the workers make at a time would only fill their devices.
        self._turns = asyncio.Semaphore(settings.merge_threads)
        self._merging: dict[str, tuple[Recipe, asyncio.Task[str]]] = {}
        self._waiting: Counter[str] = Counter()  # requests, by merge
        self._without_room: set[str] = set()
        self._registering: dict[str, asyncio.Task[None]] = {}
        # Merges that left the device: another tier may have them, their members make them again.
        self._left: LRUCache[str, CachedMerge] = LRUCache(_REMEMBERED)

    def recipe(self, members: tuple[Member, ...], config: MergeConfig) -> Recipe:
        """Return the recipe of a merge for this engine."""
        identity = merge_id(
            tuple((member.digest, member.weight) for member in members),
            config,
            base_model=self._engine.base_model,
            dtype=self._engine.dtype,
        )
        return Recipe(identity, members, config)

    def is_ready(self, identity: str) -> bool:
        """Whether a merge is on the device, on every worker."""
        return identity in self.cache and identity not in self._merging

    async def known(self, identity: str) -> Recipe | None:
        """Return how a merge is made, if this server or its store has had it."""
        if identity in self._merging:
            return self._merging[identity][0]
        merge = self.cache.get(identity) or self._left.get(identity)
        if merge is not None:
            return Recipe.decode(merge.recipe)
        if self._store is None:
            return None
        recipe = await self._in_thread(self._store.recipe, identity)
        # A store may hold anything; only what is this server's own is served.
        if recipe is None or self.recipe(recipe.members, recipe.config) != recipe:
            return None
        return recipe

    async def everywhere(self) -> list[tuple[str, CachedMerge]]:
        """Return every merge that needs no merging, after the fastest tier that has it."""
        device = self.cache.snapshot()
        found = [("device", merge) for merge in device.values()]
        listed = set(device)
        for recipe, nbytes, fidelity in await self._engine.kept():
            if recipe.merge_id not in listed:
                found.append(("host", self._remembered(recipe, nbytes, fidelity)))
                listed.add(recipe.merge_id)
        if self._store is not None:
            stored = await self._in_thread(self._store.recipes)
            for recipe, nbytes, fidelity in stored:
                if recipe.merge_id not in listed:
                    found.append(("disk", self._remembered(recipe, nbytes, fidelity)))
        return found

    async def obtain(self, recipe: Recipe, *, queue: bool = True) -> Result:
        """Find a merge in the cache, join the making of it, or make it: one at a time per set.

        Args:
            recipe: of the merge.
            queue: whether it is refused when too many wait; not for who has waited already.

        Raises:
            ServingError: it could not be made; nothing else changed.
        """
        if recipe.merge_id in self._merging:
            await self._made(recipe.merge_id)
            return "coalesced"
        cached = self.cache.get(recipe.merge_id)
        if cached is not None:
            cached.hits += 1
            self._metrics.hits.labels("device").inc()
            return "hit"
        if queue and len(self._merging) >= self._settings.max_queued_merges:
            raise BusyError(
                f"{len(self._merging)} merges are waiting, the most this server queues; "
                "try again later"
            )
        task = asyncio.create_task(self._merge(recipe), name=recipe.merge_id)
        self._merging[recipe.merge_id] = recipe, task
        task.add_done_callback(lambda done: _forget(self._merging, recipe.merge_id, done))
        return "miss" if await self._made(recipe.merge_id) == "merge" else "hit"

    async def _made(self, identity: str) -> str:
        """Wait for a merge in the making. Returns the tier it came from, see `_merge`."""
        self._waiting[identity] += 1
        self._show_waiting()
        try:
            # A client that leaves cancels its own waiting, not the merge that others wait for.
            return await asyncio.shield(self._merging[identity][1])
        finally:
            self._waiting[identity] -= 1
            self._show_waiting()

    def _show_waiting(self) -> None:
        self._waiting = +self._waiting
        for_room = sum(self._waiting[identity] for identity in self._without_room)
        self._metrics.waiting.labels("room").set(for_room)
        self._metrics.waiting.labels("merge").set(self._waiting.total() - for_room)

    async def register(self, recipe: Recipe) -> None:
        """Register a merge that is ready with vLLM, once, and have vLLM answer to its name.

        For a request that was admitted to a slot: vLLM copies the merge into one, and would push out
        an adapter that runs, were all taken.

        Raises:
            ServingError: vLLM refuses it; it is dropped.
        """
        merge = self.cache.get(recipe.merge_id)
        if merge is None or merge.is_registered:
            return
        task = self._registering.get(recipe.merge_id)
        if task is None:
            task = asyncio.create_task(self._register(recipe, merge), name=recipe.merge_id)
            self._registering[recipe.merge_id] = task
            task.add_done_callback(lambda done: _forget(self._registering, recipe.merge_id, done))
        await asyncio.shield(task)

    async def _register(self, recipe: Recipe, merge: CachedMerge) -> None:
        started = time.perf_counter()
        try:
            with (
                self.cache.pinned(recipe.merge_id),
                tracing.span("lego.register", merge_id=recipe.merge_id),
            ):
                async with asyncio.timeout(self._settings.merge_timeout_s):
                    await self._engine.register(recipe, engine_id(recipe.merge_id))
        except Exception as error:  # not a cancellation: that is the end of the server
            raise await self._failed(recipe, error) from error
        merge.is_registered = True
        self._metrics.merge_seconds.labels("register").observe(time.perf_counter() - started)

    async def drop(self, identity: str) -> bool:
        """Forget a merge: on the device, in host memory and in the store.

        Returns:
            Whether it stays on the device, because another API server of this engine serves it.

        Raises:
            ServingError: requests in flight use it, or the store keeps it.
        """
        if identity in self._merging or self.cache.in_use(identity):
            raise InUseError(
                f"{identity} is in use by requests in flight; try again when they are done",
                param="id",
            )
        # Without a pause until the workers are told: whoever asks for it again is heard after this.
        gone = self.cache.pop(identity, None)
        if gone is not None:
            self._engine.unpublish(identity)
            self._left[identity] = gone  # until it is gone from everywhere
            self._show_cache()
        held = await self._purge(identity)
        self._left.pop(identity, None)
        await self.show_tiers()
        return held

    async def show_tiers(self) -> None:
        """Tell the metrics what host memory and the store have; merges do, where there are any.

        Where engine or volume does not answer the metrics stay as they are.
        """
        try:
            async with asyncio.timeout(_LETTING_GO_S):
                await self._stager.refresh()
                if self._store is not None:
                    kept = (await self._in_thread(self._store.merges)).values()
                    self._metrics.set_tier("disk", len(kept), sum(kept))
        except Exception as error:  # noqa: BLE001  no server and no answer depends on it
            logger.warning("the sizes of the tiers are not known: %r", error)

    async def _purge(self, identity: str) -> bool:
        """Let go of a merge, and drop it from host memory and the store.

        Returns:
            Whether a worker still holds it for somebody else.

        Raises:
            ServingError: it is still being written, or cannot be deleted.
        """
        try:
            async with asyncio.timeout(self._settings.merge_timeout_s):
                await self._engine.discard(identity, engine_id(identity))
                while (held := await self._engine.forget(identity)) is None:  # noqa: ASYNC110
                    await asyncio.sleep(_ROOM_POLL_S)  # the workers cannot call back
                if self._store and not await self._in_thread(self._store.delete, identity):
                    raise MergeFailedError(
                        f"{identity} could not be deleted from the store; the server's log says more"
                    )
        except TimeoutError as error:
            raise MergeTimeoutError(
                f"{identity} is still being written to the store; try again later", param="id"
            ) from error
        return held

    def _remembered(self, recipe: Recipe, nbytes: int, fidelity: float) -> CachedMerge:
        left = self._left.get(recipe.merge_id)
        return left or CachedMerge(recipe.encode(), nbytes, fidelity)

    async def _merge(self, recipe: Recipe) -> str:
        """Have a merge staged on every worker.

        Returns:
            The tier it came from: `host`, `disk`, or `merge` when it was made.
        """
        started = time.perf_counter()
        try:
            with (
                self.cache.pinned(recipe.merge_id),
                self._metrics.in_progress.track_inprogress(),
                tracing.span("lego.stage", **tracing.described(recipe)),
            ):
                async with asyncio.timeout(self._settings.merge_timeout_s), self._turns:
                    turn = time.perf_counter()
                    status = agreed(recipe, await self._stager.staged(recipe))
                    _trace(status, turn)
                    await self._make_room(recipe, status)
        except Exception as error:  # not a cancellation: that is the end of the server
            told = await self._failed(recipe, error)
            if not self._waiting[recipe.merge_id]:  # all have left; who waits counts it otherwise
                self._metrics.count_error(told.reason, named_a_set=False)
            raise told from error
        seconds = status["seconds"] | {
            "queue": status["seconds"]["queue"] + turn - started,
            "total": time.perf_counter() - started,
        }
        self._left.pop(recipe.merge_id, None)
        self.cache[recipe.merge_id].seconds = seconds
        self._account(recipe, status, seconds)
        tier: str = status["tier"]
        return tier

    async def _failed(self, recipe: Recipe, error: Exception) -> ServingError:
        """Drop a merge everywhere that could not be served. Returns what its requests get."""
        if self.cache.pop(recipe.merge_id, None) is not None:
            self._engine.unpublish(recipe.merge_id)
        self._show_cache()
        told = tracing.described(recipe) | {"error": type(error).__name__, "message": error}
        logger.info("merge failed %s", tracing.line(**told))
        try:
            async with asyncio.timeout(_LETTING_GO_S):  # an engine that is gone never answers
                await self._engine.discard(recipe.merge_id, engine_id(recipe.merge_id))
            if isinstance(error, WorkersDisagreeError):  # each keeps its own
                await self._purge(recipe.merge_id)
        except Exception:  # what failed first is what is told
            logger.exception("%s could not be dropped", recipe.merge_id)
        if isinstance(error, ServingError):
            return error
        if isinstance(error, TimeoutError):
            return MergeTimeoutError(
                f"merging {len(recipe.members)} adapters took longer than "
                f"{self._settings.merge_timeout_s:g} s; try again later"
            )
        logger.error("serving %s failed", recipe.merge_id, exc_info=error)
        return MergeFailedError("the server could not load the merge; its log says more")

    async def _make_room(self, recipe: Recipe, status: dict[str, Any]) -> None:
        """Enter a merge into the cache, once what is in use leaves room for it."""
        if status["nbytes"] > self.cache.maxsize:
            raise UnmergeableError(
                f"the merge takes {status['nbytes']} bytes, more than the {int(self.cache.maxsize)} "
                "that this server keeps for merges (VLLM_LEGO_DEVICE_CACHE_BYTES); ask for a lower "
                "rank",
                param="merge.rank",
            )
        merge = CachedMerge(recipe.encode(), status["nbytes"], status["fidelity"])
        if recipe.merge_id in self._left:
            merge.hits = self._left[recipe.merge_id].hits
        with self._metrics.waited("room"):
            if not self._entered(recipe.merge_id, merge):
                with self._slots.pressed(), self._lacking_room(recipe.merge_id):
                    while not self._entered(recipe.merge_id, merge):  # noqa: ASYNC110  engines tell nobody
                        await asyncio.sleep(_ROOM_POLL_S)
        evicted, self.cache.evicted = self.cache.evicted, []
        self._show_cache()
        for identity, gone in evicted:
            self._metrics.observe_eviction("device", time.monotonic() - gone.last_used)
            self._engine.unpublish(identity)
            self._left[identity] = gone
        # All at once: whoever asks for one of them again is then sure to be heard after this.
        await asyncio.gather(*(self._engine.discard(i, engine_id(i)) for i, _ in evicted))

    @contextmanager
    def _lacking_room(self, identity: str) -> Iterator[None]:
        self._without_room.add(identity)
        self._show_waiting()
        try:
            yield
        finally:
            self._without_room.discard(identity)
            self._show_waiting()

    def _entered(self, identity: str, merge: CachedMerge) -> bool:
        try:
            self.cache[identity] = merge
        except CacheFullError:
            return False
        return True

    async def _in_thread(self, function: Callable[..., _Found], *args: Any) -> _Found:
        """Call what waits for a volume; see `LegoService` for the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._files, function, *args)

    def _account(self, recipe: Recipe, status: dict[str, Any], seconds: dict[str, float]) -> None:
        if status["tier"] == "merge":
            self._metrics.observe_merge(recipe.config.method, status["fidelity"], seconds)
        else:
            self._metrics.hits.labels(status["tier"]).inc()
        told = tracing.described(recipe) | {
            "tier": status["tier"],
            "fidelity": status["fidelity"],
            "bytes": status["nbytes"],
        }
        told |= {f"{phase}_s": value for phase, value in seconds.items()}
        logger.info("merge done %s", tracing.line(**told))

    def _show_cache(self) -> None:
        self._metrics.set_tier("device", len(self.cache), int(self.cache.currsize))


def _trace(status: dict[str, Any], turn: float) -> None:
    """Make the spans of a merge in its worker, of which only the durations are known."""
    seconds = status["seconds"]
    tracing.annotate(tier=status["tier"], fidelity=status["fidelity"], bytes=status["nbytes"])
    tracing.past_span("lego.load", turn + seconds["queue"], seconds["load"])
    if status["tier"] == "merge":
        merging = turn + seconds["queue"] + seconds["load"]
        tracing.past_span("lego.merge", merging, seconds["merge"])


def _forget(tasks: dict[str, Any], identity: str, task: asyncio.Task[Any]) -> None:
    del tasks[identity]
    if not task.cancelled():
        task.exception()  # seen by those who wait; nobody may be left
