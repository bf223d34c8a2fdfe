"""`broadcache namespaces`: what it prints, and with which exit code it ends."""

import asyncio
import json
import re

import pytest
from tests.support.command_line import run
from tests.support.redis_probe import redis_probe
from tests.support.replicas import FAST, new_cache

from broadcache.publisher import Publisher
from broadcache.shared import Everything, Keys
from broadcache.shared.transport.redis.names import names_of
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio


def command(url: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
    finished = run("namespaces", *arguments, BROADCACHE_REDIS_URL=url, **variables)
    return finished.returncode, finished.stdout, finished.stderr


async def while_the_loop_runs(url: str, *arguments: str) -> tuple[int, str, str]:
    return await asyncio.to_thread(command, url, *arguments)


async def test_namespaces_are_listed_in_pages(redis_url: str) -> None:
    assert command(redis_url) == (0, "there are no namespaces\n", "")
    async with Publisher(redis_url) as publisher:
        for name in ("c", "a", "b"):
            await publisher.publish(Keys("key"), namespace=name)
    code, output, errors = command(redis_url, "--limit", "2")
    assert (code, errors) == (0, "there are more: list them with --after b\n")
    heading, *lines = output.splitlines()
    assert heading.split() == ["namespace", "sequence", "log", "replicas", "silent", "last", "sent", "memory"]
    assert [line.split()[:5] for line in lines] == [["a", "1", "1", "0", "0"], ["b", "1", "1", "0", "0"]]
    assert re.search(r" 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ +[\d.]+ KiB$", lines[0])
    code, output, errors = command(redis_url, "--after", "b", "--json")
    assert (code, errors) == (0, "")
    [listed] = map(json.loads, output.splitlines())
    assert (listed["namespace"], listed["head"]["sequence"], listed["log_length"]) == ("c", 1, 1)
    assert listed["replicas"] == {"registered": 0, "silent": 0, "silent_serving": 0}


async def test_a_namespace_is_forgotten_unless_replicas_use_it(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        await publisher.publish(Everything(), namespace="products")
        async with Subscriber(redis_url, replica_id="web-1", caches={"products": new_cache()}, **FAST):
            code, output, _ = await while_the_loop_runs(redis_url, "--forget", "products")
            expected = (
                "namespace products is not forgotten: it is followed by web-1: stop each, it then leaves by itself\n"
            )
            assert (code, output) == (1, expected)
            code, output, _ = await while_the_loop_runs(redis_url, "--forget", "products", "--json")
            assert json.loads(output) == {
                "namespace": "products",
                "outcome": "in use",
                "registered": ["web-1"],
                "silent": [],
                "is_list_cut": False,
            }
        async with redis_probe(redis_url) as probe:
            [seconds, _] = await probe.call("TIME")
            await probe.call("ZADD", names_of("products").registry, int(seconds) * 1_000 - 1_000, "web-\x1b2")
            await probe.call("ZADD", names_of("products").registry, int(seconds) * 1_000 + 90_000, " forgotten")
            code, output, _ = await while_the_loop_runs(redis_url, "--forget", "products")
            assert code == 1
            assert "it may be served from the caches of web-\\x1b2, which fell silent: end each" in output
            assert "; it may be served by silent replicas that are no longer listed" in output
            await probe.call("DEL", names_of("products").registry)
    code, output, _ = await while_the_loop_runs(redis_url, "--forget", "products")
    assert (code, output.partition(";")[0]) == (0, "namespace products is forgotten")
    assert command(redis_url, "--forget", "products")[:2] == (
        1,
        "namespace products has no keys; see broadcache namespaces\n",
    )
    assert command(redis_url, "--forget", "a b")[0] == 2


async def test_the_prefix_of_the_environment_and_of_the_url_is_used(redis_url: str) -> None:
    async with Publisher(redis_url, prefix="staging") as publisher:
        await publisher.publish(Everything(), namespace="products")
    assert command(redis_url)[1] == "there are no namespaces\n"
    for code, output, errors in (
        command(redis_url, BROADCACHE_PREFIX="staging"),
        command(f"{redis_url}?prefix=staging", BROADCACHE_PREFIX="other"),
    ):
        assert (code, errors) == (0, "")
        assert "products" in output
    code, _, errors = command(redis_url, BROADCACHE_PREFIX="*")
    assert (code, errors.partition(":")[2].partition(":")[0]) == (2, " BROADCACHE_PREFIX is not valid")
