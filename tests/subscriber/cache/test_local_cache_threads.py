"""LocalCache in threads: hits take no lock, and nobody reads what was dropped before they asked."""

import random
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

import pytest
from cachetools import LFUCache, LRUCache, TLRUCache, TTLCache

from broadcache.shared import Everything, Keys, Prefixes, Tags, Target
from broadcache.subscriber import LocalCache

MAPPINGS: dict[str, Callable[[], MutableMapping[str, Any]]] = {
    "TTLCache": lambda: TTLCache(maxsize=12, ttl=300),
    "LRUCache": lambda: LRUCache(maxsize=12),
    "TLRUCache": lambda: TLRUCache(maxsize=12, ttu=lambda key, value, now: now + 300),
    "LFUCache": lambda: LFUCache(maxsize=12),
    "dict": dict,
}


def coherent_cache(mapping: MutableMapping[str, Any]) -> LocalCache:
    cache = LocalCache(mapping)
    cache.confirm_coherent(cache.clock() + 3_600)
    return cache


@pytest.fixture
def restless_threads() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def run_together(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own, all at once; raise what any of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:  # noqa: BLE001  (a thread's error is the test's error)
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_threads_never_read_what_was_dropped_before_they_asked(mapping: str) -> None:
    """More keys than fit, so that entries are evicted all the time. A key's versions are numbers that only grow."""
    cache = coherent_cache(MAPPINGS[mapping]())
    keys = [f"{group}:{number}" for group in "ab" for number in range(8)]
    source = dict.fromkeys(keys, 0)
    forgotten_before = dict.fromkeys(keys, 0)

    def read(seed: int) -> None:
        drawn = random.Random(seed)
        for _ in range(1_500):
            key = drawn.choice(keys)
            floor = forgotten_before[key]
            if drawn.random() < 0.5:
                version = cache.get(key)
                assert version is None or version >= floor, (key, version, floor)
            else:
                version = cache.get_or_load_sync(key, partial(source.__getitem__, key), tags=(key[0],))
                assert version >= floor, (key, version, floor)

    def write(seed: int, group: str) -> None:
        drawn = random.Random(seed)
        mine = [key for key in keys if key[0] == group]
        wide: list[Target] = [Tags(group), Prefixes(f"{group}:"), Everything()]
        for _ in range(400):
            changed = [drawn.choice(mine)] if drawn.random() < 0.7 else mine
            for key in changed:
                source[key] += 1
            if len(changed) == 1:
                cache.apply(Keys(*changed))
            else:
                cache.apply(drawn.choice(wide))
            for key in changed:
                forgotten_before[key] = source[key]

    def sweep() -> None:
        for _ in range(400):
            cache.sweep()
            len(cache)

    run_together(
        *(lambda seed=seed: read(seed) for seed in range(3)), lambda: write(7, "a"), lambda: write(8, "b"), sweep
    )
    while cache.sweep():
        pass
    assert all(cache[key] == source[key] for key in cache)


@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("mapping", ["TTLCache", "LRUCache", "TLRUCache"])
def test_a_hit_in_another_thread_does_not_spoil_an_eviction(mapping: str) -> None:
    """cachetools takes it for a mutation during iteration when a hit reorders the entries while one is evicted."""
    cache = coherent_cache(MAPPINGS[mapping]())

    def read() -> None:
        for number in range(30_000):
            cache.get(f"k{number % 15}")

    def fill() -> None:
        for number in range(8_000):
            assert cache.store(cache.begin_load(f"k{number % 23}"), number)

    run_together(read, read, fill)


@pytest.mark.usefixtures("restless_threads")
def test_threads_that_set_and_delete_by_hand_leave_a_cache_that_works() -> None:
    cache = coherent_cache(TTLCache(maxsize=8, ttl=300))

    def use(seed: int) -> None:
        drawn = random.Random(seed)
        for _ in range(1_000):
            key = f"k{drawn.randrange(12)}"
            match drawn.randrange(5):
                case 0 | 1:
                    cache[key] = seed
                case 2:
                    cache.pop(key, None)
                case 3:
                    list(cache)
                case _:
                    cache.stats()

    run_together(*(lambda seed=seed: use(seed) for seed in range(4)))
    cache.clear()
    while cache.sweep():
        pass
    cache["k"] = "value"
    assert dict(cache) == {"k": "value"}
