"""How often a daemon looks for garbage in cycles."""

from __future__ import annotations

import gc

YOUNG_AT_MOST = 20_000  # objects made and not freed again before the young are looked at; Python's own: 700


def collect_less() -> None:
    """Call once, when all modules are loaded: what is there now is never looked at again.

    A batch of rows is some thousands of objects that are freed without a collector, and each few hundred of
    them make Python look for cycles: 5 to 8 % of a broker's CPU while it drains. What was imported is some
    100,000 objects, and a full look at them a pause of tens of milliseconds, in the middle of something.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_AT_MOST, 10, 10)
