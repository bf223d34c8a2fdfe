"""A replica in a process of its own, to be frozen, woken and killed. It reads one key all the time."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from cachetools import TTLCache
from tests.support.paths import ROOT

from broadcache.shared.transport.redis.embedded import dying_with_us
from broadcache.subscriber import LocalCache, Subscriber

KEY: Final = "key"


class ChildReplica:
    """Made by `child_replica`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process

    def freeze(self) -> None:
        """Let it stand still, and return when it does."""
        self.kill(signal.SIGSTOP)
        if sys.platform == "linux":
            os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def wake(self) -> None:
        self.kill(signal.SIGCONT)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._process.send_signal(number)


@asynccontextmanager
async def child_replica(
    url: str, namespace: str, replica_id: str, *, max_staleness_seconds: float = 5.0, **options: Any
) -> AsyncIterator[ChildReplica]:
    """Run one from when it is coherent until the block ends."""
    settings = {"url": url, "namespace": namespace, "bound": max_staleness_seconds}
    settings["options"] = {"replica_id": replica_id, **options}
    command = (sys.executable, "-m", "tests.support.child_replica", json.dumps(settings))
    process = await asyncio.create_subprocess_exec(
        *dying_with_us(command), stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"coherent\n"
        yield ChildReplica(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _live(url: str, namespace: str, bound: float, options: dict[str, Any]) -> None:
    cache = LocalCache(TTLCache(maxsize=100, ttl=600), max_staleness_seconds=bound)
    async with Subscriber(url, caches={namespace: cache}, **options) as subscriber:
        await subscriber.wait_coherent()
        sys.stdout.write("coherent\n")
        sys.stdout.flush()
        while True:
            if cache.get(KEY) is None and cache.is_coherent:
                cache.store(cache.begin_load(KEY), "value")
            await asyncio.sleep(0.005)


if __name__ == "__main__":
    asyncio.run(_live(**json.loads(sys.argv[1])))
