"""What a subscriber logs of an outage: a line for all namespaces, and not one for each."""

import asyncio
import logging

import pytest
from tests.support.replicas import FAST, new_cache
from tests.support.topologies import cluster_of_three
from tests.support.waiting import until

from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import Subscriber
from broadcache.subscriber.following.follower import Follower

pytestmark = pytest.mark.anyio

COUNT = 100


def texts_of(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [
        each.getMessage() for each in caplog.records if each.levelno >= level and each.name.startswith("broadcache")
    ]


async def test_a_restart_is_logged_once_for_all_namespaces(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caches = {f"tenant-{number}": new_cache() for number in range(COUNT)}
    caplog.set_level(logging.INFO, logger="broadcache")
    async with Subscriber(own_server.url, caches=caches, **FAST) as subscriber:
        caplog.clear()
        own_server.kill()
        await until(lambda: subscriber.stats().lost >= 3)
        await asyncio.to_thread(own_server.start)
        await until(lambda: subscriber.state == "coherent")
        begun, cleared = texts_of(caplog)
        assert begun.startswith(f"caches bypassed ({COUNT} namespaces): ")
        assert cleared == f"cleared {COUNT} namespaces (tenant-0, tenant-1, tenant-2 and 97 more): server changed"
        [ended] = [each for each in texts_of(caplog, logging.INFO) if each.startswith("coherent again after ")]
        assert f"{COUNT} namespaces" in ended


async def test_a_cluster_that_dies_is_logged_once_for_all_namespaces(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="broadcache.subscriber")
    with cluster_of_three() as cluster:
        caches = {f"tenant-{number}": new_cache() for number in range(20)}
        async with Subscriber(cluster.url, caches=caches, **FAST) as subscriber:
            caplog.clear()
            for node in cluster.nodes:
                node.kill()
            await until(lambda: not any(each.is_coherent for each in subscriber.caches))
            await until(lambda: subscriber.stats().lost >= 40)
            assert [each[:15] for each in texts_of(caplog)] == ["caches bypassed"]
            for node in cluster.nodes:
                await asyncio.to_thread(node.restart)
            await until(lambda: subscriber.state == "coherent")
            await until(lambda: any(each.startswith("coherent again") for each in texts_of(caplog, logging.INFO)))
            assert len(texts_of(caplog, logging.INFO)) < 10


async def test_an_error_of_ours_is_logged_with_its_traceback_once_an_outage(
    redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a mistake")

    async with Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as subscriber:
        for _ in range(2):
            caplog.clear()
            with monkeypatch.context() as patch:
                patch.setattr(Follower, "_echo", fail)
                lost = subscriber.stats().lost
                while subscriber.stats().lost < lost + 4:
                    await asyncio.sleep(0.01)
            await until(lambda: subscriber.state == "coherent")
            [record] = [each for each in caplog.records if each.exc_info]
            assert "an error in broadcache, please report it" in record.getMessage()


async def test_a_namespace_never_published_to_outlives_a_blip(own_server: EmbeddedServer) -> None:
    """Its head was begun by the first echo, and so is not taken for one that was lost."""
    caches = {"products": new_cache(), "users": new_cache()}
    async with Subscriber(own_server.url, caches=caches, **FAST) as subscriber:
        for _ in range(3):
            subscriptions = subscriber.stats().subscriptions
            link = next(iter(subscriber._roster.followers.values())).link
            assert link is not None
            await link.close()
            while subscriber.stats().subscriptions == subscriptions or subscriber.state != "coherent":
                await asyncio.sleep(0.01)
        assert [each.stats().clears for each in caches.values()] == [{"subscribed": 1}] * 2
