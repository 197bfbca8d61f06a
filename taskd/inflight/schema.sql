-- The store of in-flight activations. Times: *_at_ms on the wall clock, lease_end_mono_ms on the
-- monotonic clock (restarted at full length when the broker starts), both in milliseconds.
--
-- This is the newest version, as a new file gets it. An older file gets there by migrations/to_N.sql, so
-- a change here is a change there; a test compares the two ways.

CREATE TABLE meta (
  name  TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- A lane is one namespace of one application, or a limited task in it; rows wait in lanes so that none blocks
-- another.
CREATE TABLE lane (
  lane        INTEGER PRIMARY KEY,
  application TEXT NOT NULL,
  namespace   TEXT NOT NULL,
  taskname    TEXT NOT NULL DEFAULT '', -- of a limited task; '': the namespace's lane
  UNIQUE (application, namespace, taskname)
) STRICT;

-- Pools of the workers that hold rows: what a limit of a pool counts, also after a restart.
CREATE TABLE worker (
  holder TEXT PRIMARY KEY,
  pool   TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- How many rows of a lane are in a status; kept with the rows, so nobody ever counts them.
CREATE TABLE depth (
  lane   INTEGER NOT NULL REFERENCES lane,
  status INTEGER NOT NULL,
  count  INTEGER NOT NULL,
  PRIMARY KEY (lane, status)
) STRICT, WITHOUT ROWID;

CREATE TABLE inflight (
  row               INTEGER PRIMARY KEY,
  id                TEXT NOT NULL UNIQUE,
  status            INTEGER NOT NULL, -- taskd.activation.lifecycle.Status
  lane              INTEGER NOT NULL REFERENCES lane,
  seq               INTEGER NOT NULL, -- order of hand-out inside the lane
  taskname          TEXT NOT NULL,
  -- as it came from the log
  topic             TEXT NOT NULL,
  partition         INTEGER NOT NULL,
  offset            INTEGER NOT NULL,
  record_key        BLOB,
  activation        BLOB,             -- the serialized TaskActivation, byte for byte; NULL once gone
  received_at_ms    INTEGER NOT NULL,
  stored_at_ms      INTEGER NOT NULL,
  due_at_ms         INTEGER,          -- delayed until
  expires_at_ms     INTEGER,          -- never started from then on
  deadline_ms       INTEGER NOT NULL, -- how long one run may take
  retry_attempts    INTEGER NOT NULL, -- RetryState.attempts
  dead_letter       INTEGER NOT NULL, -- 1: a failure is dead-lettered, 0: discarded
  at_most_once      INTEGER NOT NULL,
  -- the lease: who has it, under which fence
  attempts          INTEGER NOT NULL DEFAULT 0, -- starts of this row
  fence             INTEGER NOT NULL DEFAULT 0, -- of the newest hand-out; 0: never handed out
  lease_kind        INTEGER NOT NULL DEFAULT 0, -- taskd.inflight.base.LeaseKind
  holder            TEXT,             -- worker_id on the stream
  counted           INTEGER NOT NULL DEFAULT 0, -- 1: this lease is counted in attempts
  started           INTEGER NOT NULL DEFAULT 0, -- 1: the holder said START
  started_at_ms     INTEGER,
  lease_end_mono_ms INTEGER,
  started_mono_ms   INTEGER,          -- of the lease that runs; its heartbeats move the end, but not for ever
  crashes           INTEGER NOT NULL DEFAULT 0, -- processes that ended under it
  -- the end
  retry_max_attempts INTEGER,         -- reported with RETRY, replace those in the activation
  retry_delay_s      INTEGER,
  reason            TEXT,
  error             TEXT,
  forward_topic     TEXT,             -- where a forwarded row is published; NULL: the topic it came from
  stuck             TEXT,             -- why its retry or dead letter cannot be published
  outcome           TEXT,             -- once gone: complete, failed, retried, expired, dropped
  continued_as      TEXT,             -- id of the retry
  dead_lettered     INTEGER NOT NULL DEFAULT 0,
  finished_at_ms    INTEGER
) STRICT;

-- Every change of status looks at every condition here. The term that most rows fail comes first, and
-- ranges instead of lists, which together make a claim or a finish a third cheaper.
CREATE INDEX inflight_waiting  ON inflight (lane, seq)         WHERE status = 1;
CREATE INDEX inflight_due      ON inflight (due_at_ms)         WHERE status = 2;
CREATE INDEX inflight_expiring ON inflight (expires_at_ms)     WHERE expires_at_ms IS NOT NULL AND status <= 3;
CREATE INDEX inflight_leases   ON inflight (lease_end_mono_ms) WHERE lease_end_mono_ms IS NOT NULL AND status = 5;
CREATE INDEX inflight_claims   ON inflight (lease_end_mono_ms) WHERE status = 4;
CREATE INDEX inflight_parked   ON inflight (lane, seq)         WHERE status = 3;
CREATE INDEX inflight_holders  ON inflight (holder)            WHERE status = 5;
CREATE INDEX inflight_stuck    ON inflight (stuck)             WHERE stuck IS NOT NULL;
CREATE INDEX inflight_leaving  ON inflight (row)               WHERE status BETWEEN 7 AND 11 AND stuck IS NULL;
CREATE INDEX inflight_gone     ON inflight (finished_at_ms)    WHERE status = 12;

-- Operators' orders: what is paused, killed or sent elsewhere. NULL in a selector: any.
CREATE TABLE switch (
  switch        INTEGER PRIMARY KEY AUTOINCREMENT, -- a number is never used twice: audit lines name it
  kind          TEXT NOT NULL,        -- taskd.activation.switches.SwitchKind
  application   TEXT,
  namespace     TEXT,
  taskname      TEXT,
  conditions    TEXT,                 -- JSON; NULL: whatever the arguments
  reason        TEXT NOT NULL,
  author        TEXT NOT NULL,
  source        TEXT NOT NULL,        -- file, operator
  created_at_ms INTEGER NOT NULL,
  until_ms      INTEGER               -- NULL: until taken back
) STRICT;
