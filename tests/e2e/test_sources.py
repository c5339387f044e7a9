"""What a request can name, over one real server: a folder, the hub, and a policy for two keys."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving.shapes import SHAPES, write_adapters, write_model
from tests.e2e.conftest import TINY_SERVER
from tests.hub_server import NEW, OLD, REPO, Hub, serving
from vllm_lego.demo.server import LEGO_SERVE, ServerProcess, server_environment
from vllm_lego.looks import SHARED_S

BOSS, TEAM = "key-of-the-boss", "key-of-the-team"
BIG = "c" * 40
MAX_BYTES = 1 << 20


def digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


POLICY = f"""
[[allow]]
adapters = ["*"]
keys = ["{digest(BOSS)}"]

[[allow]]
adapters = ["adapter0", "shared-*"]
keys = ["{digest(TEAM)}"]

[[allow]]
adapters = ["adapter1"]
keys = ["{digest(TEAM)}"]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of rank 8: 0 and 1 are for vLLM, 2 and 3 for the folder, 4 and 5 for the hub."""
    return write_adapters(SHAPES["tiny"], tmp_path_factory.mktemp("made"), 6, rank=8)


@pytest.fixture(scope="module")
def folder(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("folder")
    for name, source in (("copy0", 0), ("shared-2", 2), ("secret", 3), ("adapter1", 3)):
        shutil.copytree(made[f"adapter{source}"], home / name)
    outside = shutil.copytree(made["adapter2"], tmp_path_factory.mktemp("outside") / "x")
    (home / "leads-out").symlink_to(outside)
    return home


@pytest.fixture(scope="module")
def hub(made: dict[str, Path]) -> Iterator[Hub]:
    found = Hub()
    files = [
        {f.name: f.read_bytes() for f in made[name].iterdir()} for name in ("adapter4", "adapter5")
    ]
    found.push(OLD, files[0])
    found.push(NEW, files[1], branch="v2")
    found.push(BIG, files[0] | {"adapter_model.safetensors": bytes(MAX_BYTES + 1)}, branch="big")
    with serving(found):
        yield found


@pytest.fixture(scope="module")
def server(
    model: Path,
    made: dict[str, Path],
    folder: Path,
    hub: Hub,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    folders = tmp_path_factory.mktemp("server")
    (folders / "policy.toml").write_text(POLICY)
    arguments = [
        str(write_model(SHAPES["tiny"], folders / "model", model, weights=True)),
        *TINY_SERVER,
        f"--adapter-dir={folder}",
        f"--hub-allow={REPO} other/*",
        f"--hub-max-bytes={MAX_BYTES}",
        f"--policy-file={folders / 'policy.toml'}",
        "--lora-modules",
        *(f"{name}={made[name]}" for name in ("adapter0", "adapter1")),
        "--api-key",
        BOSS,
        TEAM,
    ]
    environment = server_environment() | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(folders / "cache"),
    }
    with ServerProcess(arguments, environment, command=LEGO_SERVE) as process:
        # Not before: `vllm-lego serve` refuses a --max-lora-rank below an adapter's.
        (wide,) = write_adapters(SHAPES["tiny"], folders / "made", 1, rank=16).values()
        shutil.copytree(wide, folder / "wide")
        yield process
        assert process.is_alive(), process.log_tail()


def session(server: ServerProcess, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=120
    )


@pytest.fixture(scope="module")
def boss(server: ServerProcess) -> Iterator[httpx.Client]:
    with session(server, BOSS) as http:
        yield http


@pytest.fixture(scope="module")
def team(server: ServerProcess) -> Iterator[httpx.Client]:
    with session(server, TEAM) as http:
        yield http


def ask(http: httpx.Client, *adapters: Any, **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
    body |= {"logprobs": 0, "ignore_eos": True}
    body |= {"adapters": list(adapters)} if adapters else {}
    return http.post("/v1/completions", json=body | fields)


def answer(response: httpx.Response) -> tuple[list[str], list[float]]:
    assert response.status_code == 200, response.text
    logprobs = response.json()["choices"][0]["logprobs"]
    return logprobs["tokens"], logprobs["token_logprobs"]


def alike(one: tuple[list[str], list[float]], *others: tuple[list[str], list[float]]) -> bool:
    """Whether answers are the same, but for rounding."""
    return all(
        other[0] == one[0] and other[1] == pytest.approx(one[1], abs=1e-3) for other in others
    )


def refused(response: httpx.Response, status: int, says: str = "") -> str:
    assert response.status_code == status, response.text
    message: str = response.json()["error"]["message"]
    assert says in message
    assert "/tmp" not in message  # noqa: S108  no path of the server
    return message


def listed(http: httpx.Client, route: str) -> list[str]:
    data = http.get(route).raise_for_status().json()["data"]
    return [entry["id"] if "id" in entry else entry["name"] for entry in data]


def test_an_adapter_of_the_folder_is_as_if_vllm_had_loaded_it(boss):
    native = answer(ask(boss, "adapter0"))
    base = answer(ask(boss, model="tiny"))
    assert not alike(native, base)
    for response in (ask(boss, "copy0"), ask(boss, model="copy0")):
        assert alike(native, answer(response))
        assert response.headers["x-lego-model"] == response.json()["model"]


def test_folders_come_and_go_without_a_restart(boss, folder, made):
    refused(ask(boss, "new"), 404, "'new' is not served here")
    shutil.copytree(made["adapter3"], folder / ".new")
    (folder / ".new").rename(folder / "new")
    by_name = answer(ask(boss, model="new"))
    assert alike(by_name, answer(ask(boss, "new")), answer(ask(boss, "secret")))
    answer(ask(boss, model="new+shared-2"))
    cards = {card["id"]: card for card in boss.get("/v1/models").json()["data"]}
    assert cards["new"]["parent"] == "tiny"
    assert cards["new"]["root"] == "new"
    assert "new" in listed(boss, "/v1/adapters")
    (folder / "new").rename(folder / ".gone")
    time.sleep(SHARED_S)  # the list may have looked at it just now
    refused(ask(boss, "new"), 404)
    unknown = ask(boss, model="none").text.replace("none", "?")
    assert ask(boss, model="new").text.replace("new", "?") == unknown
    assert "new" not in listed(boss, "/v1/models") + listed(boss, "/v1/adapters")


def test_what_is_in_the_folder_and_no_adapter(boss):
    refused(ask(boss, "leads-out"), 404)
    refused(ask(boss, "wide"), 422, "'wide' has rank 16; this server takes at most 8")
    assert listed(boss, "/v1/models").count("adapter1") == 1
    # The folder's adapter1 is what secret is: vLLM's won.
    assert not alike(answer(ask(boss, "adapter1")), answer(ask(boss, "secret")))


@pytest.mark.parametrize(
    "name",
    ["..", ".", "/etc", "secret/", "./secret", "../folder/secret", "secret\0", "SECRET", "s\u0301ecret",
     "a" * 100_000, "\ud800", " ", "leads-out/adapter_config.json"],
)  # fmt: skip
def test_names_that_lead_nowhere(boss, name):
    """As JSON escapes them, or a lone surrogate could not be sent."""
    for body in ({"adapters": [name]}, {"adapters": [name, "adapter0"]}, {"model": name}):
        content = json.dumps({"prompt": "x", "max_tokens": 1} | body)
        response = boss.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        if "model" in body:
            assert response.status_code in (400, 404), response.text
        else:
            assert len(refused(response, 404, "is not served here")) < 200


def test_an_adapter_of_the_hub_is_fetched_once_and_stays_at_its_commit(boss, hub):
    assert any(entry == REPO for entry in listed(boss, "/v1/adapters"))
    assert not hub.asked  # a list downloads nothing
    first = answer(ask(boss, REPO))
    asked = len(hub.asked)
    hub.branches["main"] = NEW
    assert alike(first, answer(ask(boss, REPO)), answer(ask(boss, model=REPO)))
    assert len(hub.asked) == asked
    assert not alike(first, answer(ask(boss, f"{REPO}@v2")))
    answer(ask(boss, REPO, "adapter0", "shared-2"))


def test_what_the_hub_must_not_give(boss, hub):
    refused(ask(boss, f"{REPO}@big"), 422, f"{MAX_BYTES} for an adapter")
    for name in ("org/none", f"{REPO}@refs/pr/1", f"{REPO}@{NEW}"):
        asked = len(hub.asked)
        refused(ask(boss, name), 404, "is not served here")
        assert len(hub.asked) == asked
    refused(ask(boss, "other/none"), 404, "the hub has no repository")
    hub.branches["lie"] = "d" * 40
    hub.commits["d" * 40] = {k: v + b" " for k, v in hub.commits[OLD].items()}
    hub.false_digests = True
    refused(ask(boss, f"{REPO}@lie"), 503, "did not come from the hub")
    hub.false_digests = False


def test_a_key_may_name_what_its_rules_say(team):
    answer(ask(team, "adapter0", "shared-2"))
    answer(ask(team, model="adapter1"))
    refused(ask(team, "adapter0", "adapter1"), 403, "'adapter0', 'adapter1' may not be combined")
    refused(ask(team, model="adapter0+adapter1"), 403)
    assert sorted(listed(team, "/v1/models")) == ["adapter0", "adapter1", "shared-2", "tiny"]
    assert listed(team, "/v1/adapters") == ["adapter0", "adapter1", "shared-2"]


def test_what_a_key_may_not_name_does_not_exist_for_it(boss, team, hub):
    asked = len(hub.asked)
    for names in (["?"], ["?", "adapter0"], [{"name": "?", "weight": 2}]):
        body = json.dumps({"prompt": "x", "adapters": names})
        texts = {
            team.post(
                "/v1/completions",
                content=body.replace("?", name),
                headers={"content-type": "application/json"},
            ).text.replace(name, "?")
            for name in ("copy0", "secret", REPO, "none", "other/none")
        }
        assert len(texts) == 1
    assert len(hub.asked) == asked
    merge = ask(boss, "adapter0", "secret").headers["x-lego-model"]
    mixed = ask(boss, "adapter0", "adapter1").headers["x-lego-model"]
    routes: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/responses": {"input": "x"},
        "/tokenize": {"prompt": "x"},
    }
    for route, body in routes.items():
        answers = {}
        for name in ("secret", merge, "lego-0123456789abcdef", "none"):
            response = team.post(route, json=body | {"model": name})
            answers[name] = response.status_code, response.text.replace(name, "?")
        assert len(set(answers.values())) == 1, (route, answers)
        assert answers["none"][0] == 404
    refused(team.post("/v1/completions", json={"prompt": "x", "model": mixed}), 403)
    answer(ask(boss, model=merge))
    answer(ask(boss, model=mixed))
    merges = {*listed(team, "/v1/adapters/merged")}
    assert not merges & {merge, mixed}
    assert {merge, mixed} <= {*listed(boss, "/v1/adapters/merged")}
    assert merges


def test_vllms_own_adapters_are_hidden_on_every_route(boss, server):
    """A key that the server takes and no rule knows would see nothing; strangers see as much."""
    with session(server, "wrong") as stranger:
        for name in ("adapter0", "none"):
            assert stranger.post("/v1/completions", json={"model": name}).status_code == 401
        texts = {
            stranger.post("/tokenize", json={"prompt": "x", "model": name}).text.replace(name, "?")
            for name in ("adapter0", "secret", "none")
        }
        assert len(texts) == 1
    assert boss.post("/tokenize", json={"prompt": "x", "model": "adapter0"}).status_code == 200


def test_methods_that_burn_the_device_are_refused(boss):
    for merge, param in (
        ({"method": "ties"}, "merge.method"),
        ({"restarts": 64}, "merge.restarts"),
    ):
        response = ask(boss, "adapter0", "shared-2", merge=merge)
        refused(response, 400, "this server allows")
        assert response.json()["error"]["param"] == param
