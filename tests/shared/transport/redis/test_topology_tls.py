"""TLS: who the server is gets checked, and what is wrong with it is said."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.impostors import impostor, names_primary, names_slots, says_nothing
from tests.support.receipts import position_of
from tests.support.replicas import FAST, FAST_START, fill, new_cache, reached
from tests.support.tls_proxy import Authority, new_authority, tls_proxy
from tests.support.topologies import SERVICE, sentinel
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import InvalidSettings, Keys, LinkLost
from broadcache.shared.transport.redis.address import RedisAddress
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link
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
            with pytest.raises(LinkLost, match="cannot connect to rediss://"):
                await publisher.publish(Keys("key"))


async def test_a_server_of_another_authority_is_refused(
    own_server: EmbeddedServer, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = new_authority(tmp_path / "other")
    async with tls_proxy(authority.server_context(wants_client_certificate=False), own_server.port) as port:
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={other.ca_file}"
        async with Publisher(url, timeout_seconds=0.5) as publisher:
            with pytest.raises(LinkLost, match=r"connect to rediss://127\.0\.0\.1:\d+: .*certificate verify failed"):
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
    with pytest.raises(LinkLost, match="that the server runs and accepts TLS"):
        await Link.open(address, client_name="test", timeout_seconds=0.2)


def test_a_certificate_file_that_is_not_there_is_told_at_construction(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"ssl_ca_certs expects .* names no file, got .*missing\.crt"):
        Publisher(f"rediss://127.0.0.1:6379?ssl_ca_certs={tmp_path / 'missing.crt'}")


# Sentinels


@asynccontextmanager
async def sentinel_over_tls(
    directory: Path,
    authority: Authority,
    server: EmbeddedServer,
    *,
    wants_client_certificate: bool = False,
    **more: Any,
) -> AsyncIterator[str]:
    """A real sentinel and the primary that it names, both behind TLS: the URL of them, without options but the CA."""
    context = authority.server_context(wants_client_certificate=wants_client_certificate)
    async with tls_proxy(context, server.port) as data_port:
        with sentinel(directory / "sentinel", data_port, down_after_ms=60_000, **more) as sentinel_port:
            async with tls_proxy(context, sentinel_port) as port:
                yield f"rediss+sentinel://127.0.0.1:{port}/{SERVICE}?ssl_ca_certs={authority.ca_file}"


async def test_sentinels_are_asked_over_tls(own_server: EmbeddedServer, authority: Authority, tmp_path: Path) -> None:
    cache = new_cache()
    async with (
        sentinel_over_tls(tmp_path, authority, own_server) as url,
        Subscriber(url, caches={"default": cache}, **FAST) as subscriber,
        Publisher(url) as publisher,
    ):
        fill(cache, "key", "other")
        await reached(subscriber, await publisher.publish(Keys("key")))
        assert set(cache) == {"other"}


async def test_sentinels_see_the_client_certificate_and_their_own_password_over_tls(
    own_server: EmbeddedServer, authority: Authority, tmp_path: Path
) -> None:
    scene = sentinel_over_tls(tmp_path, authority, own_server, wants_client_certificate=True, password="swordfish")
    async with scene as url:
        async with Publisher(f"{url}&{authority.client_options}&sentinel_password=swordfish") as publisher:
            assert position_of(await publisher.publish(Keys("key"))).sequence == 1
        async with Publisher(f"{url}&sentinel_password=swordfish", timeout_seconds=0.5) as publisher:
            with pytest.raises(LinkLost, match="a sentinel to name the primary of 'orders', got: "):
                await publisher.publish(Keys("key"))


@pytest.mark.parametrize("is_sentinel_tls", [False, True], ids=["clear", "certificate-of-another-name"])
async def test_an_impostor_among_the_sentinels_is_sent_nothing_and_has_no_server_called(
    tmp_path: Path, is_sentinel_tls: bool
) -> None:
    # The impostor holds a certificate of a trusted authority: for a name of its own.
    public = new_authority(tmp_path / "public", "localhost")
    context = public.server_context(wants_client_certificate=False)
    async with (
        impostor(says_nothing, tls=context) as server,
        impostor(names_primary("localhost", server.port), tls=context if is_sentinel_tls else None) as lying,
    ):
        url = (
            f"rediss+sentinel://app:hunter2@127.0.0.1:{lying.port}/{SERVICE}?ssl_ca_certs={public.ca_file}"
            "&sentinel_password=swordfish"
        )
        async with Publisher(url, timeout_seconds=2) as publisher:
            with pytest.raises(LinkLost, match="they are queried over TLS: check that") as lost:
                await publisher.publish(Keys("key"))
        assert f"127.0.0.1:{lying.port} (" in str(lost.value)
        assert server.connections == 0
        assert b"swordfish" not in lying.heard
        assert b"SENTINEL" not in lying.heard
        assert "hunter2" not in str(lost.value)
        if is_sentinel_tls:
            assert "certificate is not valid for '127.0.0.1'" in str(lost.value)


async def test_a_sentinel_is_checked_as_little_as_the_url_says(own_server: EmbeddedServer, tmp_path: Path) -> None:
    elsewhere = new_authority(tmp_path / "elsewhere", "redis.example")
    async with sentinel_over_tls(tmp_path, elsewhere, own_server) as url:
        async with Publisher(url, timeout_seconds=0.5) as publisher:
            with pytest.raises(
                LinkLost, match=r"primary of 'orders', got: .*certificate is not valid for '127\.0\.0\.1'"
            ):
                await publisher.publish(Keys("key"))
        async with Publisher(f"{url}&ssl_check_hostname=false") as publisher:
            assert position_of(await publisher.publish(Keys("key"))).sequence == 1


async def test_sentinels_in_clear_are_asked_only_if_the_url_says_so_and_one_warning_says_what_that_means(
    own_server: EmbeddedServer, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with tls_proxy(authority.server_context(wants_client_certificate=False), own_server.port) as data_port:
        with sentinel(tmp_path / "sentinel", data_port, down_after_ms=60_000) as port:
            url = f"rediss+sentinel://:hunter2@127.0.0.1:{port}/{SERVICE}?ssl_ca_certs={authority.ca_file}"
            async with Publisher(url, timeout_seconds=3) as publisher:
                with pytest.raises(LinkLost, match="they are queried over TLS"):
                    await publisher.publish(Keys("key"))
            assert "without TLS" not in caplog.text
            url = url.replace(":hunter2@", "") + "&sentinel_tls=false"
            for sequence in (1, 2):
                async with Publisher(url) as publisher:
                    assert position_of(await publisher.publish(Keys("key"))).sequence == sequence
    [warning] = [message for message in caplog.messages if "without TLS" in message]
    assert f"sentinels of rediss+sentinel://127.0.0.1:{port}/{SERVICE} are queried without TLS" in warning


# A cluster


@pytest.mark.parametrize("kind", ["clear", "seed-of-another-name", "named-server-of-another-name"])
async def test_an_impostor_in_a_cluster_is_sent_no_password(tmp_path: Path, authority: Authority, kind: str) -> None:
    elsewhere = new_authority(tmp_path / "elsewhere", "redis.example")
    trusted = tmp_path / "both.crt"
    trusted.write_bytes(authority.ca_file.read_bytes() + elsewhere.ca_file.read_bytes())
    genuine, other = (each.server_context(wants_client_certificate=False) for each in (authority, elsewhere))
    seed_tls = {"clear": None, "seed-of-another-name": other, "named-server-of-another-name": genuine}[kind]
    async with (
        impostor(says_nothing, tls=other) as server,
        impostor(names_slots("127.0.0.1", server.port), tls=seed_tls) as seed,
    ):
        url = f"rediss+cluster://app:hunter2@127.0.0.1:{seed.port}?ssl_ca_certs={trusted}"
        async with Publisher(url, timeout_seconds=2) as publisher:
            with pytest.raises(LinkLost, match=rf"127\.0\.0\.1:({seed.port}|{server.port})\b"):
                await publisher.publish(Keys("key"))
        # A seed whose certificate is for the host of the URL is trusted: it is one of the cluster.
        assert (b"hunter2" in seed.heard) == (kind == "named-server-of-another-name")
        assert not server.heard
