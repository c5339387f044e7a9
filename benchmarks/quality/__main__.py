"""Measure what merges keep of their adapters' skill, on real tasks.

    python -m benchmarks.quality --model DIR --work DIR     train, merge, score; on one GPU
    python -m benchmarks.quality --smoke                    a tiny model on the CPU, a minute
    python -m benchmarks.quality --draw                     the pictures of earlier results

What is finished is kept in `--work` and not done again: after `--limit-s` seconds nothing new is begun,
the results so far are written, and the exit status is 3 until the same command has done all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import pictures, report, smoke
from benchmarks.quality.experiments import Bench, Plan, jobs, run, score_singles
from benchmarks.quality.model import Subject
from benchmarks.quality.tasks import PACKAGES, SPLITS, STYLES, TASKS, load_bank
from benchmarks.quality.training import Family, own_answers, own_prompts, train, with_styles
from lego_core import LoraAdapter, LoraModule, load_adapter, save_adapter

RESULTS = Path(__file__).parents[1] / "results" / "quality"
VERSIONS = ("torch", "transformers", "triton", "numpy", "vllm-lego", *PACKAGES)
UNFINISHED = 3
SOME = ("numbers", "plurals", "dates", "sums", "syllables", "sentiment")

FULL = Plan(
    families=(
        Family("r16-all", (*TASKS, *STYLES), rank=16, rate=2e-4, steps=450, seed=1),
        Family("r8-attention", tuple(TASKS), 8, 5e-4, steps=450, seed=2, attention=True),
        Family("r8-all", SOME, rank=8, rate=3e-4, steps=450, seed=3),
        Family("r4-all", SOME, rank=4, rate=4e-4, steps=450, seed=4),
        Family("r16-all-1e-4", SOME, rank=16, rate=1e-4, steps=450, seed=5),
    ),
    sizes=(2, 3, 5, 7),
    draws={"r16-all": 5, "r8-attention": 3, "r16-all-1e-4": 2},
    few=2,
    ranks=(4, 8, 16, 32, 64),
    mixed=("r16-all", "r8-all", "r4-all"),
    cuts=(1, 2, 4, 8, 12),
    composed=SOME,
)


def main() -> int:
    """Run what is not done yet, and write the results."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__)
    parser.add_argument("--model", type=Path, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="what is kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--limit-s", type=float, default=3600, help="begin nothing later")
    parser.add_argument("--reserve-s", type=float, default=180, help="that training a family takes")
    parser.add_argument("--device", help="cpu or cuda; cuda where there is one")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--draw", action="store_true", help="draw earlier results")
    options = parser.parse_args()
    if options.draw:
        results = json.loads((options.out / "quality.json").read_text())
        lines = (options.out / "merges.jsonl").read_text().splitlines()
        pictures.draw(results | {"merges": [json.loads(line) for line in lines]}, options.out)
        return 0
    if options.smoke:
        torch.set_num_threads(1)  # of so little work, threads only wait for each other
        with tempfile.TemporaryDirectory() as work:
            smoke.write_questions(Path(work))
            options.work, options.reserve_s = Path(work), 0
            return _run(options, smoke.tiny_subject(), smoke.PLAN)
    if options.model is None:
        parser.error("--model is missing")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else training is not repeatable
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _run(options, Subject.load(options.model, device), FULL)


def _run(options: argparse.Namespace, subject: Subject, plan: Plan) -> int:
    deadline = time.monotonic() + options.limit_s
    work: Path = options.work
    bank = load_bank(work / "questions.json")
    topics = [task for task in plan.families[0].tasks if task in TASKS]
    own_file = work / "own_answers.json"
    if not own_file.exists():
        prompts = [prompt for split in SPLITS for prompt in own_prompts(bank, split, topics)]
        _write(own_file, own_answers(subject, list(dict.fromkeys(prompts))))
    bank = with_styles(bank, json.loads(own_file.read_text()), topics)

    finished = True
    for family in plan.families:
        folder = work / "adapters" / family.name
        if (folder / "training.json").exists():
            continue
        if time.monotonic() + options.reserve_s > deadline:
            finished = False
            break
        started = time.perf_counter()
        adapters, losses = train(family, subject, bank)
        for adapter, task in zip(adapters, family.tasks, strict=True):
            save_adapter(adapter, folder / task, overwrite=True)
        account = {"losses": losses, "seconds": time.perf_counter() - started}
        _write(folder / "training.json", dataclasses.asdict(family) | account)

    adapters = {
        f"{family.name}/{task}": _load(work / "adapters" / family.name / task, subject.device)
        for family in plan.families
        if (work / "adapters" / family.name / "training.json").exists()
        for task in family.tasks
    }
    bench = Bench(subject, bank, work / "adapters", adapters, work / "records.jsonl", deadline)
    if finished:
        score_singles(bench)
        finished = not bench.is_late and run(bench, jobs(bench, plan))
    results = report.results_of(bench.records, _header(options, subject, work, plan))
    results["finished"] = finished
    merges = results["merges"]
    _write(options.out / "quality.json", {k: v for k, v in results.items() if k != "merges"})
    (options.out / "merges.jsonl").write_text("".join(json.dumps(one) + "\n" for one in merges))
    (options.out / "quality.md").write_text(report.markdown(results) + "\n")
    pictures.draw(results, options.out)
    print(
        f"{len(bench.records)} results in {options.out}, " + ("all" if finished else "more to do")
    )
    return 0 if finished else UNFINISHED


def _load(folder: Path, device: torch.device) -> LoraAdapter:
    adapter = load_adapter(folder)
    modules = {
        name: LoraModule(module.lora_a.to(device), module.lora_b.to(device), module.scaling)
        for name, module in adapter.modules.items()
    }
    return dataclasses.replace(adapter, modules=modules)


def _header(
    options: argparse.Namespace, subject: Subject, work: Path, plan: Plan
) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    # The questions may have been written on another machine.
    versions |= json.loads((work / "questions.json").read_text())["versions"]
    on_gpu = subject.device.type == "cuda"
    trained = [
        json.loads(file.read_text())
        for family in plan.families
        if (file := work / "adapters" / family.name / "training.json").exists()
    ]
    return {
        "command": " ".join(
            ["python -m benchmarks.quality", *(["--smoke"] if options.smoke else [])]
        ),
        "device": torch.cuda.get_device_name(subject.device) if on_gpu else platform.machine(),
        "versions": versions,
        "plan": dataclasses.asdict(plan),
        "families": trained,
    }


def _write(file: Path, value: Any) -> None:
    """Write JSON as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(file)


if __name__ == "__main__":
    sys.exit(main())
