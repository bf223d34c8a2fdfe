"""`broadcache replica`: the example service, alone and as three processes beside a naive one."""

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from decimal import Decimal
from pathlib import Path

import pytest
from tests.support.command_line import ask, running
from tests.support.receipts import position_of

from broadcache.cli.demo.catalogue import CatalogueSource, NoSuchProduct
from broadcache.publisher import Publisher
from broadcache.shared import InvalidSettings, Keys, Receipt, Tags, Target
from broadcache.shared.transport.redis.embedded import EmbeddedServer

Urls = tuple[str, ...]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture(scope="module")
def urls(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    """Three replicas and, last, one that does not subscribe; all made to start at once, on a source yet to be made."""
    shared = ("--port", "0", "--redis-url", server.url)
    source = ("--source", str(tmp_path_factory.mktemp("source") / "catalogue.sqlite"))
    with ExitStack() as stack:
        names = ("replica-1", "replica-2", "replica-3")
        started = [stack.enter_context(running("replica", *shared, *source, "--name", name)) for name in names]
        started.append(stack.enter_context(running("replica", *shared, *source, "--no-subscribe")))
        yield tuple(replica.url() for replica in started)


def test_one_publish_makes_every_replica_serve_the_new_value_but_not_the_naive_one(
    server: EmbeddedServer, urls: Urls
) -> None:
    assert [_read(url, 1) for url in urls] == [(24.9, False)] * 4
    assert [_read(url, 1) for url in urls] == [(24.9, True)] * 4

    status, answer = ask("PUT", f"{urls[0]}/products/1", {"price": 19.9})
    assert (status, answer["price"], answer["replica"]) == (200, 19.9, "replica-1")
    # Nothing was invalidated, not even in the replica that wrote.
    assert [_read(url, 1) for url in urls] == [(24.9, True)] * 4

    sent_at_ns = time.monotonic_ns()
    receipt = _publish(server, Keys("product:1"))
    assert receipt.receivers == 3
    drops = [_drop_of(url, receipt.id) for url in urls[:3]]
    assert [drop["sequence"] for drop in drops] == [position_of(receipt).sequence] * 3
    assert all(sent_at_ns < drop["applied_at_ns"] < time.monotonic_ns() for drop in drops)

    assert [_read(url, 1) for url in urls] == [(19.9, False)] * 3 + [(24.9, True)]
    assert [_read(url, 1) for url in urls] == [(19.9, True)] * 3 + [(24.9, True)]


def test_all_products_share_a_tag(server: EmbeddedServer, urls: Urls) -> None:
    url = urls[1]
    assert [_read(url, 3)[1], _read(url, 3)[1]] == [False, True]
    _drop_of(url, _publish(server, Tags("catalogue")).id)
    assert _read(url, 3) == (4.5, False)


def test_a_replica_tells_its_state_and_position(urls: Urls) -> None:
    status, answer = ask("GET", f"{urls[2]}/cache-invalidation")
    assert (status, answer["replica"], answer["state"]) == (200, "replica-3", "coherent")
    assert ask("GET", f"{urls[2]}/health/ready") == (
        200,
        {"status": "ready", "state": "coherent", "replicas": [{"replica": "replica-3", "state": "coherent"}]},
    )
    status, answer = ask("GET", f"{urls[3]}/health/live")
    assert (status, answer["replica"].partition("-")[0]) == (200, "replica")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "complaint"),
    [
        ("GET", "/products/7", None, 404, "expected the id of a product in the source, got 7"),
        ("PUT", "/products/7", {"price": 1}, 404, "expected the id of a product in the source, got 7"),
        ("GET", "/products/first", None, 422, "path.product_id"),
        ("GET", f"/products/{2**64}", None, 422, "path.product_id"),
        ("PUT", "/products/5", {"price": -1}, 422, "body.price"),
        ("PUT", "/products/5", {"price": "1.005"}, 422, "body.price"),
        ("PUT", "/products/5", {"price": "NaN"}, 422, "body.price"),
        ("PUT", "/products/5", {}, 422, "body.price"),
        ("PUT", "/products/5", b"{", 422, "JSON"),
        ("DELETE", "/products/5", None, 405, "Method Not Allowed"),
        ("GET", "/nothing", None, 404, "Not Found"),
    ],
)
def test_a_request_that_cannot_be_answered_gets_a_problem(
    urls: Urls, method: str, path: str, body: object, status: int, complaint: str
) -> None:
    for url in (urls[0], urls[3]):
        got, problem = ask(method, url + path, body)
        assert (got, problem["status"]) == (status, status)
        assert complaint in problem["detail"]


def test_a_source_is_created_and_filled_once_by_the_first_process(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.sqlite"
    with ThreadPoolExecutor(8) as threads:
        sources = list(threads.map(lambda _: CatalogueSource(path), range(8)))
    sources[0].set_price(1, Decimal("0.07"))
    assert {source.product(1).price for source in [*sources, CatalogueSource(path)]} == {Decimal("0.07")}
    assert str(sources[0].product(42).price) == "12.00"


def test_a_source_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but some notes\n" * 100)
    with pytest.raises(InvalidSettings, match=r"notes\.txt"):
        CatalogueSource(path)
    assert path.read_text().startswith("not a database")


def test_a_product_that_is_gone_is_missed_by_reads_and_writes(tmp_path: Path) -> None:
    source = CatalogueSource(tmp_path / "catalogue.sqlite")
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite", isolation_level=None)) as connection:
        connection.execute("DELETE FROM products WHERE id = 42")
    with pytest.raises(NoSuchProduct):
        source.product(42)
    with pytest.raises(NoSuchProduct):
        source.set_price(42, Decimal(1))
    # The lock was given back.
    assert source.set_price(1, Decimal(1)).price == 1


def _read(url: str, product_id: int) -> tuple[float, bool]:
    status, answer = ask("GET", f"{url}/products/{product_id}")
    assert status == 200, answer
    return answer["price"], answer["from_cache"]


def _drop_of(url: str, invalidation_id: str) -> dict[str, int]:
    """Watch a replica until it has applied this invalidation."""
    while True:
        _, drop = ask("GET", f"{url}/demo/last-drop")
        if drop["id"] == invalidation_id:
            return {name: drop[name] for name in ("sequence", "applied_at_ns")}


def _publish(server: EmbeddedServer, target: Target) -> Receipt:
    async def publish() -> Receipt:
        async with Publisher(server.url) as publisher:
            return await publisher.publish(target, namespace="products")

    return asyncio.run(publish())
