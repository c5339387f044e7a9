"""The entry of both commands: parse, run, and turn what goes wrong into a sentence and a code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars

from lego_core import LegoError
from vllm_lego.shell import inspect, merge
from vllm_lego.shell.console import complain

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line; the usage of so many flags would hide it."""
        complain(self.prog.partition(" ")[2], f"{message} (see {self.prog} --help)")
        sys.exit(USAGE)


def main(arguments: Sequence[str]) -> int:
    """Run `merge …` or `inspect …`; returns the exit code."""
    command = {"merge": merge, "inspect": inspect}[arguments[0]]
    parser = _Parser(
        prog=f"vllm-lego {arguments[0]}",
        description=command.__doc__,
        epilog=f"exit codes: {DONE} done; {FAILED} an adapter cannot be read, merged or written "
        f"(one line on stderr says why); {USAGE} the command line makes no sense",
        allow_abbrev=False,
    )
    command.add_flags(parser)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name must not break the output of a poor locale
            stream.reconfigure(errors="backslashreplace")
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        disable_progress_bars()  # two kinds of progress do not go together
    try:
        task = command.prepare(parser.parse_args(arguments[1:]))
    except LegoError as error:
        parser.error(str(error))
    try:
        code: int = task()
        sys.stdout.flush()
    except LegoError as error:
        complain(arguments[0], error)
        return FAILED
    except torch.OutOfMemoryError as error:
        complain(arguments[0], f"the device has too little memory ({str(error).split('.')[0]})")
        return FAILED
    except BrokenPipeError:  # as in `… | head`; nor may the interpreter flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code
