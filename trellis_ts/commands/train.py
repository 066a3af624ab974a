"""``trellis train``: from a table to a model directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trellis_ts.commands.configuration import (
    experiment_config,
    flat_config,
    is_open,
    packaged_configs,
    packaged_path,
    read_config,
)
from trellis_ts.commands.console import Terminal, counted, read
from trellis_ts.commands.options import (
    COLUMN_OPTIONS,
    COVARIATE_OPTIONS,
    Parser,
    add_config_options,
    add_output_options,
    add_preset_option,
)
from trellis_ts.commands.progress import TrainingProgress
from trellis_ts.config import checked_preset
from trellis_ts.errors import CheckpointError, ConfigError
from trellis_ts.files import check_directory, reason_of, replace_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jsonargparse import Namespace

    from trellis_ts.checkpoints import Checkpoint
    from trellis_ts.config import ExperimentConfig
    from trellis_ts.preparation import Preparation
    from trellis_ts.training import TrainingSummary
    from trellis_ts.types import Panel

_RUN_FILE, _DATA_FILE, _REASONS_FILE = "run.yaml", "data.sha256", "reasons.txt"
_START_FOLDER = "start"
# What a resumed run may change: how long and on what it runs, not what is computed.
_MAY_CHANGE_ON_RESUME = {
    *("max_time", "max_epochs", "patience", "device", "num_workers", "implementation"),
    *("devices", "num_nodes", "detect_anomaly"),
}
_STOP_TEXT = {
    "epochs": "all epochs done",
    "patience": "no better validation loss for a while",
    "time": "time is up",
    "interrupted": "interrupted; go on with --resume",
    "diverged": "losses were no longer finite; try a lower --learning-rate, or --detect-anomaly true",
}


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "train",
        "DATA [-o MODEL] [--preset fast] [--prediction-length N] [--config FILE] ...",
        "Trains a model on DATA and saves the best epoch. DATA is a CSV or Parquet file with a column of dates and one "
        "column per channel, or with a column that names the series; or the name of a data set (`trellis datasets`). "
        "Everything not given is chosen from the data and explained; data sets known by name have their own settings.",
    )
    # Optional for the parser alone, because --print-config goes without.
    options.add_argument("data", type=str, nargs="?", metavar="DATA", help="path of a table, or name of a data set")
    options.add_argument(
        "-o", "--output", type=str, metavar="MODEL", help="model directory to write (default: models/NAME)"
    )
    add_preset_option(options)
    options.add_argument(
        "--from",
        dest="start",
        type=str,
        metavar="MODEL",
        help="start from the weights of this model, with its network, lengths, loss and columns",
    )
    options.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    options.add_argument("--overwrite", action="store_true", help="replace the model directory if there is one")
    add_output_options(options)
    add_config_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = _parse(arguments)
    config = experiment_config(values)
    if values.print_config:
        named = {key: value for key, value in flat_config(config).items() if not is_open(config, key)}
        sys.stdout.write(yaml.safe_dump(named, sort_keys=False, allow_unicode=True))
        return
    output = output_of(values)
    start = _start(values, output)
    if start is not None and not values.resume:
        from trellis_ts.warm_start import continue_settings

        config = continue_settings(config, start)
    is_first = config.training.num_processes == 1 or _rank() == 0
    if values.resume:
        _check_resumable(output, config)
    elif is_first:
        check_free(output, overwrite=values.overwrite)
    terminal = Terminal(quiet=values.quiet or not is_first, as_json=values.json)
    train(terminal, values.data, output, config, resume=values.resume, start=start)


def train(
    terminal: Terminal,
    data: str,
    output: Path,
    config: ExperimentConfig,
    *,
    resume: bool = False,
    start: Checkpoint | None = None,
) -> None:
    """Reads, trains, saves, and says how it went."""
    panel = read(terminal, data, {name: getattr(config.data, name) for name in (*COLUMN_OPTIONS, *COVARIATE_OPTIONS)})
    from trellis_ts.checkpoints import TRAINING_FOLDER, clear_leftovers
    from trellis_ts.devices import resolve_device
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.pacing import fit_to_time
    from trellis_ts.preparation import prepare
    from trellis_ts.recovery import STATE_FILE
    from trellis_ts.sizing import explain_shape
    from trellis_ts.training import fit

    resolve_device(config.training.device)
    if start is not None:
        panel = Forecaster(start).check(panel)
    preparation = prepare(panel, config, start=start)
    if not resume:
        preparation = fit_to_time(preparation)
    reasons_file = output / TRAINING_FOLDER / _REASONS_FILE
    if resume and reasons_file.is_file():
        preparation = replace(preparation, reasons=tuple(reasons_file.read_text(encoding="utf-8").splitlines()))
    is_begun = resume and (output / TRAINING_FOLDER / STATE_FILE).is_file()
    if resume and not is_begun:
        terminal.note("note: the run was ended before its first epoch was; it begins anew with the same settings")
    if preparation.left_out_series:
        terminal.note(f"note: {preparation.left_out_series} series too short to train on; they can still be forecast")
    terminal.note(
        f"{panel.source}: {len(panel.series)} series, {counted(panel.num_channels, 'channel')}, every {panel.freq}; "
        f"the model {explain_shape(preparation.shape, panel)}"
    )
    for reason in () if resume else preparation.reasons:
        terminal.note(reason)
    if config.training.num_processes > 1 and _rank() > 0:  # the first process writes, and shows
        with TrainingProgress(terminal) as progress:
            fit(preparation, output / TRAINING_FOLDER, observer=progress, resume=is_begun, start=start)
        return
    clear_leftovers(output)
    with _work_folder(output / TRAINING_FOLDER, preparation, resume=resume, start=start) as work:
        with TrainingProgress(terminal) as progress:
            checkpoint, summary = fit(preparation, work, observer=progress, resume=is_begun, start=start)
        try:
            Forecaster(checkpoint).save(output)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; make room, then save it with --resume") from error
    terminal.result(_summary_text(output, data, preparation, summary), _summary_data(output, preparation, summary))


def _parse(arguments: list[str]) -> Namespace:
    """The options; a data set with a configuration of its name starts from that one, a resumed run from its own."""
    options = parser()
    values = options.parse_args(arguments)
    if values.data is None and not values.print_config:
        options.error("the following arguments are required: data")
    if values.resume and values.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; give one of them")
    if values.resume:
        run_file = output_of(values) / "training" / _RUN_FILE
        if not run_file.is_file():
            raise ConfigError(f"nothing to resume: {run_file} does not exist; train without --resume")
        return options.parse_args(["--config", str(run_file), *arguments])
    checked_preset(values.preset)
    if values.preset is None and values.data and not Path(values.data).is_file():
        name = "demo" if values.data.lower() == "co2" else values.data.lower()
        if name in packaged_configs():
            return values if values.config else options.parse_args(["--config", packaged_path(name), *arguments])
    # A configuration that comes along is a whole experiment, and leaves nothing to be chosen.
    if not any(each.lower() in packaged_configs() for each in values.config or []):
        values.preset = values.preset or "balanced"
    return values


def _start(values: Namespace, output: Path) -> Checkpoint | None:
    """The model to start from; a resumed run kept a copy of its own."""
    if values.resume and values.start:
        raise ConfigError("--resume goes on with a run, which keeps the model it started from; leave out --from")
    kept = output / "training" / _START_FOLDER
    if values.start is None and not (values.resume and kept.is_dir()):
        return None
    from trellis_ts.checkpoints import load_checkpoint

    return load_checkpoint(kept if values.resume else values.start)


def output_of(values: Namespace) -> Path:
    """The model directory; a link and ``.`` are followed, because the directory itself will be replaced."""
    if values.output == "":
        raise ConfigError("--output is empty; name the model directory to write")
    if values.output is not None:
        output = Path(values.output)
        return output.resolve() if output.is_symlink() or output.name in ("", "..") else output
    name = Path(values.data).name.split(".")[0]
    if not name:
        raise ConfigError(f"no model directory can be named after DATA {values.data!r}; name one with --output")
    return Path("models") / name


def _rank() -> int:
    """Which of the processes that train together this is: what torchrun, SLURM and Lightning tell those they start."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def check_free(output: Path, *, overwrite: bool) -> None:
    """Refuses to write over anything but, where asked to, a model."""
    check_directory(output)
    if not output.exists() or not any(output.iterdir()):
        return
    is_model = (output / "config.json").is_file() or (output / "training" / _RUN_FILE).is_file()
    if not is_model and _is_of_killed_run(output):
        return
    if not is_model:
        raise ConfigError(f"{output} exists and holds other files than a model's; choose another --output")
    if not overwrite:
        raise ConfigError(
            f"{output} exists; choose another --output, go on with --resume, or replace it with --overwrite"
        )


def _is_of_killed_run(output: Path) -> bool:
    """Whether there is nothing but what a run writes before its settings."""
    ours, work = {_DATA_FILE, _REASONS_FILE, _START_FOLDER}, output / "training"
    if [each.name for each in output.iterdir()] != ["training"] or not work.is_dir():
        return False
    return all(each.name in ours or each.name.startswith(".") for each in work.iterdir())


def _check_resumable(output: Path, config: ExperimentConfig) -> None:
    stored, now = read_config(str(output / "training" / _RUN_FILE)), flat_config(config)
    changed = [key for key in now if key not in _MAY_CHANGE_ON_RESUME and stored.get(key, now[key]) != now[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"--resume cannot change {key} from {stored[key]} to {now[key]}; train anew with another --output"
        )


@contextmanager
def _work_folder(work: Path, preparation: Preparation, *, resume: bool, start: Checkpoint | None) -> Iterator[Path]:
    """The folder of logs and resumable state. After an error it is there only if the run can be resumed.

    The settings are written last: a folder without them is of a run that was killed before it began.
    """
    from trellis_ts.checkpoints import save_checkpoint
    from trellis_ts.recovery import STATE_FILE

    made = [each for each in (work, *work.parents) if not each.exists()]
    panel = preparation.splits.panel
    digest = fingerprint(panel)
    try:
        if resume:
            _check_same_data(work / _DATA_FILE, digest, panel)
        else:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        if start is not None and not (work / _START_FOLDER).exists():
            save_checkpoint(work / _START_FOLDER, start, package_version=version("trellis-ts"))
        replace_file(work / _REASONS_FILE, "".join(f"{each}\n" for each in preparation.reasons).encode())
        replace_file(work / _DATA_FILE, f"{digest}\n".encode())
        settings = yaml.safe_dump(flat_config(preparation.config), sort_keys=False)
        replace_file(work / _RUN_FILE, settings.encode())
        yield work
    except BaseException as error:
        if not resume and not (work / STATE_FILE).exists():
            shutil.rmtree(made[-1] if made else work, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"cannot write {work.parent}: {reason_of(error)}; make room or choose another --output"
            ) from error
        raise


def fingerprint(panel: Panel) -> str:
    """A checksum of everything in the panel that training reads."""
    digest = hashlib.sha256(repr((panel.columns, panel.freq, panel.timezone)).encode())
    for series in panel.series:
        digest.update(series.name.encode())
        digest.update(series.time.tobytes())
        for values in (series.values, series.past, series.known, series.static):
            if values is not None:
                digest.update(values.tobytes())
    return digest.hexdigest()


def _check_same_data(path: Path, digest: str, panel: Panel) -> None:
    if path.is_file() and path.read_text(encoding="utf-8").strip() != digest:
        raise ConfigError(
            f"--resume cannot change the data: {panel.source} is not what the run began with; train anew with another "
            "--output"
        )


def _summary_text(output: Path, data: str, preparation: Preparation, summary: TrainingSummary) -> str:
    from trellis_ts.distributions import FAMILIES

    loss = preparation.config.training.loss
    kind = f"negative log-likelihood, {loss}" if loss in FAMILIES else f"{loss}, standardised"
    best = f"best epoch {summary.best_epoch}" if summary.best_epoch else "no epoch was better than the start"
    minutes, seconds = divmod(round(summary.seconds), 60)
    took = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return "\n".join(
        [
            f"trained {counted(summary.num_epochs, 'epoch')} in {took} ({_STOP_TEXT[summary.stop_reason]})",
            f"{best}: validation loss {summary.validation_loss:.4f} ({kind})",
            f"{summary.num_parameters:,} parameters, {counted(summary.train_windows, 'training window')}, "
            f"{counted(summary.validation_windows, 'validation window')}",
            f"saved to {output}; next: trellis evaluate {output} {data}",
        ]
    )


def _summary_data(output: Path, preparation: Preparation, summary: TrainingSummary) -> dict[str, Any]:
    return {
        "model": str(output),
        **asdict(summary),
        "shape": asdict(preparation.shape),
        "reasons": list(preparation.reasons),
    }
