"""The operator's side of `taskd.v1.AdminService`: what was typed becomes an order, the answer a switch."""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from taskd.activation.switches import Condition, Switch, SwitchKind
from taskd.admin.cancel import MAX_IDS
from taskd.admin.orders import SERVICE, WIRE_KINDS, switch_of, wire_subject
from taskd.errors import ConfigError, PeerUnavailable, Refused, TaskdError
from taskd.rpc.access import OPEN, Access
from taskd.rpc.client import Client, connect
from taskd.wire.generated.taskd import v1
from taskd.wire.signing import Secrets

CALL_TIMEOUT_S = 30.0  # an order is durable when it is answered, which a slow disk may hold up
VARIABLE = "TASKD_ADMIN_SECRET"
UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


class BadOrder(TaskdError):
    """The order cannot be given; nothing was switched."""

    exit_code = 2


def subject(parts: Iterable[str]) -> Switch:
    """What `application=A`, `namespace=N` and `task=T` mean. Raises BadOrder."""
    found: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name not in ("application", "namespace", "task"):
            raise BadOrder(f"expected application=A, namespace=N or task=T, found {part!r}")
        if name in found:
            raise BadOrder(f"{name} is given twice; give one order for each")
        found[name] = value
    if found.get("task") == "":
        raise BadOrder("expected the name of a task behind task=")
    return Switch(
        SwitchKind.PAUSE,
        application=found.get("application"),
        namespace=found.get("namespace"),
        taskname=found.get("task"),
    )


def killed(
    task: str, application: str | None, namespace: str | None, conditions: Sequence[Condition]
) -> Switch:
    return Switch(
        SwitchKind.KILLSWITCH,
        application=application,
        namespace=namespace,
        taskname=task,
        conditions=tuple(conditions),
    )


def conditions(args: Iterable[str], kwargs: Iterable[str]) -> list[Condition]:
    """`0=17` and `name="value"` as conditions. Raises BadOrder."""
    found: list[Condition] = []
    for text in args:
        place, value = _parted(text)
        if not (place.isascii() and place.isdigit()):
            raise BadOrder(f"expected a position from 0 on before the `=`, found {text!r}")
        found.append(Condition(int(place), value))
    for text in kwargs:
        name, value = _parted(text)
        found.append(Condition(name, value))
    return found


def _parted(text: str) -> tuple[str, object]:
    place, equals, value = text.partition("=")
    try:
        if not equals or not place:
            raise ValueError
        return place, json.loads(value)
    except (ValueError, RecursionError):
        raise BadOrder(
            f'expected an argument, `=` and a JSON value, such as 0=17 or name="text"; found {text!r}'
        ) from None


def duration_ms(text: str | None) -> int | None:
    """`90s`, `30m`, `2h`, `1d` in milliseconds. Raises BadOrder."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h|d)", text.strip())
    found = round(float(match[1]) * UNITS_MS[match[2]]) if match else 0
    if found <= 0:
        raise BadOrder(f"--for: expected a time such as 90s, 30m, 2h or 1d, found {text!r}")
    return found


class Operator:
    """Orders to one broker. Each method raises PeerError."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def pause(self, what: Switch, reason: str, author: str, for_ms: int | None) -> Switch:
        return await self._set(what, reason, author, for_ms)

    async def kill(self, what: Switch, reason: str, author: str, for_ms: int | None) -> Switch:
        return await self._set(what, reason, author, for_ms)

    async def resume(self, what: Switch | None, reason: str, author: str) -> list[Switch]:
        """`what` None: all that is paused."""
        return await self._clear(what or Switch(SwitchKind.PAUSE), what is None, reason, author)

    async def spare(self, what: Switch, reason: str, author: str) -> list[Switch]:
        return await self._clear(what, False, reason, author)

    async def switches(self) -> list[Switch]:
        reply = await self._call("ListSwitches", bytes(v1.ListSwitchesRequest()))
        return [switch_of(found) for found in v1.ListSwitchesResponse.parse(reply).switches]

    async def cancel(
        self, ids: Sequence[str], reason: str, author: str, *, even_unknown: bool = False
    ) -> list[v1.CancelledActivation]:
        """In the order of `ids`, of which there may be any number."""
        found: list[v1.CancelledActivation] = []
        for start in range(0, len(ids), MAX_IDS):
            some = list(ids[start : start + MAX_IDS])
            request = v1.CancelRequest(ids=some, reason=reason, author=author, even_unknown=even_unknown)
            found += v1.CancelResponse.parse(await self._call("Cancel", bytes(request))).activations
        return found

    async def _set(self, what: Switch, reason: str, author: str, for_ms: int | None) -> Switch:
        request = v1.SetSwitchRequest(
            kind=WIRE_KINDS[what.kind],
            subject=wire_subject(what),
            reason=reason,
            author=author,
            for_ms=for_ms,
        )
        reply = v1.SetSwitchResponse.parse(await self._call("SetSwitch", bytes(request)))
        return switch_of(reply.switch) if reply.switch else replace(what, reason=reason, author=author)

    async def _clear(self, what: Switch, all_: bool, reason: str, author: str) -> list[Switch]:
        request = v1.ClearSwitchRequest(
            kind=WIRE_KINDS[what.kind],
            subject=wire_subject(what),
            all=all_,
            reason=reason,
            author=author,
        )
        reply = v1.ClearSwitchResponse.parse(await self._call("ClearSwitch", bytes(request)))
        return [switch_of(found) for found in reply.cleared]

    async def _call(self, method: str, request: bytes) -> bytes:
        return await self._client.call(f"/{SERVICE}/{method}", request, timeout_s=CALL_TIMEOUT_S)


@asynccontextmanager
async def open_operator(
    path: Path | None, address: str | None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Operator]:
    """Orders to the broker that listens on the socket `path`, or else at `address`.

    Raises ConfigError, PeerUnavailable when no broker answers, Refused when it takes no orders from here.
    """
    access = OPEN
    if address is not None:
        secret = os.environ.get(VARIABLE, "")
        if not secret:
            raise ConfigError(f"{VARIABLE} must hold a secret of the broker's admin.secrets")
        access = Access(Secrets([secret]), tls)
    async with connect(address or f"unix:{path}", access) as client:
        try:
            yield Operator(client)
        except PeerUnavailable as error:
            if path is None:
                raise
            raise PeerUnavailable(
                f"no broker takes orders at {path} ({error}); is it running, with this configuration? "
                "--config names its file, --socket its socket"
            ) from error
        except Refused as error:
            if path is not None or error.code not in ("UNAUTHENTICATED", "UNIMPLEMENTED"):
                raise
            raise Refused(
                error.code, f"{error.message}: is {VARIABLE} one of admin.secrets of the broker at {address}?"
            ) from error
