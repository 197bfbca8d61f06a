"""How the frames of `taskd.v1.DispatchService/Work` are written and read: by hand, they are the hot path.

A property test holds them against the generated messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from taskd.errors import Undecodable
from taskd.wire.envelope import MAX_DURATION_S, UINT32_MAX
from taskd.wire.frames import (
    Assignment,
    Assignments,
    BrokerFrame,
    Credit,
    CreditKind,
    Draining,
    HandBack,
    Heartbeat,
    Hello,
    LeaseRef,
    Result,
    Results,
    ResultStatus,
    Started,
    Stop,
    StopReason,
    Taken,
    TaskName,
    TaskProgress,
    Welcome,
    WorkerFrame,
)
from taskd.wire.protobuf import (
    LENGTH,
    VARINT,
    bytes_field,
    fields,
    read_varint,
    text_field,
    varint,
    varint_field,
)

T = TypeVar("T")


def encode_worker_frame(frame: WorkerFrame) -> bytes:
    match frame:
        case Hello():
            return bytes_field(1, _hello(frame))
        case Credit():
            numbers = _number(1, frame.number) + _number(2, frame.total) + _number(3, frame.idle_total)
            return bytes_field(2, numbers + _number(4, frame.kind))
        case Started():
            return bytes_field(3, _leases(frame.leases))
        case Results():
            return bytes_field(4, b"".join(bytes_field(1, _result(result)) for result in frame.results))
        case HandBack():
            return bytes_field(5, _leases(frame.leases))
        case Heartbeat():
            return bytes_field(6, b"".join(bytes_field(1, _progress(task)) for task in frame.tasks))


def encode_broker_frame(frame: BrokerFrame) -> bytes:
    match frame:
        case Welcome():
            return bytes_field(1, _welcome(frame))
        case Assignments():
            items = b"".join(bytes_field(1, _assignment(item)) for item in frame.assignments)
            return bytes_field(2, items + _number(2, frame.credit))
        case Taken():
            return bytes_field(3, _leases(frame.leases))
        case Draining():
            return bytes_field(4, b"")
        case Stop():
            return bytes_field(5, _leases(frame.leases) + _number(2, frame.reason))


def decode_worker_frame(raw: bytes) -> WorkerFrame:
    """Raises Undecodable: not a frame, or of a kind this version does not know."""
    return _decode(raw, _WORKER_FRAMES)


def decode_broker_frame(raw: bytes) -> BrokerFrame:
    """Raises Undecodable: not a frame, or of a kind this version does not know."""
    return _decode(raw, _BROKER_FRAMES)


def _decode(raw: bytes, readers: dict[int, Callable[[bytes], T]]) -> T:
    kind = 0
    body = b""
    for number, wire_type, value, _, _ in fields(raw):
        if number in readers and wire_type == LENGTH:
            assert isinstance(value, bytes)
            # Of a oneof the last counts; parts of the same message are merged by concatenation.
            body = body + value if number == kind else value
            kind = number
    if not kind:
        raise Undecodable("a frame of a kind that this version does not know")
    return readers[kind](body)


# ---- parts, each beside its reader; proto3 leaves out what has its default value


def _number(number: int, value: int) -> bytes:
    return varint_field(number, value) if value else b""


def _optional(number: int, value: int | None) -> bytes:
    return b"" if value is None else varint_field(number, value)


def _string(number: int, value: str) -> bytes:
    return text_field(number, value) if value else b""


def _lease(id_: str, fence: int) -> bytes:
    text = id_.encode()
    return b"\x0a%b%b\x10%b" % (varint(len(text)), text, varint(fence))


def _leases(leases: Iterable[LeaseRef], number: int = 1) -> bytes:
    return b"".join(bytes_field(number, _lease(*lease)) for lease in leases)


def _read_lease(raw: bytes) -> LeaseRef:
    id_, fence, behind = _usual_lease(raw)
    if behind == len(raw):
        return LeaseRef(id_, fence)
    values = _values(raw)
    return LeaseRef(_str(values, 1), _int(values, 2))


def _usual_lease(raw: bytes) -> tuple[str, int, int]:
    """Id and fence as our encoder writes them, at the beginning of a message, and the position behind them.

    That is 0 for whatever is written otherwise, which is to be read field by field.
    """
    try:
        behind_id = 2 + raw[1]
        if raw[0] == 0x0A and raw[1] < 0x80 and raw[behind_id] == 0x10:
            fence, behind = read_varint(raw, behind_id + 1, len(raw))
            return raw[2:behind_id].decode(), fence, behind
    except (IndexError, Undecodable, UnicodeDecodeError):
        pass
    return "", 0, 0


def _read_leases(raw: bytes, number: int = 1) -> tuple[LeaseRef, ...]:
    return tuple(_read_lease(chunk) for chunk in _repeated(raw, number))


def _hello(frame: Hello) -> bytes:
    return (
        _number(1, frame.version_min)
        + _number(2, frame.version_max)
        + _string(3, frame.worker_id)
        + _string(4, frame.pool)
        + (b"" if frame.application is None else text_field(5, frame.application))
        + b"".join(text_field(6, namespace) for namespace in frame.namespaces)
        + _string(7, frame.store_id)
        + _leases(frame.holding, 8)
        + b"".join(bytes_field(9, _task_name(task)) for task in frame.tasks)
        + _number(10, frame.slots)
        + b"".join(bytes_field(11, _task_name(task)) for task in frame.async_tasks)
    )


def _read_hello(raw: bytes) -> Hello:
    values = _values(raw)
    return Hello(
        version_min=_uint32(values, 1),
        version_max=_uint32(values, 2),
        worker_id=_str(values, 3),
        pool=_str(values, 4),
        application=_str(values, 5) if 5 in values else None,
        namespaces=tuple(_decoded(chunk) for chunk in _repeated(raw, 6)),
        store_id=_str(values, 7),
        holding=_read_leases(raw, 8),
        tasks=tuple(_read_task_name(chunk) for chunk in _repeated(raw, 9)),
        slots=_uint32(values, 10),
        async_tasks=tuple(_read_task_name(chunk) for chunk in _repeated(raw, 11)),
    )


def _task_name(task: TaskName) -> bytes:
    return _string(1, task.application) + _string(2, task.namespace) + _string(3, task.taskname)


def _read_task_name(raw: bytes) -> TaskName:
    values = _values(raw)
    return TaskName(_str(values, 1), _str(values, 2), _str(values, 3))


def _read_credit(raw: bytes) -> Credit:
    values = _values(raw)
    number = _uint32(values, 4)
    kind = CreditKind(number) if number in (CreditKind.ASYNC, CreditKind.PLAIN) else CreditKind.ANY
    return Credit(_int(values, 1), _int(values, 2), _int(values, 3), kind)


def _progress(task: TaskProgress) -> bytes:
    return _lease(task.id, task.fence) + _optional(3, task.permille) + _string(4, task.message)


def _read_progress(raw: bytes) -> TaskProgress:
    values = _values(raw)
    permille = min(_int(values, 3), 1_000) if 3 in values else None
    return TaskProgress(_str(values, 1), _int(values, 2), permille, _str(values, 4))


def _result(result: Result) -> bytes:
    if result[3:] == PLAIN_END:
        return b"%b\x18%b" % (_lease(result.id, result.fence), varint(result.status))
    return (
        _lease(result.id, result.fence)
        + _number(3, result.status)
        + _string(4, result.reason)
        + _string(5, result.error)
        + _optional(6, result.max_attempts)
        + _optional(7, result.delay_on_retry_s)
    )


def _read_result(raw: bytes) -> Result:
    id_, fence, behind = _usual_lease(raw)
    if behind and len(raw) == behind + 2 and raw[behind] == 0x18 and (status := _STATUSES.get(raw[-1])):
        return Result(id_, fence, status)
    values = _values(raw)
    number = _uint32(values, 3)
    if number not in _STATUSES:
        raise Undecodable(f"a result has status {number}; expected 1 to 5")
    return Result(
        id=_str(values, 1),
        fence=_int(values, 2),
        status=_STATUSES[number],
        reason=_str(values, 4),
        error=_str(values, 5),
        max_attempts=_uint32(values, 6) if 6 in values else None,
        delay_on_retry_s=min(_int(values, 7), MAX_DURATION_S) if 7 in values else None,
    )


_STATUSES = {status.value: status for status in ResultStatus if status}
PLAIN_END = Result("", 0, ResultStatus.COMPLETE)[3:]  # of a result that says no more than its status


def _assignment(item: Assignment) -> bytes:
    id_, fence, activation, deadline_ms, expires_in_ms = item
    return b"%b\x1a%b%b%b%b" % (
        _lease(id_, fence),
        varint(len(activation)),
        activation,
        _number(4, deadline_ms),
        _optional(5, expires_in_ms),
    )


def _read_assignment(raw: bytes) -> Assignment:
    return _usual_assignment(raw) or _any_assignment(raw)


def _usual_assignment(raw: bytes) -> Assignment | None:
    """As our encoder writes one that does not expire; None: another one, or none at all."""
    id_, fence, behind = _usual_lease(raw)
    stop = len(raw)
    try:
        if not behind or raw[behind] != 0x1A:
            return None
        size, begin = read_varint(raw, behind + 1, stop)
        end = begin + size
        if raw[end] != 0x20:
            return None
        deadline_ms, behind = read_varint(raw, end + 1, stop)
    except (IndexError, Undecodable):
        return None
    return Assignment(id_, fence, raw[begin:end], deadline_ms) if behind == stop else None


def _any_assignment(raw: bytes) -> Assignment:
    values = _values(raw)
    activation = values.get(3, b"")
    if not isinstance(activation, bytes):
        raise Undecodable("field 3 of an assignment is not bytes")
    return Assignment(
        id=_str(values, 1),
        fence=_int(values, 2),
        activation=activation,
        processing_deadline_ms=_int(values, 4),
        expires_in_ms=_int(values, 5) if 5 in values else None,
    )


def _welcome(frame: Welcome) -> bytes:
    return (
        _number(1, frame.version)
        + _string(2, frame.store_id)
        + _number(3, frame.lease_ms)
        + _number(4, frame.max_deadline_ms)
    )


def _read_welcome(raw: bytes) -> Welcome:
    values = _values(raw)
    return Welcome(_uint32(values, 1), _str(values, 2), _uint32(values, 3), _int(values, 4))


def _read_assignments(raw: bytes) -> Assignments:
    items: list[Assignment] = []
    others: dict[int, int | bytes] = {}
    for number, wire_type, value, _, _ in fields(raw):
        if number == 1 and wire_type == LENGTH and isinstance(value, bytes):
            items.append(_read_assignment(value))
        elif wire_type in (VARINT, LENGTH):
            others[number] = value
    return Assignments(tuple(items), _int(others, 2))


def _read_stop(raw: bytes) -> Stop:
    number = _uint32(_values(raw), 2)
    known = number in (StopReason.CANCELLED, StopReason.LOST)
    return Stop(_read_leases(raw), StopReason(number) if known else StopReason.UNSPECIFIED)


def _values(raw: bytes) -> dict[int, int | bytes]:
    return {number: value for number, wire_type, value, _, _ in fields(raw) if wire_type in (VARINT, LENGTH)}


def _repeated(raw: bytes, wanted: int) -> list[bytes]:
    return [
        value
        for number, wire_type, value, _, _ in fields(raw)
        if number == wanted and wire_type == LENGTH and isinstance(value, bytes)
    ]


def _int(values: dict[int, int | bytes], number: int) -> int:
    value = values.get(number, 0)
    if not isinstance(value, int):
        raise Undecodable(f"field {number} is not a number")
    return value


def _uint32(values: dict[int, int | bytes], number: int) -> int:
    return _int(values, number) & UINT32_MAX


def _str(values: dict[int, int | bytes], number: int) -> str:
    value = values.get(number, b"")
    if not isinstance(value, bytes):
        raise Undecodable(f"field {number} is not a text")
    return _decoded(value)


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise Undecodable(f"a text of a frame is not UTF-8: {error.reason}") from None


_WORKER_FRAMES: dict[int, Callable[[bytes], WorkerFrame]] = {
    1: _read_hello,
    2: _read_credit,
    3: lambda raw: Started(_read_leases(raw)),
    4: lambda raw: Results(tuple(_read_result(chunk) for chunk in _repeated(raw, 1))),
    5: lambda raw: HandBack(_read_leases(raw)),
    6: lambda raw: Heartbeat(tuple(_read_progress(chunk) for chunk in _repeated(raw, 1))),
}
_BROKER_FRAMES: dict[int, Callable[[bytes], BrokerFrame]] = {
    1: _read_welcome,
    2: _read_assignments,
    3: lambda raw: Taken(_read_leases(raw)),
    4: lambda raw: Draining(),
    5: _read_stop,
}
