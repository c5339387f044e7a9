"""`vllm-lego serve`: what becomes of a command line, told by vLLM's own parser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from vllm.config.lora import MaxLoRARanks
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_lego.demo.server import ADAPTERS_DIR
from vllm_lego.serve import RANKS, ServeError, parser, plan, vllm_flags
from vllm_lego.settings import SettingsError

DEMO = str(ADAPTERS_DIR)
CHOSEN = ("enable_lora", "max_lora_rank", "max_loras")


@pytest.fixture(scope="module")
def vllm() -> FlexibleArgumentParser:
    commands = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(commands.add_subparsers(dest="subparser"))
    return commands


@pytest.fixture
def adapter(tmp_path: Path):
    """Write an adapter's configuration, all of it that is read before vLLM starts."""

    def written(name: str, **fields: object) -> Path:
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | fields))
        return folder

    return written


def chosen(vllm: FlexibleArgumentParser, *arguments: object, **environment: str) -> list[object]:
    launch = plan([*map(str, arguments)], environment)
    options = vllm.parse_args(["serve", *launch.arguments])
    return [getattr(options, name) for name in CHOSEN]


def test_nothing_given_gets_lora_and_slots(vllm):
    assert chosen(vllm, "base") == [True, 16, 8]  # 16 is vLLM's own


def test_the_rank_is_the_smallest_that_holds_all_adapters(vllm, adapter):
    adapter("a", r=4)
    b = adapter("b", r=8, rank_pattern={"q_proj": 17})
    directory = f"--adapter-dir={b.parent}"
    assert chosen(vllm, "base", directory) == [True, 32, 8]
    assert chosen(vllm, "base", "--lora-modules", f"x={b.parent / 'a'}") == [True, 8, 8]
    as_json = json.dumps({"name": "x", "path": str(b), "base_model_name": "base"})
    assert chosen(vllm, "base", "--lora_modules", as_json) == [True, 32, 8]
    assert chosen(vllm, "base", directory, "--rank", "100") == [True, 128, 8]
    assert chosen(vllm, "base", directory, VLLM_LEGO_RANK="100") == [True, 128, 8]


def test_an_adapter_that_cannot_be_read_here_leaves_room_for_vllms_default(vllm, adapter):
    small = adapter("small", r=2)
    modules = [f"small={small}", "hub=org/name"]
    assert chosen(vllm, "base", "--lora-modules", *modules) == [True, 16, 8]
    adapter("strange", r=None)
    assert chosen(vllm, "base", "--adapter-dir", small.parent) == [True, 16, 8]


def test_what_the_user_gives_wins(vllm):
    given = ["--max-loras", "3", "--max_lora_rank=64", "--enable-lora"]
    assert chosen(vllm, "base", "--adapter-dir", DEMO, *given) == [True, 64, 3]
    assert chosen(vllm, "base", "--max-lora-ra=64", "--max-loras=3") == [True, 64, 3]
    assert chosen(vllm, "base", "--max-cpu-loras", "2") == [True, 16, 2]


def test_a_configuration_file_wins_over_what_is_chosen_but_not_over_flags(vllm, tmp_path):
    file = tmp_path / "vllm.yaml"
    numbers = ADAPTERS_DIR / "numbers"
    file.write_text(
        f"model: base\nmax_lora_rank: 64\nmax-loras: 3\nlora-modules: [numbers={numbers}]\n"
    )
    assert chosen(vllm, "--config", file) == [True, 64, 3]
    assert chosen(vllm, "base", "--config", file, "--max-loras=5") == [True, 64, 5]
    file.write_text("enable-lora: false\n")
    with pytest.raises(ServeError, match="--no-enable-lora"):
        plan(["base", "--config", str(file)], {})
    file.write_text("max-lora-rank: [")
    assert plan(["base", "--config", str(file)], {}).notice is None  # vLLM's to judge


@pytest.mark.parametrize(
    "line",
    [
        ["base"],
        [],
        ["--port", "8001"],
        ["base", "-tp", "2", "-O3", "--hf_overrides", '{"rope_scaling": {"factor": -2}}'],
        ["base", "--compilation-config.pass_config.fuse_allreduce_rms", "true", "-dp=2"],
        ["--model", "base", "--served-model-name", "a", "b"],
        [
            "base",
            "--served_model_name=a_b",
            "--lora-modules",
            "x_y=/p_q",
            '{"name":"b","path":"c"}',
        ],
        ["base", "--no-enable-prefix-caching", "--override-generation-config", '{"a_b": "--c_d"}'],
        ["base", "--host", "0.0.0.0", "--max-model-len", "1k", "--chat-template", "{{ a }} -b"],  # noqa: S104
    ],
)
def test_vllm_reads_what_it_would_have_read(vllm, line):
    launch = plan([*line, "--store_dir=/s", "--merge-threads", "3"], {})
    mine = vars(vllm.parse_args(["serve", *launch.arguments]))
    stock = vars(vllm.parse_args(["serve", *line]))
    assert mine.pop("enable_lora")
    for name in CHOSEN:
        mine.pop(name, None)
        stock.pop(name)
    assert mine == stock


def test_flags_are_not_taken_from_vllm(vllm):
    options = vllm._subparsers._group_actions[0].choices["serve"]._option_string_actions  # type: ignore[union-attr]
    own = set(parser()._option_string_actions)
    assert own & set(options) == {"-h", "--help"}
    # Nor does a whole flag of vLLM's read as the beginning of one that is looked at.
    looked_at = [f"--{n.replace('_', '-')}" for n in vars(vllm_flags([]) or None)]
    assert set(looked_at) <= set(options)
    assert not [
        (flag, option)
        for flag in looked_at
        for option in options
        if flag.startswith(option) and flag != option
    ]


def test_ranks_are_those_of_vllm():
    assert typing.get_args(MaxLoRARanks) == RANKS
    documented = (ADAPTERS_DIR.parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    assert f"({', '.join(map(str, RANKS))})" in documented


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no-enable-lora"], "drop it, or run plain `vllm serve`"),
        (["--rank=32", "--max-lora-rank=16"], "below VLLM_LEGO_RANK 32; raise it to 32"),
        (["--adapter-dir", DEMO, "--max-lora-rank=1"], "rank of adapter 'json', 4; raise it to 8"),
        (["--lora-modules", f"n={DEMO}/numbers", "--max-lora-rank=1"], "adapter 'n', 8; raise"),
        (["--rank=513"], "VLLM_LEGO_RANK 513 is more than vLLM serves, 512"),
        (["--adapter-dir", "/nowhere"], "'/nowhere' cannot be read (No such file or directory)"),
        (["--adapter-dir", DEMO + "/json"], "holds no adapter"),
        (["--store-bytes=1GiB"], "name its folder with --store-dir"),
        (["--lora-modules", "a+b=/c"], "names an adapter 'a+b'"),
        (["--lora-modules", '{"name": "lego-0123456789abcdef", "path": "c"}'], "'lego-0123456789"),
    ],
)
def test_contradictions_say_what_to_change(arguments, says):
    with pytest.raises(ServeError) as refused:
        plan(["base", *arguments], {})
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_flag_wins_over_its_variable():
    environment = {"VLLM_LEGO_METHOD": "svd", "VLLM_LEGO_RANK": "nonsense"}
    launch = plan(["base", "--rank=8"], environment)
    assert (launch.environment["VLLM_LEGO_RANK"], launch.environment["VLLM_LEGO_METHOD"]) == (
        "8",
        "svd",
    )
    with pytest.raises(SettingsError, match="VLLM_LEGO_RANK is 'nonsense'"):
        plan(["base"], environment)


def test_no_plugin_is_lost():
    def plugins(**environment: str) -> set[str]:
        return set(plan(["base"], environment).environment["VLLM_PLUGINS"].split(","))

    assert plugins() == {"lora_filesystem_resolver", "lora_hf_hub_resolver", "lego"}
    assert plugins(VLLM_PLUGINS="") == {"lego"}
    assert plugins(VLLM_PLUGINS="other") == {"other", "lego"}
    assert plugins(VLLM_PLUGINS="lego") == {"lego"}


def test_it_says_in_one_line_what_it_chose():
    notice = plan(["base", "--adapter-dir", DEMO, "--max-loras=2"], {}).notice
    assert notice == "adds --enable-lora --max-lora-rank=8 (5 adapters named, highest rank 8)"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_lego.cli", "serve", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=dict(os.environ) | environment,
    )


def test_refused_before_vllm_starts():
    ran = run("model", "--rank", "-3")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("vllm-lego: VLLM_LEGO_RANK is '-3'")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("found", ["0.25.9", "0.11.0+cpu", "0.26.0rc1", "1.0.0"])
def test_a_vllm_older_than_0_26_is_refused_in_one_sentence(tmp_path, found):
    """Of vLLM's metadata, those of another version are found first."""
    info = tmp_path / f"vllm-{found}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ran = run("base", "--store-bytes=1", PYTHONPATH=path)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    old = f"vLLM {found} is not supported; vllm-lego 0.1.0 supports vLLM 0.26 and newer"
    assert (old in ran.stderr) == found.startswith(("0.25", "0.11"))
    assert ("--store-dir" in ran.stderr) == (old not in ran.stderr)
