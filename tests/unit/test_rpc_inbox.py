"""Messages out of data cut anywhere, and what of the window is given back when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskd.rpc.inbox import PREFIX, Inbox


def framed(*bodies: bytes) -> bytes:
    return b"".join(PREFIX.pack(0, len(body)) + body for body in bodies)


def taken(inbox: Inbox) -> list[bytes]:
    bodies = []
    while (body := inbox.take()) is not None:
        bodies.append(body)
    return bodies


@given(
    bodies=st.lists(st.binary(max_size=40)),
    cuts=st.lists(st.integers(1, 30), min_size=1),
    takes=st.lists(st.booleans(), min_size=1),
)
def test_every_cut_gives_the_same_messages_and_all_the_window_back(
    bodies: list[bytes], cuts: list[int], takes: list[bool]
) -> None:
    given_back: list[int] = []
    inbox = Inbox(1000, given_back.append)
    data, received, number = framed(*bodies), [], 0
    while data:
        chunk, data = data[: cuts[number % len(cuts)]], data[cuts[number % len(cuts)] :]
        inbox.add(chunk, len(chunk) + 3)  # three bytes of padding
        if takes[number % len(takes)]:
            received += taken(inbox)
        number += 1
    inbox.eof()
    received += taken(inbox)
    assert received == bodies
    assert inbox.finished
    assert sum(given_back) == len(framed(*bodies)) + 3 * number
    assert inbox.unacked_size() == 0


@given(cuts=st.lists(st.integers(1, 50), min_size=1))
def test_a_reader_that_does_not_read_holds_the_window(cuts: list[int]) -> None:
    """Only the first message's part is given back early; everything behind it waits."""
    given_back: list[int] = []
    inbox = Inbox(1000, given_back.append)
    data = framed(b"x" * 100) * 5
    total = len(data)
    for number in range(total):
        size = cuts[number % len(cuts)]
        chunk, data = data[:size], data[size:]
        if chunk:
            inbox.add(chunk, len(chunk))
    assert sum(given_back) <= 105
    assert inbox.unacked_size() == total - sum(given_back)


def test_what_is_too_large_is_judged_by_its_prefix_and_not_kept() -> None:
    given_back: list[int] = []
    inbox = Inbox(10, given_back.append)
    inbox.add(framed(b"fits") + PREFIX.pack(0, 11), 14)
    inbox.add(b"x" * 11, 11)
    assert inbox.take() == b"fits"
    assert inbox.take() is None
    assert inbox.fault is not None
    assert inbox.fault.code == "RESOURCE_EXHAUSTED"
    assert sum(given_back) == 25


def test_an_end_in_the_middle_is_a_fault() -> None:
    inbox = Inbox(10, lambda size: None)
    inbox.add(framed(b"whole") + b"\x00\x00", 12)
    inbox.eof()
    assert inbox.take() == b"whole"
    assert not inbox.finished
    assert inbox.fault is not None
    assert inbox.fault.code == "INTERNAL"
