"""The tests of the shop, as its own developers write them: no Redis, and no waiting. `pytest examples/test_shop.py`."""

import os
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from broadcache.testing import ManualClock, RecordingPublisher, coherent

os.environ.setdefault("BROADCACHE_REDIS_URL", "redis://nowhere")  # nothing connects to it

from examples import shop


@pytest.fixture
def clock(recording_publisher: RecordingPublisher) -> Iterator[ManualClock]:
    with coherent(shop.subscriber, publisher=recording_publisher) as clock:
        yield clock


@pytest.fixture
def client(clock: ManualClock) -> Iterator[TestClient]:
    with TestClient(shop.app) as client:
        yield client


def test_a_price_is_read_once_until_its_lifetime_ends(client: TestClient, clock: ManualClock) -> None:
    assert client.get("/prices/1").json() == 100
    shop.PRICES[1] = 90  # changed without a word
    assert client.get("/prices/1").json() == 100
    clock.tick(301)
    assert client.get("/prices/1").json() == 90


def test_a_change_is_seen_at_once_and_published(client: TestClient, recording_publisher: RecordingPublisher) -> None:
    assert client.get("/prices/2").json() == 250
    client.put("/prices/2/300")
    assert client.get("/prices/2").json() == 300
    assert [(each.namespace, each.keys) for each in recording_publisher.published] == [("products", ("product:2",))]


def test_what_others_publish_is_dropped(client: TestClient, recording_publisher: RecordingPublisher) -> None:
    from broadcache.shared import Keys

    shop.products["product:1"] = 7
    recording_publisher.publish(Keys("product:1"), namespace="products")
    assert client.get("/prices/1").json() == shop.PRICES[1]


def test_the_service_is_ready(client: TestClient) -> None:
    assert client.get("/health/ready").json()["status"] == "ready"
