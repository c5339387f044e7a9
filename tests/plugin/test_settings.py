"""Settings come from the environment or from flags, and nonsense is refused in a sentence."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from vllm_lego.settings import Settings, SettingsError, flag_name, variable_name


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
        ("VLLM_LEGO_DEVICE_CACHE_BYTES", "1GiB"),
    ],
)
def test_nonsense_names_the_variable_and_the_value(variable, value):
    with pytest.raises(SettingsError, match=variable) as caught:
        Settings.from_environment({variable: value})
    assert repr(value) in str(caught.value)


def test_help_of_serve_lists_every_setting():
    helped = subprocess.run(
        [sys.executable, "-m", "vllm_lego.cli", "serve", "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for setting in dataclasses.fields(Settings):
        assert flag_name(setting.name) in helped
        assert variable_name(setting.name) in "".join(helped.split())


def test_serve_refuses_nonsense_before_vllm_starts():
    ran = subprocess.run(
        [sys.executable, "-m", "vllm_lego.cli", "serve", "model", "--rank", "-3"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("vllm-lego: VLLM_LEGO_RANK is '-3'")
