"""Settings come from the environment or from flags, and nonsense is refused in a sentence."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_lego.settings import (
    Settings,
    SettingsError,
    default_text,
    flag_name,
    markdown_table,
    size,
    variable_name,
)

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def test_defaults():
    assert Settings.from_environment({}) == Settings()


def test_they_are_read_from_the_environment():
    settings = Settings.from_environment(
        {"VLLM_LEGO_RANK": "32", "VLLM_LEGO_MERGE_TIMEOUT_S": "2.5", "VLLM_LEGO_METHOD": "lego"}
    )
    assert (settings.rank, settings.merge_timeout_s, settings.method) == (32, 2.5, "lego")


def test_an_empty_variable_is_an_unset_one():
    assert Settings.from_environment({"VLLM_LEGO_RANK": ""}) == Settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VLLM_LEGO_RANK", "eight"),
        ("VLLM_LEGO_RANK", "0"),
        ("VLLM_LEGO_RANK", "1.5"),
        ("VLLM_LEGO_MERGE_TIMEOUT_S", "nan"),
        ("VLLM_LEGO_MERGE_TIMEOUT_S", "-1"),
        ("VLLM_LEGO_MERGE_TIMEOUT_S", "inf"),
        ("VLLM_LEGO_DEVICE_CACHE_BYTES", "1Gi"),
        ("VLLM_LEGO_DEVICE_CACHE_BYTES", "1.5GiB"),
        ("VLLM_LEGO_DEVICE_CACHE_BYTES", "0"),
        ("VLLM_LEGO_STORE_BYTES", "-1GiB"),
        ("VLLM_LEGO_STORE_BYTES", "GiB"),
        ("VLLM_LEGO_STORE_BYTES", "1e9"),
    ],
)
def test_nonsense_names_the_variable_and_the_value(variable, value):
    with pytest.raises(SettingsError, match=variable) as caught:
        Settings.from_environment({variable: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("123", 123),
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        ("3MB", 3_000_000),
        ("64KiB", 1 << 16),
        ("1TB", 10**12),
    ],
)
def test_sizes_have_units(text, expected):
    assert size(text) == expected
    assert Settings.from_environment({"VLLM_LEGO_STORE_BYTES": text}).store_bytes == expected


def test_a_default_written_out_is_that_default():
    written = {
        variable_name(setting.name): default_text(setting)
        for setting in dataclasses.fields(Settings)
        if setting.default is not None
    }
    assert Settings.from_environment(written) == Settings()


def test_help_settings_and_documentation_agree():
    helped = subprocess.run(
        [sys.executable, "-m", "vllm_lego.cli", "serve", "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    helped = "".join(helped.split())
    documented = DOCS.read_text(encoding="utf-8")
    assert markdown_table() in documented  # printed by python -m vllm_lego.settings
    for setting in dataclasses.fields(Settings):
        variable, flag = variable_name(setting.name), flag_name(setting.name)
        told = f"{setting.metadata['help']}[{variable},default:{default_text(setting)}]"
        assert flag in helped
        assert "".join(told.split()) in helped
        assert f"| `{variable}` | `{flag}` |" in documented
