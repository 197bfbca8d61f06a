"""What the schema looks like from outside: which key is a section, a list, a scalar."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from taskd.config.schema import Section


def keys_of(model: type[Section], path: tuple[int | str, ...]) -> tuple[str, ...]:
    """The keys that the section at `path` knows; none when there is no section."""
    section = _section(_annotation(model, path))
    return tuple(section.model_fields) if section else ()


def leaves(model: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key with a value of its own, in the order of the schema; `*` stands for a name of the user's."""
    for name, known in model.model_fields.items():
        bare = _bare(known.annotation)
        below = _section(bare) or (_section(_element(bare)) if typing.get_origin(bare) is dict else None)
        if below is None:
            yield (*path, name), known
        else:
            yield from leaves(below, (*path, name) if _section(bare) else (*path, name, "*"))


def knows(model: type[Section], path: tuple[str, ...]) -> bool:
    """Whether a value may stand at this path."""
    return any(
        len(path) == len(known) and all(want in ("*", key) for want, key in zip(known, path, strict=True))
        for known, _ in leaves(model)
    )


def environment_names(model: type[Section]) -> list[str]:
    """What stands behind TASKD_ for each key; without those below a name of the user's."""
    return ["__".join(path).upper() for path, _ in leaves(model) if "*" not in path]


def is_mapping(model: type[Section], path: tuple[int | str, ...]) -> bool:
    """Whether names of the user's stand at `path`, with a value or a section for each."""
    return typing.get_origin(_annotation(model, path)) is dict


def is_section(model: type[Section], path: tuple[int | str, ...]) -> bool:
    annotation = _annotation(model, path)
    return _section(annotation) is not None or typing.get_origin(annotation) is dict


def is_sequence(model: type[Section], path: tuple[int | str, ...]) -> bool:
    return typing.get_origin(_annotation(model, path)) in (tuple, list)


def without_empty_sections(model: type[Section], tree: Mapping[str, object]) -> dict[str, object]:
    """A copy in which a section whose every line is commented out (YAML reads it as null) is empty."""
    return {key: _filled(model, (key,), value) for key, value in tree.items()}


def remove(tree: dict[str, object], path: tuple[int | str, ...]) -> None:
    """Take out the value at `path`, if it is there."""
    into: Any = tree
    for key in path[:-1]:
        into = into.get(key) if isinstance(into, dict) else None
    if isinstance(into, dict):
        into.pop(path[-1], None)


def _filled(model: type[Section], path: tuple[str, ...], value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _filled(model, (*path, key), below) for key, below in value.items()}
    # A whole mapping of sections (`pools:`) that is empty is an error worth hearing of.
    if value is None and _section(_annotation(model, path)) is not None and not _may_be_none(model, path):
        return {}
    return value


def _may_be_none(model: type[Section], path: tuple[str, ...]) -> bool:
    """Whether the key is for `Section | None`, where null means none and not the defaults."""
    section = _section(_annotation(model, path[:-1]))
    known = section.model_fields.get(path[-1]) if section else None
    return known is not None and type(None) in typing.get_args(known.annotation)


def _annotation(model: type[Section], path: tuple[int | str, ...]) -> Any:
    annotation: Any = model
    for key in path:
        section = _section(annotation)
        if section is not None:
            known = section.model_fields.get(str(key))
            annotation = _bare(known.annotation) if known else None
        elif typing.get_origin(annotation) is dict:
            annotation = _element(annotation)
        else:
            return None
    return annotation


def _element(mapping: Any) -> Any:
    return _bare(typing.get_args(mapping)[1])


def _section(annotation: Any) -> type[Section] | None:
    is_one = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation if is_one else None


def _bare(annotation: Any) -> Any:
    """Without Annotated and without `| None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        kept = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return _bare(kept[0]) if len(kept) == 1 else annotation
    return annotation
