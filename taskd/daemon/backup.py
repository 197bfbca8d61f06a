"""Copies of the store and the embedded log: made while the broker runs, put back while it does not.

Nothing that was acknowledged before a backup began is missing from it. That needs an order: first the
committed offsets are noted, then the store is copied, then the log, and the copy of the log gets the noted
offsets. So a record below them is in the copied store, or was finished, or what follows it had been published
by then and is in the copied log. A record above them is in the copied log and is read again; ids the store
knows are passed over, as after a crash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from taskd import __version__
from taskd.clock import Clock
from taskd.config.schema import BrokerConfig
from taskd.daemon.locks import hold_data
from taskd.daemon.settings import store_path
from taskd.database import copy_database, damage
from taskd.errors import StartupError
from taskd.inflight.copies import newest_offsets
from taskd.inflight.quarantine import set_aside
from taskd.log import copies
from taskd.log.base import Partition

STORE_COPY, MANIFEST = "inflight.sqlite", "manifest.json"
FORMAT = 1
ATTEMPTS = 3  # the log dropped old records in the middle of the copying
REPLACED = ".replaced-"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds; `offsets`: where Kafka's records may be missing from, by topic/partition."""

    format: int
    taskd: str
    made_at_ms: int
    log: str
    files: Mapping[str, int]
    offsets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Restored:
    manifest: Manifest
    set_aside: tuple[Path, ...]


def back_up(config: BrokerConfig, folder: Path, clock: Clock) -> Manifest:
    """Copy the store, and the embedded log if there is one, into a new `folder`.

    Raises StartupError (exit 73) when there is nothing to copy or the folder cannot be used; what was
    copied by then has no manifest and is no backup.
    """
    store = store_path(config)
    if not store.exists():
        raise StartupError(
            f"there is no store at {store}: check data_dir and store.path of the configuration.", exit_code=73
        )
    _empty_folder(folder)
    made_at_ms = clock.now().wall_ms
    files = {STORE_COPY: folder / STORE_COPY}
    if config.log.kind == "embedded":
        files[copies.LOG_FILE] = folder / copies.LOG_FILE
        _copy_both(store, config.data_dir / copies.LOG_FILE, folder)
    else:
        copy_database(store, folder / STORE_COPY)
    for path in files.values():
        if found := damage(path, full=False):
            raise StartupError(f"the copy {path} is damaged: {found}. Check the disk.", exit_code=73)
    newest = newest_offsets(folder / STORE_COPY) if config.log.kind == "kafka" else {}
    manifest = Manifest(
        format=FORMAT,
        taskd=__version__,
        made_at_ms=made_at_ms,
        log=config.log.kind,
        files={name: path.stat().st_size for name, path in files.items()},
        offsets={str(Partition(*place)): offset + 1 for place, offset in sorted(newest.items())},
    )
    _write(folder / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def _copy_both(store: Path, log: Path, folder: Path) -> None:
    for _ in range(ATTEMPTS):
        noted = copies.committed(log)
        for name, source in ((STORE_COPY, store), (copies.LOG_FILE, log)):
            (folder / name).unlink(missing_ok=True)
            copy_database(source, folder / name)
        copies.set_committed(folder / copies.LOG_FILE, noted)
        if _reaches_back(noted, copies.first_offsets(folder / copies.LOG_FILE)):
            return
    raise StartupError(
        f"the log dropped records while it was copied, {ATTEMPTS} times in a row. "
        "Try again, or raise log.embedded.retention_s.",
        exit_code=75,
    )


def _reaches_back(noted: copies.Committed, first: Mapping[Partition, int]) -> bool:
    """Whether the copied log has everything from the noted offsets on."""
    return all(
        offset is None or first.get(partition, 0) <= offset for (_, partition), offset in noted.items()
    )


def restore(config: BrokerConfig, folder: Path, clock: Clock, *, replace: bool) -> Restored:
    """Put a backup where the configuration has the store and the log; the broker must not run.

    What is there already is renamed when `replace` is set, else it is a StartupError (exit 73).
    """
    manifest = read_manifest(folder)
    if manifest.log != config.log.kind:
        raise StartupError(
            f"{folder} was made with log.kind {manifest.log}, the configuration says {config.log.kind}. "
            "Restore it with the configuration it was made with.",
            exit_code=73,
        )
    targets = {STORE_COPY: store_path(config), copies.LOG_FILE: config.data_dir / copies.LOG_FILE}
    with hold_data(config):
        there = [targets[name] for name in manifest.files if targets[name].exists()]
        if there and not replace:
            raise StartupError(
                f"{there[0]} exists. Use --replace to have it renamed and the backup put in its place.",
                exit_code=73,
            )
        new = {name: targets[name].with_name(f"{targets[name].name}.restoring") for name in manifest.files}
        for name, path in new.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            copy_database(folder / name, path)
        aside = tuple(set_aside(path, REPLACED, clock.now()) for path in there)
        for name, path in new.items():
            os.rename(path, targets[name])
    return Restored(manifest, aside)


def read_manifest(folder: Path) -> Manifest:
    """Raises StartupError (exit 73) when `folder` is no backup, or not a whole one."""
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text()))
        sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    except (OSError, ValueError, TypeError) as error:
        raise StartupError(
            f"{folder} is not a backup made by `taskd backup`: {error}. "
            f"Name the folder that holds {MANIFEST}.",
            exit_code=73,
        ) from error
    if manifest.format != FORMAT:
        raise StartupError(
            f"{folder} has format {manifest.format}, this taskd knows {FORMAT}: use the taskd that made it.",
            exit_code=73,
        )
    if sizes != dict(manifest.files) or not set(sizes) <= {STORE_COPY, copies.LOG_FILE}:
        raise StartupError(
            f"{folder} was changed after it was made: expected {dict(manifest.files)}, found {sizes}. "
            "Use another backup.",
            exit_code=73,
        )
    return manifest


def _empty_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise StartupError(f"{folder} is not empty: name a new folder for the backup.", exit_code=73)
    except OSError as error:
        raise StartupError(
            f"cannot write in {folder}: {error.strerror}. Give a folder that user {os.getuid()} may write.",
            exit_code=73,
        ) from error


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
