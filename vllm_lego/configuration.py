"""How a set is merged: what its request says, the rest as the operator set it."""

from __future__ import annotations

from lego_core import LegoError, MergeConfig
from vllm_lego.adapter_set import AdapterSet
from vllm_lego.errors import BadRequestError
from vllm_lego.settings import Settings, SettingsError


def default_config(settings: Settings, max_rank: int) -> MergeConfig:
    """Return how sets are merged whose requests do not say.

    Raises:
        SettingsError: the operator's method or rank make no sense.
    """
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


def config_of(wanted: AdapterSet, defaults: MergeConfig, max_rank: int) -> MergeConfig:
    """Return how a set is merged.

    Raises:
        BadRequestError: a field of `merge` makes no sense, or its rank is above the engine's.
    """
    try:
        config = MergeConfig.from_mapping(wanted.merge, defaults)
    except LegoError as error:
        raise BadRequestError(f"`merge`: {error}", param=f"merge.{error.param}") from error
    if config.rank > max_rank:
        raise BadRequestError(
            f"`merge`: rank is {config.rank}; this server takes at most {max_rank} "
            "(its --max-lora-rank)",
            param="merge.rank",
        )
    return config
