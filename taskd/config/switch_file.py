"""Reads the file of switches, in the format existing brokers have for it.

```yaml
drop_task_killswitch:
  - issues.deliver_webhook
  - name: mail.send
    select_arg: {0: 17}
    select_kwarg: {template: digest}
demoted_namespaces: [reports]
demoted_topic: taskworker-long
demoted_topic_cluster: other-kafka:9092
```
Both lists are mandatory, so that a file cut short switches nothing off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from taskd.activation.switches import Condition, Switch, SwitchKind, SwitchSource, unusable
from taskd.errors import ConfigError

DEMOTED_TOPIC = "taskworker-long"
MAX_BYTES = 4 * 1024 * 1024
LISTS = ("drop_task_killswitch", "demoted_namespaces")
KEYS = (*LISTS, "demoted_topic", "demoted_topic_cluster")
TASK_KEYS = ("name", "select_arg", "select_kwarg")


@dataclass(frozen=True, slots=True)
class SwitchFile:
    """What a file orders. `warnings`: what has no effect in it, in sentences."""

    kills: tuple[Switch, ...] = ()
    demotions: tuple[Switch, ...] = ()
    demoted_topic: str = DEMOTED_TOPIC
    demoted_topic_cluster: str | None = None
    warnings: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """A key that is given twice is an error: else the last would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key = (key_node.tag, key_node.value)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"`{key_node.value}` is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def parse_switch_file(content: bytes, path: Path) -> SwitchFile:
    """Raises ConfigError with one line for each problem; then nothing of the file counts."""
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(content)} bytes; a file of switches has at most {MAX_BYTES}")
    try:
        tree = yaml.load(content.decode("utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, found other bytes at position {error.start}"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or 'cannot be read'}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    reading = _Reading(path)
    try:
        found = reading.file(tree)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, or a part that contains itself") from None
    if reading.problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in reading.problems))
    return found


class _Reading:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def file(self, tree: object) -> SwitchFile:
        if not isinstance(tree, dict):
            self.problems.append(f"expected the lists {' and '.join(LISTS)}, found {_kind(tree)}")
            return SwitchFile()
        for key in tree:
            if key not in KEYS:
                self.warnings.append(f"`{key}` is not known here; known are {', '.join(KEYS)}")
        kills = tuple(self._kills(self._list(tree, "drop_task_killswitch")))
        demotions = tuple(self._demotions(self._list(tree, "demoted_namespaces")))
        topic = self._text(tree, "demoted_topic") or DEMOTED_TOPIC
        cluster = self._text(tree, "demoted_topic_cluster")
        return SwitchFile(kills, demotions, topic, cluster, tuple(self.warnings))

    def _list(self, tree: Mapping[object, object], key: str) -> list[object]:
        if key not in tree:
            self.problems.append(f"`{key}` is missing; both lists are mandatory, `[]` is an empty one")
            return []
        value = tree[key]
        if not isinstance(value, list):
            self.problems.append(f"`{key}`: expected a list, found {_kind(value)}; `[]` is an empty one")
            return []
        return value

    def _text(self, tree: Mapping[object, object], key: str) -> str | None:
        value = tree.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            self.problems.append(f"`{key}`: expected a name, found {_kind(value)}")
            return None
        return value

    def _kills(self, items: list[object]) -> Iterator[Switch]:
        for number, item in enumerate(items):
            where = f"drop_task_killswitch.{number}"
            if isinstance(item, str) and item:
                yield self._switch(SwitchKind.KILLSWITCH, taskname=item)
            elif isinstance(item, dict):
                conditions = self._task(item, where)
                name = item.get("name")
                if conditions and isinstance(name, str):
                    yield self._switch(SwitchKind.KILLSWITCH, taskname=name, conditions=conditions)
            else:
                self.problems.append(
                    f"`{where}`: expected a task name, or a map with {', '.join(TASK_KEYS)}; "
                    f"found {_kind(item)}"
                )

    def _task(self, item: Mapping[object, object], where: str) -> tuple[Condition, ...]:
        name = item.get("name")
        if not isinstance(name, str) or not name:
            self.problems.append(f"`{where}.name`: expected a task name, found {_kind(name)}")
        for key in item:
            if key not in TASK_KEYS:
                self.warnings.append(f"`{where}.{key}` is not known here; known are {', '.join(TASK_KEYS)}")
        conditions = (
            *self._conditions(item, "select_arg", where),
            *self._conditions(item, "select_kwarg", where),
        )
        if not conditions:
            self.warnings.append(
                f"`{where}`: without a condition it drops nothing; "
                f"to drop every call of {name}, give its name alone"
            )
        return conditions

    def _conditions(self, item: Mapping[object, object], key: str, where: str) -> Iterator[Condition]:
        value = item.get(key)
        if value is None:
            return
        if not isinstance(value, dict):
            self.problems.append(f"`{where}.{key}`: expected a map, found {_kind(value)}")
            return
        for place, wanted in value.items():
            at = f"{where}.{key}.{place}"
            problem = unusable(wanted)
            if problem:
                self.problems.append(f"`{at}`: {problem}")
            elif key == "select_kwarg":
                if isinstance(place, str):
                    yield Condition(place, wanted)
                else:
                    self.problems.append(f"`{at}`: expected an argument's name, found {_kind(place)}")
            else:
                position = _position(place)
                if position is None:
                    self.problems.append(f"`{at}`: expected a position from 0 on, found {place!r}")
                else:
                    yield Condition(position, wanted)

    def _demotions(self, items: list[object]) -> Iterator[Switch]:
        for number, item in enumerate(items):
            if isinstance(item, str):
                yield self._switch(SwitchKind.DEMOTE, namespace=item)
            else:
                self.problems.append(
                    f"`demoted_namespaces.{number}`: expected a namespace, found {_kind(item)}"
                )

    def _switch(self, kind: SwitchKind, **subject: Any) -> Switch:
        reason = f"written in {self.path}"
        return Switch(kind, reason=reason, author="file", source=SwitchSource.FILE, **subject)


def _position(place: object) -> int | None:
    if isinstance(place, str) and place.isascii() and place.isdigit() and len(place) < 10:
        return int(place)
    if isinstance(place, int) and not isinstance(place, bool) and place >= 0:
        return place
    return None


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    kinds = {dict: "a map", list: "a list", str: f"the text {value!r}", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")
