"""Where does the time of a set go whose members nobody has read, beside vLLM reading one adapter?

    python -m benchmarks.reading            three adapters of an 8B shape, on the GPU if there is one
    python -m benchmarks.reading --smoke    does it run?

The stages of such a set as the server takes them, one after the other, without a server: the front end
identifies the members by their content (`Catalog.look_up`), the worker reads them and brings them to
its device (`Tiers.members`), or finds them in host memory, and merges them. One adapter, and as many as a
set has. In each round vLLM reads one adapter, too, first or last in turn: into host memory, pinned where
there is a GPU, not to the device. The files are in the page cache. Reported: milliseconds and CPU
milliseconds at the median, and the median of the rounds' ratios with quartiles.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from benchmarks.serving.shapes import SHAPES, write_adapters
from lego_core import LoraAdapter, MergeConfig, merge_adapters
from vllm_lego.catalog import Catalog, CatalogEntry
from vllm_lego.file_stamps import FilesMark, look
from vllm_lego.host_memory import HostMemory
from vllm_lego.recipe import Member
from vllm_lego.settings import Settings
from vllm_lego.threads import hand_over_soon, yield_to_the_engine
from vllm_lego.tiers import Tiers

RESULTS = Path(__file__).parents[1] / "results" / "reading"
RANK = 16
MEMBERS = 3
STOCK = "vLLM reads 1"


def main() -> int:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.reading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="8b", help="of the base model")
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="a short run that proves it works")
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.rounds = "tiny", 2
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(SHAPES[options.shape], Path(folder), MEMBERS, RANK)
        sizes = [f.stat().st_size for path in adapters.values() for f in path.iterdir()]
        stages = _Stages(adapters, device, budget=2 * sum(sizes))
        rounds = [stages.round(i) for i in range(options.rounds + 1)][1:]  # the first warms up
    result = {
        "command": " ".join(["python -m benchmarks.reading", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("vllm", "torch", "vllm-lego")},
        "worker_hashes": stages.hashes,
        "adapter_bytes": sum(sizes) // MEMBERS,
        "rounds": rounds,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{device.type}.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / f"{device.type}.md").write_text(_table(result))
    print(_table(result))
    return 0


class _Stages:
    """The stages on the same files again and again, each time as if they had never been read."""

    def __init__(self, adapters: Mapping[str, Path], device: torch.device, budget: int) -> None:
        hand_over_soon()  # as in a server
        self._adapters = {name: str(path) for name, path in adapters.items()}
        self._device = device
        # No member stays on the device: what the copy from host memory takes is to be seen.
        self._settings = Settings(host_cache_bytes=budget, device_cache_bytes=1)
        self._memory = HostMemory(budget, pin=device.type == "cuda")  # as with CUDA, also without
        self._files = ThreadPoolExecutor(16)
        self._staging = ThreadPoolExecutor(1, initializer=yield_to_the_engine)
        while not all(_has_settled(path) for path in self._adapters.values()):
            time.sleep(0.05)  # what was written just now has no stamp
        self._members = [
            Member(entry.name, entry.path, entry.digest, 1.0, entry.stamp)
            for entry in self._identify(MEMBERS)
        ]
        self.hashes = not all(member.stamp for member in self._members)

    def round(self, number: int) -> dict[str, tuple[float, float]]:
        """Return the wall clock's and the processors' seconds of each stage."""
        gc.collect()  # what the last round kept in host memory
        found = {STOCK: _timed(self._stock)} if number % 2 else {}
        for count in (1, MEMBERS):
            found[f"identify {count}"] = _timed(lambda n=count: self._identify(n))
        for count in (1, MEMBERS):
            tiers = Tiers(self._device, lambda _: None, self._settings, self._memory, writes=False)
            wanted = self._members[:count]
            read = self._staging.submit(_timed, lambda t=tiers, w=wanted: t.members(w)).result()
            again = self._staging.submit(_timed, lambda t=tiers, w=wanted: t.members(w)).result()
            found |= {f"read {count}": read, f"{count} from host memory": again}
        loaded = tiers.members(self._members)
        merged = self._staging.submit(_timed, lambda: self._merge(loaded)).result()
        found[f"merge {MEMBERS}"] = merged
        return found if number % 2 else {STOCK: _timed(self._stock)} | found

    def _stock(self) -> None:
        path = next(iter(self._adapters.values()))
        helper = PEFTHelper.from_local_dir(path, None)
        read = LoRAModel.from_local_checkpoint(
            path,
            {name.rpartition(".")[2] for name in helper.target_modules},
            peft_helper=helper,
            lora_model_id=1,
            device="cpu",
            dtype=torch.bfloat16,
        )
        if self._device.type == "cpu":  # which has only mapped the file until now
            for layer in read.loras.values():
                layer.lora_a.clone(), layer.lora_b.clone()

    def _identify(self, count: int) -> Sequence[CatalogEntry]:
        catalog = Catalog(self._adapters, files=self._files)
        names = list(self._adapters)[:count]
        return asyncio.run(catalog.look_up(names, param="adapters"))

    def _merge(self, members: Sequence[LoraAdapter]) -> None:
        merge_adapters(members, MergeConfig(rank=RANK), device=self._device, dtype=torch.bfloat16)


def _has_settled(path: str) -> bool:
    mark = look(path).mark
    return isinstance(mark, FilesMark) and mark.settled


def _timed(stage: Callable[[], Any]) -> tuple[float, float]:
    cpu, started = time.process_time(), time.perf_counter()
    stage()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu


def _table(result: dict[str, Any]) -> str:
    rounds = result["rounds"]
    lines = [
        "# A set whose members nobody has read",
        "",
        (
            f"`{result['command']}`, {result['device']}, {result['cores']} cores, "
            + ", ".join(f"{name} {of}" for name, of in result["versions"].items())
            + f"; adapters of {result['adapter_bytes'] / 1e6:.0f} MB, {len(rounds)} rounds."
            + (" The worker hashes: TMPDIR is not local." if result["worker_hashes"] else "")
        ),
        "",
        "| stage | ms | CPU ms | beside vLLM reading one adapter (quartiles) |",
        "| --- | --- | --- | --- |",
    ]
    for stage in rounds[0]:
        wall, cpu = (statistics.median(one[stage][i] for one in rounds) * 1e3 for i in (0, 1))
        low, ratio, high = statistics.quantiles(
            (one[stage][0] / one[STOCK][0] for one in rounds), n=4, method="inclusive"
        )
        lines.append(
            f"| {stage} | {wall:.1f} | {cpu:.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
