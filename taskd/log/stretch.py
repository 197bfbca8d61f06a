"""A run of records of one partition, without gaps, in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from taskd.log.base import Record
from taskd.log.limits import size_bytes

RECORD_OVERHEAD_BYTES = 200  # the objects around the bytes; small records would otherwise seem free


class Stretch:
    """Records with the offsets `start` to `end - 1`."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self._records: list[Record] = []
        self._bytes = 0

    @property
    def end(self) -> int:
        return self.start + len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def extend(self, records: Sequence[Record]) -> None:
        for end, record in enumerate(records, self.end):
            assert record.offset == end, f"a gap: offset {record.offset} after {end - 1}"
        self._records += records
        self._bytes += sum(map(size_bytes, records)) + len(records) * RECORD_OVERHEAD_BYTES

    def read(self, offset: int, max_records: int, max_bytes: int) -> list[Record]:
        """Records from `offset` on; the bytes of their values pass `max_bytes` at most by the last one."""
        begin = offset - self.start
        records = self._records[begin : begin + max_records]
        total = 0
        for number, record in enumerate(records):
            total += len(record.value)
            if total >= max_bytes:
                return records[: number + 1]
        return records

    def shrink(self, max_bytes: int) -> None:
        """Forget the oldest records, once there is a quarter more than `max_bytes`: each cut is dear."""
        if self._bytes > max_bytes + max_bytes // 4:
            dropped = 0
            while self._bytes > max_bytes:
                self._bytes -= size_bytes(self._records[dropped]) + RECORD_OVERHEAD_BYTES
                dropped += 1
            del self._records[:dropped]
            self.start += dropped
