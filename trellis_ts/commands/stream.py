"""``trellis stream``: follows live series, a forecast for every line that comes."""

from __future__ import annotations

import json
import math
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trellis_ts.commands.console import Terminal, counted
from trellis_ts.commands.feed import FollowedLines, LineReader, Lines, PipeLines
from trellis_ts.commands.options import Parser, add_calibration_option
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.files import check_writable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from jsonargparse import Namespace

    from trellis_ts.commands.feed import Observation
    from trellis_ts.streaming.forecaster import StreamingForecaster


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "stream",
        "MODEL [--follow FILE] [--state FILE] [--every N] ...",
        "Reads observations from standard input, one per line, and prints a forecast after each as a JSON object. The "
        "first line is a CSV header with the columns the model was trained on, or every line is a JSON object with "
        "such keys. A series is remembered whole in a state of fixed size; with --state it goes on where it stopped.",
    )
    options.add_argument(
        "model", type=str, metavar="MODEL", help="model directory written by `trellis train --mode streaming`"
    )
    options.add_argument(
        "--follow", type=str, metavar="FILE", help="read this file instead, and wait for more at its end"
    )
    options.add_argument(
        "--state",
        type=str,
        metavar="FILE",
        help="go on from the state in this file, if there is one, and keep it there",
    )
    options.add_argument(
        "--save-every",
        type=int,
        default=1000,
        metavar="N",
        help="lines after which the state is written; at the end it always is (default: 1000)",
    )
    options.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="updates of a series from one forecast to the next (default: 1)",
    )
    options.add_argument(
        "--steps", type=int | None, default=None, metavar="N", help="first steps to print (default: all)"
    )
    options.add_argument(
        "--quantile-levels",
        type=str,
        nargs="+",
        metavar="X",
        help="levels to forecast, such as 0.05,0.5,0.95 (default: as trained)",
    )
    options.add_argument(
        "--drift", action="store_true", help="add forget gate, surprise and rolling error to each line"
    )
    options.add_argument(
        "--strict", action="store_true", help="stop at a line that cannot be read, instead of skipping it"
    )
    options.add_argument("--no-adaptation", action="store_true", help="do not let bands learn from what comes true")
    add_calibration_option(options)
    options.add_argument("--quiet", action="store_true", help="no notes")
    return options


class _Stopped(BaseException):
    """SIGTERM came while there was nothing half done."""


class _Signals:
    """Lets SIGTERM and Ctrl-C break off waiting, but no update: the state is always that after a whole line."""

    def __init__(self) -> None:
        self._is_waiting, self.reason = False, ""

    def handle(self, number: int, _: object) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if self._is_waiting:
            self._is_waiting = False
            raise _Stopped

    @contextmanager
    def waiting(self) -> Iterator[None]:
        if self.reason:
            raise _Stopped
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    from trellis_ts.commands.forecast import levels_of
    from trellis_ts.streaming.forecaster import StreamingForecaster

    values = parser().parse_args(arguments)
    for name in ("save_every", "every", "steps"):
        if values[name] is not None and values[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {values[name]}")
    state = None if values.state is None else Path(values.state)
    if state is not None:
        check_writable(state)
    levels = levels_of(values.quantile_levels)
    live = StreamingForecaster(values.model, adaptive=not values.no_adaptation, calibrated=not values.no_calibration)
    signals = _Signals()
    before = {each: signal.signal(each, signals.handle) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Stream(Terminal(quiet=values.quiet, as_json=False), values, live, state, levels, signals).run()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if signals.reason == "SIGINT":
        raise KeyboardInterrupt


class _Stream:
    """Lines in, forecasts out, and the state kept."""

    def __init__(
        self,
        terminal: Terminal,
        values: Namespace,
        live: StreamingForecaster,
        state: Path | None,
        levels: list[float] | None,
        signals: _Signals,
    ) -> None:
        self.terminal, self.values, self.live, self.state = terminal, values, live, state
        self.levels, self.signals = levels, signals
        self.reader = LineReader(live.checkpoint.data)
        self.number = self.updates = self.skipped = self.late = 0
        self._since_forecast: dict[str | None, int] = {}
        self._saved = 0

    def run(self) -> None:
        """Until the end of the input, a signal, or a reader of the output that has gone."""
        extra: dict[str, str] = {}
        if self.state is not None and self.state.exists():
            extra = self.live.restore(self.state)
            self.terminal.note(f"note: going on from {self.state}: {counted(len(self.live.series), 'known name')}")
        try:
            self._follow(self._source(extra))
        except _Stopped:
            self.terminal.note(f"note: stopped by {self.signals.reason}")
        finally:
            self._save(force=True)
        self.terminal.note(
            f"note: {counted(self.updates, 'update')}, {counted(self.skipped, 'line')} skipped, {self.late:,} late"
        )

    def _source(self, extra: dict[str, str]) -> Lines:
        if self.values.follow is None:
            return PipeLines(sys.stdin.buffer)
        is_same = extra.get("follow") == str(Path(self.values.follow).resolve())
        return FollowedLines(Path(self.values.follow), int(extra["offset"]) if is_same else 0)

    def _follow(self, source: Lines) -> None:
        self._offset = source.offset
        if isinstance(source, FollowedLines):
            with self.signals.waiting():
                header = source.header()
            if not self._begin(header) and source.offset == 0:
                source.offset, self.number = len(header), 1
        while True:
            with self.signals.waiting():
                line = source.read()
            if not line:
                return
            # Before the forecast is printed, which a signal may break off: the update will be in the state by then.
            self._offset = source.offset
            self.number += 1
            if line.strip() and (self.reader.is_json is not None or self._begin(line)):
                self._take(line)
            self._save()

    def _begin(self, line: bytes) -> bool:
        """Whether the first line is an observation."""
        try:
            return self.reader.begin(line)
        except DataError as error:
            raise DataError(f"line {max(1, self.number)}: {error}") from None

    def _take(self, line: bytes) -> None:
        try:
            seen = self.reader.parse(line)
            is_late = self.live.update([seen.values], seen.time, series=seen.series) > 0
        except DataError as error:
            if self.values.strict:
                raise DataError(f"line {self.number}: {error}") from None
            self.skipped += 1
            self.terminal.err.print(f"line {self.number}: {error}; skipped", markup=False)
            return
        if is_late:
            self.late += 1
            return
        self.updates += 1
        since = self._since_forecast.get(seen.series, 0) + 1
        if since >= self.values.every:
            since = 0
            self._print(seen)
        self._since_forecast[seen.series] = since

    def _print(self, seen: Observation) -> None:
        forecast = self.live.forecast(seen.series, quantile_levels=self.levels)
        last = self.live.last_time(seen.series)
        clock, record = self.live.clock, self.live.checkpoint.data
        line: dict[str, Any] = {} if seen.series is None else {record.id_column or "series": seen.series}
        if last is not None:
            line[record.time_column] = clock.spell(int(last.astype("int64")))
        steps = slice(0, self.values.steps)
        drift = self.live.drift(seen.series) if self.values.drift else None
        for index, channel in enumerate(record.channels):
            one: dict[str, Any] = {"forecast": _listed(forecast.point[0, steps, index].numpy())}
            if forecast.quantiles is not None:
                for place, level in enumerate(forecast.quantile_levels):
                    one[f"q{level:g}"] = _listed(forecast.quantiles[0, steps, index, place].numpy())
            if drift is not None:
                one["drift"] = {name: _plain(getattr(drift, name)[index]) for name in drift._fields}
            line |= one if len(record.channels) == 1 else {channel: one}
        with self.signals.waiting():  # a reader that does not read must not keep us from stopping
            sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
            sys.stdout.flush()

    def _save(self, *, force: bool = False) -> None:
        due = self.number - self._saved >= self.values.save_every
        if self.state is None or self.number == self._saved or not (force or due):
            return
        extra = {"lines": str(self.number)}
        if self.values.follow is not None:
            extra |= {"follow": str(Path(self.values.follow).resolve()), "offset": str(self._offset)}
        self.live.snapshot(self.state, extra=extra)
        self._saved = self.number


def _listed(values: np.ndarray[Any, Any]) -> list[float | None]:
    return [_plain(value) for value in values]


def _plain(value: float) -> float | None:
    """Ten digits, and null for what is no number."""
    return float(f"{value:.10g}") if math.isfinite(value) else None
