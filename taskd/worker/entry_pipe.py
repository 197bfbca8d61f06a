"""What a worker and its child process say to each other, and how. Imported at both ends.

Three pipes: *work* and *tokens* lead to the child, *reports* leads back. A piece of work is a frame on
the work pipe and one byte on the token pipe. The child takes a token before it touches the frame that
belongs to it, and the parent can read the token pipe too: a token the parent took back is work the
child can never start, however far ahead its frames were written, and however dead the child is. So a
child can be fed ahead of need, and still nothing waits behind a slow task or is lost with a crash.

A fourth pipe, *orders*, leads to the child for what cannot wait for the end of a task. An order names the
task it is meant for, and a signal (SIGTERM) makes the child look: an order that comes late finds another
task and does nothing, and a signal without an order is not the worker's.

Frames are a length of four bytes and a msgpack array, but for the report that a task completed, which has
fields of fixed size; an order is nine bytes. Work is numbered from 1 in the order it was written; reports and
orders name it by that number. That a task began is not reported as a rule, but noted (entry_note.py).
"""

from __future__ import annotations

import signal
import struct
import time
from collections.abc import Iterator
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import msgpack

from taskd.errors import TaskdError

TOKEN_RUN = b"r"
TOKEN_SKIP = b"s"  # the frame in turn was taken back: pass over it

WHERE_SIGNAL = signal.SIGUSR2  # has a child print where it is, also while no Python code can run

MAX_WORK_BYTES = 64 * 1024 * 1024  # an activation fits a reply of 10 MiB; the rest is room
MAX_REPORT_BYTES = 8 * 1024 * 1024  # the longest is the list of task names
MAX_ERROR_CHARACTERS = 4_000
MAX_MESSAGE_CHARACTERS = 200  # of a heartbeat: it must fit one write that the system does not divide

# In what a child prints. Each ends what came before it.
NUMBER_MARK = b"\x1e"  # then the number of the task that prints from here on, and the end of the line
LOG_MARK = b"\x1f"  # a line of logging: the level as a number, a space, the logger, this mark, the text
LINE_BREAK = b"\x1d"  # a line break inside such a text

_pack = msgpack.Packer().pack  # one for all that a worker packs: making it takes longer than using it
_LENGTH = struct.Struct(">I")
_ORDER = struct.Struct(">BQ")
ORDER_BYTES = _ORDER.size
_STEP = struct.Struct("=QQ")
STEP_BYTES = _STEP.size  # of memory shared with a child that does many things at once
_READY, _STARTED, _DONE, _EXPIRED, _HEARTBEAT = 1, 2, 3, 4, 5
# Length, kind, number, duration of a task that completed: what nearly all reports say, so it is no msgpack.
_COMPLETED = struct.Struct(">IBQQ")
_COMPLETED_KIND = 0x06  # no array of msgpack begins so
_COMPLETED_BODY = struct.Struct(">BQQ")
_COMPLETED_BYTES = _COMPLETED_BODY.size


class ProtocolViolation(TaskdError):
    """The bytes on a pipe between worker and child are not of their protocol."""


class Work(NamedTuple):
    """`start_by_ns`: of the monotonic clock, which is one per machine; past it, it must not start.

    `deadline_s` counts from the start or the newest heartbeat, `max_deadline_s` from the start only; None:
    heartbeats may move the deadline without end.
    """

    activation: bytes
    start_by_ns: int | None = None
    fence: int = 0
    deadline_s: float = 10.0
    max_deadline_s: float | None = None


class OrderKind(IntEnum):
    CANCEL = 1  # TaskCancelled is raised in the task
    END = 2  # the child leaves at once, without a report


class Order(NamedTuple):
    """It is meant for the task with this number, and for no other."""

    kind: OrderKind
    number: int


class Verdict(NamedTuple):
    """What the activation's policy makes of an outcome; `status` is a number of `ResultStatus`."""

    status: int
    reason: str = ""
    error: str = ""
    max_attempts: int | None = None
    delay_on_retry_s: int | None = None


COMPLETE = Verdict(1)


class KnownTask(NamedTuple):
    """A task that was registered. `is_async`: only a child with an event loop can run it."""

    application: str
    namespace: str
    taskname: str
    is_async: bool = False

    def __str__(self) -> str:
        return f"{self.namespace}:{self.taskname}"


class Ready(NamedTuple):
    """The child can work. `failures`: what could not be imported, and why."""

    tasks: tuple[KnownTask, ...]
    failures: tuple[tuple[str, str], ...] = ()


class Started(NamedTuple):
    """`on_timeout` is what applies if the deadline kills this very run; `quiet`: without a warning.

    `ago_s`: how long ago that was when it was told; it is not written to the pipe.
    """

    number: int
    on_timeout: Verdict
    quiet: bool = False
    ago_s: float = 0.0


class Done(NamedTuple):
    """`quiet`: the author declared this error as nothing to report."""

    number: int
    verdict: Verdict
    duration_us: int
    quiet: bool = False


_done = partial(tuple.__new__, Done)  # half the time of the constructor, for what comes by the hundred


class Expired(NamedTuple):
    """Not started: it was too late."""

    number: int


class Heartbeat(NamedTuple):
    """The running task lives, and its deadline begins again. `progress`: 0 to 1."""

    number: int
    progress: float | None = None
    message: str = ""


class Step(NamedTuple):
    """What an async child is at, in shared memory: the activation's number, 0 for none; and how many steps
    its loop has begun in all. As long as that grows, it is not blocked."""

    number: int
    steps: int


Report = Ready | Started | Done | Expired | Heartbeat


class Splitter:
    """Cuts a stream of bytes into frames; a length above the limit is refused before it is buffered."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def frames(self, data: bytes) -> list[bytes]:
        """Feed it, and have the frames that are complete."""
        if not self._buffer and 4 <= len(data) <= self._max_bytes:
            (length,) = _LENGTH.unpack_from(data)
            if length == len(data) - 4:  # as for an idle child, which should get to work with few steps
                return [data[4:]]
        self.feed(data)
        return list(self)

    def reports(self, data: bytes) -> list[Report]:
        """Feed it, and have the reports that are complete. Raises ProtocolViolation."""
        if not self._buffer and (completed := _all_completed(data)):
            return completed
        self.feed(data)
        return [decode_report(frame) for frame in self]

    def __iter__(self) -> Iterator[bytes]:
        """The frames that are complete; afterwards only the incomplete rest is kept."""
        buffer, at, end = self._buffer, 0, len(self._buffer)
        try:
            while end - at >= 4:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if length > self._max_bytes:
                    raise ProtocolViolation(f"a frame of {length} bytes, at most {self._max_bytes} are taken")
                if end - at - 4 < length:
                    break
                frame = bytes(buffer[at + 4 : at + 4 + length])
                at += 4 + length
                yield frame
        finally:
            del buffer[:at]


def _frame(parts: tuple[Any, ...]) -> bytes:
    body: bytes = msgpack.packb(parts)
    return _LENGTH.pack(len(body)) + body


def _parts(frame: bytes) -> list[Any]:
    try:
        parts = msgpack.unpackb(frame)
    except ValueError as error:  # the base of all that msgpack raises
        raise ProtocolViolation(f"a frame that is not msgpack: {error}") from None
    if not isinstance(parts, list) or not parts:
        raise ProtocolViolation("a frame that is not an array")
    return parts


def start_by_ns(start_within_s: float | None) -> int | None:
    """A duration from now as a reading of the monotonic clock, which ages while a frame waits in a pipe."""
    return None if start_within_s is None else time.monotonic_ns() + int(start_within_s * 1e9)


def is_too_late(work: Work) -> bool:
    return work.start_by_ns is not None and time.monotonic_ns() >= work.start_by_ns


def encode_work(work: Work) -> bytes:
    body: bytes = _pack(work)
    return _LENGTH.pack(len(body)) + body


def decode_work(frame: bytes) -> Work:
    """Raises ProtocolViolation."""
    parts = _parts(frame)
    if len(parts) != len(Work._fields) or not isinstance(parts[0], bytes):
        raise ProtocolViolation(f"a piece of work that is not {Work._fields}")
    return Work(*parts)


def encode_order(order: Order) -> bytes:
    return _ORDER.pack(*order)


def decode_orders(data: bytes) -> list[Order]:
    """Raises ProtocolViolation. Orders are written whole, so they are read whole."""
    try:
        return [Order(OrderKind(kind), number) for kind, number in _ORDER.iter_unpack(data)]
    except (struct.error, ValueError) as error:
        raise ProtocolViolation(f"a malformed order: {error}") from None


def read_step(memory: bytes) -> Step:
    return Step(*_STEP.unpack(memory))


def encode_report(report: Report) -> bytes:
    match report:
        case Ready():
            return _frame((_READY, *report))
        case Started():
            return _frame((_STARTED, *report[:3]))
        case Done(number, verdict, duration_us, quiet):
            if verdict == COMPLETE and not quiet:
                return encode_completed(number, duration_us)
            return _frame((_DONE, *report))
        case Expired():
            return _frame((_EXPIRED, *report))
        case Heartbeat():
            return _frame((_HEARTBEAT, *report))


def encode_completed(number: int, duration_us: int) -> bytes:
    """As `encode_report` of a task that completed."""
    return _COMPLETED.pack(_COMPLETED_BYTES, _COMPLETED_KIND, number, duration_us)


def decode_report(frame: bytes) -> Report:
    """Raises ProtocolViolation: whatever wrote this, it was not the loop of our child."""
    if len(frame) == _COMPLETED_BYTES and frame[0] == _COMPLETED_KIND:
        _, number, duration_us = _COMPLETED_BODY.unpack(frame)
        return Done(number, COMPLETE, duration_us)
    kind, *parts = _parts(frame)
    try:
        if kind == _STARTED:
            return Started(_number(parts[0]), _verdict(parts[1]), bool(parts[2]))
        if kind == _DONE:
            return Done(_number(parts[0]), _verdict(parts[1]), _number(parts[2]), bool(parts[3]))
        if kind == _EXPIRED:
            return Expired(_number(parts[0]))
        if kind == _HEARTBEAT:
            return _heartbeat(*parts)
        if kind == _READY:
            tasks, failures = parts
            return Ready(
                tuple(_known_task(task) for task in tasks),
                tuple((str(where), str(why)) for where, why in failures),
            )
    except (IndexError, TypeError, ValueError) as error:
        raise ProtocolViolation(f"a malformed report: {error}") from None
    raise ProtocolViolation(f"a report of unknown kind {kind!r:.40}")


def _all_completed(data: bytes) -> list[Report]:
    """The reports, if all say that a task completed; else none."""
    if len(data) % _COMPLETED.size:
        return []
    head = (_COMPLETED_BYTES, _COMPLETED_KIND)
    found: list[Report] = [
        _done((number, COMPLETE, duration_us, False))
        for length, kind, number, duration_us in _COMPLETED.iter_unpack(data)
        if (length, kind) == head
    ]
    return found if len(found) * _COMPLETED.size == len(data) else []


def _number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a number, found {value!r:.40}")
    return value


def _heartbeat(number: object, progress: object, message: object) -> Heartbeat:
    if progress is not None and not (isinstance(progress, float) and 0 <= progress <= 1):
        raise TypeError(f"expected progress from 0 to 1, found {progress!r:.40}")
    if not isinstance(message, str):
        raise TypeError("a message that is not text")
    return Heartbeat(_number(number), progress, message[:MAX_MESSAGE_CHARACTERS])


def _known_task(parts: object) -> KnownTask:
    if not isinstance(parts, list) or list(map(type, parts)) != [str, str, str, bool]:
        raise TypeError("a task that is not (application, namespace, name, is async)")
    return KnownTask(*parts)


def _verdict(parts: object) -> Verdict:
    if not isinstance(parts, list) or len(parts) != 5:
        raise TypeError("a verdict that is not five parts")
    status, reason, error, max_attempts, delay_s = parts
    if status not in (1, 2, 3, 4) or not isinstance(reason, str) or not isinstance(error, str):
        raise TypeError("a verdict with parts of the wrong kind")
    for optional in (max_attempts, delay_s):
        if optional is not None:
            _number(optional)
    return Verdict(status, reason, error[:MAX_ERROR_CHARACTERS], max_attempts, delay_s)


def cut(text: str) -> str:
    """At most `MAX_ERROR_CHARACTERS` of a text, its end kept: that is where tracebacks name the error."""
    if len(text) <= MAX_ERROR_CHARACTERS:
        return text
    return "…" + text[-(MAX_ERROR_CHARACTERS - 1) :]
