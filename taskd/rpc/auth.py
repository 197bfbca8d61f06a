"""Who may call: the check before a handler, and the signature of a caller.

The services of the taskbroker protocol carry `sentry-signature`, our own carry `taskd-auth`, which
cannot be used twice. A service may have secrets of its own, so that who may work may not also order.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from taskd.clock import Clock
from taskd.errors import Refused, Undecodable
from taskd.rpc.base import Headers
from taskd.rpc.limits import Seldom
from taskd.wire import signing
from taskd.wire.signing import Proof, Secrets

OWN_PACKAGE = "taskd.v1."
EXEMPT = "grpc.health.v1.Health"  # load balancers ask it, and know no secrets
REFUSAL = "Authentication failed"

WINDOW_MS = 60_000  # how far the clocks of caller and server may differ, and how long a nonce is remembered
MAX_NONCES = 500_000  # in 60 s; some 50 MB, and only who knows the secret can fill it

log = structlog.get_logger("taskd.rpc")


def service_of(path: str) -> str:
    """`package.Service` of `/package.Service/Method`."""
    return path[1:].rpartition("/")[0]


class Guard:
    """What the calls of one server must show.

    `secrets`: for every service but health. `of_services`: for these instead, by `package.Service`.
    A service without secrets is open to everybody. Give it the clock that callers' times are judged by.
    """

    def __init__(
        self, secrets: Secrets, clock: Clock, *, of_services: Mapping[str, Secrets] | None = None
    ) -> None:
        self._secrets = secrets
        self._of_services = dict(of_services or {})
        self._clock = clock
        self._nonces = Nonces()
        self._seldom = Seldom()
        self._since_mono_ms = clock.now().mono_ms

    def check_head(self, path: str, headers: Mapping[str, str]) -> None:
        """Before anything of the call is read: it must bring a signature. Raises Refused."""
        if self._wanted(path) and not headers.get(_header(path)):
            raise self._refused(path, "no signature")

    def check(self, path: str, headers: Mapping[str, str], body: bytes | None) -> None:
        """`body` None: a stream. Raises Refused."""
        secrets = self._wanted(path)
        if not secrets:
            return
        given = headers.get(_header(path), "")
        if not service_of(path).startswith(OWN_PACKAGE):
            if not signing.signature_fits(secrets, path, body or b"", given):
                raise self._refused(path, "wrong signature")
            return
        try:
            proof = Proof.parse(given)
        except Undecodable as error:
            raise self._refused(path, str(error)) from None
        if not proof.fits(secrets, path, body):
            raise self._refused(path, "wrong signature")
        self._check_fresh(path, proof)

    def _wanted(self, path: str) -> Secrets:
        service = service_of(path)
        return Secrets() if service == EXEMPT else self._of_services.get(service, self._secrets)

    def _check_fresh(self, path: str, proof: Proof) -> None:
        """The caller knows the secret, or sends again what somebody signed who does."""
        now = self._clock.now()
        age_ms = now.wall_ms - proof.time_ms
        if abs(age_ms) > WINDOW_MS:
            raise self._refused(
                path, f"signed {age_ms / 1000:.0f} s ago: a clock is wrong, or it is a replay"
            )
        if age_ms > now.mono_ms - self._since_mono_ms:
            # Which nonces an earlier process saw is not known. A caller signs anew and comes again.
            raise Refused("UNAVAILABLE", "signed before this server started; sign again")
        if not self._nonces.has_room(now.wall_ms):
            raise Refused("UNAVAILABLE", "too many signed calls within a minute; try again")
        if not self._nonces.take(proof.nonce, proof.time_ms):
            raise self._refused(path, "a replay")

    def _refused(self, path: str, why: str) -> Refused:
        unsaid = self._seldom.say(self._clock.now().mono_ms / 1000)
        if unsaid is not None:
            log.warning("call refused", path=path[:200], why=why, refused_unsaid=unsaid)
        return Refused("UNAUTHENTICATED", REFUSAL)


class Nonces:
    """The nonces of signatures that would still be accepted by their time; bounded."""

    def __init__(self, window_ms: int = WINDOW_MS, most: int = MAX_NONCES) -> None:
        self._window_ms = window_ms
        self._most = most
        # By slices of the time they were signed at; a slice is dropped whole once none in it can count.
        self._slices: dict[int, set[bytes]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def has_room(self, now_ms: int) -> bool:
        """Whether one more can be remembered, once what counts no longer is forgotten."""
        oldest = (now_ms - self._window_ms) // self._window_ms
        for number in [number for number in self._slices if number < oldest]:
            self._count -= len(self._slices.pop(number))
        return self._count < self._most

    def take(self, nonce: str, time_ms: int) -> bool:
        """False when it was taken before."""
        taken = self._slices.setdefault(time_ms // self._window_ms, set())
        key = bytes.fromhex(nonce)
        if key in taken:
            return False
        taken.add(key)
        self._count += 1
        return True


class Signer:
    """Signs the calls of a client. Without secrets it adds nothing."""

    def __init__(self, secrets: Secrets, clock: Clock) -> None:
        self._secrets = secrets
        self._clock = clock

    def headers(self, path: str, body: bytes | None) -> Headers:
        """To be sent with the call; `body` None: a stream."""
        if not self._secrets or service_of(path) == EXEMPT:
            return []
        if service_of(path).startswith(OWN_PACKAGE):
            proof = Proof.make(self._secrets, path, body, self._clock.now().wall_ms)
            return [(signing.PROOF_HEADER, str(proof))]
        return [(signing.SIGNATURE_HEADER, signing.signature(self._secrets, path, body or b""))]


def _header(path: str) -> str:
    own = service_of(path).startswith(OWN_PACKAGE)
    return signing.PROOF_HEADER if own else signing.SIGNATURE_HEADER
