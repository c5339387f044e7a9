"""Adapters in one buffer: what goes in comes out, wherever the tensors lay before."""

import torch

from lego_core import LoraAdapter, LoraModule, MergeConfig, merge_adapters
from vllm_lego import packed as packing
from vllm_lego.packed import PackedAdapter


def adapter(name: str, seed: int) -> LoraAdapter:
    draws = torch.Generator().manual_seed(seed)
    return LoraAdapter(
        name,
        {
            "embed_tokens": LoraModule(
                torch.randn(3, 11, generator=draws),
                torch.randn(5, 3, generator=draws),
                0.5,
                is_embedding=True,
            ),
            "q_proj": LoraModule(
                torch.randn(3, 7, generator=draws).bfloat16(),
                torch.randn(5, 3, generator=draws).bfloat16(),
                2.0,
            ),
        },
        digest="d" + name,
        base_model="org/base",
    )


def assert_same(found: LoraAdapter, wanted: LoraAdapter) -> None:
    assert list(found.modules) == list(wanted.modules)
    assert (found.digest, found.base_model) == (wanted.digest, wanted.base_model)
    for name, module in wanted.modules.items():
        other = found.modules[name]
        assert (other.scaling, other.is_embedding) == (module.scaling, module.is_embedding)
        assert torch.equal(other.lora_a, module.lora_a)
        assert torch.equal(other.lora_b, module.lora_b)


def test_tensors_of_their_own_are_copied_into_one_buffer():
    source = adapter("a", 0)
    packed = PackedAdapter.pack(source)
    assert_same(packed.unpack(), source)
    assert packed.unpack("other").name == "other"
    assert packed.unpack() is packed.unpack()
    source.modules["q_proj"].lora_a.zero_()
    assert packed.unpack().modules["q_proj"].lora_a.any()


def test_a_merge_is_packed_where_it_lies():
    merged = merge_adapters([adapter("a", 0), adapter("b", 1)], MergeConfig(rank=4))
    packed = PackedAdapter.pack(merged)
    assert_same(packed.unpack(), merged)
    assert packed.nbytes == merged.nbytes
    assert packed.buffer.data_ptr() == merged.modules["embed_tokens"].lora_a.data_ptr()
    assert len(packed.fingerprint()) == 16


def test_a_part_of_a_larger_storage_does_not_bring_the_rest_along():
    merged = merge_adapters([adapter("a", 0), adapter("b", 1)], MergeConfig(rank=4))
    part = LoraAdapter("part", {"q_proj": merged.modules["q_proj"]})
    packed = PackedAdapter.pack(part)
    assert_same(packed.unpack(), part)
    assert packed.nbytes < merged.nbytes


def test_a_copy_in_parts_is_the_whole(monkeypatch):
    source = adapter("a", 0)
    packed = PackedAdapter.pack(source)
    monkeypatch.setattr(packing, "_BYTES_AT_ONCE", 64)
    assert packed.nbytes > 2 * 64
    assert packed.nbytes % 64
    block = torch.empty(packed.nbytes, dtype=torch.uint8)
    kept = packed.in_host_memory(block)
    assert kept.buffer is block
    assert_same(kept.unpack(), source)


def test_a_buffer_may_be_a_part_of_larger_memory():
    source = adapter("a", 0)
    packed = PackedAdapter.pack(source)
    memory = torch.zeros(packed.nbytes + 1024, dtype=torch.uint8)
    assert_same(packed.in_host_memory(memory[512 : 512 + packed.nbytes]).unpack(), source)


def test_a_buffer_need_not_be_whole_items_of_its_widest_dtype():
    memory = torch.arange(9, dtype=torch.float32)
    a, b = memory[:8].view(torch.float64).view(1, 4), memory[8:].view(1, 1)
    source = LoraAdapter("a", {"q_proj": LoraModule(a, b)})
    packed = PackedAdapter.pack(source)
    assert packed.nbytes == 36
    assert_same(packed.unpack(), source)
