"""Flags that both commands have, and those that follow from `MergeConfig`."""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from lego_core import MergeConfig
from lego_core.config import MAX_RANK, METHOD_NAMES, NORM_NAMES, OPTIONS, SCALE_NAMES

_CHOICES = {"parameter_reweighting": NORM_NAMES, "scale": SCALE_NAMES}


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what says which adapters, and where to compute."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="ADAPTER",
        help="a folder with a PEFT LoRA adapter, or a hub repository: org/name, "
        "org/name@revision. A folder of that name comes first",
    )
    parser.add_argument(
        "--revision",
        help="branch, tag or commit of the repositories that are given without one",
    )
    parser.add_argument(
        "--weights",
        type=_weights,
        metavar="W,W,…",
        help="one number per adapter, in their order (default: 1 each); "
        "--weights=-1,1 if the first is negative",
    )
    parser.add_argument(
        "--device", type=_device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )


def add_rank(parser: argparse._ActionsContainer, default: int = MergeConfig().rank) -> None:
    """Add the rank k."""
    parser.add_argument(
        "--rank",
        type=int,
        default=default,
        metavar="K",
        help=f"rank of the merged adapter, 1 to {MAX_RANK} (default: {default})",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of `MergeConfig`; the options' are made from `OPTIONS`."""
    group = parser.add_argument_group("how to merge")
    default = MergeConfig().method
    group.add_argument(
        "--method", choices=METHOD_NAMES, default=default, help=f"(default: {default})"
    )
    add_rank(group)
    described = _field_docs()
    for name, defaults in options().items():
        sample = next(iter(defaults.values()))
        kind: dict[str, Any]
        if isinstance(sample, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif name in _CHOICES:
            kind = {"choices": _CHOICES[name]}
        else:
            kind = {"type": type(sample), "metavar": "N" if isinstance(sample, int) else "X"}
        of = ", ".join(f"{method}: {_shown(value)}" for method, value in defaults.items())
        if list(defaults.values()) == [sample] * len(METHOD_NAMES):
            of = f"all: {_shown(sample)}"
        what = f"{described.get(name, '')} [{of}]".strip()
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            help=what.replace("%", "%%"),
            **kind,
        )


def config_of(arguments: argparse.Namespace) -> MergeConfig:
    """Build the configuration that the flags describe.

    Raises:
        ConfigError: an option is out of its domain, or not the method's.
    """
    given = {name: value for name, value in vars(arguments).items() if name in options()}
    return MergeConfig(method=arguments.method, rank=arguments.rank, **given)


def options() -> Mapping[str, Mapping[str, Any]]:
    """Return each option's default by method."""
    found: dict[str, dict[str, Any]] = {}
    for method, of_method in OPTIONS.items():
        for name, default in of_method.items():
            found.setdefault(name, {})[method] = default
    return found


def _field_docs() -> Mapping[str, str]:
    """Return what the docstring of `MergeConfig` says of each field."""
    section = (inspect.getdoc(MergeConfig) or "").partition("Attributes:\n")[2]
    entries = re.split(r"^ {4}(\w+): ", section.partition("\n\n")[0], flags=re.MULTILINE)
    return {
        name: " ".join(text.replace("`", "").split()).rstrip(".")
        for name, text in zip(entries[1::2], entries[2::2], strict=True)
    }


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _weights(text: str) -> list[float]:
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.7,1") from None
    if not all(map(math.isfinite, weights)):
        raise argparse.ArgumentTypeError(f"{text!r} holds a weight that is not finite")
    return weights


def _device(text: str) -> str:
    try:
        device = torch.device(text)
        if device.type not in {"cpu", "cuda"}:
            raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({reason})") from None
    return text
