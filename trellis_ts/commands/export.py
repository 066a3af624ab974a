"""``trellis export``: a model as a file that runs without this package."""

from __future__ import annotations

from pathlib import Path

from trellis_ts.commands.console import Terminal
from trellis_ts.commands.options import Parser, add_calibration_option, add_output_options
from trellis_ts.errors import ConfigError


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "export",
        "MODEL -o model.onnx|model.pt2 ...",
        "Writes MODEL as a file that others can run without this package: ONNX, or a program of torch.export. From the "
        "numbers of a context to the forecast in the same units; docs/export.md says what goes in.",
    )
    options.add_argument("model", type=str, metavar="MODEL", help="model directory written by `trellis train`")
    options.add_argument("-o", "--output", type=str, required=True, metavar="FILE", help="file to write (.onnx, .pt2)")
    add_calibration_option(options)
    add_output_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = parser().parse_args(arguments)
    path = Path(values.output)
    if path.suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"--output '{path}': unknown ending; use .onnx or .pt2")
    from trellis_ts.forecaster import Forecaster

    forecaster = Forecaster.load(values.model, calibrated=not values.no_calibration)
    forecaster.export(path)
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    size = path.stat().st_size
    terminal.result(f"wrote {path} ({size / 1e6:.1f} MB)", {"output": str(path), "bytes": size})
