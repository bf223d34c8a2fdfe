"""The dry run: how many entries of how many replicas are named, and not one of them is dropped for it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest
from cachetools import LRUCache, TTLCache
from tests.support.command_line import run
from tests.support.redis_probe import redis_probe
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.tcp_proxy import TcpProxy
from tests.support.topologies import asked, cluster_of_three
from tests.support.waiting import until

from broadcache.publisher import Preview, Publisher, ReplicaPreview
from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.settings import ApiSettings
from broadcache.shared import Everything, InvalidSettings, InvalidTarget, Keys, LogRefused, Prefixes, Tags, Target
from broadcache.shared.confirmation import decode_reports, encode_reports
from broadcache.shared.errors import MalformedFrame
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.question import Question, ReplicaAnswer, counting, decode_question, encode_question
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import LocalCache, Subscriber
from broadcache.subscriber.following.answerer import Answerer
from broadcache.subscriber.following.sequencer import Sequencer

pytestmark = pytest.mark.anyio

NAMESPACE = "products"
PATIENT = 20.0
"""For who is sure to answer: the test ends when they have."""
IMPATIENT = 0.3
"""For who is sure not to."""


@asynccontextmanager
async def replicas(url: str, *names: str, **options: Any) -> AsyncIterator[list[LocalCache]]:
    async with AsyncExitStack() as stack:
        caches = []
        for name in names:
            caches.append(new_cache())
            await stack.enter_async_context(
                Subscriber(url, caches={NAMESPACE: caches[-1]}, replica_id=name, **(options or FAST))
            )
        await make_registry_old(url, NAMESPACE)
        yield caches


def tagged(cache: LocalCache, tag: str, *keys: str) -> None:
    for key in keys:
        assert cache.store(cache.begin_load(key), "old", tags=(tag,))


async def test_a_preview_counts_what_each_replica_has_and_drops_nothing(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one", "two", "three") as caches:
        fill(caches[0], "a", "b", "c")
        fill(caches[1], "a")
        preview = await publisher.preview(Keys("a", "b", "d"), namespace=NAMESPACE, timeout_seconds=PATIENT)
        assert preview == Preview(
            namespace=NAMESPACE,
            replicas=3,
            entries=3,
            is_estimate=False,
            by_replica=(
                ReplicaPreview(replica="one", entries=2, is_estimate=False),
                ReplicaPreview(replica="three", entries=0, is_estimate=False),
                ReplicaPreview(replica="two", entries=1, is_estimate=False),
            ),
            missing=(),
            doubt=None,
        )
        assert [set(cache) for cache in caches] == [{"a", "b", "c"}, {"a"}, set()]
        assert await publisher.history(NAMESPACE) == []
        assert [cache.stats().dropped for cache in caches] == [0, 0, 0]
        # The negative control: what is published is dropped.
        await publisher.publish(Keys("a", "b", "d"), namespace=NAMESPACE)
        await until(lambda: [set(cache) for cache in caches] == [{"c"}, set(), set()])


@pytest.mark.parametrize(
    ("targets", "entries"),
    [
        ((Keys("a"),), 1),
        ((Keys("a", "none"), Tags("red")), 2),
        ((Tags("red", "blue"),), 3),
        ((Prefixes("b"),), 2),
        ((Prefixes("b"), Keys("a", "ba"), Tags("red")), 4),
        ((Everything(),), 5),
    ],
)
async def test_an_entry_that_is_named_twice_is_counted_once(
    redis_url: str, targets: tuple[Target, ...], entries: int
) -> None:
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one") as [cache]:
        tagged(cache, "red", "a", "c")
        tagged(cache, "blue", "ba")
        fill(cache, "bb", "d")
        preview = await publisher.preview(*targets, namespace=NAMESPACE, timeout_seconds=PATIENT)
        assert (preview.entries, preview.is_estimate) == (entries, False)


async def test_a_replica_that_does_not_answer_is_missing_and_the_sum_an_estimate(redis_url: str) -> None:
    async with (
        TcpProxy("127.0.0.1", int(redis_url.rpartition(":")[2])) as proxy,
        Publisher(redis_url) as publisher,
        replicas(redis_url, "there") as [cache],
        replicas(proxy.url, "away", **{**FAST, "echo_timeout_seconds": 30.0}),
    ):
        fill(cache, "a")
        preview = await publisher.preview(Keys("a"), namespace=NAMESPACE, timeout_seconds=PATIENT)
        assert (preview.replicas, preview.missing) == (2, ())
        proxy.stall()
        preview = await publisher.preview(Keys("a"), namespace=NAMESPACE, timeout_seconds=IMPATIENT)
        assert (preview.replicas, preview.entries, preview.is_estimate) == (2, 1, True)
        assert preview.missing == ("away",)
        proxy.heal()


async def test_with_no_replica_there_a_preview_is_empty_at_once(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        async with replicas(redis_url, "one"):
            pass
        preview = await publisher.preview(Everything(), namespace=NAMESPACE, timeout_seconds=PATIENT)
    assert (preview.replicas, preview.entries, preview.is_estimate, preview.missing) == (0, 0, False, ())
    assert preview.doubt is None


async def test_a_preview_is_an_estimate_when_the_registry_may_not_list_every_replica(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher, redis_probe(redis_url) as probe:
        nothing = await publisher.preview(Everything(), namespace=NAMESPACE, timeout_seconds=PATIENT)
        assert (nothing.replicas, nothing.entries, nothing.is_estimate, nothing.missing) == (0, 0, True, ())
        assert "is missing" in (nothing.doubt or "")
        async with replicas(redis_url, "one", "two") as caches:
            fill(caches[0], "a")
            whole = await publisher.preview(Everything(), namespace=NAMESPACE, timeout_seconds=PATIENT)
            assert (whole.replicas, whole.entries, whole.is_estimate, whole.doubt) == (2, 1, False, None)
            await probe.call("DEL", names_of(NAMESPACE).registry)
            while len(await publisher.replicas(NAMESPACE)) < 2:
                pass
            again = await publisher.preview(Everything(), namespace=NAMESPACE, timeout_seconds=PATIENT)
            assert (again.replicas, again.entries, again.is_estimate, again.missing) == (2, 1, True, ())
            assert "has existed for only" in (again.doubt or "")


async def test_a_large_request_is_asked_in_parts(redis_url: str) -> None:
    keys = [f"product:{number}" for number in range(1_900)]
    assert len(counting(invalidation_of([Keys(*keys), Tags("red")]))) == 5
    async with Publisher(redis_url) as publisher, AsyncExitStack() as stack:
        cache = LocalCache(TTLCache(maxsize=5_000, ttl=600))
        await stack.enter_async_context(Subscriber(redis_url, caches={NAMESPACE: cache}, **FAST))
        fill(cache, *keys[::2])
        preview = await publisher.preview(Keys(*keys), Tags("red"), namespace=NAMESPACE, timeout_seconds=PATIENT)
        assert (preview.entries, preview.is_estimate) == (950, True)


async def test_all_caches_of_a_namespace_are_counted(redis_url: str) -> None:
    caches = [new_cache(), new_cache()]
    async with Publisher(redis_url) as publisher, Subscriber(redis_url, caches={NAMESPACE: caches}, **FAST):
        for cache in caches:
            fill(cache, "a")
        preview = await publisher.preview(Keys("a"), namespace=NAMESPACE, timeout_seconds=PATIENT)
        assert (preview.replicas, preview.entries) == (1, 2)


async def test_each_namespace_is_asked_for_itself_also_when_it_comes_later(redis_url: str) -> None:
    first, second = new_cache(), new_cache()
    async with Publisher(redis_url) as publisher, Subscriber(redis_url, caches={"first": first}, **FAST) as subscriber:
        await subscriber.attach("second", second)
        fill(first, "a")
        fill(second, "a", "b")
        for namespace, entries in (("first", 1), ("second", 2)):
            preview = await publisher.preview(Everything(), namespace=namespace, timeout_seconds=PATIENT)
            assert (preview.replicas, preview.entries) == (1, entries)
        await subscriber.detach("first")
        while await publisher.replicas("first"):
            pass
        preview = await publisher.preview(Everything(), namespace="first", timeout_seconds=PATIENT)
        assert preview.replicas == 0
        async with redis_probe(redis_url) as probe:
            assert await probe.call("PUBSUB", "NUMSUB", names_of("first").question) == [
                names_of("first").question.encode(),
                0,
            ]


async def test_a_replica_answers_over_its_next_link_too(own_server: EmbeddedServer) -> None:
    async with Publisher(own_server.url) as publisher, replicas(own_server.url, "one") as [cache]:
        await publisher.preview(Everything(), namespace=NAMESPACE, timeout_seconds=PATIENT)
        asked(own_server.port, "CLIENT", "KILL", "TYPE", "pubsub")
        receipt = await publisher.publish(Keys("x"), namespace=NAMESPACE)
        while not [each for each in await publisher.replicas(NAMESPACE) if each.position == receipt.position]:
            pass
        fill(cache, "a")
        preview = await publisher.preview(Everything(), namespace=NAMESPACE, timeout_seconds=PATIENT)
        assert (preview.entries, preview.missing) == (1, ())


async def test_in_a_cluster_a_namespace_is_asked_at_its_own_server() -> None:
    with cluster_of_three() as cluster:
        caches = {namespace: new_cache() for namespace in cluster.namespaces()}
        async with Publisher(cluster.url) as publisher, Subscriber(cluster.url, caches=caches, **FAST):
            for namespace, cache in caches.items():
                fill(cache, "a")
                preview = await publisher.preview(Keys("a"), namespace=namespace, timeout_seconds=PATIENT)
                assert (preview.entries, preview.missing) == (1, ())


async def test_a_replica_that_may_not_be_asked_keeps_its_promise(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.shared.transport.redis.test_topology_acl import allow, rights_of

    rights = [right for right in rights_of("replica") if not right.endswith(":question")]
    assert rights != rights_of("replica")
    cache = new_cache()
    async with (
        Publisher(own_server.url) as publisher,
        Subscriber(
            allow(own_server, "replica", rights), caches={NAMESPACE: cache}, replica_id="old", **FAST
        ) as subscriber,
    ):
        fill(cache, "key", "other")
        await reached(subscriber, await publisher.publish(Keys("key"), namespace=NAMESPACE))
        await until(lambda: subscriber.stats().echoes > 3)
        assert (set(cache), subscriber.stats().lost) == ({"other"}, 0)
        preview = await publisher.preview(Keys("key"), namespace=NAMESPACE, timeout_seconds=IMPATIENT)
        assert (preview.replicas, preview.missing, preview.is_estimate) == (1, ("old",), True)
    assert caplog.text.count("this Redis user may not subscribe to the question channel") == 1


async def test_a_publisher_that_may_not_ask_is_told_so(own_server: EmbeddedServer) -> None:
    from tests.shared.transport.redis.test_topology_acl import CONFIRMING, allow, rights_of

    rights = [*rights_of("publisher"), *CONFIRMING]
    async with Publisher(allow(own_server, "publisher", rights)) as publisher:
        with pytest.raises(LogRefused, match="channel"):
            await publisher.preview(Keys("key"), namespace=NAMESPACE)
    allow(own_server, "publisher", [*rights, "&{cache-invalidation*}:question"])
    url = f"redis://publisher:secret@127.0.0.1:{own_server.port}"
    async with Publisher(url) as publisher, replicas(own_server.url, "one"):
        preview = await publisher.preview(Keys("key"), namespace=NAMESPACE, timeout_seconds=PATIENT)
        assert (preview.replicas, preview.missing) == (1, ())


async def test_what_cannot_be_asked_is_refused(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        with pytest.raises(InvalidTarget):
            await publisher.preview(namespace=NAMESPACE)
        for seconds in (0, 61, float("nan")):
            with pytest.raises(InvalidSettings, match="timeout_seconds"):
                await publisher.preview(Keys("a"), namespace=NAMESPACE, timeout_seconds=seconds)


async def test_a_question_that_cannot_be_read_costs_nothing_but_a_line(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Publisher(redis_url) as publisher, replicas(redis_url, "one") as [cache]:
        fill(cache, "a")
        async with redis_probe(redis_url) as probe:
            for frame in (b"now", b"\xff", b"[" * 100_000, b"{}"):
                await probe.call("PUBLISH", names_of(NAMESPACE).question, frame)
        preview = await publisher.preview(Everything(), namespace=NAMESPACE, timeout_seconds=PATIENT)
        assert (preview.entries, preview.missing, set(cache)) == (1, (), {"a"})
    assert caplog.text.count("is not answered") == 4


async def test_questions_beyond_what_can_wait_are_left_out() -> None:
    answerer = Answerer("one")
    sequencer = Sequencer(NAMESPACE, [new_cache()])
    for _ in range(1_010):
        answerer.receive(sequencer, encode_question(Question(id="1", everything=True)))
    assert answerer.left_out == 10


def test_questions_and_answers_survive_the_way() -> None:
    question = Question(id="1", keys=("a",), tags=("b",), prefixes=("c",), entries=("d",))
    assert decode_question(encode_question(question)) == question
    with pytest.raises(MalformedFrame, match="invalid question"):
        decode_question(b"now")
    answer = ReplicaAnswer(id="1", count=3, is_estimate=True)
    assert decode_reports(encode_reports("one", answers=[answer])).answers == (answer,)
    # A publisher of a version that knows no answers finds no reports.
    assert json.loads(encode_reports("one", answers=[answer])).get("reports", []) == []


# --- how a cache counts ----------------------------------------------------------------------------------------------


def large_cache(entries: int) -> LocalCache:
    cache = LocalCache(TTLCache(maxsize=entries, ttl=600))
    for number in range(entries):
        # Of two kinds in turns, and a third kind that comes last.
        kind = "late" if number >= entries - entries // 10 else ("product", "price")[number % 2]
        cache.store(cache.begin_load(f"{kind}:{number}"), number, tags=("odd",) if number % 2 else ())
    return cache


@pytest.mark.parametrize(
    ("target", "entries"),
    [(Prefixes("product:"), 9_000), (Prefixes("late:"), 2_000), (Prefixes("none:"), 0), (Tags("odd"), 10_000)],
)
def test_a_large_number_is_about_right(target: Target, entries: int) -> None:
    count = large_cache(20_000).count(target)
    assert count.is_estimate
    assert count.entries == pytest.approx(entries, rel=0.3)


def test_everything_is_counted_exactly_at_any_size() -> None:
    assert large_cache(20_000).count(Everything()) == (20_000, False)


def test_up_to_a_thousand_entries_are_counted_exactly() -> None:
    cache = large_cache(1_000)
    assert cache.count(Prefixes("product:")) == (450, False)
    assert cache.count(Tags("odd")) == (500, False)
    assert cache.count(Keys("product:0", "price:1", "none")) == (2, False)


def test_entries_that_are_dead_and_not_swept_are_not_counted() -> None:
    cache = large_cache(1_000)
    cache.apply(Prefixes("product:"))
    assert cache.stats().entries == 1_000
    assert cache.count(Prefixes("product:")) == (0, False)
    assert cache.count(Everything()) == (550, False)
    cache.apply(Everything())
    assert cache.count(Everything()) == (0, False)


def test_entries_past_their_own_expiry_and_those_evicted_are_not_counted() -> None:
    now = 0.0
    cache = LocalCache(TTLCache(maxsize=3, ttl=600), clock=lambda: now)
    for number in range(5):
        cache.store(cache.begin_load(f"a{number}"), 1, tags=("red",), ttl_seconds=10 if number == 4 else None)
    assert cache.count(Tags("red")) == (3, False)
    now = 11.0
    assert cache.count(Tags("red")) == (2, False)
    assert cache.count(Everything()) == (2, False)


@pytest.mark.parametrize("target", [Prefixes("product:"), Tags("odd"), Keys(*map("product:{}".format, range(5_000)))])
@pytest.mark.parametrize("is_swept", [True, False])
def test_what_is_dropped_between_two_steps_of_counting_is_not_counted(target: Target, is_swept: bool) -> None:
    cache = large_cache(20_000)
    steps = cache.counting(invalidation_of([target]))
    next(steps)
    cache.apply(Everything())
    while is_swept and cache.sweep():
        pass
    *_, count = steps
    assert count.entries == 0


def test_counting_is_no_reading() -> None:
    cache = LocalCache(LRUCache(maxsize=2))
    cache.confirm_coherent(cache.clock())
    fill(cache, "old", "new")
    before = cache.stats()
    assert cache.count(Keys("old"), Prefixes("o")) == (1, False)
    assert cache.stats() == before
    fill(cache, "newest")
    assert cache.get("old") is None, "expected the oldest to be evicted: counting has made it the newest"
    assert cache.get("new") == "old"


# --- over HTTP, and from a shell -------------------------------------------------------------------------------------


@asynccontextmanager
async def api(url: str | None, **settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    app = create_app(ApiSettings(redis_url=url, **settings) if url else ApiSettings(**settings))
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


async def test_a_preview_over_http_answers_what_the_library_does(redis_url: str) -> None:
    async with api(redis_url) as client, replicas(redis_url, "one") as [cache]:
        fill(cache, "a", "b")
        answer = await client.post(
            "/invalidations/preview", json={"namespace": NAMESPACE, "keys": ["a"], "reason": "price change"}
        )
        assert (answer.status_code, answer.json()) == (
            200,
            {
                "namespace": NAMESPACE,
                "replicas": 1,
                "entries": 1,
                "is_estimate": False,
                "by_replica": [{"replica": "one", "entries": 1, "is_estimate": False}],
                "missing": [],
                "doubt": None,
            },
        )
        assert set(cache) == {"a", "b"}


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, ""),
        ({"keys": [""]}, "/keys/0"),
        ({"keys": ["a"], "everything": True}, "/everything"),
        ({"keys": ["a"], "confirm": {}}, ""),
        ({"keys": ["a"], "namespace": "no such"}, "/namespace"),
    ],
)
async def test_what_is_wrong_with_a_preview_is_pointed_at(redis_url: str, body: object, pointer: str) -> None:
    async with api(redis_url) as client:
        answer = await client.post("/invalidations/preview", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0].get("pointer") == pointer


async def test_a_dry_run_prints_how_many_and_drops_nothing(own_server: EmbeddedServer) -> None:
    async with replicas(own_server.url, "web-1", "web-2") as caches:
        for cache in caches:
            fill(cache, "product:1", "product:2")

        def command(*arguments: str) -> tuple[int, str]:
            finished = run(
                "publish",
                "--namespace",
                NAMESPACE,
                "--prefix",
                "product:",
                "--dry-run",
                *arguments,
                BROADCACHE_REDIS_URL=own_server.url,
            )
            return finished.returncode, finished.stdout

        code, output = await asyncio.to_thread(command)
        assert (code, output.splitlines()[-1]) == (0, "nothing was dropped: 2 replicas, 4 entries")
        assert output.splitlines()[0].split() == ["web-1", "2"]
        code, output = await asyncio.to_thread(command, "--json")
        assert (code, json.loads(output)["entries"]) == (0, 4)
        assert [len(cache) for cache in caches] == [2, 2]
