"""Puts a configuration together: file < environment < flags, and reports every problem at once.

An environment variable is `TASKD_` and the key with `__` between the levels, in capitals:
`TASKD_STORE__MAX_PENDING_COUNT=5000`, `TASKD_DATA_DIR=/var/lib/taskd`. Lists are separated by commas;
a mapping is written as `{a: b}`;
an empty variable counts as not set. Producers use plain names (`TASKD_LOG=embedded`), which a broker
or a worker in the same environment passes over.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from taskd.config import shape
from taskd.config.problems import sentences
from taskd.config.schema import BrokerConfig, PoolSection, ProducerConfig, Section, WorkerConfig
from taskd.config.yaml_file import KeyPath, read_yaml
from taskd.errors import ConfigError

PREFIX = "TASKD_"
COMMAND_LINE = "command line"
OF_COMMANDS = {"ADMIN_SECRET"}  # read by commands, and part of no configuration
C = TypeVar("C", bound=Section)


def load_broker_config(
    path: Path | None, overrides: Mapping[str, object], environ: Mapping[str, str] = os.environ
) -> BrokerConfig:
    """The broker's configuration. `overrides` are flags: by dotted key (`rpc.port`), or nested where a
    name may hold a dot (`{"pools": {name: {"slots": 4}}}`); None is not given.

    Raises ConfigError with one line for each problem.
    """
    return validated(BrokerConfig, gather(BrokerConfig, path, overrides, environ))


def load_worker_config(
    path: Path | None, overrides: Mapping[str, object], environ: Mapping[str, str] = os.environ
) -> WorkerConfig:
    """The worker's configuration; otherwise as `load_broker_config`."""
    return validated(WorkerConfig, gather(WorkerConfig, path, overrides, environ))


def load_producer_config(
    overrides: Mapping[str, object], environ: Mapping[str, str] = os.environ
) -> ProducerConfig:
    """How to reach the log: no file, plain environment names such as TASKD_BROKER."""
    return validated(ProducerConfig, gather(ProducerConfig, None, overrides, environ))


def misspelt_names(model: type[Section], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Warnings of environment variables that nobody reads, but whose name is close to one that is read.

    They are no errors: other programs' names share the prefix.
    """
    of_producers = shape.environment_names(ProducerConfig)
    known = {
        *OF_COMMANDS,
        *of_producers,
        *shape.environment_names(BrokerConfig),
        *shape.environment_names(WorkerConfig),
    }
    here = sorted({*of_producers, *shape.environment_names(model)})
    found = []
    for name, text in sorted(environ.items()):
        key = name.removeprefix(PREFIX).upper()
        if not name.startswith(PREFIX) or text == "" or "__" in key or key in known:
            continue
        if near := difflib.get_close_matches(key, here, n=1, cutoff=0.8):
            found.append(f"environment variable {name} is not read; did you mean {PREFIX}{near[0]}?")
    return found


def pool_of(config: WorkerConfig, name: str) -> PoolSection:
    """The section of this pool. Raises ConfigError that names the pools there are."""
    if name in config.pools:
        return config.pools[name]
    near = difflib.get_close_matches(name, config.pools, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    raise ConfigError(
        f"no pool `{name}` in the configuration; it has {', '.join(sorted(config.pools))}{hint}"
    )


@dataclass(slots=True)
class Merged:
    """A configuration before validation: the values, and where each came from."""

    tree: dict[str, object] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, path: tuple[str, ...], value: object, origin: str) -> None:
        *parents, last = path
        into = self.tree
        for parent in parents:
            below = into.setdefault(parent, {})
            if not isinstance(below, dict):
                return  # the value in the way is a problem of its own, reported by validation
            into = below
        into[last] = value
        for stale in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[stale]
        self.origins[path] = origin

    def origin_of(self, path: KeyPath) -> str | None:
        """Where the value came from, or the nearest section around it."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return None


def gather(
    model: type[Section],
    path: Path | None,
    overrides: Mapping[str, object],
    environ: Mapping[str, str] = os.environ,
) -> Merged:
    """Everything that is said about a configuration, not validated yet. Raises ConfigError for the file."""
    merged = Merged()
    if path is not None:
        file = read_yaml(path)
        merged.problems.extend(file.problems)
        merged.origins.update({key: f"{path}:{line}" for key, line in file.lines.items()})
        merged.tree.update(shape.without_empty_sections(model, file.tree))
    for name, keys, value in _from_environment(model, environ, merged.problems):
        merged.put(keys, value, f"environment variable {name}")
    for dotted, value in overrides.items():
        for keys, leaf in _leaves(tuple(dotted.split(".")), value):
            merged.put(keys, leaf, COMMAND_LINE)
    return merged


def _leaves(path: tuple[str, ...], value: object) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _leaves((*path, key), below)
    elif value is not None:
        yield path, value


def _from_environment(
    model: type[Section], environ: Mapping[str, str], problems: list[str]
) -> Iterator[tuple[str, tuple[str, ...], object]]:
    elsewhere = {
        key
        for other in (BrokerConfig, WorkerConfig)
        for key in other.model_fields
        if key not in model.model_fields
    }
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX) or text == "":
            continue
        keys = tuple(name.removeprefix(PREFIX).lower().split("__"))
        known_here = keys[0] in model.model_fields
        if len(keys) == 1:
            # Other programs' names share the prefix (TASKD_LOG of producers), so unknown ones are no error.
            if known_here and not shape.is_section(model, keys):
                yield name, keys, _read_value(model, keys, text)
        elif known_here:
            yield name, keys, _read_value(model, keys, text)
        elif keys[0] not in elsewhere and model is not ProducerConfig:
            near = difflib.get_close_matches(keys[0], model.model_fields, n=1)
            hint = f"; did you mean `{PREFIX}{'__'.join((near[0], *keys[1:])).upper()}`?" if near else ""
            problems.append(f"unknown section `{keys[0]}`{hint} (environment variable {name})")


def _read_value(model: type[Section], keys: tuple[str, ...], text: str) -> object:
    if not shape.is_sequence(model, keys) and not shape.is_mapping(model, keys):
        return text
    if text.lstrip().startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text  # validation says what was expected
    if shape.is_mapping(model, keys):
        return text
    return [item.strip() for item in text.split(",") if item.strip()]


def validated(model: type[C], merged: Merged) -> C:
    """The configuration, or a ConfigError with one line for each problem."""
    problems = list(merged.problems)
    try:
        config = model.model_validate(merged.tree)
    except ValidationError as error:
        problems += sentences(model, error, merged.origin_of)
        # An unknown key hides what else is wrong with its section, so look again without it.
        problems += _without_unknown_keys(model, merged, error)
    else:
        if not problems:
            return config
    raise ConfigError("\n".join(dict.fromkeys(problems)))


def _without_unknown_keys(model: type[Section], merged: Merged, error: ValidationError) -> list[str]:
    unknown = [found["loc"] for found in error.errors() if found["type"] == "extra_forbidden"]
    for location in unknown:
        shape.remove(merged.tree, location)
    if unknown:
        try:
            model.model_validate(merged.tree)
        except ValidationError as rest:
            return sentences(model, rest, merged.origin_of)
    return []
