"""Traces: a publish and its applies are one trace where OpenTelemetry is set up, and nothing where it is not."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from tests.support.redis_probe import redis_probe
from tests.support.replicas import FAST, fill, new_cache, reached
from tests.support.waiting import until

from broadcache.cli.watch_printer import JsonPrinter
from broadcache.publisher import Publisher
from broadcache.shared import Keys, LinkLost
from broadcache.shared.invalidation import Invalidation, invalidation_of
from broadcache.shared.telemetry.tracing import publishing, trace_applied
from broadcache.shared.transport.redis.log import names_of
from broadcache.shared.wire import encode, encode_tails
from broadcache.subscriber import Subscriber

pytestmark = pytest.mark.anyio


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans that have ended, of a tracer provider for this test alone."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


async def logged_frame(redis_url: str, namespace: str = "products") -> bytes:
    async with redis_probe(redis_url) as probe:
        [[_, [_, frame]]] = await probe.call("XRANGE", names_of(namespace).log, "-", "+")
        assert isinstance(frame, bytes)
        return frame


async def test_a_publish_is_linked_to_its_apply_on_every_replica(redis_url: str, spans: InMemorySpanExporter) -> None:
    async with (
        Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as one,
        Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as other,
        Publisher(redis_url, source="shop") as publisher,
    ):
        with trace.get_tracer("test").start_as_current_span("PUT /products/42") as request:
            receipt = await publisher.publish(Keys("a", "b"), namespace="products", reason="price change")
        await reached(one, receipt)
        await reached(other, receipt)
    [publish] = named(spans, "publish products")
    applies = named(spans, "apply products")
    assert len(applies) == 2
    assert publish.parent is not None
    assert publish.parent.span_id == request.get_span_context().span_id
    assert publish.context is not None
    for apply in applies:
        assert (publish.kind, apply.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
        assert apply.parent is not None
        assert apply.context is not None
        assert apply.context.trace_id == publish.context.trace_id
        assert apply.parent.span_id == publish.context.span_id
        assert [link.context.span_id for link in apply.links] == [publish.context.span_id]
        assert apply.attributes is not None
        assert apply.attributes["messaging.message.id"] == receipt.id
        assert (apply.attributes["broadcache.keys"], apply.attributes["broadcache.sequence"]) == (2, 1)
        assert (apply.attributes["broadcache.source"], apply.attributes["broadcache.reason"]) == (
            "shop",
            "price change",
        )
        assert "a" not in apply.attributes.values()


async def test_what_is_replayed_from_the_log_is_linked_too(redis_url: str, spans: InMemorySpanExporter) -> None:
    subscriber = Subscriber(redis_url, caches={"products": new_cache()}, **FAST)
    async with Publisher(redis_url) as publisher:
        async with subscriber:
            await reached(subscriber, await publisher.publish(Keys("a"), namespace="products"))
            echoes = subscriber.stats().echoes
            await until(lambda: subscriber.stats().echoes > echoes + 1)  # what is proven is not read again
        receipt = await publisher.publish(Keys("b"), namespace="products")
        async with subscriber:
            await reached(subscriber, receipt)
            assert subscriber.stats().received["replayed"] == 1
    assert len(named(spans, "apply products")) == 2


async def test_what_is_posted_over_http_is_linked_too(redis_url: str, spans: InMemorySpanExporter) -> None:
    subscriber = Subscriber(redis_url, caches={"products": new_cache()})
    with publishing(invalidation_of([Keys("a")], namespace="products")) as traced:
        assert subscriber.apply(encode(traced)).outcome == "applied"
    [apply] = named(spans, "apply products")
    [publish] = named(spans, "publish products")
    assert publish.context is not None
    assert [link.context.span_id for link in apply.links] == [publish.context.span_id]


async def test_a_replicas_own_invalidation_is_traced_where_it_is_applied(
    redis_url: str, spans: InMemorySpanExporter
) -> None:
    async with (
        Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as one,
        Subscriber(redis_url, caches={"products": new_cache()}, **FAST) as other,
    ):
        receipt = await one.invalidate(Keys("a"), namespace="products")
        await reached(one, receipt)
        await reached(other, receipt)
    assert (len(named(spans, "publish products")), len(named(spans, "apply products"))) == (1, 2)


async def test_a_publish_that_fails_is_a_span_that_says_so(spans: InMemorySpanExporter) -> None:
    async with Publisher("redis://127.0.0.1:1", timeout_seconds=0.1) as publisher:
        with pytest.raises(LinkLost):
            await publisher.publish(Keys("a"), namespace="products")
    [publish] = named(spans, "publish products")
    assert publish.status.status_code is StatusCode.ERROR


async def test_a_traced_frame_carries_the_traceparent_of_its_publish(
    redis_url: str, spans: InMemorySpanExporter
) -> None:
    async with Publisher(redis_url) as publisher:
        await publisher.publish(Keys("a"), namespace="products")
    [publish] = named(spans, "publish products")
    assert publish.context is not None
    traceparent = f"00-{publish.context.trace_id:032x}-{publish.context.span_id:016x}-{publish.context.trace_flags:02x}"
    assert (await logged_frame(redis_url)).endswith(b',"confirm":false,"traceparent":"%s"}' % traceparent.encode())


async def test_without_a_tracer_provider_frames_are_what_they_were(redis_url: str) -> None:
    async with Publisher(redis_url) as publisher:
        await publisher.publish(Keys("a"), namespace="products")
    assert (await logged_frame(redis_url)).endswith(b',"confirm":false}')
    invalidation = invalidation_of([Keys("a")], namespace="products")
    with publishing(invalidation) as traced:
        assert traced is invalidation


async def test_without_a_provider_no_span_is_made(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def start_span(*arguments: object, **named: object) -> trace.Span:
        made.append(arguments)
        return trace.INVALID_SPAN

    monkeypatch.setattr(trace.NoOpTracer, "start_span", start_span)
    trace.get_tracer("test").start_span("any")
    assert len(made) == 1, "expected the stand-in to make spans that are not exported"
    async with Publisher(redis_url) as publisher:
        await publisher.publish(Keys("a"))
    assert len(made) == 1


async def test_a_provider_that_cannot_be_created_does_not_prevent_a_publish(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("the environment names a provider that is not installed")

    monkeypatch.setattr(trace, "get_tracer_provider", missing)
    async with Publisher(redis_url) as publisher:
        assert (await publisher.publish(Keys("a"))).is_logged


async def test_a_publish_that_is_not_sampled_sends_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: TracerProvider(sampler=ALWAYS_OFF))
    invalidation = invalidation_of([Keys("a")], namespace="products")
    with publishing(invalidation) as traced:
        assert traced is invalidation


async def test_the_parts_of_a_split_invalidation_all_carry_it(spans: InMemorySpanExporter) -> None:
    names = [f"{number:04}".ljust(1_000, "k") for number in range(200)]
    with publishing(invalidation_of([Keys(*names)], namespace="products")) as traced:
        tails = encode_tails(traced)
    assert len(tails) > 1
    ending = b'"traceparent":"%s"}' % str(traced.traceparent).encode()
    assert {tail.rpartition(b",")[2] for tail in tails} == {ending}


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-0-0-00", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_traceparent_that_is_none_is_no_span_and_no_error(
    traceparent: str, spans: InMemorySpanExporter
) -> None:
    trace_applied(Invalidation(keys=("a",), traceparent=traceparent), 1)
    assert spans.get_finished_spans() == ()


async def test_a_provider_that_fails_does_not_prevent_an_apply(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(SpanProcessor):
        def on_start(self, span: Span, parent_context: object = None) -> None:
            raise RuntimeError("the exporter is broken")

    provider = TracerProvider()
    cache = new_cache()
    async with Subscriber(redis_url, caches={"products": cache}, **FAST) as subscriber:
        fill(cache, "a", "b")
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
        async with Publisher(redis_url) as publisher:
            with publishing(invalidation_of([Keys("a")], namespace="products")) as traced:
                provider.add_span_processor(Failing())
                async with redis_probe(redis_url) as probe:
                    await probe.call("PUBLISH", names_of("products").channel, encode(traced))
            await until(lambda: "a" not in cache)
            await reached(subscriber, await publisher.publish(Keys("b"), namespace="products"))
        assert "b" not in cache
        assert subscriber.stats().lost == 0
    provider.shutdown()


async def test_what_is_watched_shows_the_traceparent_only_where_there_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = JsonPrinter("products")
    printer.on_invalidation(Invalidation(keys=("a",)))
    printer.on_invalidation(Invalidation(keys=("a",), traceparent="00-1"))
    untraced, traced = map(json.loads, capsys.readouterr().out.splitlines())
    assert "traceparent" not in untraced
    assert traced["traceparent"] == "00-1"


WITHOUT = """
import sys
from broadcache.shared.invalidation import Keys, invalidation_of
from broadcache.shared.telemetry.tracing import publishing, trace_applied
from broadcache.shared.wire import decode
frame = b'{"keys":["a"],"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}'
trace_applied(decode(frame, "products"), 1)
invalidation = invalidation_of([Keys("a")])
with publishing(invalidation) as traced:
    assert traced is invalidation
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_a_process_that_has_not_loaded_opentelemetry_does_not_load_it_by_publishing_or_applying() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "[]\n"), ran.stderr
