"""gevent: every greenlet of a thread seems to run in the event loop of the subscriber, and does not."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("gevent")

PRELUDE = """
    from gevent import monkey; monkey.patch_all()
    import asyncio, sys, threading
    import gevent
    from cachetools import TTLCache
    from broadcache.publisher import SyncPublisher
    from broadcache.shared import InvalidSettings, Keys
    from broadcache.subscriber import LocalCache, Subscriber

    url = sys.argv[1]
    cache = LocalCache(TTLCache(maxsize=100, ttl=600))
    FAST = {"echo_interval_seconds": 0.05, "echo_timeout_seconds": 0.3}
"""


def output_of(redis_url: str, program: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(program), redis_url],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout


def test_ten_greenlets_make_one_load_and_other_greenlets_run_meanwhile(redis_url: str) -> None:
    program = """
        ticks = 0
        def tick():
            global ticks
            while True:
                ticks += 1
                gevent.sleep(0.01)
        ticking = gevent.spawn(tick)
        with Subscriber(url, caches={"default": cache}, **FAST) as subscriber:
            ready = threading.Event()
            def load():
                before = ticks
                while ticks < before + 10:
                    gevent.sleep(0.01)
                return "value"
            jobs = [gevent.spawn(cache.get_or_load_sync, "key", load) for _ in range(10)]
            gevent.joinall(jobs, raise_error=True)
            print({job.value for job in jobs}, cache.stats().loads, subscriber.state)
    """
    assert output_of(redis_url, program) == "{'value'} 1 coherent\n"


def test_greenlets_invalidate_and_publish(redis_url: str) -> None:
    program = """
        with Subscriber(url, caches={"default": cache}, **FAST) as subscriber, SyncPublisher(url) as publisher:
            def view(number):
                receipt = subscriber.invalidate_sync(Keys("own"), namespace="default")
                return receipt.position.sequence, publisher.publish(Keys("key")).position.sequence
            jobs = [gevent.spawn(view, number) for number in range(5)]
            gevent.joinall(jobs, raise_error=True)
            print(sorted(sequence for job in jobs for sequence in job.value))
        for _ in range(2):
            with SyncPublisher(url) as publisher:
                print(publisher.publish(Keys("key")).position.sequence)
    """
    assert output_of(redis_url, program) == "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n11\n12\n"


def test_a_second_subscriber_in_a_thread_of_its_own_is_refused_and_does_not_hang(redis_url: str) -> None:
    program = """
        other = LocalCache(TTLCache(maxsize=100, ttl=600))
        second = Subscriber(url, caches={"users": other}, **FAST)
        with Subscriber(url, caches={"default": cache}, **FAST) as subscriber:
            try:
                second.__enter__()
            except InvalidSettings as error:
                print("give all caches to one subscriber" in str(error))
            print(subscriber.state)
        with second:
            print(second.state)
    """
    assert output_of(redis_url, program) == "True\ncoherent\ncoherent\n"


def test_greenlets_read_more_than_fits_into_the_touches(redis_url: str) -> None:
    """The lock is gevent's own: whether this greenlet has it is asked for, too."""
    program = """
        with Subscriber(url, caches={"default": cache}, **FAST) as subscriber:
            cache["key"] = "value"
            def read():
                for _ in range(2_000):
                    assert cache.get("key") == "value"
                    if not _ % 100:
                        gevent.sleep(0)
            gevent.joinall([gevent.spawn(read) for _ in range(3)], raise_error=True)
            print(cache.stats().hits, len(cache._touches) <= 513, cache.stats().mapping_errors)
    """
    assert output_of(redis_url, program) == "6000 True 0\n"
