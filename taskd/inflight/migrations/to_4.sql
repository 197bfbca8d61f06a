-- From version 3: how far the heartbeats of a task may move its deadline counts from its start.
ALTER TABLE inflight ADD COLUMN started_mono_ms INTEGER;
