"""What a person sees: notes, progress, tables. Everything but results goes to standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trellis_ts.types import Panel


class _Notes(Console):
    """Standard error. When its reader has gone nothing more is said, and the work goes on; rich would send standard
    output nowhere and end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())  # for what is still to be flushed at the end
        os.close(nowhere)


class Terminal:
    """Standard output for results, standard error for the rest."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json
        self.err = _Notes(stderr=True, highlight=False, emoji=False)
        # Elsewhere than on a terminal a note stays one line, for those who search them.
        self.err.soft_wrap = not self.err.is_terminal

    def note(self, text: str) -> None:
        """One line on standard error, unless quiet."""
        if not self.quiet:
            self.err.print(text, markup=False)

    def result(self, text: str, data: dict[str, Any]) -> None:
        """The result: text for a person, or JSON for a machine."""
        if self.as_json:
            text = as_json(data)
        sys.stdout.write(text + "\n")

    def tables(self, blocks: Sequence[str | Sequence[Sequence[str]]], data: dict[str, Any]) -> None:
        """A result of lines and tables (rows, the first the header): drawn on a terminal, plain elsewhere."""
        out = Console(highlight=False, emoji=False)
        if self.as_json or not out.is_terminal:
            self.result("\n".join(each if isinstance(each, str) else table(each) for each in blocks), data)
            return
        for each in blocks:
            if isinstance(each, str):
                out.print(each, markup=False)
                continue
            drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
            for index, title in enumerate(each[0]):
                drawn.add_column(Text(title), justify="right" if index else "left", overflow="fold")
            for row in each[1:]:
                drawn.add_row(*map(Text, row))
            out.print(drawn)

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int | None], None]]:
        """A bar that is called with what is done and the total."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self.err, transient=True, disable=self.quiet or not self.err.is_terminal
        ) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def download(self) -> Iterator[Callable[[int, int | None], None]]:
        """A bar in bytes that appears with the first byte."""
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=self.err, transient=True, disable=self.quiet or not self.err.is_terminal
        ) as bar:
            tasks: list[Any] = []

            def update(done: int, total: int | None) -> None:
                if not tasks:
                    if not self.err.is_terminal:
                        self.note("downloading" + (f" {total:,} bytes" if total else ""))
                    tasks.append(bar.add_task("downloading", total=total))
                bar.update(tasks[0], completed=done, total=total)

            yield update


def as_json(data: Any, *, indent: int | None = None) -> str:
    """JSON text, with null for numbers that are none."""
    return json.dumps(_finite(data), allow_nan=False, indent=indent)


def _finite(data: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def counted(number: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def read(terminal: Terminal, data: str, columns: dict[str, Any]) -> Panel:
    """Reads a table or a data set, saying what was accepted with a note."""
    from trellis_ts.datasets.sources import is_partitioned, load_data

    with terminal.progress("reading rows") if is_partitioned(data) else terminal.download() as progress:
        panel = load_data(data, **columns, progress=progress)
    return noted(terminal, panel)


def noted(terminal: Terminal, panel: Panel) -> Panel:
    """The panel, once it is said what the reader accepted and changed."""
    for note in panel.notes:
        terminal.note(f"note: {panel.source}: {note}")
    return panel


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns, the first to the left and the others to the right; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
