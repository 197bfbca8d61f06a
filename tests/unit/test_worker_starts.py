"""What began in a child is known by looking, in the right order with what the child reports."""

from __future__ import annotations

import mmap
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.worker import entry_note
from taskd.worker import entry_pipe as pipe
from taskd.worker.starts import LASTS_S, LOOK_AFTER_MOST_S, LOOK_AFTER_S, Starts

ON_TIMEOUT = pipe.Verdict(2, "timeout")
INF = float("inf")


def done(number: int) -> pipe.Done:
    return pipe.Done(number, pipe.COMPLETE, 1)


def memory() -> mmap.mmap:
    return mmap.mmap(-1, entry_note.NOTE_BYTES)


# ---- the note


verdicts = st.builds(
    pipe.Verdict,
    st.integers(1, 4),
    st.just("timeout"),
    st.just(""),
    st.none() | st.integers(0, 2**63 - 1),
    st.none() | st.integers(0, 2**63 - 1),
)


@given(st.integers(1, 2**64 - 1), verdicts, st.booleans())
def test_a_note_says_what_the_report_would_have_said(number: int, verdict: pipe.Verdict, quiet: bool) -> None:
    shared = memory()
    assert entry_note.read(shared) is None
    begun_ns = time.monotonic_ns()
    assert entry_note.write(shared, pipe.Started(number, verdict, quiet), begun_ns)
    read = entry_note.read(shared)
    assert read is not None
    assert read[:3] == (number, verdict, quiet)
    assert 0 <= read.ago_s < 60


@pytest.mark.parametrize(
    "verdict",
    [
        ON_TIMEOUT._replace(reason="error"),
        ON_TIMEOUT._replace(error="why"),
        ON_TIMEOUT._replace(max_attempts=2**63),
        ON_TIMEOUT._replace(delay_on_retry_s=2**63),
    ],
)
def test_what_does_not_fit_is_not_noted(verdict: pipe.Verdict) -> None:
    shared = memory()
    assert not entry_note.write(shared, pipe.Started(7, verdict), 1)
    assert entry_note.read(shared) is None


def test_a_note_of_which_a_part_is_written_is_none() -> None:
    shared, next_one = memory(), memory()
    entry_note.write(shared, pipe.Started(1, ON_TIMEOUT), 1)
    entry_note.write(next_one, pipe.Started(2, ON_TIMEOUT._replace(delay_on_retry_s=5), True), 2)
    for size in range(8, entry_note.NOTE_BYTES, 8):
        shared[:size] = next_one[:size]
        assert entry_note.read(shared) is None, size
    shared[:] = next_one[:]
    assert entry_note.read(shared) is not None


def test_a_note_that_changes_while_it_is_read_is_none() -> None:
    first, second = memory(), memory()
    entry_note.write(first, pipe.Started(1, ON_TIMEOUT), 1)
    entry_note.write(second, pipe.Started(1, ON_TIMEOUT), 2)

    class Changing:
        readings = 0

        def __getitem__(self, part: slice) -> bytes:
            self.readings += 1
            return (first if self.readings == 1 else second)[part]

    assert entry_note.read(Changing()) is None  # type: ignore[arg-type]


# ---- looking


class Scene:
    """A child that got `given` pieces of work at second 0."""

    def __init__(self, given: int = 3) -> None:
        self._shared = memory()
        self.starts = Starts(self._shared)
        self.starts.given(given, 0.0)

    def begins(self, number: int, ago_s: float = 2 * LASTS_S) -> None:
        begun_ns = time.monotonic_ns() - int(ago_s * 1e9)
        assert entry_note.write(self._shared, pipe.Started(number, ON_TIMEOUT), begun_ns)

    def look_and_hear(self, now: float, *reports: pipe.Report) -> list[tuple[str, int]]:
        """Kinds and numbers of what is told."""
        told = self.starts.heard(reports, self.starts.look(now), now)
        return [
            (type(report).__name__, report.number) for report in told if not isinstance(report, pipe.Ready)
        ]


def test_an_idle_child_is_not_looked_at() -> None:
    starts = Starts(memory())
    assert starts.look_at == INF
    starts.given(2, 5.0)
    assert starts.look_at == 5.0 + LOOK_AFTER_S
    starts.heard([done(1), done(2)], None, 5.1)
    assert starts.look_at == INF


def test_quick_tasks_are_told_by_their_reports_alone() -> None:
    scene = Scene()
    scene.begins(1)
    assert scene.look_and_hear(LOOK_AFTER_S / 2) == [], "it is not time to look"
    assert scene.look_and_hear(LOOK_AFTER_S / 2, done(1)) == [("Done", 1)]
    scene.begins(2)
    assert scene.look_and_hear(LOOK_AFTER_S * 2, done(2)) == [("Done", 2)], "it was over when it was seen"


def test_one_that_lasts_is_told_once_and_nobody_looks_again_before_it_ended() -> None:
    scene = Scene()
    scene.begins(1, ago_s=0.5)
    found = scene.starts.look(LOOK_AFTER_S)
    assert found is not None
    assert 0.5 <= found.ago_s < 60
    scene.starts.tell(found)
    assert scene.starts.look_at == INF
    assert scene.look_and_hear(1.0) == []
    assert scene.starts.look(1.0, early=True) is None
    assert scene.look_and_hear(1.0, done(1)) == [("Done", 1)]
    assert scene.starts.look_at == 1.0 + LOOK_AFTER_S


def test_one_that_just_began_is_looked_at_again_soon() -> None:
    scene = Scene()
    scene.begins(1, ago_s=0.0)
    found = scene.starts.look(1.0)
    assert found is not None
    assert 1.0 <= scene.starts.look_at <= 1.0 + LASTS_S


def test_the_end_of_one_is_told_before_the_start_of_the_next() -> None:
    scene = Scene()
    scene.begins(2)
    assert scene.look_and_hear(1.0, done(1)) == [("Done", 1), ("Started", 2)]


def test_what_ended_between_the_look_and_the_reading_is_not_told_as_begun() -> None:
    scene = Scene()
    scene.begins(2)
    assert scene.look_and_hear(1.0, done(1), done(2)) == [("Done", 1), ("Done", 2)]


def test_a_sign_of_life_brings_the_start_with_it() -> None:
    scene = Scene()
    scene.begins(2, ago_s=0.0)
    beat = pipe.Heartbeat(2, 0.5, "")
    assert scene.look_and_hear(0.0, done(1), beat, beat) == [
        ("Done", 1),
        ("Started", 2),
        ("Heartbeat", 2),
        ("Heartbeat", 2),
    ]
    assert scene.starts.look_at == INF


def test_a_sign_of_life_of_one_that_is_over_brings_no_start() -> None:
    scene = Scene()
    scene.begins(2)
    assert scene.look_and_hear(0.0, pipe.Heartbeat(1), done(1)) == [("Heartbeat", 1), ("Done", 1)]


def test_a_start_that_did_not_fit_is_told_by_the_child() -> None:
    scene = Scene()
    assert scene.look_and_hear(0.0, pipe.Started(1, ON_TIMEOUT)) == [("Started", 1)]
    assert scene.starts.look_at == INF
    scene.look_and_hear(1.0, done(1))
    assert scene.starts.look_at == 1.0 + LOOK_AFTER_S


def test_what_was_taken_back_is_not_waited_for() -> None:
    scene = Scene(given=3)
    scene.starts.taken_back(2)
    scene.look_and_hear(1.0, done(1))
    assert scene.starts.look_at == INF
    scene.starts.given(1, 2.0)
    assert scene.starts.look_at == 2.0 + LOOK_AFTER_S
    scene.begins(4)
    assert scene.look_and_hear(3.0) == [("Started", 4)]


def test_what_was_taken_back_before_is_not_waited_for_either() -> None:
    scene = Scene(given=10)
    scene.starts.taken_back(6)
    scene.look_and_hear(1.0, *map(done, range(1, 4)))
    scene.starts.given(2, 1.0)
    scene.starts.taken_back(2)
    assert scene.starts.look_at < INF, "the fourth"
    scene.look_and_hear(1.0, done(4))
    assert scene.starts.look_at == INF
    scene.starts.given(2, 2.0)
    scene.starts.taken_back(8)
    scene.look_and_hear(2.0)
    assert scene.starts.look(3.0) is None
    assert scene.starts.look_at == INF
    scene.starts.given(1, 4.0)
    assert scene.starts.look_at == 4.0 + LOOK_AFTER_S
    scene.begins(15)
    assert scene.look_and_hear(5.0) == [("Started", 15)]


@given(st.lists(st.tuples(st.sampled_from(("give", "take", "end")), st.integers(1, 9))))
def test_a_child_is_looked_at_exactly_while_it_has_something(events: list[tuple[str, int]]) -> None:
    starts = Starts(memory())
    given_count, inside = 0, set[int]()
    for what, count in events:
        if what == "give":
            starts.given(count, 0.0)
            inside |= set(range(given_count + 1, given_count + count + 1))
            given_count += count
        elif what == "take" and count <= given_count:
            gone = range(given_count - count + 1, given_count + 1)
            if inside and min(inside) in gone:
                continue  # that one began
            starts.taken_back(count)
            inside -= set(gone)
        elif what == "end" and inside:
            starts.heard([done(min(inside))], None, 0.0)
            inside.remove(min(inside))
        starts.look(0.0, early=True)  # notices when there is nothing any more
        assert (starts.look_at < INF) == bool(inside)


def test_looks_at_a_child_that_begins_nothing_get_rare() -> None:
    scene = Scene()
    gaps = []
    for _ in range(8):
        now = scene.starts.look_at
        assert scene.starts.look(now) is None
        gaps.append(scene.starts.look_at - now)
    assert gaps == pytest.approx([0.006, 0.012, 0.024, 0.048, 0.05, 0.05, 0.05, 0.05])
    assert gaps[-1] == pytest.approx(LOOK_AFTER_MOST_S)


def test_a_child_that_reports_its_starts_is_not_looked_at() -> None:
    starts = Starts(None)
    starts.given(5, 0.0)
    assert starts.look_at == INF
    beat = pipe.Heartbeat(3)
    assert starts.look(1.0, early=True) is None
    assert starts.heard([done(2), beat, done(1)], None, 1.0) == [done(2), beat, done(1)]
    assert starts.look_at == INF
