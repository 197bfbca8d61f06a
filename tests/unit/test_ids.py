from __future__ import annotations

import re
import subprocess
import sys

import pytest

from taskd.activation.ids import new_id, raw_record_id, retry_id, scheduled_id
from taskd.clock import rough_wall_ms


def test_the_contracts_vectors() -> None:
    assert retry_id("0f1e2d3c4b5a69788796a5b4c3d2e1f0", 1) == "1c664f684f258ccc3e72eebd91ef7845"
    assert raw_record_id("events", 3, 42, 1767225600123) == "f75938c72727d2fbb7e5596ae85e8de8"
    assert scheduled_id("nightly-report", 1767225600000) == "33047b853243a1388e86320cb6423681"


def test_each_part_counts() -> None:
    made = {
        raw_record_id("events", 3, 42, 1),
        raw_record_id("events", 34, 2, 1),
        raw_record_id("event", 3, 42, 1),
        raw_record_id("events", 3, 42, 2),
        raw_record_id("events", 3, 4, 21),
        retry_id("events", 342),
        scheduled_id("events", 342),
    }
    assert len(made) == 7
    assert all(len(id_) == 32 for id_ in made)


def test_new_ids_are_never_the_same_and_begin_with_the_time() -> None:
    before_ms = rough_wall_ms()
    ids = [new_id() for _ in range(1_000)]
    assert len(set(ids)) == 1_000
    for id_ in ids[64:]:  # the first may have been drawn with earlier ones
        assert re.fullmatch("[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", id_)
        assert before_ms <= int(id_[:12], 16) <= rough_wall_ms()


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_a_forked_child_has_ids_of_its_own(fork: str) -> None:
    """Also where the fork is not Python's: uWSGI forks its workers in C, where Python's hooks do not run."""
    code = f"""
import ctypes, os
from taskd.activation.ids import new_id
new_id()
child = {fork}()
if child:
    os.waitpid(child, 0)
print(*[new_id() for _ in range(200)], sep="\\n", flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ids = done.stdout.split()
    assert len(ids) == len(set(ids)) == 400
