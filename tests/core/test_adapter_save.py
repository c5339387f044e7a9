"""Writing PEFT folders: what comes back, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given

from lego_core import (
    AdapterFormatError,
    LoraAdapter,
    MergeConfig,
    load_adapter,
    merge_adapters,
    merge_provenance,
    read_provenance,
    resolve_source,
    save_adapter,
)
from lego_core.adapter_io import CONFIG_FILE, WEIGHTS_FILE
from tests import references, strategies


@given(weighted=strategies.weighted_sets(), config=strategies.configs())
def test_saved_merge_loads_as_it_was(
    tmp_path: Path, weighted: tuple[list[LoraAdapter], list[float]], config: MergeConfig
) -> None:
    merged = merge_adapters(weighted[0], config, weights=weighted[1])
    save_adapter(merged, tmp_path / "out", overwrite=True)
    loaded = load_adapter(tmp_path / "out")
    assert list(loaded.modules) == list(merged.modules)
    for name, module in loaded.modules.items():
        assert torch.equal(module.lora_a, merged.modules[name].lora_a)
        assert torch.equal(module.lora_b, merged.modules[name].lora_b)
        assert module.scaling == 1


def test_saved_scaling_and_base_model_come_back(tmp_path: Path) -> None:
    adapter = LoraAdapter(
        "a", strategies.adapter("a", 0, 3, scaling=0.7).modules, base_model="org/model"
    )
    save_adapter(adapter, tmp_path / "deep" / "out")
    loaded = load_adapter(tmp_path / "deep" / "out")
    assert loaded.base_model == "org/model"
    error = references.relative_error(
        references.delta(loaded.modules["q_proj"]), references.delta(adapter.modules["q_proj"])
    )
    assert error < 1e-15


def test_saving_leaves_only_the_two_files(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_adapter(strategies.adapter("a", seed, 2), tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    wanted = strategies.module(1, 2).lora_a
    assert torch.equal(load_adapter(tmp_path).modules["q_proj"].lora_a, wanted)


@pytest.mark.parametrize(("ranks", "scalings"), [((2, 3), (1, 1)), ((2, 2), (1, 2))])
def test_saving_mixed_ranks_or_scalings_is_refused(
    tmp_path: Path, ranks: tuple[int, int], scalings: tuple[float, float]
) -> None:
    modules = {
        f"layers.{i}.q_proj": strategies.module(i, rank, scaling=scaling)
        for i, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True))
    }
    with pytest.raises(AdapterFormatError, match="'mixed'"):
        save_adapter(LoraAdapter("mixed", modules), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saved_files_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    save_adapter(strategies.adapter("a", 0, 2), tmp_path)
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    assert {(tmp_path / file).stat().st_mode for file in (CONFIG_FILE, WEIGHTS_FILE)} == {wanted}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_would_not_load_is_not_saved(tmp_path: Path, value: float) -> None:
    module = strategies.module(0, 2)
    module.lora_b[1, 1] = value
    with pytest.raises(AdapterFormatError, match=r"'sql', module 'q_proj': lora_B holds NaN"):
        save_adapter(LoraAdapter("sql", {"q_proj": module}), tmp_path / "out")
    with pytest.raises(AdapterFormatError, match="'sql' has a module without a name"):
        save_adapter(LoraAdapter("sql", {"": strategies.module(0, 2)}), tmp_path / "out")


def test_provenance_of_a_name_that_is_no_text_can_be_read(tmp_path: Path) -> None:
    adapter = LoraAdapter(os.fsdecode(b"caf\xe9"), {"q_proj": strategies.module(0, 2)})
    save_adapter(adapter, tmp_path, provenance=merge_provenance([adapter], MergeConfig()))
    assert load_adapter(tmp_path).modules.keys() == {"q_proj"}
    provenance = read_provenance(resolve_source(tmp_path))
    assert provenance is not None
    assert provenance["members"][0]["name"] == r"caf\udce9"


def test_modules_that_share_tensors_are_saved(tmp_path: Path) -> None:
    module = strategies.module(0, 2)
    save_adapter(LoraAdapter("tied", {"0.q_proj": module, "1.q_proj": module}), tmp_path)
    assert len(load_adapter(tmp_path).modules) == 2
