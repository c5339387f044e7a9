"""THE orchestrator: from the set of adapters in a request to a model name that serves it.

Read `LegoService.serving` top-down; every stage of a request has a line there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cachetools import LRUCache

from lego_core import MergeConfig
from vllm_lego._vllm import Engine
from vllm_lego.access import Access
from vllm_lego.adapter_set import AdapterSet, shown
from vllm_lego.cache import CachedMerge, CacheFullError, MergedAdapterCache
from vllm_lego.catalog import Catalog, CatalogEntry
from vllm_lego.configurations import Configurations
from vllm_lego.errors import (
    BadRequestError,
    BusyError,
    InUseError,
    MemberChangedError,
    MergeFailedError,
    MergeTimeoutError,
    ServingError,
    ShuttingDownError,
    UnknownAdapterError,
    UnmergeableError,
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

_ROOM_POLL_S = 0.01
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Serving:
    """Under which model name a request is served, and how its merge was come by.

    `result` is None when nothing had to be merged.
    """

    model: str
    result: Result | None = None


class LegoService:
    """One per API server, on its event loop."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        metrics: Metrics,
        access: Access | None = None,
    ) -> None:
        self.settings = settings
        self.access = access or Access()
        if self.access.is_restricted:
            engine.hide(self.access.may_see)  # before anybody looks for an adapter
        self.catalog = Catalog.of(settings, engine.adapters, self.access, engine.is_base_model)
        engine.list_too(self.catalog.names_to_list)
        # The workers keep the union of what the API servers keep, and the engine runs it.
        self.cache = MergedAdapterCache(
            settings.device_cache_bytes // engine.api_servers, engine.in_flight
        )
        self.slots = Slots(max(1, engine.slots // engine.api_servers), settings.slot_quantum_s)
        if engine.api_servers > engine.slots:
            logger.warning(
                "%d API servers share %d adapter slots: sets may starve each other; give --max-loras "
                "at least as many",
                engine.api_servers,
                engine.slots,
            )
        self.store = (  # the front end reads and deletes, the workers write
            MergeStore(
                Path(settings.store_dir),
                settings.store_bytes,
                lambda _, reason: metrics.errors.labels(reason).inc(),
            )
            if settings.store_dir
            else None
        )
        self.metrics = metrics
        self._engine = engine
        self.base_model = engine.base_model
        self.is_base_model = engine.is_base_model
        self.is_served = engine.is_served
        self._stager = Stager(engine.stage, metrics.observe_workers)
        # More than the workers make at a time would only fill their devices.
        self._turns = asyncio.Semaphore(settings.merge_threads)
        self._merging: dict[str, tuple[Recipe, asyncio.Task[str]]] = {}
        self._open_requests = 0
        self._all_served = asyncio.Event()
        self._all_served.set()
        self._closing = False
        # Merges that left the device: another tier may have them, their members make them again.
        self._left: LRUCache[str, CachedMerge] = LRUCache(_REMEMBERED)
        self._letting_go: set[asyncio.Task[None]] = set()
        self._configs = Configurations(settings, engine.max_rank)

    @asynccontextmanager
    async def serving(self, wanted: AdapterSet, *, param: str) -> AsyncIterator[Serving]:
        """Make a set servable and keep it so while the context is open.

        Args:
            wanted: the set.
            param: the field of the request that names it, for errors.

        Raises:
            ServingError: it cannot be served; nothing else changed.
        """
        name, *_ = wanted.weights
        if wanted.is_single and self.catalog.is_native(name):
            async with self.serving_native(name):  # vLLM serves it as it is, mergeable or not
                yield Serving(name)
            return
        async with self._serving_recipe(await self._recipe_of(wanted, param)) as serving:
            yield serving

    @asynccontextmanager
    async def serving_model(self, name: str) -> AsyncIterator[Serving | None]:
        """As `serving`, for a model name that vLLM does not know. None when nobody here does."""
        async with self._in_time(1):
            await self.catalog.refresh()
        if name not in self.catalog:
            yield None
            return
        async with self.serving(AdapterSet({name: 1.0}), param="model") as serving:
            yield serving

    @asynccontextmanager
    async def serving_known(self, identity: str) -> AsyncIterator[Serving | None]:
        """As `serving`, for a merge id that a client sends back. None when it is not known."""
        recipe = await self._known(identity)
        if recipe is None or not self.access.may_use(recipe):
            yield None
            return
        async with AsyncExitStack() as stack:
            try:
                serving = await stack.enter_async_context(self._serving_recipe(recipe))
            except (MemberChangedError, UnmergeableError) as error:
                raise UnknownAdapterError(
                    f"{identity} is not kept here any more, and its members have changed since",
                    param="model",
                ) from error
            yield serving

    @asynccontextmanager
    async def serving_native(self, name: str) -> AsyncIterator[None]:
        """Wait for a slot for a model name that vLLM serves itself; its adapters take one too."""
        if name not in self._engine.adapters:
            yield
            return
        with self._taken():
            async with self.slots.admitted(name):
                yield

    async def drain(self) -> None:
        """Refuse new sets, and wait until every request that was taken has been served."""
        self._closing = True
        await self._all_served.wait()

    @contextmanager
    def _taken(self) -> Iterator[None]:
        self._open_requests += 1
        self._all_served.clear()
        try:
            yield
        finally:
            self._open_requests -= 1
            if not self._open_requests:
                self._all_served.set()

    def keep_for_background(self, response: str, held: AsyncExitStack) -> None:
        """Keep what a request holds until its response, which goes on after it, has ended."""
        task = self._engine.background_task(response)

        def let_go(_: object = None) -> None:
            letting_go = asyncio.create_task(held.aclose())
            self._letting_go.add(letting_go)
            letting_go.add_done_callback(self._letting_go.discard)

        if task is not None:
            task.add_done_callback(let_go)
        else:  # refused, or over already
            let_go()

    async def prepare(self, wanted: AdapterSet) -> tuple[Result, CachedMerge, dict[str, float]]:
        """Make a set's merge ready on the device ahead of requests.

        Returns:
            How it was come by, the merge, and the seconds by phase: none if it was ready.

        Raises:
            ServingError: as `serving`.
        """
        name, *_ = await self.catalog.check_names(wanted.weights, param="adapters")
        if wanted.is_single and self.catalog.is_native(name):
            why = f"adapter {name!r} alone, with weight 1, is served as it is: nothing to merge"
            raise BadRequestError(why, param="adapters")
        recipe = await self._recipe_of(wanted, "adapters")
        if self._closing:
            raise ShuttingDownError
        with self._taken(), self.cache.pinned(recipe.merge_id):
            ready = recipe.merge_id in self.cache and recipe.merge_id not in self._merging
            result = await self._obtain(recipe)
            self.metrics.requests.labels(result).inc()
            merge = self.cache[recipe.merge_id]
        return result, merge, {} if ready else merge.seconds

    async def drop(self, identity: str) -> bool:
        """Forget a merge: on the device, in host memory and in the store.

        Returns:
            Whether it stays on the device, because another API server of this engine serves it.

        Raises:
            ServingError: no tier has it, requests in flight use it, or the store keeps it.
        """
        if not await self._is_kept(identity):
            raise UnknownAdapterError(f"merge {shown(identity)} is not kept here", param="id")
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
        try:
            async with asyncio.timeout(self.settings.merge_timeout_s):
                await self._engine.discard(identity, engine_id(identity))
                while (held := await self._engine.forget(identity)) is None:  # noqa: ASYNC110
                    await asyncio.sleep(_ROOM_POLL_S)  # the workers cannot call back
                if self.store and not await asyncio.to_thread(self.store.delete, identity):
                    raise MergeFailedError(
                        f"{identity} could not be deleted from the store; the server's log says more"
                    )
        except TimeoutError as error:
            raise MergeTimeoutError(
                f"{identity} is still being written to the store; try again later", param="id"
            ) from error
        self._left.pop(identity, None)
        return held

    async def merges(self) -> list[tuple[str, CachedMerge]]:
        """Return every merge that needs no merging, after the fastest tier that has it.

        Those that the caller may not see are left out.
        """
        device = self.cache.snapshot()
        found = [("device", merge) for merge in device.values()]
        listed = set(device)
        for recipe, nbytes, fidelity in await self._engine.kept():
            if recipe.merge_id not in listed:
                found.append(("host", self._remembered(recipe, nbytes, fidelity)))
                listed.add(recipe.merge_id)
        if self.store is not None:
            stored = await asyncio.to_thread(self.store.recipes)
            for recipe, nbytes, fidelity in stored:
                if recipe.merge_id not in listed:
                    found.append(("disk", self._remembered(recipe, nbytes, fidelity)))
        return [
            (tier, merge)
            for tier, merge in found
            if self.access.may_see(Recipe.decode(merge.recipe))
        ]

    @asynccontextmanager
    async def _serving_recipe(self, recipe: Recipe) -> AsyncIterator[Serving]:
        if self._closing:
            raise ShuttingDownError
        with self._taken():
            result = await self._obtain(recipe)
            async with self.slots.admitted(recipe.merge_id):
                with self.cache.pinned(recipe.merge_id):
                    # Pushed out while it stood in line, perhaps on its way back: not registered yet.
                    if recipe.merge_id not in self.cache or recipe.merge_id in self._merging:
                        await self._obtain(recipe)
                    self.metrics.requests.labels(result).inc()
                    yield Serving(recipe.merge_id, result)

    async def _known(self, identity: str) -> Recipe | None:
        """Return how a merge is made, if this server or its store has had it."""
        if identity in self._merging:
            return self._merging[identity][0]
        merge = self.cache.get(identity) or self._left.get(identity)
        if merge is not None:
            return Recipe.decode(merge.recipe)
        if self.store is None:
            return None
        recipe = await asyncio.to_thread(self.store.recipe, identity)
        # A store may hold anything; only what is this server's own is served.
        if recipe is None or self._recipe(recipe.members, recipe.config) != recipe:
            return None
        return recipe

    async def _is_kept(self, identity: str) -> bool:
        """Whether any tier has a merge, or it is being made, and the caller may see it."""
        recipe = await self._known(identity)
        if recipe is not None:
            return self.access.may_see(recipe)
        # Other API servers of this engine may have had it made.
        kept = await self.merges()
        return any(Recipe.decode(merge.recipe).merge_id == identity for _, merge in kept)

    def _remembered(self, recipe: Recipe, nbytes: int, fidelity: float) -> CachedMerge:
        left = self._left.get(recipe.merge_id)
        return left or CachedMerge(recipe.encode(), nbytes, fidelity)

    async def _look_up(self, wanted: AdapterSet, param: str) -> list[CatalogEntry]:
        async with self._in_time(len(wanted.weights)):
            return await self.catalog.look_up(wanted.weights, param=param)

    @asynccontextmanager
    async def _in_time(self, adapters: int) -> AsyncIterator[None]:
        """Bound the reading, and downloading, of adapters."""
        limit = self.settings.merge_timeout_s
        try:
            async with asyncio.timeout(limit):
                yield
        except TimeoutError as error:
            raise MergeTimeoutError(
                f"reading {adapters} adapters took longer than {limit:g} s; try again later"
            ) from error

    async def _recipe_of(self, wanted: AdapterSet, param: str) -> Recipe:
        config = None if wanted.is_single else self._configs.of_set(wanted)
        entries = await self._look_up(wanted, param)
        config = config or self._configs.of_one(entries[0], param=param)
        members = tuple(
            Member(entry.name, entry.path, entry.digest, wanted.weights[entry.name])
            for entry in entries
        )
        recipe = self._recipe(members, config)
        self.access.grant(recipe.merge_id)
        return recipe

    def _recipe(self, members: tuple[Member, ...], config: MergeConfig) -> Recipe:
        identity = merge_id(
            ((member.digest, member.weight) for member in members),
            config,
            base_model=self._engine.base_model,
            dtype=self._engine.dtype,
        )
        return Recipe(identity, members, config)

    async def _obtain(self, recipe: Recipe) -> Result:
        """Find a merge in the cache, join the making of it, or make it: one at a time per set."""
        if recipe.merge_id in self._merging:
            await asyncio.shield(self._merging[recipe.merge_id][1])
            return "coalesced"
        cached = self.cache.get(recipe.merge_id)
        if cached is not None:
            cached.hits += 1
            self.metrics.hits.labels("device").inc()
            return "hit"
        if len(self._merging) >= self.settings.max_queued_merges:
            raise BusyError(
                f"{len(self._merging)} merges are waiting, the most this server queues; "
                "try again later"
            )
        task = asyncio.create_task(self._merge(recipe), name=recipe.merge_id)
        self._merging[recipe.merge_id] = recipe, task
        task.add_done_callback(lambda done: self._forget(recipe.merge_id, done))
        # A client that leaves cancels its own waiting, not the merge that others wait for.
        return "miss" if await asyncio.shield(task) == "merge" else "hit"

    def _forget(self, identity: str, task: asyncio.Task[str]) -> None:
        del self._merging[identity]
        if not task.cancelled():
            task.exception()  # seen by those who wait; nobody may be left

    async def _merge(self, recipe: Recipe) -> str:
        """Stage a merge on the workers, then register it with vLLM and publish it.

        Returns:
            The tier it came from: `host`, `disk`, or `merge` when it was made.
        """
        started = time.perf_counter()
        number = engine_id(recipe.merge_id)
        limit = self.settings.merge_timeout_s
        try:
            with self.cache.pinned(recipe.merge_id), self.metrics.in_progress.track_inprogress():
                async with asyncio.timeout(limit), self._turns:
                    turn = time.perf_counter()
                    status = agreed(recipe, await self._stager.staged(recipe))
                    await self._make_room(recipe, status)
                    staged = time.perf_counter()
                    await self._engine.register(recipe, number)
        except Exception as error:  # not a cancellation: that is the end of the server
            self.cache.pop(recipe.merge_id, None)
            self._show_cache()
            await self._let_go(recipe.merge_id, number)
            if isinstance(error, ServingError):
                raise
            if isinstance(error, TimeoutError):
                raise MergeTimeoutError(
                    f"merging {len(recipe.members)} adapters took longer than {limit:g} s; "
                    "try again later"
                ) from error
            logger.exception("serving %s failed", recipe.merge_id)
            why = "the server could not load the merge; its log says more"
            raise MergeFailedError(why) from error
        finished = time.perf_counter()
        seconds = status["seconds"] | {
            "queue": status["seconds"]["queue"] + turn - started,
            "register": finished - staged,
            "total": finished - started,
        }
        self._left.pop(recipe.merge_id, None)
        self.cache[recipe.merge_id].seconds = seconds
        self._account(recipe, status, seconds)
        tier: str = status["tier"]
        return tier

    async def _let_go(self, identity: str, number: int) -> None:
        """Have the workers drop a merge that failed; what failed first is what is told."""
        try:
            await self._engine.discard(identity, number)
        except Exception:
            logger.exception("%s could not be dropped", identity)

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
        while True:
            try:
                self.cache[recipe.merge_id] = merge
                break
            except CacheFullError:
                await asyncio.sleep(_ROOM_POLL_S)
        evicted, self.cache.evicted = self.cache.evicted, []
        self._show_cache()
        for identity, gone in evicted:
            self.metrics.evictions.labels("device").inc()
            self._engine.unpublish(identity)
            self._left[identity] = gone
        # All at once: whoever asks for one of them again is then sure to be heard after this.
        await asyncio.gather(*(self._engine.discard(i, engine_id(i)) for i, _ in evicted))

    def _account(self, recipe: Recipe, status: dict[str, Any], seconds: dict[str, float]) -> None:
        if status["tier"] == "merge":
            self.metrics.observe_merge(recipe.config.method, status["fidelity"], seconds)
        else:
            self.metrics.hits.labels(status["tier"]).inc()
        logger.info(
            "%s of %d adapters and rank %d, fidelity %.3f, from %s: %s",
            recipe.merge_id,
            len(recipe.members),
            recipe.config.rank,
            status["fidelity"],
            status["tier"],
            ", ".join(f"{phase} {value * 1e3:.0f} ms" for phase, value in seconds.items()),
        )

    def _show_cache(self) -> None:
        self.metrics.set_tier("device", len(self.cache), int(self.cache.currsize))
