"""How to merge: what the request asks for, the server's defaults, and its limits."""

from __future__ import annotations

from lego_core import LegoError, MergeConfig
from lego_core.config import METHOD_NAMES
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.catalog import CatalogEntry
from vllm_lego.errors import BadRequestError, UnmergeableError
from vllm_lego.settings import Settings, SettingsError, variable_name


class Configurations:
    """The configurations of requests.

    Args:
        settings: the defaults and limits.
        max_rank: the engine's --max-lora-rank.

    Raises:
        SettingsError: they contradict each other or the engine.
    """

    def __init__(self, settings: Settings, max_rank: int) -> None:
        self._max_rank = max_rank
        self._max_restarts = settings.max_restarts
        self._defaults = _defaults(settings, max_rank)
        self._methods = _methods(settings)

    def of_set(self, wanted: AdapterSet) -> MergeConfig:
        """Return how a set is merged.

        Raises:
            BadRequestError: the request asks for what makes no sense, or is not allowed.
        """
        if not wanted.merge:
            return self._defaults
        try:
            config = MergeConfig.from_mapping(wanted.merge, self._defaults)
        except LegoError as error:
            raise BadRequestError(f"`merge`: {error}", param=f"merge.{error.param}") from error
        if config.method not in self._methods:
            raise BadRequestError(
                f"`merge`: method is {config.method!r}; this server allows "
                f"{', '.join(self._methods)} ({variable_name('methods')})",
                param="merge.method",
            )
        if "restarts" in wanted.merge and config.restarts > self._max_restarts:
            raise BadRequestError(
                f"`merge`: restarts is {config.restarts}; this server allows at most "
                f"{self._max_restarts} ({variable_name('max_restarts')})",
                param="merge.restarts",
            )
        if config.rank > self._max_rank:
            raise BadRequestError(
                f"`merge`: rank is {config.rank}; this server takes at most {self._max_rank} "
                "(its --max-lora-rank)",
                param="merge.rank",
            )
        return config

    def of_one(self, adapter: CatalogEntry, *, param: str) -> MergeConfig:
        """Return how to make a merge of one adapter that is exactly this adapter.

        Raises:
            UnmergeableError: its rank is above the engine's.
        """
        if adapter.max_rank > self._max_rank:
            raise UnmergeableError(
                f"adapter {adapter.name!r} has rank {adapter.max_rank}; this server takes at most "
                f"{self._max_rank} (its --max-lora-rank)",
                param=param,
            )
        return MergeConfig(method="concat", rank=adapter.max_rank)


def _defaults(settings: Settings, max_rank: int) -> MergeConfig:
    try:
        config = MergeConfig.from_mapping(
            {"method": settings.method, "rank": settings.rank or max_rank}
        )
    except LegoError as error:
        raise SettingsError(f"{variable_name(error.param or '')}: {error}") from error
    if config.rank > max_rank:
        raise SettingsError(
            f"{variable_name('rank')} is {config.rank}, but the engine takes at most --max-lora-rank "
            f"{max_rank}"
        )
    return config


def _methods(settings: Settings) -> tuple[str, ...]:
    """Return the methods that requests may ask for; the default is one whatever the list says."""
    listed = settings.methods.replace(",", " ").split()
    for method in listed:
        if method not in METHOD_NAMES:
            raise SettingsError(
                f"{variable_name('methods')} lists {method!r}; the methods are "
                f"{', '.join(METHOD_NAMES)}"
            )
    return tuple(dict.fromkeys([settings.method, *listed]))
