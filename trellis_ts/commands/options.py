"""Options shared by the commands: the configuration's keys, columns, output, and their parser."""

from __future__ import annotations

import difflib
import re
import typing
from dataclasses import MISSING, fields
from typing import Any, Literal, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from trellis_ts.commands.configuration import inner_type, is_list, packaged_configs, read_config, spell_type
from trellis_ts.config import SECTIONS, DataConfig, Preset
from trellis_ts.errors import ConfigError
from trellis_ts.presets import PRESET_SETTINGS

COLUMN_OPTIONS = ("time", "target", "id", "freq", "day_first")
COVARIATE_OPTIONS = ("past_covariates", "known_covariates", "static", "categorical", "regularize")
"""Given when a model is trained; its record tells the other commands."""
_NAMES_OF_VALUES = dict.fromkeys(("time", "target", "id", *COVARIATE_OPTIONS[:-1]), "COLUMN")
_NAMES_OF_VALUES["max_time"] = "DURATION"


class _HelpFormatter(DefaultHelpFormatter):
    """Leaves out the types, and says what a default of None stands for."""

    def _get_help_string(self, action: Any) -> str:
        text: str = action.help or ""
        if action.dest in _CONFIG_KEYS and "default:" not in text:
            text += f" (default: {_spell_default(action.dest, action.default)})"
        return text.replace("%", "%%")


def _spell_default(key: str, default: Any) -> str:
    if default is None:
        return "from the data"
    if isinstance(default, (list, tuple)):
        return " ".join(map(str, default)) or "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


class Parser(ArgumentParser):
    """A parser whose errors are one line that names the option and, for a misspelt one, the nearest."""

    def __init__(self, command: str, usage: str, description: str) -> None:
        super().__init__(
            prog=f"trellis {command}",
            usage=f"trellis {command} {usage}",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: list[str]) -> Namespace:  # type: ignore[override]
        """The options; configuration files lie under them, a later one over an earlier."""
        values = super().parse_args(args)
        settings: dict[str, Any] = {}
        for name in values.get("config") or []:
            settings |= read_config(name)
        if settings:
            self.set_defaults(settings)
            values = super().parse_args(args)
        return values

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(self._plain(" ".join(message.split())))

    def _plain(self, message: str) -> str:
        """What argparse and jsonargparse say, in a user's words."""
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            name = match[1].split("=")[0]
            if not name.startswith("-"):
                return f"unexpected argument '{name}'; write {self.usage}"
            return f"unknown option {name}{self._nearest(name)}"
        if match := re.match(r"the following arguments are required: (.*)", message):
            names = match[1].upper().split(", ")
            return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing; write {self.usage}"
        if match := re.match(r"argument (?:-\w/)?(--[\w-]+): expected (one|at least one) argument", message):
            return f"{match[1]} needs {'a value' if match[2] == 'one' else 'at least one value'}"
        if match := re.match(r"argument (?:-\w/)?(--[\w-]+): ignored explicit argument", message):
            return f"{match[1]} takes no value"
        if match := re.match(r'Parser key "([^"]+)"(?: element \d+)?: (.*)', message):
            option, given = f"--{match[1].replace('_', '-')}", re.search(r"(?:Got|Given) value: ?(.*)$", match[2])
            return f"{option}: {self._expected(match[1])}, got '{given[1] if given else ''}'"
        return message

    def _expected(self, key: str) -> str:
        action = next(action for action in self._actions if action.dest == key)
        if key not in _SPELLED_TYPES:
            return f"expected {spell_type(int)}" if action.metavar == "N" else f"expected another {action.metavar}"
        return f"expected {_SPELLED_TYPES[key]}"

    def _nearest(self, name: str) -> str:
        names = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        begun = [option for option in names if name.startswith("--") and option.startswith(name)]
        close = begun or difflib.get_close_matches(name, names, n=1)
        return f"; did you mean {close[0]}?" if close else f"; see {self.prog} --help"


def _keys_of(section: type) -> dict[str, tuple[Any, Any, str]]:
    """Type, default and help of each field."""
    hints = typing.get_type_hints(section)
    texts = {each.args[1]: each.description or "" for each in docstring_parser.parse_from_object(section).params}
    return {each.name: (hints[each.name], each.default, _as_help(texts.get(each.name, ""))) for each in fields(section)}


def _as_help(text: str) -> str:
    """A sentence as the other options' help is written: without a capital and a full stop."""
    text = " ".join(text.split())
    text = text if text.endswith("...") else text.removesuffix(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


_CONFIG_KEYS = {each.name for section in SECTIONS.values() for each in fields(section)}
_SPELLED_TYPES = {
    name: spell_type(inner_type(kind))
    for section in SECTIONS.values()
    for name, (kind, _, _) in _keys_of(section).items()
} | {"samples": spell_type(int)}


def add_config_options(parser: Parser) -> None:
    """``--config``, ``--print-config`` and one option for every configuration key."""
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="configuration file, or the name of one that comes with the package "
        f"({', '.join(packaged_configs())}); options override it",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the settings, but those to be chosen, as such a file, and stop",
    )
    for section in SECTIONS.values():
        title, _, description = (section.__doc__ or "").partition(":")
        group = parser.add_argument_group(title.lower(), description.strip().removesuffix("."))
        for name, (kind, default, text) in _keys_of(section).items():
            if default is MISSING:
                raise AssertionError(f"{section.__name__}.{name} has no default")
            _add(group, name, kind, None if name in PRESET_SETTINGS else default, text)


def add_preset_option(parser: Parser) -> None:
    """How much effort a model is worth."""
    parser.add_argument(
        "--preset",
        type=str,
        metavar="{" + ",".join(typing.get_args(Preset)) + "}",
        help="how much effort: fast takes well under a minute on two CPU cores, balanced a few minutes, accurate up to "
        "an hour; chooses the settings that are not given (default: balanced)",
    )


def add_column_options(parser: Parser) -> None:
    """Which columns of a table mean what; needed only where they differ from those the model was trained on."""
    group = parser.add_argument_group("columns", "those the model was trained on, unless named here")
    keys = _keys_of(DataConfig)
    for name in COLUMN_OPTIONS:
        kind, _, text = keys[name]
        _add(group, name, kind, None, f"{text} (default: as trained)")


def _add(group: Any, name: str, kind: Any, default: Any, text: str) -> None:
    options: dict[str, Any] = {"type": kind}
    if is_list(kind):
        options = {"type": inner_type(kind), "nargs": "+"}
        default = list(default) if default is not None else None
    metavar = _NAMES_OF_VALUES.get(name) or _name_of_value(name, inner_type(kind))
    group.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, metavar=metavar, **options)


def _name_of_value(name: str, kind: Any) -> str:
    if kind is bool or typing.get_origin(kind) is Literal:
        return "{" + ",".join(("true", "false") if kind is bool else typing.get_args(kind)) + "}"
    return {int: "N", float: "X"}.get(kind, name.upper())


def add_output_options(parser: Parser) -> None:
    """How much is said, and to whom."""
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")


def add_calibration_option(parser: Parser) -> None:
    """Whether bands are as the network gives them."""
    parser.add_argument(
        "--no-calibration", action="store_true", help="leave bands as the network gives them, uncalibrated"
    )


def add_device_option(parser: Parser) -> None:
    """Where a trained model runs."""
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")


def add_engine_options(parser: Parser) -> None:
    """Where the blocks of a folder are worked on."""
    parser.add_argument(
        "--engine",
        type=str,
        default="local",
        metavar="{local,ray}",
        help="of a folder: this process, or the workers of a Ray cluster (pip install 'trellis-ts[ray]') "
        "(default: local)",
    )
    parser.add_argument(
        "--address",
        type=str,
        metavar="ADDRESS",
        help="of a running Ray cluster, such as auto or ray://host:10001 (default: workers on this machine)",
    )


def check_engine(values: Namespace, *, is_partitioned: bool) -> None:
    """Refuses options of an engine that do not fit.

    Raises:
        ConfigError: an engine that is unknown, not installed or without use here.
    """
    if values.engine not in ("local", "ray"):
        raise ConfigError(f"--engine: expected local or ray, got '{values.engine}'")
    if values.address is not None and values.engine != "ray":
        raise ConfigError("--address is that of a Ray cluster; add --engine ray")
    if values.engine == "ray":
        if not is_partitioned:
            raise ConfigError(
                "--engine ray works on folders of Parquet files (forecasts with -o FOLDER/); this is a single table"
            )
        from trellis_ts.partitioned.engines import check_ray

        check_ray()
