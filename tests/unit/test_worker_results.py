"""What a worker owes to a store, whatever becomes of connections."""

from __future__ import annotations

from taskd.wire.frames import (
    Assignment,
    HandBack,
    Heartbeat,
    LeaseRef,
    Result,
    Results,
    ResultStatus,
    Started,
    TaskProgress,
)
from taskd.worker.backlog import Backlog
from taskd.worker.results import MAX_RESULTS_PER_FRAME, Account, Job


def job(account: Account, id_: str, fence: int = 1) -> Job:
    made = Job(account, LeaseRef(id_, fence), b"", 10, None, 0)
    assert account.accept(made)
    return made


def complete(id_: str, fence: int = 1) -> Result:
    return Result(id_, fence, ResultStatus.COMPLETE)


def test_a_result_implies_its_start() -> None:
    account = Account("s")
    quick, slow = job(account, "quick"), job(account, "slow")
    account.start(quick)
    account.start(slow)
    account.finish(quick, complete("quick"))
    assert account.news() == [Started((slow.lease,)), Results((complete("quick"),))]
    account.finish(slow, complete("slow"))
    assert account.news() == [Results((complete("slow"),))]
    assert account.news() == []


def test_a_crash_tells_its_start_once() -> None:
    account = Account("s")
    told, untold = job(account, "told"), job(account, "untold")
    account.start(told)
    account.news()
    for crashed in (told, untold):
        account.crash(crashed, Result(crashed.lease.id, 1, ResultStatus.CRASHED))
    started, results = account.news()
    assert started == Started((untold.lease,))
    assert isinstance(results, Results)
    assert len(results.results) == 2


def test_everything_is_told_anew_after_a_lost_connection() -> None:
    account = Account("s")
    running, done, back = job(account, "running"), job(account, "done"), job(account, "back")
    account.start(running)
    account.start(done)
    account.finish(done, complete("done"))
    account.hand_back(back)
    first = account.news()
    assert HandBack((back.lease,)) in first
    account.connection_lost()
    assert set(account.holding) == {running.lease, done.lease, back.lease}
    assert account.news() == [
        Started((running.lease,)),
        Results((complete("done"),)),
        HandBack((back.lease,)),
    ]


def test_taken_results_are_forgotten() -> None:
    account = Account("s")
    done = job(account, "done")
    account.finish(done, complete("done"))
    account.news()
    assert not account.settled
    account.taken([done.lease, LeaseRef("unknown", 7)])
    assert account.settled
    account.connection_lost()
    assert account.holding == ()
    assert account.news() == []


def test_a_lease_is_accepted_once() -> None:
    account = Account("s")
    first = job(account, "a")
    assert not account.accept(first)
    account.finish(first, complete("a"))
    assert not account.accept(first)
    job(account, "a", fence=2)


def test_frames_of_results_are_bounded() -> None:
    account = Account("s")
    for number in range(MAX_RESULTS_PER_FRAME + 1):
        account.finish(job(account, str(number)), complete(str(number)))
    assert [len(frame.results) for frame in account.news() if isinstance(frame, Results)] == [1024, 1]
    for number in range(400):
        result = Result(f"e{number}", 1, ResultStatus.FAILURE, "error", "x" * 4_000)
        account.finish(job(account, f"e{number}"), result)
    assert len(account.news()) == 2


def test_what_waited_beyond_its_lease_is_handed_back_not_forgotten() -> None:
    """A worker that was stopped for a while may come back before the broker missed it."""
    backlog = Backlog(lambda: None, lambda: None, lambda: None)
    account = backlog.account("s")
    backlog.accept(account, [Assignment("a", 1, b"", 10_000, None)], 0.0)
    account.lease_until = 30.0
    assert backlog.take(1, 1, 31.0) == []
    assert account.news() == [HandBack((LeaseRef("a", 1),))]


def test_room_made_by_a_stop_is_news_to_the_links() -> None:
    """Without, the worker would ask for no work until its next heartbeat."""
    news: list[str] = []
    backlog = Backlog(lambda: None, lambda: news.append("news"), lambda: None)
    account = backlog.account("s")
    backlog.accept(account, [Assignment(id_, 1, b"", 10_000, None) for id_ in ("waits", "begins")], 0.0)
    (begins,) = backlog.take(1, 2, 0.0)
    waits = LeaseRef("begins" if begins.lease.id == "waits" else "waits", 1)
    backlog.stop(account, [waits])
    assert news == ["news"]
    backlog.stop(account, [begins.lease])
    backlog.put_back([begins])
    assert news == ["news"] * 2
    assert backlog.jobs_count == 0


def test_progress_is_told_once_and_merged_until_then() -> None:
    account = Account("s")
    one, two = job(account, "one"), job(account, "two")
    account.heartbeat(one, 0.1, "has not begun: nothing to tell")
    account.start(one)
    account.start(two)
    account.heartbeat(one, 0.25, "a quarter")
    account.heartbeat(two, None, "")
    account.heartbeat(one, None, "still a quarter")
    assert account.has_news
    assert account.news() == [
        Started((one.lease, two.lease)),
        Heartbeat((TaskProgress("one", 1, 250, "still a quarter"), TaskProgress("two", 1))),
    ]
    assert account.news() == []
    account.heartbeat(one, 1.0, "")
    assert account.news() == [Heartbeat((TaskProgress("one", 1, 1000, "still a quarter"),))]


def test_the_newest_progress_of_what_runs_is_told_again_after_a_lost_connection() -> None:
    account = Account("s")
    runs, ended, stopped = job(account, "runs"), job(account, "ended"), job(account, "stopped")
    for each in (runs, ended, stopped):
        account.start(each)
        account.heartbeat(each, 0.5, "")
    account.news()
    account.finish(ended, complete("ended"))
    account.forget(stopped)
    account.connection_lost()
    assert account.news() == [
        Started((runs.lease,)),
        Heartbeat((TaskProgress("runs", 1, 500),)),
        Results((complete("ended"),)),
    ]
    account.heartbeat(runs, 0.9, "")
    account.finish(runs, complete("runs"))
    assert account.news() == [Results((complete("runs"),))]


def test_a_start_waits_for_the_result_once_and_is_told_then() -> None:
    account = Account("s")
    quick, slow = job(account, "quick"), job(account, "slow")
    account.start(slow)
    account.start(quick)
    assert account.news(starts=False) == []
    account.finish(quick, complete("quick"))
    assert account.news(starts=False) == [Started((slow.lease,)), Results((complete("quick"),))]
    assert account.news() == []


def test_what_waits_is_told_before_a_crash() -> None:
    account = Account("s")
    crashed, other = job(account, "crashed"), job(account, "other")
    account.start(crashed)
    account.finish(other, complete("other"))
    assert account.news(starts=False, results=False) == []
    assert not account.urgent
    account.crash(crashed, Result("crashed", 1, ResultStatus.CRASHED))
    assert account.urgent
    started, results = account.news(starts=False, results=False)
    assert started == Started((crashed.lease,))
    assert isinstance(results, Results)
    assert [result.id for result in results.results] == ["other", "crashed"]
    assert not account.urgent
