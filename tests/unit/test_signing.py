"""Signatures: the published vectors, rotation, and a proof that fits one call only."""

from __future__ import annotations

import dataclasses
import pickle
from hmac import compare_digest

import pytest

from taskd.errors import Undecodable
from taskd.wire.signing import Proof, Secrets, signature, signature_fits

SECRET = Secrets(["super secret"])
PUSH = "/sentry_protos.taskbroker.v1.WorkerService/PushTask"
GET = "/sentry_protos.taskbroker.v1.ConsumerService/GetTask"
OWN = "/taskd.v1.LogService/Append"
VECTORS = [
    (PUSH, b"hello", "cfdf2c4d2efd3a2d28bd10de6471ef352d03f49d2d3bd880ee7051ea39fbe239"),
    (GET, b"", "402430dc4ee2940bed96d6f40d1a92ab43de2bd3fb21ac978b670208108570a0"),
    (
        GET,
        bytes.fromhex("120673656e747279"),
        "d1be487647c60430d09ac60560d995963f2eab5532d342b18f38f6030b95956a",
    ),
]


@pytest.mark.parametrize(("path", "body", "expected"), VECTORS)
def test_the_published_vectors(path: str, body: bytes, expected: str) -> None:
    assert signature(SECRET, path, body) == expected
    assert signature_fits(SECRET, path, body, expected)
    assert not signature_fits(SECRET, path, body + b"x", expected)
    assert not signature_fits(SECRET, GET if path == PUSH else PUSH, body, expected)


@pytest.mark.parametrize("wrong", ["", "x", "0" * 64, VECTORS[1][2].upper(), "\udcff", "é" * 64])
def test_whatever_is_no_signature_does_not_fit(wrong: str) -> None:
    assert not signature_fits(SECRET, GET, b"", wrong)


@pytest.mark.parametrize("secret", ["one", "two", "other"])
def test_the_time_a_comparison_takes_tells_nothing(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return compare_digest(one, other)

    monkeypatch.setattr("taskd.wire.signing.hmac.compare_digest", compare)
    given = signature(Secrets([secret]), GET, b"x")
    assert signature_fits(Secrets(["one", "two"]), GET, b"x", given) is (secret != "other")
    assert len(compared) == 2  # with each, whichever fits


def test_the_first_secret_signs_and_all_are_accepted() -> None:
    old, new = Secrets(["old"]), Secrets(["new"])
    rotating = Secrets(["new", "old"])
    assert signature(rotating, GET, b"x") == signature(new, GET, b"x")
    assert signature_fits(rotating, GET, b"x", signature(old, GET, b"x"))
    assert not signature_fits(new, GET, b"x", signature(old, GET, b"x"))


def test_secrets_are_not_shown_and_do_not_travel() -> None:
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", repr([SECRET]), repr({"x": SECRET})):
        assert "super" not in shown
    assert not hasattr(SECRET, "__dict__")
    with pytest.raises(TypeError):
        pickle.dumps(SECRET)
    with pytest.raises(ValueError, match="empty"):
        Secrets(["good", ""])
    assert not Secrets()


def test_a_proof_fits_its_own_call_only() -> None:
    proof = Proof.parse(str(Proof.make(SECRET, OWN, b"body", 1_767_225_600_000)))
    assert proof.fits(SECRET, OWN, b"body")
    others = [
        proof.fits(SECRET, OWN, b"another body"),
        proof.fits(SECRET, OWN, b""),
        proof.fits(SECRET, OWN, None),
        proof.fits(SECRET, "/taskd.v1.DispatchService/Work", b"body"),
        proof.fits(Secrets(["another secret"]), OWN, b"body"),
        dataclasses.replace(proof, time_ms=proof.time_ms + 1).fits(SECRET, OWN, b"body"),
        dataclasses.replace(proof, nonce="0" * 32).fits(SECRET, OWN, b"body"),
    ]
    assert not any(others)
    assert Proof.make(SECRET, OWN, None, 1).fits(SECRET, OWN, None)
    assert not Proof.make(SECRET, OWN, None, 1).fits(SECRET, OWN, b"")
    assert Proof.make(SECRET, OWN, b"", 1).nonce != Proof.make(SECRET, OWN, b"", 1).nonce


NONCE, MAC = "0" * 32, "0" * 64


@pytest.mark.parametrize(
    "header",
    [
        "",
        "v1",
        f"v2 1 {NONCE} {MAC}",
        f"v1  1 {NONCE} {MAC}",
        f"v1 -1 {NONCE} {MAC}",
        f"v1 0 {NONCE} {MAC}",
        f"v1 ² {NONCE} {MAC}",
        f"v1 {'9' * 30} {NONCE} {MAC}",
        f"v1 1 {NONCE[1:]} {MAC}",
        f"v1 1 {'G' * 32} {MAC}",
        f"v1 1 {NONCE} {MAC} more",
        f"v1 1 {NONCE} " + "f" * 10_000,
    ],
)
def test_headers_that_are_no_proof(header: str) -> None:
    with pytest.raises(Undecodable):
        Proof.parse(header)
