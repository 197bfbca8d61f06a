"""`taskd.v1.AdminService`: operators pause, kill, take back and look."""

from __future__ import annotations

import json
from typing import TypeVar

import betterproto2

from taskd.activation.switches import Condition, Switch, SwitchKind, SwitchSource, unusable
from taskd.clock import Clock
from taskd.errors import Refused, Undecodable
from taskd.inflight.writer import Inflight
from taskd.rpc.base import Services, Unary
from taskd.telemetry import audit
from taskd.wire.generated.taskd import v1
from taskd.wire.messages import read_message

SERVICE = "taskd.v1.AdminService"
MAX_TEXT_CHARS = 1_000  # of a name, a reason, an author
MAX_VALUE_CHARS = 100_000
MAX_CONDITIONS = 1_000
MAX_SWITCHES = 10_000
LONGEST_MS = 100 * 366 * 86_400_000

M = TypeVar("M", bound=betterproto2.Message)

KINDS = {
    v1.SwitchKind.PAUSE: SwitchKind.PAUSE,
    v1.SwitchKind.KILLSWITCH: SwitchKind.KILLSWITCH,
}
WIRE_KINDS = {
    SwitchKind.PAUSE: v1.SwitchKind.PAUSE,
    SwitchKind.KILLSWITCH: v1.SwitchKind.KILLSWITCH,
    SwitchKind.DEMOTE: v1.SwitchKind.DEMOTE,
}


class Orders:
    def __init__(self, inflight: Inflight, clock: Clock) -> None:
        self._inflight = inflight
        self._clock = clock

    @property
    def services(self) -> Services:
        return {
            f"/{SERVICE}/SetSwitch": Unary(self.set_switch),
            f"/{SERVICE}/ClearSwitch": Unary(self.clear_switch),
            f"/{SERVICE}/ListSwitches": Unary(self.list_switches),
        }

    async def set_switch(self, request: bytes) -> bytes:
        order = parsed(v1.SetSwitchRequest, request)
        if len(self._inflight.board.switches) >= MAX_SWITCHES:
            raise Refused("RESOURCE_EXHAUSTED", f"there are {MAX_SWITCHES} switches already; take some back")
        until_ms = None
        if order.for_ms is not None:
            if not 0 < order.for_ms <= LONGEST_MS:
                raise Refused("INVALID_ARGUMENT", "a switch holds for more than 0 ms and at most 100 years")
            until_ms = self._clock.now().wall_ms + order.for_ms
        switch = _switch(order.kind, order.subject, order.reason, order.author, until_ms)
        stored = await self._inflight.put_switch(switch)
        audit.switch_set(stored)
        return bytes(v1.SetSwitchResponse(switch=wire_switch(stored)))

    async def clear_switch(self, request: bytes) -> bytes:
        order = parsed(v1.ClearSwitchRequest, request)
        kind = _kind(order.kind)
        author = required(order.author, "author")
        like = None if order.all else _switch(order.kind, order.subject, "taken back", author, None)
        meant = [
            switch
            for switch in self._inflight.board.switches
            if switch.kind is kind and (like is None or _fits(switch, like))
        ]
        own = [switch for switch in meant if switch.source is SwitchSource.OPERATOR]
        if meant and not own:
            raise Refused(
                "FAILED_PRECONDITION",
                f"{meant[0].words} is switched by the file; take it out of there ({meant[0].reason})",
            )
        if not own and not order.all:
            raise Refused("NOT_FOUND", f"no such {kind.value}; `taskd switches` lists what there is")
        cleared = await self._inflight.remove_switches([switch.number for switch in own])
        for switch in cleared:
            audit.switch_taken_back(switch, by=author, reason=order.reason[:MAX_TEXT_CHARS])
        return bytes(v1.ClearSwitchResponse(cleared=[wire_switch(switch) for switch in cleared]))

    async def list_switches(self, request: bytes) -> bytes:
        parsed(v1.ListSwitchesRequest, request)
        found = [wire_switch(switch) for switch in self._inflight.board.switches]
        return bytes(v1.ListSwitchesResponse(switches=found))


def wire_switch(switch: Switch) -> v1.Switch:
    return v1.Switch(
        number=switch.number,
        kind=WIRE_KINDS[switch.kind],
        subject=wire_subject(switch),
        reason=switch.reason,
        author=switch.author,
        source=switch.source.value,
        created_at_ms=switch.created_at_ms,
        until_at_ms=switch.until_ms,
    )


def wire_subject(switch: Switch) -> v1.SwitchSubject:
    return v1.SwitchSubject(
        application=switch.application,
        namespace=switch.namespace,
        taskname=switch.taskname,
        conditions=[
            v1.ArgumentCondition(
                position=condition.place if isinstance(condition.place, int) else None,
                name=condition.place if isinstance(condition.place, str) else None,
                value_json=json.dumps(condition.value),
            )
            for condition in switch.conditions
        ],
    )


def switch_of(found: v1.Switch) -> Switch:
    """A switch as the broker told it."""
    subject = found.subject or v1.SwitchSubject()
    kinds = {wire: kind for kind, wire in WIRE_KINDS.items()}
    return Switch(
        kind=kinds[v1.SwitchKind(found.kind)],
        application=subject.application,
        namespace=subject.namespace,
        taskname=subject.taskname,
        conditions=tuple(_condition(condition) for condition in subject.conditions),
        reason=found.reason,
        author=found.author,
        source=SwitchSource(found.source),
        created_at_ms=found.created_at_ms,
        until_ms=found.until_at_ms,
        number=found.number,
    )


def _switch(
    wire_kind: v1.SwitchKind, subject: v1.SwitchSubject | None, reason: str, author: str, until_ms: int | None
) -> Switch:
    kind = _kind(wire_kind)
    subject = subject or v1.SwitchSubject()
    names = (subject.application, subject.namespace, subject.taskname)
    if all(name is None for name in names):
        raise Refused("INVALID_ARGUMENT", "expected an application, a namespace or a task, found none")
    if any(name is not None and len(name) > MAX_TEXT_CHARS for name in names):
        raise Refused("INVALID_ARGUMENT", f"a name has at most {MAX_TEXT_CHARS} characters")
    if kind is SwitchKind.KILLSWITCH and not subject.taskname:
        raise Refused("INVALID_ARGUMENT", "a killswitch must name a task")
    if kind is SwitchKind.PAUSE and subject.conditions:
        raise Refused("INVALID_ARGUMENT", "a pause cannot depend on arguments; a killswitch can")
    if len(subject.conditions) > MAX_CONDITIONS:
        raise Refused("INVALID_ARGUMENT", f"a killswitch has at most {MAX_CONDITIONS} conditions")
    return Switch(
        kind=kind,
        application=subject.application,
        namespace=subject.namespace,
        taskname=subject.taskname,
        conditions=tuple(_condition(condition) for condition in subject.conditions),
        reason=required(reason, "reason"),
        author=required(author, "author"),
        until_ms=until_ms,
    )


def _fits(switch: Switch, like: Switch) -> bool:
    """Without conditions, `like` means whatever conditions there are."""
    if like.conditions:
        return switch.subject == like.subject
    return switch.subject[:3] == like.subject[:3]


def _condition(condition: v1.ArgumentCondition) -> Condition:
    place = condition.position if condition.position is not None else condition.name
    if place is None or len(condition.value_json) > MAX_VALUE_CHARS:
        raise Refused(
            "INVALID_ARGUMENT", "a condition has a position or a name, and a value of moderate size"
        )
    try:
        value = json.loads(condition.value_json)
    except (ValueError, RecursionError):
        raise Refused("INVALID_ARGUMENT", f"the value of argument {place} is not JSON") from None
    if problem := unusable(value):
        raise Refused("INVALID_ARGUMENT", f"the value of argument {place}: {problem}")
    return Condition(place, value)


def _kind(kind: v1.SwitchKind) -> SwitchKind:
    found = KINDS.get(kind)
    if found is None:
        raise Refused("INVALID_ARGUMENT", "expected PAUSE or KILLSWITCH; only the file of switches demotes")
    return found


def required(value: str, what: str) -> str:
    """A text that every order has, cut to size."""
    if not value.strip():
        raise Refused("INVALID_ARGUMENT", f"expected the {what}, found none: every order has one")
    if not value.isprintable():  # it is shown on other people's terminals
        raise Refused("INVALID_ARGUMENT", f"the {what} must be one line of printable characters")
    return value[:MAX_TEXT_CHARS]


def parsed(kind: type[M], request: bytes) -> M:
    """Raises Refused."""
    try:
        return read_message(kind, request)
    except Undecodable as error:
        raise Refused("INVALID_ARGUMENT", f"the request cannot be read: {error}") from None
