"""The way to the primary: past servers that hang, through address maps, and with the failed server named."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.impostors import impostor, says_nothing
from tests.support.receipts import position_of
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.topologies import SERVICE, ClusterOfThree, asked, cluster_of_three, watched
from tests.support.waiting import wait_until

from broadcache.publisher import Publisher
from broadcache.shared import InvalidSettings, Keys, LinkLost
from broadcache.shared.transport.redis.address import RedisAddress
from broadcache.shared.transport.redis.link import Link
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterOfThree]:
    with cluster_of_three() as running:
        yield running


async def opened(address: RedisAddress, timeout_seconds: float) -> Link:
    return await Link.open(address, client_name="test", timeout_seconds=timeout_seconds)


@pytest.mark.parametrize("timeout_seconds", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("frozen", [1, 2])
async def test_a_server_of_a_cluster_that_hangs_keeps_no_link_away(
    cluster: ClusterOfThree, timeout_seconds: float, frozen: int
) -> None:
    namespace = cluster.namespaces()[2]
    for node in cluster.nodes[:frozen]:
        os.kill(node.pid, signal.SIGSTOP)
    try:
        link = await opened(RedisAddress(cluster.url).of(namespace), timeout_seconds)
        assert f"127.0.0.1:{cluster.nodes[2].port} of " in link.label
        await link.close()
    finally:
        for node in cluster.nodes[:frozen]:
            os.kill(node.pid, signal.SIGCONT)


@pytest.mark.parametrize("timeout_seconds", [0.2, 0.5])
async def test_sentinels_that_hang_keep_no_link_away(tmp_path: Path, timeout_seconds: float) -> None:
    with watched(tmp_path) as servers:
        async with impostor(says_nothing) as first, impostor(says_nothing) as second:
            silent = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
            url = f"redis+sentinel://{silent},127.0.0.1:{servers.sentinel_ports[0]}/{SERVICE}"
            link = await opened(RedisAddress(url), timeout_seconds)
            await link.close()


async def test_servers_that_all_hang_are_named_each_in_time() -> None:
    async with impostor(says_nothing) as first, impostor(says_nothing) as second:
        address = RedisAddress(f"redis+cluster://127.0.0.1:{first.port},127.0.0.1:{second.port}")
        with pytest.raises(LinkLost) as lost:
            await opened(address, 0.3)
        for it in (first, second):
            assert f"127.0.0.1:{it.port} (no answer within" in str(lost.value)
        assert all(
            task is asyncio.current_task() or "broadcache asks" not in task.get_name() for task in asyncio.all_tasks()
        )


async def test_a_link_that_is_given_up_leaves_no_question_behind() -> None:
    async with impostor(says_nothing) as first, impostor(says_nothing) as second:
        address = RedisAddress(f"redis+cluster://127.0.0.1:{first.port},127.0.0.1:{second.port}")
        opening = asyncio.create_task(opened(address, 30))
        await asyncio.sleep(0.05)
        opening.cancel()
        await asyncio.wait([opening])
        assert not [task for task in asyncio.all_tasks() if "broadcache asks" in task.get_name()]


async def test_the_server_that_failed_is_named_and_not_the_one_of_the_url(cluster: ClusterOfThree) -> None:
    """The seed answers; the primary that it names hangs, or refuses."""
    namespace, primary = cluster.namespaces()[1], cluster.nodes[1]
    seed = f"redis+cluster://127.0.0.1:{cluster.nodes[0].port}"
    os.kill(primary.pid, signal.SIGSTOP)
    try:
        with pytest.raises(LinkLost, match=f"no answer from 127.0.0.1:{primary.port} of {seed.replace('+', '.')} "):
            await opened(RedisAddress(seed).of(namespace), 0.5)
    finally:
        os.kill(primary.pid, signal.SIGCONT)
    with pytest.raises(LinkLost, match=r"cannot connect to 127\.0\.0\.1:1 of redis\+cluster"):
        await opened(RedisAddress(seed, address_remap={f"127.0.0.1:{primary.port}": "127.0.0.1:1"}).of(namespace), 2)


@pytest.mark.parametrize("form", ["mapping", "function"])
async def test_a_cluster_behind_an_address_map_is_reached(form: str) -> None:
    """The servers announce addresses that lead nowhere from here."""
    with cluster_of_three() as cluster:
        namespaces = cluster.namespaces()
        addresses = {f"inside-{node.port}.invalid:{node.port}": f"127.0.0.1:{node.port}" for node in cluster.nodes}
        for node in cluster.nodes:
            asked(node.port, "CONFIG", "SET", "cluster-announce-hostname", f"inside-{node.port}.invalid")
            asked(node.port, "CONFIG", "SET", "cluster-preferred-endpoint-type", "hostname")
        wait_until(
            lambda: all(str(asked(node.port, "CLUSTER", "SLOTS")).count("inside-") == 3 for node in cluster.nodes),
            "the announced addresses",
        )
        remap: Any = addresses if form == "mapping" else lambda address: ("127.0.0.1", address[1])
        caches = {namespace: new_cache() for namespace in namespaces}
        async with (
            Subscriber(cluster.url, caches=caches, address_remap=remap, **FAST) as subscriber,
            Publisher(cluster.url, address_remap=remap) as publisher,
        ):
            for namespace, cache in caches.items():
                fill(cache, "key", "other")
                await reached(subscriber, await publisher.publish(Keys("key"), namespace=namespace))
                assert set(cache) == {"other"}
        # The negative control: without the map, nothing is reached.
        async with Publisher(cluster.url, timeout_seconds=0.5) as publisher:
            with pytest.raises(LinkLost, match=r"inside-\d+\.invalid:\d+ of redis\+cluster"):
                await publisher.publish(Keys("key"), namespace=namespaces[0])


async def test_the_primary_of_sentinels_is_mapped_too(tmp_path: Path) -> None:
    with watched(tmp_path) as servers:
        primary = f"127.0.0.1:{servers.primary.port}"
        remap = {primary: f"localhost:{servers.primary.port}"}
        async with Publisher(servers.url, address_remap=remap) as publisher:
            assert position_of(await publisher.publish(Keys("key"))).sequence == 1
        link = await opened(RedisAddress(servers.url, address_remap=remap), 5)
        assert link.label.startswith(f"localhost:{servers.primary.port} of ")
        await link.close()


async def test_a_map_that_fails_is_a_lost_link_that_names_the_server(cluster: ClusterOfThree) -> None:
    remaps: list[tuple[Any, str]] = [
        (lambda address: {}[address], r"address_remap failed for 127\.0\.0\.1:\d+: .* it raised KeyError"),
        (lambda _: ("host", "6379"), "expected it to return .host, port., got str and str"),
    ]
    for remap, text in remaps:
        with pytest.raises(LinkLost, match=text):
            await opened(RedisAddress(cluster.url, address_remap=remap), 2)


@pytest.mark.parametrize(
    "remap", [{"10.0.0.5": "127.0.0.1:7001"}, {"10.0.0.5:6379": "127.0.0.1"}, {"a:1": "b:70000"}, {1: 2}, "10.0.0.5:1"]
)
def test_a_map_of_a_wrong_form_is_refused(remap: Any) -> None:
    with pytest.raises(InvalidSettings, match="expected address_remap to"):
        RedisAddress("redis+cluster://127.0.0.1", address_remap=remap)
