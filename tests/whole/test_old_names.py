"""Public names that were renamed work until 0.2, and say what to write instead."""

import importlib
from collections.abc import Sequence
from typing import Any, Self

import pytest

from broadcache.publisher import Publisher
from broadcache.publisher.fanout.fanout import Fanout
from broadcache.shared import FanoutReport, InvalidSettings, Keys
from broadcache.shared.invalidation import invalidation_of
from broadcache.shared.question import counting
from broadcache.shared.wire import encode_unsequenced


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        ("broadcache.publisher", "Teller", "InvalidationSender"),
        ("broadcache.shared", "Outcome", "AddressOutcome"),
        ("broadcache.subscriber", "Outcome", "ApplyOutcome"),
    ],
)
def test_an_old_name_gives_what_has_the_new_one_and_warns_where_it_stands(package: str, old: str, new: str) -> None:
    module = importlib.import_module(package)
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {package}\.{new}") as warned:
        assert getattr(module, old) is getattr(module, new)
    assert warned[0].filename == __file__
    assert old not in module.__all__


@pytest.mark.parametrize("package", ["broadcache.publisher", "broadcache.shared", "broadcache.subscriber"])
def test_a_name_that_never_was_is_still_an_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nonsense'"):
        _ = importlib.import_module(package).Nonsense


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("broadcache.publisher.diagnosis", "broadcache.publisher.doctor.diagnosis", "Diagnosis"),
        ("broadcache.publisher.diagnosis", "broadcache.publisher.doctor.fanout_check", "look_up"),
        ("broadcache.publisher.metrics", "broadcache.publisher.telemetry.prometheus", "PublisherMetrics"),
        ("broadcache.shared.logs", "broadcache.shared.process.logs", "JsonFormatter"),
    ],
)
def test_an_old_path_that_the_docs_named_leads_to_the_new_one(old: str, new: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{old}.{name} is now {new}.{name}"):
        assert getattr(importlib.import_module(old), name) is getattr(importlib.import_module(new), name)


@pytest.mark.parametrize("module", ["diagnosis", "metrics"])
def test_an_old_path_has_the_names_that_a_star_imports(module: str) -> None:
    names: dict[str, Any] = {}
    with pytest.warns(DeprecationWarning, match="is now broadcache"):
        exec(f"from broadcache.publisher.{module} import *", names)
    assert {"Diagnosis", "Discover", "look_up", "PublisherMetrics"} & names.keys()


REPORT = FanoutReport(
    service="web", total=1, succeeded=1, failed=0, complete=True, discovery="list", elapsed_ms=1.0, outcomes=()
)


class OldSender:
    """What a user wrote for the protocol as it was: `tell` where it has `send` now."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    async def __aenter__(self) -> Self:
        return self

    async def close(self) -> None: ...

    async def tell(self, frames: Sequence[bytes]) -> FanoutReport:
        self.frames += frames
        return REPORT


@pytest.mark.anyio
async def test_a_sender_with_the_old_method_sends_and_is_warned_of() -> None:
    with pytest.warns(DeprecationWarning, match=r"OldSender\.tell is now send") as warned:
        publisher = Publisher(None, delivery="fanout", fanout=(sender := OldSender()))  # type: ignore[arg-type]
    assert warned[0].filename == __file__
    async with publisher:
        receipt = await publisher.publish(Keys("a"))
    assert (receipt.fanout, len(sender.frames)) == (REPORT, 1)


@pytest.mark.anyio
async def test_a_sender_that_implements_the_old_name_of_the_protocol_sends() -> None:
    with pytest.warns(DeprecationWarning, match="Teller is now"):
        protocol = importlib.import_module("broadcache.publisher").Teller
    sender = type("Mine", (OldSender, protocol), {})()
    with pytest.warns(DeprecationWarning, match=r"Mine\.tell is now send"):
        publisher = Publisher(None, delivery="fanout", fanout=sender)
    async with publisher:
        await publisher.publish(Keys("a"))
    assert len(sender.frames) == 1


@pytest.mark.parametrize("fanout", ["web:8080", object(), type("Half", (), {"send": None})()])
def test_what_can_send_nothing_is_refused_when_the_publisher_is_built(fanout: Any) -> None:
    with pytest.raises(InvalidSettings, match="fanout: expected an object with __aenter__, close and send"):
        Publisher("redis://127.0.0.1:1", delivery="both", fanout=fanout)


@pytest.mark.anyio
async def test_old_members_do_what_the_new_ones_do(redis_url: str) -> None:
    with pytest.warns(DeprecationWarning, match="outbox_names_max is now retry_queue_names_max"):
        publisher = Publisher(redis_url, outbox_names_max=7)
    assert publisher._retry_queue_names_max == 7
    async with publisher:
        with pytest.warns(DeprecationWarning, match=r"outbox_length is now Publisher\.retry_queue_length"):
            assert publisher.outbox_length == 0
        with pytest.warns(DeprecationWarning, match=r"ask is now Publisher\.query"):
            answers = await publisher.ask(*counting(invalidation_of([Keys("a")])), timeout_seconds=0.1)
        assert answers.by_replica == {}


@pytest.mark.anyio
async def test_the_old_method_of_a_fanout_sends() -> None:
    async with Fanout("web", 1, addresses=["127.0.0.1:1"]) as fanout:
        with pytest.warns(DeprecationWarning, match=r"tell is now Fanout\.send"):
            assert (await fanout.tell(encode_unsequenced(invalidation_of([Keys("a")])))).succeeded == 0
