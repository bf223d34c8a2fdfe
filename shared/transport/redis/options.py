"""The options of a Redis URL: those that work, and for each other known one what to use instead.

Source: the arguments of the client library's connections (redis-py 8), and the URLs of other clients.
"""

import difflib
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from .names import PREFIX_FORM, check_prefix

__all__ = ["read_options", "tls_context_of"]

_TRUTHS: Final = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
_CERT_REQS: Final = {"none": "none", "optional": "optional", "required": "required"}
_TLS_VERSIONS: Final = {
    "tlsv1.2": ssl.TLSVersion.TLSv1_2,
    "1.2": ssl.TLSVersion.TLSv1_2,
    str(int(ssl.TLSVersion.TLSv1_2)): ssl.TLSVersion.TLSv1_2,
    "tlsv1.3": ssl.TLSVersion.TLSv1_3,
    "1.3": ssl.TLSVersion.TLSv1_3,
    str(int(ssl.TLSVersion.TLSv1_3)): ssl.TLSVersion.TLSv1_3,
}
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
# What can be shown in an error: a path, and not the contents of the file that it should name.
_SHOWABLE_PATH: Final = re.compile(r"[./~]?[\w./-]{1,200}\.(crt|cert|cer|pem|key)", re.ASCII)

_DEADLINES: Final = (
    "the deadlines are connect_timeout_seconds and echo_timeout_seconds of a Subscriber, and timeout_seconds of a "
    "Publisher"
)
_ONE_CONNECTION: Final = "there is no connection pool: each link is one connection"
_RETRIES: Final = "a lost link is always opened again, with backoff_seconds_max of a Subscriber"
_BYTES: Final = "names are UTF-8 and replies are bytes, always"
_CREDENTIALS: Final = "pass credentials= to the Subscriber or Publisher"
_IN_URL: Final = "write it as a part of the URL, e.g. redis://127.0.0.1:6379/0"
_TLS_SCHEME: Final = "write rediss:// for TLS"
_SERVICE_IN_PATH: Final = "write the name after the sentinels: redis+sentinel://10.0.0.1:26379/service"
_SEVERAL: Final = "list the servers between commas: redis+cluster://10.0.0.1:6379,10.0.0.2:6379"
_PRIMARY: Final = "broadcache only uses the primary"
_ARGUMENT: Final = "it cannot be written in a URL"
_NAMED: Final = "broadcache names its connections itself"

# What to use instead of each, by the names between spaces.
_INSTEAD: Final[Mapping[str, str]] = {
    # redis-py
    "socket_timeout timeout": _DEADLINES,
    "max_connections single_connection_client auto_close_connection_pool": _ONE_CONNECTION,
    "retry retry_on_error retry_on_timeout cluster_error_retry_attempts connection_error_retry_attempts": _RETRIES,
    "encoding encoding_errors charset errors decode_responses": _BYTES,
    "client_name lib_name lib_version driver_info": _NAMED,
    "credential_provider redis_connect_func": _CREDENTIALS,
    "host port path unix_socket_path connection_class": _IN_URL,
    "parser_class encoder_class event_dispatcher cache cache_config connection_pool queue_class ssl_context "
    "socket_keepalive_options socket_type himport_registry legacy_responses response_callbacks command_packer "
    "maint_notifications_config maint_notifications_pool_handler maintenance_state maintenance_notification_hash "
    "orig_host_address orig_socket_timeout orig_socket_connect_timeout "
    "oss_cluster_maint_notifications_handler": _ARGUMENT,
    "health_check_interval": "links are checked every echo_interval_seconds of a Subscriber",
    "protocol": "broadcache always uses protocol 3",
    "ssl_validate_ocsp ssl_validate_ocsp_stapled ssl_ocsp_context ssl_ocsp_expected_cert": "OCSP is not checked",
    "address_remap": "pass address_remap= to the Subscriber or Publisher",
    "startup_nodes addr addrs nodes cluster": _SEVERAL,
    "require_full_coverage dynamic_startup_nodes read_from_replicas load_balancing_strategy reinitialize_steps "
    "policy_resolver min_other_sentinels": _PRIMARY,
    # kombu and Celery, Lettuce, go-redis, ioredis, redis-rb, StackExchange.Redis, coredis, aioredis
    "read_only readonly read_from readFrom replica scaleReads route_by_latency route_randomly": _PRIMARY,
    "ssl tls use_ssl useSsl sslmode scheme": _TLS_SCHEME,
    "verifyPeer verify_peer skip_verify tls_verify insecure": "write ssl_cert_reqs=none",
    "sslProtocols ssl_version minTlsVersion": "write ssl_min_version=TLSv1.3",
    "cafile tls_ca_file ssl_ca_file ca_file ca": "write ssl_ca_certs=/path",
    "database virtual_host virtualHost": "write the number after the host, or db=1",
    "user auth requirepass": "write user and password before the host, percent-encoded",
    "sentinelMasterId master_name masterName master service_name service masterset name": _SERVICE_IN_PATH,
    "sentinelPassword sentinel_auth sentinel_kwargs": "write sentinel_username=… and sentinel_password=…",
    "poolsize pool_size poolSize min_idle_conns max_idle_conns maxclients minsize maxsize": _ONE_CONNECTION,
    "dial_timeout read_timeout write_timeout pool_timeout connect_timeout connectTimeout commandTimeout syncTimeout "
    "connection_timeout stream_timeout": _DEADLINES,
    "max_retries maxRetriesPerRequest abortConnect reconnect_attempts": _RETRIES,
    "clientName clientname libraryName libraryVersion identity_suffix": _NAMED,
    "family noDelay keepAlive": "write socket_keepalive=true, or leave it out",
    "key_prefix keyPrefix global_keyprefix channel_prefix": "write prefix=staging",
}
_REFUSED: Final[Mapping[str, str]] = {name: text for names, text in _INSTEAD.items() for name in names.split()}


class _Option(NamedTuple):
    """An option that works: what it is converted with, and what an error says that it expects."""

    convert: Callable[[str], Any]
    expected: str


def read_options(query: str, *, is_tls: bool, is_sentinel: bool) -> dict[str, Any]:
    """Return the options of a URL's query, converted.

    Raises: ValueError, which shows neither a value nor the name of an option that is not known: either may be a part of
            a password.
    """
    options: dict[str, Any] = {}
    for number, text in enumerate(query.split("&") if query else [], start=1):
        written, equals, value_text = text.partition("=")
        name = unquote(written)
        if not equals or not (name in _OPTIONS or name in _REFUSED):
            raise ValueError(_unknown(name, number))
        if name.startswith("sentinel_") and not is_sentinel:
            raise ValueError(f"the option {name} belongs to redis+sentinel:// URLs; leave it out")
        if name in options:
            raise ValueError(f"the option {name} is written twice; leave one of them out")
        if "+" in value_text:
            raise ValueError(f"the option {name} contains a +, which may mean a space; write %2B or %20")
        try:
            value = unquote(value_text, errors="strict")
        except UnicodeDecodeError:
            value = ""
        if name not in _OPTIONS and (name, value.lower()) not in _WITHOUT_EFFECT:
            raise ValueError(f"the option {name} is not supported: {_REFUSED[name]}; leave {name} out")
        if name.startswith("ssl_") and not is_tls:
            raise ValueError(f"the option {name} needs TLS; write rediss:// (or valkeys://), or leave it out")
        if name in _OPTIONS:
            options[name] = _converted(name, value)
    return options


def _converted(name: str, text: str) -> Any:
    option = _OPTIONS[name]
    try:
        if text:
            return option.convert(text)
    except (ValueError, KeyError):
        pass
    shown = f", got {text}" if option.convert in (_file, _directory) and _SHOWABLE_PATH.fullmatch(text) else ""
    raise ValueError(f"the option {name} expects {option.expected}{shown}")


def _unknown(name: str, number: int) -> str:
    close = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.85)
    advice = f"did you mean {close[0]}?" if close else f"the known ones are {', '.join(_OPTIONS)}"
    return (
        f"what follows the ? as number {number} is not a known option, written name=value; {advice}; a ? or & in a "
        "password must be percent-encoded"
    )


def _number(text: str) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise ValueError
    return int(text)


def _positive(text: str) -> int:
    if (number := _number(text)) < 1:
        raise ValueError
    return number


def _seconds(text: str) -> float:
    if _SECONDS.fullmatch(text) is None or not (seconds := float(text)):
        raise ValueError
    return seconds


def _text(text: str) -> str:
    return text


def _truth(text: str) -> bool:
    return _TRUTHS[text.lower()]


def _cert_reqs(text: str) -> str:
    return _CERT_REQS[text.lower().removeprefix("ssl.").removeprefix("cert_")]


def _tls_version(text: str) -> ssl.TLSVersion:
    return _TLS_VERSIONS[text.lower()]


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError
    return text


def _directory(text: str) -> str:
    if not Path(text).is_dir():
        raise ValueError
    return text


def _verify_flags(text: str) -> list[ssl.VerifyFlags]:
    return [ssl.VerifyFlags[flag.strip()] for flag in text.strip("[]").split(",")]


_A_TRUTH: Final = "true or false"
_FLAGS: Final = "names of ssl.VerifyFlags between commas"
_OPTIONS: Final[Mapping[str, _Option]] = {
    "db": _Option(_number, "the number of a database"),
    "prefix": _Option(check_prefix, PREFIX_FORM),
    "username": _Option(_text, "a user"),
    "password": _Option(_text, "a password"),
    "socket_connect_timeout": _Option(_seconds, "a number of seconds above 0"),
    "socket_keepalive": _Option(_truth, _A_TRUTH),
    "socket_read_size": _Option(_positive, "a number of bytes above 0"),
    "ssl_ca_certs": _Option(_file, "the path of a file with certificates, and it names no file"),
    "ssl_ca_data": _Option(_text, "certificates as PEM"),
    "ssl_ca_path": _Option(_directory, "the path of a directory with certificates, and it names no directory"),
    "ssl_certfile": _Option(_file, "the path of a file with a certificate, and it names no file"),
    "ssl_keyfile": _Option(_file, "the path of a file with a key, and it names no file"),
    "ssl_password": _Option(_text, "the password of ssl_keyfile"),
    "ssl_cert_reqs": _Option(_cert_reqs, "required, optional or none"),
    "ssl_check_hostname": _Option(_truth, _A_TRUTH),
    "ssl_ciphers": _Option(_text, "ciphers as OpenSSL names them"),
    "ssl_min_version": _Option(_tls_version, "TLSv1.2 or TLSv1.3"),
    "ssl_include_verify_flags": _Option(_verify_flags, _FLAGS),
    "ssl_exclude_verify_flags": _Option(_verify_flags, _FLAGS),
    "sentinel_username": _Option(_text, "a user of the sentinels"),
    "sentinel_password": _Option(_text, "a password of the sentinels"),
    "sentinel_tls": _Option(_truth, _A_TRUTH),
}
# Options that would be refused, with the value that broadcache uses anyway.
_WITHOUT_EFFECT: Final = frozenset({("protocol", "3"), ("decode_responses", "false"), ("encoding", "utf-8")})


def tls_context_of(options: Mapping[str, Any]) -> ssl.SSLContext:
    """Return the TLS settings that these options ask for, among them those that begin with `ssl_`.

    Not the client library's: before redis-py 6 it accepts a certificate of any host, and it lacks some options.

    Raises: OSError, ValueError, TypeError.
    """
    given = {name.removeprefix("ssl_"): value for name, value in options.items() if name.startswith("ssl_")}
    context = ssl.create_default_context()
    verify_mode = ssl.VerifyMode[f"CERT_{given.get('cert_reqs', 'required').upper()}"]
    context.check_hostname = verify_mode is not ssl.CERT_NONE and given.get("check_hostname", True)
    context.verify_mode = verify_mode
    for flag in given.get("include_verify_flags", ()):
        context.verify_flags |= flag
    for flag in given.get("exclude_verify_flags", ()):
        context.verify_flags &= ~flag
    if given.keys() & {"certfile", "keyfile"}:
        certificate: Any = given.get("certfile")  # a key without one is a TypeError
        context.load_cert_chain(certificate, given.get("keyfile"), given.get("password"))
    if given.keys() & {"ca_certs", "ca_path", "ca_data"}:
        context.load_verify_locations(given.get("ca_certs"), given.get("ca_path"), given.get("ca_data"))
    if "min_version" in given:
        context.minimum_version = given["min_version"]
    if "ciphers" in given:
        context.set_ciphers(given["ciphers"])
    return context
