"""How training is followed and stopped: a bar on a terminal, lines elsewhere, and Ctrl-C."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from trellis_ts.commands.console import Terminal
    from trellis_ts.training import EpochReport

_STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _GivenUp(BaseException):
    """Stands for a KeyboardInterrupt on the way through Lightning, which would exit on one."""


class TrainingProgress:
    """Draws one bar for the whole training on a terminal, or prints a line per epoch elsewhere.

    While it is entered, the first Ctrl-C (or SIGTERM) ends training after the current step; a second one ends the
    program.
    """

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.interrupted = False
        self._is_live = not terminal.quiet and terminal.err.is_terminal
        # At most 79 columns, for a line that wraps is drawn anew below itself.
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=terminal.err,
            transient=True,  # the summary takes its place
            disable=not self._is_live,
        )
        self._task: Any = None
        self._best = ""
        self._num_epochs = 0

    def __enter__(self) -> TrainingProgress:
        self._handlers = {number: signal.getsignal(number) for number in _STOPPING_SIGNALS}
        self._listen()
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is _GivenUp:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        for number in _STOPPING_SIGNALS:
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        if self.interrupted:
            raise _GivenUp
        self.interrupted = True
        self.terminal.note("stopping after this step; the best model is kept (press Ctrl-C again to give up)")

    def started(self, *, num_epochs: int, steps_per_epoch: int, first_epoch: int) -> None:
        """Draws the bar, with the epochs of an earlier run as done."""
        self._listen()  # once more, for Lightning has its own handler by now, which ends the program without a model
        self._num_epochs = num_epochs
        self._task = self._bar.add_task(
            f"epoch {min(first_epoch + 1, num_epochs)}/{num_epochs}",
            total=num_epochs * steps_per_epoch,
            completed=first_epoch * steps_per_epoch,
            losses="",
        )

    def stepped(self) -> None:
        """Moves the bar by one step."""
        self._bar.advance(self._task)

    def epoch_ended(self, report: EpochReport) -> None:
        """Shows the epoch's losses."""
        if report.is_best:
            self._best = f"best {report.validation_loss:.4f} (epoch {report.epoch})"
        losses = f"loss {report.validation_loss:.4f}  {self._best}"
        following = min(report.epoch + 1, self._num_epochs)
        self._bar.update(self._task, description=f"epoch {following}/{self._num_epochs}", losses=losses)
        if not self._is_live:
            self.terminal.note(
                f"epoch {report.epoch}/{self._num_epochs}: train {report.train_loss:.4f}  "
                f"validation {report.validation_loss:.4f}{'  (best)' if report.is_best else ''}"
            )

    def should_stop(self) -> bool:
        """Whether the user has asked to stop."""
        return self.interrupted

    def warned(self, line: str) -> None:
        """Says what went wrong on the way."""
        self.terminal.note(line)
