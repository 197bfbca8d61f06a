"""Faults of the disk, for tests: writes that fail, a disk that is full, power that goes off.

Everything SQLite does while `open_disk` lasts goes through its VFS, in this process only.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import apsw

__all__ = ["Disk", "open_disk"]

_numbers = itertools.count(1)


@dataclass
class _Unsynced:
    """What a file held before each write since it was last synced; newest last."""

    before: list[tuple[int, bytes, int]] = field(default_factory=list)  # (offset, bytes, size of the file)


class Disk:
    """Set its attributes at any time; what they say holds from the next write on.

    `full`: what would make a file larger fails; the room that files have already can be written.
    `fails_at`: the n-th write from now fails with an I/O error, and all after it, until it is None again.
    `unsyncable`: syncing fails.
    """

    def __init__(self) -> None:
        self.full = False
        self.fails_at: int | None = None
        self.unsyncable = False
        self.writes = 0
        self.syncs = 0
        self._dead = False
        self._lock = threading.Lock()
        self._files: dict[str, _Unsynced] = {}

    def cut_power(self) -> None:
        """Nothing reaches the disk from now on; what was not synced is lost when the block ends."""
        self._dead = True

    def restore_power(self) -> None:
        """Put files back to what was synced. Close their connections before."""
        for name, unsynced in self._files.items():
            if not os.path.exists(name):
                continue
            with open(name, "r+b") as file:
                for offset, before, size in reversed(unsynced.before):
                    file.seek(offset)
                    file.write(before)
                    file.truncate(size)
            Path(f"{name.removesuffix('-wal')}-shm").unlink(missing_ok=True)
        self._files.clear()
        self._dead = False

    # ---- asked by the VFS

    def _check(self, grows: bool) -> None:
        with self._lock:
            self.writes += 1
            if self._dead:
                raise apsw.IOError("the power is off")
            if self.fails_at is not None:
                self.fails_at -= 1
                if self.fails_at <= 0:
                    raise apsw.IOError("the disk failed")
            if self.full and grows:
                raise apsw.FullError("the disk is full")

    def _remember(self, name: str, offset: int, before: bytes, size: int) -> None:
        self._files.setdefault(name, _Unsynced()).before.append((offset, before, size))

    def _synced(self, name: str) -> None:
        if self._dead or self.unsyncable:
            raise apsw.IOError("the disk does not sync")
        self.syncs += 1
        self._files[name] = _Unsynced()


class _Vfs(apsw.VFS):
    def __init__(self, name: str, base: str, disk: Disk) -> None:
        self.disk = disk
        self._base = base
        super().__init__(name, base)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return _File(self.disk, self._base, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        if self.disk._dead:
            raise apsw.IOError("the power is off")
        super().xDelete(filename, syncdir)


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, base: str, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        super().__init__(base, name, flags)
        self._disk = disk
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else name or ""

    def xWrite(self, data: bytes, offset: int) -> None:
        size = self.xFileSize()
        self._disk._check(grows=offset + len(data) > size)
        kept = min(len(data), max(size - offset, 0))
        before = self.xRead(kept, offset) if kept else b""
        self._disk._remember(self._name, offset, before, size)
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:
        size = self.xFileSize()
        self._disk._check(grows=False)
        before = self.xRead(size - newsize, newsize) if size > newsize else b""
        self._disk._remember(self._name, newsize, before, size)
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:
        self._disk._synced(self._name)
        super().xSync(flags)


@contextmanager
def open_disk() -> Iterator[Disk]:
    """Lay a `Disk` under every database that is opened in the block. Close them before it ends."""
    disk = Disk()
    usual = apsw.vfs_names()[0]
    name = f"taskd-faults-{next(_numbers)}"
    vfs = _Vfs(name, usual, disk)
    apsw.set_default_vfs(name)
    try:
        yield disk
    finally:
        apsw.set_default_vfs(usual)
        vfs.unregister()
        disk.restore_power()
