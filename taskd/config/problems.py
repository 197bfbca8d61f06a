"""Turns what validation found into sentences: the key, what was expected, what was found, and where."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import ValidationError

from taskd.config import shape
from taskd.config.redaction import is_secret
from taskd.config.schema import Section

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

FOUND_CHARS = 80

# What pydantic calls these is for programmers; the rest of its messages reads well after one cut.
EXPECTED = {
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected text (put a number in quotes)",
    "string_too_short": "expected text that is not empty",
    "path_type": "expected a path",
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping",
    "too_short": "expected at least one entry",
}


def sentences(
    model: type[Section], error: ValidationError, origin_of: Callable[[tuple[int | str, ...]], str | None]
) -> list[str]:
    """One line for each problem, in the order of the schema."""
    every = error.errors(include_url=False)
    # A list whose only entry is wrong is also reported as too short; the entry is what matters.
    parents = {found["loc"][:-1] for found in every}
    return [
        f"{_sentence(model, found)}{_where(origin_of(found['loc']))}"
        for found in every
        if not (found["type"] == "too_short" and found["loc"] in parents)
    ]


def _sentence(model: type[Section], found: ErrorDetails) -> str:
    location = found["loc"]
    key = ".".join(map(str, location))
    kind = found["type"]
    if kind == "extra_forbidden":
        return f"unknown key `{key}`{_nearest(model, location)}"
    if kind == "missing":
        return f"`{key}`: expected a value, found none"
    if kind in ("model_type", "model_attributes_type"):
        some = ", ".join(shape.keys_of(model, location)[:3])
        return (
            f"`{key}`: expected a section with keys such as {some}, found {_shown(location, found['input'])}"
        )
    if kind == "value_error" and isinstance(found["input"], dict):
        return f"`{key}`: {found['msg'].removeprefix('Value error, ')}"
    return f"`{key}`: {_expected(found)}, found {_shown(location, found['input'])}"


def _expected(found: ErrorDetails) -> str:
    if found["type"] in EXPECTED:
        return EXPECTED[found["type"]]
    return (
        found["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "expected", 1)
        .replace("expected greater", "expected a number greater", 1)
        .replace("expected less", "expected a number less", 1)
    )


def _nearest(model: type[Section], location: tuple[int | str, ...]) -> str:
    *parents, key = location
    known = shape.keys_of(model, tuple(parents))
    near = difflib.get_close_matches(str(key), known, n=1)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(known)}" if known else ""


def _shown(location: tuple[int | str, ...], value: object) -> str:
    text = "what is not shown here" if is_secret(location) else repr(value)
    return text if len(text) <= FOUND_CHARS else f"{text[:FOUND_CHARS]}…"


def _where(origin: str | None) -> str:
    return f" ({origin})" if origin else ""
