"""What aiokafka logs, cut to what an operator can use.

It tells of each step of a rebalance as a warning or an error, and of an outage several times a second.
What matters of it reaches us as an error or as `healthy`, and is logged in our words; of the rest the
ordinary goes to level debug, and one message comes at most once a minute.
"""

from __future__ import annotations

import logging

EVERY_S = 60.0

# Ordinary, by the beginning of the message's template: members come and go, connections end.
ORDINARY = (
    "Heartbeat failed for group %s because it is rebalancing",
    "Heartbeat failed for group %s: generation id",
    "Heartbeat failed for group %s: coordinator",
    "Heartbeat failed: local member_id was not recognized",
    "Heartbeat send request failed",
    "Heartbeat session expired",
    "Marking the coordinator dead",
    "Error sending %s to node",
    "Group Coordinator Request failed",
    "OffsetCommit failed for group %s due to group",  # the commit raises, and is logged by who asked for it
    "LeaveGroup request failed",
    "Failed fetch messages from",
    "Unable to request metadata from",
    "Unable to update metadata from",
    "Got error produce response",  # the answer to an append
    "Sending username and password in the clear",  # as configured
)

# A filter sees what its own logger is told, and nothing from below.
LOGGERS = (
    "aiokafka",
    "aiokafka.cluster",
    "aiokafka.conn",
    "aiokafka.consumer.consumer",
    "aiokafka.consumer.fetcher",
    "aiokafka.consumer.group_coordinator",
    "aiokafka.consumer.subscription_state",
    "aiokafka.producer.producer",
    "aiokafka.producer.sender",
)


class _Reducer(logging.Filter):
    """Lets a message pass once in a while, the ordinary ones as debug only."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        template = str(record.msg)
        if template.startswith(ORDINARY):
            record.levelno, record.levelname = logging.DEBUG, "DEBUG"
            return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
        if record.levelno < logging.WARNING:
            return True
        if record.created - self._passed.get(template, -EVERY_S) < EVERY_S:
            return False
        self._passed[template] = record.created
        return True


_reducer = _Reducer()


def reduce() -> None:
    """From now on, in this process. May be called again."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_reducer)
