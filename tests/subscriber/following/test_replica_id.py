"""The id of a replica: drawn when a subscriber is entered, or given."""

import pytest
from cachetools import TTLCache

from broadcache.publisher import Publisher
from broadcache.subscriber import LocalCache, Subscriber
from broadcache.subscriber.following.settings import forked_replica_id

pytestmark = pytest.mark.anyio


def new_subscriber(url: str, **options: str) -> Subscriber:
    return Subscriber(url, caches={"products": LocalCache(TTLCache(maxsize=10, ttl=60))}, **options)  # type: ignore[arg-type]


async def test_it_is_drawn_anew_at_each_start_and_is_always_a_text(redis_url: str) -> None:
    subscriber = new_subscriber(redis_url)
    ids = [subscriber.replica_id]
    for _ in range(2):
        async with subscriber, Publisher(redis_url) as publisher:
            ids.append(subscriber.replica_id)
            assert [each.replica for each in await publisher.replicas("products")] == [subscriber.replica_id]
            assert subscriber.apply(b"").replica == subscriber.replica_id
    assert all(isinstance(id, str) for id in ids)
    assert len(set(ids)) == 3


async def test_a_given_one_stays(redis_url: str) -> None:
    subscriber = new_subscriber(redis_url, replica_id="web-1")
    for _ in range(2):
        async with subscriber:
            assert subscriber.replica_id == "web-1"
    assert subscriber.replica_id == "web-1"


def test_that_of_a_forked_child_is_not_longer_than_allowed() -> None:
    assert len(forked_replica_id("x" * 128)) == 128
    assert forked_replica_id("x" * 128) != "x" * 128
