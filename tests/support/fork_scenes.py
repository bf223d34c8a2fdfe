"""Scenes with forks, each in a process of its own, so that no test runner is forked: `python -m … SCENE URL [OPTION…]`.

A scene prints what it saw as one line of JSON. With the option `without-handlers` nothing of the package starts over in
the children: the negative control.
"""

import asyncio
import contextlib
import gc
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any, Final

from cachetools import TTLCache

from broadcache.publisher import Publisher
from broadcache.shared import Keys
from broadcache.shared.process import forks
from broadcache.subscriber import LocalCache, Subscriber

FAST: Final[dict[str, Any]] = {"echo_interval_seconds": 0.1, "echo_timeout_seconds": 5.0}
CHILD_SECONDS_MAX: Final = 10
OPTIONS: Final = frozenset(sys.argv[3:])


def new_cache(mapping: MutableMapping[str, Any] | None = None, **options: Any) -> LocalCache:
    return LocalCache(TTLCache(maxsize=10_000, ttl=300) if mapping is None else mapping, **options)


def in_child(work: Callable[[], Any], *, seconds_max: int = CHILD_SECONDS_MAX, ends_in_order: bool = False) -> Any:
    """Return what `work` returns in a forked child; "hung" if it does not end."""
    reading, writing = os.pipe()
    if "without-handlers" in OPTIONS:
        forks._methods.clear()
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds_max)
        os.write(writing, json.dumps(work()).encode())
        if ends_in_order:
            sys.exit(0)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return "hung" if os.WIFSIGNALED(status) else json.loads(said)


def coherent(cache: LocalCache) -> bool:
    deadline = time.monotonic() + CHILD_SECONDS_MAX
    while not cache.is_coherent and time.monotonic() < deadline:
        cache.get("key")
        time.sleep(0.005)
    return cache.is_coherent


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """The messages of broadcache's log, from WARNING on."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("broadcache").addHandler(handler)
    yield lines
    logging.getLogger("broadcache").removeHandler(handler)


def replicas(url: str) -> list[str]:
    async def read() -> list[str]:
        async with Publisher(url) as publisher:
            return [each.replica for each in await publisher.replicas("products")]

    return asyncio.run(read())


# --- the scenes -------------------------------------------------------------------------------------------------------


def storm(url: str) -> Any:
    """Forks while threads hold the locks of a cache, and loads are under way."""
    cache = new_cache()
    is_over = threading.Event()
    subscriber = Subscriber(url, caches={"products": cache}, **FAST)

    def hold_locks() -> None:
        names = Keys(*[f"k{number}" for number in range(2_000)])
        while not is_over.is_set():
            cache.apply(names)

    def load_slowly(key: str) -> None:
        while not is_over.is_set():
            cache.get_or_load_sync(key, lambda: is_over.wait(0.5))

    # One wait for a load holds the lock of all caches' waits for a moment, which a child needs as well.
    threads = [threading.Thread(target=hold_locks) for _ in range(2)]
    threads += [threading.Thread(target=load_slowly, args=[f"slow{number % 2}"]) for number in range(4)]
    ended, hung = 0, 0
    with subscriber:
        for thread in threads:
            thread.start()
        forked = 20 if "without-handlers" in OPTIONS else 300
        for number in range(forked):
            seen = in_child(
                partial(cache.get_or_load_sync, f"slow{number % 2}", lambda: "child"),
                seconds_max=2 if "without-handlers" in OPTIONS else 30,
            )
            ended += seen == "child"
            hung += seen == "hung"
            if hung:
                break
        is_over.set()
        for thread in threads:
            thread.join()
        return {"ended": ended, "hung": hung, "state": subscriber.state, "lost": subscriber.stats().lost}


class Slow(TTLCache[str, Any]):
    """A mapping that another thread is changing at the moment of the fork. It keeps an attribute of its own."""

    def __init__(self) -> None:
        super().__init__(maxsize=10, ttl=300)
        self.owner = os.getpid()
        self.is_changing = threading.Event()
        self.may_end = threading.Event()

    def __setitem__(self, key: str, value: Any, **options: Any) -> None:
        if key == "slow":
            self.is_changing.set()
            self.may_end.wait()
        super().__setitem__(key, value, **options)


class Own(dict[str, Any]):
    is_changing = threading.Event()
    may_end = threading.Event()

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "slow":
            self.is_changing.set()
            self.may_end.wait()
        super().__setitem__(key, value)


def held(url: str) -> Any:
    """A fork while another thread has the lock, in the middle of a change of the mapping."""
    mapping: Any = Own() if "own-mapping" in OPTIONS else Slow()
    cache = new_cache(mapping)
    with captured() as lines, Subscriber(url, caches={"products": cache}, **FAST):
        cache["before"] = "parent"
        changing = threading.Thread(target=lambda: cache.__setitem__("slow", "parent"))
        changing.start()
        mapping.is_changing.wait()

        def child() -> Any:
            inherited = [cache.get("before"), cache.get("slow")]
            is_coherent = coherent(cache)
            loaded = [cache.get_or_load_sync("key", lambda: "child"), cache.get("key")]
            return {"inherited": inherited, "coherent": is_coherent, "loaded": loaded, "warned": lines}

        seen = in_child(child)
        mapping.may_end.set()
        changing.join()
        return seen


def bypassed(url: str) -> Any:
    """What a child is served that is forked from a coherent parent."""
    cache = new_cache(when_incoherent="serve" if "serve" in OPTIONS else "bypass")
    subscriber = Subscriber(url, caches={"products": cache}, **FAST)
    with captured() as lines, subscriber:
        cache["key"] = "parent"
        served_by_parent = cache.get("key")

        def child() -> Any:
            first = {"coherent": cache.is_coherent, "state": subscriber.state, "value": cache.get("key")}
            is_coherent = coherent(cache)
            cache["key"] = "child"
            then = {"coherent": is_coherent, "value": cache.get("key"), "id": subscriber.replica_id}
            listed = replicas(url)
            stats = cache.stats()
            subscriber.__exit__(None, None, None)
            return {"first": first, "then": then, "listed": listed, "left": replicas(url), "loads": stats.loads}

        seen = in_child(child)
        return {
            "parent": served_by_parent,
            "id": subscriber.replica_id,
            "child": seen,
            "still": cache.get("key"),
            "warned": lines,
        }


def within_a_hit(_: str) -> Any:
    """The process forks between a hit's look at the lease and its return. Both go on with that hit."""
    cache = new_cache(max_staleness_seconds=300)
    cache.confirm_coherent(cache.clock())
    cache["key"] = "parent"
    for _number in range(3):
        cache.get("key")
    pids: list[int] = []

    class Forking(str):
        __slots__ = ()

        def __hash__(self) -> int:
            if not pids:
                if "without-handlers" in OPTIONS:
                    forks._methods.clear()
                pids.append(os.fork())
            return str.__hash__(self)

        def __eq__(self, other: object) -> bool:
            return str.__eq__(self, other) is True

    reading, writing = os.pipe()
    value = cache.get(Forking("key"))
    if pids == [0]:
        seen = [value, cache.get("key"), cache.stats().hits, len(cache._touches)]
        os.write(writing, json.dumps(seen).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        child = json.loads(pipe.read())
    os.waitpid(pids[0], 0)
    return {"child": child, "parent": [value, cache.get("key"), cache.stats().hits]}


def waited(url: str) -> Any:
    """A child that waits until it is coherent, before it reads anything."""
    cache = new_cache()
    with Subscriber(url, caches={"products": cache}, **FAST) as subscriber:
        return in_child(lambda: [asyncio.run(subscriber.wait_coherent(10)), subscriber.state])


def set_to_serve(url: str) -> Any:
    """A child that sets its cache to serve before its subscriber has started again."""
    cache = new_cache(when_incoherent="serve")
    with Subscriber(url, caches={"products": cache}, **FAST) as subscriber:

        def child() -> Any:
            cache.when_incoherent = "serve"
            cache["key"] = "child"
            first = cache.get("key")
            is_coherent = coherent(cache)
            cache["key"] = "child"
            served = cache.get("key")
            subscriber.__exit__(None, None, None)
            return [first, is_coherent, served, cache.get("key")]

        return in_child(child)


def without_threads(url: str) -> Any:
    """A child that may have no more threads: its subscriber cannot start again at the first read."""
    cache = new_cache(when_incoherent="serve")
    with Subscriber(url, caches={"products": cache}, **FAST) as subscriber:

        def child() -> Any:
            start = threading.Thread.start
            threading.Thread.start = _no_thread_is_left  # type: ignore[assignment]
            cache.get("key")
            threading.Thread.start = start  # type: ignore[method-assign]
            cache["key"] = "child"
            return [cache.get("key"), subscriber.state]

        return in_child(child)


def _no_thread_is_left(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def short_lived(url: str) -> Any:
    """Children that read nothing."""
    cache = new_cache()
    with Subscriber(url, caches={"products": cache}, **FAST) as subscriber:
        listed = [in_child(lambda: replicas(url)) for _ in range(3)]
        return {"id": subscriber.replica_id, "listed": listed}


def at_exit(url: str) -> Any:
    """Children that become replicas and end in order, without leaving the `with` of their parent."""
    cache = new_cache(max_staleness_seconds=300)
    subscriber = Subscriber(url, caches={"products": cache}, **FAST)
    subscriber.__enter__()
    seen: list[Any] = []

    def child() -> Any:
        return [coherent(cache), subscriber.replica_id, sorted(replicas(url))]

    if "multiprocessing" in OPTIONS:
        context: Any = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        for _ in range(2):
            process = context.Process(target=lambda: queue.put(child()))
            process.start()
            seen.append(queue.get())
            process.join()
    else:
        seen = [in_child(child, ends_in_order=True) for _ in range(2)]
    return {"id": subscriber.replica_id, "children": seen, "left": replicas(url)}


def in_a_loop(url: str) -> Any:
    """A fork of a process whose event loop runs the subscriber, and what the child does then."""
    cache, other = new_cache(), new_cache()
    subscriber = Subscriber(url, caches={"products": [cache, other]}, replica_id="web-1", **FAST)

    async def enter_again() -> Any:
        async with subscriber:
            cache["key"] = "child"
            return [subscriber.state, subscriber.replica_id, cache.get("key")]

    def child() -> Any:
        with captured() as lines:
            values = [each.get("key") for each in (cache, cache, other)]
        entered = asyncio.run(enter_again())
        gc.collect()
        return {"values": values, "warned": lines, "entered": entered, "state": subscriber.state}

    async def parent() -> Any:
        async with subscriber:
            cache["key"] = "parent"
            before = subscriber.stats().echoes
            if "thread" in OPTIONS:
                seen = await asyncio.to_thread(in_child, child, ends_in_order=False)
            else:
                seen = in_child(child)
            while subscriber.stats().echoes < before + 3:
                await asyncio.sleep(0.01)
            return {"child": seen, "value": cache.get("key"), "id": subscriber.replica_id, "lost": _lost(subscriber)}

    if "uvloop" in OPTIONS:
        import uvloop

        return uvloop.run(parent())
    return asyncio.run(parent(), debug="debug" in OPTIONS)


def inherited(url: str) -> Any:
    """What children do to the connection of their parent: they collect what they inherit, and end in order."""
    cache = new_cache()
    subscriber = Subscriber(url, caches={"products": cache}, **FAST)
    link: Any = None

    def child() -> Any:
        async def collect() -> None:
            subscriber._roster.followers.clear()
            # What the client library does when a connection is collected while an event loop runs.
            link.__dict__["_connection"]._writer.close()
            gc.collect()

        asyncio.run(collect())
        return "collected"

    async def parent() -> Any:
        nonlocal link
        async with subscriber:
            [follower] = subscriber._roster.followers.values()
            while follower.link is None:
                await asyncio.sleep(0.01)
            link = follower.link
            seen = [await asyncio.to_thread(in_child, child, seconds_max=3) for _ in range(3)]
            before = subscriber.stats().echoes
            deadline = time.monotonic() + CHILD_SECONDS_MAX
            while subscriber.stats().echoes < before + 3 and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            return {"children": seen, "lost": _lost(subscriber), "echoes": subscriber.stats().echoes > before + 2}

    if "uvloop" in OPTIONS:
        import uvloop

        return uvloop.run(parent())
    return asyncio.run(parent())


def publisher(url: str) -> Any:
    """A publisher that parent and child use after the fork."""

    async def clients(inside: Publisher) -> list[int]:
        link = await inside._calls.link("products")
        return [await link.call("CLIENT", "ID")]

    async def parent() -> Any:
        async with Publisher(url, timeout_seconds=5) as inside:
            own = [(await inside.publish(Keys("a"), namespace="products")).position, *await clients(inside)]

            async def child_publishes() -> Any:
                receipt = await inside.publish(Keys("b"), namespace="products")
                return [receipt.position, *await clients(inside)]

            child = await asyncio.to_thread(in_child, lambda: asyncio.run(child_publishes()))
            after = [(await inside.publish(Keys("c"), namespace="products")).position, *await clients(inside)]
            return {"before": own, "child": child, "after": after}

    return asyncio.run(parent())


def owners(url: str) -> Any:
    """A child gives the cache of its parent's running subscriber to another one."""
    cache = new_cache()
    with Subscriber(url, caches={"products": cache}, **FAST):

        def child() -> Any:
            with Subscriber(url, caches={"products": cache}, **FAST) as own:
                return own.state

        return in_child(child)


def spawned(url: str) -> Any:
    """Processes that are spawned run the module anew, and a subscriber of their own."""
    context = multiprocessing.get_context("spawn")
    with Subscriber(url, caches={"products": new_cache()}, **FAST) as subscriber, context.Pool(2) as pool:
        ids = set(pool.map(_run_one, [url] * 2, chunksize=1))
        listed = replicas(url)
        pool.close()
        pool.join()
        return {"id": subscriber.replica_id, "ids": sorted(ids), "listed": listed, "left": replicas(url)}


def _run_one(url: str) -> str:
    cache = new_cache(max_staleness_seconds=300)
    subscriber = Subscriber(url, caches={"products": cache}, **FAST)
    subscriber.__enter__()
    _kept.append(subscriber)
    time.sleep(0.2)  # so that one process does not take both tasks
    return subscriber.replica_id


_kept: Final[list[Subscriber]] = []


def _lost(subscriber: Subscriber) -> int:
    return subscriber.stats().lost


if __name__ == "__main__":
    scene: Callable[[str], Any] = globals()[sys.argv[1]]
    sys.stdout.write(json.dumps(scene(sys.argv[2])) + "\n")
