"""Reads one YAML file and remembers on which line each value stands.

PyYAML alone would let a key that is given twice win silently, and forget where a value came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from taskd.errors import ConfigError

KeyPath = tuple[str | int, ...]
MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class YamlFile:
    """What a file says. `problems` are those that did not prevent reading the rest."""

    tree: Mapping[str, object] = field(default_factory=dict)
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def read_yaml(path: Path) -> YamlFile:
    """Read a file whose top is a mapping; an empty file counts as an empty mapping. Raises ConfigError."""
    text = _text(path)
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return YamlFile()
        if not isinstance(root, yaml.MappingNode):
            found = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise ConfigError(f"{path}: expected a mapping of keys to values at the top, found {found}")
        walk = _Walk(path, loader)
        tree = walk.mapping(root, ())
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_sentence(path, error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, or a part that contains itself") from None
    except ValueError as error:  # such as the date 2024-13-45
        raise ConfigError(f"{path}: a value cannot be read: {error}") from None
    finally:
        loader.dispose()
    return YamlFile(tree, walk.lines, tuple(walk.problems))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; expected a YAML configuration (examples lie in conf/)"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: expected a YAML file, found a folder") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, found other bytes at position {error.start}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _syntax_sentence(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    context = f" ({error.context})" if error.context else ""
    return f"{where}: not valid YAML: {error.problem or 'cannot be read'}{context}"


class _Walk:
    def __init__(self, path: Path, loader: yaml.SafeLoader) -> None:
        self.path = path
        self.loader = loader
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        self._report_repeated(node, path)
        self.loader.flatten_mapping(node)  # resolves `<<`
        tree: dict[str, object] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self.problems.append(f"{self.path}:{line}: expected a word as key, found {key!r}; quote it")
                continue
            self.lines[(*path, key)] = line
            tree[key] = self._value(value_node, (*path, key))
        return tree

    def _report_repeated(self, node: yaml.MappingNode, path: KeyPath) -> None:
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == MERGE_TAG or not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in first_line:
                name = ".".join(map(str, (*path, key_node.value)))
                self.problems.append(
                    f"`{name}`: given twice, on line {first_line[key_node.value]} and on line {line}; "
                    f"keep one ({self.path}:{line})"
                )
            first_line.setdefault(key_node.value, line)

    def _value(self, node: yaml.Node, path: KeyPath) -> object:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items: list[object] = []
            for number, item in enumerate(node.value):
                self.lines[(*path, number)] = item.start_mark.line + 1
                items.append(self._value(item, (*path, number)))
            return items
        value: object = self.loader.construct_object(node, deep=True)
        return value
