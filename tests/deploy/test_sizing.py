"""What deploy/sizing.py computes is what vLLM and the plugin take, and what SIZING.md shows."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from deploy.sizing import ATTENTION, Model, main
from lego_core import LoraAdapter, LoraModule, MergeConfig, load_adapter, merge_adapters
from tests.deploy.tools import ROOT
from vllm_lego.demo.model import embedded_model
from vllm_lego.demo.server import shipped_adapters
from vllm_lego.packed import PackedAdapter
from vllm_lego.recipe import Member, Recipe
from vllm_lego.store import MergeStore

DOCUMENT = (ROOT / "deploy/SIZING.md").read_text()
LLAMA_8B = json.loads(re.search(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)[1])
NAMES = {name: f"self_attn.{name}_proj" for name in ATTENTION} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}


def embedded() -> Model:
    return Model.of(json.loads((embedded_model() / "config.json").read_text()))


def all_linear(model: Model, name: str, rank: int) -> LoraAdapter:
    """An adapter of random numbers on every linear layer."""
    draws = torch.Generator().manual_seed(len(name))
    return LoraAdapter(
        name,
        {
            f"model.layers.{layer}.{NAMES[linear]}": LoraModule(
                torch.randn(rank, width, generator=draws, dtype=torch.bfloat16),
                torch.randn(height, rank, generator=draws, dtype=torch.bfloat16),
            )
            for layer in range(model.layers)
            for linear, (width, height) in model.linears.items()
        },
    )


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_a_merge_takes_what_is_computed_in_every_tier(targets: str, tmp_path: Path):
    model = embedded()
    if targets == "attention":
        members = [load_adapter(shipped_adapters()[name]) for name in ("plural", "json")]
        computed = model.adapter(8, ATTENTION)
    else:
        members = [all_linear(model, name, rank) for name, rank in (("a", 8), ("bc", 4))]
        computed = model.adapter(8, tuple(model.linears))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    merged = merge_adapters(members, MergeConfig(rank=8), device=device, name=f"lego-{1:016x}")
    packed = PackedAdapter.pack(merged)
    assert packed.nbytes == computed
    kept = packed.in_host_memory()
    assert kept.nbytes == computed

    recipe = Recipe(merged.name, (Member("a", "/a", "digest", 1.0),), MergeConfig(rank=8))
    MergeStore(tmp_path, 1 << 30, lambda *_: None).save(recipe, kept.unpack(), 1.0)
    [file] = tmp_path.iterdir()
    header = file.stat().st_size - computed
    assert 0 < header < 100_000, "SIZING.md says 0.1 MB a file"


def test_an_adapter_trained_for_the_model_has_the_size_that_is_computed():
    plural = load_adapter(shipped_adapters()["plural"])
    assert plural.nbytes == embedded().adapter(8, ATTENTION)


def test_vllm_makes_slots_weights_and_cache_of_the_computed_size(tmp_path: Path):
    slots, rank = 16, 16
    # Two layers: vLLM makes them one by one, and everything computed is linear in their number.
    two_layers = LLAMA_8B | {"num_hidden_layers": 2}
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(two_layers | llama))
    models = [(embedded_model(), embedded(), 1), (tmp_path, Model.of(two_layers), 2)]
    # vLLM's executor sets VLLM_DIST_IDENT; the CPU's workers name shared memory by it, and leave it.
    identity = uuid.uuid4().hex
    environment = {"VLLM_PLUGINS": "", "VLLM_DIST_IDENT": identity, "CUDA_VISIBLE_DEVICES": ""}
    given = [f"{folder}:{workers}" for folder, _, workers in models]
    try:
        output = subprocess.check_output(
            [sys.executable, "-m", "tests.deploy.vllm_shapes", str(slots), str(rank), *given],
            cwd=ROOT,
            env=os.environ | environment,
            text=True,
        )
    finally:
        for left in Path("/dev/shm").glob(f"{identity}*"):  # noqa: S108
            left.unlink()
    for (_, model, workers), weighed in zip(
        models, json.loads(output.splitlines()[-1]), strict=True
    ):
        computed = {
            "weights": model.weights(workers),
            "slots": slots * model.slot(rank, workers),
            "kv_token": model.kv_token(workers),
        }
        assert weighed == [computed] * workers


def test_merging_takes_no_more_than_is_computed_where_it_was_measured():
    model = Model.of(LLAMA_8B)
    recorded = json.loads((ROOT / "benchmarks/results/merge/cuda.json").read_text())["merges"]
    cases = [c for c in recorded if c["model"] == "8B" and c["rank"] == c["k"]]
    assert len({case["adapters"] for case in cases}) > 3
    for case in cases:
        measured = case["pool_bytes"] + case["extra_bytes"]
        computed = model.merging(case["adapters"], case["rank"], tuple(model.linears))
        assert measured <= computed <= 1.1 * measured, case["case"]


def test_the_document_shows_what_the_script_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA_8B))
    pattern = r"\$ python -m deploy\.sizing (.*)\n((?s:.*?))```"
    [(command, shown)] = re.findall(pattern, DOCUMENT)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == shown


def test_the_documents_conclusions_follow_from_the_table():
    [shown] = re.findall(r"```console\n(.*?)```", DOCUMENT, re.DOTALL)
    tokens = int(re.search(r"KV cache +some ([\d,]+) tokens", shown)[1].replace(",", ""))
    assert f"{tokens:,} tokens, {tokens // 64 // 1000 * 1000:,} for each of 64 requests" in DOCUMENT
    entries = int(re.search(r"adapters and merges in it +(\d+)", shown)[1])
    assert f"room for {entries - 200} merges" in DOCUMENT
    assert f"{math.comb(200, 4) / 1e6:.0f} million" in DOCUMENT


def test_all_but_the_ends_is_linear_in_layers():
    def of(layers: int) -> list[int]:
        model = Model.of(LLAMA_8B | {"num_hidden_layers": layers})
        return [model.weights(2), model.slot(16, 2), model.kv_token(2)]

    one, two, all_layers = of(1), of(2), of(32)
    assert all_layers == [a + 31 * (b - a) for a, b in zip(one, two, strict=True)]


@pytest.mark.parametrize(
    ("config", "arguments", "complaint"),
    [
        (LLAMA_8B | {"num_local_experts": 8}, [], "a mixture of experts"),
        ({"hidden_size": 64}, [], "no 'num_attention_heads'"),
        (LLAMA_8B, ["--gpu-memory-utilization=0.99"], "it may be 0.98 at most"),
        (LLAMA_8B, ["--gpu-memory=20GB"], "inside 19.65 GiB before any KV cache"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, object],
    arguments: list[str],
    complaint: str,
):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        main([f"--config={file}", *arguments])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
