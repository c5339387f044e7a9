"""`vllm-lego serve`: a look at the command line, then plain `vllm serve`.

The look is taken with a small parser of the few flags that matter here, not with vLLM's own:
importing that takes ten seconds on a small machine, before vLLM takes them again. It passes every
argument on as it is, so what it does not understand is vLLM's to judge.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn

from vllm_lego.compatibility import UnsupportedVllmError, check_version, installed_vllm
from vllm_lego.plugin import NAME
from vllm_lego.policy import read_policy
from vllm_lego.settings import (
    Settings,
    SettingsError,
    default_text,
    flag_name,
    kind_name,
    variable_name,
)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks; a test compares
_DEFAULT_RANK = 16  # vLLM's, for adapters whose rank cannot be read
# Each takes the memory of an adapter of --max-lora-rank. vLLM's own default of one would let sets
# only take turns.
_SLOTS = 8

_MERGE_ID = re.compile(r"lego-[0-9a-f]{16}")  # as in `identity.py`, which would import torch
_LOADED_UNASKED = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


class ServeError(ValueError):
    """The command line contradicts itself; the message says what to change."""


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """What becomes of a command line: arguments and environment of `vllm serve`, and a notice."""

    arguments: list[str]
    environment: dict[str, str]
    notice: str | None = None


def serve(arguments: Sequence[str]) -> int:
    """Become `vllm serve` with the plugin. Returns only an exit code, where something is wrong."""
    try:
        launch = plan(arguments, os.environ)
    except (ServeError, SettingsError, UnsupportedVllmError) as error:
        print(f"vllm-lego: {error}", file=sys.stderr)
        return 2
    if launch.notice:
        print(f"vllm-lego: {launch.notice}", file=sys.stderr, flush=True)
    # Plain vLLM from here on: its signals, its exit code, nothing of ours in between.
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *launch.arguments]
    return os.execve(sys.executable, command, launch.environment)  # noqa: S606  our interpreter


def plan(arguments: Sequence[str], environment: Mapping[str, str]) -> Launch:
    """Return how to start vLLM.

    Raises:
        ServeError, SettingsError, UnsupportedVllmError: what is asked for cannot be.
        SystemExit: after `--help`, and where a setting's flag has no value.
    """
    if any(argument.startswith("--help=") for argument in arguments):  # vLLM's own, by topic
        return Launch(list(arguments), dict(environment))
    options, passed_on = parser().parse_known_args([_dashed(a) for a in arguments])
    variables = dict(environment) | {k: v for k, v in vars(options).items() if v is not None}
    version = installed_vllm()
    if version is not None:
        check_version(version)
    chosen, why = _choose(vllm_flags(passed_on), variables)
    variables["VLLM_PLUGINS"] = _plugins(environment.get("VLLM_PLUGINS"))
    # After the model, which vLLM looks for in front, and before all else, so that the user's wins.
    place = 1 if passed_on and not passed_on[0].startswith("-") else 0
    return Launch(
        [*passed_on[:place], *chosen, *passed_on[place:]],
        variables,
        f"adds {' '.join(chosen)} ({why})" if chosen else None,
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the plugin's own flags, one for each setting."""
    own = argparse.ArgumentParser(
        prog="vllm-lego serve",
        usage="vllm-lego serve MODEL [setting ...] [any flag of vllm serve ...]",
        description="`vllm serve` with the plugin loaded. Where you do not, it sets --enable-lora, "
        "the --max-lora-rank that the adapters found need, and --max-loras. Every argument that "
        "is not listed here goes to vLLM as it is; `vllm-lego serve --help=all` lists those.",
        allow_abbrev=False,
    )
    group = own.add_argument_group("settings of vllm-lego, each also an environment variable")
    for setting in dataclasses.fields(Settings):
        text = f"{setting.metadata['help']} [{variable_name(setting.name)}, default: "
        group.add_argument(
            flag_name(setting.name),
            dest=variable_name(setting.name),
            metavar=kind_name(setting).partition(",")[0].upper(),
            help=f"{text}{default_text(setting)}]".replace("%", "%%"),
        )
    return own


def vllm_flags(arguments: Sequence[str]) -> argparse.Namespace | None:
    """Return what the user tells vLLM of LoRA; None if it cannot be told, and vLLM will say why.

    A YAML file of `--config` counts less than the command line, as with vLLM.
    """
    peek = _Peek(add_help=False, argument_default=None)
    peek.add_argument("--enable-lora", action=argparse.BooleanOptionalAction)
    peek.add_argument("--lora-modules", nargs="+", default=[])
    for flag in ("--max-lora-rank", "--max-loras", "--max-cpu-loras", "--config"):
        peek.add_argument(flag)
    try:
        flags, _ = peek.parse_known_args(list(arguments))
        if flags.config is not None and "--config" in arguments:  # vLLM reads no --config=FILE
            flags, _ = peek.parse_known_args([*_from_yaml(flags.config), *arguments])
    except (OSError, ValueError):
        return None
    return flags


class _Peek(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _from_yaml(file: str) -> list[str]:
    """Return the arguments that vLLM makes of a configuration file."""
    import yaml  # noqa: PLC0415  vLLM brings it

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(file) from error
    arguments: list[str] = []
    for key, value in content.items() if isinstance(content, dict) else ():
        flag = _dashed(f"--{key}")
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)] if value else []
        else:
            arguments += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def _dashed(argument: str) -> str:
    """Write underscores in a flag's name as dashes, as vLLM does."""
    return re.sub(r"^--[^.=]*", lambda name: name[0].replace("_", "-"), argument)


def _choose(
    flags: argparse.Namespace | None, environment: Mapping[str, str]
) -> tuple[list[str], str]:
    """Return the flags to add, and for which adapters.

    Raises:
        ServeError, SettingsError: what the user asks for cannot be, as a whole or in itself.
    """
    settings = Settings.from_environment(environment)
    read_policy(settings)
    if settings.store_dir is None and environment.get(variable_name("store_bytes"), "").strip():
        raise ServeError(
            "--store-bytes limits a store that is not there; name its folder with --store-dir, "
            "or drop it (VLLM_LEGO_STORE_BYTES)"
        )
    found = _adapters_in(settings.adapter_dir)
    if flags is None:
        return [], ""
    if flags.enable_lora is False:
        raise ServeError(
            "--no-enable-lora leaves nothing to merge; drop it, or run plain `vllm serve`"
        )
    found |= _modules(flags.lora_modules)
    ranks = {name: _rank(folder) for name, folder in found.items()}
    known = {name: rank for name, rank in ranks.items() if rank is not None}
    known |= {variable_name("rank"): settings.rank} if settings.rank else {}
    chosen = [] if flags.enable_lora else ["--enable-lora"]
    if flags.max_lora_rank is not None:
        _check_ranks(known, flags.max_lora_rank)
    elif known:
        unknown = None in ranks.values() or settings.hub_allow is not None
        least = _DEFAULT_RANK if unknown else 1
        chosen.append(f"--max-lora-rank={_accepted(known, least)}")
    if flags.max_loras is None:
        chosen.append(f"--max-loras={min(_SLOTS, _number(flags.max_cpu_loras) or _SLOTS)}")
    highest = f", highest rank {max(known.values())}" if known else ""
    return chosen, f"{len(ranks)} adapter{'' if len(ranks) == 1 else 's'} named{highest}"


def _adapters_in(adapter_dir: str | None) -> dict[str, Path]:
    if adapter_dir is None:
        return {}
    try:
        folders = sorted(Path(adapter_dir).iterdir())
    except OSError as error:
        raise ServeError(
            f"--adapter-dir {adapter_dir!r} cannot be read ({error.strerror}); name a folder of "
            "adapters"
        ) from error
    found = {f.name: f for f in folders if (f / "adapter_config.json").is_file()}
    if not found:
        raise ServeError(
            f"--adapter-dir {adapter_dir!r} holds no adapter; each must be a subfolder with an "
            "adapter_config.json"
        )
    return found


def _modules(items: Iterable[str]) -> dict[str, Path]:
    """Return name and folder of what `--lora-modules` lists, as `name=path` or JSON."""
    found: dict[str, Path] = {}
    for item in items:
        if "=" in item and "," not in item:
            name, _, path = item.partition("=")
        else:
            try:
                module = json.loads(item)
                name, path = str(module["name"]), str(module["path"])
            except (ValueError, TypeError, LookupError):
                continue  # vLLM says what is wrong with it
        if "+" in name or _MERGE_ID.fullmatch(name):
            raise ServeError(
                f"--lora-modules names an adapter {name!r}, which requests could not tell from a "
                "set of adapters or a merge; give it a name without '+' that is not lego-<16 hex>"
            )
        found[name] = Path(path).expanduser()
    return found


def _rank(folder: Path) -> int | None:
    """Return the highest rank that an adapter's configuration names, if it can be read here.

    Not with `lego_core`, which imports torch and refuses what cannot be merged: vLLM may serve it.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        return max(int(r) for r in (config["r"], *(config.get("rank_pattern") or {}).values()))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _check_ranks(known: Mapping[str, int], limit: str) -> None:
    number = _number(limit)
    if number is None:
        return  # vLLM says what is wrong with it
    for name, rank in known.items():
        if rank > number:
            raise ServeError(
                f"--max-lora-rank {number} is below {_whose(name)} {rank}; raise it to "
                f"{_accepted(known)}, or drop it"
            )


def _accepted(known: Mapping[str, int], least: int = 1) -> int:
    """Return the smallest --max-lora-rank that holds all ranks."""
    name = max(known, key=lambda n: known[n])
    for accepted in RANKS:
        if accepted >= max(least, known[name]):
            return accepted
    raise ServeError(
        f"{_whose(name)} {known[name]} is more than vLLM serves, {RANKS[-1]}; lower it, or leave "
        "the adapter out"
    )


def _whose(name: str) -> str:
    return name if name == variable_name("rank") else f"the rank of adapter {name!r},"


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _plugins(named: str | None) -> str:
    """Return a `VLLM_PLUGINS` that names this plugin and drops none.

    vLLM loads an endpoint plugin only when it is named, and then only those named.
    """
    if named is not None:
        listed = named.split(",") if named else []
    else:
        endpoints = {point.name for point in entry_points(group="vllm.endpoint_plugins")}
        unasked = (p.name for group in _LOADED_UNASKED for p in entry_points(group=group))
        listed = [name for name in dict.fromkeys(unasked) if name not in endpoints]
    return ",".join(listed if NAME in listed else [*listed, NAME])
