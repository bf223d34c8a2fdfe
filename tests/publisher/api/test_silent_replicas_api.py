"""Silent replicas over HTTP: listed, counted, and forgotten by those who may write."""

from collections.abc import AsyncIterator

import httpx2
import pytest
from tests.publisher.api.test_api import client_of, problem_of
from tests.support.redis_probe import redis_probe

from broadcache.publisher.api.settings import ApiSettings
from broadcache.shared.transport.redis.names import names_of

pytestmark = pytest.mark.anyio

NAMES = names_of("products")
READER, WRITER = ({"Authorization": f"Bearer {name}-0123456789"} for name in ("reader", "writer"))


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Of a publisher whose namespace has two silent replicas and a registered one."""
    async with redis_probe(redis_url) as probe:
        seconds, _ = await probe.call("TIME")
        now_ms = int(seconds) * 1_000
        rows = (now_ms - 60_000, "serving/1"), (now_ms - 60_000 + 0.5, "bypassing"), (now_ms + 600_000, "alive")
        await probe.call("ZADD", NAMES.registry, *[each for row in rows for each in row])
    tokens = ("ro:reader-0123456789", "rw:writer-0123456789")
    settings = ApiSettings(redis_url=redis_url, tokens=tokens, namespaces=("products",))
    async with client_of(settings) as client:
        yield client


async def listed(client: httpx2.AsyncClient) -> dict[str, tuple[bool, bool]]:
    response = await client.get("/replicas?namespace=products", headers=READER)
    return {each["replica"]: (each["is_silent"], each["may_serve"]) for each in response.json()["replicas"]}


async def test_silent_replicas_are_listed_and_can_be_forgotten(client: httpx2.AsyncClient) -> None:
    assert await listed(client) == {"alive": (False, True), "bypassing": (True, False), "serving/1": (True, True)}
    for replica in ("serving%2F1", "bypassing"):
        response = await client.delete(f"/replicas/{replica}?namespace=products", headers=WRITER)
        assert (response.status_code, response.content) == (204, b"")
    assert set(await listed(client)) == {"alive"}


async def test_a_replica_that_cannot_be_forgotten_is_a_problem(client: httpx2.AsyncClient) -> None:
    path = "/replicas/{}?namespace=products"
    problem_of(await client.delete(path.format("nowhere"), headers=WRITER), 404, "replica-unknown")
    problem_of(await client.delete(path.format("alive"), headers=WRITER), 409, "replica-registered")
    problem_of(await client.delete(path.format("x" * 600), headers=WRITER), 422, "parameter-invalid")
    problem_of(await client.delete("/replicas/bypassing?namespace=users", headers=WRITER), 404, "namespace-unknown")
    problem_of(await client.delete(path.format("bypassing"), headers=READER), 403, "right-missing")
    problem_of(await client.delete(path.format("bypassing")), 401, "token-invalid")
    assert len(await listed(client)) == 3


async def test_the_members_that_are_no_replicas_cannot_be_forgotten(client: httpx2.AsyncClient, redis_url: str) -> None:
    async with redis_probe(redis_url) as probe:
        await probe.call("ZADD", NAMES.registry, "9e15", " since=0")
        problem_of(
            await client.delete("/replicas/%20since%3D0?namespace=products", headers=WRITER), 409, "replica-registered"
        )
        assert await probe.call("ZCOUNT", NAMES.registry, "9e15", "+inf") == 1


async def test_a_scrape_counts_the_replicas(client: httpx2.AsyncClient) -> None:
    text = (await client.get("/metrics", headers=READER)).text
    for state, count in {"registered": 1, "silent": 1, "silent serving": 1}.items():
        assert f'broadcache_replicas{{namespace="products",state="{state}"}} {count}.0' in text
