"""The arguments of a call as bytes: msgpack `{"args": [...], "kwargs": {...}}`, in a zstd frame when large.

What comes back has lists for tuples; sets, dates and objects are refused, by name, when sending.
Reading trusts nothing: the size is known before anything is unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import zstandard

from taskd.errors import DeliveryError, Undecodable

COMPRESSION_HEADER = "compression-type"
ZSTD = "zstd"
PLAINTEXT = "plaintext"

# The protocol's limits: clients compress above the first and refuse above the second.
COMPRESS_ABOVE_BYTES = 3_000_000
MAX_ENCODED_BYTES = 5_000_000
# Ours: what a call may unpack to, so that a small record cannot fill a worker's memory.
MAX_DECODED_BYTES = 64 * 1024 * 1024

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_UNKNOWN_SIZES = (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR)


class Unserializable(DeliveryError):
    """The arguments cannot be sent; the call was not scheduled."""


def encode(args: Sequence[object], kwargs: Mapping[str, object], compression_type: str) -> bytes:
    """The bytes of a call's arguments, compressed when asked for or when large (see `is_compressed`).

    Raises Unserializable, naming the argument and what to pass instead.
    """
    if compression_type not in (PLAINTEXT, ZSTD):
        raise Unserializable(f"compression_type: expected 'plaintext' or 'zstd', found {compression_type!r}")
    packed = _pack(args, kwargs)
    if len(packed) > MAX_DECODED_BYTES:
        raise Unserializable(_too_large(len(packed), MAX_DECODED_BYTES, "before compression"))
    if compression_type == ZSTD or len(packed) > COMPRESS_ABOVE_BYTES:
        packed = zstandard.compress(packed)  # writes the content size into the frame
    if len(packed) > MAX_ENCODED_BYTES:
        raise Unserializable(_too_large(len(packed), MAX_ENCODED_BYTES, "after compression"))
    return packed


def is_compressed(encoded: bytes) -> bool:
    """Whether `encode` made a zstd frame, which the header `compression-type` must then say."""
    return encoded.startswith(_ZSTD_MAGIC)  # msgpack of a map begins with 0x82


def decode(
    parameters_bytes: bytes,
    parameters_json: str | None,
    headers: Mapping[str, str],
    max_bytes: int = MAX_DECODED_BYTES,
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call. An activation with neither kind of parameters calls without arguments.

    Raises Undecodable, saying what was expected and what was found, also when the arguments
    unpack to more than `max_bytes`.
    """
    if parameters_bytes:
        value = _unpack(_decompressed(parameters_bytes, headers, max_bytes))
    elif parameters_json:
        value = _from_json(parameters_json, max_bytes)
    else:
        return [], {}
    return _args_and_kwargs(value)


def _pack(args: Sequence[object], kwargs: Mapping[str, object]) -> bytes:
    call = {"args": list(args), "kwargs": dict(kwargs)}
    try:
        packed: bytes = msgpack.packb(call, use_bin_type=True)
        _unpack(packed)  # a tuple as a key, say, can be packed and not read
    except (TypeError, ValueError, OverflowError, Undecodable) as error:
        raise Unserializable(_complaint(args, kwargs, error)) from error
    return packed


def _complaint(args: Sequence[object], kwargs: Mapping[str, object], error: Exception) -> str:
    where = {f"argument {index}": value for index, value in enumerate(args)}
    where |= {f"argument {name!r}": value for name, value in kwargs.items()}
    for name, value in where.items():
        problem = _problem(value)
        if problem:
            return (
                f"{name} cannot be sent: {problem}. Expected None, bool, int (64 bits), float, str, bytes, "
                "or lists and dicts of these; pass an id, a number or text and look the rest up in the task"
            )
    return f"the arguments cannot be sent: {error}"


def _problem(value: object, path: str = "", depth: int = 0) -> str:
    """Where in `value` what cannot be sent lies; empty when nothing is wrong."""
    found = f"found {type(value).__name__}" + (f" at {path}" if path else "")
    if depth > 100:
        return "it is nested more than 100 deep, or contains itself"
    if value is None or isinstance(value, (bool, float, bytes, bytearray, memoryview)):
        return ""
    if isinstance(value, int):
        return "" if -(2**63) <= value < 2**64 else f"{found} beyond 64 bits"
    if isinstance(value, str):
        return "" if _is_unicode(value) else f"{found} that is not valid Unicode"
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if problem := _problem(item, f"{path}[{index}]", depth + 1):
                return problem
        return ""
    if isinstance(value, dict):
        for key, item in value.items():
            at = f"{path}[{key!r}]"
            if isinstance(key, tuple):
                return f"found tuple as key {at}"
            if problem := _problem(key, f"key {at}", depth + 1) or _problem(item, at, depth + 1):
                return problem
        return ""
    return found


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_large(size: int, limit: int, when: str) -> str:
    return (
        f"the arguments take {size:,} bytes {when}, the limit is {limit:,}; "
        "put the data where the task can fetch it and pass its address"
    )


def _decompressed(data: bytes, headers: Mapping[str, str], max_bytes: int) -> bytes:
    kind = headers.get(COMPRESSION_HEADER, PLAINTEXT)
    if kind == ZSTD:
        data = _unzstd(data, max_bytes)
    elif kind != PLAINTEXT:
        raise Undecodable(f"header {COMPRESSION_HEADER}: expected 'zstd' or 'plaintext', found {kind[:50]!r}")
    if len(data) > max_bytes:
        raise Undecodable(f"the parameters take {len(data):,} bytes, at most {max_bytes:,} are unpacked")
    return data


def _unzstd(data: bytes, max_bytes: int) -> bytes:
    try:
        claimed = zstandard.frame_content_size(data)
        if claimed not in _UNKNOWN_SIZES and claimed > max_bytes:
            raise Undecodable(
                f"the parameters claim to unpack to {claimed:,} bytes, at most {max_bytes:,} are unpacked"
            )
        # Without a size in the frame `max_output_size` is the limit; with one, the size just checked is.
        return zstandard.ZstdDecompressor().decompress(
            data, max_output_size=max_bytes, allow_extra_data=False
        )
    except (zstandard.ZstdError, MemoryError) as error:
        raise Undecodable(
            f"expected parameters in a zstd frame, as the header {COMPRESSION_HEADER} says, of at most "
            f"{max_bytes:,} bytes; found {data[:8].hex()}…: {error}"
        ) from error


def _unpack(data: bytes) -> object:
    try:
        # Dicts with numbers as keys are common arguments. Lengths are bounded by the size of the data.
        return msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=_refuse_ext)
    except Exception as error:  # msgpack raises a dozen types, TypeError for an unhashable key among them
        # ExtraData would print the payload, which belongs neither in logs nor in dead letters' headers.
        why = "more than one value" if isinstance(error, msgpack.ExtraData) else repr(error)
        raise Undecodable(
            f"expected parameters in msgpack, found {data[:8].hex()}… ({len(data)} bytes): {why}"
        ) from error


def _refuse_ext(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code} is not part of the protocol")


def _from_json(text: str, max_bytes: int) -> object:
    if len(text) > max_bytes:
        raise Undecodable(f"the parameters take {len(text):,} characters, at most {max_bytes:,} are read")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Undecodable(f"expected legacy parameters in JSON, found {text[:50]!r}: {error}") from error


def _args_and_kwargs(value: object) -> tuple[list[Any], dict[str, Any]]:
    if isinstance(value, dict):
        args, kwargs = value.get("args", []), value.get("kwargs", {})
        if isinstance(args, list) and isinstance(kwargs, dict) and all(isinstance(k, str) for k in kwargs):
            return args, kwargs
        found = f"args {type(args).__name__}, kwargs {type(kwargs).__name__}"
    else:
        found = type(value).__name__
    raise Undecodable(
        'expected parameters {"args": [...], "kwargs": {"name": ...}}, '
        f"found {found} or keys that are not text"
    )
