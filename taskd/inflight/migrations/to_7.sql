-- From version 6: how often an activation ended the process that ran it.
ALTER TABLE inflight ADD COLUMN crashes INTEGER NOT NULL DEFAULT 0;
