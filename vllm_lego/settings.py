"""Every setting of the plugin: declared, documented and read here and nowhere else.

`python -m vllm_lego.settings` prints them as the Markdown table of `docs/settings.md`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

PREFIX = "VLLM_LEGO_"

_SIZE = re.compile(r"(\d+)\s*(?:([KMGT])(i?)B)?", re.IGNORECASE)


class SettingsError(ValueError):
    """A setting has a value that makes no sense; the message names the variable."""


def size(text: str) -> int:
    """Read a number of bytes: `1073741824`, `1GiB` (1024 cubed) or `1GB` (1000 cubed).

    Raises:
        ValueError: it is none of these.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    count, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    unit: int = (1024 if binary else 1000) ** power
    return int(count) * unit


def _setting(default: Any, help_text: str, *, low: float, kind: Any = int) -> Any:
    return field(default=default, metadata={"help": help_text, "low": low, "kind": kind})


@dataclass(frozen=True, slots=True)
class Settings:
    """The plugin's settings. Each field NAME is read from the variable `VLLM_LEGO_NAME`."""

    adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder of which each subfolder with an adapter_config.json is an adapter that "
            "can be named, by its folder's name. By default none",
            "kind": str,
        },
    )
    hub_allow: str | None = field(
        default=None,
        metadata={
            "help": "hub repositories whose adapters can be named, separated by commas or spaces: "
            "org/name (its branches and tags, too), org/name@revision (that one only) or org/*. By "
            "default none, and nothing is downloaded",
            "kind": str,
        },
    )
    hub_max_bytes: int = _setting(
        1 << 30,
        "bytes that the files of one adapter from the hub may have together",
        low=1,
        kind=size,
    )
    policy_file: str | None = field(
        default=None,
        metadata={
            "help": "TOML file of rules: which adapters may be combined, and which API key may name "
            "which. By default everybody may combine all that can be named",
            "kind": str,
        },
    )
    methods: str = field(
        default="lego lego-paper lego-functions concat svd linear core_space",
        metadata={
            "help": "merging methods that requests may ask for, separated by commas or spaces. "
            "ties and dare_ties, which build every update as a whole matrix, and knots, which takes "
            "many times as long as lego, are left out: a large model's server has better uses for its "
            "device",
            "kind": str,
        },
    )
    max_restarts: int = _setting(
        16,
        "restarts of the clustering that a request may ask for, of methods that have them",
        low=1,
    )
    method: str = field(
        default="lego",
        metadata={"help": "merging method of requests that name none", "kind": str},
    )
    rank: int | None = _setting(
        None,
        "rank of merged adapters where the request names none; by default the engine's "
        "--max-lora-rank",
        low=1,
    )
    device_cache_bytes: int = _setting(
        1 << 30,
        "bytes of merged adapters kept ready on each worker's device, outside vLLM's "
        "--gpu-memory-utilization, shared by the API servers; the least recently used are dropped. "
        "The memory of a merge being made comes on top",
        low=1,
        kind=size,
    )
    host_cache_bytes: int = _setting(
        2 << 30,
        "bytes of host memory in which each worker keeps members and merges; the least recently "
        "used are dropped. With CUDA all of it is reserved and pinned at the start",
        low=0,
        kind=size,
    )
    store_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder in which merges are kept for later servers; replicas may share it. By "
            "default none",
            "kind": str,
        },
    )
    store_bytes: int = _setting(
        16 << 30,
        "bytes of files kept in the store's folder; the least recently used are deleted",
        low=0,
        kind=size,
    )
    merge_threads: int = _setting(2, "merges that each worker makes at the same time", low=1)
    slot_quantum_s: float = _setting(
        2.0,
        "seconds that a set or adapter may keep one of the engine's --max-loras slots from those "
        "that wait for it, before its new requests wait in line too",
        low=0,
        kind=float,
    )
    max_adapters: int = _setting(16, "adapters that one request may list", low=1)
    max_body_bytes: int = _setting(
        64 << 20, "largest body of a JSON request, in bytes", low=1, kind=size
    )
    merge_timeout_s: float = _setting(
        60.0, "seconds that a request waits for its merge before it gets 504", low=0, kind=float
    )
    max_queued_merges: int = _setting(
        64, "merges waiting or running before new sets get 503", low=1
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the settings.

        Raises:
            SettingsError: a variable has no sensible value.
        """
        values: dict[str, Any] = {}
        for setting in dataclasses.fields(cls):
            text = environment.get(variable_name(setting.name))
            if text is not None and text.strip():
                values[setting.name] = _parse(setting, text.strip())
        return cls(**values)


def variable_name(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def flag_name(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def kind_name(setting: dataclasses.Field[Any]) -> str:
    """Return what values a setting takes, for people."""
    kind: str = setting.metadata["kind"].__name__
    return {"str": "text", "int": "integer", "float": "number", "size": "size, as 2GiB"}.get(
        kind, kind
    )


def default_text(setting: dataclasses.Field[Any]) -> str:
    """Return the default of a setting as it would be written on a command line."""
    default: Any = setting.default
    if default is None:
        return "none"
    if setting.metadata["kind"] is size:
        return next(
            f"{default >> shift}{unit}"
            for shift, unit in ((30, "GiB"), (20, "MiB"), (0, ""))
            if default % (1 << shift) == 0
        )
    return f"{default:g}" if isinstance(default, float) else str(default)


def markdown_table() -> str:
    """Return all settings as a Markdown table."""
    lines = ["| variable | flag | type | default | means |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| `{variable_name(setting.name)}` | `{flag_name(setting.name)}` | {kind_name(setting)} "
        f"| {default_text(setting)} | {setting.metadata['help']} |"
        for setting in dataclasses.fields(Settings)
    ]
    return "\n".join(lines) + "\n"


def _parse(setting: dataclasses.Field[Any], text: str) -> Any:
    kind = setting.metadata["kind"]
    if kind is str:
        return text
    low = setting.metadata["low"]
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value < float("inf"):
        raise SettingsError(
            f"{variable_name(setting.name)} is {text!r}; expected {kind_name(setting)} of at least "
            f"{low} ({setting.metadata['help']})"
        )
    return value


if __name__ == "__main__":
    print(markdown_table(), end="")
