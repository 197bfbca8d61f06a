"""Each rule of delivery, against a real server."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from taskd_webhooks.post import MAX_RESPONSE_BYTES, NotDelivered, Timeouts, TryAgain, post, retry_after_s
from taskd_webhooks.testing import Receiver, Reply, Request

HASTY = Timeouts(connect=1, read=0.1, total=0.3)


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_2xx_is_delivered(receiver: Receiver, status: int) -> None:
    receiver.answer = lambda request: Reply(status)
    assert post(f"{receiver.url}/hooks?a=1", b"{}", {"X-One": "1"}) == status
    (request,) = receiver.requests
    assert (request.path, request.body, request.headers["x-one"]) == ("/hooks?a=1", b"{}", "1")


def test_the_connection_is_reused(receiver: Receiver) -> None:
    for _ in range(3):
        post(receiver.url, b"{}", {})
    assert len({request.connection for request in receiver.requests}) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_5xx_and_429_are_worth_another_try(receiver: Receiver, status: int) -> None:
    receiver.answer = lambda request: Reply(status, b"busy")
    with pytest.raises(TryAgain, match=rf"127\.0\.0\.1 answered {status}: 'busy'") as caught:
        post(receiver.url, b"{}", {})
    assert caught.value.after_s is None


def test_retry_after_is_honoured(receiver: Receiver) -> None:
    receiver.answer = lambda request: Reply(503, headers={"Retry-After": "7"})
    with pytest.raises(TryAgain) as caught:
        post(receiver.url, b"{}", {})
    assert caught.value.after_s == 7


@pytest.mark.parametrize("status", [400, 401, 404, 410, 422])
def test_4xx_is_refused_for_good(receiver: Receiver, status: int) -> None:
    receiver.answer = lambda request: Reply(status, b"no such hook")
    with pytest.raises(NotDelivered, match=f"answered {status}: 'no such hook'"):
        post(receiver.url, b"{}", {})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(receiver: Receiver, status: int) -> None:
    receiver.answer = lambda request: Reply(status, headers={"Location": receiver.url + "/elsewhere"})
    with pytest.raises(NotDelivered, match="redirects are not followed"):
        post(receiver.url, b"{}", {})
    assert len(receiver.requests) == 1


def test_messages_do_not_show_the_path_of_the_url(receiver: Receiver) -> None:
    receiver.answer = lambda request: Reply(400)
    with pytest.raises(NotDelivered) as caught:
        post(receiver.url + "/hooks/s3cret?token=s3cret", b"{}", {})
    assert "s3cret" not in str(caught.value)


def test_a_silent_receiver_is_worth_another_try(receiver: Receiver) -> None:
    over = threading.Event()

    def silent(request: Request) -> Reply:
        over.wait(10)
        return Reply()

    receiver.answer = silent
    with pytest.raises(TryAgain, match="in time: ReadTimeout"):
        post(receiver.url, b"{}", {}, HASTY)
    over.set()


def test_nobody_there_is_worth_another_try() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(TryAgain, match="cannot be reached"):
        post(f"http://127.0.0.1:{port}/", b"{}", {})


def test_a_receiver_that_hangs_up_is_worth_another_try() -> None:
    def hang_up(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65_536)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=hang_up, args=[server])
        thread.start()
        with pytest.raises(TryAgain, match="cannot be reached"):
            post(f"http://127.0.0.1:{server.getsockname()[1]}/", b"{}", {})
        thread.join()


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "file:///etc/passwd", "host/path", "http://", "", "http://[::1"]
)
def test_other_urls_are_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(NotDelivered, match=r"expected http|not valid"):
        post(url, b"{}", {})


def test_an_endless_answer_is_cut_off(receiver: Receiver) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 500 * MAX_RESPONSE_BYTES:
            sent += MAX_RESPONSE_BYTES
            yield b"x" * MAX_RESPONSE_BYTES

    receiver.answer = lambda request: Reply(400, endless())
    with pytest.raises(NotDelivered) as caught:
        post(receiver.url, b"{}", {})
    assert len(str(caught.value)) < 300
    assert sent < 500 * MAX_RESPONSE_BYTES


def test_an_answer_that_trickles_is_cut_off_and_its_status_counts(receiver: Receiver) -> None:
    over = threading.Event()

    def trickle() -> Iterator[bytes]:
        while not over.wait(0.02):
            yield b"."

    receiver.answer = lambda request: Reply(200, trickle())
    assert post(receiver.url, b"{}", {}, HASTY) == 200
    over.set()


def test_a_compressed_answer_is_not_unfolded(receiver: Receiver) -> None:
    bomb = gzip.compress(b"0" * 10_000_000)
    receiver.answer = lambda request: Reply(500, bomb, {"Content-Encoding": "gzip"})
    with pytest.raises(TryAgain) as caught:
        post(receiver.url, b"{}", {})
    assert "0000" not in str(caught.value)


NOW_S = 1_767_225_600


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("0", 0),
        (" 30 ", 30),
        ("9" * 40, 3_600),
        (format_datetime(datetime.fromtimestamp(NOW_S + 90, UTC), usegmt=True), 90),
        (format_datetime(datetime.fromtimestamp(NOW_S - 90, UTC), usegmt=True), 0),
        (format_datetime(datetime.fromtimestamp(NOW_S + 90_000, UTC), usegmt=True), 3_600),
    ],
)
def test_retry_after(value: str | None, expected: int | None) -> None:
    assert retry_after_s(value, NOW_S) == expected
