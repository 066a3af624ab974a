"""``trellis datasets``: the data sets known by name."""

from __future__ import annotations

from trellis_ts.commands.console import Terminal, counted, table
from trellis_ts.commands.options import Parser, add_output_options
from trellis_ts.errors import ConfigError

_COMES_ALONG = "comes with statsmodels"


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "datasets",
        "[list | get NAME]",
        "Lists the data sets known by name, or fetches one into the cache. They are looked for in the folder named by "
        "TRELLIS_DATA first, then in the cache, then downloaded and checked.",
    )
    options.add_argument(
        "action", type=str, nargs="?", default="list", metavar="ACTION", help="list (the default), or get"
    )
    options.add_argument("name", type=str, nargs="?", metavar="NAME", help="the data set to get")
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
        _get(terminal, values.name)
    elif values.action == "get":
        raise ConfigError("which data set? Write `trellis datasets get NAME`; `trellis datasets` lists the names")
    elif values.action == "list":
        raise ConfigError(f"list takes no name; write `trellis datasets get {values.name}` to fetch one")
    else:
        raise ConfigError(
            f"unknown action '{values.action}'; write `trellis datasets list` or `trellis datasets get NAME`"
        )


def _list(terminal: Terminal) -> None:
    from trellis_ts.datasets.locations import find_local
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
    rows.append([DEMO_NAME, "2,284", "1", "W-SAT", _COMES_ALONG])
    data.append({"name": DEMO_NAME, "rows": 2284, "channels": 1, "freq": "W-SAT", "path": None})
    terminal.result(table(rows), {"datasets": data})


def _get(terminal: Terminal, name: str) -> None:
    from trellis_ts.datasets.sources import load_known

    with terminal.download() as progress:
        panel = load_known(name, progress=progress)
    for note in panel.notes:
        terminal.note(f"note: {note}")
    rows, channels = panel.series[0].values.shape
    known = panel.dataset or panel.source
    terminal.result(
        f"{known}: {counted(rows, 'row')}, {counted(channels, 'channel')}, every {panel.freq}: "
        f"{panel.source if panel.dataset else _COMES_ALONG}",
        {
            "name": known,
            "rows": rows,
            "channels": channels,
            "freq": panel.freq,
            "path": panel.source if panel.dataset else None,
        },
    )
