"""Keeps secrets out of what is shown: a value is hidden by its type, by the name of its key, or in part.

Names count too, because a secret may stand under a key that is misspelt, and then has no type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydantic import SecretBytes, SecretStr

HIDDEN = "[redacted]"

_SECRET_NAME = re.compile(r"secret|password|passwd|token|credential|private_key\Z|dsn\Z", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def is_secret(path: Sequence[object]) -> bool:
    """Whether the value at this key is nobody's business; a file's name is, the path of a secret is not."""
    return any(isinstance(key, str) and _SECRET_NAME.search(key) for key in path)


def redacted(path: Sequence[object], value: object) -> object:
    """The value as it may be shown: plain mappings, lists and scalars, without secrets."""
    if isinstance(value, (SecretStr, SecretBytes)):
        return HIDDEN if value.get_secret_value() else ""
    if isinstance(value, Mapping):
        return {key: redacted((*path, key), below) for key, below in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redacted(path, item) for item in value]
    if is_secret(path) and value not in (None, "", True, False):
        return HIDDEN
    return _USER_IN_URL.sub(HIDDEN, value) if isinstance(value, str) else value
