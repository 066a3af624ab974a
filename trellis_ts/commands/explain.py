"""``trellis explain``: what moved a forecast, and what the memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trellis_ts.commands.console import Terminal
from trellis_ts.commands.options import Parser, add_column_options, add_device_option, add_output_options
from trellis_ts.errors import ConfigError
from trellis_ts.files import atomic_file, check_output

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from trellis_ts.explanations import Explanation
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.types import Panel

_FORMATS = (".png", ".pdf", ".svg", ".jpg")
_MOST_LISTED = 5


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "explain",
        "MODEL DATA [--future FILE] [-o explain.png] ...",
        "Shows what moved the forecast after the last rows of DATA: by how much it would change without each patch of "
        "the past and without each covariate; and what the memory kept of its context. The picture is of one series.",
    )
    options.add_argument("model", type=str, metavar="MODEL", help="model directory written by `trellis train`")
    options.add_argument("data", type=str, metavar="DATA", help="path of a table, or name of a data set")
    options.add_argument("-o", "--output", type=str, metavar="FILE", help="picture to draw (.png, .pdf, .svg, .jpg)")
    options.add_argument("--future", type=str, metavar="FILE", help="table with the known covariates over the horizon")
    options.add_argument("--series", type=str, metavar="NAME", help="the series (default: the first)")
    options.add_argument("--channel", type=str, metavar="NAME", help="the column (default: the first)")
    add_device_option(options)
    add_output_options(options)
    add_column_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = parser().parse_args(arguments)
    output = None if values.output is None else Path(values.output)
    if output is not None:
        check_output(output, _FORMATS, "--output", values.data)
    from trellis_ts.commands.loading import load_forecaster, read_for
    from trellis_ts.datasets.readers import add_future
    from trellis_ts.explanations import explain_panel

    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    forecaster = load_forecaster(values.model, values.device)
    panel = forecaster.check(read_for(terminal, forecaster, values))
    if values.future is not None:
        panel = add_future(panel, values.future, forecaster.prediction_length, day_first=values.day_first)
    series = _place(values.series, [each.name for each in panel.series], "--series")
    channel = _place(values.channel, list(panel.channels), "--channel")
    explanation = explain_panel(forecaster, panel)
    if output is not None:
        _draw(forecaster, panel, explanation, output, series, channel)
    terminal.result(_text(values, panel, explanation, series, channel), explanation.to_dict())


def _place(name: str | None, names: list[str], option: str) -> int:
    if name is None:
        return 0
    if name not in names:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ConfigError(f"{option} {name}: there is none of this name; there are {listed}")
    return names.index(name)


def _draw(
    forecaster: Forecaster, panel: Panel, explanation: Explanation, output: Path, series: int, channel: int
) -> None:
    import numpy as np

    from trellis_ts.portraits import plot_explanation

    context_length = explanation.patches[-1][1]
    rows = panel.series[series].values[-context_length:, channel]
    history = np.concatenate((np.full(context_length - len(rows), np.nan), rows))
    forecast = forecaster.forecast(panel)
    quantiles = None if forecast.quantiles is None else forecast.quantiles[series, :, channel].numpy()
    levels = forecast.quantile_levels
    with atomic_file(output) as path:
        plot_explanation(
            explanation,
            path,
            series=series,
            channel=channel,
            history=history,
            point=forecast.point[series, :, channel].numpy(),
            band=None if quantiles is None else (quantiles[:, 0], quantiles[:, -1]),
            band_label="" if quantiles is None else f"quantiles {levels[0]:g} to {levels[-1]:g}",
            title=_name(panel, series, channel),
        )


def _name(panel: Panel, series: int, channel: int) -> str:
    parts = [panel.series[series].name] if not panel.is_wide else []
    return ", ".join([*parts, *([panel.channels[channel]] if panel.is_wide or panel.num_channels > 1 else [])])


def _text(values: Namespace, panel: Panel, explanation: Explanation, series: int, channel: int) -> str:
    """The patches and covariates that moved the forecast most."""
    importance = explanation.importance[series, channel]
    context_length = explanation.patches[-1][1]
    lines = [f"{_name(panel, series, channel)}: mean change of the forecast without"]
    for index in importance.argsort()[::-1][:_MOST_LISTED]:
        start, stop = explanation.patches[index]
        lines.append(f"  steps {start - context_length} to {stop - 1 - context_length}  {importance[index]:.4g}")
    of_covariates = explanation.covariate_importance[series, channel]
    for index in of_covariates.argsort()[::-1][:_MOST_LISTED]:
        lines.append(f"  {explanation.covariates[index]}  {of_covariates[index]:.4g}")
    if values.output is not None:
        lines.append(f"wrote {values.output}")
    return "\n".join(lines)
