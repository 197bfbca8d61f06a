-- For operators' SQL, written for the table of this name in other brokers of this protocol: one row for each
-- activation that is not finished. Times are seconds since 1970, UTC. Made anew at every start, so it may be
-- changed here at any time; nothing of taskd reads it.
CREATE VIEW inflight_taskactivations AS
SELECT
  inflight.id,
  inflight.activation,
  inflight.topic,
  inflight.partition,
  inflight.offset,
  lane.namespace,
  inflight.taskname,
  lane.application,
  CASE inflight.status
    WHEN 1 THEN 'Pending'
    WHEN 2 THEN 'Delay'
    WHEN 3 THEN 'Pending'    -- parked: no pool that is connected knows its task
    WHEN 4 THEN 'Claimed'
    WHEN 5 THEN 'Processing'
    WHEN 6 THEN 'Complete'
    WHEN 7 THEN 'Retry'
    WHEN 11 THEN 'Pending'   -- on its way to another topic, still to be run
    ELSE 'Failure'           -- 8 failure, 9 expired, 10 dropped
  END AS status,
  inflight.received_at_ms / 1000 AS received_at,
  inflight.stored_at_ms / 1000 AS added_at,
  inflight.attempts AS processing_attempts,
  inflight.deadline_ms / 1000 AS processing_deadline_duration,
  CASE WHEN inflight.status = 5 THEN (inflight.started_at_ms + inflight.deadline_ms) / 1000 END
    AS processing_deadline,  -- NULL also while it waits for its START
  CASE WHEN inflight.status = 2 THEN inflight.due_at_ms / 1000 END AS delay_until,
  inflight.expires_at_ms / 1000 AS expires_at,
  inflight.at_most_once,
  CASE inflight.dead_letter WHEN 1 THEN 'Deadletter' ELSE 'Discard' END AS on_attempts_exceeded,
  inflight.retry_attempts
FROM inflight JOIN lane USING (lane)
WHERE inflight.status <> 12;
