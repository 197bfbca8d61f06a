"""What an existing configuration says: its file, and its environment variables over it."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from taskd.config.redaction import redacted
from taskd.config.yaml_file import KeyPath, read_yaml

PREFIX = "TASKBROKER_"
UNIT_S = {"ms": 0.001, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\Z")


@dataclass(frozen=True, slots=True)
class Given:
    """One value, its key as written, and where it stands."""

    key: str
    value: Any
    origin: str

    def __str__(self) -> str:
        return f"`{self.key}` ({self.origin})"


class Source:
    """Keys are dotted. What cannot be understood lands in `problems`; what nobody took, in `left()`."""

    def __init__(self, path: Path | None, environ: Mapping[str, str]) -> None:
        """Raises ConfigError when the file cannot be read."""
        self.problems: list[str] = []
        self._values: dict[KeyPath, Given] = {}
        self._taken: set[KeyPath] = set()
        if path is not None:
            file = read_yaml(path)
            self.problems += file.problems
            for keys, value in _leaves(file.tree, ()):
                self._put(keys, value, f"{path}:{file.lines.get(keys, 1)}")
        for name, text in sorted(environ.items()):
            if name.startswith(PREFIX) and text:
                keys = tuple(name.removeprefix(PREFIX).lower().split("__"))
                for below, value in _leaves(_structured(text), keys):
                    self._put(below, value, f"environment variable {name}")

    def _put(self, keys: KeyPath, value: object, origin: str) -> None:
        for stale in [known for known in self._values if known[: len(keys)] == keys]:
            del self._values[stale]
        self._values[keys] = Given(".".join(map(str, keys)), value, origin)

    # ---- looking

    def names(self, *section: str) -> list[str]:
        """What stands directly below a section, in the order of the file."""
        depth = len(section)
        found = (str(keys[depth]) for keys in self._values if keys[:depth] == section and len(keys) > depth)
        return list(dict.fromkeys(found))

    def any_of(self, *patterns: str) -> list[Given]:
        """Values whose first key is one of these names; a trailing `*` stands for the rest of a name."""
        found = []
        for keys, given in self._values.items():
            first = str(keys[0])
            if any(first.startswith(p[:-1]) if p.endswith("*") else first == p for p in patterns):
                found.append(given)
        return found

    def take(self, *keys: str) -> Given | None:
        """The value at this key, once: it no longer counts as left. A null counts as not given."""
        given = self._values.get(keys)
        if given is not None:
            self._taken.add(keys)
        return given if given is not None and given.value is not None else None

    def take_first(self, *names: str) -> Given | None:
        """The value of one of several dotted names for the same thing; the first that is given."""
        found = [given for name in names if (given := self.take(*name.split("."))) is not None]
        return found[0] if found else None

    def left(self) -> Iterator[Given]:
        """What nobody took, in the order of the file."""
        for keys, given in self._values.items():
            if keys not in self._taken:
                yield given

    # ---- reading: None when the value is wrong, which is then a problem

    def text(self, given: Given) -> str | None:
        if not isinstance(given.value, (dict, list, bool)):
            return str(given.value)
        self._wrong(given, "text")
        return None

    def one_of(self, given: Given, *choices: str) -> str | None:
        text = str(given.value).lower()
        if text in choices:
            return text
        self._wrong(given, " or ".join(choices))
        return None

    def number(self, given: Given) -> int | None:
        if isinstance(given.value, (int, float, str)) and not isinstance(given.value, bool):
            with suppress(ValueError, OverflowError):
                return int(given.value) if not isinstance(given.value, str) else int(float(given.value))
        self._wrong(given, "a whole number")
        return None

    def flag(self, given: Given) -> bool | None:
        text = str(given.value).lower()
        if text in (*YES, *NO):
            return text in YES
        self._wrong(given, "true or false")
        return None

    def seconds(self, given: Given) -> float | None:
        """Of `500ms` or `5s`; a plain number is in the unit its key ends with, else in seconds."""
        usual = "ms" if given.key.endswith("_ms") else "s"
        found = _DURATION.match(str(given.value).strip().lower())
        if found is None or (found[2] or usual) not in UNIT_S:
            self._wrong(given, "a duration such as 500ms or 5s")
            return None
        seconds = float(found[1]) * UNIT_S[found[2] or usual]
        return int(seconds) if seconds == int(seconds) else round(seconds, 6)

    def whole_seconds(self, given: Given) -> int | None:
        seconds = self.seconds(given)
        return None if seconds is None else math.ceil(seconds)

    def milliseconds(self, given: Given) -> int | None:
        seconds = self.seconds(given)
        return None if seconds is None else round(seconds * 1000)

    def texts(self, given: Given) -> list[str] | None:
        if isinstance(given.value, list):
            return [str(item) for item in given.value]
        if not isinstance(given.value, dict):
            return [item.strip() for item in str(given.value).split(",") if item.strip()]
        self._wrong(given, "a list")
        return None

    def _wrong(self, given: Given, expected: str) -> None:
        found = redacted(given.key.split("."), given.value)
        self.problems.append(f"`{given.key}`: expected {expected}, found {found!r} ({given.origin})")


def _leaves(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, (*path, key))
    elif path:
        yield path, value


def _structured(text: str) -> object:
    """A variable may hold a list or a mapping, as `[a, b]`, `{a: b}` or `{a = "b"}`."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
