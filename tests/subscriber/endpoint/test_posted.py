"""The response to a POST: that of all processes of an address; the endpoint of other frameworks; what is not known."""

import errno
import os
import socket
import threading
from typing import Any

import pytest
from cachetools import TTLCache
from tests.subscriber.endpoint.test_members import AWAY, Named, app_with
from tests.support.web_server import served

from broadcache.publisher import Confirm, Fanout, Publisher
from broadcache.shared import Keys
from broadcache.shared.wire import FRAME_BYTES_MAX
from broadcache.subscriber import InvalidationEndpoint, LocalCache, Subscriber
from broadcache.subscriber.endpoint.posted import response_of
from broadcache.subscriber.endpoint.processes import listening, siblings
from broadcache.subscriber.endpoint.processes import own_socket as own_socket_module
from broadcache.subscriber.endpoint.processes.messages import Answer, Question, received_question
from broadcache.subscriber.endpoint.processes.own_socket import OwnSocket, own_socket
from broadcache.subscriber.endpoint.processes.places import CannotBind, Found
from broadcache.subscriber.endpoint.processes.siblings import PassedOn, Silent

pytestmark = pytest.mark.anyio

NOT_FOLLOWED: dict[str, Any] = {
    "replica": "web-1",
    "outcome": "not followed",
    "dropped": 0,
    "replicas": [{"replica": "web-1", "outcome": "not followed"}],
}
APPLIED: dict[str, Any] = {
    "replica": "web-1",
    "outcome": "applied",
    "dropped": 1,
    "replicas": [{"replica": "web-1", "outcome": "applied"}],
}


def answer_of(pid: int, outcome: str, dropped: int = 0) -> Answer:
    return Answer(pid=pid, is_concerned=True, outcome=outcome, dropped=dropped, replicas={f"web-{pid}": outcome})


def test_one_process_that_applied_it_is_enough_for_those_that_do_not_follow_it() -> None:
    status, document = response_of(NOT_FOLLOWED, PassedOn((answer_of(7, "not followed"), answer_of(8, "applied", 2))))
    assert status == 200
    assert (document["replica"], document["outcome"], document["dropped"]) == ("web-8", "applied", 2)
    assert [(each["pid"], each["outcome"]) for each in document["processes"]] == [
        (os.getpid(), "not followed"),
        (7, "not followed"),
        (8, "applied"),
    ]
    status, document = response_of(NOT_FOLLOWED, PassedOn((answer_of(7, "not followed"),)))
    assert (status, document["replica"], document["outcome"]) == (200, "web-1", "not followed")


def test_one_that_has_not_applied_it_is_enough_for_no_success() -> None:
    status, document = response_of(APPLIED, PassedOn((answer_of(7, "applied"),), (Silent(8, "it did not answer"),)))
    assert (status, document["outcome"]) == (500, "not applied by all")
    assert document["processes"][2] == {
        "pid": 8,
        "outcome": None,
        "dropped": None,
        "replicas": [],
        "error": "it did not answer",
    }


def test_another_framework_has_the_same_response() -> None:
    cache = LocalCache(TTLCache(maxsize=100, ttl=600), when_incoherent="serve")
    subscriber = Subscriber(AWAY, caches={"products": cache}, replica_id="web-1", start_timeout_seconds=0)
    endpoint = InvalidationEndpoint(subscriber)
    with subscriber:
        assert cache.store(cache.begin_load("a"), "old")
        status, document = endpoint.post(b'{"namespace":"products","keys":["a"],"id":"one"}')
        assert cache.get("a") is None
    assert status == 200
    assert {each["pid"]: each["replicas"] for each in document["processes"]} == {os.getpid(): ["web-1"]}
    with pytest.raises(TypeError, match="expected at least one subscriber"):
        InvalidationEndpoint()


async def test_a_process_without_a_socket_says_so_and_the_receipt_is_incomplete(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot() -> Any:
        raise CannotBind("no socket could be bound: it is full")

    monkeypatch.setattr(own_socket_module, "bind", cannot)
    products = Named("products")
    async with served(app_with(products)) as client:
        assert "cannot be found by other processes of the same address: no socket could be bound" in caplog.text
        port = client.base_url.port
        assert port is not None
        fanout = Fanout("web", port, addresses=[f"127.0.0.1:{port}"])
        async with Publisher(None, delivery="fanout", fanout=fanout) as publisher:
            receipt = await publisher.publish(Keys("a"), namespace="products", confirm=Confirm())
            assert receipt.fanout is not None
            assert (receipt.fanout.is_delivered, receipt.fanout.complete) == (True, False)
            assert "no socket could be bound: it is full" in (receipt.fanout.doubt or "")
            assert receipt.confirmation is not None
            assert (receipt.confirmation.confirmed, receipt.confirmation.is_complete) == (("products-1",), False)
            # As soon as one can be bound, it is.
            monkeypatch.undo()
            receipt = await publisher.publish(Keys("a"), namespace="products", confirm=Confirm())
            assert receipt.confirmation is not None
            assert receipt.confirmation.is_complete


def test_a_platform_that_lists_no_descriptors_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_: object) -> Any:
        raise OSError("the platform does not list the descriptors of a process")

    monkeypatch.setattr(siblings, "listeners", cannot)
    passed_on = siblings.pass_on(b"")
    assert (passed_on.answers, passed_on.silent) == ((), ())
    assert "the platform does not list the descriptors of a process" in (passed_on.doubt or "")


def test_without_descriptors_it_is_not_known_whether_there_are_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(siblings, "found", exhausted)
    with socket.create_server(("127.0.0.1", 0)):
        passed_on = siblings.pass_on(b"")
    assert (passed_on.answers, passed_on.silent) == ((), ())
    assert "it is not known whether they have applied it: [Errno 24] Too many open files" in (passed_on.doubt or "")


def test_a_process_that_cannot_list_its_descriptors_applies_what_others_pass_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(_: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(own_socket_module, "listeners", exhausted)
    products = Named("products")
    own = OwnSocket()
    own.join(products.subscriber)
    question = Question(("127.0.0.1:80",), listening.network(), may_have_twins=False)
    answer = own._answered(question, b'{"namespace":"products","keys":["a"],"id":"one"}')
    assert (answer.is_concerned, answer.replicas) == (True, {"products-1": "applied"})


def test_no_more_is_passed_on_than_others_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(siblings, "found", lambda: [Found("/one", None)])

    def call_all(_: object, message: bytes, __: float) -> list[Any]:
        sent.append(message)
        return []

    monkeypatch.setattr(siblings, "call_all", call_all)
    with socket.create_server(("127.0.0.1", 0)):
        siblings.pass_on(b"x" * (FRAME_BYTES_MAX + 100))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Thread(target=ours.sendall, args=(sent[0],)).start()
        assert len(received_question(theirs)[1]) == FRAME_BYTES_MAX + 1


async def test_the_socket_is_there_from_before_the_start_until_after_the_end() -> None:
    one, other = Named("products"), Named("users")
    app_with(one, other)
    addresses = [own_socket.address]
    async with one:
        addresses.append(own_socket.address)
        async with other:
            addresses.append(own_socket.address)
        addresses.append(own_socket.address)
    addresses.append(own_socket.address)
    assert addresses[1] is not None
    assert addresses == [None, *[addresses[1]] * 3, None]


def test_the_socket_is_there_until_the_caches_have_served_for_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LocalCache(TTLCache(maxsize=100, ttl=600), when_incoherent="serve")
    subscriber = Subscriber(AWAY, caches={"products": cache}, start_timeout_seconds=0)
    served_then: list[Any] = []
    with subscriber:
        assert cache.store(cache.begin_load("a"), "old")
        leave = own_socket.leave

        def record(leaving: Any) -> None:
            served_then.append(cache.get("a"))
            leave(leaving)

        monkeypatch.setattr(own_socket, "leave", record)
    assert served_then == [None]


async def test_a_process_without_an_endpoint_has_no_socket() -> None:
    socket = OwnSocket()
    socket.join(Named("products").subscriber)
    assert (socket.address, socket.problem) == (None, None)
