"""A merge's name says exactly what is in it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lego_core import MergeConfig
from vllm_lego.identity import MERGE_ID, engine_id, merge_id
from vllm_lego.recipe import Member, Recipe

MEMBERS = [("d1", 1.0), ("d2", 0.5)]
CONFIG = MergeConfig(rank=8)


def name(members=MEMBERS, config=CONFIG, base_model="base", dtype="bfloat16") -> str:
    return merge_id(tuple(members), config, base_model=base_model, dtype=dtype)


def test_it_is_lego_and_16_hex_digits():
    assert MERGE_ID.fullmatch(name())


def test_it_is_the_same_in_every_process():
    """Replicas and API servers must agree, so these change only with `ALGORITHM_VERSION`."""
    assert name() == "lego-a71decca3253fb3e"
    assert engine_id(name()) == 1_918_106_430


def test_the_order_of_the_members_does_not_matter():
    assert name(MEMBERS[::-1]) == name()


CHANGES = {
    "method": "svd",
    "rank": 9,
    "balance": False,
    "align_sign": False,
    "parameter_reweighting": "inf",
    "output_reweighting": False,
    "restarts": 5,
    "seed": 1,
    "density": 0.5,
    "normalize": True,
    "scale": "norm",
}
HAVING = {"density": "ties", "normalize": "lego-functions"}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(MergeConfig)])
def test_every_field_of_the_configuration_matters(field):
    config = MergeConfig(method=HAVING.get(field, "lego"), rank=8)
    changed = MergeConfig.from_mapping({field: CHANGES[field]}, config)
    assert name(config=changed) != name(config=config)


@pytest.mark.parametrize(
    "changed",
    [
        {"members": [("d1", 1.0), ("d3", 0.5)]},
        {"members": [("d1", 0.5), ("d2", 1.0)]},
        {"members": [("d1", 1.0)]},
        {"base_model": "other"},
        {"dtype": "float16"},
    ],
)
def test_everything_else_matters_too(changed):
    assert name(**changed) != name()


@given(st.lists(st.tuples(st.text(), st.floats(allow_nan=False, allow_infinity=False))))
def test_engine_ids_fit_an_int32_above_vllms_own(members):
    identity = name(members)
    assert 1 << 30 <= engine_id(identity) < 1 << 31


@given(
    st.lists(
        st.builds(
            Member,
            name=st.text(),
            path=st.text(),
            digest=st.text(),
            weight=st.floats(allow_nan=False, allow_infinity=False),
            stamp=st.text(max_size=2),
        ),
        max_size=4,
    )
)
def test_a_recipe_survives_its_journey(members):
    recipe = Recipe("lego-0123456789abcdef", tuple(members), CONFIG)
    found = Recipe.decode(recipe.encode())
    assert found == recipe
    assert [m.stamp for m in found.members] == [m.stamp for m in members]
    assert found.unstamped() == recipe, "the same merge"
    assert not any(m.stamp for m in found.unstamped().members)
