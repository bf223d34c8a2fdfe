"""The auditor: it finds the replica that lies, and has nothing to say of a fleet that does not.

Time is the test's own: a timescale has passed when the test says so. What stands for "a little later", when an answer
has to be looked at again, is that the writer has published what it was about to publish.
"""

import asyncio
import dataclasses
import itertools
import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
from cachetools import LRUCache, TTLCache
from tests.support.child_replica import child_replica
from tests.support.command_line import run
from tests.support.liars import DeafCache, RevivingCache
from tests.support.redis_probe import redis_probe
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST
from tests.support.source import source_over_http
from tests.support.waiting import until

from broadcache.publisher import Auditor, AuditStats, Publisher
from broadcache.publisher.audit.source import source_at
from broadcache.publisher.audit.stats import Within
from broadcache.shared import Everything, InvalidSettings, Keys, Prefixes, Receipt, Tags
from broadcache.shared.fingerprint import NO_FINGERPRINT, fingerprint_of
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import LocalCache, Subscriber

pytestmark = pytest.mark.anyio

NAMESPACE = "products"


class Fleet:
    """Replicas with a source of their own, a writer that changes it, and an auditor whose time is the test's."""

    def __init__(self, publisher: Publisher, caches: dict[str, LocalCache]) -> None:
        self.publisher = publisher
        self.caches = caches
        self.source: dict[str, Any] = {}
        self.now = 0.0
        self.started = self.published = 0

    def auditor(self, **options: Any) -> Auditor:
        defaults: dict[str, Any] = {"sample": 1.0, "answer_seconds": 20.0, "sleep": self.sleep, "clock": self.clock}
        return Auditor(self.publisher, NAMESPACE, **{**defaults, **options})

    def clock(self) -> float:
        return self.now

    async def a_second_later(self, auditor: Auditor) -> None:
        """Have the auditor see what was published, and ask about it when its first timescale has passed."""
        await auditor.step()
        self.now += 1.0
        await auditor.step()

    async def changes(self, key: str, auditor: Auditor) -> None:
        """Change what everybody has under `key`, have everybody load it again, and the auditor ask about it."""
        self.source[key] = 1
        await self.load(key)
        await auditor.step()
        await self.have_applied(await self.write(key, 2))
        await self.load(key)
        await self.a_second_later(auditor)

    async def sleep(self, seconds: float) -> None:
        """Return when all that was being written has been published."""
        started = self.started
        await until(lambda: self.published >= started)

    async def read(self, key: str) -> Any:
        return self.source[key]

    async def write(self, key: str, value: Any) -> Receipt:
        self.started += 1
        self.source[key] = value
        # The change is there before anybody is told, as in any service.
        await asyncio.sleep(0)
        receipt = await self.publisher.publish(Keys(key), namespace=NAMESPACE)
        self.published += 1
        return receipt

    async def load(self, key: str, *replicas: str) -> None:
        async def loader() -> Any:
            value = self.source[key]
            await asyncio.sleep(0)
            return value

        for replica in replicas or self.caches:
            await self.caches[replica].get_or_load(key, loader)

    async def have_applied(self, receipt: Receipt) -> None:
        for replica in self.caches:
            while receipt.position != next(
                each.position for each in await self.publisher.replicas(NAMESPACE) if each.replica == replica
            ):
                pass


@asynccontextmanager
async def fleet(url: str, **kinds: type[LocalCache]) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        caches = {name: kind(TTLCache(maxsize=1_000, ttl=600)) for name, kind in kinds.items()}
        for name, cache in caches.items():
            await stack.enter_async_context(
                Subscriber(url, caches={NAMESPACE: cache}, replica_id=name, **{**FAST, "echo_timeout_seconds": 20.0})
            )
        if caches:
            await make_registry_old(url, NAMESPACE)
        yield Fleet(await stack.enter_async_context(Publisher(url, timeout_seconds=20)), caches)


def shares(stats: AuditStats) -> list[tuple[float, int, int]]:
    return [(each.seconds, each.judged, each.consistent) for each in stats.within]


@pytest.mark.parametrize("has_source", [True, False])
async def test_a_clean_fleet_is_clean_while_thousands_are_written_and_loaded(redis_url: str, has_source: bool) -> None:
    async with fleet(redis_url, one=LocalCache, two=LocalCache, three=LocalCache) as running:
        keys = [f"product:{number}" for number in range(40)]
        running.source = dict.fromkeys(keys, 0)
        auditor = running.auditor(source=running.read if has_source else None, sample=0.5)
        await auditor.step()
        choose = random.Random(7)
        values = itertools.count(1)

        async def write() -> None:
            for _ in range(1_000):
                await running.write(choose.choice(keys), next(values))

        async def load_for_ever() -> None:
            while True:
                for replica in running.caches:
                    await running.load(choose.choice(keys), replica)
                await asyncio.sleep(0)

        loading = asyncio.create_task(load_for_ever())
        writing = asyncio.gather(write(), write())
        while not writing.done():
            running.now += 1
            await auditor.step()
        await writing
        while auditor.stats().pending or auditor.stats().seen < 2_000:
            running.now += 60
            await auditor.step()
        loading.cancel()
        await asyncio.wait([loading])
        stats = auditor.stats()
        assert auditor.findings == ()
        assert (stats.seen, stats.is_consistent, stats.failures, stats.source_failures) == (2_000, True, 0, 0)
        assert 800 < stats.sampled < 1_200
        assert all(each.judged > stats.sampled / 2 for each in stats.within)


@pytest.mark.parametrize("liar", [DeafCache, RevivingCache])
async def test_a_replica_that_lies_is_found_by_the_source(redis_url: str, liar: type[LocalCache]) -> None:
    async with fleet(redis_url, honest=LocalCache, liar=liar) as running:
        running.source["product:42"] = {"price": 1}
        await running.load("product:42")
        auditor = running.auditor(source=running.read)
        await auditor.step()
        receipt = await running.write("product:42", {"price": 2})
        await running.have_applied(receipt)
        await running.load("product:42")
        await running.a_second_later(auditor)
        [found] = auditor.findings
        assert receipt.position is not None
        assert (found.replica, found.kind, found.key, found.against) == ("liar", "differs", "product:42", "source")
        assert (found.position, found.within_seconds) == (receipt.position, 1.0)
        assert (found.fingerprint, found.expected) == (fingerprint_of({"price": 1}), fingerprint_of({"price": 2}))
        # Asked again at the other timescales, it lies still.
        running.now = 100.0
        await auditor.step()
        await auditor.step()
        assert shares(auditor.stats()) == [(1.0, 1, 0), (10.0, 1, 0), (60.0, 1, 0)]
        assert auditor.stats().pending == 0
        assert not auditor.stats().is_consistent


async def test_a_replica_that_lies_is_found_by_what_most_others_serve(redis_url: str) -> None:
    async with fleet(redis_url, one=LocalCache, two=LocalCache, liar=RevivingCache) as running:
        auditor = running.auditor()
        await running.changes("a", auditor)
        assert [(each.replica, each.against) for each in auditor.findings] == [("liar", "replicas")]


async def test_two_that_disagree_are_both_named(redis_url: str) -> None:
    async with fleet(redis_url, honest=LocalCache, liar=DeafCache) as running:
        auditor = running.auditor()
        await running.changes("a", auditor)
        assert sorted((each.replica, each.expected) for each in auditor.findings) == [("honest", None), ("liar", None)]


async def test_a_difference_that_a_newer_invalidation_explains_is_none(redis_url: str) -> None:
    async with fleet(redis_url, one=LocalCache) as running:
        running.source["a"] = 1
        auditor = running.auditor(source=running.read)
        await auditor.step()
        await running.have_applied(await running.write("a", 2))
        await running.load("a")
        # Changed, and its invalidation is still under way when the auditor looks first.
        running.source["a"] = 3
        running.started += 1

        async def publish_late(seconds: float) -> None:
            if running.published < running.started:
                running.published += 1
                await running.have_applied(await running.publisher.publish(Keys("a"), namespace=NAMESPACE))

        auditor._sleep = publish_late
        await running.a_second_later(auditor)
        assert auditor.findings == ()
        assert shares(auditor.stats())[0] == (1.0, 1, 1)


async def test_a_source_that_changes_and_tells_nobody_is_found(redis_url: str) -> None:
    async with fleet(redis_url, one=LocalCache) as running:
        running.source["a"] = 1
        auditor = running.auditor(source=running.read)
        await auditor.step()
        await running.have_applied(await running.write("a", 2))
        await running.load("a")
        running.source["a"] = 3
        await running.a_second_later(auditor)
        assert [(each.replica, each.kind) for each in auditor.findings] == [("one", "differs")]


async def test_what_the_source_no_longer_has_is_served_by_nobody(redis_url: str) -> None:
    async with fleet(redis_url, honest=LocalCache, liar=DeafCache) as running:
        running.source["a"] = 1
        await running.load("a")
        auditor = running.auditor(source=running.read)
        await auditor.step()
        receipt = await running.publisher.publish(Keys("a"), namespace=NAMESPACE)
        await running.have_applied(receipt)
        del running.source["a"]
        await running.a_second_later(auditor)
        assert [(each.replica, each.expected) for each in auditor.findings] == [("liar", fingerprint_of(None))]
        assert auditor.stats().source_failures == 0


async def test_a_source_that_fails_is_counted_and_replicas_are_compared(redis_url: str) -> None:
    async def failing(key: str) -> Any:
        raise OSError("the source is away")

    async with fleet(redis_url, one=LocalCache, two=LocalCache, liar=DeafCache) as running:
        auditor = running.auditor(source=failing)
        await running.changes("a", auditor)
        assert [(each.replica, each.against) for each in auditor.findings] == [("liar", "replicas")]
        assert auditor.stats().source_failures > 0


async def test_a_frozen_replica_is_inconsistent_until_it_has_caught_up(own_server: EmbeddedServer) -> None:
    options = {**FAST, "echo_timeout_seconds": 30.0}
    async with (
        child_replica(own_server.url, NAMESPACE, "frozen", **options) as child,
        fleet(own_server.url, one=LocalCache) as running,
    ):
        auditor = running.auditor(answer_seconds=0.3)
        await auditor.step()
        child.freeze()
        await running.publisher.publish(Keys("a"), namespace=NAMESPACE)
        await running.a_second_later(auditor)
        assert [(each.replica, each.kind, each.key) for each in auditor.findings] == [("frozen", "missing", "a")]
        child.wake()
        while any(each.behind for each in await running.publisher.replicas(NAMESPACE)):
            pass
        auditor._answer_seconds = 20.0
        running.now = 10.0
        await auditor.step()
        assert shares(auditor.stats()) == [(1.0, 1, 0), (10.0, 1, 1), (60.0, 0, 0)]
        assert auditor.stats().inconsistencies == {"missing": 1}
        assert [each.inconsistencies for each in auditor.stats().within] == [{"missing": 1}, {}, {}]


async def test_targets_without_keys_are_judged_by_positions(redis_url: str) -> None:
    async with fleet(redis_url, one=LocalCache) as running:
        auditor = running.auditor(timescales_seconds=(1.0,))
        await auditor.step()
        for target in (Tags("red"), Prefixes("a"), Everything()):
            await running.publisher.publish(target, namespace=NAMESPACE)
        await running.a_second_later(auditor)
        assert shares(auditor.stats()) == [(1.0, 3, 3)]


async def test_where_nobody_is_there_nothing_is_called_consistent(redis_url: str) -> None:
    async with fleet(redis_url) as running:
        auditor = running.auditor(timescales_seconds=(1.0,))
        await auditor.step()
        await running.publisher.publish(Keys("a"), Keys("b"), namespace=NAMESPACE)
        await running.a_second_later(auditor)
        stats = auditor.stats()
        assert (stats.unasked, stats.pending, shares(stats)) == (1, 0, [(1.0, 0, 0)])
        assert stats.found_nobody


async def test_a_fleet_is_not_called_consistent_when_the_registry_may_not_list_every_replica(redis_url: str) -> None:
    async with fleet(redis_url, one=LocalCache) as running, redis_probe(redis_url) as probe:
        auditor = running.auditor(timescales_seconds=(1.0,))
        await running.changes("a", auditor)
        assert shares(auditor.stats()) == [(1.0, 1, 1)]
        await probe.call("DEL", names_of(NAMESPACE).registry)
        while not await running.publisher.replicas(NAMESPACE):
            pass
        await running.changes("b", auditor)
        stats = auditor.stats()
        assert (stats.unasked, stats.pending, shares(stats)) == (1, 0, [(1.0, 1, 1)])


async def test_a_replica_that_lies_is_found_although_the_registry_may_not_list_every_replica(redis_url: str) -> None:
    async with fleet(redis_url, honest=LocalCache, liar=DeafCache) as running, redis_probe(redis_url) as probe:
        auditor = running.auditor(timescales_seconds=(1.0,), source=running.read)
        await probe.call("DEL", names_of(NAMESPACE).registry)
        while len(await running.publisher.replicas(NAMESPACE)) < 2:
            pass
        await running.changes("a", auditor)
        assert [(each.replica, each.kind) for each in auditor.findings] == [("liar", "differs")]


async def test_a_log_that_is_lost_is_begun_anew(own_server: EmbeddedServer) -> None:
    async with fleet(own_server.url, one=LocalCache) as running:
        auditor = running.auditor()
        await auditor.step()
        await running.publisher.publish(Keys("a"), namespace=NAMESPACE)
        await auditor.step()
        assert auditor.stats().pending == 1
        from tests.support.topologies import asked

        asked(own_server.port, "FLUSHALL")
        await running.publisher.publish(Keys("a"), namespace=NAMESPACE)
        await running.a_second_later(auditor)
        assert (auditor.stats().pending, shares(auditor.stats())[0]) == (0, (1.0, 0, 0))
        await running.publisher.publish(Keys("b"), namespace=NAMESPACE)
        await auditor.step()
        assert auditor.stats().pending == 1


async def test_a_run_outlives_a_redis_that_is_away(own_server: EmbeddedServer) -> None:
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    async with Publisher(own_server.url, timeout_seconds=0.3) as publisher:
        auditor = Auditor(publisher, NAMESPACE, clock=lambda: now, sleep=sleep)
        own_server.kill()
        await auditor.run(1.0)
        assert auditor.stats().failures > 0
        with pytest.raises(InvalidSettings, match="sample"):
            Auditor(publisher, sample=0)
        with pytest.raises(InvalidSettings, match="timescales_seconds"):
            Auditor(publisher, timescales_seconds=(10, 1))


async def test_every_number_is_there_for_a_metric(redis_url: str) -> None:
    async with fleet(redis_url, one=LocalCache) as running:
        auditor = running.auditor(timescales_seconds=(1.0, 10.0))
        await auditor.step()
        await running.publisher.publish(Keys("a"), namespace=NAMESPACE)
        before = {each.name for each in auditor.stats().metrics()}
        await running.a_second_later(auditor)
        values = {(each.name, each.labels.get("within")): each.value for each in auditor.stats().metrics()}
        kinds = {
            (each.labels["kind"], each.labels["within"]): each.value
            for each in auditor.stats().metrics()
            if each.name == "broadcache_audit_inconsistencies_total"
        }
    assert values["broadcache_audit_judged_total", "1"] == values["broadcache_audit_consistent_total", "1"] == 1
    assert values["broadcache_audit_sampled_total", None] == values["broadcache_audit_pending", None] == 1
    # All are there from the start, but for a share of nothing.
    assert {name for name, _ in values} - before == {"broadcache_audit_consistent_ratio"}
    assert values["broadcache_audit_consistent_ratio", "1"] == 1
    assert ("broadcache_audit_consistent_ratio", "10") not in values
    assert kinds == {(kind, within): 0 for kind in ("missing", "behind", "differs") for within in ("1", "10")}


def test_nines_are_counted_from_the_share() -> None:
    assert Within(seconds=1, judged=1_000, consistent=999).nines == pytest.approx(3.0)
    assert Within(seconds=1, judged=1_000, consistent=1_000).nines is None
    assert str(Within(seconds=1, judged=7).nines) == "0.0"
    assert (Within(seconds=1).share, Within(seconds=1, judged=4, consistent=3).share) == (None, 0.75)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_equal_values_have_equal_fingerprints_and_others_do_not() -> None:
    assert fingerprint_of({"a": 1, "b": [2]}) == fingerprint_of({"b": (2,), "a": 1})
    values: list[Any] = [None, 0, "", [], {}, {"a": 1}, {"a": 2}]
    assert len({fingerprint_of(value) for value in values}) == 7
    assert fingerprint_of(object()) == NO_FINGERPRINT
    circular: list[Any] = []
    circular.append(circular)
    assert fingerprint_of(circular) == NO_FINGERPRINT


class Fields(msgspec.Struct):
    parts: Any


@dataclasses.dataclass
class DataFields:
    parts: Any


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (list(range(1_900)), list(range(2_100))),
        ({str(number): number for number in range(900)}, {str(number): number for number in range(1_100)}),
        (set(range(1_900)), set(range(2_100))),
        ("x" * 65_000, "x" * 66_000),
        (["x" * 650] * 100, ["x" * 660] * 100),
        ({"x" * 65_000: 1}, {"x" * 66_000: 1}),
        (b"x" * 65_000, memoryview(b"x" * 66_000)),
        ([[[1] * 10] * 10] * 17, [[[1] * 10] * 10] * 19),
        (Fields([1] * 1_900), Fields([1] * 2_100)),
        (DataFields([1] * 1_900), DataFields([1] * 2_100)),
        ([Fields(None)] * 900, [DataFields(None)] * 1_100),
    ],
    ids=[
        "list",
        "dictionary",
        "set",
        "text",
        "texts",
        "keys",
        "bytes",
        "nested",
        "struct",
        "dataclass",
        "objects",
    ],
)
def test_a_value_that_would_hold_the_event_loop_has_no_fingerprint(small: object, large: object) -> None:
    assert fingerprint_of(small) != NO_FINGERPRINT
    assert fingerprint_of(large) == NO_FINGERPRINT


def test_no_more_of_a_large_value_is_looked_at_than_the_limits_allow() -> None:
    class Endless(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("it was looked into")

    assert fingerprint_of(Endless([1] * 10_000)) == NO_FINGERPRINT


def test_a_fingerprint_is_of_what_a_read_would_be_served() -> None:
    cache = LocalCache(LRUCache(maxsize=2), negative_ttl_seconds=10)
    cache.store(cache.begin_load("a"), {"price": 1})
    assert cache.fingerprint("a") is None, "expected nothing to be served: nobody has proven the cache coherent"
    cache.confirm_coherent(cache.clock())
    before = cache.stats()
    assert cache.fingerprint("a") == fingerprint_of({"price": 1})
    assert cache.stats() == before
    cache.store(cache.begin_load("none"), None)
    assert cache.fingerprint("none") == fingerprint_of(None)
    cache.store(cache.begin_load("newest"), object())
    assert cache.fingerprint("a") is None, "expected the oldest to be evicted: looking has made it the newest"
    assert cache.fingerprint("newest") == NO_FINGERPRINT
    cache.apply(Keys("none"))
    assert cache.fingerprint("none") is None


# --- from a shell ----------------------------------------------------------------------------------------------------


async def test_a_source_is_read_where_its_url_says() -> None:
    with source_over_http({"products/a/b": 7}) as url:
        read = source_at(url.replace("{key}", "{namespace}/{key}"), "products")
        assert await read("a/b") == 7
        with pytest.raises(LookupError):
            await read("{namespace}")


@pytest.mark.timeout(240)
async def test_an_audit_from_a_shell_names_who_lies_and_ends_with_1(own_server: EmbeddedServer) -> None:
    values = {"product/42": 2}
    with source_over_http(values) as url:
        async with fleet(own_server.url, honest=LocalCache, liar=RevivingCache) as running:
            running.source["product/42"] = 1
            await running.load("product/42")
            running.source["product/42"] = 2

            async def audited(*arguments: str) -> tuple[int, str]:
                command = ("audit", "-n", NAMESPACE, "--sample", "1", "--within", "0.1", "--source-url", url)
                finished = asyncio.create_task(
                    asyncio.to_thread(run, *command, *arguments, BROADCACHE_REDIS_URL=own_server.url)
                )
                while not finished.done():
                    await running.publisher.publish(Keys("product/42"), namespace=NAMESPACE)
                    await running.load("product/42")
                    # Quiet for a while, so that answers can be compared.
                    await asyncio.wait([finished], timeout=1.0)
                result = await finished
                return result.returncode, result.stdout + result.stderr

            code, output = await audited("--seconds", "4")
            assert code == 1, output
            assert "✗ liar: is at " in output
            assert "✗ honest" not in output
            assert re.search(r"consistent within 0\.1 s: \d+\.\d{4}% \(\d+ of \d+, \d\.\d nines\)", output), output
            del running.caches["liar"]
        async with fleet(own_server.url, honest=LocalCache) as running:
            running.source["product/42"] = 2
            code, output = await audited("--seconds", "3", "--json")
            answer = json.loads(output)
            assert (code, answer["findings"], answer["inconsistencies"]) == (0, [], {})
            assert answer["within"][0]["judged"] > 0


async def test_an_audit_from_a_shell_where_nobody_is_ends_with_1(own_server: EmbeddedServer) -> None:
    arguments = ("--namespace", NAMESPACE, "--seconds", "5", "--sample", "1", "--within", "0.1")
    audit = asyncio.create_task(asyncio.to_thread(run, "audit", *arguments, BROADCACHE_REDIS_URL=own_server.url))
    async with Publisher(own_server.url) as publisher:
        while not audit.done():
            await publisher.publish(Keys("a"), namespace=NAMESPACE)
            await asyncio.sleep(0.05)
    finished = await audit
    assert finished.returncode == 1
    assert "no replica was registered" in finished.stdout


def test_an_audit_that_is_typed_wrongly_ends_with_2() -> None:
    wrong_urls = ("http://source/", "file:///{key}", "http://{key}/", "http://[/{key}")
    for arguments in (*(("--source-url", url) for url in wrong_urls), ("--sample", "0")):
        finished = run("audit", "--seconds", "0", *arguments)
        assert (finished.returncode, finished.stdout) == (2, ""), arguments
