"""The only door to asyncio.

aiokafka and grpclib are asyncio libraries; under Trio they run on trio-asyncio's loop. A handful of
traps lie between the two worlds, and each name here is the cure of some: an asyncio error must not
end the daemon, a clean-up must be neither skipped nor endless, a lone error must keep its type on
the way through a nursery, and foreign errors must become ours at the border. Modules that import
aiokafka or grpclib import this one first: on Python 3.12 and newer grpclib binds asyncio functions
at import, before trio-asyncio could replace them.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ParamSpec, TypeVar

import structlog
import trio

with warnings.catch_warnings():
    # It subclasses what Python 3.12 deprecates (trio-asyncio issue 160).
    warnings.simplefilter("ignore", DeprecationWarning)
    import trio_asyncio

__all__ = [
    "Interrupted",
    "call",
    "current_loop",
    "finish",
    "lone",
    "mapped",
    "open_loop",
    "trio_handler",
    "unhandled_errors",
]

P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger("taskd.aio")

unhandled_errors = 0
"""How many errors asyncio code left to the loop since the process began."""


def _log_and_count(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # trio-asyncio's own handler raises instead, and one bad frame of one peer would end the daemon.
    global unhandled_errors
    unhandled_errors += 1
    error = context.get("exception")
    log.warning("asyncio error", message=context.get("message"), error=repr(error) if error else None)


@asynccontextmanager
async def open_loop() -> AsyncIterator[None]:
    """Run asyncio's loop while the block lasts. Outermost in a composition root: the loop outlives its users.

    What the block raises leaves it as it is, not wrapped in the groups of the loop's nurseries.
    """
    failure: BaseException | None = None
    try:
        async with trio_asyncio.open_loop() as loop:
            loop.set_exception_handler(_log_and_count)
            try:
                yield
            except BaseException as error:
                failure = error
    finally:
        if failure is not None:
            raise failure


def current_loop() -> object:
    """The loop that `call` uses in this task: of the `open_loop` it was started in. None: there is none."""
    return trio_asyncio.current_loop.get()


class Interrupted(Exception):
    """The asyncio code was cancelled from its own side, not by the Trio task that awaits it."""


async def call(fn: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await an asyncio function from Trio. Cancellation is passed on, and waits until `fn` has unwound.

    Raises what `fn` raises, and Interrupted when asyncio cancelled it: CancelledError is no
    Exception, and would pass every handler of errors on the Trio side.
    """
    try:
        result: T = await trio_asyncio.aio_as_trio(fn)(*args, **kwargs)
    except asyncio.CancelledError as error:
        raise Interrupted(f"{_name_of(fn)} was cancelled inside asyncio") from error
    return result


def _name_of(fn: object) -> str:
    return getattr(fn, "__qualname__", None) or repr(fn)


async def finish(fn: Callable[[], Awaitable[object]], *, within_s: float) -> bool:
    """Run a clean-up that cancellation does not skip and that ends after `within_s` seconds all the same.

    Returns False when it did not finish in time or failed; that is logged, not raised.
    """
    with trio.CancelScope(shield=True, deadline=trio.current_time() + within_s) as scope:
        try:
            await call(fn)
        except Exception as error:
            log.warning("clean-up failed", what=_name_of(fn), error=repr(error))
            return False
    if scope.cancelled_caught:
        log.warning("clean-up took too long", what=_name_of(fn), within_s=within_s)
        return False
    return True


def trio_handler(fn: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Make a Trio function callable from asyncio. A lone error comes out of its nurseries unwrapped."""

    async def unwrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await fn(*args, **kwargs)
        except BaseExceptionGroup as group:
            raise lone(group) from None

    handler: Callable[P, Awaitable[T]] = trio_asyncio.trio_as_aio(unwrapped)
    return handler


def lone(error: BaseException) -> BaseException:
    """The one error inside nested groups of one, else what was given."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


@contextmanager
def mapped(
    table: Mapping[type[BaseException], Callable[[Any], Exception]],
) -> Iterator[None]:
    """Turn foreign errors into ours: the first row whose type matches makes the error that is raised."""
    try:
        yield
    except BaseException as error:
        foreign = lone(error)
        for kind, ours in table.items():
            if isinstance(foreign, kind):
                raise ours(foreign) from error
        raise
