"""The settings of the publisher's HTTP API."""

import ipaddress
from typing import Annotated

from msgspec import Meta

from ..shared.errors import InvalidNamespace, InvalidSettings
from ..shared.invalidation import check_namespace
from ..shared.log import LOG_LENGTH
from ..shared.settings import Settings
from .tokens import Tokens

__all__ = ["ApiSettings", "is_loopback"]

_Text = Annotated[str, Meta(min_length=1)]


class ApiSettings(Settings, frozen=True, kw_only=True):
    """How the API listens, who may use it, and what it promises about a publish.

    Raises: InvalidSettings, at construction.
    """

    redis_url: Annotated[
        str, Meta(min_length=1, description="Where the log is; it may hold a password.", extra={"secret": True})
    ] = "redis://127.0.0.1:6379"
    listen_host: Annotated[
        str, Meta(min_length=1, description="The address to listen on; beyond loopback it takes a token.")
    ] = "127.0.0.1"
    listen_port: Annotated[
        int, Meta(ge=0, le=65_535, description="The TCP port to listen on; 0 takes a free one and tells which.")
    ] = 8_000
    tokens: Annotated[
        tuple[str, ...],
        Meta(
            description="TOKEN or rw:TOKEN (read and write) or ro:TOKEN (only GET). Several, so that one can be "
            "replaced while both are valid. None: everybody who reaches the port may publish.",
            extra={"secret": True},
        ),
    ] = ()
    allow_open: Annotated[
        bool, Meta(description="Listen beyond loopback without a token: for a network that lets nobody else in.")
    ] = False
    namespaces: Annotated[
        tuple[_Text, ...],
        Meta(description="The namespaces that may be used, so that a misspelt one is an error. None: any."),
    ] = ()
    publish_timeout_seconds: Annotated[
        float, Meta(gt=0, le=60, description="How long one publish is tried before the client hears 503.")
    ] = 2.0
    log_length: Annotated[
        int,
        Meta(ge=1, description="About how many invalidations each log keeps, for replicas that were away."),
    ] = LOG_LENGTH
    idempotency_seconds: Annotated[
        float,
        Meta(ge=1, le=2_592_000, description="How long an Idempotency-Key is remembered, and a retry is safe."),
    ] = 86_400.0
    request_bytes_max: Annotated[
        int,
        Meta(ge=1_024, le=2**30, description="The largest request body: what one client can make us hold."),
    ] = 4 * 2**20
    event_clients_max: Annotated[
        int, Meta(ge=1, le=100_000, description="How many clients may follow GET /events at once.")
    ] = 100
    event_heartbeat_seconds: Annotated[
        float,
        Meta(gt=0, le=3_600, description="How long GET /events is silent at most: what stands between cuts idle ones."),
    ] = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = Tokens(self.tokens)
        for namespace in self.namespaces:
            try:
                check_namespace(namespace)
            except InvalidNamespace as error:
                raise InvalidSettings(f"BROADCACHE_NAMESPACES: {error}; correct it") from None
        if not tokens and not self.allow_open and not is_loopback(self.listen_host):
            raise InvalidSettings(
                f"BROADCACHE_LISTEN_HOST: expected a loopback address such as 127.0.0.1 as long as there is no token, "
                f"got {self.listen_host!r}: everybody who reaches it could empty every cache; set BROADCACHE_TOKENS, "
                "or BROADCACHE_ALLOW_OPEN=true (--allow-open) if the network lets nobody else in"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`. A name other than `localhost` is not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
