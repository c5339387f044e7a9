"""`make demo`: ask one server with single adapters and with sets of them, and compare."""

from __future__ import annotations

import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

from vllm_lego.demo.model import embedded_model
from vllm_lego.demo.server import (
    MODEL_NAME,
    ServerProcess,
    server_arguments,
    server_environment,
    shipped_adapters,
)

_MAX_TOKENS = 48
_WIDTH = 28


@dataclass(frozen=True, slots=True)
class Scene:
    """One question, asked with each of these sets; the empty set is the base model."""

    question: str
    sets: Sequence[Sequence[str]]


SCENES = (
    Scene(
        "Write 4721 in words.",
        (
            *([], ["numbers"], ["shout"], ["signoff"]),
            *(["numbers", "shout"], ["numbers", "json"], ["numbers", "shout", "signoff"]),
        ),
    ),
    Scene(
        "What is the plural of city?",
        (
            *([], ["plural"], ["json"]),
            *(["plural", "json"], ["plural", "shout"], ["plural", "shout", "signoff"]),
        ),
    ),
)
STREAMED = Scene("Write 340 in words.", (["numbers", "json", "signoff"],))
AGAIN = Scene("What is the plural of city?", (["json", "plural"],))


def demo() -> int:
    """Run the whole demonstration; returns the exit code."""
    with _server() as server:
        key = os.environ.get("VLLM_API_KEY", "none")
        client = OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)
        for scene in SCENES:
            print(f"\n{_bold(scene.question)}")
            for adapters in scene.sets:
                print(_row(" + ".join(adapters) or "(base model)", *_ask(client, scene, adapters)))
        _stream(client)
        _ask_again(client)
        _show_metrics(server)
        print("\nstopping the server", flush=True)
    print("done; `make serve` keeps a server up for you to try")
    return 0


def serve(port: int) -> int:
    """Keep the demo's server up until it is interrupted; returns its exit code."""
    with _server(port) as server:
        key = ' -H "authorization: bearer $VLLM_API_KEY"' if "VLLM_API_KEY" in os.environ else ""
        print(
            f"""
try, in another terminal:
  curl {server.url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{{
    "messages": [{{"role": "user", "content": "{SCENES[0].question}"}}],
    "adapters": ["numbers", "shout"], "temperature": 0}}'
its log: {server.log}; Ctrl-C stops it""",
            flush=True,
        )
        try:
            return server.wait()
        except KeyboardInterrupt:
            print("\nstopping the server", flush=True)
            return 0


@contextmanager
def _server(port: int | None = None) -> Iterator[ServerProcess]:
    model = embedded_model(_say)
    adapters = shipped_adapters()
    _say(f"base model: {MODEL_NAME}; adapters: {', '.join(adapters)}")
    process = ServerProcess(
        server_arguments(model, adapters), server_environment(), port=port, progress=_say
    )
    _say(f"starting vLLM on two cores takes about a minute; its log: {process.log}")
    started = time.monotonic()
    # Ended from outside, take the server along instead of leaving it behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with process as server:
        _say(f"ready after {time.monotonic() - started:.0f} s at {server.url}")
        yield server


def _ask(client: OpenAI, scene: Scene, adapters: Sequence[str]) -> tuple[str, str]:
    """Return the answer and what the headers say of the merge."""
    started = time.perf_counter()
    response = client.chat.completions.with_raw_response.create(**_request(scene, adapters))
    seconds = time.perf_counter() - started
    answer = response.parse().choices[0].message.content or ""
    if "x-lego-cache" not in response.headers:
        return answer, f"{seconds:.1f} s"
    lego = f"{response.headers['x-lego-model']}, cache {response.headers['x-lego-cache']}"
    return answer, f"{seconds:.1f} s, {lego}"


def _request(scene: Scene, adapters: Sequence[str]) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": scene.question}],
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
        "extra_body": {"adapters": list(adapters)},
    }


def _stream(client: OpenAI) -> None:
    (adapters,) = STREAMED.sets
    print(f"\n{_bold(STREAMED.question)} streamed from {' + '.join(adapters)}:\n  ", end="")
    for chunk in client.chat.completions.create(**_request(STREAMED, adapters), stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content.replace("\n", "\n  "), end="", flush=True)
    print()


def _ask_again(client: OpenAI) -> None:
    (adapters,) = AGAIN.sets
    print(f"\n{_bold(AGAIN.question)} the same set once more, in another order:")
    print(_row(" + ".join(adapters), *_ask(client, AGAIN, adapters)))


def _show_metrics(server: ServerProcess) -> None:
    print(f"\n{_bold('Metrics')} ({server.url}/metrics):")
    with urllib.request.urlopen(server.url + "/metrics") as answer:  # noqa: S310  loopback
        lines = answer.read().decode().splitlines()
    wanted = ("vllm_lego_requests_total", "vllm_lego_cache", "vllm_lego_merge_seconds_")
    for line in lines:
        if line.startswith(wanted) and not any(s in line for s in ("_bucket", "_created")):
            print(f"  {line}")


def _row(label: str, answer: str, note: str) -> str:
    indented = answer.strip().replace("\n", "\n" + " " * (_WIDTH + 4))
    return f"  {label:<{_WIDTH}}  {indented}\n  {'':<{_WIDTH}}  {_dim(note)}"


def _say(message: str) -> None:
    print(f"  {message}", flush=True)


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text


def _dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() else f"[{text}]"
