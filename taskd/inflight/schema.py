"""The store's schema: created in a new file, brought up to date in an older one, step by step.

A file says which version it has (`user_version`) and which version a program must know at least to open
it (`min_reader_version` in `meta`). So an older taskd opens a file that a newer one wrote as long as all
that was added since does not concern it, and otherwise refuses in words.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import apsw
import structlog

from taskd.errors import StartupError

SCHEMA_VERSION = 7
# The oldest schema version whose programs may still open the file after the step to a version. A step that
# only adds (tables, indexes, columns with a default) leaves it as it was. A step that changes the meaning of
# what is there names its own version. (2: the first taskd knew no readers older than the file.)
MIN_READER_VERSIONS = {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 5}
FOLDER = files("taskd.inflight")

log = structlog.get_logger("taskd.inflight")


def prepare_schema(db: apsw.Connection, path: Path) -> None:
    """Create or migrate the schema, and make the view for operators. Every step is one transaction.

    Raises StartupError (exit 73) when a newer taskd wrote the file in a way this one cannot read; the file
    is left as it was. Raises apsw.Error when the file fails.
    """
    version = db.pragma("user_version")
    if version > SCHEMA_VERSION:
        _check_readable(db, path, version)
        return  # the newer program's view, indexes and version stay as they are
    if version == 0:
        with db:
            db.execute(FOLDER.joinpath("schema.sql").read_text())
            _mark(db, SCHEMA_VERSION)
        version = SCHEMA_VERSION
    if version < SCHEMA_VERSION:
        log.info("bringing the store up to date; it is read once", was=version, now=SCHEMA_VERSION)
    for target in range(version + 1, SCHEMA_VERSION + 1):
        with db:
            db.execute(FOLDER.joinpath(f"migrations/to_{target}.sql").read_text())
            _mark(db, target)
    _make_view(db)


def _mark(db: apsw.Connection, version: int) -> None:
    db.pragma("user_version", version)
    db.execute(
        "INSERT INTO meta (name, value) VALUES ('min_reader_version', ?) "
        "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (str(MIN_READER_VERSIONS[version]),),
    )


def _check_readable(db: apsw.Connection, path: Path, version: int) -> None:
    found: Any = db.execute("SELECT value FROM meta WHERE name = 'min_reader_version'").get
    if found is None or int(found) > SCHEMA_VERSION:
        raise StartupError(
            f"{path} has schema version {version}, and to open it a taskd must know version "
            f"{found or version} at least; this one knows {SCHEMA_VERSION}. "
            "Start the newer taskd that wrote it, or give this one another store.path.",
            exit_code=73,
        )


def _make_view(db: apsw.Connection) -> None:
    text = FOLDER.joinpath("view.sql").read_text()
    create = text[text.index("CREATE VIEW") :].strip().removesuffix(";")
    found: Any = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'inflight_taskactivations'").get
    if found != create:
        with db:
            db.execute("DROP VIEW IF EXISTS inflight_taskactivations")
            db.execute(create)
