"""The examples run as they stand."""

import asyncio
from typing import Any

import httpx2
import pytest

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def examples_find_redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADCACHE_REDIS_URL", redis_url)


async def test_the_worker_loads_once_and_serves_from_its_cache(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import worker

    await asyncio.to_thread(worker.main)
    assert capsys.readouterr().out.split("\n") == ["read from the database", *["teapot"] * 3, "coherent 2", ""]


async def test_the_catalogue_forgets_a_price_when_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import catalogue, change_price
    from tests.support.waiting import until

    transport: Any = httpx2.ASGITransport(app=catalogue.app)
    async with (
        catalogue.app.router.lifespan_context(catalogue.app),
        httpx2.AsyncClient(transport=transport, base_url="http://replica") as client,
    ):
        assert [(await client.get("/prices/1")).json() for _ in range(2)] == [100, 100]
        catalogue.PRICES[1] = 200
        await change_price.main()
        await until(lambda: catalogue.catalogue.cache.stats().dropped == 1)
        assert (await client.get("/prices/1")).json() == 200
    assert "is in the log: True" in capsys.readouterr().out
