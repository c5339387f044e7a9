"""What vLLM itself makes of a Llama model with slots, weighed: on the meta device, without memory.

`python -m tests.deploy.vllm_shapes SLOTS RANK FOLDER:WORKERS...` prints a JSON list of lists: for each
model and each of its workers, bytes on that worker. vLLM is imported once, which takes most of the time.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

import torch
from vllm.config import LoRAConfig, ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM

from vllm_lego.demo.server import free_port


def weigh(
    folder: str, slots: int, rank: int, workers: int, worker: int, port: int
) -> dict[str, int]:
    """Return bytes of weights, of all slots, and of a token in the KV cache."""
    config = VllmConfig(
        model_config=ModelConfig(
            model=folder, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=1024
        ),
        parallel_config=ParallelConfig(tensor_parallel_size=workers),
        lora_config=LoRAConfig(max_loras=slots, max_lora_rank=rank, lora_dtype=torch.bfloat16),
    )
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(config):
        address = f"tcp://127.0.0.1:{port}"
        init_distributed_environment(workers, worker, address, worker, "gloo")
        ensure_model_parallel_initialized(workers, 1)
        with torch.device("meta"):
            model = LlamaForCausalLM(vllm_config=config)
        weights = bytes_of(model.parameters())
        vocabulary = config.model_config.get_vocab_size()
        meta, lora = torch.device("meta"), config.lora_config
        manager = LoRAModelManager(model, 8, 256, vocabulary, lora, meta, config)
        attention = [layer for layer in model.modules() if isinstance(layer, Attention)]
        specs = [layer.get_kv_cache_spec(config) for layer in attention]
    return {
        "weights": weights,
        "slots": sum(map(slot_bytes, manager.modules.values())),
        "kv_token": sum(spec.page_size_bytes // spec.block_size for spec in specs),
    }


def weigh_all(folder: str, slots: int, rank: int, workers: int) -> list[dict[str, int]]:
    """Return what each worker weighs, all of them at the same time."""
    port = free_port()
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=fork) as pool:
        each = [
            pool.submit(weigh, folder, slots, rank, workers, worker, port)
            for worker in range(workers)
        ]
        return [weighed.result() for weighed in each]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def slot_bytes(layer: object) -> int:
    stacks = [getattr(layer, name) for name in ("lora_a_stacked", "lora_b_stacked")]
    return sum(bytes_of(s if isinstance(s, tuple) else (s,)) for s in stacks)


if __name__ == "__main__":
    slots, rank = map(int, sys.argv[1:3])
    models = (given.rsplit(":", 1) for given in sys.argv[3:])
    found = [weigh_all(folder, slots, rank, int(workers)) for folder, workers in models]
    sys.stdout.write(json.dumps(found) + "\n")
