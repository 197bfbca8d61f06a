"""SIGHUP: read the configuration again, apply what can change while running, name what cannot.

An invalid file changes nothing: every problem is logged and the old configuration holds.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from taskd.config import live
from taskd.config.schema import Section
from taskd.daemon import notify
from taskd.errors import ConfigError

C = TypeVar("C", bound=Section)

log = structlog.get_logger("taskd.reload")


@dataclass(frozen=True, slots=True)
class Reloads(Generic[C]):
    """Where a daemon hears that it should read its configuration again, and how it does."""

    asked: AsyncIterable[object]  # one item for each time; such as SIGHUP
    load: Callable[[], C]  # raises ConfigError


async def follow(
    reloads: Reloads[C],
    running: Callable[[], C],
    apply: Callable[[C], None],
    live_keys: Collection[str],
) -> None:
    """Reload whenever asked, until cancelled; for a daemon that is ready, and is told to be so again.

    `running` is what holds now; `apply` makes another hold.
    """
    async for _ in reloads.asked:
        notify.reloading()
        _reload(reloads, running(), apply, live_keys)
        notify.tell("READY=1")


def _reload(reloads: Reloads[C], running: C, apply: Callable[[C], None], live_keys: Collection[str]) -> None:
    config = reloaded(reloads.load, running, live_keys)
    if config is None:
        return
    try:
        apply(config)
    except Exception:  # whatever it was: SIGHUP never stops a daemon
        log.exception("configuration not wholly applied; restart when it suits")
    else:
        log.info("configuration reloaded")


def reloaded(load: Callable[[], C], running: C, live_keys: Collection[str]) -> C | None:
    """What shall hold from now on; None when the file is invalid. Says what changes and what waits."""
    try:
        wanted = load()
    except ConfigError as error:
        problems = str(error).splitlines()
        for problem in problems:
            log.error("configuration not reloaded", problem=problem)
        log.error("the old configuration holds", problems=len(problems))
        return None
    found = live.changes(running, wanted, live_keys)
    for change in found:
        if change.live:
            log.info("configuration changed", key=change.key, was=change.was, now=change.now)
        else:
            log.warning("needs a restart", key=change.key, running=change.was, wanted=change.now)
    if not found:
        log.info("configuration reloaded, no key differs")
    return live.taking(running, wanted, live_keys)
