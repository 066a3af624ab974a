"""The ``trellis`` command: finds the command's module, runs it, and turns known errors into one line."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "train": "train a model on a table or a benchmark",
    "forecast": "forecast what follows the last rows of a table",
    "evaluate": "score a model on rows it has not seen, beside seasonal naive",
    "info": "say what a model directory holds",
    "datasets": "list the known data sets, or fetch one",
    "demo": "train, evaluate and forecast on a real series, without a network",
}
_EXIT_USER_ERROR, _EXIT_INTERRUPTED = 2, 130


def _overview() -> str:
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"""usage: trellis COMMAND ...

Time-series forecasting with Trellis: attention with a memory of fixed size.

commands:
{commands}

options:
  -h, --help  show this text; `trellis COMMAND --help` tells the options of a command
  --version   show the version

a first forecast:
  trellis train sales.csv -o models/sales
  trellis evaluate models/sales sales.csv
  trellis forecast models/sales sales.csv -o forecast.csv --plot forecast.png"""


def main(argv: list[str] | None = None) -> None:
    """Runs one command and exits: 0 well, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if arguments else _EXIT_USER_ERROR)
    if arguments[0] == "--version":
        print(f"trellis {version('trellis-ts')}")
        sys.exit(0)
    sys.exit(_run(arguments[0], arguments[1:]))


def _run(command: str, arguments: list[str]) -> int:
    from trellis_ts.errors import TrellisError

    if command not in COMMANDS:
        from difflib import get_close_matches

        nearest = get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(COMMANDS)}"
        print(f"trellis: error: unknown command '{command}'; {hint}", file=sys.stderr)
        return _EXIT_USER_ERROR
    try:
        import_module(f"trellis_ts.commands.{command}").run(arguments)
    except TrellisError as error:
        print(f"trellis {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"trellis {command}: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # nothing is left to flush to
    return 0


if __name__ == "__main__":
    main()
