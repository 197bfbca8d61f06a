-- From version 4: a limited task has a lane of its own in its namespace. A unique key cannot be changed, so
-- the table is made anew. A program that knows one lane for each namespace must not open the file.
CREATE TABLE new_lane (
  lane        INTEGER PRIMARY KEY,
  application TEXT NOT NULL,
  namespace   TEXT NOT NULL,
  taskname    TEXT NOT NULL DEFAULT '',
  UNIQUE (application, namespace, taskname)
) STRICT;
INSERT INTO new_lane (lane, application, namespace) SELECT lane, application, namespace FROM lane;
DROP VIEW IF EXISTS inflight_taskactivations; -- it names the table that goes; every start makes it anew
DROP TABLE lane;
ALTER TABLE new_lane RENAME TO lane;
-- Limits of a pool count the rows of its workers.
CREATE TABLE worker (
  holder TEXT PRIMARY KEY,
  pool   TEXT NOT NULL
) STRICT, WITHOUT ROWID;
