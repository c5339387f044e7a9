"""The fused kernels against the plain passes and the plain k-means, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":  # read when the kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels are written in Triton")

from lego_core import LoraAdapter, MergeConfig  # noqa: E402
from lego_core import kernels as fused  # noqa: E402
from lego_core.cluster import cluster_units, inertia  # noqa: E402
from lego_core.plan import Group, plan_merge  # noqa: E402
from lego_core.pool import Pool, TorchPool, Units  # noqa: E402
from lego_core.reassemble import centroids, fused_centroids  # noqa: E402
from lego_core.units import disassemble  # noqa: E402
from tests import strategies  # noqa: E402

RANKS = [(4,), (3, 5), (8, 16, 8), (40, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"down": (2120, 40), "k": (40, 72), "q": (40, 72)}  # two pieces of work, and one


def adapters(ranks: tuple[int, ...], dtype: torch.dtype) -> list[LoraAdapter]:
    return [
        LoraAdapter(
            f"adapter-{i}",
            {
                name: strategies.module(
                    10 * i + j, rank, *shape, scaling=0.5 * (j + 1), dtype=dtype
                )
                for j, (name, shape) in enumerate(SHAPES.items())
            },
        )
        for i, rank in enumerate(ranks)
    ]


def moved(members: list[LoraAdapter]) -> list[LoraAdapter]:
    return [
        strategies.map_modules(
            member,
            lambda m: type(m)(m.lora_a.to(DEVICE), m.lora_b.to(DEVICE), m.scaling),
        )
        for member in members
    ]


def pools(members: list[LoraAdapter]) -> tuple[Group, list[LoraAdapter], Pool, Pool]:
    here = moved(members)
    (group,) = plan_merge(here)
    exact = TorchPool(group, here, torch.float64, DEVICE)
    return group, here, fused.TritonPool(group, here, DEVICE), exact


def assert_close(found: torch.Tensor, wanted: torch.Tensor, bound: float = 2e-6) -> None:
    """Compare in the largest entry of the wanted: inner products cancel."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= bound * float(wanted.abs().max())


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_units_are_those_of_the_plain_pass(
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    balance: bool,  # noqa: FBT001
) -> None:
    _, here, quick, plain = pools(adapters(ranks, dtype))
    weights = [1.0, -0.5, 2.0][: len(ranks)]
    found, wanted = (
        disassemble(pool, here, weights, balance=balance, peaks=True) for pool in (quick, plain)
    )
    for name in ("coef_a", "coef_b", "gram_a", "gram_b", "peaks"):
        assert_close(getattr(found, name), getattr(wanted, name))
    assert torch.equal(found.gram_a, found.gram_a.mT)
    assert torch.equal(found.gram_b, found.gram_b.mT)


@pytest.mark.parametrize("k", [1, 7, 20, 80])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_mixtures_are_those_of_the_plain_pass(
    ranks: tuple[int, ...], dtype: torch.dtype, k: int
) -> None:
    group, _, quick, plain = pools(adapters(ranks, dtype))
    generator = torch.Generator().manual_seed(k)
    size = (2, len(group.names), k, group.n_units)
    weights = torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE)
    weights *= torch.logspace(-9, 9, k, dtype=torch.float64, device=DEVICE)[:, None]
    coefs = torch.rand(size[:2] + size[3:], generator=generator, dtype=torch.float64).to(DEVICE)
    found = quick.mix((weights[0], weights[1]), (coefs[0], coefs[1]), torch.float32)
    wanted = plain.mix((weights[0], weights[1]), (coefs[0], coefs[1]), torch.float64)
    assert found.is_finite()
    for (a, b), (wanted_a, wanted_b) in zip(found.blocks, wanted.blocks, strict=True):
        for c in range(k):
            assert_close(a[:, c], wanted_a[:, c], 5e-6)
            assert_close(b[:, :, c], wanted_b[:, :, c], 5e-6)


@pytest.mark.parametrize("huge", [1e30, float("nan")])
@pytest.mark.parametrize("half", [0, 1])
def test_a_mixture_that_overflows_is_found(half: int, huge: float) -> None:
    group, _, quick, _ = pools(adapters((8, 8), torch.float32))
    weights = torch.ones(2, len(group.names), 3, group.n_units, dtype=torch.float64, device=DEVICE)
    weights[half, -1, -1, -1] = huge
    coefs = torch.ones(len(group.names), group.n_units, dtype=torch.float64, device=DEVICE)
    assert not quick.mix((weights[0], weights[1]), (coefs, coefs), torch.float16).is_finite()


def units_of_products(gram: torch.Tensor, ranks: tuple[int, ...]) -> Units:
    """Units of which only the inner products matter."""
    _, _, quick, _ = pools(adapters(ranks, torch.float32))
    ones = torch.ones(gram.shape[:2], dtype=torch.float64, device=DEVICE)
    return Units(quick, ones, ones, 0.5 * gram, 0.5 * gram)


@pytest.mark.parametrize("norm", ["l2", "off"])
@pytest.mark.parametrize("align_sign", [False, True])
@pytest.mark.parametrize("k", [1, 5, 23])
@pytest.mark.parametrize("n_units", [24, 73])
def test_centroids_are_those_of_the_plain_clusters(
    n_units: int,
    k: int,
    align_sign: bool,  # noqa: FBT001
    norm: str,
) -> None:
    generator = torch.Generator().manual_seed(n_units + k)
    points = torch.randn(3, n_units, 7, generator=generator, dtype=torch.float64).to(DEVICE)
    points *= torch.tensor([1e-12, 1.0, 1e12], device=DEVICE)[:, None, None]
    config = MergeConfig.from_mapping(
        {"rank": k, "align_sign": align_sign, "parameter_reweighting": norm, "restarts": 3}
    )
    units = units_of_products(points @ points.mT, (n_units,))
    signs = cluster_units(points @ points.mT, k, align_sign=align_sign, restarts=3, seed=0)
    found, wanted = fused_centroids(units, config), centroids(units, signs, config)
    assert found.sizes is not None
    assert wanted.sizes is not None
    assert torch.equal(found.sizes, wanted.sizes)
    assert_close(found.a, wanted.a, 1e-5)
    assert_close(found.b, wanted.b, 1e-5)


@pytest.mark.parametrize("align_sign", [False, True])
@pytest.mark.parametrize("distinct", [1, 3, 10])
def test_equal_units_share_a_cluster(distinct: int, align_sign: bool) -> None:  # noqa: FBT001
    """Emptied clusters are filled while there are distinct units, and then left empty."""
    generator = torch.Generator().manual_seed(distinct)
    points = torch.randn(3, distinct, 6, generator=generator, dtype=torch.float64).to(DEVICE)
    points = points.repeat_interleave(24 // distinct + 1, dim=1)[:, :24]
    gram = points @ points.mT
    config = MergeConfig(rank=8, align_sign=align_sign, parameter_reweighting="off")
    found = fused_centroids(units_of_products(gram, (24,)), config)
    assert found.sizes is not None
    assert ((found.sizes > 0).sum(dim=1) == min(distinct, 8)).all()
    signs = found.a.sign()
    plain = cluster_units(gram, 8, align_sign=align_sign, restarts=4, seed=0)
    assert_close(1 + inertia(gram, signs), 1 + inertia(gram, plain), 1e-5)


def test_zero_units_stay_zero() -> None:
    gram = torch.zeros(3, 24, 24, dtype=torch.float64, device=DEVICE)
    found = fused_centroids(units_of_products(gram, (24,)), MergeConfig(rank=4))
    assert not found.a.any()
    assert not found.b.any()
