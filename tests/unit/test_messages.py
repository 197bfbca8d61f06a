"""Requests whose fields are cut off, or of another type than declared, are refused and nothing more."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from taskd.admin.cancel import CancelOrders
from taskd.admin.inspect import Inspect
from taskd.admin.orders import Orders
from taskd.errors import Refused, Undecodable
from taskd.inflight.base import Policy
from taskd.inflight.writer import open_inflight
from taskd.log.memory import MemoryLog
from taskd.producer.service import LogService
from taskd.rpc.health import CHECK, health_services
from taskd.testing.clock import FixedClock
from taskd.wire.generated.taskd import v1
from taskd.wire.messages import read_message

ADMIN = "/taskd.v1.AdminService/"
CONDITION = v1.ArgumentCondition(position=1, value_json='{"a":[1]}')
SUBJECT = v1.SwitchSubject(application="a", namespace="n", taskname="t", conditions=[CONDITION])
RECORD = v1.AppendRecord(
    topic="t", key=b"k", value=b"v", headers=[v1.RecordHeader(name="name", value=b"value")]
)
REQUESTS = {
    f"{ADMIN}Cancel": v1.CancelRequest(ids=["abc", "d"], reason="why", author="me", even_unknown=True),
    f"{ADMIN}SetSwitch": v1.SetSwitchRequest(
        kind=v1.SwitchKind.KILLSWITCH, subject=SUBJECT, reason="r", author="a", for_ms=5
    ),
    f"{ADMIN}ClearSwitch": v1.ClearSwitchRequest(
        kind=v1.SwitchKind.PAUSE, subject=SUBJECT, reason="x", author="b"
    ),
    "/taskd.v1.InspectService/GetStatus": v1.GetStatusRequest(ids=["abc", "d"]),
    "/taskd.v1.LogService/Append": v1.AppendRequest(records=[RECORD, RECORD]),
    CHECK: v1.GetStatusRequest(ids=["abc"]),  # of the same shape as what it asks for
}


@pytest.mark.parametrize(
    "raw", [b"\x08\x05", b"\x0a\x05abc", b"\x0a\x01\xff", b"\x12\x03why\x1a", b"\x20\x80"], ids=repr
)
def test_what_does_not_fit_is_an_error(raw: bytes) -> None:
    with pytest.raises(Undecodable, match="not a CancelRequest: "):
        read_message(v1.CancelRequest, raw)


def test_what_fits_is_read_and_unknown_fields_are_passed_over() -> None:
    raw = bytes(REQUESTS[f"{ADMIN}Cancel"])
    assert read_message(v1.CancelRequest, raw + b"\xf8\x01\x05").ids == ["abc", "d"]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    found = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(found))
        match rng.randrange(3):
            case 0:
                found[at] = rng.randrange(256)
            case 1:
                found.insert(at, rng.randrange(256))
            case _ if len(found) > 1:
                del found[at]
    return bytes(found)


async def test_damaged_requests_are_answered_or_refused(tmp_path: Path) -> None:
    rng, clock = random.Random(1), FixedClock()
    outcomes: Counter[tuple[str, str]] = Counter()
    log = MemoryLog()
    await log.ensure_topics({"t": 1})
    async with (
        open_inflight(tmp_path / "store.sqlite", clock, Policy(), inline=True) as inflight,
        log.open_writer() as writer,
    ):
        services: dict[str, Any] = {
            **Orders(inflight, clock).services,
            **CancelOrders(inflight, lambda held: None).services,
            **Inspect(inflight).services,
            **LogService(writer, frozenset({"t"})).services,
            **health_services(lambda name: True),
        }
        for path, request in REQUESTS.items():
            for _ in range(500):
                try:
                    await services[path].handler(damaged(bytes(request), rng))
                except Refused as error:
                    outcomes[path, error.code] += 1
    assert all(outcomes[path, "INVALID_ARGUMENT"] > 50 for path in REQUESTS)
