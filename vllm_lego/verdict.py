"""What the workers of one server say of a merge becomes one account, or one error."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from vllm_lego.errors import (
    BadRequestError,
    BusyError,
    MemberChangedError,
    MergeFailedError,
    NoMemoryError,
    UnmergeableError,
    WorkersDisagreeError,
)
from vllm_lego.recipe import Recipe

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

_TIERS = ("host", "disk", "merge")  # fastest first
_UNMERGEABLE = {"AdapterFormatError", "AdapterNotFoundError", "IncompatibleAdaptersError"}


def agreed(recipe: Recipe, statuses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the slowest worker's account of a merge that all workers hold alike.

    Raises:
        ServingError: one of them failed, or they hold different merges.
    """
    for status in statuses:
        if status["state"] == "failed":
            _raise_failure(recipe, status)
    if len({status["fingerprint"] for status in statuses}) > 1:
        logger.error("the workers made different merges of %s: %s", recipe.merge_id, statuses)
        raise WorkersDisagreeError(
            "the server's workers made different merges of one set; its log says more"
        )
    slowest = max(statuses, key=lambda status: sum(status["seconds"].values()))
    tier = max((status["tier"] for status in statuses), key=_TIERS.index)
    return {**slowest, "tier": tier}


def _raise_failure(recipe: Recipe, status: Mapping[str, Any]) -> NoReturn:
    """Turn a worker's account of a failed merge into the client's error."""
    kind, message = status["error"], status["message"]
    if kind in _UNMERGEABLE:
        raise UnmergeableError(message, param="adapters")
    if kind == "AdapterChangedError":
        raise MemberChangedError(message, param="adapters")
    if kind == "CollisionError":
        raise BusyError(message, param="adapters")
    if kind == "ConfigError":
        raise BadRequestError(message, param=f"merge.{status['param']}")
    if kind == "OutOfMemoryError":
        raise NoMemoryError(
            f"the server has too little memory to merge {len(recipe.members)} adapters now; "
            "try again later"
        )
    raise MergeFailedError(
        f"the server could not merge {len(recipe.members)} adapters ({kind}); its log says more"
    )
