"""THE orchestrator: from the set of adapters in a request to a model name that serves it.

Read `LegoService.serve` top-down; every stage of a request has a line there or below.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from vllm_lego import tracing
from vllm_lego._vllm import Engine
from vllm_lego.access import Access
from vllm_lego.adapter_set import AdapterSet, shown
from vllm_lego.cache import CachedMerge
from vllm_lego.catalog import Catalog
from vllm_lego.configurations import Configurations
from vllm_lego.errors import (
    BadRequestError,
    MemberChangedError,
    MergeTimeoutError,
    ShuttingDownError,
    UnknownAdapterError,
    UnmergeableError,
)
from vllm_lego.merged_adapters import MergedAdapters, Result
from vllm_lego.metrics import Metrics
from vllm_lego.recipe import Member, Recipe
from vllm_lego.settings import Settings
from vllm_lego.slots import Slots
from vllm_lego.threads import hand_over_soon

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

_FILE_THREADS = 16
_Read = TypeVar("_Read")


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
        hand_over_soon()
        # Of our own: a volume that does not answer must not take the event loop's, which vLLM needs.
        files = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="lego-files")
        self.catalog = Catalog.of(
            settings, engine.adapters, self.access, engine.is_base_model, files
        )
        engine.list_too(self.catalog.names_to_list)
        self.slots = Slots(max(1, engine.slots // engine.api_servers), settings.slot_quantum_s)
        if engine.api_servers > engine.slots:
            logger.warning(
                "%d API servers share %d adapter slots: sets may starve each other; give --max-loras "
                "at least as many",
                engine.api_servers,
                engine.slots,
            )
        self.merged = MergedAdapters(engine, settings, metrics, self.slots, files)
        self.metrics = metrics
        self._engine = engine
        self.base_model = engine.base_model
        self.is_base_model = engine.is_base_model
        self.is_served = engine.is_served
        self._open_requests = 0
        self._all_served = asyncio.Event()
        self._all_served.set()
        self._closing = False
        self._configs = Configurations(settings, engine.max_rank)
        metrics.describe(
            {
                "device": int(self.merged.cache.maxsize),
                "host": settings.host_cache_bytes,
                "disk": settings.store_bytes if settings.store_dir else 0,
            },
            self.slots.count,
            method=settings.method,
            rank=settings.rank or engine.max_rank,
            max_loras=engine.slots,
        )

    async def serve(self, wanted: AdapterSet, held: ExitStack, *, param: str) -> Serving:
        """Make a set servable.

        Args:
            wanted: the set.
            held: keeps it so until it is closed.
            param: the field of the request that names it, for errors.

        Raises:
            ServingError: it cannot be served; once `held` is closed nothing else has changed.
        """
        name, *_ = wanted.weights
        if wanted.is_single and self.catalog.is_native(name):
            await self.serve_native(name, held)  # vLLM serves it as it is, mergeable or not
            return Serving(name)
        return await self._serve_recipe(await self._recipe_of(wanted, param), held)

    async def serve_model(self, name: str, held: ExitStack) -> Serving | None:
        """As `serve`, for a model name that vLLM does not know. None when nobody here does."""
        await self._in_time(self.catalog.refresh(), 1)
        if name not in self.catalog:
            return None
        return await self.serve(AdapterSet({name: 1.0}), held, param="model")

    async def serve_known(self, identity: str, held: ExitStack) -> Serving | None:
        """As `serve`, for a merge id that a client sends back. None when it is not known."""
        recipe = await self._in_time(self._known(identity), 1)
        # A store, or a folder's past, may know of adapters that are served no more.
        withdrawn = recipe is None or not all(
            self.catalog.is_named(member.name) for member in recipe.members
        )
        if recipe is None or withdrawn or not self.access.may_use(recipe):
            return None
        try:
            return await self._serve_recipe(recipe, held)
        except (MemberChangedError, UnmergeableError) as error:
            raise UnknownAdapterError(
                f"{identity} is not kept here any more, and its members have changed since",
                param="model",
            ) from error

    async def serve_native(self, name: str, held: ExitStack) -> None:
        """Wait for a slot for a model name that vLLM serves itself; its adapters take one too."""
        if name not in self._engine.adapters:
            return
        if self._closing:
            raise ShuttingDownError
        held.enter_context(self._taken())
        await self._enter_slot(name, held)

    async def _serve_recipe(self, recipe: Recipe, held: ExitStack) -> Serving:
        if self._closing:
            raise ShuttingDownError
        tracing.describe(recipe)
        held.enter_context(self._taken())
        result = await self.merged.obtain(recipe)
        tracing.annotate(result=result)
        await self._enter_slot(recipe.merge_id, held)
        held.enter_context(self.merged.cache.pinned(recipe.merge_id))
        # Pushed out while it stood in line, perhaps on its way back already.
        if not self.merged.is_ready(recipe.merge_id):
            await self.merged.obtain(recipe, queue=False)
        await self.merged.register(recipe)
        self.metrics.requests.labels(result).inc()
        return Serving(recipe.merge_id, result)

    async def _enter_slot(self, name: str, held: ExitStack) -> None:
        """Wait for a slot, and keep it until `held` is closed; see `Slots`."""
        with tracing.span("lego.slot"), self.metrics.waited("slot"):
            if not self.slots.try_enter(name):
                await self._stand_in_line(name)
        held.callback(self._leave_slot, name)
        self._show_slots()

    async def _stand_in_line(self, name: str) -> None:
        with self.metrics.waiting.labels("slot").track_inprogress():
            try:
                await self.slots.stand_in_line(name)
            finally:  # also when it left the line
                self._show_slots()

    def _leave_slot(self, name: str) -> None:
        self.slots.leave(name)
        self._show_slots()

    def _show_slots(self) -> None:
        self.metrics.slots_in_use.set(self.slots.in_use())

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

    def keep_for_background(self, response: str, held: ExitStack) -> None:
        """Keep what a request holds until its response, which goes on after it, has ended."""
        task = self._engine.background_task(response)
        if task is not None:
            task.add_done_callback(lambda _: held.close())
        else:  # refused, or over already
            held.close()

    async def prepare(self, wanted: AdapterSet) -> tuple[Result, CachedMerge, dict[str, float]]:
        """Make a set's merge ready on the device ahead of requests.

        Returns:
            How it was come by, the merge, and the seconds by phase: none if it was ready.

        Raises:
            ServingError: as `serve`.
        """
        name, *_ = await self.catalog.check_names(wanted.weights, param="adapters")
        if wanted.is_single and self.catalog.is_native(name):
            why = f"adapter {name!r} alone, with weight 1, is served as it is: nothing to merge"
            raise BadRequestError(why, param="adapters")
        recipe = await self._recipe_of(wanted, "adapters")
        if self._closing:
            raise ShuttingDownError
        tracing.describe(recipe)
        with self._taken(), self.merged.cache.pinned(recipe.merge_id):
            ready = self.merged.is_ready(recipe.merge_id)
            result = await self.merged.obtain(recipe)
            tracing.annotate(result=result)
            self.metrics.requests.labels(result).inc()
            merge = self.merged.cache[recipe.merge_id]
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
        return await self.merged.drop(identity)

    async def merges(self) -> list[tuple[str, CachedMerge]]:
        """Return every merge that needs no merging, after the fastest tier that has it.

        Those that the caller may not see are left out.
        """
        return [
            (tier, merge)
            for tier, merge in await self.merged.everywhere()
            if self.access.may_see(Recipe.decode(merge.recipe))
        ]

    async def _known(self, identity: str) -> Recipe | None:
        """Return how a merge is made, and see which adapters there are now."""
        recipe = await self.merged.known(identity)
        await self.catalog.refresh()
        return recipe

    async def _is_kept(self, identity: str) -> bool:
        """Whether any tier has a merge, or it is being made, and the caller may see it."""
        recipe = await self.merged.known(identity)
        if recipe is not None:
            return self.access.may_see(recipe)
        # Other API servers of this engine may have had it made.
        kept = await self.merges()
        return any(Recipe.decode(merge.recipe).merge_id == identity for _, merge in kept)

    async def _in_time(self, reading: Awaitable[_Read], adapters: int) -> _Read:
        """Bound the reading, and downloading, of adapters."""
        limit = self.settings.merge_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await reading
        except TimeoutError as error:
            raise MergeTimeoutError(
                f"reading {adapters} adapters took longer than {limit:g} s; try again later"
            ) from error

    async def _recipe_of(self, wanted: AdapterSet, param: str) -> Recipe:
        config = None if wanted.is_single else self._configs.of_set(wanted)
        entries = self.catalog.look_up_at_once(wanted.weights, param=param)
        if entries is None:
            looking = self.catalog.look_up(wanted.weights, param=param)
            entries = await self._in_time(looking, len(wanted.weights))
        config = config or self._configs.of_one(entries[0], param=param)
        members = tuple(
            Member(entry.name, entry.path, entry.digest, wanted.weights[entry.name], entry.stamp)
            for entry in entries
        )
        recipe = self.merged.recipe(members, config)
        self.access.grant(recipe.merge_id)
        return recipe
