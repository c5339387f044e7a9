"""Show what is in LoRA adapters, whether they can be merged, and how alike they are."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from lego_core import (
    ConfigError,
    IncompatibleAdaptersError,
    LegoError,
    LoraAdapter,
    MergeConfig,
    resolve_source,
)
from lego_core.adapter_config import CONFIG_FILE, parse_config
from lego_core.adapter_files import read_small
from lego_core.comparison import (
    MethodOutcome,
    Similarity,
    check_mergeable,
    compare_adapters,
    costly_methods,
    map_units,
    try_methods,
)
from lego_core.config import METHOD_NAMES
from lego_core.provenance import read_provenance
from vllm_lego.shell import report
from vllm_lego.shell.console import complain, progress
from vllm_lego.shell.findings import Findings, Member
from vllm_lego.shell.flags import add_common, add_rank
from vllm_lego.shell.merge import weights_of
from vllm_lego.shell.sources import Source, parse_sources

PICTURES = (".png", ".pdf", ".svg")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_common(parser)
    add_rank(parser)
    parser.add_argument(
        "--methods",
        type=_methods,
        metavar="M,M,…",
        help=f"methods to try: all, none, or some of {', '.join(METHOD_NAMES)} (default: all, but "
        "those that work entry by entry, ties, dare_ties and knots, for small adapters only)",
    )
    parser.add_argument(
        "--plot",
        type=_picture,
        metavar="FILE.png",
        help="draw the similarity of one module's units in the order of their clusters, and the "
        "fidelity of each method by layer (needs matplotlib: pip install 'vllm-lego[plot]')",
    )
    parser.add_argument(
        "--module",
        help="whose units to draw, and to print with --json: a module's name or an end of it "
        "that only one has (default: the one in which the adapters are most alike)",
    )


def prepare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the command line; returns the work.

    Raises:
        LegoError: it makes no sense.
    """
    sources = parse_sources(arguments.sources, arguments.revision)
    weights = weights_of(arguments)
    MergeConfig(rank=arguments.rank)
    if arguments.module and not (arguments.plot or arguments.json):
        raise ConfigError(
            "--module says whose units --plot draws or --json prints; give one of them"
        )
    return lambda: _run(sources, weights, arguments)


def _run(sources: Sequence[Source], weights: Sequence[float], arguments: argparse.Namespace) -> int:
    if arguments.plot:
        _require_matplotlib()
    findings = _inspect(sources, weights, arguments)
    if findings.members:
        if arguments.json:
            report.as_json(findings)
        else:
            report.as_tables(findings)
    for _, reason in findings.unreadable:
        complain("inspect", reason)
    if findings.reason:
        complain("inspect", findings.reason)
    if arguments.plot and findings.units:
        from vllm_lego.shell import plot  # noqa: PLC0415  needs the extra `plot`

        plot.draw(findings, arguments.plot)
    return 1 if findings.unreadable or findings.reason else 0


def _inspect(
    sources: Sequence[Source], weights: Sequence[float], arguments: argparse.Namespace
) -> Findings:
    methods = METHOD_NAMES if arguments.methods is None else arguments.methods
    with progress(len(sources) + 1 + len(methods)) as step:
        members: list[Member] = []
        gains: list[float] = []
        unreadable: list[tuple[str, str]] = []
        for source, weight in zip(sources, weights, strict=True):
            step(f"reading {source.name}")
            try:
                members.append(_read(source))
                gains.append(weight)
            except LegoError as error:
                unreadable.append((source.name, str(error)))
        adapters = [member.adapter for member in members]
        reason, similarity, units = "", None, None
        outcomes: tuple[MethodOutcome, ...] = ()
        skipped: tuple[str, ...] = ()
        if adapters:
            step("comparing units")
            try:
                check_mergeable(adapters, gains)
            except IncompatibleAdaptersError as error:
                reason = str(error)
            with suppress(IncompatibleAdaptersError):  # the reason is known already
                similarity = compare_adapters(adapters, device=arguments.device)
        if adapters and not reason:
            if arguments.methods is None:
                skipped = costly_methods(adapters)
            outcomes = try_methods(
                adapters,
                arguments.rank,
                weights=gains,
                methods=arguments.methods,
                device=arguments.device,
                starting=lambda method: step(f"trying method {method}"),
            )
            if arguments.plot or arguments.module:
                units = map_units(
                    adapters,
                    _module(arguments.module, adapters, similarity),
                    MergeConfig(rank=arguments.rank),
                    weights=gains,
                    device=arguments.device,
                )
    return Findings(
        members, unreadable, reason, similarity, arguments.rank, outcomes, skipped, units
    )


def _read(source: Source) -> Member:
    adapter = source.load()
    # The repository's commit is known now, and its files are in the cache.
    found = resolve_source(source.place, adapter.revision, name=source.name)
    config = parse_config(read_small(found.folder, CONFIG_FILE, found.name), found.name)
    return Member(adapter, config, read_provenance(found))


def _module(
    wanted: str | None, adapters: Sequence[LoraAdapter], similarity: Similarity | None
) -> str:
    """Find the module whose units to show.

    Raises:
        ConfigError: none is meant, or several are.
    """
    names = sorted({name for adapter in adapters for name in adapter.modules})
    if wanted is None:
        alike = similarity.modules if similarity else {}
        return max(alike, key=lambda name: alike[name]) if alike else names[0]
    if wanted in names:
        return wanted
    ends = [name for name in names if name.endswith(f".{wanted}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ConfigError(
            f"--module {wanted!r} could be any of {len(ends)} modules, {ends[0]!r} for one; name it "
            "in full"
        )
    raise ConfigError(
        f"no adapter has a module {wanted!r}; there are {len(names)}, {names[0]!r} for one"
    )


def _require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'vllm-lego[plot]'")


def _methods(text: str) -> tuple[str, ...]:
    if text in {"all", "none"}:
        return METHOD_NAMES if text == "all" else ()
    methods = tuple(text.split(","))
    for method in methods:
        if method not in METHOD_NAMES:
            raise argparse.ArgumentTypeError(
                f"{method!r} is no method; there are {', '.join(METHOD_NAMES)}"
            )
    return methods


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(PICTURES)}")
    return path
