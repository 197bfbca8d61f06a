"""Structured logs on stderr: stdout belongs to what a command was asked for.

The standard library's logging takes the same way, so that the lines of grpclib, aiokafka and
hypercorn have the same shape as ours.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

import structlog
from structlog.typing import Processor

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

# These libraries tell at "info" what only their authors want to know.
TALKATIVE = ("aiokafka", "asyncio", "grpclib", "hypercorn.error", "trio_asyncio")


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second `setup_logging` replaces it and nobody else's."""


def setup_logging(level: Level, format: Format = "auto") -> None:
    """Send every log line of this process to stderr. May be called again; the last call counts.

    `auto`: for reading when stderr is a terminal, else one JSON object per line. Tracebacks never
    show local variables, which may hold payloads and secrets.
    """
    console = format == "console" or (format == "auto" and sys.stderr.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.UnicodeDecoder(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=False,
    )
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(console)],
        )
    )
    _install(handler, number)


def _rendering(console: bool) -> list[Processor]:
    if console:
        return [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    return [
        structlog.processors.format_exc_info,
        structlog.processors.EventRenamer("message"),
        structlog.processors.JSONRenderer(ensure_ascii=False),  # for people: tasks print in any language
    ]


def _install(handler: logging.Handler, number: int) -> None:
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(number if number < logging.INFO else max(number, logging.WARNING))
    # At debug it tells every byte of every header: thirty lines for a call, ours drowned in them.
    logging.getLogger("hpack").setLevel(max(number, logging.WARNING))
