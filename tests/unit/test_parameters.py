from __future__ import annotations

import datetime
import json
import random
from typing import Any

import msgpack
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from taskd.errors import DeliveryError, Undecodable
from taskd.wire import parameters
from taskd.wire.parameters import Unserializable, decode, encode

PLAIN: dict[str, str] = {}
ZSTD = {"compression-type": "zstd"}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=20,
)
names = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    args=st.lists(values, max_size=4),
    kwargs=st.dictionaries(names, values, max_size=4),
    compression_type=st.sampled_from(["plaintext", "zstd"]),
)
def test_round_trip(args: list[Any], kwargs: dict[str, Any], compression_type: str) -> None:
    encoded = encode(args, kwargs, compression_type)
    assert parameters.is_compressed(encoded) == (compression_type == "zstd")
    assert decode(encoded, None, {"compression-type": compression_type}) == (args, kwargs)


def test_the_bytes_are_the_protocols() -> None:
    # contract §5: the payload `abc` as msgpack bin
    assert encode([b"abc"], {}, "plaintext").hex() == "82a46172677391c403616263a66b776172677380"


def test_a_zstd_frame_carries_its_content_size() -> None:
    plain = encode(["x" * 1000], {}, "plaintext")
    assert zstandard.frame_content_size(encode(["x" * 1000], {}, "zstd")) == len(plain)


def test_large_parameters_are_compressed_unasked() -> None:
    assert not parameters.is_compressed(encode(["x" * 2_999_000], {}, "plaintext"))
    encoded = encode(["x" * 3_000_000], {}, "plaintext")
    assert parameters.is_compressed(encoded)
    assert decode(encoded, None, ZSTD) == (["x" * 3_000_000], {})


def test_larger_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(1).randbytes(1_024)
    monkeypatch.setattr(parameters, "MAX_ENCODED_BYTES", 1_000)
    with pytest.raises(
        Unserializable, match=r"1,0[0-9]+ bytes after compression, the limit is 1,000; put the data"
    ):
        encode([noise], {}, "plaintext")
    monkeypatch.setattr(parameters, "MAX_DECODED_BYTES", 900)
    with pytest.raises(Unserializable, match="before compression"):
        encode([noise], {}, "zstd")


def test_tuples_come_back_as_lists() -> None:
    assert decode(encode([(1, (2,))], {}, "plaintext"), None, PLAIN) == ([[1, [2]]], {})


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({1, 2}, "argument 'value' cannot be sent: found set"),
        (datetime.date(2026, 1, 1), "found date"),
        ([0, {"when": object()}], r"found object at \[1\]\['when'\]"),
        ({"k": 2**64}, "found int at .* beyond 64 bits"),
        ("\ud800", "not valid Unicode"),
        (_circle(), "nested more than 100 deep, or contains itself"),
        ({frozenset(): 1}, "found frozenset at key"),
        ([{(1, 2): 3}], r"found tuple as key \[0\]\[\(1, 2\)\]"),
    ],
)
def test_what_cannot_be_sent_is_named(value: object, says: str) -> None:
    with pytest.raises(Unserializable, match=says) as caught:
        encode([1], {"value": value}, "plaintext")
    assert isinstance(caught.value, DeliveryError)


def test_unknown_compression_is_refused_on_both_sides() -> None:
    with pytest.raises(Unserializable, match="'gzip'"):
        encode([], {}, "gzip")
    with pytest.raises(Undecodable, match="'gzip'"):
        decode(b"x", None, {"compression-type": "gzip"})


def test_legacy_json() -> None:
    assert decode(b"", '{"args": [1, "a"], "kwargs": {"k": null}}', ZSTD) == ([1, "a"], {"k": None})


def test_no_parameters_are_a_call_without_arguments() -> None:
    assert decode(b"", None, PLAIN) == ([], {})
    assert decode(b"", "", PLAIN) == ([], {})


@pytest.mark.parametrize(
    ("encoded", "says"),
    [
        (b"\xc1", "in msgpack, found c1"),
        (msgpack.packb([1]), "found list"),
        (msgpack.packb({"args": {}, "kwargs": {}}), "found args dict"),
        (msgpack.packb({"args": [], "kwargs": []}), "kwargs list"),
        (msgpack.packb({"args": [], "kwargs": {1: 2}}), "keys that are not text"),
        (msgpack.packb({"args": [msgpack.ExtType(5, b"")], "kwargs": {}}), "extension type 5"),
        (b"\x81\x91\x01\x02", "unhashable"),
        (b"\x91" * 100_000, "msgpack"),
        (b"\xdf\xff\xff\xff\xff", "msgpack"),
        (msgpack.packb({"args": [], "kwargs": {}}) + b"x", "msgpack"),
    ],
)
def test_what_is_not_a_call_is_undecodable(encoded: bytes, says: str) -> None:
    with pytest.raises(Undecodable, match=says):
        decode(encoded, None, PLAIN)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"args": 1}', "9" * 5_000])
def test_json_that_is_not_a_call_is_undecodable(text: str) -> None:
    with pytest.raises(Undecodable):
        decode(b"", text, PLAIN)


def _without_size(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


@pytest.mark.parametrize("compress", [zstandard.compress, _without_size])
def test_a_bomb_is_refused(compress: Any) -> None:
    bomb = compress(encode(["\0" * 2_000_000], {}, "plaintext"))
    assert len(bomb) < 1_000
    with pytest.raises(Undecodable, match="1,000,000"):
        decode(bomb, None, ZSTD, max_bytes=1_000_000)
    assert decode(bomb, None, ZSTD) == (["\0" * 2_000_000], {})


def test_a_frame_that_lies_is_undecodable() -> None:
    frame = encode(["x" * 5_000], {}, "zstd")
    for broken in (frame[:-1], frame + b"x", frame[:5] + b"\x00\x01" + frame[7:], b"plain"):
        with pytest.raises(Undecodable):
            decode(broken, None, ZSTD)


@given(data=st.binary(min_size=1), zstd=st.booleans())
def test_any_bytes_are_decoded_or_undecodable(data: bytes, zstd: bool) -> None:
    _decodes_or_not(data, ZSTD if zstd else PLAIN)


@given(data=st.data(), zstd=st.booleans())
def test_damaged_parameters_are_decoded_or_undecodable(data: st.DataObject, zstd: bool) -> None:
    encoded = bytearray(encode([1, "two", {"three": [4.0]}], {"k": b"5"}, "zstd" if zstd else "plaintext"))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    _decodes_or_not(bytes(encoded), ZSTD if zstd else PLAIN)


@given(text=st.text() | values.map(lambda value: json.dumps(value, default=str)))
def test_any_text_is_decoded_or_undecodable(text: str) -> None:
    try:
        args, kwargs = decode(b"", text, PLAIN)
    except Undecodable:
        return
    assert isinstance(args, list)
    assert isinstance(kwargs, dict)


def _decodes_or_not(data: bytes, headers: dict[str, str]) -> None:
    try:
        args, kwargs = decode(data, None, headers)
    except Undecodable:
        return
    assert isinstance(args, list)
    assert isinstance(kwargs, dict)
