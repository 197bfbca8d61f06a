"""Carries the configuration of an existing taskbroker over to ours: `taskd config import`."""

from taskd.config.taskbroker.carry import Imported, import_config

__all__ = ["Imported", "import_config"]
