"""A daemon looks for garbage in cycles less often, and not through what it loaded."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, weakref
from taskd.daemon.collecting import YOUNG_AT_MOST, collect_less
collect_less()
assert gc.get_freeze_count() > 1_000
class Node: pass
first = Node(); first.itself = first
gone = weakref.ref(first); del first
kept = [[] for _ in range(2 * YOUNG_AT_MOST)]
assert gone() is None, "what is garbage is still found"
"""


def test_what_was_loaded_is_left_alone_and_new_garbage_is_found() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
