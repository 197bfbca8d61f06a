"""JSON Schema of a configuration file, so that editors complete keys and show what they are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import to_jsonable_python

from taskd.config.schema import Section

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
UNITS = {"_ms": "milliseconds", "_s": "seconds", "_bytes": "bytes"}


def json_schema(model: type[Section]) -> dict[str, Any]:
    """Units, defaults and descriptions of every key; a key that is not in it is an error, as for taskd."""
    schema = model.model_json_schema()
    by_name = {section.__name__: section for section in _kinds(Section)}
    for name, about in (*schema.get("$defs", {}).items(), (model.__name__, schema)):
        if name in by_name:
            _describe(by_name[name], about.get("properties", {}))
    _name_bounds(schema)
    return {"$schema": DIALECT, **schema}


def unit_of(name: str) -> str | None:
    """The unit that a key's name ends with."""
    return next((unit for ending, unit in UNITS.items() if name.endswith(ending)), None)


def _kinds(section: type[Section]) -> Iterator[type[Section]]:
    for kind in section.__subclasses__():
        yield kind
        yield from _kinds(kind)


def _describe(section: type[Section], properties: dict[str, Any]) -> None:
    for name, about in properties.items():
        about.pop("title", None)  # the key again, in capitals
        if unit := unit_of(name):
            about["description"] = f"{about.get('description', name)} (in {unit})"
        known = section.model_fields[name]
        if known.default_factory is not None:  # pydantic leaves these out
            about["default"] = to_jsonable_python(known.get_default(call_default_factory=True))


def _name_bounds(schema: Any) -> None:
    """Behind a validator of ours pydantic leaves bounds under its own names, which editors do not know."""
    if isinstance(schema, list):
        for item in schema:
            _name_bounds(item)
    elif isinstance(schema, dict):
        for ours, theirs in BOUNDS.items():
            if "type" in schema and ours in schema:
                schema[theirs] = schema.pop(ours)
        for below in schema.values():
            _name_bounds(below)
