"""What a run shows while it works: rich bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Receives what a training loop has to tell; this one shows nothing."""

    def start(self, updates: int, done: int) -> None:
        """A run of `updates` in all begins, of which `done` are behind it."""

    def step(self, epoch: int, update: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Some updates are done; loss and training accuracy (percent) are those of this epoch so far."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done; `row` is its line of metrics.jsonl."""

    def message(self, text: str) -> None:
        """Something the user should read."""

    def stop(self) -> None:
        """The run has ended, in whatever way."""


class BarReporter(Reporter):
    """One bar over the whole run, and a line an epoch, on a terminal."""

    def __init__(self, console: Console, epochs: int) -> None:
        self.console = console
        self.epochs = epochs
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}  {task.fields[rate]} images/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def start(self, updates: int, done: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task(
            "training", total=updates, completed=done, loss="-", accuracy="-", rate="-"
        )

    def step(self, epoch: int, update: int, loss: float, accuracy: float, images_per_second: float) -> None:
        if self._task is not None:
            self._progress.update(
                self._task,
                completed=update,
                description=f"epoch {epoch + 1}/{self.epochs}",
                loss=f"{loss:.3f}",
                accuracy=f"{accuracy:.1f} %",
                rate=f"{images_per_second:.0f}",
            )

    def epoch(self, row: dict[str, Any]) -> None:
        self._progress.console.print(epoch_line(row, self.epochs), highlight=False)

    def message(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


class LineReporter(Reporter):
    """Plain lines, at most one every few seconds within an epoch: for logs and pipes."""

    def __init__(self, epochs: int, every_seconds: float = 10.0) -> None:
        self.epochs = epochs
        self.every_seconds = every_seconds
        self._updates = 0
        self._begun = self._shown = time.monotonic()
        self._begun_at = 0

    def start(self, updates: int, done: int) -> None:
        self._updates, self._begun_at = updates, done
        self._begun = self._shown = time.monotonic()

    def step(self, epoch: int, update: int, loss: float, accuracy: float, images_per_second: float) -> None:
        now = time.monotonic()
        if now - self._shown < self.every_seconds or update == self._begun_at:
            return
        self._shown = now
        left = (now - self._begun) / (update - self._begun_at) * (self._updates - update)
        self.message(
            f"  epoch {epoch + 1}/{self.epochs}  update {update}/{self._updates}  loss {loss:.3f}  "
            f"accuracy {accuracy:.1f} %  {images_per_second:.0f} images/s  {left:.0f} s left"
        )

    def epoch(self, row: dict[str, Any]) -> None:
        self.message(epoch_line(row, self.epochs))

    def message(self, text: str) -> None:
        print(text, flush=True, file=sys.stdout)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One epoch in one line."""
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  train {row['train_accuracy']:.1f} %  "
        f"validation {row['validation_accuracy']:.2f} %  lr {row['lr']:.2e}  "
        f"{row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
    )


def make_reporter(epochs: int, console: Console | None = None) -> Reporter:
    """Bars where a person watches, lines otherwise."""
    console = console or Console()
    return BarReporter(console, epochs) if console.is_terminal else LineReporter(epochs)
