"""What every command shares at the terminal: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..progress import Progress, Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars


class _BarTask(Task):
    def __init__(self, bars: Bars, description: str, total: int | None) -> None:
        self._bars = bars
        self._id = bars.add_task(description, total=total, figures="")

    def advance(self, amount: int = 1, **fields: object) -> None:
        update: dict[str, Any] = {"advance": amount}
        if fields:
            update["figures"] = "  ".join(f"{name} {value}" for name, value in fields.items())
        self._bars.update(self._id, **update)

    def __exit__(self, *error: object) -> None:
        self._bars.stop_task(self._id)


class _BarProgress(Progress):
    def __init__(self, bars: Bars, console: Console) -> None:
        self._bars = bars
        self._console = console

    def task(self, description: str, total: int | None = None) -> Task:
        return _BarTask(self._bars, description, total)

    def note(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Progress bars with elapsed and remaining time on stderr; plain notes where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        yield _BarProgress(bars, console)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "", left: int = 1) -> None:
    """One table on stdout: the first `left` columns are left-aligned, the others right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe has no width: never wrap there, so that lines stay greppable.
    console = Console(file=sys.stdout) if sys.stdout.isatty() else Console(file=sys.stdout, width=200)
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, caption=escape(note) or None, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def figure(value: float | None) -> str:
    """A perplexity for people."""
    return "not measured" if value is None else f"{value:.3f}"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
