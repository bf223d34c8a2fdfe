"""The HTTP side of a replica: the only module of this package that needs FastAPI, imported when a router is wanted."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from .subscriber import Subscriber

__all__ = ["router_of"]


def router_of(subscriber: Subscriber) -> APIRouter:
    """Return routes that tell the truth about `subscriber`. What they mean to a load balancer: docs/subscriber.md."""
    router = APIRouter(tags=["broadcache"])

    @router.get("/health/live", summary="Does the process answer?")
    async def live() -> dict[str, str]:
        return {"status": "live", "replica": subscriber.replica_id}

    @router.get(
        "/health/ready",
        summary="Is the local cache coherent?",
        responses={503: {"description": "The link to Redis is not proven; the cache is bypassed, or served stale."}},
    )
    async def ready() -> Response:
        state = subscriber.state
        return JSONResponse(
            {"status": "ready" if state == "coherent" else "not ready", "state": state},
            status_code=200 if state == "coherent" else 503,
        )

    @router.get("/cache-invalidation", summary="What has this replica applied, and how stale can it be?")
    async def status() -> dict[str, Any]:
        return describe(subscriber)

    return router


def describe(subscriber: Subscriber) -> dict[str, Any]:
    """Return the replica's status as JSON types.

    Units: `staleness_seconds` is how long ago everything accepted was proven to be applied here; null when never.
    """
    return {
        "replica": subscriber.replica_id,
        "state": subscriber.state,
        "received": subscriber.stats().received,
        "subscriptions": subscriber.stats().subscriptions,
        "lost": subscriber.stats().lost,
        "namespaces": {
            namespace: {
                "position": position and position._asdict(),
                "is_coherent": cache.is_coherent,
                "staleness_seconds": cache.staleness_seconds,
                "max_staleness_seconds": cache.max_staleness_seconds,
                "when_incoherent": cache.when_incoherent,
                "cache": asdict(cache.stats()),
            }
            for namespace, cache in subscriber.caches_by_namespace.items()
            for position in [subscriber.position(namespace)]
        },
    }
