"""`vllm-lego merge`, what both commands share, and sources; on the demo's trained adapters."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from lego_core import MergeConfig, check_shapes, load_adapter, merge_adapters
from lego_core.config import METHOD_NAMES, OPTIONS
from tests.core.shell import ADAPTERS, JSON, PLURAL, as_json, fails, run, tiny
from vllm_lego.cli import main
from vllm_lego.shell import flags
from vllm_lego.shell.sources import Source, parse_sources


def test_merge_writes_what_python_would(tmp_path):
    out, err = run(
        "merge", PLURAL, JSON, "--rank", 8, "--weights", "1,0.5", "--out", tmp_path / "m"
    )
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()[:6]] == [
        "modules",
        *("k_proj", "o_proj", "q_proj", "v_proj"),
        "all",
    ]
    assert "8+4 → 8" in out
    assert "\x1b" not in out
    members = [load_adapter(PLURAL), load_adapter(JSON)]
    expected = merge_adapters(members, MergeConfig(rank=8), weights=[1.0, 0.5])
    merged = load_adapter(tmp_path / "m")
    assert merged.modules.keys() == expected.modules.keys()
    for name, module in merged.modules.items():
        assert torch.equal(module.lora_a, expected.modules[name].lora_a)
        assert torch.equal(module.lora_b, expected.modules[name].lora_b)

    provenance = json.loads((tmp_path / "m" / "adapter_config.json").read_text())["lego"]
    assert provenance["config"] == MergeConfig(rank=8).as_dict()
    assert provenance["members"] == [
        {"name": "plural", "digest": members[0].digest, "weight": 1.0},
        {"name": "json", "digest": members[1].digest, "weight": 0.5},
    ]
    assert provenance["made_by"].startswith("vllm-lego ")
    assert str(ADAPTERS) not in json.dumps(provenance)


@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_vllm_is_not_needed(tmp_path, command):
    arguments = [command, PLURAL, JSON, "--rank", "8"]
    arguments += ["--out", str(tmp_path / "m")] if command == "merge" else ["--methods", "lego"]
    script = (
        "import sys; sys.modules['vllm'] = None\n"  # importing it raises ImportError
        f"from vllm_lego.cli import main; code = main({arguments})\n"
        "loaded = {name.partition('.')[0] for name in sys.modules if sys.modules[name]}\n"
        "print(code, sorted(loaded & {'vllm', 'transformers', 'fastapi', 'matplotlib'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_serve_does_not_wait_for_torch():
    script = "import sys, vllm_lego.cli; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


def test_merge_for_scripts(tmp_path, capsys):
    result = as_json(
        capsys, "merge", PLURAL, JSON, "--out", tmp_path / "m", "--rank", 8, "--dtype", "float32"
    )
    assert result["config"]["rank"] == 8
    assert result["dtype"] == "float32"
    assert 0.9 < result["fidelity"] <= 1
    assert result["seconds"].keys() == {"read", "merge", "write"}
    module = result["modules"]["model.layers.0.self_attn.q_proj"]
    assert module["ranks"] == [8, 4]
    assert sum(module["cluster_sizes"]) == 12
    assert load_adapter(tmp_path / "m").dtype == torch.float32


def test_every_option_is_a_flag(tmp_path, capsys):
    wanted = {name for of_method in OPTIONS.values() for name in of_method}
    assert set(flags.options()) == wanted
    assert set(flags._field_docs()) == wanted | {"method", "rank"}
    sources = tiny(tmp_path / "a"), tiny(tmp_path / "b")
    as_typed = {True: "--{}", False: "--no-{}"}
    for method in METHOD_NAMES:
        typed = []
        for name, default in OPTIONS[method].items():
            flag = name.replace("_", "-")
            if isinstance(default, bool):
                typed.append(as_typed[default].format(flag))
            else:
                typed += [f"--{flag}", default]
        out = tmp_path / method
        result = as_json(capsys, "merge", *sources, "--method", method, *typed, "--out", out)
        assert result["config"] == MergeConfig(method=method).as_dict()


def test_merge_checks_the_base(tmp_path, capsys):
    pytest.importorskip("transformers")
    config = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "intermediate_size": 64,
        "vocab_size": 128,
    }
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    check_shapes([load_adapter(JSON)], base)
    as_json(capsys, "merge", JSON, "--base", base, "--out", tmp_path / "m")
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    message = fails(capsys, "merge", JSON, "--base", base, "--out", tmp_path / "n")
    assert "'json'" in message
    assert "layers.10" in message
    assert not (tmp_path / "n").exists()


def test_a_taken_folder_is_refused_before_the_work(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years")
    nowhere = tmp_path / "no such adapter"
    assert "not empty" in fails(capsys, "merge", nowhere, "--out", taken)
    assert "other things" in fails(capsys, "merge", nowhere, "--out", taken, "--overwrite")
    assert (taken / "thesis.tex").read_text() == "years"

    shutil.copytree(JSON, tmp_path / "old")
    (tmp_path / "old" / "checkpoint-100").mkdir()
    assert "other things" in fails(
        capsys, "merge", PLURAL, "--out", tmp_path / "old", "--overwrite"
    )
    (tmp_path / "old" / "checkpoint-100").rmdir()
    old = str(tmp_path / "old")
    assert "to merge" in fails(capsys, "merge", PLURAL, old, "--out", old, "--overwrite")
    as_json(capsys, "merge", PLURAL, "--out", old, "--overwrite")
    assert load_adapter(old).rank == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        ([PLURAL], "--out"),
        ([PLURAL, "--out", "m", "--rank", "0"], "rank is 0"),
        ([PLURAL, "--out", "m", "--rank", "x"], "invalid int"),
        ([PLURAL, "--out", "m", "--method", "soup"], "soup"),
        ([PLURAL, "--out", "m", "--method", "svd", "--seed", "1"], "no such option"),
        ([PLURAL, "--out", "m", "--density", "0.1"], "no such option"),
        ([PLURAL, "--out", "m", "--weights", "1,2"], "1 adapters but 2 weights"),
        ([PLURAL, "--out", "m", "--weights", "1,x"], "no list of numbers"),
        ([PLURAL, "--out", "m", "--weights", "nan"], "not finite"),
        ([PLURAL, "--out", "m", "--device", "meta"], "neither cpu nor cuda"),
        ([PLURAL, "--out", "m", "--device", "cuda:99"], "cannot be used"),
        ([PLURAL, "--out", "m", "--revision", "main"], "all sources are folders"),
        (["", "--out", "m"], "empty"),
        ([PLURAL, "--out", "m", "--ran", "8"], "--ran"),
    ],
)
def test_a_command_line_that_makes_no_sense(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "merge", *arguments, code=2)
    assert not list(tmp_path.iterdir())


def test_errors_are_one_sentence_and_no_traceback(tmp_path):
    other = tiny(tmp_path / "other", base="org/other")
    out, err = run("merge", PLURAL, other, "--out", tmp_path / "m", code=1)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("vllm-lego merge: adapter ")
    assert "'org/other'" in err
    assert not (tmp_path / "m").exists()
    _, err = run("merge", "no/such-repository@v1", "--out", tmp_path / "m", code=1)
    assert "HF_HUB_OFFLINE" in err
    _, err = run("merge", code=2)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_help_says_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "exit codes: 0 done; 1 an adapter cannot be read, merged or written" in text


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("org/here", "runs/1/adapter", "runs/2/adapter", "org/at@home"):
        (tmp_path / folder).mkdir(parents=True)
    typed = ["org/name", "org/name2@v1", "org/here", "./org/here/", "org/at@home", "."]
    assert parse_sources(typed, "main") == [
        Source("org/name", "org/name", "main"),
        Source("org/name2", "org/name2", "v1"),
        Source("org/here", "org/here"),
        Source("./org/here/", "./org/here/"),
        Source("at@home", "org/at@home"),
        Source(tmp_path.name, "."),
    ]
    assert parse_sources(["org/name@refs/pr/1"], None)[0].revision == "refs/pr/1"
    names = [s.name for s in parse_sources(["runs/1/adapter", "runs/2/adapter", "org"], None)]
    assert names == ["runs/1/adapter", "runs/2/adapter", "org"]
    assert [s.name for s in parse_sources(["org", "org"], None)] == ["org", "org#2"]
