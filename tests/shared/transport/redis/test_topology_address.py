"""Addresses: what can be written, and what is said about what cannot."""

import fcntl
import inspect
import os
import ssl
import subprocess
import sys
import termios
import traceback
from pathlib import Path
from typing import Any

import pytest
from redis import connection as sync_connection
from redis.asyncio import RedisCluster, connection

from broadcache.shared import InvalidSettings
from broadcache.shared.transport.redis.address import RedisAddress
from broadcache.shared.transport.redis.url import read_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1", None),
        ("redis://:hunter2@127.0.0.1:6379/3", "redis://…@127.0.0.1:6379/3"),
        ("redis://hunter2@127.0.0.1:6379/3", "redis://…@127.0.0.1:6379/3"),
        ("redis://hunter2:hunter2@hunter2@127.0.0.1:6379/3", "redis://…@127.0.0.1:6379/3"),
        ("  redis://127.0.0.1:6379/3\n", "redis://127.0.0.1:6379/3"),
        ("REDIS://127.0.0.1:6379/3", "redis://127.0.0.1:6379/3"),
        ("redis://[::1]:6379", None),
        ("redis://[fe80::1%eth0]:6379", None),
        ("redis://my_host.example.:6379/", None),
        ("valkey://127.0.0.1", None),
        ("valkeys://:hunter2@127.0.0.1", "valkeys://…@127.0.0.1"),
        ("valkey+cluster://127.0.0.1,127.0.0.2", None),
        ("rediss://me:hunter2@redis.example:6380?ssl_cert_reqs=none", "rediss://…@redis.example:6380"),
        ("unix:///run/redis.sock?db=2", "unix:///run/redis.sock"),
        ("unix://me:hunter2@/run/redis.sock", "unix://…@/run/redis.sock"),
        ("redis+sentinel://10.0.0.1,[fd00::2]:26380,sentinel.example/orders", None),
        (
            "rediss+sentinel://me:hunter2@10.0.0.1:26379/orders/3?sentinel_password=hunter2",
            "rediss+sentinel://…@10.0.0.1:26379/orders/3",
        ),
        ("redis+cluster://10.0.0.1:7000,10.0.0.2", None),
        ("rediss+cluster://:hunter2@10.0.0.1:7000/0?ssl_check_hostname=false", "rediss+cluster://…@10.0.0.1:7000/0"),
    ],
)
def test_an_address_shows_itself_without_its_secrets(url: str, shown: str | None) -> None:
    assert RedisAddress(url).label == (shown or url)
    assert repr(RedisAddress(url)) == f"RedisAddress({shown or url!r})"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "it is empty"),
        ("http://me:hunter2@127.0.0.1", "one of the following schemes: .*; write redis:// instead of http://"),
        ("redis-sentinel://:hunter2@127.0.0.1/orders", "write redis\\+sentinel:// instead of redis-sentinel://"),
        ("redis+socket:///run/redis.sock", "write unix:// instead of redis\\+socket://"),
        ("hunter2://127.0.0.1", "one of the following schemes"),
        ("127.0.0.1:6379", "one of the following schemes and two slashes"),
        ("redis:foo:1234", "one of the following schemes and two slashes"),
        ("redis:/127.0.0.1", "one of the following schemes and two slashes"),
        ("redis://", "contains no host"),
        ("redis:///1", "contains no host"),
        ("redis://:6379", "the host or the port is not valid"),
        ("redis://:hunter2@", "contains no host"),
        ("redis://127.0.0.1:hunter2", "after the host comes a port from 1 to 65535"),
        ("redis://me:hunter2", "after the host comes a port from 1 to 65535"),
        ("redis://:hunter2@127.0.0.1:99999", "after the host comes a port from 1 to 65535"),
        ("redis://127.0.0.1:0", "after the host comes a port from 1 to 65535"),
        ("redis://127.0.0.1:", "after the host comes a port from 1 to 65535"),
        ("redis://::1:6379", "an IPv6 address stands in brackets"),
        ("redis://[hunter2]:6379", "the host or the port is not valid"),
        ("redis://[::1", "the host or the port is not valid"),
        ("redis://" + "a" * 64, "the host or the port is not valid"),
        ("redis://10.0.0.1,10.0.0.2", "several servers; write redis\\+sentinel:// or redis\\+cluster://"),
        ("redis://127.0.0.1/1/2", "the number of a database"),
        ("redis://127.0.0.1/mymaster", "the name of a primary belongs to redis\\+sentinel://"),
        ("redis://127.0.0.1/-1", "the number of a database"),
        ("redis://127.0.0.1/1?db=2", "two values for db"),
        ("redis://me:hunter2@127.0.0.1?password=other", "two values for password"),
        ("redis://127.0.0.1?db=1&db=2", "the option db is written twice"),
        ("redis://127.0.0.1?db=", "the option db expects the number of a database"),
        ("redis://127.0.0.1?password=a+b", "write %2B or %20"),
        ("redis://:%ff@127.0.0.1", "is not UTF-8"),
        ("redis://me:hun ter2@127.0.0.1", "it contains a space"),
        ("redis://me:hun\nter2@127.0.0.1", "a character that cannot be printed"),
        ("redis://me:hun\ud800ter2@127.0.0.1", "a character that cannot be printed"),
        ("redis://me:AbCd/hunter2@127.0.0.1", "an @ comes after the first / or \\?; .* must be percent-encoded"),
        ("redis://me:1234/hunter2@127.0.0.1", "an @ comes after the first / or \\?"),
        ("redis://me:1234?hunter2@127.0.0.1", "an @ comes after the first / or \\?"),
        ("redis://me:AbCd#hunter2@127.0.0.1", "it contains a #; .* must be percent-encoded"),
        ("redis://me:1234#hunter2@127.0.0.1", "it contains a #"),
        ("redis://127.0.0.1?hunter2", "not a known option"),
        ("redis://127.0.0.1?hunter2=1", "not a known option"),
        ("redis://127.0.0.1?pasword=hunter2", "did you mean password\\?"),
        ("redis://127.0.0.1?ssl_ca_data=hunter2", "the option ssl_ca_data needs TLS"),
        ("rediss://127.0.0.1?ssl_ca_data=hunter2", "the TLS options cannot be used together"),
        ("rediss://127.0.0.1?ssl_ciphers=hunter2", "the TLS options cannot be used together"),
        ("rediss://127.0.0.1?ssl_ca_certs=hunter2", "it names no file"),
        ("rediss://127.0.0.1?ssl_keyfile=-----BEGIN%20KEY-----%0Ahunter2", "it names no file"),
        ("unix://run/redis.sock", "the absolute path of a socket"),
        ("unix://me:AbCd/hunter2@/run/redis.sock", "an @ comes after the first /"),
        ("unix://", "the absolute path of a socket"),
        ("redis+sentinel://:hunter2@10.0.0.1:26379", "after the sentinels comes /service"),
        ("redis+sentinel://:hunter2@10.0.0.1:26379/", "after the sentinels comes /service"),
        ("redis+sentinel://:hunter2@10.0.0.1:26379/orders/three", "the number of a database"),
        ("redis+sentinel://:hunter2@10.0.0.1:26379/orders/3/4", "the number of a database"),
        ("redis+sentinel://:hunter2@/orders", "between // and / come servers such as 10.0.0.1:26379,10.0.0.2:26379"),
        ("redis+sentinel://me:hunter2/orders", "between // and / come servers"),
        ("redis+sentinel://10.0.0.1:99999/orders", "between // and / come servers"),
        ("redis+sentinel://10.0.0.1,,10.0.0.2/orders", "between // and / come servers"),
        ("redis+sentinel://me:a@10.0.0.1,me:hunter2@10.0.0.2/orders", "user and password are written once"),
        ("redis+cluster://:hunter2@10.0.0.1:7000/1", "a cluster has one database: leave out"),
        ("redis+cluster://:hunter2@10.0.0.1:7000?db=1", "a cluster has one database: leave out"),
        ("redis+cluster://10.0.0.1:7000?sentinel_password=hunter2", "sentinel_password belongs to redis\\+sentinel://"),
        ("redis+sentinel://:hunter2@10.0.0.1/orders?sentinel_tls=true", "sentinel_tls belongs to rediss\\+sentinel"),
        ("rediss+sentinel://:hunter2@10.0.0.1/orders?sentinel_tls=maybe", "sentinel_tls expects true or false"),
        ("rediss+cluster://:hunter2@10.0.0.1?sentinel_tls=false", "sentinel_tls belongs to redis\\+sentinel://"),
        ("redis+clusters://:hunter2@10.0.0.1", "one of the following schemes"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused_with_what_to_write(url: str, text: str) -> None:
    with pytest.raises(InvalidSettings, match=text) as refused:
        RedisAddress(url)
    shown = "".join(traceback.format_exception(refused.value, limit=0))
    assert "hunter2" not in shown
    assert refused.value.__context__ is None


@pytest.mark.parametrize("url", [None, b"redis://:hunter2@127.0.0.1", ["redis://:hunter2@127.0.0.1"]])
def test_what_is_no_text_is_refused_without_being_shown(url: Any) -> None:
    with pytest.raises(InvalidSettings, match="it is no str but") as refused:
        RedisAddress(url)
    assert "hunter2" not in str(refused.value)


# Options


def options_of_the_client_library() -> set[str]:
    """Each argument that one of its connections has, each that it reads from URLs, and those of its pools."""
    kinds: list[Any] = [
        connection.AbstractConnection, connection.Connection, connection.SSLConnection,
        connection.UnixDomainSocketConnection, connection.ConnectionPool, connection.BlockingConnectionPool,
        sync_connection.SSLConnection, RedisCluster,
    ]  # fmt: skip
    names = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
    return (names | set(connection.URL_QUERY_ARGUMENT_PARSERS)) - {"self", "kwargs", "connection_kwargs", "args"}


@pytest.mark.parametrize("name", sorted(options_of_the_client_library()))
@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_each_option_of_the_client_library_works_or_is_refused_by_name(scheme: str, name: str) -> None:
    for value in ("1", "hunter2"):
        problem = ""
        try:
            RedisAddress(f"{scheme}://127.0.0.1?{name}={value}")
        except InvalidSettings as error:
            problem = str(error)
        assert not problem or f"the option {name} " in problem or "the TLS options cannot be used together" in problem
        assert "hunter2" not in problem


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ("db=3", {"db": 3}),
        ("username=me&password=a%2Bb", {"username": "me", "password": "a+b"}),
        ("socket_connect_timeout=1.5", {"socket_connect_timeout": 1.5}),
        ("socket_keepalive=off", {"socket_keepalive": False}),
        ("socket_read_size=4096", {"socket_read_size": 4096}),
        ("ssl_cert_reqs=CERT_NONE", {"ssl_cert_reqs": "none"}),
        ("ssl_cert_reqs=CERT_REQUIRED", {"ssl_cert_reqs": "required"}),
        ("ssl_cert_reqs=ssl.CERT_OPTIONAL", {"ssl_cert_reqs": "optional"}),
        ("ssl_check_hostname=no", {"ssl_check_hostname": False}),
        ("ssl_min_version=TLSv1.3", {"ssl_min_version": ssl.TLSVersion.TLSv1_3}),
        ("ssl_min_version=771", {"ssl_min_version": ssl.TLSVersion.TLSv1_2}),
        ("ssl_include_verify_flags=[VERIFY_X509_STRICT]", {"ssl_include_verify_flags": [ssl.VERIFY_X509_STRICT]}),
        ("protocol=3&decode_responses=False&encoding=utf-8", {}),
    ],
)
def test_an_option_that_works_reaches_the_connection(options: str, arguments: dict[str, object]) -> None:
    assert {"db": 0, **arguments} == read_url(f"rediss://127.0.0.1?{options}").arguments


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("max_connections=10", "no connection pool"),
        ("decode_responses=true", "replies are bytes"),
        ("socket_timeout=5", "timeout_seconds of a Publisher"),
        ("health_check_interval=30", "echo_interval_seconds"),
        ("protocol=2", "always uses protocol 3"),
        ("credential_provider=x", "pass credentials="),
        ("tls=true", "write rediss://"),
        ("sentinelMasterId=orders", "redis\\+sentinel://10.0.0.1:26379/service"),
        ("pool_size=5", "no connection pool"),
        ("abortConnect=false", "always opened again"),
    ],
)
def test_an_option_of_another_client_is_refused_with_what_to_use_instead(option: str, instead: str) -> None:
    with pytest.raises(InvalidSettings, match=f"the option {option.partition('=')[0]} is not supported: .*{instead}"):
        RedisAddress(f"redis://127.0.0.1?{option}")


def test_a_key_with_a_password_that_is_not_given_is_no_question_on_the_terminal(tmp_path: Path) -> None:
    key, certificate = tmp_path / "client.key", tmp_path / "client.crt"
    subject = ["-subj", "/CN=client", "-passout", "pass:hunter2"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        *subject,
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run(command, check=True, capture_output=True)
    url = f"rediss://127.0.0.1?ssl_certfile={certificate}&ssl_keyfile={key}"
    program = f"from broadcache.shared.transport.redis.address import RedisAddress; RedisAddress({url!r})"
    controller, terminal = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True, timeout=30, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None, check=False,
        )  # fmt: skip
    finally:
        os.close(controller)
        os.close(terminal)
    assert "the TLS options cannot be used together" in done.stderr
    RedisAddress(f"{url}&ssl_password=hunter2")
