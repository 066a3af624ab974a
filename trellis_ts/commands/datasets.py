"""``trellis datasets``: the data sets known by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trellis_ts.commands.console import Terminal, table
from trellis_ts.commands.options import Parser, add_output_options
from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import Namespace


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "datasets",
        "Lists the data sets known by name, or fetches one into the cache. They are looked for in the folder named by "
        "TRELLIS_DATA first, then in the cache, then downloaded and checked.",
    )
    options.add_argument("action", type=str, nargs="?", default="list", help="list, or get")
    options.add_argument("name", type=str, nargs="?", default=None, help="the data set to get")
    add_output_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = parser().parse_args(arguments)
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    if values.action == "list" and values.name is None:
        _list(terminal)
    elif values.action == "get" and values.name is not None:
        _get(terminal, values)
    elif values.action == "get":
        raise ConfigError("which data set? Write `trellis datasets get NAME`; `trellis datasets` lists the names")
    else:
        raise ConfigError(
            f"unknown action '{values.action}'; write `trellis datasets list` or `trellis datasets get NAME`"
        )


def _list(terminal: Terminal) -> None:
    from trellis_ts.datasets.download import find_local
    from trellis_ts.datasets.long_horizon import benchmark_names, find_benchmark
    from trellis_ts.datasets.sources import DEMO_NAME

    rows = [["name", "rows", "channels", "every", "where"]]
    data = []
    for name in benchmark_names():
        spec = find_benchmark(name)
        if spec is None:
            raise AssertionError(name)
        path = find_local(spec.file_names)
        where = str(path) if path else "to be downloaded"
        rows.append([name, f"{spec.num_rows:,}", str(spec.num_channels), spec.freq, where])
        data.append(
            {
                "name": name,
                "rows": spec.num_rows,
                "channels": spec.num_channels,
                "freq": spec.freq,
                "path": str(path) if path else None,
            }
        )
    rows.append([DEMO_NAME, "2,284", "1", "W-SAT", "comes with statsmodels"])
    data.append({"name": DEMO_NAME, "rows": 2284, "channels": 1, "freq": "W-SAT", "path": None})
    terminal.result(table(rows), {"datasets": data})


def _get(terminal: Terminal, values: Namespace) -> None:
    from trellis_ts.datasets.long_horizon import load_benchmark

    with terminal.download() as progress:
        panel = load_benchmark(values.name, progress=progress)
    for note in panel.notes:
        terminal.note(f"note: {note}")
    rows, channels = panel.series[0].values.shape
    terminal.result(
        f"{panel.dataset}: {rows:,} rows, {channels} channels, every {panel.freq}: {panel.source}",
        {"name": panel.dataset, "rows": rows, "channels": channels, "freq": panel.freq, "path": panel.source},
    )
