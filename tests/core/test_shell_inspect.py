"""`vllm-lego inspect`, on the demo's trained adapters."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from lego_core import load_adapter
from lego_core.config import METHOD_NAMES
from tests.core.shell import ADAPTERS, JSON, PLURAL, SIGNOFF, as_json, fails, run, tiny
from vllm_lego.cli import main


def test_inspect_tells_what_is_there():
    out, err = run("inspect", "plural", "json", "signoff", "--rank", 8, cwd=ADAPTERS)
    assert err == ""
    lines = [line.split() for line in out.splitlines()]
    digest = load_adapter(PLURAL).digest[:12]
    assert ["plural", "8", "16", "2", "bfloat16", "120", "1.84", "MB", digest] in lines
    assert "base model: HuggingFaceTB/SmolLM2-135M-Instruct" in out
    assert "targets: k_proj o_proj q_proj v_proj in 30 layers" in out
    assert "can be merged: yes" in out
    assert "rank 16, above the rank 8" in out  # concat
    assert "adapters have ranks" in out  # linear
    assert all(any(line[:1] == [method] for line in lines) for method in METHOD_NAMES)


def test_inspect_for_scripts(tmp_path, capsys):
    as_json(capsys, "merge", PLURAL, JSON, "--out", tmp_path / "m", "--rank", 8)
    found = as_json(
        capsys, "inspect", PLURAL, JSON, tmp_path / "m", "--methods", "svd,lego", "--rank", 8
    )
    plural, _, merged = found["adapters"]
    assert plural["ranks"] == [8]
    assert plural["scalings"] == [2]
    assert plural["provenance"] is None
    assert [part["name"] for part in merged["provenance"]["members"]] == ["plural", "json"]
    assert found["can_be_merged"]
    cosines = {tuple(pair["adapters"]): pair["cosine"] for pair in found["pairs"]}
    assert cosines["plural", "json"] < 0.2 < cosines["plural", "m"]
    deltas = [
        torch.cat(
            [m.delta().double().flatten() for _, m in sorted(load_adapter(a).modules.items())]
        )
        for a in (PLURAL, JSON)
    ]
    exact = float(torch.nn.functional.cosine_similarity(*deltas, dim=0))
    assert cosines["plural", "json"] == pytest.approx(exact, abs=1e-6)
    alignments = [pair["alignment"] for pair in found["pairs"]]
    assert all(pair["alignment_by_chance"] < pair["alignment"] <= 1 for pair in found["pairs"])
    assert alignments[1] > 2 * alignments[0]
    lego, svd = found["methods"]
    assert (lego["method"], svd["method"]) == ("lego", "svd")
    assert 0 < lego["fidelity"] <= svd["fidelity"] <= 1
    assert len(svd["modules"]) == 120


def test_inspect_reports_what_it_cannot_read_or_merge(tmp_path, capsys):
    good, wide = tiny(tmp_path / "good"), tiny(tmp_path / "wide", width=6)
    dora = tiny(tmp_path / "dora", use_dora=True)
    assert main(["inspect", good, dora]) == 1
    said = capsys.readouterr()
    assert "can be merged: yes, good" in said.out
    assert said.err.splitlines() == [line for line in said.err.splitlines() if "'dora'" in line]

    found = as_json(capsys, "inspect", good, wide, code=1)
    assert not found["can_be_merged"]
    assert "'layers.0.q'" in found["reason"]
    assert found["methods"] == []

    assert main(["inspect", good, wide, "--plot", str(tmp_path / "p.png")]) == 1
    said = capsys.readouterr()
    assert "can be merged: no" in said.out
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "p.png").exists()

    fails(capsys, "inspect", tmp_path / "nothing")


def test_inspect_shows_no_control_characters(tmp_path, capsys):
    lego = {"members": [{"name": "a\x1b[2J", "weight": 1}], "config": {"method": ["\x07"]}}
    hostile = tiny(tmp_path / "hostile", base="\x1b]0;title\x07[bold]", lego=lego)
    assert main(["inspect", hostile, tiny(tmp_path / "odd", lego={"members": 3})]) == 0
    out = capsys.readouterr().out
    assert "[bold]" in out
    assert all(character.isprintable() or character == "\n" for character in out)


def test_slow_methods_wait_for_small_adapters(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lego_core.comparison.CHEAP_ENTRIES", 100)
    found = as_json(capsys, "inspect", tiny(tmp_path / "a"), tiny(tmp_path / "b"), "--rank", 4)
    assert found["methods_skipped"] == ["ties", "dare_ties", "knots"]
    found = as_json(capsys, "inspect", tiny(tmp_path / "c"), "--methods", "all", "--rank", 2)
    assert [of["method"] for of in found["methods"]] == list(METHOD_NAMES)


def test_the_units_of_a_module(capsys):
    module = ["--module", "3.self_attn.v_proj", "--methods", "none"]
    units = as_json(capsys, "inspect", PLURAL, JSON, SIGNOFF, "--rank", 8, *module)["units"]
    assert units["module"] == "model.layers.3.self_attn.v_proj"
    assert sorted(units["adapters"]) == ["json"] * 4 + ["plural"] * 8 + ["signoff"] * 4
    assert units["clusters"] == sorted(units["clusters"])
    assert set(units["clusters"]) == set(range(8))
    similarity = torch.tensor(units["similarity"])
    assert torch.allclose(similarity.diagonal(), torch.ones(16))
    assert torch.equal(similarity, similarity.T)
    assert "any of 30 modules" in fails_with_output(capsys, "--module", "v_proj")
    assert "no adapter has" in fails_with_output(capsys, "--module", "lm_head")


def fails_with_output(capsys, *arguments):
    return fails(capsys, "inspect", JSON, "--json", "--methods", "none", *arguments)


def test_the_picture(tmp_path):
    picture = tmp_path / "new" / "p.png"
    run("inspect", PLURAL, JSON, "--rank", 8, "--methods", "lego,svd", "--plot", picture)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        width, height = image.size
        assert 1000 < width < 4000
        assert 500 < height < 2000
        assert len(image.convert("RGB").getcolors(width * height)) > 20


def test_the_picture_of_odd_adapters(tmp_path, capsys):
    names = ("embed_tokens", "layers.1.mlp.experts.7.w1", "lm_head")
    odd = tiny(tmp_path / "odd", rank=40, width=48, names=names)
    as_json(capsys, "inspect", odd, odd, "--rank", 70, "--plot", tmp_path / "p.svg")
    assert "</svg>" in (tmp_path / "p.svg").read_text()
    one = tiny(tmp_path / "one", rank=1, names=("lm_head",))
    as_json(capsys, "inspect", one, "--methods", "none", "--plot", tmp_path / "q.png")
    with Image.open(tmp_path / "q.png") as image:
        assert image.size[0] > 1000


def test_a_picture_needs_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = fails(capsys, "inspect", JSON, "--plot", tmp_path / "p.png")
    assert "pip install 'vllm-lego[plot]'" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "soup"], "'soup' is no method"),
        (["--plot", "p.exe"], "must end in .png"),
        (["--module", "v_proj"], "give one of them"),
        (["--rank", "513"], "rank is 513"),
    ],
)
def test_an_inspection_that_makes_no_sense(capsys, arguments, message):
    assert message in fails(capsys, "inspect", JSON, *arguments, code=2)
