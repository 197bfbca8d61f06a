"""The tasks of this plugin; found by taskd through the entry point in pyproject.toml."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any

from taskd import (
    LastAction,
    ProcessingDeadlineExceeded,
    Retry,
    RetryTaskError,
    TaskNamespace,
    instrumented_task,
)
from taskd_webhooks.post import TryAgain, post
from taskd_webhooks.signature import HEADER, sign

SECRET_VARIABLE = "TASKD_WEBHOOKS_SECRET"  # noqa: S105  # the name of a secret, not one
USER_AGENT = "taskd-webhooks/0.1.0"
MAX_ID_CHARS = 255

log = logging.getLogger("taskd_webhooks")
webhooks = TaskNamespace("webhooks")


@instrumented_task(
    name="deliver",
    namespace=webhooks,
    retry=Retry(
        times=5,
        delay=1,  # seconds; a receiver that wants more says so with Retry-After
        on=(ProcessingDeadlineExceeded,),
        times_exceeded=LastAction.Deadletter,
    ),
    processing_deadline_duration=30,  # seconds; above every time-out of post.Timeouts taken together
)
def deliver(url: str, event: dict[str, Any]) -> None:
    """Post `event` as JSON to `url`. `event["id"]` names it to the receiver, the same on every try.

    An event may arrive more than once: after a time-out nobody knows whether the receiver took it.
    Receivers keep the header `Idempotency-Key` to tell.
    """
    key = _idempotency_key(event)
    body = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    headers = {
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        "Idempotency-Key": key,
    }
    if secret := os.environ.get(SECRET_VARIABLE):
        headers[HEADER] = sign(secret, body, now_s=int(time.time()))
    try:
        status = post(url, body, headers)
    except TryAgain as error:
        raise RetryTaskError(f"event {key}: {error}", delay=error.after_s) from error
    log.info("delivered event %s: %d", key, status)


def _idempotency_key(event: dict[str, Any]) -> str:
    # The activation's id would not do: each retry is an activation of its own.
    key = event.get("id")
    if (
        not isinstance(key, str)
        or not 0 < len(key) <= MAX_ID_CHARS
        or not key.isascii()
        or not key.isprintable()
    ):
        raise ValueError(
            f'expected event["id"] to be 1 to {MAX_ID_CHARS} printable ASCII characters, found {key!r:.80}'
        )
    return key
