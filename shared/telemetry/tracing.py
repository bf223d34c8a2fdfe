"""Traces that link a publish to the applies it causes, in a process that has set up OpenTelemetry.

This module never imports OpenTelemetry first: a process that has set a tracer provider has loaded it already. Without
a provider a publish only checks for one, and an apply checks only whether OpenTelemetry is loaded.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from ..invalidation import Invalidation

if TYPE_CHECKING:
    from opentelemetry.trace import Span

__all__ = ["is_set_up", "publishing", "trace_applied"]

_SCOPE: Final = "broadcache"
_API: Final = "opentelemetry.trace"

_log = logging.getLogger("broadcache.tracing")


def is_set_up() -> bool:
    """Whether this process has a tracer provider.

    A loaded OpenTelemetry is not enough: redis-py loads it wherever it is installed.
    """
    if (api := sys.modules.get(_API)) is None:
        return False
    try:
        # The proxy stands in until a provider is set. Its spans are never exported, but cost time.
        return not isinstance(api.get_tracer_provider(), api.ProxyTracerProvider)
    except Exception:  # noqa: BLE001  (a provider that the environment names and that fails must not fail a publish)
        _log.debug("cannot get the tracer provider", exc_info=True)
        return False


@contextmanager
def publishing(invalidation: Invalidation) -> Iterator[Invalidation]:
    """Wrap a publish in a span, and yield the invalidation with the span's traceparent.

    Shape:  the same object when there is no tracer provider, or it does not sample this span: the frame is then byte
            for byte what it would be without OpenTelemetry.
    """
    span = _publish_span(invalidation) if is_set_up() else None
    if span is None:
        yield invalidation
        return
    from opentelemetry.trace import use_span

    with use_span(span, end_on_exit=True):
        yield msgspec.structs.replace(invalidation, traceparent=_traceparent_of(span))


def trace_applied(invalidation: Invalidation, began_at_ns: int) -> None:
    """Record an apply that has just ended as a span in the trace of its publish, linked to the publish's span.

    Call it after the apply, so that no failure here can keep a replica from dropping entries.

    Units:  `began_at_ns` is the Unix clock's time in nanoseconds.
    Raises: nothing.
    """
    if _API not in sys.modules:
        return
    try:
        _record_applied(invalidation, began_at_ns)
    except Exception:  # noqa: BLE001  (the application's exporter or sampler must not end the subscription)
        _log.debug("cannot trace the apply of %s", invalidation.id, exc_info=True)


def _publish_span(invalidation: Invalidation) -> "Span | None":
    """Begin the span of a publish; None when it is not sampled, or cannot be created."""
    from opentelemetry.trace import SpanKind, get_tracer

    try:
        span = get_tracer(_SCOPE).start_span(
            f"publish {invalidation.namespace}", kind=SpanKind.PRODUCER, attributes=_attributes_of(invalidation, "send")
        )
        return span if span.is_recording() and span.get_span_context().trace_flags.sampled else None
    except Exception:  # noqa: BLE001  (as above: it must not fail a publish)
        _log.debug("cannot trace the publish of %s", invalidation.id, exc_info=True)
        return None


def _record_applied(invalidation: Invalidation, began_at_ns: int) -> None:
    from opentelemetry.trace import Link, SpanKind, get_current_span, get_tracer
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carried = TraceContextTextMapPropagator().extract({"traceparent": str(invalidation.traceparent)})
    publish = get_current_span(carried).get_span_context()
    if not publish.is_valid:
        return  # another publisher uses this field for something else
    span = get_tracer(_SCOPE).start_span(
        f"apply {invalidation.namespace}",
        context=carried,
        kind=SpanKind.CONSUMER,
        links=[Link(publish)],
        attributes=_attributes_of(invalidation, "process"),
        start_time=began_at_ns,
    )
    span.end()


def _traceparent_of(span: "Span") -> str:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier["traceparent"]


def _attributes_of(invalidation: Invalidation, operation: str) -> dict[str, str | int | bool]:
    """Return the span's attributes: counts instead of names, which may be thousands, and private."""
    attributes: dict[str, str | int | bool] = {
        "messaging.system": "broadcache",
        "messaging.operation.type": operation,
        "messaging.destination.name": invalidation.namespace,
        "messaging.message.id": invalidation.id,
        "broadcache.source": invalidation.source,
        "broadcache.reason": invalidation.reason,
        "broadcache.keys": len(invalidation.keys),
        "broadcache.tags": len(invalidation.tags),
        "broadcache.prefixes": len(invalidation.prefixes),
        "broadcache.everything": invalidation.everything,
    }
    if invalidation.seq is not None:
        attributes["broadcache.sequence"] = invalidation.seq
    return attributes
