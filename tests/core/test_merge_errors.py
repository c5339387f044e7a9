"""What cannot be merged, and what the message says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lego_core import (
    AdapterFormatError,
    ConfigError,
    IncompatibleAdaptersError,
    LegoError,
    LoraAdapter,
    LoraModule,
    merge_adapters,
    save_adapter,
)
from tests import strategies


def on_base(name: str, base_model: str | None) -> LoraAdapter:
    return LoraAdapter(name, strategies.adapter(name, 0, 2).modules, base_model=base_model)


def test_no_adapters() -> None:
    with pytest.raises(ConfigError, match="no adapters"):
        merge_adapters([])


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0, 1.0]])
def test_wrong_number_of_weights(weights: list[float]) -> None:
    adapters = [strategies.adapter("a", 0, 2), strategies.adapter("b", 1, 2)]
    with pytest.raises(ConfigError, match=f"2 adapters but {len(weights)} weights"):
        merge_adapters(adapters, weights=weights)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_names_the_adapter(weight: float) -> None:
    adapters = [strategies.adapter("sql", 0, 2), strategies.adapter("style", 1, 2)]
    with pytest.raises(ConfigError, match=f"'style' has weight {weight}"):
        merge_adapters(adapters, weights=[1.0, weight])


@pytest.mark.parametrize("weight", ["1", None, [1.0], 10**400], ids=["str", "None", "list", "huge"])
def test_weight_that_is_no_number_names_the_adapter(weight: Any) -> None:
    with pytest.raises(ConfigError, match="'sql'"):
        merge_adapters([strategies.adapter("sql", 0, 2)], weights=[weight])


def test_numbers_of_numpy_are_weights() -> None:
    adapters = [strategies.adapter("sql", 0, 2), strategies.adapter("style", 1, 2)]
    found = merge_adapters(iter(adapters), weights=np.array([1, -2], np.float32))  # type: ignore[arg-type]
    wanted = merge_adapters(adapters, weights=[1.0, -2.0])
    assert torch.equal(found.modules["q_proj"].lora_b, wanted.modules["q_proj"].lora_b)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((["sql"],), "'sql' is no LoraAdapter"),
        (([strategies.adapter("sql", 0, 2)], {"rank": 8}), "config is a dict"),
    ],
)
def test_arguments_of_other_types(arguments: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        merge_adapters(*arguments)


SOUND = strategies.module(0, 3, 3, 3)


@pytest.mark.parametrize(
    "module",
    [
        LoraModule(SOUND.lora_a.int(), SOUND.lora_b),
        LoraModule(SOUND.lora_a, SOUND.lora_b.to(torch.float8_e4m3fn)),
        LoraModule(SOUND.lora_a, SOUND.lora_b.to(torch.complex64)),
        LoraModule(SOUND.lora_a.to_sparse(), SOUND.lora_b),
        LoraModule(SOUND.lora_a.to("meta"), SOUND.lora_b.to("meta")),
        LoraModule(SOUND.lora_a, SOUND.lora_b.to("meta")),
        LoraModule(SOUND.lora_a, SOUND.lora_b, float("nan")),
        LoraModule(SOUND.lora_a, SOUND.lora_b, float("inf")),
    ],
    ids=["int", "float8", "complex", "sparse", "meta", "half meta", "nan", "inf"],
)
def test_modules_that_are_no_lora_are_neither_merged_nor_saved(
    tmp_path: Path, module: LoraModule
) -> None:
    for digest in ("", "0" * 64):
        adapter = LoraAdapter("sql", {"q_proj": module}, digest)
        with pytest.raises(AdapterFormatError, match=r"'sql', module 'q_proj'"):
            merge_adapters([adapter, strategies.adapter("style", 1, 2)])
    with pytest.raises(AdapterFormatError, match=r"'sql', module 'q_proj'"):
        save_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(8, 5), (7, 6)])
def test_shape_mismatch_names_both_adapters_the_module_and_the_shapes(
    shape: tuple[int, int],
) -> None:
    sql = strategies.adapter("sql", 0, 2)
    style = strategies.adapter("style", 1, 2, in_features=shape[0], out_features=shape[1])
    with pytest.raises(IncompatibleAdaptersError) as caught:
        merge_adapters([sql, style])
    message = str(caught.value)
    for part in ("'sql'", "'style'", "'q_proj'", "7", "5", str(shape[0]), str(shape[1])):
        assert part in message


def test_shape_mismatch_with_a_later_adapter_is_found() -> None:
    adapters = [strategies.adapter(name, 0, 2) for name in ("a", "b")]
    adapters.append(strategies.adapter("c", 0, 3, in_features=9))
    with pytest.raises(IncompatibleAdaptersError, match="'c'"):
        merge_adapters(adapters)


def test_different_hub_base_models_name_both() -> None:
    adapters = [on_base("a", None), on_base("sql", "org/one"), on_base("style", "org/two")]
    with pytest.raises(IncompatibleAdaptersError) as caught:
        merge_adapters(adapters)
    for part in ("'sql'", "'style'", "'org/one'", "'org/two'"):
        assert part in str(caught.value)


def test_paths_of_local_copies_are_not_compared() -> None:
    adapters = [
        on_base("a", "org/one"),
        on_base("b", "/models/one"),
        on_base("c", None),
        on_base("d", "org/one"),
    ]
    assert merge_adapters(adapters).base_model == "org/one"


@pytest.mark.parametrize("path", ["./one", "../one"])
def test_relative_paths_are_not_compared(path: str) -> None:
    assert merge_adapters([on_base("a", "org/one"), on_base("b", path)]).base_model == "org/one"


def test_adapter_of_weight_0_need_not_fit() -> None:
    other = strategies.adapter("other", 1, 2, in_features=9)
    merged = merge_adapters([strategies.adapter("a", 0, 2), other], weights=[1.0, 0.0])
    assert merged.modules["q_proj"].in_features == 7


@pytest.mark.parametrize(
    ("a", "b"), [((2, 7), (5, 3)), ((0, 7), (5, 0)), ((7,), (5, 1)), ((2, 7), (5, 2, 1)), ((), ())]
)
def test_shapes_that_are_no_lora_are_refused_when_built(
    a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    with pytest.raises(AdapterFormatError, match=r"'sql', module 'q_proj'.*lora_A") as caught:
        LoraAdapter("sql", {"q_proj": LoraModule(torch.ones(a), torch.ones(b))})
    assert str(list(a)) in str(caught.value)


def test_adapter_without_modules_is_refused() -> None:
    with pytest.raises(AdapterFormatError, match="'sql' has no LoRA modules"):
        LoraAdapter("sql", {})


@pytest.mark.parametrize("weight", [10.0, -10.0])
def test_result_that_overflows_is_an_error_not_nan(weight: float) -> None:
    huge = strategies.adapter("huge", 0, 2, scaling=1e308)
    with pytest.raises(LegoError, match="'huge'"):
        merge_adapters([huge], weights=[weight])


def test_layer_without_inputs_is_refused() -> None:
    with pytest.raises(AdapterFormatError, match="'a', module 'q_proj'"):
        strategies.adapter("a", 0, 2, in_features=0)
