"""The pages: health for orchestrators, metrics for Prometheus, and a short index for people."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from taskd.telemetry import metrics
from taskd.web.health import HealthSource, PartHealth

INDEX = """taskd
  /healthz  200 while the process lives
  /readyz   200 when every part makes progress, else 503 with the reasons
  /metrics  numbers for Prometheus
"""

log = structlog.get_logger("taskd.web")


def make_app(health: HealthSource) -> Starlette:
    async def readyz(_: Request) -> Response:
        parts = _parts(health)
        ready = all(part.ok for part in parts.values())
        shown = {name: {"ok": part.ok, "reason": part.reason} for name, part in parts.items()}
        return JSONResponse(
            {"status": "ready" if ready else "not ready", "parts": shown}, 200 if ready else 503
        )

    return Starlette(
        routes=[
            Route("/", _index),
            Route("/healthz", _healthz),
            Route("/readyz", readyz),
            Route("/metrics", _metrics),
        ]
    )


def _parts(health: HealthSource) -> Mapping[str, PartHealth]:
    try:
        return health.parts()
    except Exception as error:
        log.exception("the health check itself failed")
        return {"health": PartHealth(False, f"the check itself failed: {error!r}")}


async def _index(_: Request) -> Response:
    return PlainTextResponse(INDEX)


async def _healthz(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _metrics(_: Request) -> Response:
    return Response(metrics.render(), headers={"content-type": metrics.CONTENT_TYPE})
