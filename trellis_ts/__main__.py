"""The ``trellis`` command: finds the command's module, runs it, and turns known errors into one line."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "train": "train a model on a table or a benchmark",
    "search": "try settings on a table and keep the best model",
    "forecast": "forecast what follows the last rows of a table",
    "stream": "follow live series: a forecast for every line of standard input",
    "evaluate": "score a model on rows it has not seen, beside seasonal naive",
    "explain": "show what moved a forecast, and what the memory holds",
    "export": "write a model as ONNX or a torch.export program, to run without this package",
    "info": "say what a model directory holds",
    "benchmark": "train and score on the standard data sets, and make the tables",
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
    command = arguments[0] if arguments else ""
    name = f"trellis {command}" if command in COMMANDS else "trellis"
    try:
        problem = _run(command, arguments[1:])
        sys.stdout.flush()  # what cannot be written is to be known here, not after the last handler
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(_EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        _discard_output()
        sys.exit(0)
    except OSError as error:
        problem = f"cannot write the output: {(error.strerror or str(error)).lower()}"
        _discard_output()
    except UnicodeEncodeError as error:
        problem = f"the output cannot be written as {error.encoding}; set PYTHONIOENCODING=utf-8"
    if problem is not None:
        print(f"{name}: error: {' '.join(problem.split())}", file=sys.stderr)
    sys.exit(0 if problem is None else _EXIT_USER_ERROR)


def _run(command: str, arguments: list[str]) -> str | None:
    """Runs a command; what was wrong, if anything was."""
    if command in ("", "-h", "--help", "--version"):
        print(f"trellis {version('trellis-ts')}" if command == "--version" else _overview())
        return None if command else "no command"
    if command not in COMMANDS:
        return _unknown(command)
    from trellis_ts.errors import TrellisError

    try:
        import_module(f"trellis_ts.commands.{command}").run(arguments)
    except TrellisError as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return "not enough memory; try a smaller --batch-size, --width or --context-length"
    return None


def _unknown(command: str) -> str:
    from difflib import get_close_matches

    is_option = command.startswith("-")
    nearest = get_close_matches(command.lower(), ["--help", "--version"] if is_option else COMMANDS, n=1, cutoff=0.7)
    hint = f"did you mean {nearest[0]}?" if nearest else "see trellis --help"
    if is_option and not nearest:
        hint = "options come after the command; see trellis --help"
    return f"unknown {'option' if is_option else 'command'} '{command}'; {hint}"


def _is_out_of_memory(error: Exception) -> bool:
    """Also as torch says it, on the CPU and on a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _discard_output() -> None:
    """Lets the interpreter's own last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
