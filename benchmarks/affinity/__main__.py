"""How much merging does a router save that sends a set to the same replica each time?

    .venv/bin/python -m benchmarks.affinity    # four servers, two at a time, and vllm-router

Two replicas of a small random Llama behind `vllm-router`; 40 pairs of ten adapters, each asked for
five times in random order, four requests at a time. A replica has room for part of the sets in host
memory, for fewer on its device, and starts each run empty. Policies of the router are measured
without a store and with one that the replicas share, on the same ports: the router hashes them.
Each is measured with the same few draws of the order and of the keys.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby, product
from pathlib import Path
from typing import Any

from benchmarks.affinity.replicas import SETS, TIERS, measure, replicas, router
from vllm_lego.demo.model import embedded_model

RESULTS = Path(__file__).parents[1] / "results" / "affinity"
STORES = {  # the router's policies to measure, by what the replicas share
    "none": ("round_robin", "cache_aware", "consistent_hash", "sticky_least_loaded"),
    "shared": ("round_robin", "consistent_hash"),
}


def main() -> int:
    """Run the benchmark and write its results. Returns 1 when two policies' answers differ."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.affinity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=5, help="requests for each set")
    parser.add_argument("--clients", type=int, default=4, help="requests at a time")
    parser.add_argument("--draws", type=int, default=3, help="runs of each policy")
    parser.add_argument(
        "--ports", type=int, nargs=2, default=(18101, 18102), help="of the replicas"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    answers: dict[int, list[Any]] = {}
    same_answers = True
    for store, policies in STORES.items():
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder) / "store" if store == "shared" else None
            with replicas(
                Path(folder), embedded_model(), store=where, ports=options.ports
            ) as servers:
                urls = [server.url for server in servers]
                for policy, draw in product(policies, range(options.draws)):
                    with router(policy, urls) as process:
                        run = measure(
                            process.url,
                            servers,
                            repeats=options.repeats,
                            clients=options.clients,
                            draw=draw,
                        )
                    same_answers &= run.answers == answers.setdefault(draw, run.answers)
                    found = asdict(run)
                    del found["answers"], found["kept"]
                    rows.append({"policy": policy, "store": store, "draw": draw, **found})
                    print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": " ".join(["python -m benchmarks.affinity", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "vllm-lego", "vllm-router")},
        "sets": len(SETS),
        "requests": len(SETS) * options.repeats,
        "ports": list(options.ports),
        "same_answers": same_answers,
        "runs": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "affinity.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "affinity.md").write_text(_table(result))
    print(_table(result))
    return 0 if result["same_answers"] else 1


def _table(result: dict[str, Any]) -> str:
    head = ["merges", "hits", "coalesced", *TIERS, "hit rate", "requests by replica"]
    ports = " and ".join(map(str, result["ports"]))
    lines = [
        "# Affinity: sets merged again on another replica, or not",
        "",
        f"`{result['command']}`, {result['device']}, "
        + ", ".join(f"{name} {of}" for name, of in result["versions"].items()),
        "",
        f"{result['requests']} requests of {result['sets']} sets, two replicas on the ports {ports}.",
        "All requests that the replicas served are merges, hits or coalesced, as the plugin's metrics",
        "count them; a coalesced one waited for another's merge.",
        "",
        _row("router's policy", "store", *head),
        _row(*["---"] * (2 + len(head))),
    ]
    of_policy = groupby(result["runs"], key=lambda run: (run["policy"], run["store"]))
    for (policy, store), runs in of_policy:
        columns = zip(*map(_cells, runs), strict=True)
        lines.append(_row(f"`{policy}`", store, *map(_span, columns)))
    agree = "the same" if result["same_answers"] else "NOT the same"
    lines += [
        "",
        f"All policies got {agree} answers to the same requests, token for token.",
        "",
        "By draw of the order of requests, and of the keys that the router hashes:",
        "",
        _row("router's policy", "store", "draw", *head),
        _row(*["---"] * (3 + len(head))),
    ]
    for run in result["runs"]:
        lines.append(_row(f"`{run['policy']}`", run["store"], str(run["draw"]), *_cells(run)))
    return "\n".join(lines) + "\n"


def _cells(run: dict[str, Any]) -> list[str]:
    results = run["results"]
    served = sum(results.values())  # more than were sent if the router asks by itself
    return [
        *(str(results[result]) for result in ("miss", "hit", "coalesced")),
        *(str(run["hits"][tier]) for tier in TIERS),
        f"{results['hit'] / served:.0%}",
        " and ".join(map(str, run["shares"])),
    ]


def _span(cells: Sequence[str]) -> str:
    """Return the least and the most of a column, or all that differ where they are no number."""
    if len(set(cells)) == 1:
        return cells[0]
    if " and " in cells[0]:
        return ", ".join(cells)
    low, *_, high = sorted(cells, key=lambda cell: int(cell.removesuffix("%")))
    return f"{low} to {high}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
