"""Display for people on stderr: progress, tokens as they come, tables; the same as plain text in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from launch.terminal.streams import Lasting

PLAIN_WIDTH = 110  # columns where there is no terminal to ask
PLAIN_PAUSE_S = 3.0  # between progress lines where nothing can be drawn over


class Display:
    """Writes to stderr: with bars on a terminal, else a plain line every few seconds."""

    def __init__(self) -> None:
        stream: Any = Lasting(sys.stderr)
        live = stream.isatty()
        self.live = live
        self._console = Console(file=stream, width=None if live else PLAIN_WIDTH, highlight=False, soft_wrap=True)
        self._log: Console | None = None

    @contextmanager
    def logging_to(self, file: Path) -> Iterator[None]:
        """Write everything but bars to ``file`` as well. Raises OSError, at the end, for what it did not take."""
        stream: Any = Lasting(file.open("w", encoding="utf-8"))
        self._log = Console(file=stream, width=PLAIN_WIDTH, highlight=False, soft_wrap=True)
        try:
            yield
        finally:
            self._log = None
            stream.flush()
            with contextlib.suppress(OSError):
                stream.close()
        if stream.failed is not None:
            raise stream.failed

    def note(self, text: str, style: str = "") -> None:
        """Write one line."""
        for console in self._consoles():
            console.print(Text(text, style=style))

    def raw(self, text: str) -> None:
        """Write a piece of text as it is, at once."""
        for console in self._consoles():
            console.file.write(text)
            console.file.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table: first column to the left, numbers to the right."""
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", header_style="dim", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        for console in self._consoles():
            console.print(table, soft_wrap=False)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say that something without known length is under way, and how long it took."""
        start = time.perf_counter()
        if self.live:
            with self._console.status(f"{what} ..."):
                yield
        else:
            self.note(f"{what} ...")
            yield
        self.note(f"{what}: {seconds(time.perf_counter() - start)}", style="dim")

    @contextmanager
    def progress(self, unit: Callable[[int], str] = str) -> Iterator[Callable[[str, int, int], None]]:
        """Give a callback ``(phase, done, total)``; ``unit`` writes an amount; total 0 is unknown."""
        if not self.live:
            yield _PlainProgress(self.note, unit)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def update(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    for task in tasks.values():
                        bars.update(task, visible=False)
                    tasks[phase] = bars.add_task(phase, total=total or None, amount="")
                amount = f"{unit(done)}/{unit(total)}" if total else unit(done) if done else ""
                bars.update(tasks[phase], completed=done, total=total or None, amount=amount)

            yield update

    def _consoles(self) -> list[Console]:
        return [self._console] + ([self._log] if self._log is not None else [])


class _PlainProgress:
    """A line at once, then one every few seconds, with the time that is left at the pace so far."""

    def __init__(self, note: Callable[[str], None], unit: Callable[[int], str]) -> None:
        self._note, self._unit = note, unit
        self._phase, self._start, self._said = "", 0.0, 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._start, self._said = phase, now, now
            self._note(f"{phase} ...")
            return
        if now - self._said < PLAIN_PAUSE_S:
            return
        self._said, spent = now, now - self._start
        amount = f"{self._unit(done)} of {self._unit(total)}" if total else self._unit(done)
        left = f", about {seconds(spent * (total - done) / done)} left" if total and done else ""
        self._note(f"{phase}: {amount}, {seconds(spent)}{left}")


def seconds(value: float | None) -> str:
    """Write a duration."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 90 else f"{int(value) // 60} min {int(value) % 60} s"


def size(count: float) -> str:
    """Write an amount of bytes."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def flops(count: float) -> str:
    """Write an amount of floating-point operations."""
    for limit, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count / 1e6:.1f} MFLOP"
