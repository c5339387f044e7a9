"""Findings as tables for people, and as JSON for scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_lego.shell.console import clean, print_table, say, sized, spanned
from vllm_lego.shell.findings import Findings, Member

_DIGEST = 12


def as_tables(findings: Findings) -> None:
    """Print what is in each adapter, whether they can be merged, how alike they are, and what each
    method would make of them.
    """
    _say_contents(findings.members)
    say()
    names = findings.names
    if findings.reason:
        say(f"can be merged: no, {clean(findings.reason, limit=0)}")
    else:
        say(f"can be merged: yes, {', '.join(map(clean, names))}")
    if findings.similarity and findings.similarity.pairs:
        say()
        _say_pairs(findings)
    if findings.outcomes or findings.skipped:
        say()
        _say_outcomes(findings)


def as_json(findings: Findings) -> None:
    """Print one object."""
    names = findings.names
    similarity, units = findings.similarity, findings.units
    say(
        json.dumps(
            {
                "adapters": [_as_dict(member) for member in findings.members],
                "unreadable": [
                    {"name": name, "reason": reason} for name, reason in findings.unreadable
                ],
                "can_be_merged": not findings.reason,
                "reason": findings.reason or None,
                "pairs": [
                    {
                        "adapters": [names[pair.first], names[pair.second]],
                        "cosine": pair.cosine,
                        "alignment": pair.alignment,
                        "alignment_by_chance": pair.by_chance,
                    }
                    for pair in (similarity.pairs if similarity else ())
                ],
                "alignment_by_module": dict(similarity.modules) if similarity else {},
                "rank": findings.rank,
                "methods": [
                    {
                        "method": outcome.method,
                        "fidelity": outcome.fidelity,
                        "reason": outcome.reason or None,
                        "modules": dict(outcome.modules),
                    }
                    for outcome in findings.outcomes
                ],
                "methods_skipped": list(findings.skipped),
                "units": units
                and {
                    "module": units.module,
                    "adapters": [names[owner] for owner in units.owners],
                    "clusters": list(units.clusters),
                    "similarity": [[round(value, 4) for value in row] for row in units.similarity],
                },
            }
        )
    )


def _as_dict(member: Member) -> Mapping[str, Any]:
    adapter = member.adapter
    modules = adapter.modules.values()
    return {
        "name": adapter.name,
        "source": adapter.source,
        "revision": adapter.revision,
        "digest": adapter.digest,
        "base_model": adapter.base_model,
        "ranks": sorted({module.rank for module in modules}),
        "alphas": sorted({round(alpha, 6) for alpha in member.alphas}),
        "scalings": sorted({round(module.scaling, 6) for module in modules}),
        "rslora": member.config.use_rslora,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "targets": member.kinds,
        "modules": len(adapter.modules),
        "layers": member.layers,
        "bytes": adapter.nbytes,
        "provenance": member.provenance,
    }


def _say_contents(members: Sequence[Member]) -> None:
    rows = []
    for member in members:
        adapter = member.adapter
        modules = adapter.modules.values()
        rows.append(
            [
                adapter.name,
                spanned([module.rank for module in modules]),
                spanned([round(alpha, 4) for alpha in member.alphas]),
                spanned([round(module.scaling, 4) for module in modules])
                + (" rsLoRA" if member.config.use_rslora else ""),
                str(adapter.dtype).removeprefix("torch."),
                str(len(modules)),
                sized(adapter.nbytes),
                adapter.digest[:_DIGEST],
            ]
        )
    columns = ["adapter", ">rank", ">alpha", ">scaling", "dtype", ">modules", ">size", "digest"]
    print_table(columns, rows)
    say()
    _say_for("base model", members, lambda member: member.adapter.base_model or "not named")
    _say_for("targets", members, _targets)
    for member in members:
        if member.adapter.revision:
            say(f"{clean(member.adapter.name)}: at commit {member.adapter.revision}")
        if member.provenance is not None:
            say(f"{clean(member.adapter.name)}: {_made(member.provenance)}")


def _say_for(label: str, members: Sequence[Member], value: Callable[[Member], str]) -> None:
    """Say one thing of all the members, once where it is the same."""
    values = [value(member) for member in members]
    if len(set(values)) == 1:
        say(f"{label}: {clean(values[0])}")
        return
    for member, of_member in zip(members, values, strict=True):
        say(f"{label} of {clean(member.adapter.name)}: {clean(of_member)}")


def _targets(member: Member) -> str:
    layers = f" in {member.layers} layers" if member.layers else ""
    return f"{' '.join(member.kinds)}{layers}"


def _made(provenance: Mapping[str, Any]) -> str:
    """Put into words what a file claims, whatever is in it."""
    members, config = provenance.get("members"), provenance.get("config")
    if not isinstance(members, list) or not isinstance(config, dict):
        return "made in a way that is not understood here"
    parts = [
        f"{part.get('name')} ({part.get('weight')})" for part in members if isinstance(part, dict)
    ]
    return clean(
        f"merged from {', '.join(parts)} by {config.get('method')} at rank {config.get('rank')}, "
        f"with {provenance.get('made_by')}"
    )


def _say_pairs(findings: Findings) -> None:
    names = findings.names
    pairs = findings.similarity.pairs if findings.similarity else ()
    print_table(
        ["pair", "", ">cosine", ">alignment", ">by chance"],
        [
            [
                names[pair.first],
                names[pair.second],
                *map(_number, (pair.cosine, pair.alignment, pair.by_chance)),
            ]
            for pair in pairs
        ],
    )
    say(
        "cosine: of the two updates as a whole. alignment: |cosine| of a unit with the nearest unit of"
    )
    say("the other adapter, their mean. by chance: about the alignment of unrelated adapters")


def _say_outcomes(findings: Findings) -> None:
    rows = [
        [
            outcome.method,
            _number(outcome.fidelity),
            _number(min(outcome.modules.values(), default=None)),
            _why(outcome.reason),
        ]
        for outcome in findings.outcomes
    ]
    rows += [
        [method, "-", "-", f"slow on adapters of this size; try it by --methods {method}"]
        for method in findings.skipped
    ]
    columns = [f"at rank {findings.rank}", ">fidelity", ">lowest"]
    if any(row[3] for row in rows):
        columns.append("why not")
    print_table(columns, [row[: len(columns)] for row in rows])
    say(
        "fidelity: cosine between the merge and the exact weighted sum; svd's is the best that this"
    )
    say("rank allows, which does not say that it serves best. lowest: of any module")


def _why(reason: str) -> str:
    """Cut a reason to its middle: neither which module was first, nor what to do about it."""
    return re.sub(r"^module '[^']*': ", "", reason).partition(";")[0]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
