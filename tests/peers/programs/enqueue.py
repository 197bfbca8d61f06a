"""`python -m enqueue MODULE N`: have a contender's module enqueue so many of its no-op task."""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    importlib.import_module(sys.argv[1]).enqueue(int(sys.argv[2]))
