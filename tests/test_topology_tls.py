"""TLS: who the server is gets checked, and what is wrong with it is said."""

import logging
from pathlib import Path

import pytest
from tests.support.receipts import position_of
from tests.support.replicas import FAST, FAST_START, fill, new_cache, reached
from tests.support.tls_proxy import Authority, new_authority, tls_proxy
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import InvalidSettings, Keys, LinkLost
from broadcache.shared.address import RedisAddress
from broadcache.shared.embedded import EmbeddedServer
from broadcache.shared.link import Link
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return new_authority(tmp_path / "authority")


async def test_invalidations_travel_over_tls(own_server: EmbeddedServer, authority: Authority) -> None:
    cache = new_cache()
    async with tls_proxy(authority.server_context(wants_client_certificate=False), own_server.port) as port:
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={authority.ca_file}"
        async with Subscriber(url, caches={"default": cache}, **FAST) as subscriber, Publisher(url) as publisher:
            fill(cache, "key", "other")
            await reached(subscriber, await publisher.publish(Keys("key")))
            assert set(cache) == {"other"}


async def test_a_client_may_have_a_certificate_of_its_own(own_server: EmbeddedServer, authority: Authority) -> None:
    async with tls_proxy(authority.server_context(wants_client_certificate=True), own_server.port) as port:
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={authority.ca_file}"
        async with Publisher(f"{url}&{authority.client_options}") as publisher:
            assert position_of(await publisher.publish(Keys("key"))).sequence == 1
        async with Publisher(url, timeout_seconds=0.5) as publisher:
            with pytest.raises(LinkLost, match="expected a connection to rediss://"):
                await publisher.publish(Keys("key"))


async def test_a_server_of_another_authority_is_refused(
    own_server: EmbeddedServer, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = new_authority(tmp_path / "other")
    async with tls_proxy(authority.server_context(wants_client_certificate=False), own_server.port) as port:
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={other.ca_file}"
        async with Publisher(url, timeout_seconds=0.5) as publisher:
            with pytest.raises(
                LinkLost, match=r"connection to rediss://127\.0\.0\.1:\d+, got: .*certificate verify failed"
            ):
                await publisher.publish(Keys("key"))
        cache = new_cache()
        with caplog.at_level(logging.WARNING, logger="broadcache"):
            async with Subscriber(url, caches={"default": cache}, **FAST_START) as subscriber:
                await until(lambda: subscriber.stats().lost)
                assert not cache.is_coherent
        assert "certificate verify failed" in caplog.text


async def test_a_server_of_another_name_is_refused(own_server: EmbeddedServer, tmp_path: Path) -> None:
    elsewhere = new_authority(tmp_path / "elsewhere", "redis.example")
    async with tls_proxy(elsewhere.server_context(wants_client_certificate=False), own_server.port) as port:
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={elsewhere.ca_file}"
        async with Publisher(url, timeout_seconds=0.5) as publisher:
            with pytest.raises(LinkLost, match=r"certificate is not valid for '127\.0\.0\.1'"):
                await publisher.publish(Keys("key"))


async def test_a_server_that_takes_no_tls_is_given_up_in_time_and_the_text_says_tls(own_server: EmbeddedServer) -> None:
    address = RedisAddress(f"rediss://127.0.0.1:{own_server.port}")
    with pytest.raises(LinkLost, match="that the server runs and takes TLS"):
        await Link.open(address, client_name="test", timeout_seconds=0.2)


def test_a_certificate_file_that_is_not_there_is_told_at_construction(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"ssl_ca_certs names no file: .*missing\.crt"):
        Publisher(f"rediss://127.0.0.1:6379?ssl_ca_certs={tmp_path / 'missing.crt'}")
