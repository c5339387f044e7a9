"""How much memory a server needs: slots, tiers, and what they leave for the KV cache.

    python -m deploy.sizing --config config.json --gpu-memory 139GiB --max-loras 16
    python -m deploy.sizing --help

For dense models of Llama's shape; config.json is that of the checkpoint. `deploy/SIZING.md` has the
formulas. Needs Python alone. Run it at the root of the checkout.
"""  # noqa: INP001

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lego.settings import Settings, size

BF16, FP32 = 2, 4  # bytes
ATTENTION = ("q", "k", "v", "o")
SPLIT_BY_INPUT = ("o", "down")  # by tensor parallelism; all others by output
# Times the inner products of a merge's units: bounds what benchmarks/results/merge/cuda.json measured.
WORKSPACE = 7


@dataclass(frozen=True)
class Model:
    """The shape of a model. Everything that it returns is in bytes, of bfloat16."""

    hidden: int
    layers: int
    linears: dict[str, tuple[int, int]]  # of one layer: inputs and outputs
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Model:
        """Read a config.json.

        Raises:
            ValueError: it is not that of a dense model of Llama's shape; says why.
        """
        if {"num_local_experts", "num_experts", "n_routed_experts"} & config.keys():
            raise ValueError(
                "--config: a mixture of experts has other layers than are counted here"
            )
        try:
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            kv_heads = config.get("num_key_value_heads") or heads
            head_dim = config.get("head_dim") or hidden // heads
            query, key = heads * head_dim, kv_heads * head_dim
            wide = (hidden, config["intermediate_size"])
            linears = {"q": (hidden, query), "k": (hidden, key), "v": (hidden, key)}
            linears |= {"o": (query, hidden), "gate": wide, "up": wide, "down": wide[::-1]}
            is_tied = bool(config.get("tie_word_embeddings"))
            layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
        except KeyError as error:
            raise ValueError(f"--config: no {error}, which models of Llama's shape have") from error
        return cls(hidden, layers, linears, kv_heads, head_dim, vocabulary, is_tied)

    def weights(self, workers: int) -> int:
        """Return the size of the base model on each worker."""
        matrices = self.layers * sum(a * b for a, b in self.linears.values())
        matrices += self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        norms = (2 * self.layers + 1) * self.hidden
        return BF16 * (matrices // workers + norms)

    def adapter(self, rank: int, targets: tuple[str, ...]) -> int:
        """Return the size of an adapter or merge: lora_A [rank, inputs], lora_B [outputs, rank]."""
        return BF16 * rank * self.layers * sum(sum(self.linears[name]) for name in targets)

    def slot(self, rank: int, workers: int) -> int:
        """Return the size of a slot on each worker: all layers, whatever the adapters touch."""
        layer = sum(
            a // workers + b if name in SPLIT_BY_INPUT else a + b // workers
            for name, (a, b) in self.linears.items()
        )
        ends = 2 * (self.vocabulary + self.hidden)  # embedding and head
        return BF16 * rank * (self.layers * layer + ends)

    def kv_token(self, workers: int) -> int:
        """Return the size of one token in the KV cache of each worker."""
        return 2 * BF16 * self.layers * max(1, self.kv_heads // workers) * self.head_dim

    def merging(self, members: int, rank: int, targets: tuple[str, ...]) -> int:
        """Return what a merge takes at most while it is made: members, result, inner products."""
        units, modules = members * rank, self.layers * len(targets)
        workspace = WORKSPACE * FP32 * modules * units * (units + rank)
        return (members + 1) * self.adapter(rank, targets) + workspace


def table(model: Model, given: argparse.Namespace) -> list[tuple[str, str]]:
    """Return everything that is worth knowing, as names and values.

    Raises:
        ValueError: it does not fit the GPU; says what would.
    """
    targets = ATTENTION if given.targets == "attention" else tuple(model.linears)
    workers, gpu = given.tensor_parallel_size, given.gpu_memory
    adapter, weights = model.adapter(given.rank, targets), model.weights(workers)
    slots = given.max_loras * model.slot(given.rank, workers)
    merging = given.merge_threads * model.merging(given.members, given.rank, targets)
    outside = merging + given.device_cache_bytes
    inside = int(gpu * given.gpu_memory_utilization)
    kv = inside - weights - slots - given.activations
    highest = int(100 * (gpu - outside) / gpu) / 100
    if given.gpu_memory_utilization > highest or kv <= 0:
        raise ValueError(
            f"--gpu-memory-utilization {given.gpu_memory_utilization} does not fit: outside of it "
            f"{_shown(outside)} are needed, so that it may be {highest} at most, and inside "
            f"{_shown(inside - kv)} before any KV cache. Less can be --device-cache-bytes, "
            "--max-loras and --rank"
        )
    device, host = given.device_cache_bytes, given.host_cache_bytes
    return [
        ("an adapter, and a merge", _shown(adapter)),
        ("on each GPU", _shown(gpu)),
        ("  base model", _shown(weights)),
        (f"  {given.max_loras} slots", _shown(slots)),
        ("  activations and graphs (assumed)", _shown(given.activations)),
        ("  KV cache", f"some {_about(kv // model.kv_token(workers)):,} tokens"),
        ("  device cache", f"{_shown(device)}: {device // adapter:,} merges"),
        (f"  {given.merge_threads} merges being made, at most", _shown(merging)),
        ("  nobody's", _shown(gpu - inside - outside)),
        ("highest --gpu-memory-utilization", f"{highest}"),
        ("host memory, pinned, for each GPU", _shown(host)),
        ("  adapters and merges in it", f"{host // adapter:,}"),
        (f"  for all {given.adapters} adapters, no merge", _shown(given.adapters * adapter)),
        ("store", f"{_shown(given.store_bytes)}: {given.store_bytes // adapter:,} merges"),
        (f"{given.adapters} adapters on disk", _shown(given.adapters * adapter)),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    settings = Settings()
    parser = argparse.ArgumentParser(prog="python -m deploy.sizing", description=__doc__)
    add = parser.add_argument
    add("--config", type=Path, required=True, help="config.json of the base model")
    add("--adapters", type=int, default=200, help="that can be named")
    add("--members", type=int, default=4, help="adapters in a set, at most")
    add("--rank", type=int, default=16, help="--max-lora-rank, and of all adapters and merges")
    add("--targets", choices=("all-linear", "attention"), default="all-linear")
    add("--max-loras", type=int, default=8, help="slots")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs of a replica")
    add("--gpu-memory", type=size, default=size("139GiB"), help="of one GPU; default: an H200's")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add(
        "--activations", type=size, default=size("4GiB"), help="what vLLM needs beside the KV cache"
    )
    add("--merge-threads", type=int, default=settings.merge_threads)
    for name in "device_cache_bytes", "host_cache_bytes", "store_bytes":
        add("--" + name.replace("_", "-"), type=size, default=getattr(settings, name))
    given = parser.parse_args(arguments)
    try:
        rows = table(Model.of(json.loads(given.config.read_bytes())), given)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))  # noqa: T201
    return 0


def _about(number: int) -> int:
    """Return two digits of it: what depends on an assumption is not known better."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return number // unit * unit


def _shown(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
