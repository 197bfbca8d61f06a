"""The files that a configuration names: whether they can be read, and what a file of switches says wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from taskd.config.schema import BrokerConfig, Section
from taskd.config.switch_file import parse_switch_file
from taskd.errors import ConfigError

MADE_BY_TASKD = {("data_dir",), ("store", "path"), ("admin", "socket")}


def troubles(config: Section) -> list[str]:
    """Warnings, because a configuration may be checked on another machine than it is for."""
    found = []
    for path, file in _named(config, ()):
        if path in MADE_BY_TASKD:
            continue
        try:
            content = file.read_bytes()
        except OSError as error:
            found.append(f"`{'.'.join(path)}`: {file}: cannot be read here: {error.strerror}")
            continue
        if isinstance(config, BrokerConfig) and path == ("switches", "file"):
            found += _of_switches(content, file)
    return found


def _of_switches(content: bytes, file: Path) -> list[str]:
    try:
        return list(parse_switch_file(content, file).warnings)
    except ConfigError as error:
        return str(error).splitlines()


def _named(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Path]]:
    if isinstance(value, Path):
        yield path, value
    elif isinstance(value, Section):
        for name in type(value).model_fields:
            yield from _named(getattr(value, name), (*path, name))
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _named(below, (*path, str(name)))
