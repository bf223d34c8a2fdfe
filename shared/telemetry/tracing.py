"""Traces: what links a publish to the applies that it causes, in a process that has set up OpenTelemetry.

OpenTelemetry is never imported here first. Whoever has set a tracer provider has loaded it, and then it is used; where
nobody has, a publish only asks whether there is one, and an apply does not look at all.
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

    That OpenTelemetry is loaded says little: redis-py loads it wherever it is installed.
    """
    if (api := sys.modules.get(_API)) is None:
        return False
    try:
        # What stands in while there is none makes spans that nobody sees, and each takes its time.
        return not isinstance(api.get_tracer_provider(), api.ProxyTracerProvider)
    except Exception:  # noqa: BLE001  (one that the environment names and that cannot be made: a publish must not fail by it)
        _log.debug("the tracer provider cannot be had", exc_info=True)
        return False


@contextmanager
def publishing(invalidation: Invalidation) -> Iterator[Invalidation]:
    """Cover a publish with a span, and give the invalidation that carries it to the replicas.

    Shape:  the very same invalidation when there is no tracer provider, or it does not sample this span: what is sent
            is then byte for byte what would be sent without OpenTelemetry.
    """
    span = _publish_span(invalidation) if is_set_up() else None
    if span is None:
        yield invalidation
        return
    from opentelemetry.trace import use_span

    with use_span(span, end_on_exit=True):
        yield msgspec.structs.replace(invalidation, traceparent=_traceparent_of(span))


def trace_applied(invalidation: Invalidation, began_at_ns: int) -> None:
    """Note an apply that has just ended, as a span in the trace of its publish, and linked to it.

    To be called after the apply: nothing that goes wrong here may keep a replica from forgetting.

    Units:  `began_at_ns` is the Unix clock's time in nanoseconds.
    Raises: nothing.
    """
    if _API not in sys.modules:
        return
    try:
        _note_applied(invalidation, began_at_ns)
    except Exception:  # noqa: BLE001  (somebody else's exporter or sampler must not end the subscription)
        _log.debug("the apply of %s could not be traced", invalidation.id, exc_info=True)


def _publish_span(invalidation: Invalidation) -> "Span | None":
    """Begin the span of a publish; None when nobody will see it."""
    from opentelemetry.trace import SpanKind, get_tracer

    try:
        span = get_tracer(_SCOPE).start_span(
            f"publish {invalidation.namespace}", kind=SpanKind.PRODUCER, attributes=_attributes_of(invalidation, "send")
        )
        return span if span.is_recording() and span.get_span_context().trace_flags.sampled else None
    except Exception:  # noqa: BLE001  (as above: a publish must not fail by it)
        _log.debug("the publish of %s could not be traced", invalidation.id, exc_info=True)
        return None


def _note_applied(invalidation: Invalidation, began_at_ns: int) -> None:
    from opentelemetry.trace import Link, SpanKind, get_current_span, get_tracer
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carried = TraceContextTextMapPropagator().extract({"traceparent": str(invalidation.traceparent)})
    publish = get_current_span(carried).get_span_context()
    if not publish.is_valid:
        return  # another publisher has a use of its own for this field
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
    """Say what it is, without its names: there may be thousands, and they may be private."""
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
