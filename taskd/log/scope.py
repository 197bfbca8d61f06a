"""A nursery for the own tasks of a reader or writer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks end with the block.

    An error of the block comes out as it is: a reader that happens to have tasks of its own must not
    turn its caller's errors into groups. An error of a task comes out in a group, after the block was
    cancelled.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:
            failure = error
        finally:
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
