-- Named statements, one after each "-- name:" line. Parameters are positional.
-- Status numbers: taskd/activation/lifecycle.py (1 pending, 2 delayed, 3 parked, 4 claimed, 5 processing,
-- 7 retry, 8 failure, 9 expired, 12 gone).

-- name: read_meta
SELECT value FROM meta WHERE name = ?

-- name: write_meta
INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value

-- name: lanes
SELECT lane, application, namespace, taskname FROM lane

-- name: add_lane
INSERT INTO lane (lane, application, namespace, taskname) VALUES (?, ?, ?, ?)

-- name: drop_lane
DELETE FROM lane WHERE lane = ?

-- name: drop_depths
DELETE FROM depth WHERE lane = ?

-- name: depths
SELECT lane, status, count FROM depth

-- name: relane
UPDATE inflight SET lane = ? WHERE row = ?

-- name: pools
SELECT holder, pool FROM worker

-- name: note_pool
INSERT INTO worker (holder, pool) VALUES (?, ?) ON CONFLICT (holder) DO UPDATE SET pool = excluded.pool

-- name: forget_pool
DELETE FROM worker WHERE holder = ?

-- name: count_held_by
SELECT count(*) FROM inflight WHERE status = 5 AND holder = ?

-- name: write_depth
INSERT INTO depth (lane, status, count) VALUES (?, ?, ?)
ON CONFLICT (lane, status) DO UPDATE SET count = excluded.count

-- name: recount
SELECT lane, status, count(*) FROM inflight GROUP BY lane, status

-- name: insert
INSERT INTO inflight (id, taskname, topic, partition, offset, record_key, activation, received_at_ms,
  stored_at_ms, due_at_ms, expires_at_ms, deadline_ms, retry_attempts, dead_letter, at_most_once, error,
  status, reason, lane, seq)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING

-- name: last_row
SELECT max(row) FROM inflight

-- name: row_of
SELECT row, lane FROM inflight WHERE id = ?

-- name: waiting_in_lane
SELECT row, id, activation, deadline_ms, expires_at_ms, at_most_once, dead_letter, received_at_ms, taskname
FROM inflight WHERE status = 1 AND lane = ? ORDER BY seq LIMIT ?

-- name: tasks_in_lane
SELECT row, seq, taskname FROM inflight WHERE status = 1 AND lane = ? AND seq > ? ORDER BY seq LIMIT ?

-- name: waiting_row
SELECT row, id, activation, deadline_ms, expires_at_ms, at_most_once, dead_letter, received_at_ms, taskname
FROM inflight WHERE row = ?

-- name: activation
SELECT activation FROM inflight WHERE row = ?

-- name: rows_after
SELECT row, status, lane, taskname, id, fence, holder FROM inflight WHERE row > ? ORDER BY row LIMIT ?

-- name: switches
SELECT switch, kind, application, namespace, taskname, conditions, reason, author, source, created_at_ms, until_ms
FROM switch

-- name: add_switch
INSERT INTO switch (kind, application, namespace, taskname, conditions, reason, author, source, created_at_ms,
  until_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: remove_switch
DELETE FROM switch WHERE switch = ?

-- name: hand_out
UPDATE inflight SET status = 5, fence = leases.value, lease_kind = ?, holder = ?, lease_end_mono_ms = ? + deadline_ms,
  attempts = attempts + ?, counted = ?, started = 0, started_at_ms = ?, started_mono_ms = ?
FROM json_each(?) AS leases WHERE row = CAST(leases.key AS INTEGER)

-- name: hand_out_run
UPDATE inflight SET status = 5, fence = row + ?, lease_kind = ?, holder = ?, lease_end_mono_ms = ? + deadline_ms,
  attempts = attempts + ?, counted = ?, started = 0, started_at_ms = ?, started_mono_ms = ?
WHERE row BETWEEN ? AND ?

-- name: claim
UPDATE inflight SET status = 4, fence = leases.value, lease_kind = ?, holder = NULL, lease_end_mono_ms = ?,
  counted = 0, started = 0, started_at_ms = NULL
FROM json_each(?) AS leases WHERE row = CAST(leases.key AS INTEGER)

-- name: pushed
UPDATE inflight SET status = 5, counted = 1, started = 1, attempts = attempts + 1, lease_end_mono_ms = ?,
  started_at_ms = ?
WHERE row = ?

-- name: claims_over
SELECT id FROM inflight WHERE status = 4 AND lease_end_mono_ms <= ? ORDER BY lease_end_mono_ms LIMIT ?

-- name: restart_claims
UPDATE inflight SET lease_end_mono_ms = ? WHERE status = 4

-- name: park
UPDATE inflight SET status = 3
WHERE row IN (SELECT row FROM inflight WHERE status = 1 AND lane = ? ORDER BY seq LIMIT ?) RETURNING row

-- name: park_row
UPDATE inflight SET status = 3, reason = 'unknown_task' WHERE row = ?

-- name: unpark_tasks
UPDATE inflight SET status = 1, reason = NULL
WHERE row IN (SELECT row FROM inflight WHERE status = 3 AND lane = ?
  AND taskname IN (SELECT value FROM json_each(?)) ORDER BY seq LIMIT ?) RETURNING row

-- name: unpark
UPDATE inflight SET status = 1, reason = NULL
WHERE row IN (SELECT row FROM inflight WHERE status = 3 AND lane = ? ORDER BY seq LIMIT ?) RETURNING row

-- name: leased
SELECT row, status, lane, fence, lease_kind, attempts, counted, started, at_most_once, dead_letter,
  deadline_ms, received_at_ms
FROM inflight WHERE id = ? AND status <> 12

-- name: start
UPDATE inflight SET started = 1, counted = 1, attempts = attempts + ?, lease_end_mono_ms = ?, started_at_ms = ?,
  started_mono_ms = ?
WHERE row = ?

-- name: start_held
UPDATE inflight SET started = 1, attempts = attempts + 1 - counted, counted = 1,
  lease_end_mono_ms = ? + deadline_ms, started_at_ms = ?, started_mono_ms = ?
FROM json_each(?) AS leases
WHERE row = CAST(leases.key AS INTEGER) AND lane = ? AND fence = leases.value AND status = 5 AND started = 0

-- name: complete_held
UPDATE inflight SET status = 12, outcome = 'complete', attempts = attempts + 1 - counted,
  started_at_ms = iif(started OR lease_kind = 1, started_at_ms, ?), finished_at_ms = ?,
  activation = NULL, record_key = NULL, holder = NULL, lease_end_mono_ms = NULL
FROM json_each(?) AS leases
WHERE row = CAST(leases.key AS INTEGER) AND lane = ? AND fence = leases.value AND status = 5

-- name: complete_run
UPDATE inflight SET status = 12, outcome = 'complete', attempts = attempts + 1 - counted,
  started_at_ms = iif(started OR lease_kind = 1, started_at_ms, ?), finished_at_ms = ?,
  activation = NULL, record_key = NULL, holder = NULL, lease_end_mono_ms = NULL
WHERE row BETWEEN ? AND ? AND lane = ? AND fence = row + ? AND +status = 5

-- name: extend
UPDATE inflight SET lease_end_mono_ms =
  max(lease_end_mono_ms, min(? + deadline_ms, ifnull(started_mono_ms, 0) + ?))
WHERE id = ?

-- name: crash
UPDATE inflight SET crashes = crashes + 1 WHERE row = ? RETURNING crashes

-- name: requeue
UPDATE inflight SET status = 1, attempts = attempts - ?, holder = NULL, counted = 0, started = 0,
  lease_end_mono_ms = NULL
WHERE row = ?

-- name: leave
UPDATE inflight SET status = ?, reason = ?, error = ?, retry_max_attempts = ?, retry_delay_s = ?, holder = NULL,
  lease_end_mono_ms = NULL
WHERE row = ?

-- name: gone
UPDATE inflight SET status = 12, outcome = ?, continued_as = ?, dead_lettered = ?, finished_at_ms = ?,
  reason = ?, error = ?, activation = NULL, record_key = NULL, holder = NULL, lease_end_mono_ms = NULL
WHERE row = ?

-- name: leases_over
SELECT id FROM inflight WHERE status = 5 AND lease_end_mono_ms <= ? ORDER BY lease_end_mono_ms LIMIT ?

-- name: held_by
SELECT id, fence FROM inflight WHERE status = 5 AND holder = ?

-- name: held
SELECT id FROM inflight WHERE status = 5 LIMIT ?

-- name: holders
SELECT DISTINCT holder FROM inflight WHERE status = 5 AND holder IS NOT NULL

-- name: restart_leases
UPDATE inflight SET lease_end_mono_ms = ? + deadline_ms, started_mono_ms = ?
WHERE status = 5 AND lease_end_mono_ms IS NOT NULL

-- name: due
SELECT row, lane FROM inflight WHERE status = 2 AND due_at_ms <= ? ORDER BY due_at_ms LIMIT ?

-- name: become_due
UPDATE inflight SET status = 1, seq = ? WHERE row = ?

-- name: expiring
SELECT row, status, lane, dead_letter FROM inflight
WHERE expires_at_ms IS NOT NULL AND status <= 3 AND expires_at_ms <= ?
ORDER BY expires_at_ms LIMIT ?

-- name: leaving
SELECT row, id, status, activation, record_key, topic, partition, offset, retry_attempts, attempts,
  dead_letter, retry_max_attempts, retry_delay_s, reason, error, lane, received_at_ms, forward_topic
FROM inflight WHERE status BETWEEN 7 AND 11 AND stuck IS NULL AND (status <> 11 OR reason <> 'demoted')
ORDER BY row LIMIT ?

-- name: demoted
SELECT row, id, status, activation, record_key, topic, partition, offset, retry_attempts, attempts,
  dead_letter, retry_max_attempts, retry_delay_s, reason, error, lane, received_at_ms, forward_topic
FROM inflight WHERE status BETWEEN 7 AND 11 AND stuck IS NULL AND status = 11 AND reason = 'demoted'
ORDER BY row LIMIT ?

-- name: left
SELECT id, status, stuck FROM inflight WHERE status <> 12 LIMIT ?

-- name: pending_in_lane
SELECT row FROM inflight WHERE status = 1 AND lane = ? ORDER BY seq LIMIT ?

-- name: parked_in_lane
SELECT row FROM inflight WHERE status = 3 AND lane = ? ORDER BY seq LIMIT ?

-- name: delayed
SELECT row, lane FROM inflight WHERE status = 2 ORDER BY due_at_ms LIMIT ?

-- name: forward
UPDATE inflight SET status = ?, forward_topic = ?, reason = ? WHERE row = ?

-- name: settling
SELECT row, status, lane, reason, error FROM inflight WHERE id = ? AND status <> 12

-- name: stick
UPDATE inflight SET stuck = ? WHERE id = ? AND status <> 12

-- name: forbidden
SELECT id, stuck FROM inflight WHERE row IN (
  SELECT min(row) FROM inflight WHERE stuck >= 'forbidden: ' AND stuck < 'forbidden;' AND status <> 12
  GROUP BY stuck)

-- name: unstick
UPDATE inflight SET stuck = NULL WHERE row IN (
  SELECT row FROM inflight WHERE stuck = ? AND status <> 12 LIMIT ?)

-- name: cancelling
SELECT row, status, lane, fence, holder, outcome, continued_as, retry_attempts FROM inflight WHERE id = ?

-- name: forgettable
SELECT row, lane FROM inflight WHERE status = 12 AND finished_at_ms <= ? ORDER BY finished_at_ms LIMIT ?

-- name: oldest_gone
SELECT row, lane FROM inflight WHERE status = 12 ORDER BY finished_at_ms LIMIT ?

-- name: forget
DELETE FROM inflight WHERE row IN (SELECT value FROM json_each(?))

-- name: by_partition
SELECT topic, partition, status, count(*) FROM (
  SELECT topic, partition, status FROM inflight WHERE status = 1
  UNION ALL SELECT topic, partition, status FROM inflight WHERE status = 2
  UNION ALL SELECT topic, partition, status FROM inflight WHERE status = 3
  UNION ALL SELECT topic, partition, status FROM inflight WHERE status = 4
  UNION ALL SELECT topic, partition, status FROM inflight WHERE status = 5
  UNION ALL SELECT topic, partition, status FROM inflight WHERE status BETWEEN 7 AND 11 AND stuck IS NULL
) GROUP BY topic, partition, status

-- name: taskname
SELECT taskname FROM inflight WHERE row = ?

-- name: id_of
SELECT id FROM inflight WHERE row = ?

-- name: describe
SELECT id, status, outcome, continued_as, dead_lettered, attempts, received_at_ms, finished_at_ms, reason, error,
  CASE WHEN status <> 12 THEN stuck END, holder, fence, started_at_ms, lease_end_mono_ms, lane, taskname
FROM inflight WHERE id = ?
