"""The snippets of docs/clients.md, run as they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import KEY
from vllm_lego.demo.server import ServerProcess

DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"
PACKAGES = Path(__file__).parent / "clients"
ANSWER = '{"answer": "cities"}'
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = FENCED.findall(DOCUMENT.read_text(encoding="utf-8"))
RUNS = {"bash": ["bash", "-euc"], "python": [sys.executable, "-c"], "javascript": ["node"]}
NEEDS = {"bash": ["curl"], "python": [], "javascript": ["node", "npm"]}


def test_every_client_has_a_snippet():
    assert {language for language, _ in SNIPPETS} == set(RUNS)
    everything = " ".join(code for _, code in SNIPPETS)
    for client in ("curl ", "from openai import", 'from "openai"', "langchain_openai"):
        assert client in everything


@pytest.mark.parametrize(("language", "code"), SNIPPETS)
def test_a_snippet_answers(server: ServerProcess, tmp_path: Path, language: str, code: str):
    for tool in NEEDS[language]:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if language == "javascript":
        for file in ("package.json", "package-lock.json"):
            shutil.copy(PACKAGES / file, tmp_path)
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=tmp_path, check=True)
        (tmp_path / "snippet.mjs").write_text(code, encoding="utf-8")
        code = "snippet.mjs"
    environment = os.environ | {"OPENAI_BASE_URL": server.url + "/v1", "OPENAI_API_KEY": KEY}
    ran = subprocess.run(
        [*RUNS[language], code],
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ANSWER in ran.stdout.replace("\\", "")
