"""The configuration that holds, as YAML: every value with where it came from, secrets hidden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from taskd.config.loader import Merged
from taskd.config.redaction import redacted
from taskd.config.schema import Section

DEFAULT = "default"
COMMENT_COLUMN = 44
WIDE = 10_000  # a value stays on its line


@dataclass(frozen=True, slots=True)
class Value:
    """One key. `shown` is plain and without secrets."""

    path: tuple[str, ...]
    shown: object
    origin: str
    changed: bool  # differs from the default


def effective(config: Section, merged: Merged) -> list[Value]:
    """Every key of a configuration, in the order of the schema."""
    return list(_values(config, type(config)(), merged, ()))


def as_yaml(values: list[Value], *, only_changed: bool = False) -> str:
    """Sections and keys, each with its origin as a comment. It can be read back, but for the secrets."""
    lines: list[str] = []
    open_sections: tuple[str, ...] = ()
    for value in values:
        if only_changed and not value.changed:
            continue
        *sections, key = value.path
        common = _common(open_sections, tuple(sections))
        for depth in range(common, len(sections)):
            lines.append(f"{'  ' * depth}{_scalar(sections[depth])}:")
        open_sections = tuple(sections)
        text = f"{'  ' * len(sections)}{_scalar(key)}: {_scalar(value.shown)}"
        lines.append(f"{text:<{COMMENT_COLUMN}}  # {value.origin}")
    return "\n".join(lines) + "\n" if lines else "{}\n"


def _values(config: Section, usual: Section | None, merged: Merged, path: tuple[str, ...]) -> Iterator[Value]:
    for name, known in type(config).model_fields.items():
        default = getattr(usual, name) if usual else known.get_default(call_default_factory=True)
        yield from _below(getattr(config, name), default, merged, (*path, name))


def _below(
    value: Any, usual: Any, merged: Merged, path: tuple[str, ...], *, in_mapping: bool = False
) -> Iterator[Value]:
    if isinstance(value, Section):
        yield from _values(value, usual if isinstance(usual, Section) else None, merged, path)
    elif isinstance(value, Mapping) and value:
        usual = usual if isinstance(usual, Mapping) else {}
        for name, below in value.items():
            default = usual.get(name, PydanticUndefined)
            yield from _below(below, default, merged, (*path, str(name)), in_mapping=True)
    else:
        # A mapping that came in one piece, by the environment, has one origin.
        whole = merged.origins.get(path[:-1], DEFAULT) if in_mapping else DEFAULT
        origin = merged.origins.get(path, whole)
        yield Value(path, _plain(redacted(path, value)), origin, changed=value != usual)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


def _scalar(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=WIDE, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
