"""Merge LoRA adapters with LoRA-LEGO (arXiv 2409.16167), in plain PyTorch.

>>> merged = merge_adapters([load_adapter("sql"), load_adapter("style")], MergeConfig(rank=16))
>>> save_adapter(merged, "sql+style")

`lego_core.comparison` tells how alike adapters are and what each method would make of them.
"""

from lego_core.adapter import LoraAdapter, LoraModule
from lego_core.adapter_io import AdapterConfig, describe_adapter, load_adapter, save_adapter
from lego_core.base_model import check_shapes
from lego_core.config import MergeConfig
from lego_core.errors import (
    AdapterChangedError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterWriteError,
    ConfigError,
    HubError,
    IncompatibleAdaptersError,
    LegoError,
)
from lego_core.hub import ResolvedSource, fetch_adapter, resolve_source
from lego_core.merge import ALGORITHM_VERSION, MergeReport, ModuleReport, merge_adapters
from lego_core.provenance import merge_provenance, read_provenance

__all__ = [
    "ALGORITHM_VERSION",
    "AdapterChangedError",
    "AdapterConfig",
    "AdapterFormatError",
    "AdapterNotFoundError",
    "AdapterWriteError",
    "ConfigError",
    "HubError",
    "IncompatibleAdaptersError",
    "LegoError",
    "LoraAdapter",
    "LoraModule",
    "MergeConfig",
    "MergeReport",
    "ModuleReport",
    "ResolvedSource",
    "check_shapes",
    "describe_adapter",
    "fetch_adapter",
    "load_adapter",
    "merge_adapters",
    "merge_provenance",
    "read_provenance",
    "resolve_source",
    "save_adapter",
]
