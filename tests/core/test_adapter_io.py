"""Reading PEFT folders: what is loaded, and what is refused with which words."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lego_core import (
    AdapterChangedError,
    AdapterFormatError,
    AdapterNotFoundError,
    LegoError,
    describe_adapter,
    load_adapter,
)
from lego_core.adapter_files import INDEX_FILE
from lego_core.adapter_io import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, parse_config
from tests import strategies

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
Q_PROJ = "model.layers.0.self_attn.q_proj"
A_KEY = f"base_model.model.{Q_PROJ}.lora_A.weight"
B_KEY = f"base_model.model.{Q_PROJ}.lora_B.weight"


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    module = strategies.module(0, 2, dtype=dtype)
    return {A_KEY: module.lora_a, B_KEY: module.lora_b}


def write(folder: Path, config: Any = CONFIG, weights: Any = None) -> Path:
    """Write an adapter named `sql`; each half as bytes, or as what is to be encoded."""
    path = folder / "sql"
    path.mkdir(exist_ok=True)
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    (path / CONFIG_FILE).write_bytes(content)
    weights = tensors() if weights is None else weights
    (path / WEIGHTS_FILE).write_bytes(weights if isinstance(weights, bytes) else save(weights))
    return path


def refusal(path: Path, error: type[LegoError] = AdapterFormatError) -> str:
    with pytest.raises(error) as caught:
        load_adapter(path)
    assert type(caught.value) is error
    assert "'sql'" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_loads_tensors_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = load_adapter(write(tmp_path, weights=tensors(dtype)))
    assert adapter.name == "sql"
    assert list(adapter.modules) == [Q_PROJ]
    assert adapter.dtype == dtype
    assert torch.equal(adapter.modules[Q_PROJ].lora_a, tensors(dtype)[A_KEY])
    assert torch.equal(adapter.modules[Q_PROJ].lora_b, tensors(dtype)[B_KEY])
    assert adapter.modules[Q_PROJ].scaling == 2


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"lora_alpha": 3.5}, 1.75),
        ({"alpha_pattern": {"q_proj": 8}}, 4.0),
        ({"alpha_pattern": {"v_proj": 8}}, 2.0),
        ({"alpha_pattern": {"proj": 8}}, 2.0),
        ({"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 8}}, 4.0),
        ({"alpha_pattern": {r".*\.0\..*": 8, "q_proj": 6}}, 4.0),
        ({"r": 8, "rank_pattern": {"q_proj": 2}}, 2.0),
        ({"r": 8, "rank_pattern": {"q_proj": 2}, "use_rslora": True}, 4 / 2**0.5),
    ],
)
def test_scaling_follows_the_configuration(
    tmp_path: Path, fields: dict[str, Any], scaling: float
) -> None:
    adapter = load_adapter(write(tmp_path, CONFIG | fields))
    assert adapter.modules[Q_PROJ].scaling == pytest.approx(scaling, rel=1e-15)


def test_digest_covers_configuration_and_weights(tmp_path: Path) -> None:
    digest = load_adapter(write(tmp_path)).digest
    assert load_adapter(write(tmp_path), digest=digest).digest == digest
    other = {key: 2 * tensor for key, tensor in tensors().items()}
    digests = {
        digest,
        load_adapter(write(tmp_path, weights=other)).digest,
        load_adapter(write(tmp_path, CONFIG | {"lora_alpha": 8})).digest,
    }
    assert len(digests) == 3


def test_digest_knows_where_the_configuration_ends(tmp_path: Path) -> None:
    config = json.dumps(CONFIG).encode()
    digests = {
        describe_adapter(write(tmp_path, config, b" rest"))[1],
        describe_adapter(write(tmp_path, config + b" ", b"rest"))[1],
    }
    assert len(digests) == 2


def test_changed_content_is_refused(tmp_path: Path) -> None:
    digest = load_adapter(write(tmp_path)).digest
    path = write(tmp_path, CONFIG | {"lora_alpha": 8})
    with pytest.raises(AdapterChangedError, match=f"'sql' changed.*{digest[:12]}"):
        load_adapter(path, digest=digest)


@pytest.mark.parametrize("in_shards", [True, False])
def test_content_that_is_known_is_read_without_hashing(tmp_path: Path, *, in_shards: bool) -> None:
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(9, 4)}  # skipped
    path = write(tmp_path, weights=copy | tensors())
    if in_shards:
        (path / WEIGHTS_FILE).rename(path / "part.safetensors")
        shards = {"weight_map": dict.fromkeys(copy | tensors(), "part.safetensors")}
        (path / INDEX_FILE).write_text(json.dumps(shards))
    seen: list[tuple[str, int]] = []

    def observe(file: str, status: os.stat_result) -> None:
        seen.append((file, status.st_ino))

    adapter = load_adapter(path, digest="as told", trust_digest=True, observe=observe)
    assert adapter.digest == "as told"
    whole = [(file.name, file.stat().st_ino) for file in path.iterdir()]
    assert sorted(seen) == sorted(whole), "all that is read"
    describe_adapter(path, observe=observe)
    assert sorted(seen) == sorted(whole * 2)
    module = adapter.modules[Q_PROJ]
    assert torch.equal(module.lora_a, tensors()[A_KEY])
    assert torch.equal(module.lora_b, tensors()[B_KEY])
    with pytest.raises(ValueError, match="needs a digest"):
        load_adapter(path, trust_digest=True)


@pytest.mark.parametrize("has_room", [True, False])
def test_reads_into_the_room_that_is_given(tmp_path: Path, *, has_room: bool) -> None:
    path, rooms = write(tmp_path), []

    def room(nbytes: int) -> torch.Tensor | None:
        rooms.append(torch.empty(nbytes, dtype=torch.uint8))
        return rooms[0] if has_room else None

    adapter, expected = load_adapter(path, room=room), load_adapter(path)
    [given] = rooms
    assert given.nbytes == sum(tensor.nbytes for tensor in tensors().values())
    module, alike = adapter.modules[Q_PROJ], expected.modules[Q_PROJ]
    for half, same in ((module.lora_a, alike.lora_a), (module.lora_b, alike.lora_b)):
        start = half.data_ptr() - given.data_ptr()
        assert (0 <= start < given.nbytes) == has_room
        assert torch.equal(half, same)
    assert adapter.digest == expected.digest


def test_shards_ask_for_no_room(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / WEIGHTS_FILE).rename(path / "part.safetensors")
    shards = {"weight_map": dict.fromkeys(tensors(), "part.safetensors")}
    (path / INDEX_FILE).write_text(json.dumps(shards))
    rooms: list[int] = []
    adapter = load_adapter(path, room=rooms.append)
    assert not rooms
    assert torch.equal(adapter.modules[Q_PROJ].lora_a, tensors()[A_KEY])


def test_describe_agrees_with_load(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG | {"base_model_name_or_path": "org/model"})
    config, digest, size_bytes = describe_adapter(path)
    adapter = load_adapter(path)
    assert digest == adapter.digest
    assert config.base_model == adapter.base_model == "org/model"
    assert config.target_modules == ("q_proj",)
    assert (config.rank, config.alpha) == (2, 4)
    assert size_bytes == (path / WEIGHTS_FILE).stat().st_size


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices [1, 2]"),
        ({"target_parameters": ["w"]}, "target_parameters ['w']"),
        ({"layer_replication": [[0, 2]]}, "layer_replication [[0, 2]]"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens [1]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"r": 0}, "r 0"),
        ({"r": -2}, "r -2"),
        ({"r": 2.0}, "r 2.0"),
        ({"r": True}, "r True"),
        ({"r": None}, "r None"),
        ({"lora_alpha": "4"}, "lora_alpha '4'"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"rank_pattern": [1]}, "rank_pattern [1]"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] 0"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj'] 'x'"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern key '('"),
    ],
)
def test_configuration_is_refused_by_adapter_field_and_value(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    message = refusal(write(tmp_path, CONFIG | fields))
    assert CONFIG_FILE in message
    assert named in message


def test_lora_ga_is_refused(tmp_path: Path) -> None:
    assert "lora_ga" in refusal(write(tmp_path, CONFIG | {"init_lora_weights": "lora_ga"}))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_keep_the_base_model_are_accepted(tmp_path: Path, init: Any) -> None:
    assert load_adapter(write(tmp_path, CONFIG | {"init_lora_weights": init})).rank == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\xff",
        json.dumps(CONFIG).encode("utf-16"),
        b"[" * 100_000,
        b"9" * 5000,
        b'{"r": 1, "r": 2}',
        b'{"x": [{"y": 1, "y": 1}]}',
        b'{"x": "\\ud800"}',
    ],
)
def test_configuration_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    assert "is not JSON" in refusal(write(tmp_path, content))


@pytest.mark.parametrize("content", [b"[]", b"null", b"1", b'"LORA"'])
def test_configuration_that_is_not_an_object(tmp_path: Path, content: bytes) -> None:
    assert "is not a JSON object" in refusal(write(tmp_path, content))


def test_configuration_of_absurd_size(tmp_path: Path) -> None:
    padded = json.dumps(CONFIG).encode() + b" " * MAX_CONFIG_BYTES
    assert "larger than" in refusal(write(tmp_path, padded))


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 10**400},
        {"r": 10**400},
        {"r": 10**400, "use_rslora": True},
        {"rank_pattern": {"q_proj": 10**400}},
        {"alpha_pattern": {"q_proj": 10**400}},
        {"target_modules": 5},
        {"target_modules": True},
        {"rank_pattern": {"a{99999999999999999999}": 2}},
        {"rank_pattern": {"(" * 5000 + ")" * 5000: 2}},
        {"rank_pattern": {"(?i)q_proj": 2}},
    ],
    ids="-".join,
)
def test_hostile_configuration_gives_nothing_but_a_format_error(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    refusal(write(tmp_path, CONFIG | fields))


@pytest.mark.parametrize(
    "key", ["(a+)+b", "(a|a)*b", "(ab){2,}", "a" * 257, ".*.*.*.*z", "a?" * 30, "(a|a)" * 30]
)
def test_hostile_pattern_is_refused(tmp_path: Path, key: str) -> None:
    assert "rank_pattern" in refusal(write(tmp_path, CONFIG | {"rank_pattern": {key: 2}}))


@pytest.mark.parametrize(("missing", "half"), [(A_KEY, "lora_A"), (B_KEY, "lora_B")])
def test_missing_half_is_named(tmp_path: Path, missing: str, half: str) -> None:
    weights = tensors()
    del weights[missing]
    message = refusal(write(tmp_path, weights=weights))
    assert f"{Q_PROJ!r}: {half} is missing" in message


@pytest.mark.parametrize(("key", "half"), [(A_KEY, "lora_A"), (B_KEY, "lora_B")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(tmp_path: Path, key: str, half: str, value: float) -> None:
    weights = tensors()
    weights[key][1, 1] = value
    assert f"{Q_PROJ!r}: {half} holds NaN or Inf" in refusal(write(tmp_path, weights=weights))


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        (torch.int8, "I8"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_weights_of_other_dtypes(tmp_path: Path, dtype: torch.dtype, named: str) -> None:
    weights = tensors()
    weights[A_KEY] = torch.zeros(2, 7).to(dtype)
    message = refusal(write(tmp_path, weights=weights))
    assert f"{Q_PROJ!r}: lora_A is {named};" in message


def test_rank_of_the_weights_must_be_that_of_the_configuration(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, CONFIG | {"r": 3}))
    assert f"{Q_PROJ!r}" in message
    assert "says rank 3, lora_A has 2 rows" in message


def test_halves_of_different_ranks(tmp_path: Path) -> None:
    weights = tensors() | {B_KEY: torch.ones(5, 3)}
    message = refusal(write(tmp_path, weights=weights))
    assert f"{Q_PROJ!r}" in message
    assert "[2, 7]" in message
    assert "[5, 3]" in message


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.weight",
        f"base_model.model.{Q_PROJ}.lora_magnitude_vector.weight",
        f"base_model.model.{Q_PROJ}.lora_B.bias",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        f"base_model.model.{Q_PROJ}.base_layer.weight",
        "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight",
        "base_model.model..lora_A.weight",
    ],
)
def test_tensor_that_is_no_lora_weight_is_named(tmp_path: Path, key: str) -> None:
    assert repr(key) in refusal(write(tmp_path, weights=tensors() | {key: torch.ones(2)}))


def test_module_given_twice_is_refused(tmp_path: Path) -> None:
    twice = {A_KEY.removeprefix("base_model.model."): torch.ones(2, 7)}
    assert Q_PROJ in refusal(write(tmp_path, weights=tensors() | twice))


def test_adapter_without_tensors(tmp_path: Path) -> None:
    assert "has no LoRA modules" in refusal(write(tmp_path, weights={}))


def test_missing_folder_and_files_are_not_found(tmp_path: Path) -> None:
    assert CONFIG_FILE in refusal(tmp_path / "sql", AdapterNotFoundError)
    path = write(tmp_path)
    (path / WEIGHTS_FILE).unlink()
    assert WEIGHTS_FILE in refusal(path, AdapterNotFoundError)
    (path / "adapter_model.bin").touch()
    assert "convert" in refusal(path, AdapterNotFoundError)


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / WEIGHTS_FILE).unlink()
    (path / WEIGHTS_FILE).mkdir()
    assert WEIGHTS_FILE in refusal(path)


@pytest.mark.parametrize("source", [None, 5, b"sql"])
def test_source_of_another_type_is_not_found(source: Any) -> None:
    with pytest.raises(AdapterNotFoundError, match="neither a path"):
        load_adapter(source)


def test_name_in_messages_can_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="'style'"):
        load_adapter(tmp_path, name="style")
    assert load_adapter(write(tmp_path), name="style").name == "style"


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_weights(tmp_path: Path, keep: int) -> None:
    weights = save(tensors())[:keep]
    assert "not a readable safetensors file" in refusal(write(tmp_path, weights=weights))


def test_what_is_remembered_of_a_header_is_that_headers_alone(tmp_path: Path) -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.arange(10.0).view(5, 2)
    path = write(tmp_path, weights={A_KEY: a, B_KEY: b})
    for factor in 1, -1:  # the same header twice
        module = load_adapter(write(tmp_path, weights={A_KEY: a * factor, B_KEY: b})).modules[
            Q_PROJ
        ]
        assert torch.equal(module.lora_a, a * factor)
        assert torch.equal(module.lora_b, b)
    # As many bytes of header and of data, and what is in them is not the same.
    module = load_adapter(write(tmp_path, weights={A_KEY: b.view(2, 5), B_KEY: a.view(3, 2)}))
    assert torch.equal(module.modules[Q_PROJ].lora_a, b.view(2, 5))
    weights = path / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterFormatError, match=r"adapter .style.: .* bytes, its header says"):
        load_adapter(path, name="style")


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_forged_header_length(tmp_path: Path, length: int) -> None:
    weights = struct.pack("<Q", length) + save(tensors())[8:]
    assert "not a readable safetensors file" in refusal(write(tmp_path, weights=weights))


@given(content=st.binary(max_size=200))
def test_any_bytes_as_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    refusal(write(tmp_path, weights=content))


@given(position=st.integers(0, 300), value=st.integers(0, 255))
@settings(max_examples=150)
def test_any_flipped_byte_loads_or_is_refused(tmp_path: Path, position: int, value: int) -> None:
    weights = bytearray(save(tensors()))
    weights[position % len(weights)] = value
    path = write(tmp_path, weights=bytes(weights))
    try:
        load_adapter(path)
    except LegoError as error:
        assert "'sql'" in str(error)  # noqa: PT017


@given(content=st.binary(max_size=200))
def test_any_bytes_as_configuration_are_refused(content: bytes) -> None:
    with pytest.raises(AdapterFormatError, match="'sql'"):
        parse_config(content, "sql")


@given(
    field=st.sampled_from(
        [
            *CONFIG,
            "alpha_pattern",
            "base_model_name_or_path",
            "bias",
            "init_lora_weights",
            "modules_to_save",
            "rank_pattern",
            "use_dora",
            "use_rslora",
        ]
    ),
    value=strategies.json_values,
)
@settings(max_examples=150)
def test_any_value_of_a_field_is_taken_or_refused(field: str, value: object) -> None:
    try:
        config = parse_config(json.dumps(CONFIG | {field: value}).encode(), "sql")
        config.scaling_of(Q_PROJ)
    except AdapterFormatError as error:
        assert "'sql'" in str(error)  # noqa: PT017
