"""Operators' switches: what is paused, killed or sent elsewhere, and which activations that concerns.

A switch names an application, a namespace or a task, or several of them, which must then all fit.
A killswitch may also name arguments: it then concerns a call when any of them has the given value.
`Board` holds all switches and answers for one lane (application and namespace) at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

MAX_DEPTH = 100  # of lists and maps inside each other; producers send no deeper ones
GATES_KEPT = 10_000  # producers may make up lanes without end

Arguments = tuple[Sequence[object], Mapping[str, object]]


class SwitchKind(Enum):
    """What a switch does; stored."""

    PAUSE = "pause"  # nothing is handed out; it still expires
    KILLSWITCH = "killswitch"  # dropped, as it arrives and where it waits
    DEMOTE = "demote"  # published to another topic instead


class SwitchSource(Enum):
    """Who a switch belongs to; stored. Only its source takes it away again."""

    FILE = "file"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Condition:
    """One argument and the value it must have. `place`: its position, or its name."""

    place: int | str
    value: object

    def holds(self, arguments: Arguments) -> bool:
        args, kwargs = arguments
        if isinstance(self.place, int):
            return 0 <= self.place < len(args) and same(args[self.place], self.value)
        return self.place in kwargs and same(kwargs[self.place], self.value)


def same(one: object, other: object) -> bool:
    """Exact equality: of type too, so that 1, 1.0 and true are three values; also inside lists and maps."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        types = {key: type(key) for key in other}
        return len(one) == len(other) and all(
            types.get(key) is type(key) and same(value, other[key]) for key, value in one.items()
        )
    return one == other


def unusable(value: object, depth: int = MAX_DEPTH) -> str:
    """Why no argument can have this value; empty when one can."""
    if value is None or isinstance(value, (bool, int, float)):
        return ""
    if isinstance(value, str):
        return "" if _is_text(value) else "expected text, found half of a surrogate pair"
    if depth == 0:
        return f"nested more than {MAX_DEPTH} deep"
    if isinstance(value, list):
        return next(filter(None, (unusable(item, depth - 1) for item in value)), "")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return "expected text as keys of a map"
        inside = (*value, *value.values())
        return next(filter(None, (unusable(item, depth - 1) for item in inside)), "")
    kind = type(value).__name__
    return f"expected null, true, false, a number, text, a list or a map; found a {kind}; quote it?"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Switch:
    """One order. None in a selector: any. Times on the wall clock; `until_ms` None: until taken back.

    `number` is the store's name for it, 0 before it is stored.
    """

    kind: SwitchKind
    application: str | None = None
    namespace: str | None = None
    taskname: str | None = None
    conditions: tuple[Condition, ...] = ()
    reason: str = ""
    author: str = ""
    source: SwitchSource = SwitchSource.OPERATOR
    created_at_ms: int = 0
    until_ms: int | None = None
    number: int = 0

    @property
    def subject(self) -> tuple[str | None, str | None, str | None, str]:
        """What it is about: two switches of one kind and subject are the same order."""
        return self.application, self.namespace, self.taskname, conditions_text(self.conditions)

    @property
    def words(self) -> str:
        """Its subject as people write it: `application=shop task=send`."""
        named = (("application", self.application), ("namespace", self.namespace), ("task", self.taskname))
        parts = [f"{name}={value}" for name, value in named if value is not None]
        for condition in self.conditions:
            what = "arg" if isinstance(condition.place, int) else "kwarg"
            value = json.dumps(condition.value, ensure_ascii=False)
            parts.append(f"{what}:{condition.place}={value}")
        return " ".join(parts)

    def concerns_lane(self, application: str, namespace: str) -> bool:
        return self.application in (None, application) and self.namespace in (None, namespace)


def conditions_text(conditions: Iterable[Condition]) -> str:
    """Conditions as they are stored: JSON, the same for the same conditions."""
    pairs = [[condition.place, condition.value] for condition in conditions]
    pairs.sort(key=lambda pair: (isinstance(pair[0], str), pair[0]))
    return json.dumps(pairs, sort_keys=True, ensure_ascii=False)


def conditions_of(text: str) -> tuple[Condition, ...]:
    """Reads what `conditions_text` wrote."""
    return tuple(Condition(place, value) for place, value in json.loads(text))


@dataclass(frozen=True, slots=True)
class Gate:
    """What holds for the activations of one lane."""

    paused: bool = False
    demoted: bool = False
    paused_tasks: frozenset[str] = frozenset()
    kills: Mapping[str, tuple[Switch, ...]] = field(default_factory=dict)

    @property
    def closed(self) -> bool:
        """Nothing of the lane is handed out."""
        return self.paused or self.demoted

    @property
    def by_task(self) -> bool:
        """It depends on the task."""
        return bool(self.paused_tasks or self.kills)


OPEN = Gate()


class Board:
    """All switches that hold now. Never changes: a change makes another board."""

    def __init__(self, switches: Iterable[Switch] = ()) -> None:
        self.switches = tuple(sorted(switches, key=lambda switch: switch.number))
        self._gates: dict[tuple[str, str], Gate] = {}

    @property
    def moves_rows(self) -> bool:
        """Rows that wait may have to go: something is killed or demoted."""
        return any(switch.kind is not SwitchKind.PAUSE for switch in self.switches)

    def gate(self, application: str, namespace: str) -> Gate:
        if not self.switches:
            return OPEN
        gate = self._gates.get((application, namespace))
        if gate is None:
            if len(self._gates) >= GATES_KEPT:
                self._gates.clear()
            gate = self._gates[application, namespace] = self._gate(application, namespace)
        return gate

    def _gate(self, application: str, namespace: str) -> Gate:
        here = [switch for switch in self.switches if switch.concerns_lane(application, namespace)]
        pauses = [switch.taskname for switch in here if switch.kind is SwitchKind.PAUSE]
        kills: dict[str, tuple[Switch, ...]] = {}
        for switch in here:
            if switch.kind is SwitchKind.KILLSWITCH and switch.taskname is not None:
                kills[switch.taskname] = (*kills.get(switch.taskname, ()), switch)
        return Gate(
            paused=None in pauses,
            demoted=any(switch.kind is SwitchKind.DEMOTE for switch in here),
            paused_tasks=frozenset(name for name in pauses if name is not None),
            kills=kills,
        )
