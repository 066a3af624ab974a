"""Markdown tables and pictures from the results of a folder: the same results give the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trellis_ts.benchmark.pictures import plot_by_look_back, plot_published
from trellis_ts.benchmark.plan import TRACKS
from trellis_ts.benchmark.published import best_average, best_published, published
from trellis_ts.benchmark.results import entries_of, of_track, read_results
from trellis_ts.errors import ConfigError
from trellis_ts.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from trellis_ts.benchmark.published import Errors
    from trellis_ts.benchmark.results import Entry, Spread

TABLES_FILE = "tables.md"
LOOK_BACK_PICTURE, PUBLISHED_PICTURE = "error_by_look_back.png", "error_by_data_set.png"
_TITLES = {"96": "Look-back 96", "free": "Look-back chosen on validation"}
_INTRODUCTION = """# Long-horizon results

Written by `trellis benchmark --tables` from the JSON files beside it; `docs/benchmarks.md` has the protocol. MSE / MAE
on the scale of the standardised training rows, on every test window; mean and, from two seeds on, standard deviation.
"Prefix of 720": one model trained for 720 steps, whose first steps serve the shorter horizons. Published figures are
their authors' own; one with * is not known to be of all test windows.
"""


def write_tables(folder: Path) -> list[Path]:
    """Writes the tables and the pictures into the folder of results.

    Raises:
        ConfigError: there is no result, or a file is none.
    """
    entries = entries_of(read_results(folder)) if folder.is_dir() else []
    if not entries:
        raise ConfigError(f"{folder} holds no results; run `trellis benchmark` first, or name a folder with --results")
    parts = [_INTRODUCTION]
    for track in TRACKS:
        chosen = of_track(entries, track)
        if chosen:
            parts += [f"## {_TITLES[track]}\n", _averages(track, chosen), _per_horizon(track, chosen)]
    parts += ["## Validation loss and error by look-back\n", _by_look_back(entries), _cost(entries), _sources()]
    written = [folder / TABLES_FILE]
    with atomic_file(written[0]) as path:
        path.write_text("\n".join(parts), encoding="utf-8")
    for name, plot in ((LOOK_BACK_PICTURE, plot_by_look_back), (PUBLISHED_PICTURE, plot_published)):
        with atomic_file(folder / name) as path:
            plot(entries, path)
        written.append(folder / name)
    return written


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _spread(value: Spread) -> str:
    return f"{value.mean:.3f}" + (f" ± {value.std:.3f}" if value.std is not None else "")


def _both(mse: Spread, mae: Spread) -> str:
    return f"{_spread(mse)} / {_spread(mae)}"


def _pair(errors: Errors | None) -> str:
    return "" if errors is None else f"{errors[0]:.3f} / {errors[1]:.3f}"


def _look_back(entry: Entry, candidates: tuple[int, ...]) -> str:
    if candidates == (entry.look_back,):
        return str(entry.look_back)
    return f"{entry.look_back} of {', '.join(map(str, candidates))}"


def _averages(track: str, chosen: Sequence[tuple[Entry, tuple[int, ...]]]) -> str:
    titans = next(each for each in published() if each.name == "Titans LMM")
    header = ["data set", "contestant", "look-back", "seeds", "average", "lowest published average"]
    if track == titans.track:
        header.append(titans.label)
    rows = []
    for entry, candidates in chosen:
        best = best_average(track, entry.dataset)
        row = [
            entry.dataset,
            entry.label,
            _look_back(entry, candidates),
            str(len(entry.seeds)),
            _both(entry.mse_average, entry.mae_average),
            f"{_pair(best.average[entry.dataset])} ({best.name})" if best else "",
        ]
        rows.append(row + ([_pair(titans.average.get(entry.dataset))] if track == titans.track else []))
    return _markdown(header, rows)


def _per_horizon(track: str, chosen: Sequence[tuple[Entry, tuple[int, ...]]]) -> str:
    others = ("DLinear", "PatchTST", "iTransformer") if track == "96" else ("DLinear(TFB)", "PatchTST(TFB)")
    figures = {each.name: each for each in published() if each.track == track}
    rows = []
    for entry, _ in chosen:
        for horizon in entry.windows:
            best = best_published(track, entry.dataset, horizon)
            rows.append(
                [
                    entry.dataset,
                    entry.label,
                    str(horizon),
                    f"{entry.windows[horizon]:,}",
                    _both(entry.mse[horizon], entry.mae[horizon]),
                    f"{best.mse:.3f} ({best.mse_by}) / {best.mae:.3f} ({best.mae_by})" if best else "",
                    *(_pair(figures[name].horizons.get(entry.dataset, {}).get(horizon)) for name in others),
                ]
            )
    return _markdown(
        ["data set", "contestant", "horizon", "test windows", "MSE / MAE", "lowest published per horizon", *others],
        rows,
    )


def _by_look_back(entries: Sequence[Entry]) -> str:
    """All that was run: what the choice was made by, and what it led to."""
    return _markdown(
        ["data set", "contestant", "look-back", "seeds", "validation loss", "average MSE / MAE"],
        (
            [
                entry.dataset,
                entry.label,
                str(entry.look_back),
                ", ".join(map(str, entry.seeds)),
                f"{entry.validation_loss:.4f}",
                _both(entry.mse_average, entry.mae_average),
            ]
            for entry in entries
        ),
    )


def _cost(entries: Sequence[Entry]) -> str:
    runs = {
        (entry.dataset, entry.contestant, run["look_back"], run["horizon"], run["seed"]): run
        for entry in entries
        for run in entry.runs
    }
    rows = [
        [
            dataset,
            contestant,
            str(look_back),
            str(horizon),
            str(seed),
            f"{run['num_parameters']:,}" if run["num_parameters"] else "",
            f"{run['best_epoch']} of {run['num_epochs']}" if run["num_epochs"] else "",
            f"{run['train_seconds']:.0f}",
            # Older results do not have it.
            f"{run['train_processor_seconds']:.0f}" if "train_processor_seconds" in run else "",
            f"{run['test_seconds']:.0f}",
            f"{run['peak_memory_bytes'] / 1e6:,.0f}" if run["peak_memory_bytes"] else "",
            f"{run['machine']['gpu'] or run['machine']['cpu']}, {run['machine']['threads']} thread(s)",
            f"{run['machine']['load']}",
            f"{run['versions'].get('torch', '')}",
            str(run["commit"]),
        ]
        for (dataset, contestant, look_back, horizon, seed), run in runs.items()
    ]
    header = ["data set", "contestant", "look-back", "trained for", "seed", "parameters", "best epoch"]
    header += [
        "training, s",
        "of processor time",
        "test, s",
        "peak memory, MB",
        "machine",
        "load at start",
        "torch",
        "commit",
    ]
    return "## Runs\n\n" + _markdown(header, rows)


def _sources() -> str:
    windows = {"all": "all", "dropped": "last batch dropped", "unknown": "not known"}
    return "## Sources of published figures\n\n" + _markdown(
        ["model", "track", "look-back", "test windows", "source", "note"],
        (
            [
                each.label,
                each.track,
                str(each.look_back or "searched or not stated"),
                windows[each.test_windows],
                each.source,
                each.note,
            ]
            for each in published()
        ),
    )
