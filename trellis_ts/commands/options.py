"""Options shared by the commands: the configuration's keys, columns, output, and their parser."""

from __future__ import annotations

import difflib
import re
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace  # type: ignore[attr-defined]

from trellis_ts.config import SECTIONS, DataConfig, ExperimentConfig
from trellis_ts.errors import ConfigError

COLUMN_OPTIONS = ("time", "target", "id", "freq", "day_first")


class _HelpFormatter(DefaultHelpFormatter):
    """Leaves out the types; a default of None reads as what it means."""

    def _get_help_string(self, action: Any) -> str:
        text: str = action.help or ""
        if action.dest in _CONFIG_KEYS and action.default is not None:
            default = action.default
            shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
            text += f" (default: {shown})"
        return text.replace("%", "%%")

    def _get_default_metavar_for_optional(self, action: Any) -> str:
        return str(action.dest).rsplit("_", 1)[-1].upper()


class Parser(ArgumentParser):
    """A parser whose errors are one line that names the option and, for a misspelt one, the nearest."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"trellis {command}",
            description=description,
            formatter_class=_HelpFormatter,
            print_config="--print-config",
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_one_line(message, self._option_names()))

    def _option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]


def _one_line(message: str, options: list[str]) -> str:
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        name = match[1].split("=")[0]
        return f"unknown option {name}{_nearest(name, options)}"
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        keys = [option[2:].replace("-", "_") for option in options]
        return f"unknown key '{match[1]}' in the configuration file{_nearest(match[1], keys)}"
    if match := re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        return f"--{match[1].replace('_', '-')}: {_plain_types(match[2])}"
    return " ".join(message.split())


def _plain_types(text: str) -> str:
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", " ".join(text.split()))
    if match := re.search(r"Literal\[(.*?)\]\. Got value: (.*)", text):
        return f"'{match[2]}' is not one of {match[1].replace(chr(39), '')}"
    if match := re.search(r"Subtypes: \[(\w+), .*Given value: (.*)", text):
        return f"expected a {match[1]}, got '{match[2]}'"
    if match := re.search(r"Expected an? (\w+)\. Got value: (.*)", text):
        return f"expected a {match[1]}, got '{match[2]}'"
    return text


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help"


def _keys_of(section: type) -> dict[str, tuple[Any, Any, str]]:
    """Type, default and help of each field."""
    hints = typing.get_type_hints(section)
    texts = {each.args[1]: each.description for each in docstring_parser.parse_from_object(section).params}
    return {each.name: (hints[each.name], each.default, texts.get(each.name) or "") for each in fields(section)}


_CONFIG_KEYS = {name for section in SECTIONS.values() for name in (each.name for each in fields(section))}


def add_config_options(parser: Parser) -> None:
    """``--config`` and one option for every configuration key."""
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="configuration file, or the name of one that comes with the package "
        f"({', '.join(packaged_configs())}); options override it",
    )
    for section in SECTIONS.values():
        title, _, description = (section.__doc__ or "").partition(":")
        group = parser.add_argument_group(title, description.strip().capitalize())
        for name, (kind, default, text) in _keys_of(section).items():
            if default is MISSING:
                raise AssertionError(f"{section.__name__}.{name} has no default")
            _add(group, name, kind, default, text)


def add_column_options(parser: Parser) -> None:
    """Which columns of a table mean what; needed only where they differ from those the model was trained on."""
    group = parser.add_argument_group("Columns", "Those the model was trained on, unless named here")
    keys = _keys_of(DataConfig)
    for name in COLUMN_OPTIONS:
        kind, _, text = keys[name]
        _add(group, name, kind, None, text)


def _add(group: Any, name: str, kind: Any, default: Any, text: str) -> None:
    options: dict[str, Any] = {"type": kind}
    inner = next((each for each in typing.get_args(kind) if each is not type(None)), kind)
    if typing.get_origin(kind) is tuple or typing.get_origin(inner) is tuple:
        item = typing.get_args(kind if typing.get_origin(kind) is tuple else inner)[0]
        options = {"type": item, "nargs": "+"}
        default = list(default) if default is not None else None
    group.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **options)


def add_output_options(parser: Parser) -> None:
    """How much is said, and to whom."""
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notes")


def experiment_config(values: Namespace) -> ExperimentConfig:
    """The parsed options as configuration objects, which check them further."""
    sections = {}
    for name, section in SECTIONS.items():
        chosen = {each.name: values[each.name] for each in fields(section)}
        sections[name] = section(**{key: tuple(v) if isinstance(v, list) else v for key, v in chosen.items()})
    return ExperimentConfig(**sections)


def flat_config(config: ExperimentConfig) -> dict[str, Any]:
    """A configuration as the flat keys of a configuration file."""
    flat: dict[str, Any] = {}
    for name in SECTIONS:
        section = getattr(config, name)
        flat |= {each.name: getattr(section, each.name) for each in fields(section)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


def packaged_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    from importlib.resources import files

    return sorted(
        each.name.removesuffix(".yaml") for each in files("trellis_ts.configs").iterdir() if each.name.endswith(".yaml")
    )


def config_path(name: str) -> str:
    """The path of a configuration given by path or name.

    Raises:
        ConfigError: neither exists.
    """
    if Path(name).is_file():
        return name
    names = packaged_configs()
    if name.lower() in names:
        from importlib.resources import files

        return str(files("trellis_ts.configs") / f"{name.lower()}.yaml")
    close = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    raise ConfigError(f"no configuration '{name}': it is neither a file nor a name; {hint}")


def resolve_config_names(arguments: list[str]) -> list[str]:
    """The arguments with the value of every ``--config`` turned into a path."""
    resolved = []
    for index, argument in enumerate(arguments):
        if index and arguments[index - 1] == "--config":
            resolved.append(config_path(argument))
        elif argument.startswith("--config="):
            resolved.append("--config=" + config_path(argument.partition("=")[2]))
        else:
            resolved.append(argument)
    return resolved
