"""A `MergeConfig` is checked when it is built."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lego_core import ConfigError, MergeConfig
from lego_core.config import SCALE_NAMES
from lego_core.methods import METHODS
from tests import strategies

BAD_FIELDS = [
    ("method", "lega"),
    ("method", ""),
    ("method", None),
    ("method", ["lego"]),
    ("rank", 0),
    ("rank", -1),
    ("rank", 513),
    ("rank", True),
    ("rank", 8.0),
    ("rank", "8"),
    ("rank", None),
    ("balance", 1),
    ("balance", "true"),
    ("scale", "sum"),
    ("scale", ["norm"]),
    ("scale", 0.5),
    ("density", 0),
    ("density", 1.5),
    ("density", True),
    ("density", float("nan")),
    ("align_sign", 0),
    ("parameter_reweighting", "l1"),
    ("parameter_reweighting", False),
    ("parameter_reweighting", 2),
    ("output_reweighting", "off"),
    ("restarts", 0),
    ("restarts", 65),
    ("restarts", 1.5),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", True),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_bad_field_is_refused_by_name_and_value(field: str, value: object) -> None:
    fields: dict[str, Any] = {field: value}
    if field == "density":
        fields["method"] = "ties"
    for build in (lambda: MergeConfig(**fields), lambda: MergeConfig.from_mapping(fields)):
        with pytest.raises(ConfigError) as caught:
            build()
        assert caught.value.param == field
        assert field in str(caught.value)
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"rank": 1}, {"rank": 512}, {"restarts": 1}, {"restarts": 64}, {"seed": 2**63 - 1}],
)
def test_bounds_themselves_are_allowed(fields: dict[str, Any]) -> None:
    assert MergeConfig(**fields).as_dict().items() >= fields.items()


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("svd", "restarts", 4),
        ("lego-paper", "balance", True),
        ("lego", "density", 0.2),
        ("lego", "normalize", True),
        ("lego-functions", "balance", True),
    ],
)
def test_option_of_another_method_is_refused(method: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is .* {method} has no such option") as caught:
        MergeConfig.from_mapping({"method": method, field: value})
    assert caught.value.param == field


def test_another_method_than_the_default_takes_its_own_options_and_the_rank() -> None:
    defaults = MergeConfig(rank=8, restarts=7, seed=3)
    changed = MergeConfig.from_mapping({"method": "ties"}, defaults)
    assert changed == MergeConfig(method="ties", rank=8)
    assert changed.as_dict() == {"method": "ties", "rank": 8, "density": 0.2}


@pytest.mark.parametrize("method", METHODS)
def test_scale_is_an_option_of_every_method_and_left_out_where_there_is_none(method: str) -> None:
    plain = MergeConfig(method=method)
    assert plain == MergeConfig(method=method, scale="none")
    assert "scale" not in plain.as_dict()
    for rule in SCALE_NAMES:
        config = MergeConfig(method=method, scale=rule)
        assert MergeConfig.from_mapping(config.as_dict()) == config
        assert config.as_dict().get("scale", "none") == rule


def test_null_is_no_way_to_leave_a_field_out() -> None:
    with pytest.raises(ConfigError, match="align_sign is None"):
        MergeConfig.from_mapping({"align_sign": None})


def test_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'rang'.*rank") as caught:
        MergeConfig.from_mapping({"rang": 8})
    assert caught.value.param == "rang"


def test_from_mapping_takes_the_rest_from_the_defaults() -> None:
    defaults = MergeConfig(rank=8, seed=7)
    assert MergeConfig.from_mapping({"rank": 4}, defaults) == MergeConfig(rank=4, seed=7)
    assert MergeConfig.from_mapping({}, defaults) == defaults
    assert MergeConfig.from_mapping({}) == MergeConfig()


@given(config=strategies.configs())
def test_as_dict_and_from_mapping_are_inverse(config: MergeConfig) -> None:
    assert MergeConfig.from_mapping(config.as_dict()) == config
    assert hash(MergeConfig.from_mapping(config.as_dict())) == hash(config)


@given(
    field=st.sampled_from([field.name for field in dataclasses.fields(MergeConfig)]),
    value=strategies.json_values,
)
def test_any_json_value_gives_a_config_or_a_config_error(field: str, value: object) -> None:
    try:
        config = MergeConfig.from_mapping({field: value})
    except ConfigError as error:
        assert error.param == field  # noqa: PT017
    else:
        assert getattr(config, field) == value


def test_every_allowed_method_is_in_the_table() -> None:
    for name in METHODS:
        assert MergeConfig.from_mapping({"method": name}).method == name


@pytest.mark.parametrize("fields", [{"x" * 10**6: 1}, {"method": "x" * 10**6}, {"seed": 10**9000}])
def test_messages_do_not_echo_a_megabyte(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        MergeConfig.from_mapping(fields)
    assert len(str(caught.value)) < 400
    assert len(caught.value.param or "") <= 100
