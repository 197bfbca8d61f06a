-- From version 2: operators' switches.
CREATE TABLE switch (
  switch        INTEGER PRIMARY KEY AUTOINCREMENT,
  kind          TEXT NOT NULL,
  application   TEXT,
  namespace     TEXT,
  taskname      TEXT,
  conditions    TEXT,
  reason        TEXT NOT NULL,
  author        TEXT NOT NULL,
  source        TEXT NOT NULL,
  created_at_ms INTEGER NOT NULL,
  until_ms      INTEGER
) STRICT;
