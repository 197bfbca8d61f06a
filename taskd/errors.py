"""What can go wrong, one class per situation. A class's docstring is its default message."""

from __future__ import annotations

import inspect

__all__ = [
    "ConfigError",
    "DeliveryError",
    "LogUnavailable",
    "PeerError",
    "PeerTimeout",
    "PeerUnavailable",
    "PeerUnreachable",
    "Refused",
    "StartupError",
    "StoreDamaged",
    "StoreError",
    "TaskdError",
    "Undecodable",
    "UnknownTask",
]


class TaskdError(Exception):
    """taskd could not do what was asked."""

    exit_code = 1

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.cleandoc(type(self).__doc__ or "").split("\n\n")[0])


class ConfigError(TaskdError):
    """The configuration is not valid."""

    exit_code = 78  # EX_CONFIG of sysexits.h


class StartupError(TaskdError):
    """A part of the daemon could not start.

    Exit codes follow sysexits.h: 69 a peer or service is unavailable, 73 a file or folder
    cannot be written, 75 somebody else holds it for now (a port, a lock).
    """

    exit_code = 69

    def __init__(self, message: str | None = None, *, exit_code: int = 69) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Undecodable(TaskdError):
    """The bytes are not a valid task activation."""


class UnknownTask(TaskdError):
    """No installed plugin registers a task of that name."""


class DeliveryError(TaskdError):
    """The activation could not be handed to the log; it was not scheduled."""


class LogUnavailable(TaskdError):
    """The log did not take or give records for now; trying again is right."""


class StoreError(TaskdError):
    """The store of in-flight activations failed."""


class StoreDamaged(TaskdError):
    """The store's file is damaged. The next start sets it aside and says how to recover from it."""

    exit_code = 74  # EX_IOERR of sysexits.h; service managers start the daemon again


class PeerError(TaskdError):
    """A call to another process failed."""

    retryable = True


class PeerUnavailable(PeerError):
    """Nobody answers at that address, or the connection was lost."""

    exit_code = 69


class PeerUnreachable(PeerUnavailable):
    """No connection to that address could be made; nothing was sent."""


class PeerTimeout(PeerError):
    """The peer did not answer in time."""

    exit_code = 69


class Refused(PeerError):
    """The peer understood the call and said no.

    `code` is the name of a gRPC status, such as `NOT_FOUND`. Handlers raise it to answer with
    that status; clients raise it when they were answered so.
    """

    retryable = False

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.code = code
        self.message = message
