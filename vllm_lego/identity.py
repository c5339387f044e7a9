"""Who a merge is: the same content, weights and configuration have one name everywhere.

Changed weights have another, so no prefix-cache block computed with old ones is ever reused.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache

from lego_core.config import MergeConfig
from lego_core.merge import ALGORITHM_VERSION

_HEX_DIGITS = 16
_FIRST_ENGINE_ID = 1 << 30
MERGE_ID = re.compile(rf"lego-[0-9a-f]{{{_HEX_DIGITS}}}")


@lru_cache(4096)  # a warm set's request would form it anew
def merge_id(
    members: tuple[tuple[str, float], ...], config: MergeConfig, *, base_model: str, dtype: str
) -> str:
    """Return `lego-` and 16 hex digits of a SHA-256 over everything that decides the numbers.

    Args:
        members: content digest and weight of each, in any order.
        config: the merge configuration.
        base_model: the name the base model is served under.
        dtype: of the merged weights, as vLLM names it.
    """
    content = {
        "algorithm": ALGORITHM_VERSION,
        "base_model": base_model,
        "config": config.as_dict(),
        "dtype": dtype,
        "members": sorted(members),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"lego-{digest[:_HEX_DIGITS]}"


def engine_id(identity: str) -> int:
    """Return vLLM's integer id of a merge, the same in every API server.

    From 2^30 to 2^31 - 1: above the ids that vLLM counts up from 1, and an int32, which vLLM's
    V2 model runner keeps ids in. Two merges can collide; the workers refuse the second.
    """
    return _FIRST_ENGINE_ID | (int(identity.removeprefix("lego-"), 16) & (_FIRST_ENGINE_ID - 1))


def is_engine_id(number: int) -> bool:
    """Whether vLLM's integer id is one of a merge."""
    return number >= _FIRST_ENGINE_ID
