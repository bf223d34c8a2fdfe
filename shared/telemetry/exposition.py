"""The Prometheus exposition of metrics. Only this module checks whether prometheus_client is installed."""

import importlib.util
import logging
from typing import TYPE_CHECKING, Final

from ..process.extras import check_installed

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["INSTALL", "can_expose", "check_can_expose", "exposed"]

INSTALL: Final = "pip install 'broadcache[metrics]'"

_log = logging.getLogger("broadcache.metrics")


def can_expose(where: str) -> bool:
    """Whether prometheus_client is installed; if not, log that `where` has no GET /metrics."""
    if importlib.util.find_spec("prometheus_client") is not None:
        return True
    _log.info("%s has no GET /metrics: prometheus_client is not installed; to enable it: %s", where, INSTALL)
    return False


def check_can_expose(what: str) -> None:
    """Raises: InvalidSettings when prometheus_client, which `what` needs, is not installed."""
    check_installed(what, "prometheus_client")


def exposed(registry: "CollectorRegistry", accept: str | None) -> tuple[bytes, str]:
    """Return all metrics of `registry` in the format that the Accept header requests, and its media type."""
    from prometheus_client.exposition import choose_encoder

    encode, media_type = choose_encoder(accept or "")
    return encode(registry), media_type
