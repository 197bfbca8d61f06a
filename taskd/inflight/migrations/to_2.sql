-- From version 1: what leaves may also be forwarded, so the index of what leaves covers it.
ALTER TABLE inflight ADD COLUMN forward_topic TEXT;
DROP INDEX inflight_leaving;
CREATE INDEX inflight_leaving ON inflight (row) WHERE status BETWEEN 7 AND 11 AND stuck IS NULL;
-- Push delivery claims rows, and parks those of applications that nobody serves.
CREATE INDEX inflight_claims ON inflight (lease_end_mono_ms) WHERE status = 4;
CREATE INDEX inflight_parked ON inflight (lane, seq)         WHERE status = 3;
