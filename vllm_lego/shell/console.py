"""Tables on stdout, progress on stderr: rich on a terminal, plain where they are piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

_UNLIMITED = 10_000
_LONGEST = 200


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show what goes on, on stderr if that is a terminal; else nothing but errors is there.

    Args:
        total: number of steps.

    Yields:
        To be called with what the next step is.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=total)
        done = iter(range(total + 1))
        yield lambda text: bar.update(task, description=clean(text), completed=next(done, total))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns. A column whose name starts with `>` is set to the right."""
    terminal = sys.stdout.isatty()
    table = Table(
        box=box.SIMPLE_HEAD if terminal else None,
        pad_edge=False,
        padding=(0, 1) if terminal else (0, 2, 0, 0),
        header_style="bold",
    )
    for column in columns:
        to_right = column.startswith(">")
        table.add_column(
            Text(column.removeprefix(">")),
            justify="right" if to_right else "left",
            no_wrap=to_right,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    console = Console(width=None if terminal else _UNLIMITED, highlight=False)
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    say("\n".join(line for line in lines if line))


def say(text: str = "") -> None:
    """Print to stdout."""
    sys.stdout.write(text + "\n")


def complain(command: str, message: object) -> None:
    """Print one line to stderr."""
    sys.stderr.write(f"vllm-lego {command}: {' '.join(clean(str(message), limit=0).split())}\n")


def clean(text: str, limit: int = _LONGEST) -> str:
    """Return text from a file fit for a terminal: no control characters, not at any length."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return printable[: limit - 1] + "…" if limit and len(printable) > limit else printable


def sized(nbytes: int) -> str:
    """Return a size as people read it."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def spanned(values: Sequence[float]) -> str:
    """Return one value, or the lowest and the highest."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
