"""What waits for a slot, and the accounts behind it. Nothing here waits; slots and links do.

Async tasks have a queue of their own, so neither kind ever stands in the other's way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import structlog

from taskd.wire.frames import Assignment, LeaseRef, lease_ref
from taskd.worker.results import DEFAULT_DEADLINE_MS, Account, Job
from taskd.worker.routing import AsyncTasks

log = structlog.get_logger("taskd.worker")

ASYNC_WEIGHT = 0.05  # of the newest activation in the share of async ones
PATIENCE_S = 2.0  # longer than this nothing waits here behind slow tasks while another worker may be free


class Backlog:
    """Work that is assigned to this worker and not yet in a child.

    `on_work`: called when something can be taken; `on_news`: when a link has something to send;
    `on_stop`: when work that is in a child was stopped. Without `hands_back`, the protocol cannot give
    work back: then everything that came is run, also once this is closed.
    """

    def __init__(
        self,
        on_work: Callable[[], None],
        on_news: Callable[[], None],
        on_stop: Callable[[], None],
        *,
        hands_back: bool = True,
    ) -> None:
        self.accounts: dict[str, Account] = {}
        self.closed = False
        self.reserved = 0  # slots for what calls under way may bring
        self._hands_back = hands_back
        self.async_tasks = AsyncTasks()  # what async slots run
        self.async_share = 0.5  # of what came lately
        self._waiting: deque[Job] = deque()
        self._waiting_async: deque[Job] = deque()
        self._on_work = on_work
        self._on_news = on_news
        self._on_stop = on_stop

    def __len__(self) -> int:
        return len(self._waiting) + len(self._waiting_async)

    @property
    def async_count(self) -> int:
        """Async activations that wait."""
        return len(self._waiting_async)

    @property
    def jobs_count(self) -> int:
        """Everything this worker has, or may be given any moment, and has not finished."""
        return self.reserved + sum(len(account.jobs) for account in self.accounts.values())

    @property
    def running(self) -> list[str]:
        """The ids of what runs."""
        return [lease.id for account in self.accounts.values() for lease in account.running]

    @property
    def untaken_count(self) -> int:
        return sum(len(account.untaken) for account in self.accounts.values())

    @property
    def longest_s(self) -> float:
        """The longest deadline of what waits; 0 when nothing does."""
        return max((job.deadline_s for queue in self._queues for job in queue), default=0.0)

    @property
    def _queues(self) -> tuple[deque[Job], deque[Job]]:
        return self._waiting, self._waiting_async

    @property
    def settled(self) -> bool:
        return all(account.settled for account in self.accounts.values())

    def account(self, store_id: str) -> Account:
        return self.accounts.setdefault(store_id, Account(store_id))

    def accept(self, account: Account, assignments: Iterable[Assignment], now: float) -> None:
        gives_back, looks = self._gives_back, bool(self.async_tasks)
        for id_, fence, activation, deadline_ms, expires_in_ms in assignments:
            expires_at = None if expires_in_ms is None else now + expires_in_ms / 1000
            deadline_s = (deadline_ms or DEFAULT_DEADLINE_MS) / 1000
            job = Job(account, lease_ref((id_, fence)), activation, deadline_s, expires_at, now)
            if looks:
                job.is_async = self.is_async(activation)
                self.async_share += ASYNC_WEIGHT * (job.is_async - self.async_share)
            if not account.accept(job):
                log.warning("assigned twice", id=id_, fence=fence)
            elif gives_back:
                account.hand_back(job)
            elif job.is_async:
                self._waiting_async.append(job)
            else:
                self._waiting.append(job)
        self._on_news() if gives_back else self._on_work()

    def take(self, most: int, slots: int, now: float) -> list[Job]:
        """The next jobs for one of `slots`: its fair share, at most `most`, and only what may still start."""
        fair = -(-len(self._waiting) // slots)
        return self._take(self._waiting, min(most, fair), now)

    def take_async(self, most: int, now: float) -> list[Job]:
        """The next async jobs, at most `most`, and only what may still start."""
        return self._take(self._waiting_async, most, now)

    def _take(self, queue: deque[Job], most: int, now: float) -> list[Job]:
        jobs: list[Job] = []
        while queue and len(jobs) < most:
            job = queue.popleft()
            if self._may_start(job, now):
                jobs.append(job)
        return jobs

    def _queue(self, job: Job) -> deque[Job]:
        return self._waiting_async if job.is_async else self._waiting

    def is_async(self, activation: bytes) -> bool:
        """Whether only an async child can run it."""
        return self.async_tasks.calls(activation)

    def stop(self, account: Account, leases: Iterable[LeaseRef]) -> None:
        """Forget those that wait, and mark those that are in a child: `on_stop` looks for them."""
        stopped = [job for lease in leases if (job := account.jobs.get(lease)) is not None]
        for job in stopped:
            job.stopped = True
        waiting = [job for queue in self._queues for job in queue if job.stopped]
        for job in waiting:
            self._queue(job).remove(job)
            account.forget(job)
        if waiting:
            self._on_news()  # there is room for other work
        if len(waiting) < len(stopped):
            self._on_stop()

    def break_off(self, why: str) -> None:
        """Stop everything that is in a child; the store is told `why`, and hands it out again."""
        for queue in self._queues:
            for job in queue:  # where the protocol takes nothing back, and it was to be run after all
                job.account.hand_back(job)
            queue.clear()
        for account in self.accounts.values():
            for job in account.jobs.values():
                if not job.stopped:
                    job.stopped, job.broken_off = True, why
        self._on_stop()

    def lapse(self, account: Account) -> None:
        """Nobody knows whether its leases are still this worker's: what waits is not begun here any more."""
        for queue in self._queues:
            for job in [job for job in queue if job.account is account]:
                queue.remove(job)
                account.hand_back(job)
        self._on_news()

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Jobs a child did not start go before all others: they came first."""
        stopped = [job for job in jobs if job.stopped and not job.broken_off]
        for job in stopped:
            job.account.forget(job)
        if stopped:
            self._on_news()  # there is room for other work
        jobs = [job for job in jobs if job not in stopped]
        if self._gives_back:
            for job in jobs:
                job.account.hand_back(job)
            self._on_news()
        else:
            for job in reversed(jobs):
                self._queue(job).appendleft(job)
            self._on_work()

    def hand_back_late(self, now: float) -> None:
        """Give back what waited longer than `PATIENCE_S`."""
        for queue in self._queues:
            while self._hands_back and queue and now - queue[0].waiting_since >= PATIENCE_S:
                job = queue.popleft()
                if self._may_start(job, now):
                    job.account.hand_back(job)
                    self._on_news()

    def close(self) -> None:
        """Hand back everything that waits, and whatever comes from now on."""
        self.closed = True
        if self._hands_back:
            for queue in self._queues:
                for job in queue:
                    job.account.hand_back(job)
                queue.clear()
        self._on_news()

    @property
    def _gives_back(self) -> bool:
        return self.closed and self._hands_back

    def _may_start(self, job: Job, now: float) -> bool:
        """Whether to start it; what may not start is handed back, and the broker judges that by its fence."""
        if now > job.account.lease_until:
            # Silent for so long, somebody else may have it by now. If not, nobody would ever end this lease.
            log.info("lease over before start", id=job.lease.id, store_id=job.account.store_id)
        elif job.expires_at is None or now < job.expires_at:
            return True
        job.account.hand_back(job)
        self._on_news()
        return False
