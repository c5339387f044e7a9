"""Rules from TOML, and what they mean for whoever asks."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lego_core.config import MergeConfig
from vllm_lego.access import Access, Callers, Visible
from vllm_lego.errors import ForbiddenError
from vllm_lego.policy import Policy, PolicyError, read_policy
from vllm_lego.recipe import Member, Recipe
from vllm_lego.settings import Settings, SettingsError


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


TEXT = f"""
[[allow]]
adapters = ["team-a-*", "shared"]
keys = ["sha256:{digest("a")}", "sha256:{digest("boss").upper()}"]

[[allow]]
adapters = ["team-b-?", "shared"]
keys = ["sha256:{digest("b")}", "sha256:{digest("boss")}"]

[[allow]]
adapters = ["org/*"]
"""
POLICY = Policy.from_toml(TEXT)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["team-a-1", "team-a-22", "shared"], {"a", "boss"}),
        (["team-b-1", "shared"], {"b", "boss"}),
        (["team-b-22"], set()),
        (["TEAM-A-1"], set()),
        (["shared"], {"a", "b", "boss"}),
        (["team-a-1", "team-b-1"], set()),
        (["org/x", "org/y@v1"], {"a", "b", "boss", "stranger", None}),
        (["org/x", "shared"], set()),
        (["xteam-a-1"], set()),
        (["team-a-\n"], {"a", "boss"}),
    ],
)
def test_a_set_needs_one_rule_that_covers_it(names, keys):
    for key in ["a", "b", "boss", "stranger", None]:
        hashed = None if key is None else digest(key)
        assert POLICY.may_combine(names, hashed) == (key in keys)
        if len(names) == 1:
            assert POLICY.may_name(names[0], hashed) == (key in keys)


def test_a_combination_that_is_kept_apart_names_its_members():
    assert POLICY.may_name("team-a-1", digest("boss"))
    assert POLICY.may_name("team-b-1", digest("boss"))
    with pytest.raises(ForbiddenError, match="'team-a-1', 'team-b-1'") as caught:
        POLICY.check(["team-b-1", "team-a-1"], digest("boss"), param="adapters")
    assert (caught.value.status, caught.value.param) == (403, "adapters")


@given(st.lists(st.text(max_size=8), min_size=1, max_size=4), st.sampled_from("ab"))
def test_who_may_combine_may_name_each(names, key):
    policy = Policy.from_toml(
        f'[[allow]]\nadapters = ["[!a]*", "*b"]\nkeys = ["sha256:{digest("a")}"]'
    )
    if policy.may_combine(names, digest(key)):
        assert key == "a"
        assert all(policy.may_name(name, digest(key)) for name in names)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no [[allow]] table"),
        ("allow = []", "no [[allow]] table"),
        ("allow = 3", "no [[allow]] table"),
        ("allow = [3]", "[[allow]] table 1 is 3"),
        ("[[allow]", "no TOML"),
        ("deny = 1", "'deny'"),
        ("[[allow]]", "[[allow]] table 1: adapters is None"),
        ("[[allow]]\nadapters = []", "adapters is []"),
        ("[[allow]]\nadapters = ['']", "adapters is ['']"),
        ("[[allow]]\nadapters = 'a'", "adapters is 'a'"),
        ("[[allow]]\nadapters = ['a', 3]", "adapters is ['a', 3]"),
        ("[[allow]]\nadapters = ['a']\nkeys = []", "table 1: keys is []"),
        ("[[allow]]\nadapters = ['a']\n[[allow]]\nadapters = ['a']\nkey = 1", "table 2 has 'key'"),
        ("[[allow]]\nadapters = ['a']\nkeys = ['secret']", "keys[0], of 6 characters"),
    ],
)
def test_nonsense_names_file_table_and_value(tmp_path, text, says):
    with pytest.raises(PolicyError):
        Policy.from_toml(text)
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_policy(Settings(policy_file=str(path)))
    message = str(caught.value)
    assert message.startswith(f"VLLM_LEGO_POLICY_FILE, {path}: ")
    assert says in message
    assert "secret" not in message  # it may be the key itself, and this goes to the log


@given(st.text())
def test_whatever_the_file_holds_is_a_policy_or_a_sentence(text):
    with pytest.raises(PolicyError):
        Policy.from_toml(text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(SettingsError, match="No such file"):
        read_policy(Settings(policy_file=str(tmp_path / "none")))
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(SettingsError, match="UTF-8"):
        read_policy(Settings(policy_file=str(tmp_path / "latin")))
    assert read_policy(Settings()) is None


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"Authorization", b"bearer " + key.encode())]


def recipe(*names: str, merge_id: str = "lego-0123456789abcdef") -> Recipe:
    return Recipe(merge_id, tuple(Member(n, "/x", "d", 1.0) for n in names), MergeConfig())


def test_the_server_itself_and_a_server_without_a_policy_may_do_anything():
    assert Access(POLICY).may_name("nobody's")
    with Access().of(bearer("b")):
        assert Access().may_name("nobody's")
        assert Access().may_see(recipe("team-a-1"))
    Access(POLICY).check(["team-a-1", "team-b-1"], param="adapters")


def test_a_caller_is_known_by_its_key():
    access = Access(POLICY, ["a", "b"])
    for headers, seen in [(bearer("a"), True), (bearer("b"), False), ([], False)]:
        with access.of(headers):
            assert access.may_name("team-a-1") is seen
            assert access.may_see(recipe("team-a-1", "shared")) is seen
            assert access.may_name("org/x") is (headers != [])
    assert access.may_name("team-a-1")


@pytest.mark.parametrize("headers", [[], bearer("boss"), [(b"authorization", b"Basic a")]])
def test_a_stranger_sees_nothing_not_even_what_is_for_every_key(headers):
    """vLLM answers strangers on the routes that it leaves open, such as /tokenize."""
    access = Access(POLICY, ["a", "b"])  # boss has a rule, but no key of this server
    with access.of(headers):
        assert not access.may_name("org/x")
        assert not access.may_see(recipe("org/x"))
        assert not access.may_use(recipe("org/x"))


def test_on_a_server_without_keys_a_rule_for_a_key_is_for_who_has_it():
    access = Access(POLICY)
    with access.of([]):
        assert access.may_name("org/x")
        assert not access.may_name("shared")
    with access.of(bearer("a")):
        assert access.may_name("shared")


def test_a_merge_sent_back_is_unknown_forbidden_or_granted():
    access = Access(POLICY, ["a", "boss"])
    mixed = recipe("team-a-1", "team-b-1")
    with access.of(bearer("a")):
        assert access.may_use(recipe("team-a-1", "shared"))
        assert not access.may_use(mixed)  # it does not exist
    with access.of(bearer("boss")), pytest.raises(ForbiddenError):
        access.may_use(mixed)
    with access.of(bearer("a")):  # the same content under other names
        access.grant(mixed.merge_id)
        assert access.may_use(mixed)
        assert access.may_see(mixed)
    with access.of(bearer("boss")):
        assert not access.may_see(mixed)


@given(st.dictionaries(st.sampled_from("abcdef"), st.booleans()))
def test_what_is_not_visible_is_not_there(entries):
    table = Visible(entries, lambda visible: visible)
    seen = {name: True for name, visible in entries.items() if visible}
    assert dict(table.items()) == seen
    assert list(table.values()) == list(seen.values())
    assert list(table) == list(table.keys()) == list(seen)
    assert len(table) == len(seen)
    for name in "abcdef":
        assert (name in table) is (name in seen)
        assert table.get(name) == seen.get(name)
        if name not in seen:
            with pytest.raises(KeyError):
                table[name]
    for name in entries:
        table.pop(name, None)
    assert not dict.__len__(table)
    table["x"] = True
    assert "x" in table


def test_callers_are_told_apart_while_they_are_served_at_once():
    access = Access(POLICY, ["a", "b"])
    seen: dict[str, list[bool]] = {"a": [], "b": []}

    async def app(scope: Any, *_: Any) -> None:
        for _ in range(3):
            seen[scope["key"]].append(access.may_name("team-a-1"))
            seen[scope["key"]].append(
                await asyncio.create_task(asyncio.to_thread(access.may_name, "team-a-1"))
            )

    async def scenario() -> None:
        callers = Callers(app)
        callers.access = access
        await asyncio.gather(
            *(callers({"key": key, "headers": bearer(key)}, None, None) for key in "ab")
        )

    asyncio.run(scenario())
    assert seen == {"a": [True] * 6, "b": [False] * 6}


def test_connections_without_headers_and_servers_without_policy_pass():
    served = []

    async def app(scope: Any, *_: Any) -> None:
        served.append(scope["type"])

    callers = Callers(app)
    asyncio.run(callers({"type": "http", "headers": []}, None, None))
    callers.access = Access(POLICY)
    asyncio.run(callers({"type": "lifespan"}, None, None))
    assert served == ["http", "lifespan"]


def test_serve_refuses_it_before_vllm_starts(tmp_path):
    (tmp_path / "p.toml").write_text("[[allow]]")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "vllm_lego.cli",
            "serve",
            "m",
            f"--policy-file={tmp_path / 'p.toml'}",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("vllm-lego: VLLM_LEGO_POLICY_FILE, ")
    assert ran.stderr.count("\n") == 1
