"""What the echoes of one replica cost Redis, with 1, 100 and 1,000 namespaces: bytes, and time of the server.

The replica idles in a process of its own: a Subscriber with default settings and one small cache for each namespace,
none of which has ever been published to. The figures are those of the server (`INFO`), over some seconds: the bytes
that arrive, the time of all scripts in a second, and the mean time of one script, which holds every other client.

The peer is the same replica with one namespace, measured side by side. Its figures times the number of namespaces are
a linear cost: a ratio of 100 for 100 namespaces. Echoes that list every namespace in the presence of each, as they were
before, needed 113 KiB a second for 100 namespaces, and 5.8 MiB for 1,000.
"""

import asyncio
import time
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple, Self

from cachetools import TTLCache
from redis import Redis

from benchmarks.harness import Effort, Limit, Row, answer, child, compare, run_async
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import LocalCache, Subscriber

_SETTLE_SECONDS: Final = 2.0
_KIB: Final = 1024
_PEER: Final = "1 namespace"
_SCRIPTS: Final = ("cmdstat_evalsha", "cmdstat_eval")


class Cost(NamedTuple):
    """What the echoes of one replica cost its server in a second, and the mean time of one script."""

    kib_per_second: float
    ms_per_second: float
    script_ms: float


def run(effort: Effort) -> list[Row]:
    counts = (1, 100, 1_000)
    rounds = effort.pick(full=3, quick=1)
    window_seconds = effort.pick(full=8, quick=3)
    with ExitStack() as stack:
        replicas = [stack.enter_context(_Replica(count)) for count in counts]
        time.sleep(_SETTLE_SECONDS)
        costs = [_cost(replicas, window_seconds) for _ in range(rounds)]
    rows: list[Row] = []
    for index, count in enumerate(counts):
        for field, what, unit, limit in (
            ("kib_per_second", "sent to Redis a second", "KiB", Limit("≤", count)),
            ("ms_per_second", "server time a second", "ms", Limit("≤", count)),
            ("script_ms", "server held by one script", "ms", None),
        ):
            ours, peer = ([getattr(each[place], field) for each in costs] for place in (index, 0))
            name = f"echoes, {count:,} namespace{'s' if count > 1 else ''}, {what}"
            rows.append(compare(name, ours, _PEER, peer, unit=unit, measure="count", limit=limit))
    return rows


def _cost(replicas: list["_Replica"], window_seconds: float) -> list[Cost]:
    for replica in replicas:
        replica.begin()
    time.sleep(window_seconds)
    return [replica.end() for replica in replicas]


class _Replica:
    """A replica with this many namespaces, idle in a process of its own, on a server of its own."""

    def __init__(self, namespaces_count: int) -> None:
        self._namespaces_count = namespaces_count
        self._stack = ExitStack()
        self._began_at = 0.0
        self._bytes_before = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedServer())
            self._redis = stack.enter_context(Redis.from_url(server.url))
            main = partial(run_async, idle)
            answer(stack.enter_context(child(main, server.url, self._namespaces_count)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Begin a window."""
        self._redis.config_resetstat()
        self._began_at = time.perf_counter()

    def end(self) -> Cost:
        """End the window; return the cost of the replica."""
        info: Any = self._redis.info("all")
        seconds = time.perf_counter() - self._began_at
        scripts = [info[name] for name in _SCRIPTS if name in info]
        used_ms = sum(each["usec"] for each in scripts) / 1_000
        calls = sum(each["calls"] for each in scripts)
        return Cost(info["total_net_input_bytes"] / _KIB / seconds, used_ms / seconds, used_ms / max(1, calls))


async def idle(pipe: Connection, url: str, namespaces_count: int) -> None:
    """Follow this many namespaces until the other end of the pipe is closed."""
    caches = {f"tenant-{number}": LocalCache(TTLCache(maxsize=10, ttl=300)) for number in range(namespaces_count)}
    async with Subscriber(url, caches=caches, start_timeout_seconds=30):
        pipe.send("ready")
        with suppress(EOFError):
            await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
