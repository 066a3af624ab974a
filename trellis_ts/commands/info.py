"""``trellis info``: what a model directory holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trellis_ts.commands.configuration import flat_config
from trellis_ts.commands.console import Terminal
from trellis_ts.commands.options import Parser, add_output_options

if TYPE_CHECKING:
    from trellis_ts.conformal import Calibration


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "info", "MODEL [--json]", "Says what a model reads and predicts, on which columns, and with which settings."
    )
    options.add_argument("model", type=str, metavar="MODEL", help="model directory written by `trellis train`")
    add_output_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = parser().parse_args(arguments)
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    from trellis_ts.checkpoints import load_checkpoint

    checkpoint = load_checkpoint(values.model)
    model, data = checkpoint.model, checkpoint.data
    settings = flat_config(checkpoint.experiment)
    facts: dict[str, Any] = {
        "model": values.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dataset": data.dataset,
        "time_column": data.time_column,
        "id_column": data.id_column,
        "channels": list(data.channels),
        "freq": data.freq,
        "timezone": data.timezone,
        "num_series": len(data.series),
        "covariates": [f"{each.name} ({each.role})" for each in data.covariates],
        "calendar": list(model.shape.covariates.cycles),
        "quantile_levels": list(model.quantile_levels),
        "calibration": _calibration_facts(checkpoint.calibration),
        "reasons": list(checkpoint.reasons),
        "shape": asdict(model.shape),
        "settings": settings,
    }
    shown = {key: value for key, value in facts.items() if key not in ("shape", "settings")}
    shown |= {key: value for key, value in facts["shape"].items() if key != "covariates"}
    shown |= {key: value for key, value in settings.items() if key not in shown and value is not None}
    width = max(map(len, shown))
    text = "\n".join(f"{key.replace('_', ' ').ljust(width)}  {_shown(value)}" for key, value in shown.items())
    terminal.result(text, facts)


def _calibration_facts(calibration: Calibration | None) -> dict[str, Any] | None:
    """What the calibration rests on; the mean offsets are on the scale of the training rows."""
    if calibration is None:
        return None
    means = [sum(row) / len(row) for row in calibration.offsets]
    return {
        "bands": list(calibration.bands),
        "mean_offsets": means,
        "num_windows": calibration.num_windows,
        "num_independent": calibration.num_independent,
        "pooled_steps": calibration.pooled_steps,
    }


def _shown(value: object) -> str:
    if isinstance(value, dict):
        bands = ", ".join(
            f"{100 * band:g} % by {mean:+.3g}" for band, mean in zip(value["bands"], value["mean_offsets"], strict=True)
        )
        windows = f"{value['num_windows']:,} validation windows ({value['num_independent']:,} without overlap)"
        return (
            f"bands widened (standardised, mean over steps) {bands}; from {windows}"
            if bands
            else f"too few of {windows}"
        )
    if isinstance(value, list) and any(" " in str(each) for each in value):
        return "; ".join(map(str, value))
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
