"""Rules for one factor on the whole merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lego_core import LegoError, LoraAdapter, LoraModule, MergeConfig, merge_adapters
from tests import references, strategies
from tests.core.members import (
    EVERY_METHOD,
    WEIGHTS,
    assert_identical,
    assert_same,
    config_of,
    members_of,
    merged_with,
)
from tests.references import Array

RULES = ("strength", "norm", "nearest")
Weighted = tuple[list[LoraAdapter], list[float]]


def times(adapter: LoraAdapter, gain: float) -> LoraAdapter:
    """With the same digest, so that the canonical order stays."""
    scaled = {
        n: dataclasses.replace(m, scaling=m.scaling * gain) for n, m in adapter.modules.items()
    }
    return dataclasses.replace(adapter, modules=scaled)


def flat(adapter: LoraAdapter, shapes: Mapping[str, LoraModule], weight: float = 1.0) -> Array:
    """All updates of an adapter, one behind the other; zeros for modules that it does not touch."""
    return np.concatenate(
        [
            weight * references.delta(adapter.modules[name]).ravel()
            if name in adapter.modules
            else np.zeros(like.in_features * like.out_features)
            for name, like in shapes.items()
        ]
    )


def gain_of(rule: str, merged: Array, members: Sequence[Array], weights: Sequence[float]) -> float:
    """The factor from dense vectors, by what the rule is for rather than by its formula."""
    total = np.sum(members, axis=0)
    roots = np.sqrt(np.abs(weights))
    lengths = np.array([np.linalg.norm(d) for d in members])
    if rule == "norm":
        gain = np.sqrt(np.average(lengths**2, weights=np.abs(weights))) / np.linalg.norm(merged)
    else:  # weighted least squares against the members, or only along them
        rows, wanted = np.tile(merged, (len(members), 1)), np.array(members)
        if rule == "strength":
            along = wanted / lengths[:, None]
            rows, wanted = (rows * along).sum(axis=1)[:, None], lengths[:, None]
        rows, wanted = (roots[:, None] * rows).ravel(), (roots[:, None] * wanted).ravel()
        gain = np.linalg.lstsq(rows[:, None], wanted, rcond=None)[0][0]
    longest = float(np.linalg.norm(total) / np.linalg.norm(merged))
    return max(0.0, min(float(gain), longest))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_merge_is_the_unscaled_one_times_the_factor(method: str, rule: str, seed: int) -> None:
    adapters = members_of(method, seed)
    plain, report = merged_with(method, adapters)
    scaled, other = merged_with(method, adapters, config=config_of(method, scale=rule))
    members = [flat(a, plain.modules, w) for a, w in zip(adapters, WEIGHTS, strict=True)]
    gain = gain_of(rule, flat(plain, plain.modules), members, WEIGHTS)
    assert_same(scaled, times(plain, gain), 1e-9)
    assert {m.scaling for m in scaled.modules.values()} == {1.0}
    for name, module in other.modules.items():
        assert module.cluster_sizes == report.modules[name].cluster_sizes
        if gain:
            assert module.fidelity == pytest.approx(report.modules[name].fidelity, abs=1e-9)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_no_rule_is_no_change(method: str) -> None:
    adapters = members_of(method)
    plain, _ = merged_with(method, adapters)
    scaled, _ = merged_with(method, adapters, config=config_of(method, scale="none"))
    assert_identical(scaled, plain)


EXACT = ("lego-functions", "svd", "concat", "core_space")
ALL = [(method, {"density": 1.0} if method == "core_space" else {}) for method in EXACT]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize(("method", "options"), ALL)
def test_equal_members_give_the_member(
    method: str, options: dict[str, float], copies: int, rule: str
) -> None:
    adapter = strategies.adapter("a", 3, 3, scaling=2.0, in_features=13, out_features=11)
    renamed = [LoraAdapter(f"copy-{i}", adapter.modules) for i in range(copies)]
    config = MergeConfig(method=method, rank=15, scale=rule, **options)
    assert_same(merge_adapters(renamed, config), adapter, 1e-9)


@pytest.mark.parametrize(
    ("rule", "power"), [("none", 0.0), ("strength", 0.0), ("norm", 0.5), ("nearest", 1.0)]
)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_orthogonal_members_give_their_sum_over_a_power_of_their_number(
    count: int, rule: str, power: float
) -> None:
    """Whatever their norms."""
    eye = torch.eye(2 * count, dtype=torch.float64)
    adapters = [
        LoraAdapter(f"{t}", {"q": LoraModule((t + 1) * eye[at], eye[:, at])})
        for t in range(count)
        for at in [slice(2 * t, 2 * t + 2)]
    ]
    for method in ("concat", "svd", "lego-functions"):
        found = merge_adapters(adapters, MergeConfig(method=method, rank=2 * count, scale=rule))
        exact = merge_adapters(adapters, MergeConfig(method="concat", rank=2 * count))
        assert_same(found, times(exact, count**-power), 1e-9)


@given(
    weighted=strategies.weighted_sets(),
    rule=st.sampled_from(RULES),
    rank=st.integers(1, 14),
    method=st.sampled_from(["lego", "lego-functions", "svd"]),
)
def test_no_merge_is_longer_than_the_sum_or_turned_around(
    weighted: Weighted, rule: str, rank: int, method: str
) -> None:
    adapters, weights = weighted
    plain, before = merge_adapters(
        adapters, MergeConfig(method=method, rank=rank), weights=weights, report=True
    )
    config = MergeConfig(method=method, rank=rank, scale=rule)  # type: ignore[arg-type]
    found, after = merge_adapters(adapters, config, weights=weights, report=True)
    exact = np.sum(
        [flat(a, plain.modules, w) for a, w in zip(adapters, weights, strict=True)], axis=0
    )
    vector, unscaled = flat(found, plain.modules), flat(plain, plain.modules)
    assert np.linalg.norm(vector) <= np.linalg.norm(exact) * (1 + 1e-9)
    assert vector @ unscaled >= 0
    if rule == "nearest" and len(set(weights)) == 1 and before.fidelity > 0:
        longest = before.fidelity * np.linalg.norm(exact) / len(weights)
        assert np.linalg.norm(vector) == pytest.approx(longest)
    if vector.any():
        assert after.fidelity == pytest.approx(before.fidelity, abs=1e-9)


@given(weighted=strategies.weighted_sets(), factor=st.sampled_from([0.1, 3.0, 100.0]))
@pytest.mark.parametrize("rule", RULES)
def test_common_factor_of_the_weights_scales_the_merge(
    rule: str, weighted: Weighted, factor: float
) -> None:
    adapters, weights = weighted
    config = MergeConfig(method="svd", rank=4, scale=rule)  # type: ignore[arg-type]
    plain = merge_adapters(adapters, config, weights=weights)
    found = merge_adapters(adapters, config, weights=[factor * w for w in weights])
    assert_same(found, times(plain, factor), 1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_member_fades_out_with_its_weight(rule: str) -> None:
    adapters = [strategies.adapter(f"{i}", i, 4, in_features=40, out_features=30) for i in range(3)]
    config = MergeConfig(method="svd", rank=12, scale=rule)  # type: ignore[arg-type]
    alone = merge_adapters(adapters[:2], config)
    faint = merge_adapters(adapters, config, weights=[1, 1, 1e-6])
    assert_same(faint, alone, 1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_members_that_cancel_give_no_magnified_rounding(method: str, rule: str) -> None:
    module = strategies.module(0, 3, 13, 11, dtype=torch.float32)
    adapters = [LoraAdapter(name, {"q": module}) for name in "ab"]
    config = config_of(method, scale=rule)
    merged = merge_adapters(adapters, config, weights=[1, -1])
    size = np.linalg.norm(references.delta(module))
    assert np.linalg.norm(references.delta(merged.modules["q"])) < 1e-6 * size


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_all_weights_0_give_the_zero_adapter(method: str, rule: str) -> None:
    config = config_of(method, scale=rule)
    merged, report = merged_with(method, members_of(method), config=config, weights=[0, 0, 0])
    assert not any(module.delta().any() for module in merged.modules.values())
    assert report.fidelity == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_scaled_merge_is_rounded_once(rule: str, dtype: torch.dtype) -> None:
    adapters = members_of("svd", dtype=dtype)
    config = config_of("svd", scale=rule)
    narrow, _ = merged_with("svd", adapters, config=config)
    wide, _ = merged_with("svd", adapters, config=config, dtype=torch.float32)
    for name, module in narrow.modules.items():
        assert torch.equal(module.lora_a, wide.modules[name].lora_a.to(dtype))
        assert torch.equal(module.lora_b, wide.modules[name].lora_b.to(dtype))


def test_member_has_one_strength_in_all_modules() -> None:
    """Also in those that it does not share."""
    both, one = strategies.module(0, 2, 13, 11), strategies.module(1, 2, 13, 11)
    adapters = [LoraAdapter("a", {"q": both, "k": both}), LoraAdapter("b", {"q": one})]
    for rule in RULES:
        plain, scaled = (
            merge_adapters(adapters, MergeConfig(method="svd", rank=4, scale=scale))  # type: ignore[arg-type]
            for scale in ("none", rule)
        )
        ratios = [
            float(np.linalg.norm(scaled.modules[name].delta()) / np.linalg.norm(m.delta()))
            for name, m in plain.modules.items()
        ]
        assert ratios[0] == pytest.approx(ratios[1])


@pytest.mark.parametrize("size", [1e-100, 1e100, 1e200, 1e300])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_numbers_of_any_size_are_scaled_or_refused(method: str, rule: str, size: float) -> None:
    adapters = [times(adapter, size) for adapter in members_of(method)]
    config = config_of(method, scale=rule)
    try:
        merged, _ = merged_with(method, adapters, config=config)
    except LegoError as error:
        assert "overflow" in str(error)  # noqa: PT017
        assert size > 1
    else:
        plain, _ = merged_with(method, members_of(method), config=config)
        root = size**0.5
        again = LoraAdapter(
            "again",
            {
                n: dataclasses.replace(m, lora_a=m.lora_a / root, lora_b=m.lora_b / root)
                for n, m in merged.modules.items()
            },
        )
        assert_same(again, plain, 1e-7)
