"""Configuration files: found by path or name, read strictly, and written back."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from trellis_ts.config import SECTIONS, ExperimentConfig, Preset
from trellis_ts.errors import ConfigError
from trellis_ts.presets import PRESET_SETTINGS

if TYPE_CHECKING:
    from jsonargparse import Namespace

_LARGEST_FILE_BYTES, _DEEPEST_NESTING = 1 << 20, 8
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def setting_types() -> dict[str, Any]:
    """The type of every configuration key."""
    hints = [typing.get_type_hints(section) for section in SECTIONS.values()]
    return {
        each.name: hint[each.name]
        for section, hint in zip(SECTIONS.values(), hints, strict=True)
        for each in fields(section)
    } | {"preset": Preset | None}


def inner_type(kind: Any) -> Any:
    """The type without ``None`` and without ``tuple``: what one value of the setting is."""
    for each in typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,):
        if each is not type(None):
            return typing.get_args(each)[0] if typing.get_origin(each) is tuple else each
    raise AssertionError(kind)


def is_list(kind: Any) -> bool:
    """Whether a setting holds several values."""
    return any(typing.get_origin(each) is tuple for each in (kind, *typing.get_args(kind)))


def spell_type(kind: Any) -> str:
    """The type in a user's words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return _WORDS.get(kind, "another value")


def flat_config(config: ExperimentConfig) -> dict[str, Any]:
    """A configuration as the flat keys of a configuration file."""
    flat: dict[str, Any] = {"preset": config.preset}
    for name in SECTIONS:
        section = getattr(config, name)
        flat |= {each.name: getattr(section, each.name) for each in fields(section)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


def is_open(config: ExperimentConfig, key: str) -> bool:
    """Whether a setting still is to be chosen by the preset."""
    return config.preset is not None and key in PRESET_SETTINGS and key not in config.named


def experiment_config(values: Namespace) -> ExperimentConfig:
    """Parsed options as configuration objects, which check them further."""
    names = [each.name for section in SECTIONS.values() for each in fields(section)]
    return ExperimentConfig.of(**{name: values[name] for name in (*names, "preset") if values.get(name) is not None})


def packaged_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    from importlib.resources import files

    return sorted(
        each.name.removesuffix(".yaml") for each in files("trellis_ts.configs").iterdir() if each.name.endswith(".yaml")
    )


def packaged_path(name: str) -> str:
    """The path of a configuration that comes with the package."""
    from importlib.resources import files

    return str(files("trellis_ts.configs") / f"{name}.yaml")


def config_path(name: str) -> str:
    """The path of a configuration given by path or name.

    Raises:
        ConfigError: neither exists.
    """
    if Path(name).is_file():
        return name
    names = packaged_configs()
    if name.lower() in names:
        return packaged_path(name.lower())
    if Path(name).exists():
        raise ConfigError(f"--config {name}: this is a folder; name a file in it")
    close = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    raise ConfigError(f"--config {name}: neither a file nor the name of a configuration that comes along; {hint}")


def read_config(name: str) -> dict[str, Any]:
    """The settings in a configuration file, given by path or name.

    Raises:
        ConfigError: no such file, or something in it is not a setting; the message names the line.
    """
    path = config_path(name)
    try:
        loader = yaml.SafeLoader(_text(path))
        root = loader.get_single_node()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_place(error)}: this is no YAML; write one `key: value` per line") from None
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise ConfigError(f"{path}: there are no settings in it; write one `key: value` per line, such as `width: 32`")
    kinds = setting_types()
    settings: dict[str, Any] = {}
    for key_node, value_node in root.value:
        place = f"{path}, line {key_node.start_mark.line + 1}"
        try:
            key = str(loader.construct_object(key_node, deep=True)).replace("-", "_")
            value = loader.construct_object(value_node, deep=True)
        except yaml.YAMLError:
            raise ConfigError(f"{place}: the value cannot be read; write a number, a word or a list") from None
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {close[0]}?" if close else "`trellis train --help` lists them, without the dashes"
            raise ConfigError(f"{place}: unknown key '{key}'; {hint}")
        if key in settings:
            raise ConfigError(f"{place}: '{key}' is set a second time; keep one of the lines")
        settings[key] = _checked(place, key, value, kinds[key])
    return settings


def _text(path: str) -> bytes:
    """The file, if it is as small and flat as settings are: nesting and aliases can stand for any amount of work.

    Raises:
        ConfigError: it is not.
        OSError: it cannot be read.
        yaml.YAMLError: it is no YAML.
    """
    with Path(path).open("rb") as file:
        text = file.read(_LARGEST_FILE_BYTES + 1)
    if len(text) > _LARGEST_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {_LARGEST_FILE_BYTES >> 20} MiB; a file of settings is a few lines")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        place = path if event.start_mark is None else f"{path}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{place}: aliases such as *{event.anchor} are not read; write the value itself")
        if depth > _DEEPEST_NESTING:
            raise ConfigError(f"{place}: nested too deeply; write one `key: value` per line")
    return text


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


def _checked(place: str, key: str, value: Any, kind: Any) -> Any:
    """The value as the setting's type; a single one stands for a list of one."""
    if value is None:
        if type(None) in typing.get_args(kind):
            return None
        raise ConfigError(f"{place}: {key} has no value; give it one, or leave the line out")
    if not is_list(kind):
        return _converted(place, key, value, inner_type(kind))
    return [_converted(place, key, each, inner_type(kind)) for each in (value if isinstance(value, list) else [value])]


def _converted(place: str, key: str, value: Any, kind: Any) -> Any:
    """One value; numbers stand for the text they are written as, and text like 1e-3, which YAML takes for text, for a
    number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and is_number and isinstance(value, int):
        return value
    if kind is float and (is_number or isinstance(value, str)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if kind is str and (is_number or isinstance(value, str)):
        return str(value)
    if typing.get_origin(kind) is Literal and str(value) in typing.get_args(kind):
        return str(value)
    raise ConfigError(f"{place}: {key} must be {spell_type(kind)}, found {value!r}")
