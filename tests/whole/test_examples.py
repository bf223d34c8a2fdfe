"""The examples run as they stand."""

import asyncio
import os
import subprocess
import sys
from typing import Any

import httpx2
import pytest
from tests.support.paths import ROOT

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


async def test_a_script_publishes_what_it_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import import_prices

    await asyncio.to_thread(import_prices.main)
    assert capsys.readouterr().out == "2 prices: logged as number 1\n1 prices: logged as number 2\n"


def test_a_service_without_an_event_loop_reads_and_changes() -> None:
    from examples import wsgi_shop

    def respond(method: str, path: str, query: str = "") -> bytes:
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
        return b"".join(wsgi_shop.app(environ, lambda *_: None))

    with wsgi_shop.subscriber:
        assert [respond("GET", "/1") for _ in range(2)] == [b"100"] * 2
        assert respond("PUT", "/1", "200") == b"200"
        assert respond("GET", "/1") == b"200"
        assert wsgi_shop.products.stats().hits == 2


@pytest.mark.timeout(180)
def test_the_tests_of_the_shop_pass_without_redis() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "BROADCACHE_REDIS_URL"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "examples/test_shop.py",
    ]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=150)
    assert "4 passed" in ran.stdout, ran.stdout + ran.stderr
