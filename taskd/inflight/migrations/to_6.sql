-- From version 5: what waits for an operator to allow its topic is tried again now and then.
CREATE INDEX inflight_stuck ON inflight (stuck) WHERE stuck IS NOT NULL;
