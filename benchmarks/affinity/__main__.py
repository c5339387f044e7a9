"""How much merging does a router save that sends a set to the same replica each time?

    .venv/bin/python -m benchmarks.affinity    # four servers, two at a time, and vllm-router

Two replicas of a small random Llama behind `vllm-router`; 40 pairs of ten adapters, each asked for
five times in one random order, four requests at a time. A replica has room for part of
the sets in host memory, for fewer on its device, and starts each run empty. Policies of the router are measured
without a store and with one that the replicas share.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
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
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    answers = []
    for store, policies in STORES.items():
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder) / "store" if store == "shared" else None
            with replicas(Path(folder), embedded_model(), store=where) as servers:
                urls = [server.url for server in servers]
                for policy in policies:
                    with router(policy, urls) as process:
                        run = measure(
                            process.url, servers, repeats=options.repeats, clients=options.clients
                        )
                    answers.append(run.answers)
                    found = asdict(run)
                    del found["answers"], found["kept"]
                    rows.append({"policy": policy, "store": store, **found})
                    print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": " ".join(["python -m benchmarks.affinity", *sys.argv[1:]]),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "vllm-lego", "vllm-router")},
        "sets": len(SETS),
        "requests": len(SETS) * options.repeats,
        "same_answers": all(given == answers[0] for given in answers),
        "runs": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "affinity.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "affinity.md").write_text(_table(result))
    print(_table(result))
    return 0 if result["same_answers"] else 1


def _table(result: dict[str, Any]) -> str:
    lines = [
        "# Affinity: sets merged again on another replica, or not",
        "",
        f"`{result['command']}`, {result['device']}, "
        + ", ".join(f"{name} {of}" for name, of in result["versions"].items()),
        "",
        f"{result['requests']} requests of {result['sets']} sets, two replicas; hits by where they were found; requests as the replicas counted them.",
        "",
        f"| router's policy | store | merges | hits | {' | '.join(TIERS)} | hit rate | requests by replica |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in result["runs"]:
        served = sum(run["results"].values())  # more than were sent if the router asks by itself
        hits = served - run["results"]["miss"]
        tiers = " | ".join(str(run["hits"][tier]) for tier in TIERS)
        lines.append(
            f"| `{run['policy']}` | {run['store']} | {run['results']['miss']} | {hits} | {tiers} | "
            f"{hits / served:.0%} | {' and '.join(map(str, run['shares']))} |"
        )
    agree = "the same" if result["same_answers"] else "NOT the same"
    lines += ["", f"All runs gave {agree} answers to the same requests, token for token."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
