"""One HTTP POST, judged: delivered, worth another try, or refused for good."""

from __future__ import annotations

import atexit
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

MAX_RESPONSE_BYTES = 64 * 1024  # nobody needs more of an answer than what explains an error
MAX_RETRY_AFTER_S = 3_600  # a receiver may ask for patience, not for being forgotten
EXCERPT_CHARS = 200


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `read` is the longest silence of the receiver, `total` the longest reading of its answer."""

    connect: float = 3.0
    read: float = 8.0
    total: float = 15.0


class NotDelivered(Exception):
    """The receiver did not take the event and never will: asking again is of no use."""


class TryAgain(Exception):
    """The receiver did not take the event this time. `after_s`: the wait it asked for, if it did."""

    def __init__(self, message: str, after_s: int | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


@functools.cache
def shared_client() -> httpx.Client:
    """The client of this process: connections are kept and reused from task to task."""
    # A redirect is not followed: it would carry the signed event to a host nobody has named.
    client = httpx.Client(follow_redirects=False, limits=httpx.Limits(max_connections=10))
    atexit.register(client.close)
    return client


def post(url: str, body: bytes, headers: Mapping[str, str], timeouts: Timeouts = Timeouts()) -> int:
    """Post `body` and return the status, which is 2xx. It alone decides; the rest of the answer does not.

    Raises NotDelivered (a bad URL, a redirect, 4xx) or TryAgain (429, 5xx, time-outs, network errors).
    Messages name the host only: the path of a webhook often is a secret.
    """
    target = _checked(url)
    limits = httpx.Timeout(timeouts.read, connect=timeouts.connect)
    started_s = time.monotonic()
    try:
        with shared_client().stream("POST", target, content=body, headers=headers, timeout=limits) as answer:
            excerpt = _excerpt(answer, started_s + timeouts.total)
    except httpx.TimeoutException as error:
        raise TryAgain(f"{target.host} did not answer in time: {type(error).__name__}") from error
    except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
        raise TryAgain(f"{target.host} cannot be reached: {error or type(error).__name__}") from error
    _judge(target.host, answer, excerpt)
    return answer.status_code


def _checked(url: str) -> httpx.URL:
    try:
        target = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise NotDelivered(f"the URL is not valid: {error}") from error
    if target.scheme not in ("http", "https") or not target.host:
        raise NotDelivered(
            f"expected http://… or https://…, found scheme {target.scheme!r} and host {target.host!r}"
        )
    return target


def _judge(host: str, answer: httpx.Response, excerpt: str) -> None:
    status = answer.status_code
    if answer.is_success:
        return
    said = f"{host} answered {status}" + (f": {excerpt!r}" if excerpt else "")
    if status == 429 or answer.is_server_error:
        raise TryAgain(said, retry_after_s(answer.headers.get("Retry-After"), time.time()))
    if answer.is_redirect:
        said += "; redirects are not followed, name the final URL"
    raise NotDelivered(said)


def _excerpt(answer: httpx.Response, until_s: float) -> str:
    """The beginning of the body as text. Reading ends at the size limit, at `until_s`, or when it fails."""
    received = bytearray()
    try:
        for chunk in answer.iter_raw():  # raw: a compressed body could unfold without end
            received += chunk
            if len(received) > MAX_RESPONSE_BYTES or time.monotonic() > until_s:
                break
    except httpx.TransportError:
        pass  # the status came through, and it alone decides
    return bytes(received[: EXCERPT_CHARS * 4]).decode(errors="replace")[:EXCERPT_CHARS].strip()


def retry_after_s(value: str | None, now_s: float) -> int | None:
    """Seconds to wait by a Retry-After header (seconds or an HTTP date), None when absent or unreadable."""
    if not value:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(int(value[:6]), MAX_RETRY_AFTER_S)
    try:
        wait_s = parsedate_to_datetime(value).timestamp() - now_s
    except ValueError:
        return None
    return max(0, min(round(wait_s), MAX_RETRY_AFTER_S))
