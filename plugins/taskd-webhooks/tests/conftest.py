from __future__ import annotations

from collections.abc import Iterator

import pytest
from taskd_webhooks import post
from taskd_webhooks.testing import Receiver, open_receiver


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A real HTTP server on a free port; the test sets its `answer`. By default it says 204."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with open_receiver() as running:
        yield running
        post.shared_client().close()
        post.shared_client.cache_clear()
