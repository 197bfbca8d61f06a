"""How limits name what they are for, and how often it may begin."""

from __future__ import annotations

import re

PER_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000}


def namespace_of(key: str) -> tuple[str | None, str]:
    """(application, namespace) of `namespace` or `application:namespace`; None: every application, together.

    Raises ValueError.
    """
    application, separator, namespace = key.rpartition(":")
    if not namespace or ":" in application:
        raise ValueError(f"expected NAMESPACE or APPLICATION:NAMESPACE, found {key!r}")
    return application if separator else None, namespace


def task_of(key: str) -> tuple[str | None, str, str]:
    """(application, namespace, task name) of `namespace:task` or `application:namespace:task`.

    Raises ValueError.
    """
    where, _, taskname = key.rpartition(":")
    if not where or not taskname:
        raise ValueError(f"expected NAMESPACE:TASK or APPLICATION:NAMESPACE:TASK, found {key!r}")
    try:
        return *namespace_of(where), taskname
    except ValueError:
        raise ValueError(f"expected NAMESPACE:TASK or APPLICATION:NAMESPACE:TASK, found {key!r}") from None


def rate_of(text: str) -> tuple[int, int]:
    """(count, milliseconds) of a rate such as `100/s`, `30/m` or `5/h`. Raises ValueError."""
    found = re.fullmatch(r"([0-9]{1,9}) ?/ ?([smh])", text)
    if found is None or not int(found[1]):
        raise ValueError("expected a rate such as 100/s, 30/m or 5/h: a whole number for each s, m or h")
    return int(found[1]), PER_MS[found[2]]
