"""Several processes behind one address: what a publisher concludes from the response that names them."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.pods import Pods, Received, answers, as_replica

from broadcache.publisher import Confirm, Fanout, Publisher
from broadcache.shared import Confirmation, FanoutReport, Keys, NotDelivered, Receipt

pytestmark = pytest.mark.anyio

LARGE = Keys(*[f"{number:04}".ljust(1_000, "x") for number in range(200)])
TOLD: list[dict[str, Any]] = [
    {"pid": 7, "outcome": "applied", "replicas": ["web-7"], "dropped": 1, "error": None},
    {"pid": 8, "outcome": "applied", "replicas": ["web-8"], "dropped": 1, "error": None},
]
REPLICAS = [{"replica": "web-7", "outcome": "applied"}, {"replica": "web-8", "outcome": "applied"}]


@pytest.fixture
async def pods() -> AsyncIterator[Pods]:
    async with Pods(1) as running:
        running[0].behaviour = as_replica(replica="web-7", processes=TOLD, replicas=REPLICAS)
        yield running


async def published(pods: Pods, *targets: Keys) -> tuple[Receipt, FanoutReport, Confirmation]:
    fanout = Fanout("web", 80, addresses=[f"{pods.hosts[0]}:{pods.port}"])
    async with Publisher(None, delivery="fanout", fanout=fanout) as publisher:
        receipt = await publisher.publish(*(targets or (Keys("a"),)), confirm=Confirm())
    assert receipt.fanout is not None
    assert receipt.confirmation is not None
    return receipt, receipt.fanout, receipt.confirmation


async def test_each_process_is_named_and_each_replica_confirmed(pods: Pods) -> None:
    _, report, confirmation = await published(pods)
    [outcome] = report.outcomes
    assert [(each.pid, each.outcome, each.replicas) for each in outcome.processes] == [
        (7, "applied", ("web-7",)),
        (8, "applied", ("web-8",)),
    ]
    assert (outcome.replicas, outcome.doubt) == (("web-7", "web-8"), None)
    assert (report.complete, report.discovery_complete, report.doubt) == (True, True, None)
    assert (confirmation.confirmed, confirmation.is_complete) == (("web-7", "web-8"), True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"processes": TOLD, "doubt": "others may serve it: no Unix sockets"}, "others may serve it: no Unix sockets"),
        ({"processes": None}, "the response does not name the processes that serve the address"),
        ({"processes": None, "doubt": "more"}, "and InvalidationEndpoint where another framework has the route"),
    ],
)
async def test_where_the_processes_are_not_known_the_receipt_is_incomplete_and_not_undelivered(
    pods: Pods, fields: dict[str, Any], said: str
) -> None:
    pods[0].behaviour = as_replica(replica="web-7", replicas=REPLICAS, **fields)
    _, report, confirmation = await published(pods)
    assert (report.succeeded, report.is_delivered, report.discovery_complete) == (1, True, True)
    assert not report.complete
    assert said in (report.doubt or "")
    assert f"reached 1 of 1 replica of web; at http://{pods[0].host}:{pods.port}/cache-inval" in report.summary()
    assert (confirmation.missing, confirmation.is_complete) == ((), False)
    assert said in (confirmation.doubt or "")


@pytest.mark.parametrize("status", [500, 200])
async def test_a_process_that_has_not_applied_it_is_named_and_missing(pods: Pods, status: int) -> None:
    frozen: dict[str, Any] = {
        "pid": 9,
        "outcome": None,
        "replicas": [],
        "dropped": None,
        "error": "it did not answer in time",
    }
    unknown = {**frozen, "pid": None}
    answer = {
        "replica": "web-7",
        "outcome": "not applied by all",
        "id": "order-7",
        "dropped": 2,
        "replicas": REPLICAS,
        "processes": [*TOLD, frozen, unknown],
        "doubt": None,
    }
    pods[0].behaviour = answers(status, json_of(answer))
    fanout = Fanout("web", 80, addresses=[f"{pods.hosts[0]}:{pods.port}"])
    async with Publisher(None, delivery="fanout", fanout=fanout) as publisher:
        said = (
            r"expected each process of this address to have applied it, but not so process 9 \(it did not answer in "
            r"time\), a process \(it did not answer in time\); publish again"
        )
        with pytest.raises(NotDelivered, match=said) as caught:
            await publisher.publish(Keys("a"), id="order-7")
    report = caught.value.report
    assert report is not None
    assert (report.succeeded, report.failed, report.is_delivered) == (0, 1, False)
    [outcome] = report.outcomes
    assert (outcome.status_code, outcome.is_success, outcome.replicas) == (status, False, ("web-7", "web-8"))
    assert [each.pid for each in outcome.processes] == [7, 8, 9, None]
    # Delivered by a log besides, they have confirmed it, whatever the third one does.
    async with Publisher(None, delivery="fanout", fanout=fanout) as publisher:
        confirmation = await believed(publisher, report)
    url = f"http://{pods[0].host}:{pods.port}/cache-invalidation"
    assert confirmation.confirmed == ("web-7", "web-8")
    assert confirmation.missing == (f"process 9 at {url}", f"process ? at {url}")
    assert not confirmation.is_complete


async def believed(publisher: Publisher, report: FanoutReport) -> Confirmation:
    """What confirms an invalidation whose fan-out has this report."""

    async def deliver(pending: Any) -> Receipt:
        return Receipt(pending.invalidation.id, "products", None, 0, fanout=report)

    publisher._confirming._deliver = deliver
    receipt = await publisher.publish(Keys("a"), confirm=Confirm())
    assert receipt.confirmation is not None
    return receipt.confirmation


def json_of(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode()


async def test_parts_that_different_processes_received_are_applied_by_all(pods: Pods) -> None:
    workers = itertools.cycle(
        [
            as_replica(replica="web-7", processes=TOLD, replicas=REPLICAS),
            as_replica(replica="web-8", processes=TOLD[::-1], replicas=REPLICAS[::-1]),
        ]
    )

    async def take_turns(received: Received, writer: asyncio.StreamWriter) -> None:
        await next(workers)(received, writer)

    pods[0].behaviour = take_turns
    _, report, confirmation = await published(pods, LARGE)
    assert (report.succeeded, report.complete) == (1, True)
    assert confirmation.confirmed == ("web-7", "web-8")


async def test_a_process_that_does_not_follow_the_namespace_is_listed(pods: Pods) -> None:
    other = {"pid": 8, "outcome": "not followed", "replicas": ["other-8"], "dropped": 0, "error": None}
    pods[0].behaviour = as_replica(replica="web-7", processes=[TOLD[0], other], replicas=REPLICAS[:1])
    _, report, confirmation = await published(pods)
    assert (report.succeeded, report.failed) == (1, 0)
    assert (confirmation.confirmed, confirmation.not_followed, confirmation.missing) == (("web-7",), ("other-8",), ())
    assert confirmation.is_complete
