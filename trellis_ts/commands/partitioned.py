"""Forecasts and scores of folders of Parquet files, block by block, for the commands that can do it."""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from trellis_ts.commands.console import counted
from trellis_ts.commands.forecast import check_horizon, index_names, note_doubts
from trellis_ts.commands.loading import load_forecaster, read_on_own_calendar, spell_columns
from trellis_ts.commands.options import COLUMN_OPTIONS
from trellis_ts.datasets.columns import MissingColumnError
from trellis_ts.datasets.partitions import ParquetFolder
from trellis_ts.datasets.roles import split_names
from trellis_ts.datasets.spreading import buckets_in, distinct_series, num_buckets, spread
from trellis_ts.datasets.stores import is_url, open_store
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.evaluation import check_scored
from trellis_ts.files import reason_of
from trellis_ts.partitioned.engines import run_here, run_on_ray
from trellis_ts.partitioned.jobs import ForecastJob, ModelFiles, Reading, Report, ScoreJob
from trellis_ts.partitioned.output import open_run
from trellis_ts.scored import Scored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jsonargparse import Namespace

    from trellis_ts.commands.console import Terminal
    from trellis_ts.datasets.partitions import Block
    from trellis_ts.doubts import SeriesDoubts
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.partitioned.engines import Job
    from trellis_ts.partitioned.output import Part
    from trellis_ts.scores import Evaluation
    from trellis_ts.types import Panel

_Result = TypeVar("_Result")
_SECONDS_BETWEEN_LINES = 30.0


def forecast_folder(terminal: Terminal, values: Namespace, levels: Sequence[float] | None) -> None:
    """``trellis forecast MODEL FOLDER -o FOLDER``."""
    _check_apart(values.data, values.output)
    model, forecaster, folder, reading = _opened(values)
    blocks = folder.blocks(reading.keys, reading.columns)
    id_name, time_name = index_names(values, forecaster, reading.keys if len(reading.keys) > 1 else ())
    about = {
        "model": model.digest,
        "input": folder.fingerprint,
        "settings": {
            "prediction_length": values.prediction_length,
            "quantile_levels": None if levels is None else list(levels),
            "samples": values.samples,
            "seed": values.seed if values.samples else None,
            "reading": repr(reading),
            "columns": [id_name, time_name],
            "partitions": num_buckets(folder, reading.columns) if blocks is None else len(blocks),
            "version": version("trellis-ts"),
        },
    }
    output = open_run(values.output, about, overwrite=values.overwrite)
    if (all_parts := output.all_finished()) is not None:
        _say(terminal, values.output, all_parts, 0)
        return
    if blocks is None:
        if not output.is_spread():
            output.start_spreading()
            _spread(terminal, folder, reading, output.spread_address)
            output.finish_spreading()
        blocks = buckets_in(output.spread_address, reading.columns)
    parts = {block.number: part for block in blocks if (part := output.finished(block.number)) is not None}
    if parts:
        terminal.note(f"{len(parts)} of {counted(len(blocks), 'partition')} were there already")
    left = [block for block in blocks if block.number not in parts]
    job = ForecastJob(
        reading,
        output,
        id_name,
        time_name,
        prediction_length=values.prediction_length,
        quantile_levels=None if levels is None else tuple(levels),
        samples=values.samples,
        seed=values.seed,
    )
    if left:
        check_horizon(_first_panel(forecaster, reading, left[0], values), values.prediction_length)
    done = sum(part.rows_read for part in parts.values())
    summary = _Summary(folder.address)
    for report, part in _run(terminal, job, forecaster, model, left, values, "forecast", done, folder.num_rows):
        summary.add(report)
        parts[part.block] = part
    summary.say(terminal)
    if summary.doubts is not None:
        steps = values.prediction_length or forecaster.prediction_length
        has_quantiles = bool(levels or forecaster.checkpoint.model.quantile_levels)
        note_doubts(terminal, forecaster, summary.doubts, steps=steps, has_quantiles=has_quantiles)
    _check_rows(sum(part.rows_read for part in parts.values()), folder)
    expected = distinct_series(folder, reading.keys) if reading.keys else None
    written_keys = reading.keys if len(reading.keys) > 1 else (id_name,)
    output.close(list(parts.values()), written_keys, expected)
    _say(terminal, values.output, list(parts.values()), len(left))


def evaluate_folder(terminal: Terminal, values: Namespace, baselines: Sequence[str]) -> Evaluation:
    """``trellis evaluate MODEL FOLDER``: the same scores as of the rows in one table."""
    if values.adaptive:
        raise ConfigError("--adaptive follows all series together, and a folder is read some at a time; leave it out")
    model, forecaster, folder, reading = _opened(values)
    job = ScoreJob(reading, step=values.step, max_origins=values.max_origins, baselines=tuple(baselines))
    with _spread_if_need_be(terminal, folder, reading) as blocks:
        _first_panel(forecaster, reading, blocks[0], values)
        found: dict[int, Scored] = {}
        summary, num_rows = _Summary(folder.address), 0
        for report, scored in _run(terminal, job, forecaster, model, blocks, values, "evaluated", 0, folder.num_rows):
            summary.add(report)
            num_rows += report.rows
            found[report.block] = scored
    summary.say(terminal)
    _check_rows(num_rows, folder)
    scored = Scored.joined([found[number] for number in sorted(found)])
    check_scored(scored, folder.address)
    return scored.evaluation(seed=values.seed)


def _opened(values: Namespace) -> tuple[ModelFiles, Forecaster, ParquetFolder, Reading]:
    """The model, the folder, and how one is read for the other."""
    calibrated = not values.no_calibration
    forecaster = load_forecaster(values.model, values.device, calibrated=calibrated)
    model = ModelFiles.of(values.model, device=values.device, calibrated=calibrated)
    folder = ParquetFolder(values.data)
    record = forecaster.checkpoint.data
    named = values.id or record.id_column
    try:
        keys = () if named is None else split_names(folder.header, "--id", [named])
        reading = Reading.of(forecaster.checkpoint, keys, {name: values[name] for name in COLUMN_OPTIONS})
        for name in reading.columns:
            if name not in folder.schema.names:
                split_names(folder.header, "--target" if name in reading.target else "--time", [name])
    except MissingColumnError as error:
        raise DataError(f"{error}; the model was trained on {spell_columns(record)}") from None
    if folder.num_rows == 0:
        raise DataError(f"{folder.address}: the files hold no rows; add rows of data")
    return model, forecaster, folder, reading


def _check_apart(data: str, output: str) -> None:
    """Refuses to write among what is read."""
    if is_url(data) != is_url(output):
        return
    read, written = (f"{open_store(each)[1]}/" for each in (data, output))
    if written.startswith(read) or read.startswith(written):
        raise ConfigError(f"--output {output} lies within DATA or around it; choose a folder of its own")


@contextmanager
def _spread_if_need_be(terminal: Terminal, folder: ParquetFolder, reading: Reading) -> Iterator[Sequence[Block]]:
    """The blocks, from temporary files where the rows of a series lie anywhere."""
    blocks = folder.blocks(reading.keys, reading.columns)
    if blocks is not None:
        yield blocks
        return
    with TemporaryDirectory(prefix="trellis-") as directory:
        yield _spread(terminal, folder, reading, directory)


def _spread(terminal: Terminal, folder: ParquetFolder, reading: Reading, into: str) -> Sequence[Block]:
    terminal.note(
        f"note: {folder.address}: the rows of a series lie apart, so all are first spread by series over temporary "
        f"files in {into}"
    )
    progress = _Progress(terminal, "spread", folder.num_rows)
    try:
        with terminal.progress("spreading") as bar:
            return spread(folder, reading.keys, reading.columns, into, lambda done, total: progress.moved(done, bar))
    except OSError as error:
        raise ConfigError(f"cannot write {into}: {reason_of(error)}; make room, then run again") from error


def _first_panel(forecaster: Forecaster, reading: Reading, block: Block, values: Namespace) -> Panel:
    """The panel of one block, refused before the work where its calendar is another than the model's."""
    table = block.read()

    def read(freq: str | None) -> Panel:
        return replace(reading, freq=freq).panel(table, block.address)

    settings = forecaster.checkpoint.experiment.data
    if values.freq is not None or settings.freq is not None or settings.regularize or reading.freq is None:
        return read(reading.freq)
    return read_on_own_calendar(read, reading.freq)


def _check_rows(found: int, folder: ParquetFolder) -> None:
    if found != folder.num_rows:
        raise DataError(
            f"{folder.address}: {found:,} of {folder.num_rows:,} rows were read; the files have changed under way, or "
            "their statistics are wrong: write them again"
        )


def _run(
    terminal: Terminal,
    job: Job[tuple[Report, _Result]],
    forecaster: Forecaster,
    model: ModelFiles,
    blocks: Sequence[Block],
    values: Namespace,
    verb: str,
    done: int,
    total: int,
) -> Iterator[tuple[Report, _Result]]:
    """Every block's report and result, with progress by rows."""
    if not blocks:
        return
    results = (
        run_on_ray(job, model, blocks, values.address) if values.engine == "ray" else run_here(job, forecaster, blocks)
    )
    progress = _Progress(terminal, verb, total)
    with terminal.progress(f"{verb} rows") as bar:
        bar(done, total)
        for report, result in results:
            done += report.rows
            progress.moved(done, bar)
            yield report, result


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, terminal: Terminal, verb: str, total: int) -> None:
        self._terminal, self._verb, self._total = terminal, verb, total
        self._last = self._start = time.monotonic()

    def moved(self, done: int, bar: Callable[[int, int | None], None]) -> None:
        bar(done, self._total)
        now = time.monotonic()
        if not self._terminal.err.is_terminal and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self._terminal.note(f"{self._verb} {done:,} of {self._total:,} rows in {now - self._start:.0f} s")


class _Summary:
    """What the blocks had to say, each thing once."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._texts: dict[str, str] = {}
        self._times: Counter[str] = Counter()
        self.doubts: SeriesDoubts | None = None

    def add(self, report: Report) -> None:
        """Takes note of a block."""
        for note in report.notes:
            kind = re.sub(r"[\d.,]+", "N", note)
            self._texts.setdefault(kind, note)
            self._times[kind] += 1
        self.doubts = report.doubts if self.doubts is None else self.doubts + report.doubts

    def say(self, terminal: Terminal) -> None:
        """Says it."""
        for kind, text in self._texts.items():
            more = f" (and likewise in {self._times[kind] - 1:,} more partitions)" if self._times[kind] > 1 else ""
            terminal.note(f"note: {self._source}: {text}{more}")


def _say(terminal: Terminal, output: str, parts: Sequence[Part], num_new: int) -> None:
    rows, series = sum(part.rows_written for part in parts), sum(part.series for part in parts)
    read = sum(part.rows_read for part in parts)
    text = f"{counted(rows, 'row')} of {series:,} series, from {counted(read, 'row')}, in "
    text += f"{counted(len(parts), 'partition')}"
    data = {"rows": rows, "series": series, "rows_read": read, "partitions": len(parts), "output": output}
    terminal.result(
        f"wrote {text} to {output}" if num_new else f"{output} was complete: {text}", {**data, "written": num_new}
    )
