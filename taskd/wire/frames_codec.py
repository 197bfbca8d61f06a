"""How the frames of `taskd.v1.DispatchService/Work` are written and read: by hand, they are the hot path.

A property test holds them against the generated messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
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
    lease_ref,
)
from taskd.wire.protobuf import (
    LENGTH,
    ONE_BYTE,
    UINT64_MAX,
    VARINT,
    bytes_field,
    fields,
    read_varint,
    text_field,
    varint,
    varint_field,
)

T = TypeVar("T")

_assignment_of = partial(tuple.__new__, Assignment)  # as frames.lease_ref
_result_of = partial(tuple.__new__, Result)


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
            return bytes_field(4, b"".join(map(_result_field, frame.results)))
        case HandBack():
            return bytes_field(5, _leases(frame.leases))
        case Heartbeat():
            return bytes_field(6, b"".join(bytes_field(1, _progress(task)) for task in frame.tasks))


def encode_broker_frame(frame: BrokerFrame) -> bytes:
    match frame:
        case Welcome():
            return bytes_field(1, _welcome(frame))
        case Assignments():
            return bytes_field(2, _assignments(frame.assignments) + _number(2, frame.credit))
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


def _fence(fence: int) -> bytes:
    """As a varint. Fences are large, and those of one claim follow each other: most differ in one byte."""
    return ONE_BYTE[fence] if fence < 0x80 else b"%c%b" % (fence & 0x7F | 0x80, _varint(fence >> 7))


_varint = lru_cache(maxsize=256)(varint)


@lru_cache(maxsize=256)
def _upper_part(rest: bytes) -> int:
    """What all but the first byte of a varint add to it. Raises Undecodable for anything else."""
    value, behind = read_varint(rest, 0, len(rest))
    if behind != len(rest):
        raise Undecodable("more than a varint")
    return value << 7 & UINT64_MAX


def _read_fence(raw: bytes, start: int, end: int) -> int:
    """The fence that fills these bytes. Raises Undecodable when none does, IndexError beyond the end."""
    low = raw[start]
    if low >= 0x80:
        return _upper_part(raw[start + 1 : end]) | low & 0x7F
    if end != start + 1:
        raise Undecodable("more than a varint")
    return low


def _lease(id_: str, fence: int) -> bytes:
    text = id_.encode()
    return b"\x0a%b%b\x10%b" % (varint(len(text)), text, _fence(fence))


def _lease_field(lease: tuple[str, int], number: int = 1) -> bytes:
    id_, fence = lease
    text, fenced = id_.encode(), _fence(fence)
    size = len(text) + len(fenced) + 3
    if size < 0x80 and number == 1:
        return b"\x0a%c\x0a%c%b\x10%b" % (size, len(text), text, fenced)
    return bytes_field(number, _lease(id_, fence))


def _leases(leases: Iterable[LeaseRef], number: int = 1) -> bytes:
    if number == 1:
        return b"".join(map(_lease_field, leases))
    return b"".join(_lease_field(lease, number) for lease in leases)


def _read_lease(raw: bytes) -> LeaseRef:
    values = _values(raw)
    return LeaseRef(_str(values, 1), _int(values, 2))


def _read_leases(raw: bytes, number: int = 1) -> tuple[LeaseRef, ...]:
    if number != 1:
        return tuple(_read_lease(chunk) for chunk in _repeated(raw, number))
    leases, behind = _usual_leases(raw)
    if behind < len(raw):
        leases += [_read_lease(chunk) for chunk in _repeated(raw, number, behind)]
    return tuple(leases)


def _usual_leases(raw: bytes) -> tuple[list[LeaseRef], int]:
    """Those at the beginning that are written as our encoder does, and the position behind them.

    This and its like read in one pass what lies in most frames. They stop at whatever is written otherwise:
    that, and all behind it, is to be read field by field.
    """
    leases: list[LeaseRef] = []
    at, stop = 0, len(raw)
    try:
        while at < stop:
            end, id_end = at + 2 + raw[at + 1], at + 4 + raw[at + 3]
            if raw[at + 1] >= 0x80 or end > stop:  # then what its parts claim may lie beyond it
                break
            if not raw[at] == raw[at + 2] == 0x0A or raw[id_end] != 0x10:
                break
            leases.append(lease_ref((raw[at + 4 : id_end].decode(), _read_fence(raw, id_end + 1, end))))
            at = end
    except (IndexError, Undecodable, UnicodeDecodeError):
        pass
    return leases, at


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


def _result_field(result: Result) -> bytes:
    id_, fence, status, *more = result
    text, fenced = id_.encode(), _fence(fence)
    size = len(text) + len(fenced) + 5
    if more == PLAIN_END and size < 0x80:
        return b"\x0a%c\x0a%c%b\x10%b\x18%c" % (size, len(text), text, fenced, status)
    return bytes_field(1, _result(result))


def _result(result: Result) -> bytes:
    return (
        _lease(result.id, result.fence)
        + _number(3, result.status)
        + _string(4, result.reason)
        + _string(5, result.error)
        + _optional(6, result.max_attempts)
        + _optional(7, result.delay_on_retry_s)
    )


def _read_results(raw: bytes) -> Results:
    results, behind = _usual_results(raw)
    if behind < len(raw):
        results += map(_read_result, _repeated(raw, 1, behind))
    return Results(tuple(results))


def _usual_results(raw: bytes) -> tuple[list[Result], int]:
    """As `_usual_leases`, for results that say no more than their status."""
    results: list[Result] = []
    at, stop = 0, len(raw)
    try:
        while at < stop:
            end, id_end = at + 2 + raw[at + 1], at + 4 + raw[at + 3]
            if raw[at + 1] >= 0x80 or end > stop:
                break
            if not raw[at] == raw[at + 2] == 0x0A or raw[id_end] != 0x10 or raw[end - 2] != 0x18:
                break
            id_, fence = raw[at + 4 : id_end].decode(), _read_fence(raw, id_end + 1, end - 2)
            results.append(_result_of((id_, fence, _STATUSES[raw[end - 1]], "", "", None, None)))
            at = end
    except (IndexError, KeyError, Undecodable, UnicodeDecodeError):
        pass
    return results, at


def _read_result(raw: bytes) -> Result:
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
PLAIN_END = ["", "", None, None]  # of a result that says no more than its status


def _assignments(items: Iterable[Assignment]) -> bytes:
    parts: list[bytes] = []
    same_ms, deadline = 0, b""
    for id_, fence, activation, deadline_ms, expires_in_ms in items:
        if deadline_ms != same_ms:  # most are alike
            same_ms, deadline = deadline_ms, _number(4, deadline_ms)
        head = b"%b\x1a%b" % (_lease(id_, fence), varint(len(activation)))
        tail = deadline if expires_in_ms is None else deadline + varint_field(5, expires_in_ms)
        size = varint(len(head) + len(activation) + len(tail))
        parts += (b"\x0a", size, head, activation, tail)
    return b"".join(parts)


def _read_assignments(raw: bytes) -> Assignments:
    items, behind = _usual_assignments(raw)
    others: dict[int, int | bytes] = {}
    for number, wire_type, value, _, _ in fields(raw, behind):
        if number == 1 and wire_type == LENGTH and isinstance(value, bytes):
            items.append(_read_assignment(value))
        elif wire_type in (VARINT, LENGTH):
            others[number] = value
    return Assignments(tuple(items), _int(others, 2))


def _usual_assignments(raw: bytes) -> tuple[list[Assignment], int]:
    """As `_usual_leases`, for assignments that do not expire."""
    items: list[Assignment] = []
    at, stop = 0, len(raw)
    try:
        while at < stop and raw[at] == 0x0A:
            size, begin = read_varint(raw, at + 1, stop)
            id_end = begin + 2 + raw[begin + 1]
            behind = raw.index(0x1A, id_end + 2, id_end + 2 + MAX_VARINT_BYTES)
            fence = _read_fence(raw, id_end + 1, behind)
            length, start = read_varint(raw, behind + 1, stop)
            end = start + length
            deadline_ms, next_at = read_varint(raw, end + 1, stop)
            if raw[begin] != 0x0A or raw[id_end] != 0x10 or raw[end] != 0x20:
                break
            if raw[begin + 1] >= 0x80 or next_at != begin + size:
                break
            id_ = raw[begin + 2 : id_end].decode()
            items.append(_assignment_of((id_, fence, raw[start:end], deadline_ms, None)))
            at = next_at
    except (ValueError, IndexError, Undecodable):
        pass
    return items, at


MAX_VARINT_BYTES = 10


def _read_assignment(raw: bytes) -> Assignment:
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


def _read_stop(raw: bytes) -> Stop:
    number = _uint32(_values(raw), 2)
    known = number in (StopReason.CANCELLED, StopReason.LOST)
    return Stop(_read_leases(raw), StopReason(number) if known else StopReason.UNSPECIFIED)


def _values(raw: bytes) -> dict[int, int | bytes]:
    return {number: value for number, wire_type, value, _, _ in fields(raw) if wire_type in (VARINT, LENGTH)}


def _repeated(raw: bytes, wanted: int, start: int = 0) -> list[bytes]:
    return [
        value
        for number, wire_type, value, _, _ in fields(raw, start)
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
    4: _read_results,
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
