"""The `vllm-lego` command."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vllm_lego.policy import read_policy
from vllm_lego.settings import Settings, SettingsError, flag_name, variable_name

_PLUGIN = "lego"
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
    parser = argparse.ArgumentParser(prog="vllm-lego", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_serve(commands)
    for command, what in _SHELL.items():
        commands.add_parser(command, help=what)
    _add_demo(commands)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "serve":
        return _serve(options, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _demo(options)


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="vllm serve, with sets of adapters",
        description="`vllm serve` with the plugin loaded and --enable-lora set. Every argument "
        "that is not listed here goes to vLLM as it is: the model, --lora-modules and so on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("settings of vllm-lego, each also an environment variable")
    for setting in dataclasses.fields(Settings):
        group.add_argument(
            flag_name(setting.name),
            dest=variable_name(setting.name),
            metavar=setting.metadata["kind"].__name__.upper(),
            default=argparse.SUPPRESS,
            help=f"{setting.metadata['help']} [{variable_name(setting.name)}, "
            f"default: {setting.default}]",
        )


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="several adapters served as one, on a small embedded model and a CPU",
        description="Serve SmolLM2-135M-Instruct with the adapters that ship with the package, ask "
        "it questions with single adapters and with sets, and show the answers side by side.",
    )
    parser.add_argument("--serve", action="store_true", help="keep the server up instead of asking")
    parser.add_argument("--port", type=int, default=8000, help="port of --serve (default: 8000)")


def _serve(options: argparse.Namespace, rest: Sequence[str]) -> int:
    environment = dict(os.environ)
    environment |= {k: v for k, v in vars(options).items() if k.startswith("VLLM_LEGO_")}
    try:
        read_policy(Settings.from_environment(environment))
    except SettingsError as error:
        print(f"vllm-lego: {error}", file=sys.stderr)
        return 2
    plugins = environment.get("VLLM_PLUGINS")
    listed = plugins.split(",") if plugins else []
    if _PLUGIN not in listed:
        # vLLM loads an endpoint plugin only when it is named, and then only those named.
        environment["VLLM_PLUGINS"] = ",".join([*listed, _PLUGIN])
    flags = [] if "--enable-lora" in rest else ["--enable-lora"]
    return _exec_vllm(["serve", *rest, *flags], environment)


def _exec_vllm(arguments: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Become plain vLLM: its signals, its exit code, nothing of ours in between."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]
    os.execve(sys.executable, command, environment)  # noqa: S606  our own interpreter


def _demo(options: argparse.Namespace) -> int:
    from vllm_lego.demo import run  # noqa: PLC0415  needs the extra `demo`

    return run.serve(options.port) if options.serve else run.demo()


if __name__ == "__main__":
    sys.exit(main())
