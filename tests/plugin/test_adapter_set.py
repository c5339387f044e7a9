"""What requests can ask for, and what is refused."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lego.adapter_set import AdapterSet, names_none, parse_adapters, parse_model_name
from vllm_lego.errors import BadRequestError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6), children, max_size=3)
    ),
    max_leaves=8,
)


def parse(adapters: object, merge: object = None) -> AdapterSet:
    return parse_adapters(adapters, merge, max_adapters=4)


def test_names_and_weights():
    wanted = parse(["style", {"name": "sql", "weight": 0.7}, {"name": "a"}])
    assert wanted.weights == {"a": 1.0, "sql": 0.7, "style": 1.0}


def test_order_has_no_meaning():
    assert list(parse(["b", "a"]).weights) == list(parse(["a", "b"]).weights) == ["a", "b"]


def test_absent_null_and_empty_name_none():
    assert names_none(None)
    assert names_none([])
    assert not any(map(names_none, (["sql"], "", {}, 0, False)))


def test_a_weight_has_one_zero():
    signs = [repr(parse([{"name": "a", "weight": w}]).weights["a"]) for w in (0, 0.0, -0.0)]
    assert signs == ["0.0"] * 3


def test_messages_do_not_echo_a_megabyte():
    with pytest.raises(BadRequestError) as caught:
        parse(["x" * 1_000_000] * 2)
    assert len(str(caught.value)) < 300


def test_one_adapter_as_it_is_needs_no_merge():
    assert parse(["sql"]).is_single
    assert not parse([{"name": "sql", "weight": 0.5}]).is_single
    assert not parse(["sql"], {"rank": 4}).is_single
    assert not parse(["sql", "style"]).is_single


@pytest.mark.parametrize(
    ("adapters", "param", "says"),
    [
        ("sql", "adapters", "must be a list"),
        ({"sql": 1}, "adapters", "must be a list"),
        (["sql", "sql"], "adapters", "listed twice"),
        (["sql", {"name": "sql", "weight": 2}], "adapters", "listed twice"),
        (["a", "b", "c", "d", "e"], "adapters", "at most 4"),
        (["sql", 7], "adapters[1]", "not a number"),
        (["sql", None], "adapters[1]", "not null"),
        ([""], "adapters[0].name", "must be an adapter's name"),
        ([{"weight": 1}], "adapters[0].name", "must be an adapter's name"),
        ([{"name": "a", "wieght": 1}], "adapters[0].wieght", "unknown field 'wieght'"),
        ([{"name": "a", "weight": float("nan")}], "adapters[0].weight", "finite"),
        ([{"name": "a", "weight": float("-inf")}], "adapters[0].weight", "finite"),
        ([{"name": "a", "weight": 10**400}], "adapters[0].weight", "finite"),
        ([{"name": "a", "weight": "1"}], "adapters[0].weight", "finite"),
        ([{"name": "a", "weight": True}], "adapters[0].weight", "finite"),
        ([{"name": "a", "weight": None}], "adapters[0].weight", "finite"),
    ],
)
def test_malformed_sets_name_the_field(adapters, param, says):
    with pytest.raises(BadRequestError, match=r".") as caught:
        parse(adapters)
    assert caught.value.param == param
    assert says in str(caught.value)


def test_merge_must_be_an_object():
    with pytest.raises(BadRequestError, match="`merge` must be an object") as caught:
        parse(["a", "b"], ["lego"])
    assert caught.value.param == "merge"


@given(json_values, json_values)
def test_any_json_is_a_set_or_a_bad_request(adapters, merge):
    with suppress(BadRequestError):
        parse(adapters, merge)


def test_a_model_name_can_be_a_set():
    assert parse_model_name("sql+style", None, max_adapters=4) == parse(["style", "sql"])


@pytest.mark.parametrize("model", ["+", "a+", "+a", "a++b", "a+a", "a+b+c+d+e"])
def test_malformed_model_names(model):
    with pytest.raises(BadRequestError) as caught:
        parse_model_name(model, None, max_adapters=4)
    assert caught.value.param == "model"
