"""The `vllm-lego` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_SHELL = {
    "merge": "merge LoRA adapters into one, a PEFT folder; no server, no vLLM",
    "inspect": "what is in LoRA adapters, can they be merged, how alike are they",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] and arguments[0] in _SHELL:
        from vllm_lego.shell.main import main as shell  # noqa: PLC0415  imports torch

        return shell(arguments)
    if arguments[:1] == ["serve"]:
        from vllm_lego.serve import serve  # noqa: PLC0415  needed by none of the others

        return serve(arguments[1:])
    parser = argparse.ArgumentParser(prog="vllm-lego", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="vllm serve, with sets of adapters")
    for command, what in _SHELL.items():
        commands.add_parser(command, help=what)
    _add_demo(commands)
    return _demo(parser.parse_args(arguments))


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="several adapters served as one, on a small embedded model and a CPU",
        description="Serve SmolLM2-135M-Instruct with the adapters that ship with the package, ask "
        "it questions with single adapters and with sets, and show the answers side by side.",
    )
    parser.add_argument("--serve", action="store_true", help="keep the server up instead of asking")
    parser.add_argument("--port", type=int, default=8000, help="port of --serve (default: 8000)")


def _demo(options: argparse.Namespace) -> int:
    from vllm_lego.demo import run  # noqa: PLC0415  needs the extra `demo`

    return run.serve(options.port) if options.serve else run.demo()


if __name__ == "__main__":
    sys.exit(main())
