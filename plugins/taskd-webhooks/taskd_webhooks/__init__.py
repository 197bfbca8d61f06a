"""Webhooks as tasks: `taskd_webhooks.tasks.deliver` sends, `verify` is for those who receive."""

from __future__ import annotations

from taskd_webhooks.signature import HEADER, InvalidSignature, sign, verify

__all__ = ["HEADER", "InvalidSignature", "sign", "verify"]
