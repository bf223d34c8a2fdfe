"""The examples of the OpenAPI document."""

from typing import Final

__all__ = ["ACCEPTED", "BROADCAST", "EVENTS", "HISTORY", "METRICS", "PREVIEW", "REPLICAS", "REQUESTS", "UNCONFIRMED"]

REQUESTS: Final = {
    "keys": {
        "summary": "One key",
        "value": {"namespace": "products", "keys": ["product:42"], "reason": "price change"},
    },
    "tags and prefixes": {
        "summary": "Entries with a tag, and entries whose key begins with a prefix",
        "value": {"namespace": "products", "tags": ["catalogue"], "prefixes": ["product:42:"]},
    },
    "everything": {
        "summary": "All entries of the namespace",
        "value": {"namespace": "products", "everything": True, "reason": "import finished"},
    },
    "confirmed": {
        "summary": "One key; wait up to a second for every replica",
        "value": {"namespace": "products", "keys": ["product:42"], "confirm": {"timeout_seconds": 1}},
    },
}
_ACCEPTED: Final = {
    "id": "01JZ0000000000000000000000",
    "namespace": "products",
    "epoch": "01JY0000000000000000000000",
    "sequence": 42,
    "receivers": 3,
    "logged": True,
    "pending": False,
    "fanout": None,
}
_FANNED_OUT: Final = {
    "id": "01JZ0000000000000000000000",
    "namespace": "products",
    "epoch": None,
    "sequence": None,
    "receivers": 0,
    "logged": False,
    "pending": True,
    "fanout": {
        "service": "cache-replicas:8080",
        "total": 1,
        "succeeded": 1,
        "failed": 0,
        "complete": True,
        "discovery": "dns",
        "elapsed_ms": 3.1,
        "outcomes": [
            {
                "address": "http://10.42.0.7:8080/cache-invalidation",
                "status_code": 200,
                "error": None,
                "latency_ms": 2.4,
                "attempts": 1,
                "replica": "cache-replicas-0",
                "dropped": 1,
                "outcome": "applied",
            }
        ],
        "problem": None,
        "not_followed": 0,
    },
}
ACCEPTED: Final = {
    "logged": {"summary": "The log has it", "value": _ACCEPTED},
    "fanned out": {
        "summary": "Redis was unreachable: every replica has applied it by HTTP, and it waits to be logged",
        "value": _FANNED_OUT,
    },
}
_CONFIRMED_REPLICA: Final = {
    "replica": "web-1",
    "outcome": "confirmed",
    "is_expected": True,
    "latency_ms": 0.71,
    "dropped": 1,
    "how": "message",
    "silent_ms": None,
    "seen_ms_ago": None,
}
_UNCONFIRMED: Final = {
    **_ACCEPTED,
    "confirmation": {
        "is_complete": False,
        "expected": ["web-1", "web-2"],
        "confirmed": ["web-1"],
        "missing": ["web-2"],
        "silent": [],
        "not_followed": [],
        "doubt": None,
        "replicas": [
            _CONFIRMED_REPLICA,
            {
                "replica": "web-2",
                "outcome": "missing",
                "is_expected": True,
                "latency_ms": None,
                "dropped": None,
                "how": None,
                "silent_ms": None,
                "seen_ms_ago": None,
            },
        ],
    },
}
_DOUBTED: Final = {
    **_ACCEPTED,
    "confirmation": {
        "is_complete": False,
        "expected": ["web-1"],
        "confirmed": ["web-1"],
        "missing": [],
        "silent": [],
        "not_followed": [],
        "doubt": "the registry of 'products' has existed for only 1.2 s: it is new or was lost, and a replica that it "
        "does not list may serve old values for up to 3.8 s more; confirm again after that time",
        "replicas": [_CONFIRMED_REPLICA],
    },
}
UNCONFIRMED: Final = {
    "missing": {"summary": "A replica has not confirmed", "value": _UNCONFIRMED},
    "doubted": {"summary": "There may be replicas that are not registered", "value": _DOUBTED},
}
REPLICAS: Final = {
    "namespace": "products",
    "replicas": [
        {
            "replica": "web-1",
            "namespaces": ["products"],
            "namespaces_count": 1,
            "host": "web-1.example",
            "pid": 17,
            "version": "1.0.0",
            "started_at": "2025-06-30T12:00:00.000Z",
            "seen_ms_ago": 412,
            "state": "coherent",
            "is_coherent": True,
            "position": {"epoch": "01JY0000000000000000000000", "sequence": 42},
            "behind": 0,
            "staleness_seconds": 1.43,
            "max_staleness_seconds": 5.0,
            "when_incoherent": "bypass",
            "entries": 1200,
            "hits": 9000,
            "misses": 1000,
            "bypassed": 0,
            "hit_ratio": 0.9,
            "clears": {"subscribed": 1},
            "clears_total": 1,
            "replays": 0,
            "gaps": 0,
            "lag_ms": 0.4,
            "is_silent": False,
            "may_serve": True,
            "conflict": "",
        }
    ],
}
NAMESPACES: Final = {
    "namespaces": [
        {
            "namespace": "products",
            "head": {"epoch": "01JY0000000000000000000000", "sequence": 42},
            "log_length": 42,
            "last_sent_at": "2025-06-30T12:00:00.000Z",
            "registered": 3,
            "silent": 0,
            "silent_serving": 0,
            "memory_bytes": 18_432,
        }
    ],
    "next_after": None,
}
PREVIEW: Final = {
    "namespace": "products",
    "replicas": 3,
    "entries": 12,
    "is_estimate": True,
    "by_replica": [
        {"replica": "web-1", "entries": 7, "is_estimate": False},
        {"replica": "web-2", "entries": 5, "is_estimate": False},
    ],
    "missing": ["web-3"],
    "doubt": None,
}
HISTORY: Final = {
    "namespace": "products",
    "invalidations": [
        {
            "sequence": 42,
            "epoch": "01JY0000000000000000000000",
            "id": "01JZ0000000000000000000000",
            "keys": ["product:42"],
            "tags": [],
            "prefixes": [],
            "everything": False,
            "reason": "price change",
            "source": "publisher-1",
            "sent_at": "2025-06-30T12:00:00.000Z",
        },
        {"sequence": 41, "unreadable": True},
    ],
    "next_before": 41,
    "examined": 2,
}
EVENTS: Final = (
    "id: 01JY0000000000000000000000:41\nevent: linked\ndata: {}\n\n"
    "id: 01JY0000000000000000000000:42\nevent: invalidation\n"
    'data: {"sequence":42,"epoch":"01JY0000000000000000000000","id":"01JZ0000000000000000000000","keys":["product:42"],'
    '"tags":[],"prefixes":[],"everything":false,"reason":"price change","source":"publisher-1",'
    '"sent_at":"2025-06-30T12:00:00.000Z"}\n\n'
)
METRICS: Final = """# HELP broadcache_publishes_total Publishes by outcome.
# TYPE broadcache_publishes_total counter
broadcache_publishes_total{namespace="products",outcome="accepted"} 42.0
"""
BROADCAST: Final = {
    "responses": [
        {
            "statusCode": 200,
            "address": "http://10.42.0.224:8889/cache-invalidation?x=1",
            "error": None,
            "latencyMs": 1.25,
            "attempts": 1,
        },
        {
            "statusCode": None,
            "address": "http://10.42.0.225:8889/cache-invalidation?x=1",
            "error": "connection refused",
            "latencyMs": 162.5,
            "attempts": 3,
        },
    ],
    "total": 2,
    "succeeded": 1,
    "failed": 1,
    "complete": True,
    "discovery": "dns",
    "elapsedMs": 166.75,
    "bodyDropped": False,
    "notes": [],
}
