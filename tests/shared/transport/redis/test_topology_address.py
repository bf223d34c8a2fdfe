"""Addresses: what can be written, and what is said about what cannot."""

import pytest

from broadcache.shared import InvalidSettings
from broadcache.shared.transport.redis.address import RedisAddress


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1", None),
        ("redis://:hunter2@127.0.0.1:6379/3", "redis://:…@127.0.0.1:6379/3"),
        ("redis://[::1]:6379", None),
        ("rediss://me:hunter2@redis.example:6380?ssl_cert_reqs=none", "rediss://me:…@redis.example:6380"),
        ("unix:///run/redis.sock?db=2", "unix:///run/redis.sock"),
        ("redis+sentinel://10.0.0.1,[fd00::2]:26380,sentinel.example/orders", None),
        (
            "rediss+sentinel://me:hunter2@10.0.0.1:26379/orders/3?sentinel_password=hunter2",
            "rediss+sentinel://me:…@10.0.0.1:26379/orders/3",
        ),
        ("redis+cluster://10.0.0.1:7000,10.0.0.2", None),
        ("rediss+cluster://:hunter2@10.0.0.1:7000/0?ssl_check_hostname=false", "rediss+cluster://:…@10.0.0.1:7000/0"),
    ],
)
def test_an_address_shows_itself_without_its_secrets(url: str, shown: str | None) -> None:
    assert RedisAddress(url).label == (shown or url)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://me:hunter2@127.0.0.1", "one of the following schemes"),
        ("redis://127.0.0.1:hunter2", "after the host comes a port from 0 to 65535"),
        ("redis://me:hunter2", "after the host comes a port from 0 to 65535"),
        ("redis://:hunter2@127.0.0.1:99999", "after the host comes a port from 0 to 65535"),
        ("redis://127.0.0.1?ssl_ca_data=hunter2", "unexpected keyword argument 'ssl_ca_data'"),
        ("redis+sentinel://:hunter2@10.0.0.1:26379", "after the sentinels comes /service"),
        ("redis+sentinel://:hunter2@10.0.0.1:26379/", "after the sentinels comes /service"),
        ("redis+sentinel://:hunter2@10.0.0.1:26379/orders/three", "the database is not a number"),
        ("redis+sentinel://:hunter2@/orders", "between // and / come servers such as 10.0.0.1:26379,10.0.0.2:26379"),
        ("redis+sentinel://me:hunter2/orders", "between // and / come servers"),
        ("redis+sentinel://10.0.0.1:99999/orders", "between // and / come servers"),
        ("redis+sentinel://10.0.0.1,,10.0.0.2/orders", "between // and / come servers"),
        ("redis+cluster://:hunter2@10.0.0.1:7000/1", "a cluster has one database: leave out"),
        ("redis+cluster://10.0.0.1:7000?sentinel_password=hunter2", "unexpected keyword argument 'sentinel_password'"),
        ("redis+sentinel://:hunter2@10.0.0.1/orders?sentinel_tls=true", "sentinel_tls needs rediss+sentinel"),
        ("rediss+sentinel://:hunter2@10.0.0.1/orders?sentinel_tls=no", "sentinel_tls must be true or false"),
        ("rediss+cluster://:hunter2@10.0.0.1?sentinel_tls=false", "unexpected keyword argument 'sentinel_tls'"),
        ("redis+clusters://:hunter2@10.0.0.1", "one of the following schemes"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused_with_what_to_write(url: str, text: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        RedisAddress(url)
    assert text in str(refused.value)
    assert "hunter2" not in str(refused.value)
