"""How a merge came about, as JSON that `save_adapter` keeps and whoever finds the folder can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lego_core.adapter import LoraAdapter, content_digest
from lego_core.adapter_config import CONFIG_FILE, parse_json_object
from lego_core.adapter_files import read_small
from lego_core.adapter_save import PROVENANCE_KEY
from lego_core.config import MergeConfig
from lego_core.hub import ResolvedSource
from lego_core.merge import ALGORITHM_VERSION

_DISTRIBUTION = "vllm-lego"


def merge_provenance(
    adapters: Sequence[LoraAdapter],
    config: MergeConfig,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Describe a merge, for `save_adapter(merged, folder, provenance=...)`.

    Hub repositories are named with their commit. Folders are not: their paths mean nothing
    elsewhere, and are nobody's business. The digest says which content it was in any case.

    Args:
        adapters: what was merged.
        config: how.
        weights: as given to `merge_adapters`.
    """
    gains = [1.0] * len(adapters) if weights is None else weights
    return {
        "members": [
            {
                # A folder's name can be no text at all; in JSON it must be.
                "name": adapter.name.encode(errors="backslashreplace").decode(),
                "digest": adapter.digest or content_digest(adapter),
                "weight": float(weight),
            }
            | ({"source": adapter.source, "revision": adapter.revision} if adapter.revision else {})
            for adapter, weight in zip(adapters, gains, strict=True)
        ],
        "config": config.as_dict(),
        "algorithm_version": ALGORITHM_VERSION,
        "made_by": f"{_DISTRIBUTION} {_version()}",
    }


def read_provenance(found: ResolvedSource) -> Mapping[str, Any] | None:
    """Return what an adapter's configuration says of its making, if it says anything.

    Nothing in it is checked: it is what some file claims.

    Raises:
        AdapterNotFoundError, AdapterFormatError: the configuration cannot be read.
    """
    content = read_small(found.folder, CONFIG_FILE, found.name)
    provenance = parse_json_object(content, CONFIG_FILE, found.name).get(PROVENANCE_KEY)
    return provenance if isinstance(provenance, dict) else None


def _version() -> str:
    try:
        return version(_DISTRIBUTION)
    except PackageNotFoundError:  # run from a bare source tree
        return "unknown"
