"""The proxy that hides which server answers, tested itself: against a real one."""

import re

import pytest
from tests.support.hiding_proxy import HidingProxy
from tests.support.redis_probe import redis_probe

from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link

pytestmark = pytest.mark.anyio

IDS = re.compile(rb"^(?:run_id|master_replid):([0-9a-f]{40})\r?$", re.MULTILINE)
SCRIPT = "return {redis.call('INFO', 'replication'):match('master_replid:(%x+)') or '', ARGV[1]}"
DIGEST = "0123456789abcdef0123456789abcdef01234567"


async def ids_told(probe: Link) -> list[bytes]:
    infos = await probe.call("INFO", "server"), await probe.call("INFO", "replication")
    return IDS.findall(b"\r\n".join(infos))


async def test_neither_info_nor_a_script_tells_which_server_it_is(own_server: EmbeddedServer) -> None:
    async with HidingProxy("127.0.0.1", own_server.port) as proxy, redis_probe(proxy.url) as probe:
        assert await ids_told(probe) == []
        # What else looks like an id is left alone.
        assert await probe.call("EVAL", SCRIPT, 0, DIGEST) == [b"", DIGEST.encode()]
        assert proxy.replies_changed >= 3
    async with redis_probe(own_server.url) as probe:
        assert len(await ids_told(probe)) == 2


async def test_a_server_that_was_restarted_is_hidden_as_well(own_server: EmbeddedServer) -> None:
    async with HidingProxy("127.0.0.1", own_server.port) as proxy:
        own_server.restart()
        async with redis_probe(proxy.url) as probe:
            assert await ids_told(probe) == []


async def test_large_replies_pass_unchanged(own_server: EmbeddedServer) -> None:
    value = bytes(range(256)) * 2_000 + b"$40\r\n" + DIGEST[:39].encode()
    async with HidingProxy("127.0.0.1", own_server.port) as proxy, redis_probe(proxy.url) as probe:
        await probe.call("SET", "key", value)
        assert await probe.call("GET", "key") == value
