"""The patches of vLLM's insides, each against the real thing."""

from __future__ import annotations

import pytest
import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin, worker_base

from vllm_lego._vllm import install_worker_patches


@pytest.fixture(autouse=True)
def _patched() -> None:
    install_worker_patches()


def test_patching_twice_is_patching_once():
    before = (
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager,
        worker_base.WorkerBase.lego_stage,
        lora_ops.bgmv_shrink,
    )
    install_worker_patches()
    assert before == (
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager,
        worker_base.WorkerBase.lego_stage,
        lora_ops.bgmv_shrink,
    )


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the patch is for the CPU platform")
@pytest.mark.parametrize("prefill", [False, True])
def test_on_a_cpu_tokens_of_the_base_model_get_no_adapter(prefill):
    """Three tokens: base model, slot 1, base model."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, generator=draws)
    slots = torch.randn(2, 1, 4, 6, generator=draws)
    slot_of = torch.tensor([-1, 1, -1])
    y = torch.full((3, 4), torch.nan)
    if prefill:
        ones = torch.ones(3, dtype=torch.long)
        lora_ops.sgmv_shrink(x, slots, y, ones.cumsum(0) - 1, ones, slot_of, 3, 1, 3, 2.0)
    else:
        punica_cpu.bgmv_shrink(x, slots, y, slot_of, 2.0)
    assert torch.equal(y[[0, 2]], torch.zeros(2, 4))
    torch.testing.assert_close(y[1], 2.0 * slots[1, 0] @ x[1])


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the patch is for the CPU platform")
@pytest.mark.parametrize("prefill", [False, True])
def test_on_a_cpu_tokens_of_the_base_model_get_no_adapter_of_an_embedding(prefill):
    """Its lora_A is a look-up of vLLM's: what is not zero goes into the expand alone."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=draws)
    slots = torch.randn(2, 1, 6, 4, generator=draws)
    slot_of = torch.tensor([-1, 1, -1])
    y = torch.ones(3, 6)
    if prefill:
        ones = torch.ones(3, dtype=torch.long)
        lora_ops.sgmv_expand(x, slots, y, ones.cumsum(0) - 1, ones, slot_of, 3, 1, 3, True)
    else:
        punica_cpu.bgmv_expand(x, slots, y, slot_of)
    assert torch.equal(y[[0, 2]], torch.ones(2, 6))
    torch.testing.assert_close(y[1], 1 + slots[1, 0] @ x[1])
