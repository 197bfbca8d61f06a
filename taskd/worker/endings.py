"""What becomes of a job that ended: a result in its account, a line in the log, a count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import structlog

from taskd.telemetry import metrics
from taskd.wire.frames import Result, ResultStatus
from taskd.worker import entry_pipe as pipe
from taskd.worker.results import Job

log = structlog.get_logger("taskd.worker")

_completed = metrics.worker_tasks.labels("complete")
_result_of = partial(tuple.__new__, Result)  # as frames.lease_ref


def end_completed(jobs: Sequence[Job]) -> None:
    """As `end`, for any number of jobs that completed: most do, and there is little to say of them."""
    stopped_count = 0
    for job in jobs:
        if job.stopped and not job.broken_off:
            stopped_count += 1
            end(job, pipe.COMPLETE)
        else:
            id_, fence = job.lease
            result = _result_of((id_, fence, ResultStatus.COMPLETE, "", "", None, None))
            job.account.finish(job, result)
    _completed.inc(len(jobs) - stopped_count)


def end(job: Job, verdict: pipe.Verdict, *, quiet: bool = False) -> None:
    """Owe the store this outcome. Nothing of a job that was stopped: nobody waits for it any more.

    One that was broken off runs again, unless it completed all the same.
    """
    if verdict == pipe.COMPLETE and not job.stopped:
        end_completed((job,))
        return
    if job.broken_off and verdict.status != ResultStatus.COMPLETE:
        verdict, quiet = pipe.Verdict(ResultStatus.INTERRUPTED, "drained", job.broken_off), False
    elif job.stopped and not job.broken_off:
        job.account.forget(job)
        metrics.worker_tasks.labels("stopped").inc()
        return
    status = ResultStatus(verdict.status)
    result = Result(
        *job.lease, status, verdict.reason, verdict.error, verdict.max_attempts, verdict.delay_on_retry_s
    )
    if status is ResultStatus.CRASHED:
        job.account.crash(job, result)
    else:
        job.account.finish(job, result)
    metrics.worker_tasks.labels(status.name.lower()).inc()
    if status is not ResultStatus.COMPLETE and not quiet:
        log.warning(
            "task did not complete",
            id=job.lease.id,
            status=status.name.lower(),
            reason=verdict.reason,
            error=verdict.error,
        )
