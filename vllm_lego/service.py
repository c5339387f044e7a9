"""THE orchestrator: from the set of adapters in a request to a model name that serves it.

Read `LegoService.serving` top-down; every stage of a request has a line there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from lego_core import LegoError, MergeConfig
from vllm_lego._vllm import Engine
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.cache import CachedMerge, CacheFullError, MergedAdapterCache
from vllm_lego.catalog import Catalog
from vllm_lego.errors import (
    BadRequestError,
    BusyError,
    MergeFailedError,
    MergeTimeoutError,
    ServingError,
    UnmergeableError,
)
from vllm_lego.identity import engine_id, merge_id
from vllm_lego.metrics import Metrics
from vllm_lego.recipe import Member, Recipe
from vllm_lego.settings import Settings, SettingsError

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

Result = Literal["hit", "miss", "coalesced"]

_FIRST_POLL_S = 0.005
_SLOWEST_POLL_S = 0.05
_UNMERGEABLE = {"AdapterFormatError", "AdapterNotFoundError", "IncompatibleAdaptersError"}


@dataclass(frozen=True, slots=True)
class Serving:
    """Under which model name a request is served, and how its merge was come by.

    `result` is None when nothing had to be merged.
    """

    model: str
    result: Result | None = None


class LegoService:
    """One per API server, on its event loop."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.catalog = Catalog(engine.adapters)
        # The workers keep the union of what the API servers keep.
        self.cache = MergedAdapterCache(settings.device_cache_bytes // engine.api_servers)
        self.metrics = metrics
        self._engine = engine
        self.base_model = engine.base_model
        self.is_base_model = engine.is_base_model
        self.is_served = engine.is_served
        self._merging: dict[str, asyncio.Task[None]] = {}
        self._defaults = _default_config(settings, engine.max_rank)

    @asynccontextmanager
    async def serving(self, wanted: AdapterSet, *, param: str) -> AsyncIterator[Serving]:
        """Make a set servable and keep it so while the context is open.

        Args:
            wanted: the set.
            param: the field of the request that names it, for errors.

        Raises:
            ServingError: it cannot be served; nothing else changed.
        """
        if wanted.is_single:  # vLLM serves it as it is, mergeable or not
            (name,) = self.catalog.check_names(wanted.weights, param=param)
            yield Serving(name)
            return
        config = self._config(wanted)
        entries = await self.catalog.look_up(wanted.weights, param=param)
        members = tuple(
            Member(entry.name, entry.path, entry.digest, wanted.weights[entry.name])
            for entry in entries
        )
        recipe = self._recipe(members, config)
        with self.cache.pinned(recipe.merge_id):
            result = await self._obtain(recipe)
            self.metrics.requests.labels(result).inc()
            yield Serving(recipe.merge_id, result)

    @asynccontextmanager
    async def serving_known(self, identity: str) -> AsyncIterator[Serving | None]:
        """As `serving`, for a merge id that a client sends back. None when it is not known."""
        with self.cache.pinned(identity):
            result: Result = "hit"
            if identity in self._merging:  # it has room in the cache before it can be served
                await asyncio.shield(self._merging[identity])
                result = "coalesced"
            merge = self.cache.get(identity)
            if merge is None:
                yield None
                return
            merge.hits += 1
            self.metrics.requests.labels(result).inc()
            yield Serving(identity, result)

    def _config(self, wanted: AdapterSet) -> MergeConfig:
        try:
            config = MergeConfig.from_mapping(wanted.merge, self._defaults)
        except LegoError as error:
            raise BadRequestError(f"`merge`: {error}", param=f"merge.{error.param}") from error
        if config.rank > self._engine.max_rank:
            raise BadRequestError(
                f"`merge`: rank is {config.rank}; this server takes at most {self._engine.max_rank} "
                "(its --max-lora-rank)",
                param="merge.rank",
            )
        return config

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
        task = self._merging.get(recipe.merge_id)
        result: Result = "coalesced"
        if task is None:
            cached = self.cache.get(recipe.merge_id)
            if cached is not None:
                cached.hits += 1
                return "hit"
            if len(self._merging) >= self.settings.max_queued_merges:
                raise BusyError(
                    f"{len(self._merging)} merges are waiting, the most this server queues; "
                    "try again later"
                )
            result = "miss"
            task = asyncio.create_task(self._merge(recipe), name=recipe.merge_id)
            self._merging[recipe.merge_id] = task
            task.add_done_callback(lambda done: self._forget(recipe.merge_id, done))
        # A client that leaves cancels its own waiting, not the merge that others wait for.
        await asyncio.shield(task)
        return result

    def _forget(self, identity: str, task: asyncio.Task[None]) -> None:
        del self._merging[identity]
        if not task.cancelled():
            task.exception()  # seen by those who wait; nobody may be left

    async def _merge(self, recipe: Recipe) -> None:
        """Stage a merge on the workers, then register it with vLLM and publish it."""
        started = time.perf_counter()
        number = engine_id(recipe.merge_id)
        try:
            with self.cache.pinned(recipe.merge_id), self.metrics.in_progress.track_inprogress():
                status = await self._staged(recipe)
                await self._make_room(recipe, number, status)
                staged = time.perf_counter()
                await self._engine.register(recipe, number)
        except BaseException as error:
            self.cache.pop(recipe.merge_id, None)
            self._show_cache()
            await self._engine.discard(recipe.merge_id, number)
            if isinstance(error, ServingError) or not isinstance(error, Exception):
                raise
            logger.exception("serving %s failed", recipe.merge_id)
            raise MergeFailedError(
                "the server could not load the merge; its log says more"
            ) from error
        finished = time.perf_counter()
        seconds = status["seconds"] | {
            "register": finished - staged,
            "total": finished - started,
        }
        self.metrics.observe_merge(recipe.config.method, status["fidelity"], seconds)
        logger.info(
            "merged %s from %d adapters to rank %d: fidelity %.3f, %s",
            recipe.merge_id,
            len(recipe.members),
            recipe.config.rank,
            status["fidelity"],
            ", ".join(f"{phase} {value * 1e3:.0f} ms" for phase, value in seconds.items()),
        )

    async def _staged(self, recipe: Recipe) -> dict[str, Any]:
        """Poll the workers until each has the merge. Returns the slowest worker's account."""
        pause = _FIRST_POLL_S
        try:
            async with asyncio.timeout(self.settings.merge_timeout_s):
                while True:
                    statuses = await self._engine.stage(recipe)
                    for status in statuses:
                        if status["state"] == "failed":
                            _raise_failure(recipe, status)
                    if all(status["state"] == "ready" for status in statuses):
                        return max(statuses, key=lambda status: sum(status["seconds"].values()))
                    await asyncio.sleep(pause)
                    pause = min(pause * 1.5, _SLOWEST_POLL_S)
        except TimeoutError as error:
            raise MergeTimeoutError(
                f"merging {len(recipe.members)} adapters took longer than "
                f"{self.settings.merge_timeout_s:g} s; try again later"
            ) from error

    async def _make_room(self, recipe: Recipe, number: int, status: dict[str, Any]) -> None:
        if status["nbytes"] > self.cache.maxsize:
            raise UnmergeableError(
                f"the merge takes {status['nbytes']} bytes, more than the {int(self.cache.maxsize)} "
                "that this server keeps for merges (VLLM_LEGO_DEVICE_CACHE_BYTES); ask for a lower "
                "rank",
                param="merge.rank",
            )
        try:
            self.cache[recipe.merge_id] = CachedMerge(
                engine_id=number,
                members={member.name: member.weight for member in recipe.members},
                config=dict(recipe.config.as_dict()),
                nbytes=status["nbytes"],
                fidelity=status["fidelity"],
            )
        except CacheFullError as error:
            raise BusyError(
                f"the merge takes {status['nbytes']} bytes and the sets in use leave too little of "
                f"the {int(self.cache.maxsize)} that the server keeps for merges; "
                "try again later"
            ) from error
        evicted, self.cache.evicted = self.cache.evicted, []
        self._show_cache()
        for identity, _ in evicted:
            self.metrics.evictions.labels("device").inc()
            self._engine.unpublish(identity)
        # All at once: whoever asks for one of them again is then sure to be heard after this.
        await asyncio.gather(*(self._engine.discard(i, merge.engine_id) for i, merge in evicted))

    def _show_cache(self) -> None:
        self.metrics.set_cache(len(self.cache), int(self.cache.currsize))


def _default_config(settings: Settings, max_rank: int) -> MergeConfig:
    try:
        config = MergeConfig.from_mapping(
            {"method": settings.method, "rank": settings.rank or max_rank}
        )
    except LegoError as error:
        raise SettingsError(f"VLLM_LEGO_{(error.param or '').upper()}: {error}") from error
    if config.rank > max_rank:
        raise SettingsError(
            f"VLLM_LEGO_RANK is {config.rank}, but the engine takes at most --max-lora-rank {max_rank}"
        )
    return config


def _raise_failure(recipe: Recipe, status: dict[str, Any]) -> NoReturn:
    """Turn a worker's account of a failed merge into the client's error."""
    kind, message = status["error"], status["message"]
    if kind in _UNMERGEABLE:
        raise UnmergeableError(message, param="adapters")
    if kind in ("AdapterChangedError", "CollisionError"):
        raise BusyError(message, param="adapters")
    if kind == "ConfigError":
        raise BadRequestError(message, param=f"merge.{status['param']}")
    raise MergeFailedError(
        f"the server could not merge {len(recipe.members)} adapters ({kind}); its log says more"
    )
