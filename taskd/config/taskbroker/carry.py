"""Puts the imported configuration together: what is carried over, and what is not and why."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from pathlib import PurePath
from typing import Any

from taskd.config import shape
from taskd.config.effective import Value, as_yaml
from taskd.config.loader import Merged, validated
from taskd.config.schema import BrokerConfig
from taskd.config.taskbroker.kafka import THEIR_DEFAULT, Kafka, Path, Put
from taskd.config.taskbroker.keys import CARRIED, known_names, reason_for_dropping
from taskd.config.taskbroker.source import Source
from taskd.errors import ConfigError

HEADER = "# Made by `taskd config import`{of}. Behind each value stands where it is from.\n"


@dataclass(frozen=True, slots=True)
class Imported:
    """Our file's text, what the user should know, and what taskd would refuse of it."""

    yaml: str
    warnings: list[str]
    problems: list[str]


@dataclass(slots=True)
class _Draft:
    values: dict[Path, tuple[Any, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def put(self, path: Path, value: object, origin: str) -> None:
        """A value of None was given wrongly, which is a problem already."""
        if value is None:
            return
        if shape.knows(BrokerConfig, path):
            self.values[path] = (value, origin)
        elif origin != THEIR_DEFAULT:
            self.warnings.append(
                f"`{'.'.join(path)}` is not supported yet by this version of taskd ({origin})"
            )


def import_config(path: FilePath | None, environ: Mapping[str, str]) -> Imported:
    """Translate a taskbroker's file, and its environment variables over it.

    Raises ConfigError when the file cannot be read, a value cannot be understood or the flat Kafka keys
    are mixed with the maps. Keys that are not known are warnings.
    """
    source = Source(path, environ)
    draft = _Draft()
    kafka = Kafka(source)
    for put in (*kafka.puts(), *_scalars(source), *_store_file(source, draft), *_workers(source)):
        draft.put(*put)
    draft.warnings += kafka.warnings
    _settle_rpc(draft)
    _settle_topics(draft)
    draft.warnings += _left(source)
    if source.problems:
        raise ConfigError("\n".join(source.problems))
    of = f" from {path}" if path else " from environment variables"
    return Imported(HEADER.format(of=of) + as_yaml(_in_order(draft)), draft.warnings, _refused(draft))


# ---- what is carried over


def _scalars(source: Source) -> Iterator[Put]:
    for carried in CARRIED:
        path = tuple(carried.ours.split("."))
        given = source.take_first(*carried.names)
        if given is not None:
            yield path, carried.read(source, given), given.origin
        elif carried.default is not None:
            yield path, carried.default, THEIR_DEFAULT


def _store_file(source: Source, draft: _Draft) -> Iterator[Put]:
    adapter = source.take("store", "adapter")
    if adapter is not None and str(adapter.value).lower() != "sqlite":
        draft.warnings.append(
            f"{adapter} is dropped: PostgreSQL and others are not portable, taskd keeps what is in flight in "
            "SQLite; drain the existing broker before you replace it"
        )
    given = source.take_first("store.db_path", "store.path", "db_path")
    if given is None:
        return
    file = source.text(given)
    if file is None:
        return
    yield ("data_dir",), str(PurePath(file).parent), f"folder of {given.key}, {given.origin}"
    yield ("store", "path"), file, given.origin
    draft.warnings.append(
        f"{given}: taskd does not read the existing broker's store; drain that broker, then move it away"
    )


def _workers(source: Source) -> Iterator[Put]:
    urls: dict[str, str] = {}
    origin = ""
    for section in (("worker_map",), ("push", "worker_map")):
        for application in source.names(*section):
            given = source.take(*section, application)
            url = source.text(given) if given is not None else None
            if given is not None and url is not None:
                urls[application], origin = url, origin or given.origin
        source.take(*section)  # an empty one
    if urls:
        yield ("push", "worker_map"), urls, origin


def _settle_rpc(draft: _Draft) -> None:
    port, origin = draft.values.get(("rpc", "port"), (50051, ""))
    if port == 0:
        draft.values["rpc", "host"] = ("127.0.0.1", "grpc_port is 0")
        draft.warnings.append(
            f"`grpc_port: 0` ({origin}) means no server there; taskd always has one: here on a free port, "
            "for this machine only"
        )
    if port == BrokerConfig().http.port:
        draft.put(("http", "port"), port + 1, "grpc_port is where taskd serves /metrics by default")
    if ("rpc", "secrets") in draft.values or any("sasl_password" in path for path in draft.values):
        draft.warnings.append("the result holds secrets in plain text: keep it private (chmod 600)")


def _settle_topics(draft: _Draft) -> None:
    """Every topic that is written to is declared; nothing of ours consumes dead letters."""
    dead_letters = draft.values["log", "deadletter_topic"][0]
    topics = list(dict.fromkeys(path[2] for path in draft.values if path[:2] == ("log", "topics")))
    if dead_letters in topics and not _value(draft, dead_letters, "produce_only"):
        draft.put(
            ("log", "topics", dead_letters, "produce_only"), True, "taskd does not consume its dead letters"
        )
    retries, origin = draft.values.get(("log", "retry_topic"), (None, ""))
    if retries is not None and retries not in topics:
        beside = dead_letters if dead_letters in topics else topics[0]
        cluster = _value(draft, beside, "cluster")
        draft.put(("log", "topics", retries, "cluster"), cluster, origin)
        draft.put(("log", "topics", retries, "produce_only"), True, f"kafka_retry_topic, {origin}")
        draft.warnings.append(
            f"retries go to `{retries}` ({origin}), which this broker does not consume: "
            "set its produce_only to false unless another broker does"
        )


def _value(draft: _Draft, topic: str, key: str) -> Any:
    return draft.values.get(("log", "topics", topic, key), (None, ""))[0]


# ---- what is not


def _left(source: Source) -> Iterator[str]:
    for given in source.left():
        if given.value is None or given.value in ({}, []):
            continue
        reason = reason_for_dropping(given.key)
        if reason is not None:
            yield f"{given} is dropped: {reason}"
            continue
        near = difflib.get_close_matches(given.key, known_names(), n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        yield f"{given} is not a key of taskbroker that taskd knows, and is ignored{hint}"


def _refused(draft: _Draft) -> list[str]:
    merged = Merged()
    for path, (value, origin) in draft.values.items():
        merged.put(path, value, origin)
    try:
        validated(BrokerConfig, merged)
    except ConfigError as error:
        return str(error).splitlines()
    return []


# ---- as a file


def _in_order(draft: _Draft) -> list[Value]:
    """In the order of the schema; names of the user's in the order of their file."""
    names: dict[Path, int] = {}

    def place(path: Path) -> tuple[int, ...]:
        places = []
        for depth, key in enumerate(path):
            known, here = shape.keys_of(BrokerConfig, path[:depth]), path[: depth + 1]
            places.append(known.index(key) if key in known else names.setdefault(here, len(names)))
        return tuple(places)

    ordered = sorted(draft.values, key=place)
    return [Value(path, *draft.values[path], changed=True) for path in ordered]
